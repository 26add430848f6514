"""Pairing: find the LoRA pairs (lora_B, lora_A) of a module, and their scaling.

Pairs are found by module, not by shape or order: PEFT's layers, and any submodule with ``lora_A``
and ``lora_B`` (parameters, Linear layers, or dicts of them per adapter) and an optional
``scaling`` (a number, or a dict per adapter). What looks like LoRA and cannot be paired is an
error that names the tensor and the cure, never quietly plain Adam.
"""

from __future__ import annotations

import logging
import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loft_kernels.exchanged import check_not_flat
from loft_kernels.layers import Candidate, as_matrix, candidates, other_product
from loft_kernels.plan import GROUP_OPTIONS
from loft_kernels.state import check_factor

logger = logging.getLogger("loft_kernels")

OnUnsupported = Literal["error", "adamw"]

_FACTOR_NAME = re.compile(r"(^|\.)lora_(embedding_)?(?P<side>[AB])(?=\.|$)")


class Scaling:
    """The scaling s of one pair, read from its module at every step while the module lives.

    A copy or pickle of the optimizer keeps the last value read.
    """

    def __init__(
        self,
        value: float,
        module: nn.Module | None = None,
        adapter: str = "",
        layer: str = "a pair without a name",
    ) -> None:
        """Start from a number, or follow ``module.scaling`` (a number or a dict of adapters)."""
        self._layer = layer
        self._value = float(value)
        self._module = None if module is None else weakref.ref(module)
        self._adapter = adapter

    @property
    def place(self) -> tuple[weakref.ref[nn.Module], str] | None:
        """Where the scaling is read: the module and the adapter; None if it is a fixed number."""
        return None if self._module is None else (self._module, self._adapter)

    def read(self) -> float:
        """Return the current scaling.

        Raises:
            ValueError: it is zero or not finite: the pair has no effect and no update.
        """
        module = None if self._module is None else self._module()
        if module is None:
            return self._checked(self._value)
        value = _scaling_of(module, self._adapter)
        self._value = value
        return self._checked(value)

    def _checked(self, value: float) -> float:
        """Return a usable scaling."""
        if value == 0 or value - value != 0:
            raise ValueError(
                f"{self._layer} has scaling {value}: LoFT divides by alpha/r, so it must be finite "
                "and not 0 (is lora_alpha 0, or an adapter disabled?)"
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Drop the module, which neither pickles nor belongs to the optimizer."""
        return {**self.__dict__, "_module": None}


@dataclass(slots=True)
class LoRAPair:
    """A pair as found: ``W = W0 + scaling * lora_B @ lora_A``.

    Attributes:
        name: name of the adapted layer and adapter.
        lora_B: ``[m, r]``, or a convolution's ``[m, r, 1, 1]``.
        lora_A: ``[r, n]``, or a convolution's ``[r, in, kh, kw]``.
        scaling: alpha/r (alpha/sqrt(r) for rsLoRA); a number or a :class:`Scaling`.
        name_B: full parameter name of lora_B.
        name_A: full parameter name of lora_A.
    """

    name: str
    lora_B: Tensor
    lora_A: Tensor
    scaling: Scaling
    name_B: str
    name_A: str


@dataclass(slots=True)
class Adapters:
    """What a module holds for the optimizer.

    Attributes:
        pairs: pairs with at least one trainable factor.
        plain: all other trainable parameters with their names.
        unpaired: names of trainable factors that train with plain AdamW, with the reason.
    """

    pairs: list[LoRAPair]
    plain: Sequence[tuple[str, Tensor]]
    unpaired: dict[str, str]

    def summary(self) -> str:
        """Describe the pairing in one line."""
        ranks = sorted({p.lora_A.shape[0] for p in self.pairs})
        line = f"LoFT: {len(self.pairs)} LoRA pairs (ranks {ranks}), {len(self.plain)} parameters"
        line += " on plain AdamW"
        if self.unpaired:
            line += f", {len(self.unpaired)} of them LoRA factors that LoFT does not serve"
        return line


def find_adapters(module: nn.Module, on_unsupported: OnUnsupported = "error") -> Adapters:
    """Find the LoRA pairs of a module and everything else that it trains.

    Args:
        module: any module; wrappers (DDP, torch.compile) do not matter.
        on_unsupported: "error" raises for LoRA factors that LoFT cannot serve; "adamw" trains
            them with plain AdamW and warns. Convolutions with groups and PEFT variants with
            another product than B @ A always go to AdamW with a warning.

    Raises:
        ValueError: no trainable pair at all, a factor without its partner, shapes that do not
            fit, a flattened factor, one tensor in two pairs, factors that share memory.
        NotImplementedError: sharded, quantized or mixture-of-experts factors.
        TypeError: complex or integer factors.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    pairs: list[LoRAPair] = []
    unpaired: dict[str, str] = {}
    for path, layer in module.named_modules():
        for candidate in candidates(path, layer, names):
            if not any(f is not None and f.requires_grad for f in candidate.factors):
                continue
            pair = _accept(candidate, on_unsupported, unpaired)
            if pair is not None:
                pairs.append(pair)
    pairs = _without_shared_memory(pairs, on_unsupported, unpaired)
    if not pairs:
        raise ValueError(_no_pairs_message(module, unpaired))
    if unpaired:
        warnings.warn(
            f"{len(unpaired)} LoRA factors train with plain AdamW instead of LoFT: "
            + _by_reason(unpaired),
            UserWarning,
            stacklevel=3,
        )
    paired = {id(t) for p in pairs for t in (p.lora_B, p.lora_A)}
    plain = [
        (n, p) for n, p in module.named_parameters() if p.requires_grad and id(p) not in paired
    ]
    return Adapters(pairs, plain, unpaired)


def loft_param_groups(
    module: nn.Module, *, on_unsupported: OnUnsupported = "error", **options: Any
) -> list[dict[str, Any]]:
    """Build parameter groups that carry the pairing: the pairs first, then everything else.

    Args:
        module: a model with LoRA adapters.
        on_unsupported: see :func:`find_adapters`.
        **options: group options for all groups (lr, betas, eps, weight_decay, ...).

    Returns:
        One or two groups (none is empty) with named parameters; the first has a key
        ``lora_pairs`` that :class:`LoFTAdamW` takes out. A frozen factor of a trainable pair is
        listed too: the optimizer needs it to read. One summary line is logged.

    Raises:
        TypeError: an option that LoFTAdamW does not have.
        ValueError: see :func:`find_adapters`.
    """
    unknown = sorted(options.keys() - GROUP_OPTIONS)
    if unknown:
        raise TypeError(f"unknown group options {unknown}; known are {sorted(GROUP_OPTIONS)}")
    found = find_adapters(module, on_unsupported)
    logger.info(found.summary())
    factors = [
        (name, factor)
        for p in found.pairs
        for name, factor in ((p.name_B, p.lora_B), (p.name_A, p.lora_A))
    ]
    groups: list[dict[str, Any]] = [{"params": factors, "lora_pairs": found.pairs, **options}]
    if found.plain:
        groups.append({"params": list(found.plain), "lora_pairs": [], **options})
    return groups


NamedScaling = float | Mapping[str, float] | None


def pairs_from_names(named: Sequence[tuple[str, Tensor, NamedScaling]]) -> list[LoRAPair]:
    """Pair named parameters by ``.lora_A.`` and ``.lora_B.`` in their names.

    Args:
        named: name, tensor and what its group says of the scaling: s of all its pairs, or a dict
            from the layer's name (what stands before ``.lora_A``) to s. Names do not carry it.

    Raises:
        ValueError: there are LoRA names but no scaling, or a factor has no partner.
    """
    sides: dict[tuple[str, str], dict[str, tuple[str, Tensor, NamedScaling]]] = {}
    for entry in named:
        match = _FACTOR_NAME.search(entry[0])
        if match:
            rest = f"{match[2]}{entry[0][match.end('side') :]}"
            key = entry[0][: match.start()], rest
            sides.setdefault(key, {})[match["side"]] = entry
    pairs = []
    for (layer, _), found in sides.items():
        if len(found) < 2:
            ((name, tensor, _),) = found.values()
            raise ValueError(_partner_message(name, tuple(tensor.shape)))
        (name_b, b, scaling), (name_a, a, _) = found["B"], found["A"]
        value = scaling.get(layer) if isinstance(scaling, Mapping) else scaling
        if value is None:
            raise ValueError(
                f"{name_b} and {name_a} form a LoRA pair, but names do not tell its scaling "
                "alpha/r. Pass the model itself, LoFTAdamW(model, ...), or give the parameter "
                "group a key 'scaling' (a number, or a dict from layer name to number)"
            )
        _check_shapes(name_b, b, name_a, a)
        pairs.append(LoRAPair(layer, b, a, Scaling(value, layer=layer), name_b, name_a))
    return pairs


def _accept(
    candidate: Candidate, on_unsupported: OnUnsupported, unpaired: dict[str, str]
) -> LoRAPair | None:
    """Turn a candidate into a pair, or note why its factors train with plain AdamW."""
    tensors = zip((candidate.name_b, candidate.name_a), candidate.factors, strict=True)
    trainable = [n for n, t in tensors if t is not None and t.requires_grad]
    reason = other_product(candidate)
    if reason is not None:
        unpaired.update(dict.fromkeys(trainable, reason))
        return None
    try:
        return _strict_pair(candidate)
    except (ValueError, NotImplementedError) as error:
        if on_unsupported != "adamw":
            raise
        unpaired.update(dict.fromkeys(trainable, str(error)))
        return None


def _strict_pair(candidate: Candidate) -> LoRAPair:
    """Check everything that a pair must satisfy."""
    b, a, name_b, name_a = candidate.b, candidate.a, candidate.name_b, candidate.name_a
    if b is None or a is None:
        present, name = (a, name_a) if b is None else (b, name_b)
        shape = () if present is None else tuple(present.shape)
        raise ValueError(_partner_message(name, shape))
    experts = int(getattr(candidate.layer, "num_experts", 1) or 1)
    if experts > 1:
        raise NotImplementedError(
            f"{name_b}: one tensor holds the factors of {experts} experts interleaved "
            "(PEFT target_parameters), which is not one LoRA pair. Use target_modules, or "
            "on_unsupported='adamw' to train these factors with plain AdamW"
        )
    for factor_name, factor in ((name_b, b), (name_a, a)):
        check_not_flat(factor_name, factor)
    # Convolutions are pairs of matrices here; `other_product` has seen to it that they can be.
    _check_shapes(name_b, as_matrix(name_b, b), name_a, as_matrix(name_a, a))
    name = f"{candidate.path}[{candidate.adapter}]" if candidate.adapter else candidate.path
    scaling = Scaling(1.0, candidate.layer, candidate.adapter, name or name_b)
    scaling.read()
    return LoRAPair(name, b, a, scaling, name_b, name_a)


def _check_shapes(name_b: str, b: Tensor, name_a: str, a: Tensor) -> None:
    """Check that two tensors can be lora_B ``[m, r]`` and lora_A ``[r, n]``."""
    for name, tensor in ((name_b, b), (name_a, a)):
        if not tensor.is_meta:
            check_factor(name, tensor)
    if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"{name_b} of shape {tuple(b.shape)} and {name_a} of shape {tuple(a.shape)} do not "
            "form B @ A: lora_B must be [m, r] and lora_A [r, n] with one rank r"
        )
    if a.shape[0] == 0:
        raise ValueError(f"{name_a} has rank 0: remove the adapter or give it a rank >= 1")


