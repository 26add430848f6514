"""Loading checkpoints: everything is validated before anything changes.

``torch.optim.Optimizer.load_state_dict`` casts state to the parameter's dtype, accepts any shape
and shares tensors with its source. State of LoRA factors is therefore checked and copied in a
pre-hook and carried past torch's cast in boxes, which ``__setstate__`` opens.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loft_kernels.integrations.callers import deepspeed_allocates
from loft_kernels.plain_adamw import STATE_KEYS
from loft_kernels.state import FORMAT, check_loaded_state

if TYPE_CHECKING:
    from loft_kernels.optimizer import LoFTAdamW

# Wrappers that put a prefix before every parameter's name.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


class _Boxed:
    """A state dict that torch's recursive cast must leave alone."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def unbox(state: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    """Open the boxes that `prepare_load` made."""
    opened: defaultdict[Any, Any] = defaultdict(dict)
    opened.update({k: v.state if isinstance(v, _Boxed) else v for k, v in state.items()})
    return opened


def is_rehearsal(optimizer: Any) -> bool:
    """Tell the step that only allocates state, of ``torch.distributed.checkpoint`` or DeepSpeed.

    It comes before any state, with every gradient exactly 0 and every rate 0. A warm-up that starts
    from rate 0 has gradients, and counts. DeepSpeed leaves the rates as they are.
    """
    groups = optimizer.param_groups
    if any(group["lr"] != 0 for group in groups) and not deepspeed_allocates():
        return False
    grads = [p.grad for group in groups for p in group["params"]]
    return all(not g.any() for g in grads if g is not None)


def prepare_load(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Validate a checkpoint for an optimizer with LoRA pairs; a load pre-hook.

    Args:
        optimizer: the :class:`LoFTAdamW` where it will be loaded; not changed.
        state_dict: the checkpoint; not changed.

    Returns:
        A new dict in the optimizer's own parameter order, LoRA state copied and boxed.

    Raises:
        ValueError: missing parts, another format, other groups or names, wrong shapes.
    """
    absent = {"state", "param_groups"} - state_dict.keys()
    if absent:
        raise ValueError(f"loaded state dict lacks {sorted(absent)}: is it an optimizer's?")
    unknown = sorted(state_dict.keys() - {"state", "param_groups"})
    if unknown:
        warnings.warn(f"unknown entries {unknown} of the state dict are ignored", stacklevel=4)
    groups = _in_own_order(optimizer, _checked_groups(optimizer, state_dict["param_groups"]))
    state = dict(state_dict["state"])
    paired = set()
    for slot in optimizer._slots:
        sides = [(p, optimizer._factor(slot, p)) for p in (slot.b, slot.a)]
        for (place, factor), (_, partner) in (sides, sides[::-1]):
            group = groups[place[0]]
            saved_id = group["params"][place[1]]
            paired.add(saved_id)
            if state.get(saved_id):
                _check_mapping(state[saved_id], factor.name)
                loaded = check_loaded_state(state[saved_id], factor, partner, group)
                state[saved_id] = _Boxed(loaded)
    for g, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for i, (saved_id, param) in enumerate(zip(group["params"], own["params"], strict=True)):
            if saved_id not in paired and state.get(saved_id):
                names = own.get("param_names")
                name = names[i] if names else f"parameter {i} of group {g}"
                state[saved_id] = _checked_plain(state[saved_id], name, param)
    for group in groups:
        missing = {"lr", "betas", "eps", "weight_decay"} - group.keys()
        if missing:
            raise ValueError(
                f"a parameter group of the loaded state dict lacks {sorted(missing)}: was it "
                "saved by another optimizer?"
            )
    return {**state_dict, "state": state, "param_groups": groups}


def _checked_groups(optimizer: Any, groups: Any) -> list[dict[str, Any]]:
    """Check the checkpoint's parameter groups against the optimizer's."""
    for group in groups:
        if "params" not in group:
            raise ValueError("a parameter group of the loaded state dict lacks 'params'")
        if group.get("format", FORMAT) > FORMAT:
            raise ValueError(
                f"the checkpoint has format {group['format']}, this version reads up to {FORMAT}: "
                "update loft_kernels"
            )
    sizes = [len(g["params"]) for g in groups]
    own_sizes = [len(g["params"]) for g in optimizer.param_groups]
    if len(sizes) != len(own_sizes):
        raise ValueError(
            "loaded state dict has a different number of parameter groups "
            f"({len(sizes)}, this optimizer has {len(own_sizes)})"
        )
    if sizes != own_sizes:
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of "
            f"optimizer's group (sizes {sizes}, this optimizer's {own_sizes})"
        )
    return list(groups)


def _check_mapping(saved: Any, name: str) -> None:
    """Refuse a parameter's state that is no dict."""
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"the state of {name} is a {type(saved).__name__}, not a dict: is it an optimizer's?"
        )


def _checked_plain(saved: Any, name: str, param: Tensor) -> dict[str, Any]:
    """Check and copy the state of a parameter on plain AdamW."""
    _check_mapping(saved, name)
    where = f"the state of {name} (shape {tuple(param.shape)})"
    missing = sorted(set(STATE_KEYS) - saved.keys())
    if missing:
        raise ValueError(f"loaded state dict lacks {missing} in {where}; it holds {sorted(saved)}")
    for key in STATE_KEYS[1:]:
        shape = tuple(getattr(saved[key], "shape", ("no tensor",)))
        if shape != tuple(param.shape):
            raise ValueError(f"{key!r} in {where} has shape {shape}, expected {tuple(param.shape)}")
    copied = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
    if not isinstance(copied["step"], Tensor):
        copied["step"] = torch.tensor(float(copied["step"]), dtype=torch.float32)
    return copied


def _in_own_order(optimizer: LoFTAdamW, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring a checkpoint's parameters into the optimizer's order, by name where both have names."""
    own = optimizer.param_groups
    if not optimizer._slots or not all("param_names" in g for g in [*groups, *own]):
        return groups
    return [_reordered(saved, mine) for saved, mine in zip(groups, own, strict=True)]


def _reordered(saved: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Match one group by names: as they are, or without what wrappers put before them."""
    names = list(mine["param_names"])
    for readable in (str, _bare):
        ids = dict(zip(map(readable, saved["param_names"]), saved["params"], strict=True))
        wanted = [readable(name) for name in names]
        unique = len(ids) == len(saved["params"]) and len(set(wanted)) == len(wanted)
        if unique and set(ids) == set(wanted):
            return {**saved, "params": [ids[n] for n in wanted], "param_names": names}
    theirs = set(saved["param_names"])
    raise ValueError(
        "the checkpoint's parameters are not this optimizer's: only in the checkpoint "
        f"{sorted(theirs - set(names))[:4]}, only here {sorted(set(names) - theirs)[:4]}. If they "
        "were merely renamed, delete 'param_names' from its param_groups to load by position"
    )


def _bare(name: str) -> str:
    """Strip what wrappers put before a parameter's name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
