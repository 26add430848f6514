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
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"loaded state dict lacks {sorted(missing)}: is it an optimizer's?")
    unknown = sorted(state_dict.keys() - {"state", "param_groups"})
    if unknown:
        warnings.warn(f"unknown entries {unknown} of the state dict are ignored", stacklevel=4)
    groups = state_dict["param_groups"]
    for group in groups:
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
    if not optimizer._slots:
        return state_dict
    groups = _in_own_order(optimizer, groups)
    state = dict(state_dict["state"])
    for slot in optimizer._slots:
        sides = [(p, optimizer._factor(slot, p)) for p in (slot.b, slot.a)]
        for (place, factor), (_, partner) in (sides, sides[::-1]):
            group = groups[place[0]]
            saved_id = group["params"][place[1]]
            if state.get(saved_id):
                loaded = check_loaded_state(state[saved_id], factor, partner, group)
                state[saved_id] = _Boxed(loaded)
    return {**state_dict, "state": state, "param_groups": groups}


def _in_own_order(optimizer: LoFTAdamW, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring a checkpoint's parameters into the optimizer's order, by name where both have names."""
    own = optimizer.param_groups
    if not all("param_names" in g for g in [*groups, *own]):
        return groups
    ordered = []
    for saved, mine in zip(groups, own, strict=True):
        ids = dict(zip(map(_bare, saved["param_names"]), saved["params"], strict=True))
        wanted = [_bare(name) for name in mine["param_names"]]
        if set(ids) != set(wanted):
            only_saved, only_mine = sorted(set(ids) - set(wanted)), sorted(set(wanted) - set(ids))
            raise ValueError(
                "the checkpoint's parameters are not this optimizer's: only in the checkpoint "
                f"{only_saved[:4]}, only here {only_mine[:4]}. If they were merely renamed, "
                "delete 'param_names' from its param_groups to load by position"
            )
        ordered.append(
            {**saved, "params": [ids[n] for n in wanted], "param_names": mine["param_names"]}
        )
    return ordered


def _bare(name: str) -> str:
    """Strip what wrappers put before a parameter's name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
