"""What a step has on one device: its buckets, their layouts and workspace, and the decision.

A bucket holds the pairs that one set of launches can serve: one device, parameter dtype, rank and
set of options. Phase, counts, clip coefficient and the skip flag are read and written on the
device only.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.bucket import Bucket, bucket_key
from loft_kernels.backends.triton.layout import Layout, new_layout, signature, step_counts
from loft_kernels.plan import Pair


@dataclass(slots=True)
class Decision:
    """What the device decided, still on the device.

    Attributes:
        values: fp64 (skip, coefficient, norm).
    """

    values: Tensor

    @property
    def skip(self) -> Tensor:
        """1 if the step is skipped whole, fp32 as torch's fused optimizers take it."""
        return self.values[tables.SKIP.value].float()

    @property
    def coefficient(self) -> Tensor:
        """What every gradient is multiplied by."""
        return self.values[tables.COEFFICIENT.value]


class DevicePlan:
    """The launches on one device, and what only changes when shapes or addresses do.

    Args:
        device: of the pairs that it serves.

    Attributes:
        buckets: of the pairs that were laid out last.
        numbers: of all sides of the step, in the same order on every device.
        own: which of them are measured here.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing cached."""
        self.device = device
        self.capability = configs.capability_of(device)
        self.buckets: list[Bucket] = []
        self.numbers = torch.empty(0, tables.NUMBERS.value, dtype=torch.float64, device=device)
        self.own = slice(0, 0)
        # Written by every step, for the launches that come after it on the stream.
        self.decision = Decision(torch.empty(3, dtype=torch.float64, device=device))
        # By bucket and tile: what the layout was made for, the step counts of its pairs, and it.
        self._layouts: dict[tuple, tuple[tuple, list[Tensor], Layout]] = {}
        self._earlier = self._layouts
        self._constants: dict[tuple, Tensor] = {}

    def lay_out(
        self, pairs: Sequence[Pair], members: Sequence[int], exact: bool, first: int
    ) -> None:
        """Sort pairs by what one set of launches can serve.

        Args:
            pairs: of the step, on all devices.
            members: which of them are here.
            exact: no product of reduced precision.
            first: of the sides' numbers, the first that is measured here.
        """
        by_key: dict[tuple, list[int]] = {}
        for k in members:
            by_key.setdefault(bucket_key(pairs[k]), []).append(k)
        shape = (2 * len(pairs), tables.NUMBERS.value)
        self.numbers = torch.empty(shape, dtype=torch.float64, device=self.device)
        self.own = slice(first, first + 2 * len(members))
        # A layout that is not used now goes: its pairs may part from each other meanwhile.
        self._earlier, self._layouts = self._layouts, {}
        for key, places in by_key.items():
            sides = [side for k in places for side in (2 * k, 2 * k + 1)]
            whole = len(places) == len(pairs)
            own = [pairs[k] for k in places]
            new = Bucket(self, key, own, None if whole else sides, exact, self.numbers, first)
            self.buckets.append(new)
            first += new.sides
        self._earlier = {}

    def forget_layouts(self) -> None:
        """Drop what relies on the phases of pairs."""
        self.buckets, self._layouts = [], {}

    def current(self) -> contextlib.AbstractContextManager:
        """Make the plan's device the current one."""
        cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device) if cuda else contextlib.nullcontext()

    def constant(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that never changes, made and brought to the device once."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]

    def layout(
        self, key: tuple, pairs: Sequence[Pair], tile: configs.UpdateTile, operand_rows: int
    ) -> Layout:
        """Return the tiles and workspace of a bucket, built anew when its pairs change."""
        wanted, steps = signature(pairs), step_counts(pairs)
        cached = self._earlier.get((key, tile))
        # Pairs of the same shapes that are not the same may be in different phases.
        if (
            cached is None
            or cached[0] != wanted
            or len(cached[1]) != len(steps)
            or not all(map(operator.is_, cached[1], steps))
        ):
            new = new_layout(key[0], pairs, self.device, self.capability, tile, operand_rows)
            cached = (wanted, steps, new)
        self._layouts[key, tile] = cached
        return cached[2]
