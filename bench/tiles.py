"""Sweep tile sizes around the frozen ones and write the winners of this GPU into the tables.

    python -m bench tiles --ranks 16 --stages moments
    python -m bench tiles --write --out bench/results/tiles-h200.jsonl

Candidates are the present entry and what is one change away from it. Each runs in a process of its
own first, many at a time: that fills Triton's cache, and what hangs, crashes or asks for more than
the GPU has ends that process only. Then the stage's kernels are timed, candidate by candidate, over
both phases. An entry is written where a candidate is more than 2 % faster, twice, and agrees with
fp64. Its own neighbours are those of the next run: run it until nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import loft_kernels as lk
from bench import tile_table, timing
from bench.cases import SHAPE_SETS
from bench.contenders import CONTENDERS, parity
from bench.problem import Adapters
from bench.record import append, command, environment, even, failure, progress
from bench.roofline import stage_of
from bench.run import clear
from loft_kernels.backends.triton import configs

DEVICE = "cuda"
# The kernels of a stage; `solve` adds up what the chunks of `gram` leave.
KERNELS = {"update": ("update",), "moments": ("moments",), "rows": ("gram", "solve", "basis")}
REGISTERS = (None, 128, 168)
# A share of the present entry's time below which a difference is noise.
NOISE = 0.02
# Seconds after which a candidate that is tried out counts as hung.
PATIENCE = 300


@dataclass(frozen=True, slots=True)
class Case:
    """An entry of the tables that is swept.

    Attributes:
        stage: what is timed.
        table: where the entry stands for this GPU.
        width: padded rank of the entry.
        ranks: those that were asked for and that the entry serves; their times are added up.
    """

    stage: str
    table: str
    width: int
    ranks: tuple[int, ...]


def capability() -> configs.Capability:
    """Return the compute capability of this GPU."""
    return configs.capability_of(torch.device(DEVICE))


def cases_of(stages: Sequence[str], ranks: Sequence[int]) -> list[Case]:
    """List the entries that serve some ranks on this GPU."""
    found: dict[tuple[str, str, int], list[int]] = {}
    for stage in stages:
        for rank in ranks:
            hopper = capability() == configs.HOPPER
            if hopper and configs.broad(rank) and stage != "rows":
                # One tile fits the kernels of these ranks; the entries serve precision="ieee".
                continue
            own = hopper and stage == "update" and rank <= configs.LARGEST_SQUARE
            table = "hopper" if own else stage
            found.setdefault((stage, table, configs.entry_rank(table, rank)), []).append(rank)
    return [Case(*key, tuple(served)) for key, served in found.items()]


def _fitted(table: str, tile: Any) -> configs.Tile:
    """Let the fields that hang on a changed one follow it."""
    if table == "hopper":
        return replace(tile, warps=tile.block_m // 16)
    if table == "moments":
        group, idle = min(tile.group, tile.rows), min(tile.idle, tile.rows)
        return replace(tile, chunk=max(tile.chunk, tile.rows), group=group, idle=idle)
    return tile


def candidates(case: Case) -> list[configs.Tile]:
    """List the present tile, and after it what is one change away and the kernels accept."""
    present = configs.entry(capability(), case.table, case.width)
    found = [present]
    for name, value in asdict(present).items():
        others: tuple[int | None, ...] = (value // 2, 2 * value) if value else ()
        if name == "registers":
            others = REGISTERS
        elif name == "stages":
            others = (value - 1, value + 1)
        for other in others:
            tile = _fitted(case.table, replace(present, **{name: other}))
            if tile not in found and configs.fault(case.table, case.width, tile) is None:
                found.append(tile)
    return found


@contextlib.contextmanager
def in_place(case: Case, tile: configs.Tile) -> Iterator[None]:
    """Let the kernels take a tile instead of the frozen one."""
    with mock.patch.dict(configs.frozen(), {(capability(), case.table, case.width): tile}):
        yield


def steps(
    shapes: Sequence[tuple[int, int]], rank: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[Adapters, torch.optim.Optimizer]:
    """Take some steps of a model of adapters; returns it and its optimizer."""
    model = Adapters(shapes, rank, DEVICE, dtype=dtype)
    opt = CONTENDERS["triton"].make(model)
    for _ in range(count):
        model.new_gradients()
        opt.step()
    return model, opt


def stage_ms(case: Case, tile: configs.Tile, args: argparse.Namespace) -> float:
    """Return the milliseconds of a stage's kernels in a step, added up over the case's ranks."""
    total = 0.0
    for rank in case.ranks:
        with in_place(case, tile):
            model, opt = steps(SHAPE_SETS[args.shapes].pairs(args.layers), rank, args.warmup)
            _, times = timing.kernels(opt.step, model.new_gradients, args.steps)
        del model, opt
        clear()
        spent = [ms for kernel, ms in times.items() if stage_of(kernel) in KERNELS[case.stage]]
        if not spent:
            raise RuntimeError(f"no kernel of {case.stage} ran: {sorted(times)}")
        total += sum(spent) / args.steps
    return total


def try_out(text: str, shapes: str) -> None:
    """Take a step of each phase with a candidate, in a process of its own; see `tried_out`."""
    told = json.loads(text)
    fields = told.pop("tile")
    case = Case(**told)
    with in_place(case, configs.TABLES[case.table][0](**fields)):
        for rank in case.ranks:
            steps(SHAPE_SETS[shapes].pairs(1), rank, 2)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tried_out(case: Case, tile: configs.Tile, args: argparse.Namespace) -> str | None:
    """Let another process compile and run a candidate; returns what went wrong there, or None."""
    told = json.dumps({**asdict(case), "tile": asdict(tile)})
    words = [sys.executable, "-m", "bench", "tiles", "--shapes", args.shapes, "--try-out", told]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            words, cwd=root, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {PATIENCE} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def agreement(case: Case, tile: configs.Tile, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Hold a tile against fp64 at the ends of what it serves, in both precisions.

    Half-precision adapters compile other kernels; they have to run.
    """
    contender = CONTENDERS["triton"]
    exact = replace(contender, make=lambda m: lk.LoFTAdamW(m, backend="triton", precision="ieee"))
    served = configs.served_ranks(case.table, case.width)
    errors: list[float] = []
    with in_place(case, tile):
        for rank in sorted({served[0], served[-1]}):
            errors += (parity(c, shapes, rank, DEVICE) for c in (contender, exact))
            clear()
            steps(shapes, rank, 2, torch.bfloat16)
    row: dict[str, Any] = {"parity_error": max(errors), "parity_limit": contender.limit}
    # NaN is larger than nothing.
    if not all(error <= contender.limit for error in errors):
        row["error"] = f"parity above {contender.limit}: {errors}"
    return row


