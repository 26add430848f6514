"""States after any number of steps, built in closed form, and the gradient that follows them.

A row of the moments is a weighted sum over the gradients that it has seen. In the coordinates of a
fixed partner basis Q a gradient of independent entries is g = G Q with independent entries too, so
rows x r numbers a step replace the m x n ones, and 200 steps cost one batched product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_kernels import reference as ref

BETAS = 0.9, 0.999
MOVED = 1e-3  # how far the partner has moved since the state was last touched, relative
_CHUNK = 1 << 27  # entries of gradients in memory at once

# Multiplies the two mean directions at step t of `last`; the noise comes on top.
Means = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _steady(t: Tensor, last: int) -> tuple[Tensor, Tensor]:
    return torch.ones_like(t), torch.zeros_like(t)


def _shock(t: Tensor, last: int) -> tuple[Tensor, Tensor]:
    return torch.where(t == last, 1000.0, 1.0), torch.zeros_like(t)


def _flip(t: Tensor, last: int) -> tuple[Tensor, Tensor]:
    return torch.where(t > last - 10, -1.0, 1.0), torch.zeros_like(t)


def _growth(t: Tensor, last: int) -> tuple[Tensor, Tensor]:
    return 1.05 ** (t - last), torch.zeros_like(t)


def _turns(t: Tensor, last: int) -> tuple[Tensor, Tensor]:
    first = (t / 20).floor() % 2 == 0
    return first.to(t.dtype), (~first).to(t.dtype)


HISTORIES: dict[str, Means] = {
    "steady": _steady,
    "shock": _shock,
    "flip": _flip,
    "growth": _growth,
    "turns": _turns,
}


@dataclass(frozen=True, slots=True)
class History:
    """What a factor's gradients have been.

    Attributes:
        kind: how their mean moves, a key of HISTORIES.
        noise: standard deviation of their noise, relative to that of the mean.
        steps: their number, the one that is to come included.
    """

    kind: str
    noise: float
    steps: int


def conditioned_gauge(rank: int, condition: float, rng: torch.Generator) -> Tensor:
    """Draw an r x r matrix with singular values spread evenly in the logarithm, fp64."""
    left, right = (torch.linalg.qr(normal(rng, rank, rank))[0] for _ in range(2))
    exponents = torch.linspace(0, 1, rank, dtype=torch.float64, device=rng.device)
    return left * condition**-exponents @ right


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal fp64 numbers."""
    return torch.randn(shape, generator=rng, dtype=torch.float64, device=rng.device)


def partner_twice(
    rows: int, rank: int, condition: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a partner as the state remembers it and as it stands now, ``rows x r`` fp64."""
    gauge = conditioned_gauge(rank, condition, rng)
    before = normal(rng, rows, rank) / rows**0.5
    now = before + MOVED * normal(rng, rows, rank) / rows**0.5
    return before @ gauge, now @ gauge


def gradients(history: History, rows: int, rank: int, rng: torch.Generator) -> Tensor:
    """Draw all gradients of some rows in a fixed basis, ``rows x steps x r`` fp64."""
    t = torch.arange(1, history.steps + 1, dtype=torch.float64, device=rng.device)
    one, two = (x[:, None] for x in HISTORIES[history.kind](t, history.steps))
    mean = normal(rng, 2, rows, 1, rank)
    # The noise of a gradient belongs to its size: a shock is a gradient like the others.
    noise = history.noise * torch.maximum(one.abs(), two.abs())
    return one * mean[0] + two * mean[1] + noise * normal(rng, rows, history.steps, rank)


def moments_before_last(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sum gradients, ``rows x steps x r``, up to m and packed P before the last of them."""
    past = g[:, :-1]
    age = torch.arange(past.shape[1] - 1, -1, -1, dtype=g.dtype, device=g.device)
    first, second = ((1 - beta) * beta**age for beta in BETAS)
    return first @ past, ref.pack_symmetric((past * second[:, None]).mT @ past)


def moments(
    history: History, rows: int, rank: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a history; return m and packed P before its last gradient, and that; fp64."""
    parts = []
    for size in _chunks(rows, history.steps * rank):
        g = gradients(history, size, rank, rng)
        parts.append((*moments_before_last(g), g[:, -1].clone()))
    m, p, fresh = (torch.cat(column) for column in zip(*parts, strict=True))
    return m, p, fresh


def guard_after(steps: int) -> float:
    """Return the state's guard after some steps."""
    guard = 0.0
    for _ in range(steps):
        guard = ref.update_guard(guard, *BETAS)
    return guard


def _chunks(rows: int, width: int) -> list[int]:
    """Split rows so that rows * width stays below the limit."""
    size = max(1, _CHUNK // width)
    return [min(size, rows - start) for start in range(0, rows, size)]
