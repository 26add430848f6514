"""Hold one step of a backend against fp64, from the same fp32 state: errors and their bars.

    python -m bench accuracy --out bench/results/accuracy.jsonl
    python -m bench accuracy --device cpu --backend reference --shapes 40x56,33x20 --ranks 1,4

Every pair starts from a state in mid-training (see `histories.py`); four copies take one step: the
backend in default and in ieee precision, a plain fp32 evaluation of the formulas ("eager"), and the
fp64 reference. What counts is the change of the moving factor, seen in W, and every state tensor.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loft_kernels as lk
from bench.histories import BETAS, HISTORIES, History, guard_after, moments, partner_twice
from bench.record import environment, largest
from loft_kernels import reference as ref

SCALING = 0.5
# A long step: rounding X - lr * update to fp32 is no error of the update; fp16 still holds it.
LR, EPS = 1.0, 1e-8
EARLY_BAR, BAR, HARD_BAR, CONDITION_BAR = 3e-3, 3e-4, 2e-3, 1e-3
IEEE_FACTOR = 2.0  # times the eager error,
IEEE_FLOOR = 1.2e-7  # plus two roundings to fp32: the result's, and that of what it is made of
STATE_BAR = 5e-7  # a few roundings to fp32, relative in the Frobenius norm
COUNT_BAR = 1e-14

SHAPES = "4096x4096,4096x11008,11008x4096,1024x4096,768x3072,14336x4096,4096x14336,4096x128256"
RANKS = "1,4,8,16,32,64"
NOISES = 0.01, 0.1, 1.0
STEPS = 1, 2, 5, 200
HUGE = 1 << 28  # entries of W from which a shape gets fewer cells


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair under test.

    Attributes:
        phase: the factor that moves, "B" or "A".
        history: of both factors; counted for the one that moves.
        condition: of both factors as partners.
    """

    phase: str
    history: History
    condition: float = 1.0

    @property
    def bar(self) -> float:
        """The largest error allowed in default precision."""
        if self.history.kind != "steady":
            return HARD_BAR
        if self.history.steps <= 2:
            return EARLY_BAR
        return CONDITION_BAR if self.condition > 1 else BAR

    def steps(self, side: str) -> int:
        """Count a factor's steps, this one included: the pair's longer count fixes the phase."""
        own = self.history.steps
        other = own if (own - 1) % 2 == "BA".index(self.phase) else own + 1
        return own if side == self.phase else other


State = dict[str, Tensor]


class Pair(nn.Module):
    """A LoRA pair with gradients."""

    def __init__(self, b: Tensor, a: Tensor) -> None:
        """Take both factors as they are stored."""
        super().__init__()
        self.scaling = SCALING
        self.lora_B, self.lora_A = nn.Parameter(b), nn.Parameter(a)

    def side(self, side: str) -> nn.Parameter:
        """Return one factor."""
        return self.lora_B if side == "B" else self.lora_A

    def partner(self, side: str) -> Tensor:
        """Return a factor's partner, ``rows x r``."""
        return self.lora_A.detach().T if side == "B" else self.lora_B.detach()


@dataclass(frozen=True, slots=True)
class Start:
    """What every copy of a group of pairs starts from: parameters, gradients, states by side."""

    pairs: list[Pair]
    states: list[dict[str, State]]


