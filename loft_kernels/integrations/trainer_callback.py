"""A callback for ``transformers.Trainer`` that logs the norm which LoFT clips by."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from loft_kernels.clipping import clip_grad_norm_
from loft_kernels.integrations.callers import unwrapped
from loft_kernels.optimizer import LoFTAdamW

KEY = "projected_grad_norm"


class ProjectedNormCallback(TrainerCallback):
    """Log the norm of the projected gradients, before clipping, as ``projected_grad_norm``.

    It only logs: the optimizer clips. The Trainer's own ``grad_norm`` is the norm of the factors'
    gradients, which depends on how W is split into B and A. The norm is computed anew for the
    steps that are logged (at every step with ``logging_strategy="epoch"``).
    """

    def __init__(self) -> None:
        """Start without a norm."""
        self._norm: float | None = None
        self._warned = False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Measure the gradients of a step that will be logged."""
        step = state.global_step + 1
        steps = str(getattr(args.logging_strategy, "value", args.logging_strategy))
        logged = steps == "epoch" or (steps == "steps" and step % max(1, state.logging_steps) == 0)
        if not logged and not (args.logging_first_step and step == 1):
            return
        inner = unwrapped(optimizer)
        if not isinstance(inner, LoFTAdamW):
            return
        if any(p.grad is not None for group in inner.param_groups for p in group["params"]):
            self._norm = clip_grad_norm_(inner, float("inf")).item()
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{KEY} is not logged: there is no gradient left to measure (DeepSpeed takes its "
                "step within the backward pass)",
                UserWarning,
                stacklevel=2,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the norm to what is logged, here and in the Trainer's history."""
        if self._norm is None or logs is None or "loss" not in logs:
            return
        logs[KEY] = self._norm
        state.log_history[-1][KEY] = self._norm
        self._norm = None
