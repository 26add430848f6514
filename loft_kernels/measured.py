"""What the host knows between measuring a step and writing it, on every path that decides there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from loft_kernels.plan import Factor, Pair


@dataclass(slots=True)
class HostNumbers:
    """What the host knows of one side after the only synchronisation of the step.

    Attributes:
        step: steps taken so far.
        guard: bound on m~^2 / v so far.
        norm_sq: ``||G P||_F^2`` of this gradient; not finite if the gradient is not.
        stored_sq: squared norm of what the second moment squares; it has to fit the state.
        unchanged: the partner's basis is bitwise that of the last visit.
        moving: the factor moves at this step.
    """

    step: int = 0
    guard: float = 0.0
    norm_sq: float = 0.0
    stored_sq: float = 0.0
    unchanged: bool = False
    moving: bool = False


class MeasuredSide(Protocol):
    """What the decision reads of one factor, whichever path measured it."""

    factor: Factor
    host: HostNumbers


AnySide = TypeVar("AnySide", bound=MeasuredSide)


@dataclass(slots=True)
class PreparedPair(Generic[AnySide]):
    """A pair and those of its sides that have a gradient, B first."""

    pair: Pair
    sides: list[AnySide]

    def moves(self) -> list[bool]:
        """Tell which sides move: B first, then in turns; a lone side moves at every step."""
        if len(self.sides) < 2 or not self.pair.options.alternate:
            return [True] * len(self.sides)
        # The phase is the parity of the pair's own count; a side that was frozen for a while
        # has taken fewer steps than the pair.
        phase = max(side.host.step for side in self.sides) % 2
        return [phase == 0, phase == 1]


class HostPath(Protocol):
    """A backend whose decisions are taken on the host: measure all pairs, then write."""

    def prepare(
        self, pairs: Sequence[Pair], extra: Sequence[Tensor]
    ) -> tuple[list[PreparedPair[Any]], list[float]]:
        """Measure; see :func:`loft_kernels.functional.prepare`."""

    def apply_(self, prepared: Sequence[PreparedPair[Any]], coefficient: float) -> None:
        """Write; see :func:`loft_kernels.functional.apply_`."""


def read_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Read 0-d tensors with one transfer per device, in the order given."""
    values = [math.nan] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for k, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(k)
    for members in by_device.values():
        stacked = torch.stack([tensors[k].double() for k in members]).tolist()
        for k, value in zip(members, stacked, strict=True):
            values[k] = value
    return values