def draw_pair(
    cell: Cell, m: int, n: int, rank: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Pair, dict[str, State]]:
    """Draw a pair in mid-training: the mover's partner has just moved, the other one has not."""
    rows = {"B": m, "A": n}
    before, now = {}, {}
    for side, size in rows.items():
        before[side], after = partner_twice(size, rank, cell.condition, rng)
        now[side] = (before[side] if side == cell.phase else after).to(dtype)
    pair = Pair(now["B"], now["A"].T.contiguous())
    states: dict[str, State] = {}
    for side, other in (("B", "A"), ("A", "B")):
        history = replace(cell.history, steps=cell.steps(side))
        old, new = ref.orthonormal_bases([before[other], now[other]], [0.0, 0.0])
        exp_avg, second_moment, g = moments(history, rows[side], rank, rng)
        # In the basis of the partner as it is now: grad = s G Y = s g L^T.
        grad = SCALING * (g @ (old.q.T @ new.q)) @ new.chol.T
        pair.side(side).grad = (grad if side == "B" else grad.T).to(dtype).contiguous()
        done = history.steps - 1
        states[side] = {
            "step": torch.tensor(done, device=rng.device),
            "exp_avg": exp_avg.float(),
            "second_moment": second_moment.float(),
            "partner_basis": (old.q * (done > 0)).float(),
            "guard": torch.tensor(guard_after(done), dtype=torch.float64, device=rng.device),
        }
        if dtype != torch.float32:
            states[side]["master"] = rows_of(pair.side(side), side).float().contiguous()
    return pair, states


def rows_of(factor: Tensor, side: str) -> Tensor:
    """Return a factor, as it is stored, as ``rows x r``."""
    return factor.detach().T if side == "A" else factor.detach()


