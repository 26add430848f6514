"""Who takes this step: frameworks around it whose own doing has to be named, or left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Where a trainer keeps its own clip norm, by its class and the package that it comes from.
_SETTINGS = {
    ("transformers", "Trainer"): ("args.max_grad_norm", "TrainingArguments(max_grad_norm=0.0)"),
    ("pytorch_lightning", "Trainer"): ("gradient_clip_val", "Trainer(gradient_clip_val=None)"),
    ("lightning", "Trainer"): ("gradient_clip_val", "Trainer(gradient_clip_val=None)"),
    ("deepspeed", "DeepSpeedEngine"): (
        "gradient_clipping",
        '"gradient_clipping": 0.0 in the DeepSpeed config (1.0 where it says nothing)',
    ),
}


def outer_clipping() -> tuple[str, str] | None:
    """Look for a trainer that clips gradients among the callers of this step.

    A trainer hands the optimizer gradients and nothing else, so its settings can only be read
    where it runs: in the frames that led here. It takes microseconds and is done once.

    Returns:
        The setting with its value and the one that turns it off, or None.
    """
    for frame in _callers():
        found = _clipping_of(frame.f_locals.get("self"))
        if found is not None:
            return found
    return None


def _callers() -> Iterator[FrameType]:
    """Go through the frames that led here, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _clipping_of(caller: Any) -> tuple[str, str] | None:
    """Read the clip norm of a trainer; None for anything else."""
    for base in type(caller).__mro__:
        package = base.__module__.partition(".")[0]
        if (package, base.__name__) not in _SETTINGS:
            continue
        path, cure = _SETTINGS[package, base.__name__]
        value = caller
        for part in path.split("."):
            value = getattr(value, part, None)
        value = value() if callable(value) else value
        if isinstance(value, int | float) and value > 0:
            return f"{package}'s {path.rpartition('.')[2]}={value}", cure
    return None


def deepspeed_allocates() -> bool:
    """Tell whether DeepSpeed takes this step, to make the optimizer allocate its state.

    Its bf16 and fp16 engines do at stage 0, on zero gradients and with the real rates, before any
    step of the training.
    """
    return any(
        frame.f_code.co_name == "initialize_optimizer_states"
        and str(frame.f_globals.get("__name__")).partition(".")[0] == "deepspeed"
        for frame in _callers()
    )


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and Lightning."""
    while not hasattr(optimizer, "nonfinite_steps") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
