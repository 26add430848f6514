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


def _all_linear(hidden: int, key_value: int, feed_forward: int) -> tuple[tuple[int, int], ...]:
    """List q, k, v, o, gate, up and down of a layer with grouped key and value heads."""
    narrow, square, up = (key_value, hidden), (hidden, hidden), (feed_forward, hidden)
    return (square, narrow, narrow, square, up, up, (hidden, feed_forward))


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
    "llama-3-8b": ShapeSet(32, _all_linear(4096, 1024, 14336), "Llama-3-8B, all linear"),
    "llama-3-70b": ShapeSet(80, _all_linear(8192, 1024, 28672), "Llama-3-70B, all linear"),
    "mistral-7b": ShapeSet(32, _all_linear(4096, 1024, 14336), "Mistral-7B, all linear"),
}
