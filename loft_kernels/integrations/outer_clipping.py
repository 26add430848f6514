"""Gradient clipping of a trainer around the optimizer: found, so that it can be named."""

from __future__ import annotations

import sys
from typing import Any

# Where a trainer keeps its own clip norm, by the package that its class comes from.
_SETTINGS = {
    "transformers": ("args.max_grad_norm", "TrainingArguments(max_grad_norm=0.0)"),
    "pytorch_lightning": ("gradient_clip_val", "Trainer(gradient_clip_val=None)"),
    "lightning": ("gradient_clip_val", "Trainer(gradient_clip_val=None)"),
}


def outer_clipping() -> tuple[str, str] | None:
    """Look for a trainer that clips gradients among the callers of this step.

    A trainer hands the optimizer gradients and nothing else, so its settings can only be read
    where it runs: in the frames that led here. It takes microseconds and is done once.

    Returns:
        The setting with its value and the one that turns it off, or None.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = _clipping_of(frame.f_locals.get("self"))
        if found is not None:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _clipping_of(caller: Any) -> tuple[str, str] | None:
    """Read the clip norm of a trainer; None for anything else."""
    for base in type(caller).__mro__:
        package = base.__module__.partition(".")[0]
        if base.__name__ != "Trainer" or package not in _SETTINGS:
            continue
        path, cure = _SETTINGS[package]
        value = caller
        for part in path.split("."):
            value = getattr(value, part, None)
        if isinstance(value, int | float) and value > 0:
            return f"{package}'s {path.rpartition('.')[2]}={value}", cure
    return None


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and Lightning."""
    while not hasattr(optimizer, "nonfinite_steps") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
