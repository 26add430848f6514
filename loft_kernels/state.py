"""Optimizer state of one LoRA factor: what is stored, in which shape, and how it is checked.

Per factor X (``rows x r``; ``rows = m`` for ``lora_B``, ``rows = n`` for ``lora_A``), tensors only,
fp32 (fp64 for fp64 parameters), all in the partner's orthonormal basis:

=====================  ==================  ====================================================
key                    shape               meaning
=====================  ==================  ====================================================
``step``               ``()`` int64        steps that this factor's moments have taken
``exp_avg``            ``rows x r``        first moment
``second_moment``      ``rows x r(r+1)/2`` packed second moment (``rows x r`` when "diagonal")
``partner_basis``      ``partner rows x r`` Q of the partner when this state was last touched
``partner_cholesky``   ``r x r``           in place of ``partner_basis`` when ``calibrate=False``
``guard``              ``()`` fp64         bound of m~^2 / v (only with the full second moment)
``master``             ``rows x r``        fp32 copy of a half-precision factor
=====================  ==================  ====================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loft_kernels.plan import Factor, Pair, StepOptions
from loft_kernels.reference import packed_length

FORMAT = 1
META_CURE = "call to_empty() and build the optimizer afterwards"
HALF_DTYPES = (torch.float16, torch.bfloat16)


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: fp64 for fp64 parameters, else fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def expected_shapes(
    rows: int, partner_rows: int, rank: int, second_moment: str, calibrate: bool
) -> dict[str, tuple[int, ...]]:
    """List the tensors that a factor's state must hold, with their shapes (without master)."""
    full = second_moment == "full"
    shapes: dict[str, tuple[int, ...]] = {
        "step": (),
        "exp_avg": (rows, rank),
        "second_moment": (rows, packed_length(rank) if full else rank),
    }
    if calibrate:
        shapes["partner_basis"] = (partner_rows, rank)
    else:
        shapes["partner_cholesky"] = (rank, rank)
    if full:
        shapes["guard"] = ()
    return shapes


def _fixed_dtype(key: str, param: Tensor) -> torch.dtype:
    """Return the dtype that a state entry always has."""
    return {"step": torch.int64, "guard": torch.float64}.get(key, state_dtype(param))


def _shapes_of(factor: Factor, partner: Factor, options: StepOptions) -> dict[str, tuple[int, ...]]:
    """Return :func:`expected_shapes` for a pair's factor at this step."""
    rows, rank = factor.rows.shape
    partner_rows = partner.rows.shape[0]
    return expected_shapes(rows, partner_rows, rank, options.second_moment, options.calibrate)


def check_state(factor: Factor, partner: Factor, options: StepOptions) -> None:
    """Check that a factor's state, if it has any, still fits its parameter and options.

    Raises:
        RuntimeError: it does not; names both shapes.
    """
    state = factor.state
    for key, shape in _shapes_of(factor, partner, options).items() if state else ():
        if key not in state or tuple(state[key].shape) != shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise RuntimeError(
                f"state[{key!r}] of {factor.name} has shape {found}, but its parameter of shape "
                f"{tuple(factor.param.shape)} needs {shape}: a parameter must keep its shape, and "
                "its group its second_moment and calibrate options, while its state lives. "
                f"Delete optimizer.state[parameter] to start {factor.name} anew"
            )


def ready_state(factor: Factor, partner: Factor, options: StepOptions) -> None:
    """Allocate a factor's state at its first step, and let it follow its parameter afterwards.

    A parameter that changed device or dtype since the last step takes its state along.
    """
    state, param = factor.state, factor.param
    for key, shape in _shapes_of(factor, partner, options).items():
        dtype = _fixed_dtype(key, param)
        if key not in state:
            state[key] = torch.zeros(shape, dtype=dtype, device=param.device)
        elif state[key].device != param.device or state[key].dtype != dtype:
            state[key] = state[key].to(device=param.device, dtype=dtype)
    _ready_master(factor)


def _ready_master(factor: Factor) -> None:
    """Keep the fp32 master of a half-precision factor in step with its parameter."""
    state, rows = factor.state, factor.rows
    if factor.param.dtype not in HALF_DTYPES:
        state.pop("master", None)
        return
    master = state.get("master")
    if master is None or master.shape != rows.shape:
        state["master"] = rows.to(torch.float32, copy=True).contiguous()
    elif master.device != rows.device:
        state["master"] = master.to(rows.device)


def refresh_master_(factor: Factor) -> None:
    """Take over entries of the parameter that someone changed since the master was rounded."""
    master = factor.state.get("master")
    if master is not None:
        kept = master.to(factor.param.dtype) == factor.rows
        master.copy_(torch.where(kept, master, factor.rows.float()))


def state_bytes(rows: int, partner_rows: int, rank: int, *, half: bool = False) -> int:
    """Count the bytes of one fp32 factor's state with the full second moment.

    Args:
        rows: m for ``lora_B``, n for ``lora_A``.
        partner_rows: the other one.
        rank: r.
        half: True for an fp16 or bf16 parameter, which keeps an fp32 master.
    """
    entries = rows * (rank + packed_length(rank)) + partner_rows * rank
    return 4 * (entries + (rows * rank if half else 0)) + 16