def sweep(
    case: Case,
    tiles: Sequence[configs.Tile],
    broken: Sequence[str | None],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time the candidates of a case; what fails is a row that says so. The present one is first."""
    rows = []
    for tile, error in progress(
        list(zip(tiles, broken, strict=True)), f"{case.table} {case.width}"
    ):
        row: dict[str, Any] = {**asdict(case), "tile": asdict(tile), "present": not rows}
        try:
            row |= {"error": error} if error else {"ms": stage_ms(case, tile, args)}
        except Exception as fault:
            row |= failure(fault)
        clear()
        rows.append(row)
    return rows


def choose(
    case: Case,
    tiles: Sequence[configs.Tile],
    rows: list[dict[str, Any]],
    args: argparse.Namespace,
) -> configs.Tile | None:
    """Return the fastest tile that beats the present one beyond noise and agrees with fp64.

    Args:
        case: what was swept.
        tiles: its candidates, the present one first.
        rows: theirs; those that are looked at more closely get more fields.
        args: options of the sweep.
    """
    kept = 1 - NOISE
    before = rows[0].get("ms", float("inf"))
    timed = [pair for pair in zip(rows, tiles, strict=True) if "ms" in pair[0]]
    for row, tile in sorted(timed, key=lambda pair: pair[0]["ms"]):
        if not row["ms"] < kept * before:
            return None
        try:
            # The smallest of many times is small by luck, too: both are taken again.
            if "ms" in rows[0]:
                row["again_ms"] = [stage_ms(case, x, args) for x in (tile, tiles[0])]
                if not row["again_ms"][0] < kept * row["again_ms"][1]:
                    continue
            row |= agreement(case, tile, sorted(set(SHAPE_SETS[args.shapes].pairs(1))))
        except Exception as fault:
            row |= failure(fault)
        clear()
        if not row.keys() & {"error", "skipped"}:
            row["chosen"] = True
            return tile
    return None


def lines_of(case: Case, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Set a case's rows out as a table, the fastest first and failures last."""
    ranks = ",".join(map(str, case.ranks))
    yield f"{case.table}, padded rank {case.width}: {case.stage} of ranks {ranks}, ms"
    for row in sorted(rows, key=lambda row: row.get("ms", float("inf"))):
        time = f"{row['ms']:9.4f}" if "ms" in row else "        -"
        tile = " ".join(f"{name}={value}" for name, value in row["tile"].items())
        notes = [name for name in ("present", "chosen") if row.get(name)]
        notes += [row[name] for name in ("error", "skipped") if name in row]
        yield "  ".join([time, tile, *notes])


def measure(
    case: Case,
    tiles: Sequence[configs.Tile],
    broken: Sequence[str | None],
    args: argparse.Namespace,
) -> bool:
    """Sweep a case, show and keep its rows, and write its winner; tells if the present one ran."""
    rows = sweep(case, tiles, broken, args)
    chosen = choose(case, tiles, rows, args)
    about = {
        "bench": "tiles",
        "command": args.command,
        "shapes": args.shapes,
        "layers": args.layers,
        "seed": 0,
        "steps": args.steps,
        "architecture": "{}.{}".format(*capability()),
        **environment(),
    }
    rows = [{**row, **about} for row in rows]
    print("\n".join(lines_of(case, rows)), flush=True)
    append(rows, args.out, show=False)
    if args.write and chosen is not None:
        tile_table.write(configs.PATH, capability(), case.table, case.width, chosen, about)
        print(f"written to {configs.PATH.name}", flush=True)
    return "ms" in rows[0]


def options() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=sorted(SHAPE_SETS), default="llama-7b")
    parser.add_argument("--layers", type=int, default=8, help="only this many layers of the set")
    parser.add_argument("--ranks", default="4,8,16,32,64", help="comma-separated")
    parser.add_argument("--stages", default=",".join(KERNELS), help="comma-separated")
    parser.add_argument("--steps", type=even, default=4, help="an even number")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile"
    )
    parser.add_argument("--write", action="store_true", help="winners into the frozen tables")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--try-out", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Sweep tiles; exits with 1 where a present entry does not run."""
    parser = options()
    args = parser.parse_args(argv)
    args.command = command("tiles", argv)
    if args.try_out:
        return try_out(args.try_out, args.shapes)
    ranks, stages = [int(text) for text in args.ranks.split(",")], args.stages.split(",")
    if not all(1 <= rank <= configs.MAX_RANK for rank in ranks):
        parser.error(f"--ranks: the tables serve 1 to {configs.MAX_RANK}")
    if unknown := set(stages) - KERNELS.keys():
        parser.error(f"--stages: {', '.join(sorted(unknown))} unknown, not of {', '.join(KERNELS)}")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m bench tiles: tiles are measured on a CUDA GPU, and none is here")
    cases = cases_of(stages, ranks)
    swept = [candidates(case) for case in cases]
    todo = [(case, tile) for case, tiles in zip(cases, swept, strict=True) for tile in tiles]
    with ThreadPoolExecutor(args.processes) as pool:
        running = [pool.submit(tried_out, case, tile, args) for case, tile in todo]
        results = iter([future.result() for future in progress(running, "compile")])
    ran = []
    for case, tiles in zip(cases, swept, strict=True):
        ran.append(measure(case, tiles, [next(results) for _ in tiles], args))
    sys.exit(int(not all(ran)))
