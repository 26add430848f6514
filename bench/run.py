"""Measure whole optimizer steps on a shape set and write one JSON line a row.

    python -m bench run --shapes llama-7b --ranks 16 --device cuda --out bench/results/x.jsonl

Before anything is timed, one step of the very optimizer that is timed is compared with an fp64 run
from the same parameters and gradients; a row whose parity fails is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import loft_kernels as lk
from bench import timing
from bench.baselines import DenseUpdate
from bench.cases import SHAPE_SETS
from bench.problem import Adapters

PARITY_LIMIT = 5e-3  # two steps from a fresh state, where P is close to rank one (DESIGN section 3)


def environment() -> dict[str, Any]:
    """Describe what a number was measured on."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout

    cuda = torch.cuda.is_available()
    # What a benchmark writes changes nothing that another one measures.
    code = ":(top,exclude)bench/results", ":(top,exclude)docs"
    return {
        # A copy of the tree without its history can be told which commit it is.
        "commit": git("rev-parse", "--short", "HEAD").strip() or os.environ.get("LOFT_COMMIT"),
        # None where there is no history to compare with.
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", *code).strip())
        if git("rev-parse", "HEAD")
        else None,
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
    }


def make_optimizer(model: Adapters, backend: str) -> torch.optim.Optimizer:
    """Build one of the optimizers that are compared."""
    if backend == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    second_moment = "full"
    if backend.endswith("-diagonal"):
        backend, second_moment = backend.removesuffix("-diagonal"), "diagonal"
    return lk.LoFTAdamW(model, lr=1e-4, backend=backend, second_moment=second_moment)


def parity(backend: str, shapes: list[tuple[int, int]], rank: int, device: str) -> float:
    """Return the largest relative error of a factor's displacement, two steps against fp64."""
    model = Adapters(shapes, rank, device, seed=1)
    exact = copy.deepcopy(model).double()
    before = [p.detach().double().clone() for p in model.parameters()]
    opts = [make_optimizer(model, backend), make_optimizer(exact, "reference")]
    for group in (*opts[0].param_groups, *opts[1].param_groups):
        group["lr"] = 1.0  # rounding X - lr * update is no error of the update
    for _ in range(2):
        model.new_gradients()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.double()
            q.data.copy_(p.data)
        for opt in opts:
            opt.step()
    errors = [
        float((p.detach().double() - q.detach()).norm() / (q.detach() - b).norm())
        for p, q, b in zip(model.parameters(), exact.parameters(), before, strict=True)
    ]
    return max(errors)


def measure(
    backend: str, rank: int, args: argparse.Namespace, shapes: list[tuple[int, int]]
) -> dict[str, Any]:
    """Check and time one optimizer."""
    row: dict[str, Any] = {"backend": backend, "rank": rank, "pairs": len(shapes)}
    if backend in ("reference", "cpu", "triton"):
        row["parity_error"] = parity(backend, sorted(set(shapes)), rank, args.device)
        if not row["parity_error"] <= PARITY_LIMIT:
            return {**row, "error": f"parity {row['parity_error']:.1e} > {PARITY_LIMIT}: not timed"}
    model = Adapters(shapes, rank, args.device)
    if backend == "dense-compiled":
        dense = DenseUpdate(model, rank)
        row["part"] = "update only"
        row["ms"] = timing.step_times(
            dense.step, model.new_gradients, steps=args.steps, warmup=max(4, args.warmup), cuda=True
        )
        return row
    opt = make_optimizer(model, backend)
    cuda = args.device == "cuda"
    row["ms"] = timing.step_times(
        opt.step, model.new_gradients, steps=args.steps, warmup=args.warmup, cuda=cuda
    )
    states = [t for s in opt.state.values() for t in s.values()]
    row["state_bytes"] = sum(t.numel() * t.element_size() for t in states)
    if cuda:
        row["host_ms"] = timing.host_time(opt.step, model.new_gradients, steps=6)
        row["peak_extra_bytes"] = timing.peak_extra_memory(opt.step, model.new_gradients)
        row["launches"] = timing.launches(opt.step, model.new_gradients)
    return row


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench run", description=__doc__)
    parser.add_argument("--shapes", choices=sorted(SHAPE_SETS), default="tiny")
    parser.add_argument("--layers", type=int, help="only this many layers of the set")
    parser.add_argument("--ranks", default="16", help="comma-separated")
    parser.add_argument("--backends", default="reference,reference-diagonal,adamw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    shapes = SHAPE_SETS[args.shapes].pairs(args.layers)
    cases = [(int(r), b) for r in args.ranks.split(",") for b in args.backends.split(",")]
    for rank, backend in cases:
        row = {"shapes": args.shapes, "device": args.device, "steps": args.steps}
        row |= measure(backend, rank, args, shapes) | environment()
        print(json.dumps(row))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
