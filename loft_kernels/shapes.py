"""Shape sets: the weights that LoRA adapts in real models, as (m, n) = (out, in) per layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShapeSet:
    """Adapted weights of a model.

    Attributes:
        layers: number of repeated layers.
        per_layer: (m, n) of every adapted weight of one layer.
        about: which model and which of its weights.
    """

    layers: int
    per_layer: tuple[tuple[int, int], ...]
    about: str

    def pairs(self, layers: int | None = None) -> list[tuple[int, int]]:
        """List (m, n) of all pairs, of the first `layers` layers only if given."""
        return list(self.per_layer) * (self.layers if layers is None else layers)


SHAPE_SETS = {
    "tiny": ShapeSet(1, ((48, 64), (96, 32)), "for trying the benchmark itself"),
    "gpt2": ShapeSet(
        12, ((2304, 768), (768, 768), (3072, 768), (768, 3072)), "GPT-2, all projections"
    ),
    "vit-b": ShapeSet(12, ((2304, 768), (768, 768), (3072, 768), (768, 3072)), "ViT-B, all linear"),
    "llama-7b": ShapeSet(
        32,
        ((4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (4096, 11008)),
        "LLaMA-7B; q, k, v, up, down as in the paper",
    ),
}
