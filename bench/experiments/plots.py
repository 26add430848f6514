"""Figures of the experiments, from their JSON documents and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from bench.experiments import record
from bench.experiments.sections import FULL, average

DPI, HEIGHT, WIDTH = 100, 3.6, 4.6  # inches of one panel
# A method has its colour in every figure.
COLOURS = {
    "full AdamW": "black",
    "LoRA": "tab:orange",
    "DoRA": "tab:brown",
    "LoFT": "tab:blue",
    "LoFT simple": "tab:cyan",
    "LoFT, no alternation": "tab:green",
    "LoFT, no calibration": "tab:red",
    "exact C": "tab:blue",
    "averaged C": "tab:green",
    "diagonal of C": "tab:olive",
    "identity": "tab:red",
}
Axes = Any
Rows = Sequence[Mapping[str, Any]]


def height(values: Iterable[float | None]) -> float:
    """Average over seeds; a diverged run leaves a gap."""
    found = average(list(values))
    return nan if found is None else found


def mean_curve(rows: Rows) -> list[float]:
    """Average the curves of several seeds, point by point."""
    return [height(point) for point in zip(*(row["curve"] for row in rows), strict=True)]


def draw_curves(
    axes: Axes, study: Mapping[str, Any], rates: Mapping[str, float], unit: str
) -> None:
    """Draw every method's mean curve at a given rate."""
    for method, lr in rates.items():
        rows = [r for r in study["rows"] if r["method"] == method and r["lr"] == lr]
        label = f"{method}, lr {lr:g}"
        axes.plot(study["steps"], mean_curve(rows), color=COLOURS[method], label=label)
    axes.set(xlabel="step", ylabel=unit)


def draw_rates(axes: Axes, study: Mapping[str, Any], unit: str) -> None:
    """Draw what every method ends at against the learning rate, every seed a dot."""
    for summary in study["summary"]:
        method = summary["method"]
        rows = [row for row in study["rows"] if row["method"] == method]
        ends = [height(r["test"] for r in rows if r["lr"] == lr) for lr in study["grid"]]
        axes.plot(study["grid"], ends, color=COLOURS[method], label=method)
        seeds = [(row["lr"], row["test"]) for row in rows if row["test"] is not None]
        if seeds:
            axes.plot(*zip(*seeds, strict=True), ".", color=COLOURS[method], markersize=4)
    axes.set(xlabel="learning rate", ylabel=unit, xscale="log")


def best_rates(study: Mapping[str, Any]) -> dict[str, float]:
    """Map every method to its own best rate."""
    return {row["method"]: row["lr"] for row in study["summary"]}


def draw_factorisation(found: record.Document, axes: Sequence[Axes]) -> None:
    """Draw the curves at one rate, the ends at every rate, and the recovery of AdamW."""
    study, unit = found["studies"]["matrix"], "|W - T|² / |T|²"
    shared = dict.fromkeys(best_rates(study), found["settings"]["shown_lr"])
    draw_curves(axes[0], study, shared, unit)
    draw_rates(axes[1], study, f"{unit} at the end")
    for each in axes[:2]:
        each.set_yscale("log")
    for row in found["recovery"]:
        steps = range(1, len(row["distances"]) + 1)
        axes[2].plot(steps, row["distances"], label=row["arithmetic"])
    axes[2].set(xlabel="step", ylabel="distance to AdamW, m = n = r", yscale="log")


def draw_studies(unit: str) -> Callable[[record.Document, Sequence[Axes]], None]:
    """Return what draws the panels of every study.

    Curves at full AdamW's best rate where the study has it, curves at each method's own best rate,
    and ends at every rate.
    """

    def draw(found: record.Document, axes: Sequence[Axes]) -> None:
        left = iter(axes)
        for name, study in found["studies"].items():
            what = "|W - T|² / |T|²" if name == "matrix" else unit
            rates = best_rates(study)
            if FULL in rates:
                draw_curves(next(left), study, dict.fromkeys(rates, rates[FULL]), what)
            draw_curves(next(left), study, rates, what)
            last = next(left)
            draw_rates(last, study, f"{what} at the end" if name == "matrix" else "test loss")
            if name == "matrix":
                last.set_yscale("log")

    return draw