def take_step(start: Start, backend: str, precision: str, *, exact: bool = False) -> Start:
    """Take one step of a copy through the public optimizer; in fp64 if exact."""
    pairs = copy.deepcopy(start.pairs)
    for before, pair in zip(start.pairs, pairs, strict=True):
        for p, q in zip(before.parameters(), pair.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        if exact:
            pair.double()
    opt = lk.LoFTAdamW(
        nn.ModuleList(pairs), lr=LR, betas=BETAS, eps=EPS, backend=backend, precision=precision
    )
    for pair, states in zip(pairs, start.states, strict=True):
        for side, state in states.items():
            for key, value in state.items():
                if exact and key == "master":
                    continue
                wide = exact and value.dtype == torch.float32
                opt.state[pair.side(side)][key] = value.to(
                    torch.float64 if wide else value.dtype, copy=True
                )
    opt.step()
    if int(opt.nonfinite_steps):
        raise RuntimeError(f"the {backend} backend skipped the step")
    ends = [{side: dict(opt.state[p.side(side)]) for side in "BA"} for p in pairs]
    return Start(pairs, ends)


def eager_change(pair: Pair, state: State, side: str) -> Tensor:
    """Evaluate the formulas for a factor's change in fp32 as they stand, ``rows x r``.

    The m x n part is plain fp32, v = Q_j P_i Q_j^T with the guard; no early or centred form.
    """
    grad = pair.side(side).grad
    assert grad is not None
    basis = ref.orthonormal_bases([pair.partner(side)], [0.0])[0]
    g = ref.scaled_gradient(rows_of(grad, side), basis, SCALING).float()
    c = ref.transition(state["partner_basis"], basis.q).float()
    rank, done = g.shape[1], int(state["step"])
    m = BETAS[0] * (state["exp_avg"] @ c) + (1 - BETAS[0]) * g
    q = basis.q.float()
    products = ref.khatri_rao_square(q).T
    bias1, bias2 = (ref.bias_correction(beta, done + 1) for beta in BETAS)
    bound = guard_after(done + 1) * bias2 / bias1**2
    i, j = torch.triu_indices(rank, rank, device=g.device)
    projected = torch.empty_like(m)
    for rows in torch.arange(len(m), device=g.device).split(max(1, (1 << 26) // len(q))):
        old = ref.unpack_symmetric(state["second_moment"][rows], rank)
        packed = BETAS[1] * ref.pack_symmetric(c.T @ old @ c)
        packed += (1 - BETAS[1]) * g[rows][:, i] * g[rows][:, j]
        first = (m[rows] / bias1) @ q.T
        v = torch.maximum((packed / bias2) @ products, first.square() / bound)
        projected[rows] = (first / (v.sqrt() + EPS)) @ q
    before = rows_of(pair.side(side), side).double()
    direction = projected.double() @ basis.chol_inv
    return (before - LR / SCALING * direction).float().double() - before


def change_of(start: Start, end: Start, k: int, side: str) -> Tensor:
    """Return how far a factor has moved, ``rows x r`` fp64; by its master where it has one."""
    factor = rows_of(end.pairs[k].side(side), side)
    stored = end.states[k][side].get("master", factor)
    return stored.double() - rows_of(start.pairs[k].side(side), side).double()


def error_in_w(change: Tensor, exact: Tensor, partner: Tensor) -> float:
    """Return the relative error of a change of a factor, seen in W: the metric is Y^T Y."""
    gram = ref.gram(partner)

    def squared(x: Tensor) -> float:
        return float(((x @ gram) * x).sum())

    return (squared(change - exact) / squared(exact)) ** 0.5


def state_errors(end: Start, exact: Start, k: int) -> dict[str, float]:
    """Return the largest relative error of every state tensor over both sides of a pair."""
    errors: dict[str, float] = {}
    for side, truth in exact.states[k].items():
        state = end.states[k][side]
        if state.keys() - {"master"} != truth.keys():
            raise RuntimeError(f"state of {side} holds {sorted(state)}, not {sorted(truth)}")
        for key, value in truth.items():
            size = float(value.double().norm())
            error = float((state[key].double() - value.double()).norm())
            errors[key] = largest((errors.get(key, 0.0), error / size if size > 0 else error))
        if "master" in state:
            factor = rows_of(end.pairs[k].side(side), side)
            apart = (factor != state["master"].to(factor.dtype)).sum()
            errors["master_not_rounded"] = max(errors.get("master_not_rounded", 0.0), float(apart))
    return errors


def verdict(row: dict[str, Any]) -> bool:
    """Tell whether a row stays below its bars."""
    within = all(
        value <= (COUNT_BAR if key in ("step", "guard", "master_not_rounded") else STATE_BAR)
        for key, value in row["state_errors"].items()
    )
    return within and row["error"] <= row["bar"] and row["idle_moved"] == 0.0


def measure(
    cells: list[Cell], m: int, n: int, rank: int, dtype: torch.dtype, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Let all cells of one shape, rank, dtype and phase take their step together."""
    seed = zlib.crc32(f"{m} {n} {rank} {dtype} {cells[0].phase}".encode())
    rng = torch.Generator(args.device).manual_seed(seed)
    drawn = [draw_pair(cell, m, n, rank, dtype, rng) for cell in cells]
    start = Start([pair for pair, _ in drawn], [states for _, states in drawn])
    exact = take_step(start, "reference", "default", exact=True)
    truths = [change_of(start, exact, k, cell.phase) for k, cell in enumerate(cells)]
    eagers = [
        error_in_w(
            eager_change(pair, states[cell.phase], cell.phase), truth, pair.partner(cell.phase)
        )
        for pair, states, cell, truth in zip(start.pairs, start.states, cells, truths, strict=True)
    ]
    for precision in ("default", "ieee"):
        end = take_step(start, args.backend, precision)
        for k, cell in enumerate(cells):
            side, truth, eager = cell.phase, truths[k], eagers[k]
            partner = start.pairs[k].partner(side)
            bar = cell.bar if precision == "default" else IEEE_FACTOR * eager + IEEE_FLOOR
            row: dict[str, Any] = {
                "m": m,
                "n": n,
                "rank": rank,
                "dtype": str(dtype).removeprefix("torch."),
                "phase": side,
                "history": cell.history.kind,
                "noise": cell.history.noise,
                "step": cell.history.steps,
                "condition": cell.condition,
                "precision": precision,
                "error": error_in_w(change_of(start, end, k, side), truth, partner),
                "eager": eager,
                "bar": bar,
                "idle_moved": float(change_of(start, end, k, "AB"["AB".index(side) - 1]).norm()),
                "state_errors": state_errors(end, exact, k),
                "seed": seed,
            }
            yield row | {"ok": verdict(row)}


def cells_of(phase: str, *, huge: bool) -> list[Cell]:
    """List the cells of one shape; a huge one gets the corners of the grid only."""
    noises, steps = (NOISES[::2], STEPS[::3]) if huge else (NOISES, STEPS)
    cells = [Cell(phase, History("steady", noise, step)) for noise in noises for step in steps]
    if not huge:
        cells += [Cell(phase, History(kind, 0.01, 200)) for kind in HISTORIES if kind != "steady"]
        cells += [Cell(phase, History("steady", 0.1, step), 1e4) for step in (5, 200)]
    return cells


def groups(args: argparse.Namespace) -> Iterator[tuple[list[Cell], int, int, int, torch.dtype]]:
    """List what is measured together: by shape, rank, dtype and phase."""
    shapes = [tuple(int(size) for size in text.split("x")) for text in args.shapes.split(",")]
    half = torch.bfloat16, torch.float16
    for rank in (int(text) for text in args.ranks.split(",")):
        for k, (m, n) in enumerate(shapes):
            for dtype in (torch.float32, *half) if k == 0 else (torch.float32,):
                for phase in "BA":
                    yield cells_of(phase, huge=m * n >= HUGE), m, n, rank, dtype


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Lay out the largest errors by what the bars distinguish, over shapes, phases and dtypes."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kind = row["history"] if row["condition"] == 1 else f"cond {row['condition']:.0e}"
        kinds.setdefault((row["rank"], kind, row["noise"], row["step"]), []).append(row)
    lines = [
        f"{'rank':>4} {'history':>9} {'noise':>5} {'step':>4} {'cells':>5} {'default':>8} "
        f"{'bar':>7} {'eager':>8} {'ieee':>8} {'ieee/eager':>10} {'state':>8}  failed"
    ]
    for (rank, kind, noise, step), members in sorted(kinds.items()):
        default = [r for r in members if r["precision"] == "default"]
        ieee = [r for r in members if r["precision"] == "ieee"]
        state = max(max(r["state_errors"].values()) for r in members)
        failed = sum(not r["ok"] for r in members)
        lines.append(
            f"{rank:4} {kind:>9} {noise:5} {step:4} {len(members):5} "
            f"{max(r['error'] for r in default):8.1e} {default[0]['bar']:7.0e} "
            f"{max(r['eager'] for r in members):8.1e} {max(r['error'] for r in ieee):8.1e} "
            f"{max(r['error'] / r['eager'] for r in ieee):10.2f} {state:8.1e}  {failed or ''}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, write one JSON line a row, print the table; exit with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", default=SHAPES, help="m x n of the weights, comma-separated")
    parser.add_argument("--ranks", default=RANKS, help="comma-separated")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="only print the table of these rows"
    )
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    if args.table:
        rows = [json.loads(line) for file in args.table for line in file.open()]
    else:
        rows = run(args)
    print(table(rows))
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} rows, {failed} above a bar")
    sys.exit(1 if failed or not rows else 0)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all groups, with progress on stderr."""
    # A backend that hands its work to another one must not be praised for it.
    warnings.filterwarnings("error", message="the LoFT step runs on the reference path")
    rows: list[dict[str, Any]] = []
    todo, begin = list(groups(args)), time.perf_counter()
    about = {"backend": args.backend, "device": args.device, **environment()}
    for k, (cells, m, n, rank, dtype) in enumerate(todo, start=1):
        found = [row | about for row in measure(cells, m, n, rank, dtype, args)]
        rows += found
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
        failed = sum(not row["ok"] for row in found)
        print(
            f"[{k}/{len(todo)}, {time.perf_counter() - begin:.0f} s] r={rank} {m}x{n} {dtype} "
            f"{cells[0].phase} moves: {len(found)} rows, {failed} above a bar",
            file=sys.stderr,
        )
    return rows
