"""The paper's LoFT equations letter by letter, in the factor's own coordinates (fp64).

It exists to check the full-space oracle, not the optimizer: S = (Y^T Y)^-1 is formed as written,
so it is only good for well-conditioned factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from oracle import Hyper
from torch import Tensor


@dataclass
class LiteralSide:
    """Moments of one factor in its own coordinates: m is rows x r, p is rows x r^2."""

    m: Tensor
    p: Tensor
    v: Tensor
    partner: Tensor

    def observe(self, factor_grad: Tensor, partner: Tensor, scaling: float, hyper: Hyper) -> None:
        """Apply Sec. 2.1, Eq. 7-8 and Eq. 11-12 to the gradient of the factor, rows x r."""
        beta1, beta2 = hyper.betas
        gram_inv = torch.linalg.inv(partner.mT @ partner)
        scaled = factor_grad @ gram_inv / scaling
        transition = torch.eye(partner.shape[1], dtype=partner.dtype)
        if hyper.calibrate:
            transition = (self.partner.mT @ partner) @ gram_inv
        khatri_rao = torch.stack([torch.kron(row, row) for row in scaled])
        carry = torch.kron(transition, transition)
        self.m = beta1 * self.m @ transition + (1 - beta1) * scaled
        self.p = beta2 * self.p @ carry + (1 - beta2) * khatri_rao
        self.v = beta2 * self.v + (1 - beta2) * scaled * scaled
        self.partner = partner.clone()

    def move(self, factor: Tensor, scaling: float, count: int, hyper: Hyper) -> Tensor:
        """Return the factor after the projected update."""
        beta1, beta2 = hyper.betas
        partner = self.partner
        m_hat = self.m / (1 - beta1**count)
        if hyper.second_moment == "diagonal":
            v_hat = self.v / (1 - beta2**count)
            change = m_hat / (v_hat.sqrt() + hyper.eps)
        else:
            p_hat = self.p / (1 - beta2**count)
            pairs = torch.stack([torch.kron(row, row) for row in partner])
            dense = (m_hat @ partner.mT) / ((p_hat @ pairs.mT).sqrt() + hyper.eps)
            change = dense @ partner @ torch.linalg.inv(partner.mT @ partner)
        return (1 - hyper.lr * hyper.weight_decay) * factor - hyper.lr / scaling * change


@dataclass
class LiteralPair:
    """One adapter stepped by the paper's equations; gradients enter as those of the factors."""

    base: Tensor
    factor_b: Tensor
    factor_a: Tensor
    scaling: float
    count: int = 0
    side_b: LiteralSide = field(init=False)
    side_a: LiteralSide = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero moments."""
        self.side_b = self._zeros(self.factor_b, self.factor_a.mT)
        self.side_a = self._zeros(self.factor_a.mT, self.factor_b)

    @staticmethod
    def _zeros(factor: Tensor, partner: Tensor) -> LiteralSide:
        rows, rank = factor.shape
        zeros = factor.new_zeros
        return LiteralSide(
            zeros(rows, rank), zeros(rows, rank**2), zeros(rows, rank), partner.clone()
        )

    @property
    def weight(self) -> Tensor:
        """The effective weight, m x n."""
        return self.base + self.scaling * self.factor_b @ self.factor_a

    def step(self, grad: Tensor, hyper: Hyper) -> None:
        """Do one step with the dense gradient, m x n, seen through the chain rule."""
        b, a, s = self.factor_b, self.factor_a, self.scaling
        sign = -1.0 if hyper.maximize else 1.0
        self.side_b.observe(sign * s * grad @ a.mT, a.mT, s, hyper)
        self.side_a.observe(sign * s * grad.mT @ b, b, s, hyper)
        moves_b = not hyper.alternate or self.count % 2 == 0
        moves_a = not hyper.alternate or self.count % 2 == 1
        self.count += 1
        if moves_b:
            self.factor_b = self.side_b.move(b, s, self.count, hyper)
        if moves_a:
            self.factor_a = self.side_a.move(a.mT, s, self.count, hyper).mT
