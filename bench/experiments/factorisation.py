"""The paper's Figure 2: fit a matrix of rank 8; and AdamW recovered exactly at full rank."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from comparison import state_bytes

import loft_kernels as lk
from bench.experiments import matrix
from bench.experiments.methods import FULL, LOFT, LORA, SIMULTANEOUS, UNCALIBRATED
from bench.experiments.record import Document, Request, document
from bench.experiments.study import Run, study
from bench.problem import Adapter
from bench.record import largest

COMPARED = (FULL, LORA, LOFT, SIMULTANEOUS, UNCALIBRATED)
TARGET = {"rows": 1024, "columns": 512, "target_rank": 8}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "problem": {"rows": 24, "columns": 16, "target_rank": 2},
        "rank": 2,
        "steps": 20,
        "shown_lr": 0.03,
        "grid": [0.03, 0.1],
        "seeds": 2,
        "extensions": 0,
        "recovery": {"size": 6, "steps": 10, "lr": 0.01, "seeds": 2},
    },
    "small": {
        "problem": TARGET,
        "rank": 8,
        "steps": 120,
        "shown_lr": 0.02,
        "grid": [0.01, 0.02, 0.04, 0.08, 0.16],
        "seeds": 3,
        "extensions": 2,
        "recovery": {"size": 12, "steps": 100, "lr": 0.01, "seeds": 5},
    },
    "full": {
        "problem": TARGET,
        "rank": 8,
        "steps": 400,
        "shown_lr": 0.01,
        "grid": [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08],
        "seeds": 5,
        "extensions": 2,
        "recovery": {"size": 12, "steps": 200, "lr": 0.01, "seeds": 5},
    },
}
# Largest distance that passes for rounding; the fused kernels' own precision is only shown.
LIMITS = {"fp64": 1e-9, "fp32": 1e-4}


def train(settings: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Train one method; validation and test are the same number, for a matrix has no other data."""
    problem = matrix.Problem(**settings["problem"])
    done = matrix.train(
        problem,
        run.method,
        run.lr,
        rank=settings["rank"],
        steps=settings["steps"],
        seed=run.seed,
        device=settings["device"],
        backend=settings["backend"],
        points=settings.get("points", 40),
    )
    steps, curve = zip(*done.curve, strict=True)
    return {
        "steps": list(steps),
        "curve": list(curve),
        "validation": curve[-1],
        "test": curve[-1],
        "state_bytes": state_bytes(done.optimizer),
    }


def recover(
    size: int,
    steps: int,
    lr: float,
    seed: int,
    *,
    dtype: torch.dtype,
    device: str,
    backend: str,
    precision: str = "default",
) -> list[float]:
    """Train a square weight by LoFT at full rank and by torch's AdamW on the weight itself.

    Args:
        size: m = n = r; both factors are random, W0 is their product.
        steps: optimizer steps.
        lr: of both.
        seed: of the factors and the target.
        dtype: of everything.
        device: of everything.
        backend: of LoFTAdamW.
        precision: of LoFTAdamW.

    Returns:
        After every step, the distance of the two weights relative to how far AdamW has come.
    """
    rng = torch.Generator().manual_seed(seed)
    pair = Adapter(size, size, size, rng, torch.float64).to(device, dtype)
    target = torch.randn(size, size, generator=rng, dtype=torch.float64).to(device, dtype)
    loft = lk.LoFTAdamW(pair, lr=lr, backend=backend, precision=precision)

    def product() -> torch.Tensor:
        return pair.scaling * (pair.lora_B @ pair.lora_A)

    start = product().detach()
    weight = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    distances = []
    for _ in range(steps):
        virtual = product()
        virtual.backward((virtual - target).detach())
        weight.grad = (weight - target).detach()
        for optimizer in (loft, adam):
            optimizer.step()
            optimizer.zero_grad()
        apart, path = product().detach() - weight.detach(), weight.detach() - start
        distances.append(apart.norm() / path.norm())
    return torch.stack(distances).tolist()


def recovery(settings: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Repeat :func:`recover` in both precisions; a row has the worst seed at each step."""
    asked = dict(settings)
    seeds = range(asked.pop("seeds"))
    variants = {
        "fp64": {"dtype": torch.float64, "backend": "reference"},
        "fp32": {"dtype": torch.float32, "backend": "reference"},
    }
    if device == "cuda":
        fused = {"dtype": torch.float32, "backend": "triton"}
        variants["fp32, Triton"] = fused
        variants["fp32, Triton, ieee"] = fused | {"precision": "ieee"}
    rows = []
    for name, variant in variants.items():
        curves = [recover(**asked, **variant, seed=seed, device=device) for seed in seeds]
        distances = [largest(column) for column in zip(*curves, strict=True)]
        limit = LIMITS.get(name)
        rows.append(
            {
                "arithmetic": name,
                "largest": largest(distances),
                "last": distances[-1],
                "limit": limit,
                "ok": limit is None or largest(distances) <= limit,
                "distances": distances,
            }
        )
    return rows


def measure(request: Request) -> Document:
    """Compare the methods, and follow AdamW at full rank."""
    settings = SIZES[request.size]
    asked = settings | {"device": request.device, "backend": request.backend}
    found = study(partial(train, asked), COMPARED, settings, request.workers, "factorisation")
    # Without noise every method ends at zero, as near as its rate and fp32 allow: no contest.
    found["claims"] = []
    rows = recovery(settings["recovery"], request.device)
    return document("factorisation", request, settings, studies={"matrix": found}, recovery=rows)
