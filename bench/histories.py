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


def moments(
    history: History, rows: int, rank: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw gradients in a fixed basis; return m and packed P before the last of them, and it.

    Returns:
        m, ``rows x r``, P, ``rows x r(r+1)/2``, and the next gradient, ``rows x r``; fp64.
    """
    last = history.steps
    t = torch.arange(1, last + 1, dtype=torch.float64, device=rng.device)
    one, two = HISTORIES[history.kind](t, last)
    age = last - 1 - t[:-1]
    weight1, weight2 = ((1 - beta) * beta**age for beta in BETAS)
    parts = []
    for size in _chunks(rows, last * rank):
        mean = normal(rng, 2, size, 1, rank)
        g = one[:, None] * mean[0] + two[:, None] * mean[1]
        # The noise of a gradient belongs to its size: a shock is a gradient like the others.
        scale = torch.maximum(one.abs(), two.abs())[:, None]
        g += history.noise * scale * normal(rng, size, last, rank)
        past = g[:, :-1]
        second = (past * weight2[:, None]).mT @ past
        parts.append((weight1 @ past, ref.pack_symmetric(second), g[:, -1]))
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
