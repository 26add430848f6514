"""What the second moment's memory buys: rank and form against loss and closeness to full AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from comparison import state_bytes

from bench.experiments import matrix
from bench.experiments.jobs import run_all
from bench.experiments.methods import FULL, LOFT, LORA, SIMPLE
from bench.experiments.record import Document, Request, document
from bench.experiments.study import mean

NOISY = {"target_rank": 128, "decay": 1.0, "noise": 0.5}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "problem": {"rows": 24, "columns": 16, "target_rank": 8, "decay": 1.0, "noise": 0.5},
        "ranks": [1, 4],
        "steps": 20,
        "grid": [0.01, 0.04],
        "seeds": 2,
    },
    "small": {
        "problem": {"rows": 256, "columns": 192, **NOISY},
        "ranks": [1, 4, 16, 64],
        "steps": 150,
        "grid": [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64],
        "seeds": 2,
    },
    "full": {
        "problem": {"rows": 1024, "columns": 768, **NOISY, "target_rank": 512},
        "ranks": [1, 4, 16, 64],
        "steps": 400,
        "grid": [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64],
        "seeds": 3,
    },
}


@dataclass(frozen=True)
class Trial:
    """A method and rank with one seed, trained at every rate and compared with full AdamW."""

    method: str
    rank: int
    seed: int


def train(settings: Mapping[str, Any], trial: Trial, lr: float) -> matrix.Trained:
    """Train one method at one learning rate."""
    return matrix.train(
        matrix.Problem(**settings["problem"]),
        trial.method,
        lr,
        rank=trial.rank,
        steps=settings["steps"],
        seed=trial.seed,
        device=settings["device"],
        backend=settings["backend"],
    )


def tried(settings: Mapping[str, Any], trial: Trial) -> list[dict[str, Any]]:
    """Train at every rate of the grid; each row has the distance to full AdamW at that rate."""
    rows = []
    for lr in settings["grid"]:
        done = train(settings, trial, lr)
        full = train(settings, Trial(FULL, 0, trial.seed), lr).weight
        rows.append(
            asdict(trial)
            | {
                "lr": lr,
                "loss": done.curve[-1][1],
                "distance": float((done.weight - full).norm() / full.norm()),
                "state_bytes": state_bytes(done.optimizer),
            }
        )
    return rows


def least_losses(settings: Mapping[str, Any]) -> dict[int, float]:
    """Return the loss that no weight of a rank can go below, averaged over the seeds."""
    problem = matrix.Problem(**settings["problem"])
    targets = [problem.target(seed, "cpu").double() for seed in range(settings["seeds"])]
    energies = [torch.linalg.svdvals(target).square() for target in targets]
    return {
        rank: fmean(float(e[rank:].sum() / e.sum()) for e in energies) for rank in settings["ranks"]
    } | {0: 0.0}


def summarise(rows: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Average over seeds: each method at full AdamW's best rate, and at its own."""

    def average(key: str, method: str, rank: int, lr: float) -> float:
        wanted = method, rank, lr
        return mean([r[key] for r in rows if (r["method"], r["rank"], r["lr"]) == wanted])

    def best(method: str, rank: int) -> float:
        return min(settings["grid"], key=lambda lr: average("loss", method, rank, lr))

    shared, least = best(FULL, 0), least_losses(settings)
    found = []
    for method, rank in dict.fromkeys((row["method"], row["rank"]) for row in rows):
        own = best(method, rank)
        found.append(
            {
                "method": method,
                "rank": rank,
                "state_bytes": int(average("state_bytes", method, rank, own)),
                "lr_of_full": shared,
                "loss": average("loss", method, rank, shared),
                "distance": average("distance", method, rank, shared),
                "own_lr": own,
                "at_edge": own in (settings["grid"][0], settings["grid"][-1]),
                "own_loss": average("loss", method, rank, own),
                "least_loss": least[rank],
            }
        )
    return found


def measure(request: Request) -> Document:
    """Train every rank in both forms, and LoRA and the full weight beside them."""
    settings = SIZES[request.size]
    asked = settings | {"device": request.device, "backend": request.backend}
    seeds = range(settings["seeds"])
    trials = [Trial(FULL, 0, seed) for seed in seeds]
    # The largest rank takes longest, so it goes first.
    trials += [
        Trial(method, rank, seed)
        for rank in reversed(settings["ranks"])
        for method in (LOFT, SIMPLE, LORA)
        for seed in seeds
    ]
    found = run_all(partial(tried, asked), trials, request.workers, "memory")
    rows = [row for part in found for row in part]
    summary = summarise(rows, settings)
    return document("memory", request, settings, rows=rows, summary=summary)