def _without_shared_memory(
    pairs: list[LoRAPair], on_unsupported: OnUnsupported, unpaired: dict[str, str]
) -> list[LoRAPair]:
    """Refuse pairs whose factors are, or overlap, factors of another pair (tied adapters)."""
    shared = _overlapping(pairs)
    if not shared:
        return pairs
    # One tensor with two names is one parameter, which AdamW can serve. Two tensors over one
    # storage (PEFT's ensure_weight_tying) would move it twice there as well.
    views = [names for names in shared.values() if names[0] != names[1]]
    if on_unsupported != "adamw" or views:
        first, second = next(iter(views or shared.values()))
        raise ValueError(
            f"{first} and {second} share memory (tied adapters): each step would move it twice. "
            "Untie them (PEFT: ensure_weight_tying=False, or adapt only one of the tied layers)"
        )
    kept = []
    for pair in pairs:
        tied = [n for n in (pair.name_B, pair.name_A) if n in shared]
        if tied:
            unpaired.update(dict.fromkeys((pair.name_B, pair.name_A), "tied adapter"))
        else:
            kept.append(pair)
    return kept


def _overlapping(pairs: list[LoRAPair]) -> dict[str, tuple[str, str]]:
    """Map every factor that shares memory with another one to the two names."""
    spans = []
    for pair in pairs:
        for name, tensor in ((pair.name_B, pair.lora_B), (pair.name_A, pair.lora_A)):
            if tensor.is_meta or tensor.numel() == 0:
                continue
            reach = sum(
                (n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (reach + 1) * tensor.itemsize, name))
    spans.sort()
    shared: dict[str, tuple[str, str]] = {}
    furthest: tuple[str, int, str] | None = None
    for device, start, end, name in spans:
        if furthest is not None and furthest[0] == device and start < furthest[1]:
            shared[name] = shared[furthest[2]] = (furthest[2], name)
        if furthest is None or furthest[0] != device or end > furthest[1]:
            furthest = (device, end, name)
    return shared


