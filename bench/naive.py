"""LoFT as its equations read: a loop over adapters, dense m x n temporaries, r x r blocks.

What the library is compared with, once as it stands (fp32) and once with the whole step of a pair
under ``torch.compile`` and tf32 products. Moments are kept in the factor's own coordinates, as in
the paper; nothing guards against cancellation but the clamp at zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NaivePair:
    """A LoRA pair: ``W = W0 + scaling * b @ a``."""

    b: Tensor
    a: Tensor
    scaling: float


def observe(
    grad: Tensor,
    partner: Tensor,
    partner_prev: Tensor,
    exp_avg: Tensor,
    second_moment: Tensor,
    *,
    scaling: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale one gradient, carry both moments over and accumulate (Sec. 2.1, Eq. 7-8, 11-12).

    Args:
        grad: gradient of the factor, ``rows x r``.
        partner: Y, ``partner_rows x r``.
        partner_prev: Y of the last step.
        exp_avg: m, ``rows x r``.
        second_moment: P, ``rows x r x r``.
        scaling: s.
        betas: decay rates.

    Returns:
        ``S = (Y^T Y)^-1``, m and P after this step.
    """
    beta1, beta2 = betas
    # inv_ex does not look at the outcome, which would wait for the device at every adapter.
    gram_inv = torch.linalg.inv_ex(partner.T @ partner)[0]
    scaled = grad @ gram_inv / scaling
    change = (partner_prev.T @ partner) @ gram_inv
    exp_avg = beta1 * exp_avg @ change + (1 - beta1) * scaled
    outer = scaled[:, :, None] * scaled[:, None, :]
    second_moment = beta2 * (change.T @ second_moment @ change) + (1 - beta2) * outer
    return gram_inv, exp_avg, second_moment


def move(
    factor: Tensor,
    partner: Tensor,
    gram_inv: Tensor,
    exp_avg: Tensor,
    second_moment: Tensor,
    numbers: Tensor,
    *,
    scaling: float,
    eps: float,
) -> Tensor:
    """Take Adam's step in the dense virtual weight and project it: ``X - (lr / s) D Y S``.

    Args:
        factor: X, ``rows x r``.
        partner: Y, ``partner_rows x r``.
        gram_inv: S.
        exp_avg: m.
        second_moment: P.
        numbers: (lr, 1 - b1^t, 1 - b2^t), on the device, so that no value is compiled in.
        scaling: s.
        eps: Adam's epsilon.
    """
    lr, bias1, bias2 = numbers.unbind()
    pairs = (partner[:, :, None] * partner[:, None, :]).flatten(1)
    v = (second_moment.flatten(1) @ pairs.T) / bias2
    step = ((exp_avg / bias1) @ partner.T) / (v.clamp_min(0).sqrt() + eps)
    return factor - (lr / scaling) * (step @ partner @ gram_inv)


@cache
def _compiled(rank: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile both halves for one rank; every call looks through what was compiled before."""
    del rank
    torch._dynamo.reset()
    # Every shape is a compilation of its own; past the limit fullgraph makes it an error.
    torch._dynamo.config.recompile_limit = 64
    return (
        torch.compile(observe, dynamic=False, fullgraph=True),
        torch.compile(move, dynamic=False, fullgraph=True),
    )


class NaiveLoFT(torch.optim.Optimizer):
    """LoFT's step, pair by pair; B and A move in turns, B first.

    Args:
        pairs: the adapters; every factor needs a gradient at every step.
        lr: learning rate of the virtual weight.
        betas: decay rates.
        eps: Adam's epsilon.
        max_grad_norm: clip by the norm of the projected gradients, or None.
        compiled: both halves of a pair's step under ``torch.compile``, with tf32 products.
    """

    def __init__(
        self,
        pairs: Iterable[NaivePair],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        max_grad_norm: float | None = None,
        compiled: bool = False,
    ) -> None:
        """Start from zero moments."""
        self.pairs = list(pairs)
        self.steps = 0
        self.max_grad_norm, self._tf32 = max_grad_norm, compiled
        self._observe: Callable[..., Any] = observe
        self._move: Callable[..., Any] = move
        if compiled:
            self._observe, self._move = _compiled(self.pairs[0].b.shape[1])
        factors = [p for pair in self.pairs for p in (pair.b, pair.a)]
        super().__init__(factors, {"lr": lr, "betas": betas, "eps": eps})
        for pair in self.pairs:
            for p, factor, partner in _sides(pair):
                self.state[p] = {
                    "exp_avg": torch.zeros_like(factor, memory_format=torch.contiguous_format),
                    "second_moment": factor.new_zeros(*factor.shape, factor.shape[1]),
                    "partner": partner.clone(),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step of all pairs."""
        del closure
        group = self.param_groups[0]
        moving = self.steps % 2
        self.steps += 1
        bias = [1 - beta**self.steps for beta in group["betas"]]
        like = self.pairs[0].b
        numbers = torch.tensor([group["lr"], *bias], dtype=like.dtype, device=like.device)
        with products("tf32" if self._tf32 else "ieee"):
            coefficient = self._clip_coefficient(moving)
            for pair in self.pairs:
                self._step_pair(pair, moving, group, numbers, coefficient)

    def _clip_coefficient(self, moving: int) -> Tensor | float:
        """Return what all gradients are multiplied by (building block 6)."""
        if self.max_grad_norm is None:
            return 1.0
        squares = []
        for pair in self.pairs:
            p, _, partner = _sides(pair)[moving]
            grad = _rows(pair, p, p.grad)
            inverse = torch.linalg.inv_ex(partner.T @ partner)[0]
            # ||G P||^2 = tr(g S g^T) / s^2 where P projects onto the partner's columns.
            squares.append((grad @ inverse * grad).sum() / pair.scaling**2)
        norm = torch.stack(squares).sum().sqrt()
        return (self.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)

    def _step_pair(
        self,
        pair: NaivePair,
        moving: int,
        group: dict[str, Any],
        numbers: Tensor,
        coefficient: Tensor | float,
    ) -> None:
        """Let both sides see the same snapshot, then move one."""
        inverses = []
        for p, _, partner in _sides(pair):
            state = self.state[p]
            grad = _rows(pair, p, p.grad)
            inverse, state["exp_avg"], state["second_moment"] = self._observe(
                grad if self.max_grad_norm is None else grad * coefficient,
                partner,
                state["partner"],
                state["exp_avg"],
                state["second_moment"],
                scaling=pair.scaling,
                betas=group["betas"],
            )
            state["partner"].copy_(partner)
            inverses.append(inverse)
        p, factor, partner = _sides(pair)[moving]
        moved = self._move(
            factor,
            partner,
            inverses[moving],
            self.state[p]["exp_avg"],
            self.state[p]["second_moment"],
            numbers,
            scaling=pair.scaling,
            eps=group["eps"],
        )
        factor.copy_(moved)


def _rows(pair: NaivePair, p: Tensor, value: Tensor | None) -> Tensor:
    """View what is stored like a factor as ``rows x r``."""
    if value is None:
        raise RuntimeError("every factor needs a gradient")
    return value if p is pair.b else value.T


def _sides(pair: NaivePair) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Return (parameter, factor, partner) of B and of A, both as ``rows x r``."""
    b, a = pair.b.detach(), pair.a.detach().T
    return (pair.b, b, a), (pair.a, a, b)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Set the precision of fp32 products on the GPU: "ieee" or "tf32"."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
