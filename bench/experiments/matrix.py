"""A linear problem whose full-weight training is cheap: a target matrix under the squared loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.experiments.methods import METHODS, make_optimizer
from bench.problem import Adapter


class Weight(nn.Module):
    """The full weight, zero at the start."""

    def __init__(self, rows: int, columns: int, device: str) -> None:
        """Make the weight."""
        super().__init__()
        self.full = nn.Parameter(torch.zeros(rows, columns, device=device))

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.full


class Pair(nn.Module):
    """The weight as a LoRA pair."""

    def __init__(
        self, rows: int, columns: int, rank: int, device: str, seed: int, zero: bool
    ) -> None:
        """Draw A, and B unless it is zero, on the CPU so that every device starts alike."""
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.pair = Adapter(rows, columns, rank, rng, torch.float32)
        if zero:
            nn.init.zeros_(self.pair.lora_B)
        self.to(device)

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.pair.scaling * (self.pair.lora_B @ self.pair.lora_A)


@dataclass(frozen=True)
class Problem:
    """Minimise ``|W - T|^2 / 2``.

    Attributes:
        rows: of T.
        columns: of T.
        target_rank: rank of T; entries have variance 1.
        decay: the k-th of the target's directions is as long as ``k^-decay`` times the first.
        noise: standard deviation of what is added to each entry of the gradient of W, new at
            every step, as in training on small batches.
    """

    rows: int
    columns: int
    target_rank: int
    decay: float = 0.0
    noise: float = 0.0

    def target(self, seed: int, device: str) -> Tensor:
        """Draw T."""
        rng = torch.Generator().manual_seed(1000 + seed)
        left = torch.randn(self.rows, self.target_rank, generator=rng)
        right = torch.randn(self.target_rank, self.columns, generator=rng)
        lengths = torch.arange(1.0, self.target_rank + 1) ** -self.decay
        product = (left * (lengths / lengths.norm())) @ right
        return product.to(device)

    def model(self, method: str, rank: int, seed: int, device: str, zero: bool) -> nn.Module:
        """Make what a method trains; B is zero at the start, or drawn."""
        if METHODS[method].adapter is None:
            return Weight(self.rows, self.columns, device)
        return Pair(self.rows, self.columns, rank, device, seed, zero)

    def gradients(self, seed: int, device: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function from (W, T) to the gradient of W; its noise repeats with the seed."""
        rng = torch.Generator(device).manual_seed(seed)

        def gradient(weight: Tensor, target: Tensor) -> Tensor:
            found = weight.detach() - target
            if self.noise:
                drawn = torch.randn(found.shape, generator=rng, device=device)
                found.add_(drawn, alpha=self.noise)
            return found

        return gradient


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, target: Tensor) -> None:
    """Take a step and nothing else."""
    optimizer.step()


@dataclass
class Trained:
    """What is left of a run: its weight, its curve of |W - T|^2 / |T|^2 and its optimizer."""

    weight: Tensor
    curve: list[tuple[int, float]]
    optimizer: torch.optim.Optimizer


def train(
    problem: Problem,
    method: str,
    lr: float,
    *,
    rank: int,
    steps: int,
    seed: int,
    device: str,
    backend: str = "auto",
    points: int = 40,
    falling: bool = True,
    zero: bool = True,
    step: Callable[[nn.Module, torch.optim.Optimizer, Tensor], None] = take_step,
) -> Trained:
    """Train from W = 0, or from a drawn pair.

    Args:
        problem: what to minimise.
        method: a key of METHODS.
        lr: learning rate of the first step.
        rank: r of the adapter; a full weight has none.
        steps: optimizer steps.
        seed: of the target, the adapter and the noise.
        device: where to train.
        backend: of LoFTAdamW.
        points: how many points the curve has after the one at step 0, about.
        falling: lower the learning rate linearly to zero, or leave it.
        zero: start at B = 0, as LoRA does, or at a drawn B.
        step: takes a step of the optimizer, given the model, the optimizer and T.
    """
    target = problem.target(seed, device)
    scale = target.square().sum()
    model = problem.model(method, rank, seed, device, zero)
    optimizer = make_optimizer(method, model, lr, backend)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - falling * k / steps)
    gradient = problem.gradients(seed, device)
    every = max(1, steps // points)
    losses: dict[int, Tensor] = {}
    for k in range(steps + 1):
        weight = model()
        if k % every == 0 or k == steps:
            losses[k] = (weight.detach() - target).square().sum() / scale
        if k == steps:
            break
        weight.backward(gradient(weight, target))
        step(model, optimizer, target)
        optimizer.zero_grad()
        schedule.step()
    values = torch.stack(list(losses.values())).tolist()
    return Trained(model().detach(), list(zip(losses, values, strict=True)), optimizer)
