"""Clipping by the norm of the projected gradients, and the one decision of a step.

Building block 6 of the paper: each pair enters the global norm with the gradient of the virtual
weight projected onto the partner's column space, ``||G P||_F``, of the factor that moves (both,
if both move). In the orthonormal basis that is the norm of the scaled gradient, so no m x n
matrix is formed. Other parameters enter with their own gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loft_kernels.functional import ReferenceStep, exact_arithmetic
from loft_kernels.integrations.callers import unwrapped
from loft_kernels.measured import HostPath, PreparedPair
from loft_kernels.plan import Pair
from loft_kernels.state import state_dtype

if TYPE_CHECKING:
    from loft_kernels.optimizer import LoFTAdamW


class Decision(NamedTuple):
    """What the whole optimizer does at this step.

    Attributes:
        prepared: the pairs that have a gradient.
        norm: global norm of the (unscaled) projected gradients.
        coefficient: multiplies every gradient: clipping times unscaling.
        finite: False skips the step whole.
    """

    prepared: list[PreparedPair[Any]]
    norm: float
    coefficient: float
    finite: bool


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """Return torch's clip coefficient, ``min(1, max_norm / (norm + 1e-6))``."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def decide(
    pairs: Sequence[Pair],
    plain_grads: Sequence[Tensor],
    *,
    max_norm: float | None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    path: HostPath | None = None,
) -> Decision:
    """Measure all gradients and decide whether and how far this step goes; writes nothing.

    Args:
        pairs: checked LoRA pairs with at least one gradient each.
        plain_grads: gradients of all other parameters.
        max_norm: largest global norm, or None for no clipping.
        grad_scale: the gradients are this many times too large (GradScaler's protocol).
        found_inf: not 0 if the scaler saw a non-finite gradient.
        path: what measures the pairs; the reference path if not given.
    """
    extra = [torch.linalg.vector_norm(g.detach(), dtype=torch.float64) for g in plain_grads]
    flags = [t.reshape(()) for t in (grad_scale, found_inf) if t is not None]
    prepared, values = (path or ReferenceStep()).prepare(pairs, [*extra, *flags])
    plain_sq = sum(v * v for v in values[: len(extra)])
    rest = values[len(extra) :]
    scale = rest.pop(0) if grad_scale is not None else 1.0
    overflow = bool(rest.pop(0)) if found_inf is not None else False

    moving_sq = sum(
        side.host.norm_sq
        for entry in prepared
        for side, moving in zip(entry.sides, entry.moves(), strict=True)
        if moving
    )
    norm = math.sqrt(moving_sq + plain_sq) / scale
    coefficient = clip_coefficient(norm, max_norm) / scale
    storable = all(_storable(entry, coefficient) for entry in prepared)
    finite = math.isfinite(norm) and not overflow and storable
    return Decision(prepared, norm, coefficient, finite)


def _storable(entry: PreparedPair[Any], coefficient: float) -> bool:
    """Tell whether a pair's gradients are finite and their squares fit the state's dtype."""
    return all(
        side.host.stored_sq * coefficient * coefficient
        < torch.finfo(state_dtype(side.factor.param)).max
        for side in entry.sides
    )


@torch.no_grad()
def clip_grad_norm_(
    optimizer: LoFTAdamW, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip all gradients of a LoFT optimizer by the norm of its projected gradients, in place.

    The counterpart of ``torch.nn.utils.clip_grad_norm_`` for the virtual weights: LoRA pairs
    enter with ``||G P||_F`` of the factor that the next step moves, other parameters with their
    own gradients, and every ``p.grad`` is multiplied by ``min(1, max_norm / (norm + 1e-6))``.
    Not needed when the optimizer has ``max_grad_norm`` set, which clips inside ``step``.

    Args:
        optimizer: the optimizer whose ``p.grad`` are clipped; accelerate's and Lightning's
            wrappers are looked through.
        max_norm: largest global norm, > 0.
        error_if_nonfinite: raise instead of returning a non-finite norm.

    Returns:
        The norm before clipping, 0-d fp32 on the first gradient's device. If it is not finite,
        no gradient is changed: the next step skips itself.

    Raises:
        ValueError: ``max_norm`` is not positive.
        RuntimeError: non-finite norm with ``error_if_nonfinite``.
    """
    check_max_norm(max_norm)
    optimizer = unwrapped(optimizer)
    pairs, plain = optimizer._gather(allocate=False)
    # The parameters' own gradients: a factor's may be a copy of one that is no matrix in place.
    owners = [f.stored for p in pairs for f in (p.b, p.a)]
    owners += [p for members in plain.values() for p in members]
    grads = [p.grad for p in owners if p.grad is not None]
    if not grads:
        return torch.zeros(())
    with exact_arithmetic({g.device.type for g in grads}):
        plain_grads = [p.grad for members in plain.values() for p in members]
        decision = decide(
            pairs,
            [g for g in plain_grads if g is not None],
            max_norm=max_norm,
            path=optimizer._host_path(pairs),
        )
    if math.isfinite(decision.norm):
        if decision.coefficient < 1.0:
            torch._foreach_mul_(grads, decision.coefficient)
    elif error_if_nonfinite:
        raise RuntimeError(
            "the norm of the projected gradients is not finite, so it cannot be clipped; "
            "pass error_if_nonfinite=False to let the optimizer skip the step"
        )
    return torch.tensor(decision.norm, dtype=torch.float32, device=grads[0].device)


def check_max_norm(max_norm: float | None) -> None:
    """Refuse a clip norm that is not a positive number."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(
            f"Invalid max_grad_norm: {max_norm}: it must be > 0, or None for no clipping"
        )
