"""What a step says once: that it runs, but probably not as its user meant."""

from __future__ import annotations

import warnings

from loft_kernels.integrations.outer_clipping import outer_clipping

# Frames between the warning and the caller of `step`: the function here, `step` and torch's
# wrapper around it.
_CALLER = 4


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