def draw_cross_term(found: record.Document, axes: Sequence[Axes]) -> None:
    """Draw the share of the cross term and the losses of both ways against the rate."""
    for start, colour in (("B = 0", "tab:blue"), ("B drawn", "tab:orange")):
        rows = [row for row in found["summary"] if row["start"] == start]
        rates = [row["lr"] for row in rows]
        for place, key, style, label in (
            (0, "share", "o-", "median step"),
            (0, "largest_share", "o:", "largest step"),
            (1, "simultaneous", "o-", "simultaneous"),
            (1, "alternating", "s--", "alternating"),
        ):
            values = [height([row[key]]) for row in rows]
            axes[place].plot(rates, values, style, color=colour, label=f"{start}, {label}")
    axes[0].set(ylabel="|dB dA| / |dB A + B dA|")
    axes[1].set(ylabel="|W - T|² / |T|² at the end")
    for each in axes:
        each.set(xlabel="learning rate", xscale="log", yscale="log")


def draw_memory(found: record.Document, axes: Sequence[Axes]) -> None:
    """Draw loss and closeness to full AdamW against the optimizer's bytes."""
    for method in dict.fromkeys(row["method"] for row in found["summary"]):
        rows = sorted(
            (row for row in found["summary"] if row["method"] == method), key=lambda r: r["rank"]
        )
        size = [row["state_bytes"] / 2**20 for row in rows]
        style = {"color": COLOURS[method], "label": method}
        axes[0].plot(size, [row["own_loss"] for row in rows], "o-", **style)
        if not rows[0]["rank"]:
            continue
        distances = [
            height(
                r["distance"]
                for r in found["rows"]
                if (r["method"], r["rank"]) == (method, row["rank"])
            )
            for row in rows
        ]
        axes[1].plot(size, distances, "o-", **style)
        for row, place in zip(rows, zip(size, distances, strict=True), strict=True):
            axes[1].annotate(f"r={row['rank']}", place, fontsize=7)
    axes[0].set(ylabel="|W - T|² / |T|² at the best rate", yscale="log")
    axes[1].set(ylabel="distance to full AdamW at equal rates")
    for each in axes:
        each.set(xlabel="optimizer state, MiB", xscale="log")


def draw_same_curves(found: record.Document, axes: Sequence[Axes]) -> None:
    """Draw the curves of every backend, and how far they part."""
    for row in found["rows"]:
        truth, *others = row["curves"].values()
        (line,) = axes[0].plot(row["steps"], truth, label=row["experiment"])
        for curve in others:
            axes[0].plot(row["steps"], curve, "--", color="black", linewidth=0.8)
            apart = [abs(a - b) / abs(b) for a, b in zip(curve, truth, strict=True)]
            axes[1].plot(row["steps"], apart, color=line.get_color(), label=row["experiment"])
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[1].axhline(found["rows"][0]["limit"], color="black", linestyle=":", label="limit")
    axes[1].set(xlabel="step", ylabel="relative difference of the losses", yscale="log")


# Name of the experiment: how many panels, and what draws them.
DRAWN: dict[str, tuple[int, Callable[[record.Document, Sequence[Axes]], None]]] = {
    "factorisation": (3, draw_factorisation),
    "text": (3, draw_studies("validation loss, nats per token")),
    "dynamics": (3, draw_studies("training loss")),
    "calibration": (5, draw_studies("validation loss, nats per token")),
    "cross-term": (2, draw_cross_term),
    "memory": (2, draw_memory),
    "same-curves": (2, draw_same_curves),
}


def draw_one(found: record.Document, path: Path) -> None:
    """Draw the figure of a document; equal documents give equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    panels, draw = DRAWN[record.kind(found)]
    across = min(panels, 3)
    down = -(-panels // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(WIDTH * across, HEIGHT * down), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    draw(found, flat)
    for each in flat[panels:]:
        each.set_axis_off()
    for each in flat[:panels]:
        each.grid(alpha=0.3)
        each.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, metadata={"Software": None})
    # Lines and letters need few colours, and a third of the bytes.
    Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path)
    pyplot.close(figure)


def draw_all(results: Path = record.RESULTS, figures: Path = record.FIGURES) -> list[Path]:
    """Draw one figure per experiment, from its largest document."""
    drawn = []
    for name, found in record.preferred(results).items():
        drawn.append(figures / f"{name}.png")
        draw_one(found, drawn[-1])
    return drawn
