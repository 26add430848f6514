"""One LoFT step over all pairs: read everything, decide once, then write.

The driver of the reference path, split where every backend splits: :func:`prepare` reads the
snapshot (both factors as they were when the gradient was computed) and measures, and
:func:`apply_` transports the moments and moves the factors. Between the two stands one decision
for the whole optimizer (see ``clipping.py``): is everything finite, and how are gradients scaled?
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loft_kernels import reference as ref
from loft_kernels.measured import HostNumbers, PreparedPair, read_numbers
from loft_kernels.plan import Factor, Pair, StepOptions
from loft_kernels.state import refresh_master_, state_dtype


@dataclass(slots=True)
class Side:
    """One factor of a pair after :func:`prepare`; nothing is written yet.

    Attributes:
        factor: the factor and its state.
        basis: orthonormal basis of the partner's snapshot.
        g: scaled gradient in that basis, ``rows x r`` fp64.
        remembered: what the state keeps of the partner: Q, or L without calibration.
        host: numbers that the host decides on.
        moments: what a moving factor's step is made of, until it has moved: m, and P in parts
            (see :func:`reference.virtual_adam_projection`).
    """

    factor: Factor
    basis: ref.Basis
    g: Tensor
    remembered: Tensor
    host: HostNumbers = field(default_factory=HostNumbers)
    moments: tuple[Tensor, Tensor | None, Tensor] | None = None


def prepare(
    pairs: Sequence[Pair], extra: Sequence[Tensor]
) -> tuple[list[PreparedPair[Side]], list[float]]:
    """Compute bases and scaled gradients of all pairs and read the numbers to decide on.

    Args:
        pairs: checked pairs with at least one gradient each; neither parameters, gradients nor
            state are changed.
        extra: further 0-d tensors to bring to the host in the same transfer.

    Returns:
        The prepared pairs in order, and the values of ``extra``.
    """
    wanted = [(p, x, y) for p in pairs for x, y in p.sides if x.grad is not None]
    bases = ref.orthonormal_bases(
        [y.rows for _, _, y in wanted], [p.options.damping for p, _, _ in wanted]
    )
    prepared: list[PreparedPair[Side]] = [PreparedPair(p, []) for p in pairs]
    slots = {id(entry.pair): entry for entry in prepared}
    numbers: list[Tensor] = []
    for (pair, factor, _), basis in zip(wanted, bases, strict=True):
        side = _side(pair, factor, basis)
        slots[id(pair)].sides.append(side)
        numbers += _numbers(side, pair)
    values = iter(read_numbers([*numbers, *extra]))
    for entry in prepared:
        for side in entry.sides:
            step, guard, norm_sq, stored_sq, unchanged = (next(values) for _ in range(5))
            side.host = HostNumbers(int(step), guard, norm_sq, stored_sq, bool(unchanged))
    return prepared, list(values)


def apply_(prepared: PreparedPair[Side], coefficient: float) -> None:
    """Advance the state of a pair and move its factor(s), in place.

    Args:
        prepared: the pair; its state must be allocated.
        coefficient: multiplies both gradients (clipping, unscaling).
    """
    options = prepared.pair.options
    if options.maximize:
        coefficient = -coefficient
    for side, moving in zip(prepared.sides, prepared.moves(), strict=True):
        side.host.moving = moving
        _advance_moments_(side, prepared.pair, coefficient)
        if moving:
            _move_factor_(side, prepared.pair)


class ReferenceStep:
    """One step of all pairs on the reference path, in the form that every host path has."""

    prepare = staticmethod(prepare)

    def apply_(self, prepared: Sequence[PreparedPair[Side]], coefficient: float) -> None:
        """Call :func:`apply_` for every pair."""
        for entry in prepared:
            apply_(entry, coefficient)


def _side(pair: Pair, factor: Factor, basis: ref.Basis) -> Side:
    """Scale one gradient; inf or NaN anywhere in it stays visible in the result."""
    g = ref.scaled_gradient(factor.grad_rows, basis, pair.scaling)
    kept = basis.q if pair.options.calibrate else basis.chol
    return Side(factor, basis, g, kept.to(state_dtype(factor.param)))


def _numbers(side: Side, pair: Pair) -> list[Tensor]:
    """List the 0-d tensors behind :class:`HostNumbers`."""
    state, zero = side.factor.state, side.g.new_zeros(())
    last = state.get(_memory_key(pair))
    unchanged = zero if last is None else (last == side.remembered).all()
    step, guard = state.get("step", zero), state.get("guard", zero)
    norm_sq = stored_sq = side.g.square().sum()
    if pair.options.second_moment == "diagonal":
        stored_sq = (side.g @ side.basis.chol_inv).square().sum()
    return [step, guard, norm_sq, stored_sq, unchanged]


def _memory_key(pair: Pair) -> str:
    """Name the state entry that remembers the partner of the last visit."""
    return "partner_basis" if pair.options.calibrate else "partner_cholesky"


def _advance_moments_(side: Side, pair: Pair, coefficient: float) -> None:
    """Transport both moments into the new basis and accumulate the gradient."""
    options, state, host = pair.options, side.factor.state, side.host
    g = side.g * coefficient
    memory = state[_memory_key(pair)]
    change = None
    if not host.unchanged:
        find = ref.transition if options.calibrate else ref.transition_uncalibrated
        change = find(memory, side.remembered)
    if options.second_moment == "full":
        _advance_full_moments_(side, options, g, change)
    else:
        rounded = g.to(state["exp_avg"].dtype)
        ref.update_first_moment_(state["exp_avg"], rounded, change, options.beta1)
        ref.update_elementwise_moment_(state["second_moment"], g, side.basis, options.beta2)
    memory.copy_(side.remembered)
    host.step += 1
    state["step"].fill_(host.step)


def _advance_full_moments_(
    side: Side, options: StepOptions, g: Tensor, change: Tensor | None
) -> None:
    """Advance m, P and the guard; where the factor moves, keep P in parts not rounded together."""
    state, host = side.factor.state, side.host
    early = host.moving and host.step < 2
    if early:
        exp_avg, roots = ref.early_moments(
            state["exp_avg"],
            g,
            change,
            guard=host.guard,
            beta1=options.beta1,
            beta2=options.beta2,
        )
        side.moments = exp_avg, None, roots
    exp_avg = state["exp_avg"]
    ref.update_first_moment_(exp_avg, g.to(exp_avg.dtype), change, options.beta1)
    centre = exp_avg if host.moving and not early else None
    parts = ref.update_second_moment_(state["second_moment"], g, change, options.beta2, centre)
    if parts is not None:
        side.moments = exp_avg, parts[0], parts[1][None]
    host.guard = ref.update_guard(host.guard, options.beta1, options.beta2)
    state["guard"].fill_(host.guard)


def _move_factor_(side: Side, pair: Pair) -> None:
    """Take the virtual Adam step, project it back and write the factor."""
    options, state, factor = pair.options, side.factor.state, side.factor
    bias1 = ref.bias_correction(options.beta1, side.host.step)
    bias2 = ref.bias_correction(options.beta2, side.host.step)
    if side.moments is not None:
        exp_avg, second_moment, roots = side.moments
        side.moments = None  # as large as P
        projected = ref.virtual_adam_projection(
            exp_avg,
            second_moment,
            roots,
            side.basis.q.to(exp_avg.dtype),
            bias_correction1=bias1,
            bias_correction2=bias2,
            eps=options.eps,
            guard=side.host.guard,
        )
        direction = projected.double() @ side.basis.chol_inv
    else:
        direction = ref.elementwise_adam_step(
            state["exp_avg"],
            state["second_moment"],
            side.basis,
            bias_correction1=bias1,
            bias_correction2=bias2,
            eps=options.eps,
        )
    refresh_master_(factor)
    stored = state.get("master", factor.rows)
    moved = ref.moved_factor(
        stored,
        direction,
        lr=_rounded(factor.lr, state_dtype(factor.param)),
        weight_decay=options.weight_decay,
        scaling=pair.scaling,
    )
    stored.copy_(moved)
    if "master" in state:
        factor.rows.copy_(stored)


def _rounded(value: float | Tensor, dtype: torch.dtype) -> float:
    """Round a scalar to the compute dtype, so that tensor and float learning rates agree."""
    return torch.as_tensor(value, dtype=dtype).item()


@contextlib.contextmanager
def exact_arithmetic(device_types: Iterable[str]) -> Iterator[None]:
    """Shield the step from the caller's autocast and reduced-precision matmul settings."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [b.fp32_precision for b in backends]
    with contextlib.ExitStack() as stack:
        for kind in device_types:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for b in backends:
                b.fp32_precision = "ieee"
            yield
        finally:
            for b, value in zip(backends, before, strict=True):
                b.fp32_precision = value
