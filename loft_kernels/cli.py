"""`python -m loft_kernels`: what runs here, whether it computes the right thing, what it needs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from loft_kernels import selftest
from loft_kernels._version import __version__
from loft_kernels.backends import report
from loft_kernels.reference import packed_length
from loft_kernels.shapes import SHAPE_SETS
from loft_kernels.state import state_bytes

_MIB = 2.0**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loft_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"loft_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="which backends run here, and why the others do not")
    test = commands.add_parser("selftest", help="compare every backend with fp64")
    test.add_argument("--require", default="", help="comma-separated backends that must run here")
    memory = commands.add_parser("memory", help="optimizer state and workspace of a model")
    memory.add_argument(
        "--shapes", required=True, help=f"{', '.join(SHAPE_SETS)}, or 4096x11008,..."
    )
    memory.add_argument("--rank", type=int, required=True)
    memory.add_argument("--half", action="store_true", help="fp16 or bf16 factors (fp32 masters)")
    args = parser.parse_args(argv)
    if args.command == "report":
        _say(str(report()), f"  torch {torch.__version__}, Python {sys.version.split()[0]}")
        return 0
    if args.command == "selftest":
        return _selftest([name for name in args.require.split(",") if name])
    return _memory(args.shapes, args.rank, half=args.half)


def _say(*lines: str) -> None:
    """Print lines; the output of a command is its result."""
    sys.stdout.write("\n".join(lines) + "\n")


def _selftest(required: Sequence[str]) -> int:
    """Check every backend and fail if one is wrong or a required one is not here."""
    start = time.monotonic()
    results = selftest.run()
    absent = [name for name in required if name not in results]
    _say(str(report()))
    for backend, wrong in results.items():
        _say(f"{backend}: {len(selftest.CASES)} cases, {'FAILED' if wrong else 'passed'}")
        _say(*(f"  {line}" for line in wrong[:10])) if wrong else None
    if absent:
        _say(f"not here, but required: {', '.join(absent)}")
    _say(f"selftest of loft_kernels {__version__}: {time.monotonic() - start:.1f} s")
    return int(bool(absent) or any(results.values()))


def _pairs(shapes: str) -> list[tuple[int, int]]:
    """Read the name of a shape set, or m x n of every pair."""
    if shapes in SHAPE_SETS:
        return SHAPE_SETS[shapes].pairs()
    pairs = [tuple(int(size) for size in part.split("x")) for part in shapes.split(",")]
    return [(m, n) for m, n in pairs]


def _memory(shapes: str, rank: int, *, half: bool) -> int:
    """Print what training these pairs takes before anyone trains them."""
    try:
        pairs = _pairs(shapes)
    except ValueError:
        known = ", ".join(SHAPE_SETS)
        _say(f"unknown shapes {shapes!r}: a name ({known}), or m x n as in 4096x4096,4096x11008")
        return 2
    if rank < 1:
        _say(f"rank {rank} must be at least 1")
        return 2
    sides = [side for m, n in pairs for side in ((m, n), (n, m))]
    state = sum(state_bytes(rows, partner, rank, half=half) for rows, partner in sides)
    adamw = sum(8 * rows * rank for rows, _ in sides)
    full = sum(8 * m * n for m, n in pairs)
    _say(
        f"{len(pairs)} pairs, rank {rank}:",
        f"  LoFT state        {state / _MIB:10.1f} MiB",
        f"  workspace, cpu    {_workspace(rank) / _MIB:10.1f} MiB per thread",
        f"  LoRA + AdamW      {adamw / _MIB:10.1f} MiB of state (not LoFT)",
        f"  full fine-tuning  {full / _MIB:10.1f} MiB of AdamW state for the same weights",
    )
    return 0


def _workspace(rank: int) -> int:
    """Bound what a thread of the C++ backend works in, whatever m and n (csrc/cpu/update.h)."""
    rows, width, length = 96, 32, packed_length(rank)
    padded = -(-rank // 16) * 16
    operands = 4 * (rows * (rank + length + 1) + width * length)
    tiles = 4 * (4 * padded * width + 4 * rows * width + rows * padded * 16)
    panels = 8 * (rows * rank * 8 + 8 * padded * padded)
    return operands + tiles + panels
