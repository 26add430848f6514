"""Which pairs an optimizer holds, where they stand, and what one step needs to know of them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loft_kernels.adapters import Scaling
from loft_kernels.exchanged import Held
from loft_kernels.plan import Moving, Pair, StepOptions, addresses_and_strides

if TYPE_CHECKING:
    from loft_kernels.optimizer import LoFTAdamW

Place = tuple[int, int]

# Read of hundreds of tensors at every step: a loop in C takes half the time of a comprehension.
_GRAD, _PARAMS = operator.attrgetter("grad"), operator.itemgetter("params")
_BASIS = operator.itemgetter("partner_basis")

# State whose memory users offload, all of it or the large tensors only.
_OFFLOADED = ("exp_avg", "second_moment", "master")


@dataclass(slots=True)
class PairSlot:
    """Where a pair's factors stand: (group, position), which survives copies and swaps."""

    name: str
    b: Place
    a: Place
    scaling: Scaling
    held: Held


class _ByIdentity(TorchFunctionMode):
    """Within, two tensors are equal only if they are one object.

    Python compares the items of lists and dicts by identity first, in C, and asks a tensor only
    about another one, which would compare their values, and wait for the device to say so.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        """Say that another tensor is another one."""
        return False


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
        self._asked = (optimizer.backend, optimizer.precision)
        self._factors = [f for pair in pairs for f in (pair.b, pair.a)]
        self._params = [f.param for f in self._factors]
        self._owned = [s for p in self._params if (s := optimizer.state.get(p))]
        entries = [item for state in self._owned for item in state.items()]
        self._keys = [key for key, _ in entries]
        # Weakly: whoever exchanges state for a copy elsewhere is to get its memory back.
        self._entries = [_weak(value) for _, value in entries]
        self._offloaded = [
            (operator.itemgetter(key), [state for state in self._owned if key in state])
            for key in _OFFLOADED
        ]
        self._offloaded_addresses = self._read_offloaded()
        self._based = [state for state in self._owned if "partner_basis" in state]
        self._all_state, self._stored = optimizer.state, dict(optimizer.state)
        self._untouched = _untouched([self._all_state, *self._owned])
        self._scalings = [slot.scaling for slot in optimizer._slots]
        self._places: list[Any] = [scaling.place for scaling in self._scalings]
        self._numbers: list[Any] = []
        self._usable: list[float] = []
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
        self._confirmed, self._bound = False, True
        self._addresses = self._read_addresses()
        grads = [p.grad for p in self._params]
        self._kinds, self._grads_alike = _kinds(grads), _alike(grads)
        addresses, self._strides = addresses_and_strides(grads)
        self.moving: Moving = (addresses, self._strides, self._read_scalings())
        self._params_alike = _alike(self._params)
        self._seen = self._look()

    def _read_scalings(self) -> list[float]:
        """Read all scalings, and check them when they change."""
        numbers: list[Any] = []
        try:
            numbers = [
                s[adapter] if type(s := module().scaling) is dict else s
                for module, adapter in self._places
            ]
        except (AttributeError, KeyError, TypeError):  # one without a module, or of another kind
            return [s.read() for s in self._scalings]
        if numbers != self._numbers:
            self._usable = [s.read() for s in self._scalings]
            # A tensor may change in place.
            self._numbers = numbers if all(type(s) in (float, int) for s in numbers) else []
        return self._usable

    def _look(self) -> tuple[Any, ...]:
        """List what has to stay the same of the parameters beside their addresses."""
        return (
            [p.dtype for p in self._params],
            [p.shape for p in self._params],
            [p.stride() for p in self._params],
        )

    def _same_objects(self, optimizer: LoFTAdamW) -> bool:
        """Tell whether the optimizer still holds the same tensors and state."""
        listed = list(chain.from_iterable(map(_PARAMS, optimizer.param_groups)))
        with _ByIdentity():
            if listed != self._listed:
                return False
        if not (optimizer.state is self._all_state and self._untouched()):
            if not self._same_state(optimizer):
                return False
            self._all_state = optimizer.state
            self._untouched = _untouched([self._all_state, *self._owned])
        # Offloading may leave the tensors and give them other memory.
        return self._read_offloaded() == self._offloaded_addresses

    def _same_state(self, optimizer: LoFTAdamW) -> bool:
        """Tell whether the pairs' state has the same entries, in the same dicts."""
        if list(chain.from_iterable(self._owned)) != self._keys:
            return False
        entries = list(chain.from_iterable(map(dict.values, self._owned)))
        with _ByIdentity():
            # Kernels keep the addresses of state: an exchanged tensor calls for new ones.
            if entries != [entry() for entry in self._entries]:
                return False
        return (
            # Entries stay in order and new ones come last; a lookup would hash every tensor.
            len(optimizer.state) >= len(self._stored)
            and all(map(operator.is_, optimizer.state, self._stored))
            and all(map(operator.is_, optimizer.state.values(), self._stored.values()))
        )

    def _read_offloaded(self) -> list[list[int]]:
        """List where the state that users offload is, by key."""
        return [list(map(Tensor.data_ptr, map(get, states))) for get, states in self._offloaded]

    def _read_addresses(self) -> list[int]:
        """List where the factors and the bases of their partners are, which `gram` reads."""
        return list(map(Tensor.data_ptr, chain(self._params, map(_BASIS, self._based))))

    def bind(self) -> None:
        """Set the gradients and scalings of this step on the pairs."""
        self._bound = True
        for factor in self._factors:
            factor.grad = factor.param.grad
        for pair, scaling in zip(self.pairs, self.moving[2], strict=True):
            pair.scaling = scaling

    def release_gradients(self) -> None:
        """Let go of this step's gradients, which zero_grad() is to free."""
        if self._bound:
            self._bound = False
            release_gradients(self.pairs)

    def measure_ahead(self, optimizer: LoFTAdamW, plan: Any) -> None:
        """Let the device measure the pairs of the last step while the host checks them again.

        Only workspace is written; whatever is measured of pairs that fail the check is dropped.

        Args:
            optimizer: that holds the pairs.
            plan: its launches, or None.
        """
        # Whatever became of the last step, its glance and its measurement were its own.
        self._confirmed = False
        if plan is None:
            return
        plan.forget()
        if self._asked != (optimizer.backend, optimizer.precision):
            return
        if self.backend == ("triton", "") and (moving := self.glance()) is not None:
            plan.measure(
                self.pairs,
                moving,
                max_norm=optimizer.max_grad_norm,
                exact=optimizer.precision == "ieee",
                confirm=partial(self.confirm, optimizer.param_groups),
            )

    def glance(self) -> Moving | None:
        """Look at what a launch that only reads factors and gradients has to know of this step.

        Returns:
            ``moving`` with the scalings of the last step, or None if the pairs are to be checked.
        """
        grads = list(map(_GRAD, self._params))
        try:
            found = self._look_at(grads)
            if found is None or self._read_addresses() != self._addresses:
                return None
        # A gradient without strides or address: sparse. State without an entry, or with another.
        except (RuntimeError, KeyError, TypeError):
            return None
        self.moving = (*found, self.moving[2])
        return self.moving

    def _look_at(self, grads: list[Any]) -> tuple[list[int], list[Any]] | None:
        """Return addresses and strides of gradients; None if one is of another kind."""
        if self._grads_alike(*grads):
            return list(map(Tensor.data_ptr, grads)), self._strides
        return addresses_and_strides(grads) if _kinds(grads) == self._kinds else None

    def confirm(self, groups: list[dict[str, Any]]) -> Moving | None:
        """Look at scalings, rates and options after a glance; None if the pairs are to be checked.

        Enough to measure, not to write: :meth:`refresh` looks at the rest.
        """
        self.moving = (*self.moving[:2], self._read_scalings())
        self._confirmed = self._take_options(groups)
        return self.moving if self._confirmed else None

    def refresh(self, optimizer: LoFTAdamW) -> bool:
        """Take over what moves; False if anything else has changed since the pairs were checked."""
        groups = optimizer.param_groups
        if self._asked != (optimizer.backend, optimizer.precision):
            return False
        if not self._confirmed and (self.glance() is None or self.confirm(groups) is None):
            return False
        self._confirmed = False
        return self._same_objects(optimizer) and (
            self._params_alike(*self._params) or self._look() == self._seen
        )

    def _take_options(self, groups: list[dict[str, Any]]) -> bool:
        """Set rates and options on the pairs where they changed; False if a pair's two differ."""
        rates = [group["lr"] for group in groups]
        if not (self._seen_rates and all(map(operator.is_, rates, self._seen_rates))):
            self._seen_rates = rates
            for factor in self._factors:
                factor.lr = rates[factor.group]
        options = [step_options(group) for group in groups]
        if options == self._seen_options:
            return True
        self.backend = None  # a backend may not serve the new ones
        self._seen_options = []  # what is refused is looked at again
        for pair in self.pairs:
            own = options[pair.b.group]
            if pair.a.group != pair.b.group and options[pair.a.group] != own:
                return False
            if (own.second_moment, own.calibrate) != self._mode:
                return False
            pair.options = own
        self._seen_options = options
        self.bind()  # whoever chooses or lays out anew looks at the gradients
        return True


