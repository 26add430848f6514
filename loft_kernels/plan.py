"""What one step works on: the pairs with their tensors, resolved before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

SecondMoment = Literal["full", "diagonal"]

# What a parameter group can set for itself, as LoFTAdamW's arguments of the same names.
GROUP_OPTIONS = frozenset(
    {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "maximize",
        "damping",
        "alternate",
        "calibrate",
        "second_moment",
    }
)


@dataclass(frozen=True, slots=True)
class StepOptions:
    """Hyper-parameters that both factors of a pair share at this step."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    damping: float
    alternate: bool
    calibrate: bool
    second_moment: SecondMoment


@dataclass(slots=True)
class Factor:
    """One side of a LoRA pair at this step.

    Attributes:
        name: the parameter's name, for messages.
        param: the parameter as stored: ``lora_B`` is ``[m, r]``, ``lora_A`` is ``[r, n]``; of a
            convolution the view of it that is a matrix.
        grad: its gradient, or None: then this side neither moves nor accumulates.
        transposed: True for ``lora_A``, whose rows are the columns of the stored tensor.
        lr: learning rate of the factor's group.
        group: index of that group.
        state: the optimizer's state of the parameter (see ``state.py``).
        stored: the parameter itself, as the optimizer lists it and keys its state.
    """

    name: str
    param: Tensor
    grad: Tensor | None
    transposed: bool
    lr: float | Tensor
    group: int
    state: dict[str, Any]
    stored: Tensor

    @property
    def rows(self) -> Tensor:
        """The factor as ``rows x r``, a view of the parameter."""
        return self.param.T if self.transposed else self.param

    @property
    def grad_rows(self) -> Tensor:
        """The gradient as ``rows x r``, a view.

        Raises:
            RuntimeError: there is no gradient at this step.
        """
        if self.grad is None:
            raise RuntimeError(f"{self.name} has no gradient at this step")
        return self.grad.T if self.transposed else self.grad


@dataclass(slots=True)
class Pair:
    """A LoRA pair at this step: ``W = W0 + scaling * B @ A``."""

    name: str
    b: Factor
    a: Factor
    scaling: float
    options: StepOptions

    @property
    def sides(self) -> tuple[tuple[Factor, Factor], tuple[Factor, Factor]]:
        """Both (factor, partner) combinations, B first."""
        return (self.b, self.a), (self.a, self.b)


class Outside(NamedTuple):
    """What the decision needs beside the pairs.

    Attributes:
        plain_grads: gradients of all other parameters, on any devices.
        grad_scale: GradScaler's scale, or None.
        found_inf: GradScaler's flag, or None.
    """

    plain_grads: Sequence[Tensor] = ()
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


# What changes from step to step: per factor, B and A of every pair in turn, the address of its
# gradient (0 without one) and its strides (() without one); and per pair the scaling.
Moving = tuple[list[Any], list[Any], list[float]]


def addresses_and_strides(grads: Sequence[Tensor | None]) -> tuple[list[int], list[Any]]:
    """List where gradients are, as in ``Moving``."""
    return (
        [0 if g is None else g.data_ptr() for g in grads],
        [() if g is None else g.stride() for g in grads],
    )
