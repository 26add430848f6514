"""Methods compared fairly: the same learning rates, several seeds, and intervals around means."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.experiments.jobs import Workers

# Student's t for an interval of 95 %, by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate with a seed."""

    method: str
    lr: float
    seed: int


def study(
    train: Callable[[Run], Mapping[str, Any]],
    methods: Sequence[str],
    settings: Mapping[str, Any],
    workers: int,
    title: str,
) -> dict[str, Any]:
    """Train every method at every learning rate of one grid with every seed.

    Where a method's best rate is the first or last of the grid, the grid grows there by its own
    ratio, for all methods alike.

    Args:
        train: returns of a run "steps" and "curve", "validation" (what the learning rate is chosen
            by) and "test" (what is reported); anything else is kept with the row.
        methods: to compare.
        settings: "grid" of learning rates, number of "seeds", "extensions" of the grid at each end.
        workers: processes.
        title: of the progress bar.

    Returns:
        "steps" of the curves, "grid" as it ended, "rows" (one per run), "summary" (one per method)
        and "claims".
    """
    grid = sorted(settings["grid"])
    rows: list[dict[str, Any]] = []
    steps: list[int] = []
    pending, left = grid, {0: settings["extensions"], -1: settings["extensions"]}
    seeds = range(settings["seeds"])
    with Workers(workers) as side_by_side:
        while pending:
            runs = [Run(m, lr, seed) for lr in pending for m in methods for seed in seeds]
            outcomes = side_by_side.run(train, runs, title)
            for run, outcome in zip(runs, outcomes, strict=True):
                kept = dict(outcome)
                steps = kept.pop("steps")
                rows.append(asdict(run) | kept)
            pending = _beyond(rows, grid, left)
            grid = sorted(grid + pending)
    summary = [summarise(rows, method, grid) for method in methods]
    return {
        "steps": steps,
        "grid": grid,
        "rows": rows,
        "summary": summary,
        "claims": claims(summary),
    }


def _beyond(
    rows: Sequence[Mapping[str, Any]], grid: Sequence[float], left: dict[int, int]
) -> list[float]:
    """List the rates to add, because some method is best at an end of the grid."""
    best = {best_rate(rows, method) for method in {row["method"] for row in rows}}
    ratio = grid[1] / grid[0] if len(grid) > 1 else 2.0
    added = []
    for end, rate in ((0, grid[0] / ratio), (-1, grid[-1] * ratio)):
        if left[end] > 0 and grid[end] in best:
            left[end] -= 1
            added.append(float(f"{rate:.3g}"))
    return added


def best_rate(rows: Sequence[Mapping[str, Any]], method: str) -> float:
    """Return the learning rate with the lowest mean validation loss over the seeds."""
    means: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            means.setdefault(row["lr"], []).append(row["validation"])
    return min(means, key=lambda lr: mean(means[lr]))


def mean(values: Sequence[float]) -> float:
    """Average; one diverged run makes the mean infinite."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def summarise(
    rows: Sequence[Mapping[str, Any]], method: str, grid: Sequence[float]
) -> dict[str, Any]:
    """Report a method at its best rate: mean test loss, sample deviation and 95 % interval."""
    lr = best_rate(rows, method)
    chosen = [row for row in rows if row["method"] == method and row["lr"] == lr]
    tests = [row["test"] for row in chosen]
    test, half, deviation = mean(tests), math.inf, math.inf
    if math.isfinite(test) and len(tests) > 1:
        deviation = statistics.stdev(tests)
        half = STUDENT[len(tests) - 2] * deviation / math.sqrt(len(tests))
    found = {
        "method": method,
        "lr": lr,
        "at_edge": lr in (grid[0], grid[-1]),
        "seeds": len(tests),
        "validation": mean([row["validation"] for row in chosen]),
        "test": test,
        "std": deviation,
        "low": test - half,
        "high": test + half,
    }
    for key in ("accuracy", "state_bytes", "trained"):
        if key in chosen[0]:
            found[key] = statistics.fmean(row[key] for row in chosen)
    return found


def claims(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the pairs of methods whose 95 % intervals do not meet, the better one first."""
    found = []
    for pair in itertools.combinations(summary, 2):
        better, worse = sorted(pair, key=lambda row: row["test"])
        if better["high"] < worse["low"]:
            found.append(
                f"{better['method']} ends below {worse['method']}: "
                f"{_interval(better)} against {_interval(worse)}"
            )
    return found


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['test']:.4g} ± {row['high'] - row['test']:.2g}"
