"""The LoFT trajectory in the full m x n space, fp64: the truth that every backend answers to.

Nothing here works in the factor form. Each factor X (rows x r) has a partner Y (cols x r), and
with Pi the orthogonal projector onto col(Y) the paper's recursions (Eq. 7-8, 11-12) become::

    M   <- b1 M Pi + (1 - b1) G Pi                            first moment, rows x cols
    S_i <- b2 Pi S_i Pi + (1 - b2) (G_i Pi)^T (G_i Pi)        second moment of row i, cols x cols
    D_ij = M^_ij / (sqrt(S^_i,jj) + eps)
    X   <- (1 - lr wd) X - (lr / s) D Y (Y^T Y)^+

because M = m Y^T and S_i = Y P_i Y^T for the paper's coordinates m and P_i: the transition
C = Y_prev^T Y (Y^T Y)^-1 satisfies C Y^T = Y_prev^T Pi, and g~ Y^T = G Y (Y^T Y)^-1 Y^T = G Pi.

S_i is kept as the sum that it is: w_k h_k^T h_k over the past gradients k, where h_k is row i of
the dense gradient G_k after all projections since, H_k <- H_k Pi. Its diagonal is then a sum of
squares. (Updated as a matrix, it is a small difference of large terms wherever the early gradients
are small, and costs the oracle six digits.) Memory grows by rows x cols a step: short runs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# torch.nn.utils.clip_grad_norm_ guards its division with this absolute number.
CLIP_EPS = 1e-6

GradFn = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one step, with the names and defaults of ``LoFTAdamW``."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    alternate: bool = True
    calibrate: bool = True
    second_moment: str = "full"
    maximize: bool = False


def pinv(matrix: Tensor) -> Tensor:
    """Return the Moore-Penrose inverse; singular values at rounding level count as zero."""
    # An SVD of Y itself, never of Y^T Y: squaring the condition number is what is under test.
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[:1]
    inverse = torch.where(kept, 1 / values, 0.0)
    return (right.mT * inverse) @ left.mT


def projector(partner: Tensor) -> Tensor:
    """Return the orthogonal projector onto the column space of ``partner``, cols x cols."""
    product = partner @ pinv(partner)
    return (product + product.mT) / 2


@dataclass
class Side:
    """Moments of one factor, held in the weight space.

    Args:
        first: dense first moment, rows x cols.
        past: every past dense gradient, carried to the present space, steps x rows x cols.
        weights: what each of them counts in the second moment, (1 - b2) b2^age.
        coordinates: elementwise second moment of the diagonal ablation, rows x r.
        partner: the partner that the moments were last expressed for, cols x r.
    """

    first: Tensor
    past: Tensor
    weights: Tensor
    coordinates: Tensor
    partner: Tensor

    @classmethod
    def zeros(cls, rows: int, partner: Tensor) -> Side:
        """Return the state before the first step."""
        cols, rank = partner.shape
        return cls(
            first=partner.new_zeros(rows, cols),
            past=partner.new_zeros(0, rows, cols),
            weights=partner.new_zeros(0),
            coordinates=partner.new_zeros(rows, rank),
            partner=partner.clone(),
        )

    def observe(self, grad: Tensor, partner: Tensor, hyper: Hyper) -> None:
        """Carry both moments to the space of ``partner`` and average in the new gradient.

        Args:
            grad: dense gradient with the factor's rows first, rows x cols.
            partner: the partner when ``grad`` was computed, cols x r.
            hyper: the hyper-parameters of this step.
        """
        beta1, beta2 = hyper.betas
        project = projector(partner)
        # Without calibration the coordinates m of M = m Y_prev^T are kept: m = M pinv(Y_prev)^T
        # is met by the new Y.
        kept = pinv(self.partner).mT @ partner.mT
        carry = project if hyper.calibrate else kept
        seen = grad @ project
        self.first = beta1 * self.first @ carry + (1 - beta1) * seen
        self.past = torch.cat([self.past @ carry, seen[None]])
        self.weights = torch.cat([beta2 * self.weights, self.weights.new_tensor([1 - beta2])])
        # The diagonal ablation never transports v, so it has no meaning outside the coordinates.
        scaled = grad @ pinv(partner).mT
        self.coordinates = beta2 * self.coordinates + (1 - beta2) * scaled**2
        self.partner = partner.clone()

    @property
    def variance(self) -> Tensor:
        """The uncorrected second moment of every entry of W, rows x cols."""
        return torch.einsum("k,kij->ij", self.weights, self.past.square())

    @property
    def second(self) -> Tensor:
        """The uncorrected second moment S_i of every row, rows x cols x cols."""
        return torch.einsum("k,kij,kil->ijl", self.weights, self.past, self.past)

    def move(self, factor: Tensor, scaling: float, count: int, hyper: Hyper) -> Tensor:
        """Return the factor after the step; the state is only read."""
        beta1, beta2 = hyper.betas
        correct1, correct2 = 1 - beta1**count, 1 - beta2**count
        to_factor = pinv(self.partner).mT  # cols x r, Y (Y^T Y)^+
        if hyper.second_moment == "diagonal":
            first = self.first @ to_factor / correct1
            change = adam_ratio(first, self.coordinates / correct2, hyper.eps)
        else:
            first = self.first / correct1
            change = adam_ratio(first, self.variance / correct2, hyper.eps) @ to_factor
        return (1 - hyper.lr * hyper.weight_decay) * factor - hyper.lr / scaling * change


def adam_ratio(first: Tensor, second: Tensor, eps: float) -> Tensor:
    """Return first / (sqrt(second) + eps) with 0/0 = 0."""
    ratio = first / (second.sqrt() + eps)
    return torch.where(first == 0, 0.0, ratio)


@dataclass
class DensePair:
    """One adapter, W = base + scaling * B @ A, trained by LoFT in the full space.

    Args:
        base: frozen weight, m x n.
        factor_b: B, m x r.
        factor_a: A, r x n.
        scaling: the adapter's multiplier.
    """

    base: Tensor
    factor_b: Tensor
    factor_a: Tensor
    scaling: float
    count: int = 0
    side_b: Side = field(init=False)
    side_a: Side = field(init=False)

    def __post_init__(self) -> None:
        """Make fp64 copies and zero moments."""
        self.base = self.base.detach().double().clone()
        self.factor_b = self.factor_b.detach().double().clone()
        self.factor_a = self.factor_a.detach().double().clone()
        self.side_b = Side.zeros(self.factor_b.shape[0], self.factor_a.mT)
        self.side_a = Side.zeros(self.factor_a.shape[1], self.factor_b)

    @property
    def weight(self) -> Tensor:
        """The effective weight, m x n."""
        return self.base + self.scaling * self.factor_b @ self.factor_a

    def moving(self, hyper: Hyper) -> tuple[bool, bool]:
        """Return whether B and whether A moves at the coming step."""
        if not hyper.alternate:
            return True, True
        return self.count % 2 == 0, self.count % 2 == 1

    def projected_square(self, grad: Tensor, hyper: Hyper) -> Tensor:
        """Return the squared norm of the dense gradient as the moving factor sees it."""
        moves_b, moves_a = self.moving(hyper)
        total = grad.new_zeros(())
        if moves_b:
            total = total + (grad @ projector(self.factor_a.mT)).square().sum()
        if moves_a:
            total = total + (projector(self.factor_b) @ grad).square().sum()
        return total

    def step(self, grad: Tensor, hyper: Hyper) -> None:
        """Do one step with the dense gradient of the loss at the current weight, m x n.

        Both sides read the snapshot of both factors; clipping has to be done before.
        """
        moves_b, moves_a = self.moving(hyper)
        ascent = -grad if hyper.maximize else grad
        self.count += 1
        self.side_b.observe(ascent, self.factor_a.mT, hyper)
        self.side_a.observe(ascent.mT, self.factor_b, hyper)
        new_b, new_a = self.factor_b, self.factor_a
        if moves_b:
            new_b = self.side_b.move(self.factor_b, self.scaling, self.count, hyper)
        if moves_a:
            new_a = self.side_a.move(self.factor_a.mT, self.scaling, self.count, hyper).mT
        self.factor_b, self.factor_a = new_b, new_a


def projected_norm(
    pairs: Iterable[DensePair], grads: Iterable[Tensor], plain: Iterable[Tensor], hyper: Hyper
) -> float:
    """Return the global norm: projected dense gradients of the pairs, plain ones as they are."""
    squares = [pair.projected_square(g, hyper) for pair, g in zip(pairs, grads, strict=True)]
    squares += [g.double().square().sum() for g in plain]
    return float(torch.stack(squares).sum().sqrt())


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """Return the factor for every gradient, as in ``torch.nn.utils.clip_grad_norm_``."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + CLIP_EPS))


