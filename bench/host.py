"""Compare the backends of the CPU on one pair in one run: time of a step and peak memory.

    python -m bench host --size 2048 --ranks 4,16 --threads 2

The backends take turns step by step, so that a busy machine slows both alike. Memory is what one
more step needs beyond what the process holds, as the operating system counts it (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import loft_kernels as lk
from bench.contenders import CONTENDERS, parity
from bench.problem import Adapters
from bench.record import append, command, environment

BACKENDS = ("cpu", "reference")


def timed(
    runs: dict[str, tuple[Adapters, torch.optim.Optimizer]], steps: int
) -> dict[str, list[float]]:
    """Return the milliseconds of every step of each backend, warmed up over four steps."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(4 + steps):
        for name, (model, opt) in runs.items():
            model.new_gradients()
            start = time.perf_counter()
            opt.step()
            if k >= 4:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


def peak_extra_bytes(model: Adapters, opt: torch.optim.Optimizer) -> int:
    """Return how far a step raises the process's resident memory, or 0 if it does not."""
    model.new_gradients()
    # What earlier runs have freed would stay resident, and a step that takes it would seem free.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = _status("VmRSS")
    opt.step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """Read one entry of the process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def main(argv: list[str] | None = None) -> None:
    """Run the comparison and write one JSON line per rank."""
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="m = n of the pair")
    parser.add_argument("--ranks", default="4,16", help="comma-separated")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    args.command = command("host", argv)
    torch.set_num_threads(args.threads)
    shapes = [(args.size, args.size)]
    load = os.getloadavg()[0]  # of others; this run adds its own
    failed = False
    for rank in map(int, args.ranks.split(",")):
        error = parity(CONTENDERS["cpu"], shapes, rank, "cpu")
        if not error <= CONTENDERS["cpu"].limit:
            print(f"rank {rank}: parity {error:.1e} > {CONTENDERS['cpu'].limit}: not timed")
            failed = True
            continue
        runs = {}
        for name in BACKENDS:
            model = Adapters(shapes, rank, "cpu")
            runs[name] = model, lk.LoFTAdamW(model, lr=1e-4, backend=name)
        # The first step makes the state and the threads' working memory: measured at its full size.
        extra = {name: peak_extra_bytes(*run) for name, run in runs.items()}
        medians = {k: statistics.median(v) for k, v in timed(runs, args.steps).items()}
        row: dict[str, Any] = {
            "bench": "host",
            "seed": 0,
            "load_before": load,
            "command": args.command,
            "size": args.size,
            "rank": rank,
        }
        row |= {"steps": args.steps, "median_ms": medians}
        row["speedup"] = medians["reference"] / medians["cpu"]
        state = sum(
            t.numel() * t.element_size() for s in runs["cpu"][1].state.values() for t in s.values()
        )
        row |= {"first_step_peak_extra_bytes": extra, "state_bytes": state}
        row["later_step_peak_extra_bytes"] = {k: peak_extra_bytes(*run) for k, run in runs.items()}
        row["parity_error"] = error
        append([row | environment()], args.out)
    sys.exit(int(failed))
