"""Everything that is not a LoRA pair: torch's own AdamW function on torch's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from loft_kernels.state import META_CURE

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


def check_plain(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse a parameter that the step cannot serve, before anything is written.

    Raises:
        TypeError: complex or integer parameters.
        NotImplementedError: DTensors and other wrapped tensors.
        RuntimeError: meta tensors, sparse gradients, gradient or state of another shape.
    """
    if not param.is_floating_point():
        kind = "complex" if param.is_complex() else str(param.dtype)
        raise TypeError(f"{name} is {kind}: LoFTAdamW needs real floating-point parameters")
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(param):
        raise NotImplementedError(
            f"{name} is a {type(param).__name__}, which cannot share a step with whole LoRA "
            "factors: give it to a torch.optim.AdamW of its own"
        )
    if param.is_meta:
        raise RuntimeError(f"{name} is on the meta device: {META_CURE}")
    if param.grad is not None and param.grad.is_sparse:
        raise RuntimeError(f"LoFTAdamW does not support sparse gradients ({name})")
    held = {
        "its gradient": param.grad,
        **{f"state[{key!r}]": state.get(key) for key in STATE_KEYS[1:]},
    }
    for what, tensor in held.items():
        if tensor is not None and tensor.shape != param.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(param.shape)}, but {what} {tuple(tensor.shape)}: a "
                "parameter must keep its shape while it has a gradient or state"
            )


def start_plain_state_(param: Tensor, state: dict[str, Any]) -> None:
    """Allocate the state of a parameter that has taken no step, as torch does."""
    wide = torch.get_default_dtype() == torch.float64
    # On the CPU, as torch keeps it: a launch per parameter would cost more than the step.
    state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)


def adamw_step_(
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    group: dict[str, Any],
    coefficient: float | Tensor,
    found_inf: Tensor | None = None,
) -> None:
    """Take one ``torch.optim.AdamW`` step; gradients are not changed.

    Args:
        params: parameters with gradients; changed in place.
        states: their optimizer state (``step``, ``exp_avg``, ``exp_avg_sq`` as torch keeps them);
            allocated at the first step, changed in place.
        group: lr, betas, eps, weight_decay and maximize.
        coefficient: multiplies all gradients.
        found_inf: given by the fused backends: not 0 skips the step, on the device. torch's fused
            kernel serves then, with its counts on the parameters' device.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if isinstance(coefficient, Tensor) or coefficient != 1.0:
        grads = list(torch._foreach_mul(grads, coefficient))
    fused = found_inf is not None
    for param, state in zip(params, states, strict=True):
        if not state:
            start_plain_state_(param, state)
        for key in STATE_KEYS[1:]:
            # The state follows a parameter that changed device or dtype.
            if state[key].dtype != param.dtype or state[key].device != param.device:
                state[key] = state[key].to(param)
        if fused and state["step"].device != param.device:
            state["step"] = state["step"].to(device=param.device, dtype=torch.float32)
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=fused or None,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
