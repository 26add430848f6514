"""What the fused step is compared with: the same update on dense m x n matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import Adapters
from loft_kernels.reference import khatri_rao_square, packed_length


def dense_update(m: Tensor, p: Tensor, q: Tensor, products: Tensor, eps: float) -> Tensor:
    """Adam's step in the dense virtual weight and its projection, as one expression."""
    step = (m @ q.T) / ((p @ products.T).clamp_min(0).sqrt() + eps)
    return step @ q


class DenseUpdate:
    """The update part of a LoFT step of all pairs with dense temporaries, tf32, torch.compile.

    Only what the hot loop computes: no Gram products, no transport, no moments. B and A take
    turns, as in the real step.

    Args:
        model: the adapters.
        rank: r.
    """

    def __init__(self, model: Adapters, rank: int) -> None:
        """Draw moments of the right shapes."""
        self._update = torch.compile(dense_update, dynamic=False)
        self._sides: list[list[tuple[Tensor, ...]]] = [[], []]
        self._phase = 0
        for layer in model.layers:
            b, a = layer.lora_B.detach(), layer.lora_A.detach().T
            for side, (factor, partner) in enumerate(((b, a), (a, b))):
                q = torch.linalg.qr(partner.float())[0].contiguous()
                rows = factor.shape[0]
                p = torch.rand(rows, packed_length(rank), device=q.device)
                self._sides[side].append((torch.randn_like(factor), p, q))

    def step(self) -> None:
        """Take the update of one phase."""
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for m, p, q in self._sides[self._phase]:
            self._update(m, p, q, khatri_rao_square(q), 1e-8)
        torch.backends.cuda.matmul.fp32_precision = before
        self._phase ^= 1