def _scaling_of(module: nn.Module, adapter: str) -> float:
    """Read a layer's scaling: a number, or a dict of adapters; 1 where there is none."""
    scaling = getattr(module, "scaling", 1.0)
    if isinstance(scaling, float | int):
        return float(scaling)
    if isinstance(scaling, Mapping):
        scaling = scaling.get(adapter, 1.0)
    return float(scaling.item() if isinstance(scaling, torch.Tensor) else scaling)


def _partner_message(name: str, shape: tuple[int, ...]) -> str:
    """Describe a factor without its partner."""
    missing = _FACTOR_NAME.sub(
        lambda m: f"{m[1]}lora_{m[2] or ''}{'B' if m['side'] == 'A' else 'A'}", name, count=1
    )
    return (
        f"{name} of shape {shape} has no partner {missing}: LoFT needs both factors of a LoRA "
        "pair. Pass the whole model (or both factors in the same optimizer), or "
        "on_unsupported='adamw' to train it with plain AdamW"
    )


def _by_reason(unpaired: Mapping[str, str], most: int = 4) -> str:
    """List the factors that LoFT does not serve, under the reasons why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unpaired.items():
        reasons.setdefault(reason, []).append(name)
    listed = []
    for reason, names in reasons.items():
        more = ", ..." if len(names) > most else ""
        listed.append(f"{', '.join(names[:most])}{more} ({reason})")
    return "; ".join(listed)


def _no_pairs_message(module: nn.Module, unpaired: Mapping[str, str]) -> str:
    """Describe a module without a trainable pair."""
    named = module.named_parameters()
    frozen = sum(1 for n, p in named if _FACTOR_NAME.search(n) and not p.requires_grad)
    hint = ""
    if frozen:
        hint = (
            f" There are {frozen} lora_A/lora_B parameters, but none is trainable: load the "
            "adapter with is_trainable=True, or activate it with set_adapter()."
        )
    if unpaired:
        hint += f" Not served by LoFT: {_by_reason(unpaired)}."
    return (
        f"no trainable LoRA pair in {type(module).__name__}: looked for submodules with lora_A and "
        f"lora_B (parameters, Linear layers, or dicts of them per adapter).{hint} For a model "
        "without adapters use torch.optim.AdamW"
    )