def release_gradients(pairs: Iterable[Pair]) -> None:
    """Let go of the gradients of a step."""
    for pair in pairs:
        pair.b.grad = pair.a.grad = None


def _weak(value: Any) -> Callable[[], Any]:
    """Refer to a tensor without keeping it; to anything else as it is."""
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value


def _alike(tensors: list[Any]) -> Callable[..., bool]:
    """Return a quick test whether other tensors have the dtypes, shapes and strides of these.

    It is the one behind ``torch.compile``, which looks at devices and more. False says nothing:
    they have to be read then, as always in a torch without it or where a gradient is missing.
    """
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (AttributeError, TypeError):
        return lambda *_: False


def _untouched(dicts: list[dict[Any, Any]]) -> Callable[[], bool]:
    """Return a quick test whether nobody has written to these dicts since.

    As in :func:`_alike`, False says nothing. Their versions tell, which ``torch.compile`` reads.
    """
    try:
        version = torch._C._dynamo.guards.dict_version
        known = list(map(version, dicts))
        return lambda: list(map(version, dicts)) == known
    except (AttributeError, TypeError):
        return lambda: False


def _kinds(grads: list[Any]) -> list[Any]:
    """Name dtype, shape and device of every gradient; None where there is none."""
    return [None if g is None else (g.dtype, g.shape, g.device) for g in grads]


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
