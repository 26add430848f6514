"""What a step says once: that it runs, but probably not as its user meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from loft_kernels.integrations.callers import outer_clipping
from loft_kernels.state import state_bytes

# Frames between the warning and the caller of `step`: the function here, `step` and torch's
# wrapper around it.
_CALLER = 4
_SMALL = 2**30  # bytes of state that nobody needs to hear about


def warn_memory(sizes: Sequence[tuple[int, int, int]]) -> None:
    """Warn if the full second moment costs more than the training that it imitates.

    Args:
        sizes: (m, r, n) of every pair.
    """
    own = sum(state_bytes(m, n, r) + state_bytes(n, m, r) for m, r, n in sizes)
    dense = sum(8 * m * n for m, _, n in sizes)
    if own <= max(dense, _SMALL):
        return
    warnings.warn(
        f"LoFT's state will take {own / 2**30:.1f} GiB, and AdamW's for the full weights would "
        f"take {dense / 2**30:.1f} GiB: the second moment holds r(r+1)/2 numbers per row, and the "
        f"largest rank is {max(r for _, r, _ in sizes)}. Lower the rank, or use "
        "second_moment='diagonal'",
        UserWarning,
        stacklevel=_CALLER - 1,
    )


def warn_idle(pairs: int) -> None:
    """Warn that a step found nothing to do for any pair."""
    warnings.warn(
        f"none of the {pairs} LoRA pairs has a gradient at this step, so no adapter moves. Are "
        "these the active adapters? An optimizer holds those that were trainable when it was made",
        UserWarning,
        stacklevel=_CALLER,
    )


def warn_outer_clipping(max_grad_norm: float | None) -> None:
    """Warn if a trainer clips the factors' gradients before they come here."""
    outer = outer_clipping()
    if outer is None:
        return
    setting, cure = outer
    twice = "" if max_grad_norm is None else " and again by LoFTAdamW"
    warnings.warn(
        f"gradients are clipped by {setting}{twice}: that is the norm of the factors' own "
        "gradients, which depends on how W is split into B and A. LoFT clips by the norm of the "
        f"projected gradients: set {cure} and LoFTAdamW(max_grad_norm=...)",
        UserWarning,
        stacklevel=_CALLER,
    )
