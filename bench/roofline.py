"""Measure the machine's ceilings and each stage's share of them.

    python -m bench roofline --shapes llama-7b --ranks 4,16,64 --out bench/results/x.jsonl

One row holds the ceilings, then one row per rank holds the stages of a step (on a GPU, by kernel)
or the step as a whole (on a CPU), with what `bench/work.py` counts for it over the time it took.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import loft_kernels as lk
from bench import timing
from bench.cases import SHAPE_SETS
from bench.contenders import CONTENDERS, parity
from bench.problem import Adapters
from bench.record import append, command, environment, even, progress
from bench.run import clear
from bench.work import STAGES, Work, share, work_of

SMALL = {"copy": 1 << 26, "gemm": 1024}
LARGE = {"copy": 1 << 31, "gemm": 8192}
# Dtypes whose products a step makes; the first is that of the hot loop.
PRODUCTS = {"cuda": (torch.float16, torch.float64), "cpu": (torch.float32, torch.float64)}


def seconds(work: timing.Step, device: str, repeats: int) -> float:
    """Return the median time of some work, warmed up."""
    times = []
    for k in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            work()
            taken = time.perf_counter() - start
        if k >= 3:
            times.append(taken)
    return statistics.median(times)


def copy_rate(device: str, size: int, repeats: int) -> float:
    """Return bytes read and written per second by a copy."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, repeats)


def product_rate(device: str, size: int, dtype: torch.dtype, repeats: int) -> float:
    """Return floating-point operations per second of a square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device, repeats)


def special_rate(repeats: int) -> float:
    """Return special functions per second of a GPU (reciprocal roots and reciprocals)."""
    from bench.special import BLOCK, ROUNDS, launch_special

    programs = 16 * torch.cuda.get_device_properties().multi_processor_count
    x = torch.rand(programs * BLOCK, device="cuda") + 0.5
    return 2 * ROUNDS * x.numel() / seconds(lambda: launch_special(x), "cuda", repeats)


def ceilings(device: str, repeats: int, sizes: dict[str, int]) -> dict[str, float]:
    """Measure what the machine does per second: "bytes", operations by dtype, "special"."""
    found = {"bytes": copy_rate(device, sizes["copy"], repeats)}
    for dtype in PRODUCTS[device]:
        size = sizes["gemm"] if dtype != torch.float64 else sizes["gemm"] // 2
        name = str(dtype).removeprefix("torch.float")
        found[f"flop{name}"] = product_rate(device, size, dtype, repeats)
    if device == "cuda":
        found["special"] = special_rate(repeats)
    return found


def stage_of(kernel: str) -> str:
    """Name the stage of a kernel."""
    found = [stage for stage in STAGES if kernel.startswith(f"_{stage}_")]
    return found[0] if found else "other"


def stages(
    model: Adapters, opt: lk.LoFTAdamW, args: argparse.Namespace, tops: dict[str, float]
) -> dict[str, Any]:
    """Take the time of each stage of a step, averaged over both phases."""
    counts, times = timing.kernels(opt.step, model.new_gradients, args.steps)
    spent: dict[str, float] = {}
    for kernel, ms in times.items():
        name = stage_of(kernel)
        spent[name] = spent.get(name, 0.0) + ms / args.steps
    work = work_of(model.shapes, model.rank, gpu=True, merged="operands" not in spent)
    found: dict[str, Any] = {
        name: share(work[name], ms, tops, "flop16") if name in work else {"ms": ms}
        for name, ms in spent.items()
    }
    names = {kernel: counts[kernel] for kernel in counts if stage_of(kernel) == "other"}
    return {"stages": found, "other_kernels": names, "kernel_ms": sum(spent.values())}


def measure(
    rank: int, args: argparse.Namespace, shapes: list[tuple[int, int]], tops: dict[str, float]
) -> dict[str, Any]:
    """Measure one rank."""
    cuda = args.device == "cuda"
    backend = "triton" if cuda else "cpu"
    contender = CONTENDERS[backend]
    error = parity(contender, sorted(set(shapes)), rank, args.device)
    if not error <= contender.limit:
        reason = f"parity {error:.1e} > {contender.limit}: not timed"
        return {"backend": backend, "rank": rank, "parity_error": error, "error": reason}
    clear()
    model = Adapters(shapes, rank, args.device, seed=args.seed)
    opt = lk.LoFTAdamW(model, lr=1e-4, backend=backend)
    step_times = timing.timed(
        opt.step, model.new_gradients, steps=args.steps, warmup=args.warmup, cuda=cuda
    )
    row: dict[str, Any] = {"backend": backend, "rank": rank, "parity_error": error}
    row |= step_times.row()
    total = sum(work_of(shapes, rank, gpu=cuda).values(), Work())
    matrix = "flop16" if cuda else "flop32"
    row["step"] = share(total, row.get("device_ms", row["ms"])["mean"], tops, matrix)
    if cuda:
        row |= stages(model, opt, args, tops)
    return row


def main(argv: list[str] | None = None) -> None:
    """Measure ceilings and shares."""
    parser = argparse.ArgumentParser(
        prog="python -m bench roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=sorted(SHAPE_SETS), default="llama-7b")
    parser.add_argument("--layers", type=int, help="only this many layers of the set")
    parser.add_argument("--ranks", default="4,8,16,32,64", help="comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=even, default=10, help="an even number")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20, help="of each ceiling")
    parser.add_argument("--gemm", type=int, help="size of the products of the ceilings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    args.command = command("roofline", argv)
    sizes = dict(LARGE if args.device == "cuda" else SMALL)
    if args.gemm:
        sizes["gemm"] = args.gemm
    about = {
        "bench": "roofline",
        "command": args.command,
        "device": args.device,
        "seed": args.seed,
        **environment(),
    }
    tops = ceilings(args.device, args.repeats, sizes)
    append([{"ceilings": tops, "sizes": sizes, **about}], args.out)
    clear()
    shapes = SHAPE_SETS[args.shapes].pairs(args.layers)
    for rank in progress([int(text) for text in args.ranks.split(",")], "roofline"):
        row = {"shapes": args.shapes, "layers": args.layers, "pairs": len(shapes)}
        row |= {"steps": args.steps, "ceilings": tops} | measure(rank, args, shapes, tops) | about
        append([row], args.out)
        clear()