def step_pairs(
    pairs: Sequence[DensePair],
    grads: Sequence[Tensor],
    hyper: Hyper,
    plain: Sequence[Tensor] = (),
) -> float:
    """Clip over all pairs and plain gradients, step every pair, return the coefficient."""
    coefficient = 1.0
    if hyper.max_grad_norm is not None:
        norm = projected_norm(pairs, grads, plain, hyper)
        coefficient = clip_coefficient(norm, hyper.max_grad_norm)
    for pair, grad in zip(pairs, grads, strict=True):
        pair.step(coefficient * grad, hyper)
    return coefficient


def adamw_trajectory(start: Tensor, grad_fn: GradFn, steps: int, hyper: Hyper) -> list[Tensor]:
    """Return W after each step of torch's AdamW on the whole weight: the m = n = r limit.

    Args:
        start: initial weight, m x n.
        grad_fn: gradient of the loss at (weight, step index).
        steps: number of steps.
        hyper: lr, betas, eps, weight_decay and maximize are used.
    """
    weight = torch.nn.Parameter(start.detach().double().clone())
    optimizer = torch.optim.AdamW(
        [weight],
        lr=hyper.lr,
        betas=hyper.betas,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=hyper.maximize,
    )
    path = []
    for k in range(steps):
        weight.grad = grad_fn(weight.detach(), k)
        optimizer.step()
        path.append(weight.detach().clone())
    return path
