"""What moving both factors at once adds to the weight: dB dA, of second order in the rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments import matrix
from bench.experiments.jobs import run_all
from bench.experiments.methods import LOFT, SIMULTANEOUS
from bench.experiments.record import Document, Request, document
from bench.experiments.study import mean

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "problem": {"rows": 24, "columns": 16, "target_rank": 2},
        "rank": 2,
        "steps": 12,
        "grid": [0.01, 0.1],
        "seeds": 2,
    },
    "small": {
        "problem": {"rows": 1024, "columns": 512, "target_rank": 8},
        "rank": 8,
        "steps": 100,
        "grid": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        "seeds": 3,
    },
    "full": {
        "problem": {"rows": 1024, "columns": 512, "target_rank": 8},
        "rank": 8,
        "steps": 200,
        "grid": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
        "seeds": 5,
    },
}


MEASURED = "share", "largest_share", "effect", "harmful_steps"
# LoRA's own start, where A's first steps are as long as B is short; and factors of usual size.
STARTS = {"B = 0": True, "B drawn": False}


@dataclass(frozen=True)
class Trial:
    """One training."""

    start: str
    method: str
    lr: float
    seed: int


@dataclass
class Watch:
    """Takes the steps of a run and measures the cross term of each.

    Attributes:
        shares: ``|dB dA| / |dB A + B dA|`` of each step.
        effects: what the cross term changes in the loss, in parts of the loss before the step.
    """

    shares: list[Tensor] = field(default_factory=list)
    effects: list[Tensor] = field(default_factory=list)

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, target: Tensor) -> None:
        """Step, and look at what the step did to the product."""
        pair = model.get_submodule("pair")
        b, a = (p.detach().clone() for p in (pair.lora_B, pair.lora_A))
        optimizer.step()
        db, da = pair.lora_B.detach() - b, pair.lora_A.detach() - a
        cross = pair.scaling * (db @ da)
        first = pair.scaling * (db @ a + b @ da)
        before = pair.scaling * (b @ a) - target
        with_cross = (before + first + cross).square().sum()
        without = (before + first).square().sum()
        self.shares.append(cross.norm() / first.norm())
        self.effects.append((with_cross - without) / before.square().sum())


def train(settings: Mapping[str, Any], run: Trial) -> dict[str, Any]:
    """Train at a constant rate, so that the share belongs to one rate."""
    watch = Watch()
    done = matrix.train(
        matrix.Problem(**settings["problem"]),
        run.method,
        run.lr,
        rank=settings["rank"],
        steps=settings["steps"],
        seed=run.seed,
        device=settings["device"],
        backend=settings["backend"],
        falling=False,
        zero=STARTS[run.start],
        step=watch,
    )
    # With B = 0 the first step moves B alone.
    shares, effects = (torch.stack(x[1:]).tolist() for x in (watch.shares, watch.effects))
    return asdict(run) | {
        "share": median(shares),
        "largest_share": max(shares),
        "effect": fmean(effects),
        "harmful_steps": fmean(effect > 0 for effect in effects),
        "loss": done.curve[-1][1],
        "curve": [loss for _, loss in done.curve],
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds, one row per start and rate."""

    def average(key: str, method: str, start: str, lr: float) -> float:
        wanted = method, start, lr
        return mean([r[key] for r in rows if (r["method"], r["start"], r["lr"]) == wanted])

    return [
        {"start": start, "lr": lr}
        | {key: average(key, SIMULTANEOUS, start, lr) for key in MEASURED}
        | {"simultaneous": average("loss", SIMULTANEOUS, start, lr)}
        | {"alternating": average("loss", LOFT, start, lr)}
        for start in STARTS
        for lr in sorted({row["lr"] for row in rows})
    ]


def measure(request: Request) -> Document:
    """Run both ways from both starts at every rate."""
    settings = SIZES[request.size]
    asked = settings | {"device": request.device, "backend": request.backend}
    trials = [
        Trial(start, method, lr, seed)
        for start in STARTS
        for method in (SIMULTANEOUS, LOFT)
        for lr in settings["grid"]
        for seed in range(settings["seeds"])
    ]
    rows = run_all(partial(train, asked), trials, request.workers, "cross-term")
    return document("cross-term", request, settings, rows=rows, summary=summarise(rows))
