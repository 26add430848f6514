"""A model that is nothing but adapters, with gradients as a real low-rank pair has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """One LoRA pair, B not zero, so that both factors have work to do."""

    def __init__(self, m: int, n: int, rank: int, rng: torch.Generator, dtype: torch.dtype) -> None:
        """Draw both factors at the scale they have during training."""
        super().__init__()
        device = rng.device
        self.scaling = 2.0
        a = torch.randn(rank, n, generator=rng, device=device) / n**0.5
        b = torch.randn(m, rank, generator=rng, device=device) / rank**0.5
        self.lora_A, self.lora_B = nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))


class Adapters(nn.Module):
    """All pairs of a shape set, and a supply of gradients.

    Args:
        shapes: (m, n) of every pair.
        rank: r.
        device: where everything lives.
        dtype: of the adapters.
        seed: of the random numbers.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        device: str,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Draw the factors and a fixed mean gradient for each."""
        super().__init__()
        self.shapes, self.rank = list(shapes), rank
        self.rng = torch.Generator(device).manual_seed(seed)
        self.layers = nn.ModuleList(Adapter(m, n, rank, self.rng, dtype) for m, n in shapes)
        self.means = [self._noise(p) for p in self.parameters()]

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=self.rng, device=like.device)
        return noise.to(like.dtype)

    def new_gradients(self) -> None:
        """Give every factor a gradient in new memory, as zero_grad(set_to_none=True) leads to."""
        for p, mean in zip(self.parameters(), self.means, strict=True):
            p.grad = (mean + self._noise(p)) * 1e-3
