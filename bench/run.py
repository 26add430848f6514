"""Measure whole optimizer steps on a shape set and write one JSON line a row.

    python -m bench run --shapes llama-7b --ranks 4,16 --out bench/results/x.jsonl
    python -m bench run --shapes llama-7b --ranks 16 --backends naive,dense-compiled,adamw

Before anything is timed, steps of the very optimizer that is timed are compared with an fp64 run
from the same parameters and gradients; a row whose parity fails is not timed. What does not fit
the device is a row that says so.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.cases import SHAPE_SETS
from bench.contenders import CONTENDERS, Contender, bytes_needed, parity
from bench.problem import Adapters
from bench.record import append, command, environment, even, failure, progress


def too_large(needed: int, device: str) -> str | None:
    """Say that a run cannot fit the device, by its largest tensors alone, or None."""
    if device != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    if needed <= free:
        return None
    return f"needs {needed / 1e9:.1f} GB, the device has {free / 1e9:.1f} GB"


def measure(
    contender: Contender, rank: int, args: argparse.Namespace, shapes: list[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Check and time one optimizer; yields a row's fields as they become known."""
    needed = bytes_needed(contender, shapes, rank)
    yield {"pairs": len(shapes), "needed_bytes": needed, "parity_limit": contender.limit}
    if why := too_large(needed, args.device):
        yield {"skipped": why}
        return
    error = parity(contender, sorted(set(shapes)), rank, args.device)
    yield {"parity_error": error}
    if not error <= contender.limit:
        yield {"error": f"parity {error:.1e} > {contender.limit}: not timed"}
        return
    clear()
    cuda = args.device == "cuda"
    model = Adapters(shapes, rank, args.device, seed=args.seed)
    opt = contender.make(model)
    steps, warmup = args.steps, args.warmup
    if contender.slow:
        steps, warmup = args.baseline_steps, min(2, args.warmup)
    samples = timing.timed(opt.step, model.new_gradients, steps=steps, warmup=warmup, cuda=cuda)
    states = [t for s in opt.state.values() for t in s.values()]
    state = sum(t.numel() * t.element_size() for t in states)
    yield {"steps": steps, **samples.row(), "state_bytes": state}
    if cuda:
        yield {"peak_extra_bytes": timing.peak_extra_memory(opt.step, model.new_gradients)}
        counts, times = timing.kernels(opt.step, model.new_gradients)
        yield {"launches": round(counts.total() / 2), "kernel_ms": sum(times.values()) / 2}


def row_of(
    name: str, rank: int, args: argparse.Namespace, shapes: list[tuple[int, int]]
) -> dict[str, Any]:
    """Measure one row; running out of memory is a result, too."""
    row: dict[str, Any] = {
        "bench": "run",
        "command": args.command,
        "shapes": args.shapes,
        "layers": args.layers,
        "device": args.device,
        "seed": args.seed,
        "steps": args.steps,
        "backend": name,
        "rank": rank,
    }
    try:
        for fields in measure(CONTENDERS[name], rank, args, shapes):
            row |= fields
    except Exception as error:
        row |= failure(error)
    clear()
    return row | environment()


def clear() -> None:
    """Give the memory of the last optimizer back, so that the next one finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark; exits with 1 where a parity check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", choices=sorted(SHAPE_SETS), default="tiny")
    parser.add_argument("--layers", type=int, help="only this many layers of the set")
    parser.add_argument("--ranks", default="16", help="comma-separated")
    parser.add_argument(
        "--backends",
        default=("triton" if cuda else "cpu") + ",reference,reference-diagonal,adamw",
        help=f"comma-separated: {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--steps", type=even, default=20, help="an even number")
    parser.add_argument("--baseline-steps", type=even, default=4, help="of the slow ones")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    args.command = command("run", argv)
    unknown = set(args.backends.split(",")) - CONTENDERS.keys()
    if unknown:
        parser.error(f"--backends: {', '.join(sorted(unknown))} unknown")
    shapes = SHAPE_SETS[args.shapes].pairs(args.layers)
    cases = [(int(r), b) for r in args.ranks.split(",") for b in args.backends.split(",")]
    failed = False
    for rank, name in progress(cases, "run"):
        row = row_of(name, rank, args, shapes)
        append([row], args.out)
        failed |= "error" in row
    sys.exit(int(failed))
