"""Which pairs an optimizer holds, where they stand, and what one step needs to know of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loft_kernels.adapters import Scaling
from loft_kernels.plan import Pair, StepOptions

if TYPE_CHECKING:
    from loft_kernels.optimizer import LoFTAdamW

Place = tuple[int, int]


@dataclass(slots=True)
class PairSlot:
    """Where a pair's factors stand: (group, position), which survives copies and swaps."""

    name: str
    b: Place
    a: Place
    scaling: Scaling


class Gathered:
    """The pairs of the last step, for as long as only gradients, rates and scalings change.

    Checking a hundred pairs anew costs more host time than launching their step.

    Args:
        optimizer: where they were gathered.
        pairs: checked pairs with allocated state, one per slot.

    Attributes:
        pairs: the pairs; after :meth:`refresh` their gradients are set by :meth:`bind` only.
        backend: what ``backends.choose`` said of them, once asked.
        moving: what the address table needs of this step: addresses and strides of the gradients
            (0 and () where there is none) and scalings.
    """

    def __init__(self, optimizer: LoFTAdamW, pairs: list[Pair]) -> None:
        """Remember everything that would call for new checks."""
        self.pairs = pairs
        self.backend: tuple[str, str] | None = None
        self._factors = [f for pair in pairs for f in (pair.b, pair.a)]
        self._params = [f.param for f in self._factors]
        self._states = [optimizer.state.get(p) for p in self._params]
        self._moments = self._first_moments()
        self._scalings = [slot.scaling for slot in optimizer._slots]
        self._listed = [p for group in optimizer.param_groups for p in group["params"]]
        paired = {place for slot in optimizer._slots for place in (slot.b, slot.a)}
        self.plain = [
            (g, i, p)
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if (g, i) not in paired
        ]
        self._mode = (pairs[0].options.second_moment, pairs[0].options.calibrate)
        self._seen_options: list[StepOptions] = []
        self._seen_rates: list[Any] = []
        self._seen = self._look()

    def _look(self) -> tuple[list[Any], ...]:
        """List what has to stay the same and compares quickly; note what moves."""
        grads = [p.grad for p in self._params]
        strides: list[Any] = [() if g is None else g.stride() for g in grads]
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        self.moving = (addresses, strides, [s.read() for s in self._scalings])
        return (
            [p.data_ptr() for p in self._params],
            [p.dtype for p in self._params],
            [p.shape for p in self._params],
            [p.stride() for p in self._params],
            [None if g is None else g.shape for g in grads],
            [None if g is None else g.dtype for g in grads],
        )

    def _same_objects(self, optimizer: LoFTAdamW) -> bool:
        """Tell whether the optimizer still holds the same tensors and state."""
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        return (
            len(listed) == len(self._listed)
            and all(map(operator.is_, listed, self._listed))
            and all(map(operator.is_, map(optimizer.state.get, self._params), self._states))
            and all(map(operator.is_, self._first_moments(), self._moments))
        )

    def _first_moments(self) -> list[Tensor | None]:
        """List the first moments, by which an exchanged state shows."""
        return [None if s is None else s.get("exp_avg") for s in self._states]

    def bind(self) -> None:
        """Set the gradients and scalings of this step on the pairs."""
        for factor in self._factors:
            factor.grad = factor.param.grad
        for pair, scaling in zip(self.pairs, self.moving[2], strict=True):
            pair.scaling = scaling

    def release_gradients(self) -> None:
        """Let go of this step's gradients, which zero_grad() is to free."""
        for factor in self._factors:
            factor.grad = None

    def refresh(self, optimizer: LoFTAdamW) -> bool:
        """Look at this step's gradients, rates and scalings; False if more has changed."""
        if not self._same_objects(optimizer):
            return False
        try:
            if self._look() != self._seen:
                return False
        except RuntimeError:  # a gradient without strides or address: sparse
            return False
        groups = optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if not all(map(operator.is_, rates, self._seen_rates)) or not self._seen_rates:
            self._seen_rates = rates
            for factor in self._factors:
                factor.lr = rates[factor.group]
        options = [step_options(group) for group in groups]
        if options == self._seen_options:
            return True
        for pair in self.pairs:
            own = options[pair.b.group]
            if pair.a.group != pair.b.group and options[pair.a.group] != own:
                return False
            pair.options = own
        self._seen_options = options
        used = {pair.b.group for pair in self.pairs}
        return all((options[g].second_moment, options[g].calibrate) == self._mode for g in used)


def step_options(group: Mapping[str, Any]) -> StepOptions:
    """Read the options of one group."""
    beta1, beta2 = group["betas"]
    return StepOptions(
        float(beta1),
        float(beta2),
        group["eps"],
        group["weight_decay"],
        group["maximize"],
        group["damping"],
        group["alternate"],
        group["calibrate"],
        group["second_moment"],
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse invalid hyper-parameters, in torch's words."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        lr = float(lr)
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    for name, label in (
        ("eps", "epsilon"),
        ("weight_decay", "weight_decay"),
        ("damping", "damping"),
    ):
        if not options[name] >= 0.0:
            raise ValueError(f"Invalid {label} value: {options[name]}")
    if len(options["betas"]) != 2:
        raise ValueError(f"Invalid betas: {options['betas']}: they must be two numbers")
    for index, beta in enumerate(options["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if options["second_moment"] not in ("full", "diagonal"):
        raise ValueError(
            f"Invalid second_moment: {options['second_moment']!r}: known are 'full', 'diagonal'"
        )
