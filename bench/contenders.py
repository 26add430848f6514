"""The optimizers that are compared, the fp64 truth of each, and the bytes that each one keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import loft_kernels as lk
from bench.naive import NaiveLoFT, NaivePair
from bench.problem import Adapters
from loft_kernels.state import state_bytes

Make = Callable[[Adapters], torch.optim.Optimizer]

# Two steps from a fresh state, where P is of rank one and two and v a small difference.
EARLY_LIMIT = 5e-3
# tf32 keeps 10 bits of an operand (2^-11 = 5e-4), and S = (Y^T Y)^-1 is formed of such products;
# the sums over thousands of entries average most of it away.
TF32_LIMIT = 1e-2
# The equations as they read need gradients that differ: v is a small difference of large numbers
# until several of them are summed up. The library's own backends are gated from the first step.
HISTORY = 8


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer under the clock.

    Attributes:
        make: builds it over a model of adapters.
        exact: builds its truth over the fp64 copy of the model.
        limit: largest parity error with which it is timed.
        about: what it is, for the tables.
        entries: fp32 numbers of state of one factor, by (rows, partner_rows, rank).
        history: steps before the gate looks.
        slow: takes the smaller number of steps.
    """

    make: Make
    exact: Make
    limit: float
    about: str
    entries: Callable[[int, int, int], int]
    history: int = 0
    slow: bool = False


def _loft(backend: str, second_moment: str = "full") -> Make:
    """Build a LoFTAdamW of one backend."""
    return lambda model: lk.LoFTAdamW(model, lr=1e-4, backend=backend, second_moment=second_moment)


def _adamw(model: Adapters) -> torch.optim.Optimizer:
    """Build torch's fused AdamW over the factors."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)


def _adamw_plain(model: Adapters) -> torch.optim.Optimizer:
    """Build torch's AdamW without fusion, the truth of the fused one."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, foreach=False)


def _naive(*, compiled: bool) -> Make:
    """Build the step as its equations read."""
    return lambda model: NaiveLoFT(
        [NaivePair(x.lora_B, x.lora_A, x.scaling) for x in model.layers], compiled=compiled
    )


def _full_entries(rows: int, partner_rows: int, rank: int) -> int:
    """Count LoFT's state: m, packed P, the partner's basis."""
    return state_bytes(rows, partner_rows, rank) // 4


def _naive_entries(rows: int, partner_rows: int, rank: int) -> int:
    """Count the naive step's state: m, whole blocks of P, the partner."""
    return rows * rank * (rank + 1) + partner_rows * rank


def _diagonal_entries(rows: int, partner_rows: int, rank: int) -> int:
    """Count LoFT simple's state: m, v, the partner's basis."""
    return 2 * rows * rank + partner_rows * rank


def _adamw_entries(rows: int, partner_rows: int, rank: int) -> int:
    """Count AdamW's state: m and v."""
    del partner_rows
    return 2 * rows * rank


def _backend(name: str, about: str, *, slow: bool = False) -> Contender:
    """Describe one of the library's backends."""
    return Contender(_loft(name), _loft("reference"), EARLY_LIMIT, about, _full_entries, slow=slow)


CONTENDERS = {
    "triton": _backend("triton", "Triton backend"),
    "cpu": _backend("cpu", "C++ backend"),
    "reference": _backend("reference", "reference path", slow=True),
    "reference-diagonal": Contender(
        _loft("reference", "diagonal"),
        _loft("reference", "diagonal"),
        EARLY_LIMIT,
        "LoFT simple (diagonal second moment; not exact LoFT)",
        _diagonal_entries,
        slow=True,
    ),
    "naive": Contender(
        _naive(compiled=False),
        _loft("reference"),
        EARLY_LIMIT,
        "naive loop over adapters, dense m x n, fp32",
        _naive_entries,
        HISTORY,
        slow=True,
    ),
    "dense-compiled": Contender(
        _naive(compiled=True),
        _loft("reference"),
        TF32_LIMIT,
        "the same whole step, tf32, torch.compile",
        _naive_entries,
        HISTORY,
        slow=True,
    ),
    "adamw": Contender(
        _adamw,
        _adamw_plain,
        EARLY_LIMIT,
        "torch.optim.AdamW(fused=True) on the same adapters (not LoFT)",
        _adamw_entries,
    ),
}


def bytes_needed(contender: Contender, shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Count what a run keeps: state, and factors, gradients and mean gradients, all fp32."""
    sides = [side for m, n in shapes for side in ((m, n), (n, m))]
    state = sum(contender.entries(rows, partner, rank) for rows, partner in sides)
    return 4 * (state + 3 * sum(rows * rank for rows, _ in sides))


def parity(
    contender: Contender, shapes: Sequence[tuple[int, int]], rank: int, device: str
) -> float:
    """Return the largest relative error of a factor's move over one step of each phase.

    Both optimizers see the same fp32 parameters and gradients at every step; the moments are each
    one's own. The two steps that count follow the contender's history.
    """
    model = Adapters(shapes, rank, device, seed=1)
    exact = copy.deepcopy(model).double()
    opts = [contender.make(model), contender.exact(exact)]
    worst = 0.0
    for k in range(contender.history + 2):
        model.new_gradients()
        before = []
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.double()
            q.data.copy_(p.data)
            before.append(q.detach().clone())
        for opt in opts:
            if k == contender.history:
                # Rounding X - lr * update is no error of the update.
                for group in opt.param_groups:
                    group["lr"] = 1.0
            opt.step()
        if k >= contender.history:
            moves = zip(model.parameters(), exact.parameters(), before, strict=True)
            worst = max(worst, *(_error(p.detach().double(), q.detach(), b) for p, q, b in moves))
    return worst


def _error(found: torch.Tensor, truth: torch.Tensor, before: torch.Tensor) -> float:
    """Return the relative error of a move; of a factor that must stay, any move is infinite."""
    size, error = float((truth - before).norm()), float((found - truth).norm())
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size if error == error else float("inf")