def check_loaded_state(
    saved: Mapping[str, Any], factor: Factor, partner: Factor, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Validate one factor's saved state and bring it into this process's form, copied.

    Args:
        saved: the checkpoint's entry of this parameter; not changed.
        factor: the parameter that it will belong to.
        partner: the other side of its pair.
        group: the checkpoint's parameter group (its options decide the shapes).

    Returns:
        A new dict with every tensor on the parameter's device in the state's dtype.

    Raises:
        ValueError: a key is missing, has another shape, or is not a finite-typed tensor; names
            the parameter, the key and both shapes.
    """
    rows, rank = factor.rows.shape
    shapes = expected_shapes(
        rows,
        partner.rows.shape[0],
        rank,
        group.get("second_moment", "full"),
        group.get("calibrate", True),
    )
    where = f"the state of {factor.name} (shape {tuple(factor.param.shape)})"
    missing = sorted(shapes.keys() - saved.keys())
    if missing:
        raise ValueError(
            f"loaded state dict lacks {missing} in {where}; it holds {sorted(saved)}. "
            "Was it saved by another optimizer?"
        )
    loaded: dict[str, Tensor] = {}
    for key, value in saved.items():
        if key not in shapes and key != "master":
            warnings.warn(f"unknown entry {key!r} in {where} is kept", UserWarning, stacklevel=4)
            loaded[key] = value
            continue
        loaded[key] = _loaded_entry(key, value, shapes.get(key, (rows, rank)), factor, where)
    if factor.param.dtype not in HALF_DTYPES:
        loaded.pop("master", None)
    return loaded


def _loaded_entry(
    key: str, value: Any, shape: tuple[int, ...], factor: Factor, where: str
) -> Tensor:
    """Check and copy one entry of a saved state."""
    if not isinstance(value, Tensor):
        if key != "step" or not isinstance(value, int | float):
            raise ValueError(f"{key!r} in {where} must be a tensor, got {type(value).__name__}")
        value = torch.tensor(value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{key!r} in {where} has shape {tuple(value.shape)}, expected {shape}")
    if value.is_complex() or (key != "step" and not value.is_floating_point()):
        raise ValueError(f"{key!r} in {where} has dtype {value.dtype}, expected a floating one")
    if key != "step" and value.dtype in HALF_DTYPES:
        warnings.warn(
            f"{key!r} in {where} was saved as {value.dtype}; it is raised to fp32, but the bits "
            "lost when it was saved do not come back",
            UserWarning,
            stacklevel=5,
        )
    dtype = _fixed_dtype(key, factor.param)
    return value.detach().to(device=factor.param.device, dtype=dtype, copy=True).contiguous()


def check_pair(pair: Pair) -> None:
    """Refuse parameters that the step cannot serve, before anything is written.

    Raises:
        RuntimeError: meta tensors, sparse gradients, factors on different devices.
        TypeError: complex or integer parameters.
        ValueError: shapes that do not form a pair, overlapping (expanded) memory.
        NotImplementedError: DTensors and other wrapped tensors.
    """
    b, a = pair.b, pair.a
    for factor in (b, a):
        check_factor(factor.name, factor.param)
        if factor.grad is not None and factor.grad.is_sparse:
            raise RuntimeError(
                f"LoFTAdamW does not support sparse gradients ({factor.name}); build the layer "
                "with sparse=False"
            )
        if factor.grad is not None and factor.grad.shape != factor.param.shape:
            raise RuntimeError(
                f"{factor.name} has shape {tuple(factor.param.shape)}, but its gradient "
                f"{tuple(factor.grad.shape)}: call zero_grad() after replacing a parameter's data"
            )
    if b.param.shape[1] != a.param.shape[0]:
        raise ValueError(
            f"{b.name} of shape {tuple(b.param.shape)} and {a.name} of shape "
            f"{tuple(a.param.shape)} do not form B @ A: their ranks differ"
        )
    if a.param.shape[0] == 0:
        raise ValueError(f"{a.name} has rank 0: remove the adapter or give it a rank >= 1")
    if b.param.device != a.param.device:
        raise RuntimeError(
            f"{b.name} is on {b.param.device} but {a.name} on {a.param.device}: move both "
            "factors of a pair to one device"
        )


def check_factor(name: str, param: Tensor) -> None:
    """Refuse one factor by its type, dtype, shape or memory layout (see :func:`check_pair`)."""
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(param):
        raise NotImplementedError(
            f"{name} is a {type(param).__name__}: LoFT needs whole factors, and sharded or "
            "quantized adapters are not supported. Keep them whole: use DDP, or with FSDP2 pass "
            "the LoRA parameters as fully_shard(ignored_params=...) and all-reduce their "
            "gradients before step()"
        )
    if hasattr(param, "ds_id"):
        raise NotImplementedError(
            f"{name} is partitioned by DeepSpeed ZeRO stage 3: LoFT needs whole factors. Use DDP "
            "or ZeRO stage 0"
        )
    if not param.is_floating_point():
        kind = "complex" if param.is_complex() else str(param.dtype)
        raise TypeError(f"{name} is {kind}: LoFTAdamW needs real floating-point factors")
    if param.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)}, but a LoRA factor is a matrix. 1-D factors "
            "are usually flattened by FSDP or DeepSpeed ZeRO, which LoFT does not support: use "
            "DDP or ZeRO stage 0"
        )
    if param.is_meta:
        raise RuntimeError(f"{name} is on the meta device: {META_CURE}")
    if param.numel() and 0 in param.stride() and max(param.shape) > 1:
        sizes = zip(param.shape, param.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in sizes):
            raise ValueError(
                f"{name} is an expanded tensor (several entries share memory): clone() it first"
            )
