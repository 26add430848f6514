"""Layers: which modules carry LoRA factors, and which kinds of adapter are a product of two.

A linear adapter stores its factors as matrices. PEFT's embedding adapters do too, for the
transposed weight. A convolution adapter is the same product of reshaped kernels, ``lora_B [m, r, 1,
1]`` and ``lora_A [r, in, kh, kw]`` as ``[r, in kh kw]``, whatever the stride and the padding, but
not with groups, where B is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# Variants of PEFT's LoRA layer whose product is still s * B @ A of the stored factors: DoRA
# rescales the result, aLoRA picks the tokens it applies to.
_PLAIN_VARIANTS = ("Dora", "ALora")


@dataclass(slots=True)
class Candidate:
    """One adapter of one layer before it is accepted as a pair."""

    layer: nn.Module
    path: str
    adapter: str
    b: Tensor | None
    a: Tensor | None
    name_b: str
    name_a: str

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """Both tensors, either of which may be missing."""
        return self.b, self.a


_KEYS = ("lora_{}", "lora_embedding_{}")


def candidates(path: str, layer: nn.Module, names: Mapping[int, str]) -> Iterator[Candidate]:
    """List the adapters of one layer."""
    for key in _KEYS:
        key_a, key_b = key.format("A"), key.format("B")
        side_a = _entries(getattr(layer, key_a, None))
        side_b = _entries(getattr(layer, key_b, None))
        for adapter in dict.fromkeys([*side_b, *side_a]):
            b, a = side_b.get(adapter), side_a.get(adapter)
            suffix = f".{adapter}" if adapter else ""
            prefix = f"{path}." if path else ""
            name_b = names.get(id(b), f"{prefix}{key_b}{suffix}")
            name_a = names.get(id(a), f"{prefix}{key_a}{suffix}")
            yield Candidate(layer, path, adapter, b, a, name_b, name_a)


def factors_of(layer: nn.Module, adapter: str) -> tuple[Tensor | None, Tensor | None]:
    """Look up lora_B and lora_A of one adapter of a layer as they are now."""
    for key in _KEYS:
        b, a = (_entry(getattr(layer, key.format(side), None), adapter) for side in "BA")
        if b is not None or a is not None:
            return b, a
    return None, None


def _entry(side: Any, adapter: str) -> Tensor | None:
    """Read one adapter's factor."""
    if adapter:
        found = isinstance(side, nn.ModuleDict | nn.ParameterDict | Mapping) and adapter in side
        side = side[adapter] if found else None
    return _entries(side).get("")


def _entries(side: Any) -> dict[str, Tensor]:
    """Read ``lora_A`` or ``lora_B``: a tensor, a layer with a weight, or a dict of either."""
    if side is None:
        return {}
    if isinstance(side, Tensor):
        return {"": side}
    if isinstance(side, nn.ModuleDict | nn.ParameterDict | Mapping):
        nested = {name: _entries(value) for name, value in side.items()}
        return {name: entry[""] for name, entry in nested.items() if "" in entry}
    weight = getattr(side, "weight", None)
    return {"": weight} if isinstance(weight, Tensor) else {}


def other_product(candidate: Candidate) -> str | None:
    """Name the kinds of adapter whose product is not s * B @ A of two stored matrices."""
    if any(t is not None and t.dim() > 2 for t in candidate.factors):
        reason = _other_convolution(candidate)
        if reason is not None:
            return reason
    variants = getattr(candidate.layer, "lora_variant", None)
    variant = variants.get(candidate.adapter) if isinstance(variants, Mapping) else None
    if variant is not None:
        kind = type(variant).__name__
        if not kind.lstrip("_").startswith(_PLAIN_VARIANTS):
            return f"PEFT variant {kind}"
    return None


def _other_convolution(candidate: Candidate) -> str | None:
    """Say why factors of more than two dimensions are no product of two matrices, or None."""
    sides = []
    for key in ("lora_B", "lora_A"):
        side = getattr(candidate.layer, key, None)
        if isinstance(side, nn.ModuleDict) and candidate.adapter in side:
            side = side[candidate.adapter]
        if not isinstance(side, _ConvNd):
            return f"{key} has more than two dimensions and is no convolution"
        sides.append(side)
    if any(side.groups > 1 or side.transposed for side in sides):
        return "convolution adapter with groups, whose B is block-diagonal, or transposed"
    pointwise = sides[0]
    if {*pointwise.kernel_size, *pointwise.stride} != {1} or pointwise.padding not in (
        (0,) * len(pointwise.kernel_size),
        "valid",
    ):
        return "convolution adapter whose lora_B is no 1 x 1 convolution"
    return None


def as_matrix(name: str, param: Tensor) -> Tensor:
    """View a convolution's factor as the matrix that it is: ``[m, r]`` or ``[r, in kh kw]``.

    Raises:
        ValueError: its memory format has no such view.
    """
    if param.dim() <= 2:
        return param
    try:
        return param.detach().view(param.shape[0], -1)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} is not contiguous (channels_last?), so it is no "
            "matrix in place: convert the adapter with "
            ".to(memory_format=torch.contiguous_format)"
        ) from None
