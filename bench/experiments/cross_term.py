"""What moving both factors at once adds to the weight: dB dA, of second order in the rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments import matrix
from bench.experiments.jobs import run_all
from bench.experiments.methods import LOFT, SIMULTANEOUS
from bench.experiments.record import Document, Request, document
from bench.experiments.study import Run, mean

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


def train(settings: Mapping[str, Any], run: Run) -> dict[str, Any]:
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
        step=watch,
    )
    # With B = 0 the first step moves B alone.
    shares, effects = (torch.stack(x[1:]).tolist() for x in (watch.shares, watch.effects))
    return {
        "method": run.method,
        "lr": run.lr,
        "seed": run.seed,
        "share": median(shares),
        "largest_share": max(shares),
        "effect": fmean(effects),
        "harmful_steps": fmean(effect > 0 for effect in effects),
        "loss": done.curve[-1][1],
        "curve": [loss for _, loss in done.curve],
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds, one row per rate."""

    def average(key: str, method: str, lr: float) -> float:
        return mean([r[key] for r in rows if r["method"] == method and r["lr"] == lr])

    return [
        {key: average(key, SIMULTANEOUS, lr) for key in ("share", "effect", "harmful_steps")}
        | {"lr": lr, "largest_share": average("largest_share", SIMULTANEOUS, lr)}
        | {
            "simultaneous": average("loss", SIMULTANEOUS, lr),
            "alternating": average("loss", LOFT, lr),
        }
        for lr in sorted({row["lr"] for row in rows})
    ]


def measure(request: Request) -> Document:
    """Run both ways at every rate."""
    settings = SIZES[request.size]
    asked = settings | {"device": request.device, "backend": request.backend}
    runs = [
        Run(method, lr, seed)
        for method in (SIMULTANEOUS, LOFT)
        for lr in settings["grid"]
        for seed in range(settings["seeds"])
    ]
    rows = run_all(partial(train, asked), runs, request.workers, "cross-term")
    return document("cross-term", request, settings, rows=rows, summary=summarise(rows))
