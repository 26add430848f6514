"""Plots of what was measured; made from the result files, never while measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.quality import accuracy_rows, curve_rows
from bench.rows import Row, grouped, machine, newest
from bench.tables import by_rank, label, run_rows
from bench.work import STAGES

Kinds = dict[str, list[Row]]

# File name to the sentence below the figure.
CAPTIONS = {
    "speed.png": "Whole steps, host work included, by rank.",
    "stages.png": "Where the time of a step of the Triton backend goes.",
    "curves.png": "Loss of one run with two backends, and how far they part.",
    "accuracy.png": "Error of one step from the same state, against fp64; the bars are the limits.",
}


def available(kinds: Kinds) -> list[str]:
    """List the figures that the rows are enough for."""
    found = {
        "speed.png": bool(_speed_groups(kinds)),
        "stages.png": bool(_stage_rows(kinds)),
        "curves.png": bool(curve_rows(kinds)),
        "accuracy.png": bool(accuracy_rows(kinds)),
    }
    return [name for name in CAPTIONS if found[name]]


def draw(kinds: Kinds, folder: Path) -> list[Path]:
    """Draw every figure that the rows are enough for; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawn = {
        "speed.png": _draw_speed,
        "stages.png": _draw_stages,
        "curves.png": _draw_curves,
        "accuracy.png": _draw_accuracy,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in available(kinds):
        figure = drawn[name](pyplot, kinds)
        files.append(folder / name)
        # No version and no date, so that the same rows give the same file.
        figure.savefig(files[-1], dpi=80, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return files


def _speed_groups(kinds: Kinds) -> dict[tuple[str, str], list[Row]]:
    """Return the shape sets with more than one rank timed on a GPU."""
    return {
        key: rows
        for key, rows in run_rows(kinds).items()
        if rows[0].get("gpu") and len({row["rank"] for row in rows if "ms" in row}) > 1
    }


def _draw_speed(pyplot: Any, kinds: Kinds) -> Any:
    """Draw step times over ranks, one panel per shape set."""
    groups = _speed_groups(kinds)
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(1 + 3.6 * across, 3.6 * down), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis, ((where, shapes), rows) in zip(axes.flat, groups.items(), strict=False):
        for found in by_rank(rows).values():
            timed = {r: row["ms"]["mean"] for r, row in sorted(found.items()) if "ms" in row}
            name = label(next(iter(found.values()))).split(" (")[0]
            if timed:
                # One colour per optimizer in all panels, whichever of them a panel has.
                colour = f"C{list(handles).index(name) if name in handles else len(handles)}"
                (handles[name],) = axis.plot(timed.keys(), timed.values(), marker="o", color=colour)
        axis.set(title=f"{shapes}, {where}", xlabel="rank", xscale="log", yscale="log")
        ranks = sorted({row["rank"] for row in rows})
        axis.set_xticks(ranks, [str(r) for r in ranks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("ms per step")
    figure.tight_layout()
    figure.legend(
        handles.values(),
        handles.keys(),
        fontsize=7,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=2,
    )
    return figure


def _stage_rows(kinds: Kinds) -> list[Row]:
    """Return the stages of the largest LLaMA-like set that was measured whole, by rank."""
    rows = newest(
        (row for row in kinds.get("roofline", []) if row.get("stages") and not row["layers"]),
        lambda row: (machine(row), row["shapes"], row["rank"]),
    )
    groups = grouped(rows, lambda row: (machine(row), row["shapes"]))
    members = max(groups.values(), key=len, default=[])
    return sorted(members, key=lambda row: row["rank"])


def _draw_stages(pyplot: Any, kinds: Kinds) -> Any:
    """Draw each rank's time as a bar of stages, as shares of the whole."""
    rows = _stage_rows(kinds)
    figure, axis = pyplot.subplots(figsize=(6, 4))
    places = range(len(rows))
    base = [0.0] * len(rows)
    for stage in (*STAGES, "other"):
        heights = [
            100 * row["stages"].get(stage, {"ms": 0.0})["ms"] / row["kernel_ms"] for row in rows
        ]
        axis.bar(places, heights, bottom=base, label=stage)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    labels = [f"r={row['rank']}\n{row['kernel_ms']:.1f} ms" for row in rows]
    axis.set_xticks(places, labels)
    axis.set(ylabel="% of the kernels' time", title=f"{rows[0]['shapes']}, {machine(rows[0])}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_curves(pyplot: Any, kinds: Kinds) -> Any:
    """Draw the newest comparison of loss curves."""
    row = curve_rows(kinds)[-1]
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(6, 5), sharex=True, height_ratios=(2, 1)
    )
    names = list(row["curves"])
    for name, style in zip(names, ("-", "--", ":", "-."), strict=False):
        losses = row["curves"][name]["train"]
        above.plot(range(1, len(losses) + 1), losses, style, label=name, linewidth=1)
    truth = row["curves"][names[0]]["train"]
    for name in names[1:]:
        losses = row["curves"][name]["train"]
        apart = [abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True)]
        below.plot(range(1, len(apart) + 1), apart, linewidth=1, label=f"{name} - {names[0]}")
    below.axhline(row["limit"], color="black", linewidth=0.8, linestyle=":")
    above.set(ylabel="training loss", title=f"r={row['rank']}, {machine(row)}")
    below.set(ylabel="relative difference", xlabel="step", yscale="log")
    above.legend(fontsize=7)
    return figure


def _draw_accuracy(pyplot: Any, kinds: Kinds) -> Any:
    """Draw the spread of errors by rank in default precision, with the bars that apply."""
    rows = [row for row in accuracy_rows(kinds) if row["precision"] == "default"]
    rows = [row for row in rows if row["condition"] == 1]
    ranks = sorted({row["rank"] for row in rows})
    figure, axis = pyplot.subplots(figsize=(6, 4))
    kinds_of_rows = {
        "steady, from step 5 on": lambda row: row["history"] == "steady" and row["step"] > 2,
        "steady, steps 1 and 2": lambda row: row["history"] == "steady" and row["step"] <= 2,
        "other histories": lambda row: row["history"] != "steady",
    }
    for k, (name, belongs) in enumerate(kinds_of_rows.items()):
        members = [row for row in rows if belongs(row)]
        places = [ranks.index(row["rank"]) + 0.25 * (k - 1) for row in members]
        dots = axis.plot(places, [row["error"] for row in members], ".", label=name, markersize=3)
        bar = max(row["bar"] for row in members)
        axis.axhline(bar, color=dots[0].get_color(), linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(ranks)), [f"r={r}" for r in ranks])
    axis.set(ylabel="relative error of the move, seen in W", yscale="log")
    axis.legend(fontsize=7)
    return figure
