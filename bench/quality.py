"""Tables of accuracy: one step against fp64, and loss curves of two backends."""

from __future__ import annotations

from bench.rows import Row, grouped, newest, provenance
from bench.tables import number, table


def _cell_kind(row: Row) -> str:
    """Name what the bars of `bench accuracy` distinguish."""
    if row["condition"] > 1:
        return f"steady, condition number {row['condition']:.0e}"
    if row["history"] != "steady":
        return {
            "shock": "a gradient 1000 times the usual",
            "flip": "the mean changes its sign",
            "growth": "the mean grows by 5 % a step",
            "turns": "two directions take turns",
        }[row["history"]]
    return "steady, steps 1 and 2" if row["step"] <= 2 else "steady, from step 5 on"


def accuracy_rows(kinds: dict[str, list[Row]]) -> list[Row]:
    """Return the newest row of every cell."""
    keys = ("gpu", "backend", "m", "n", "rank", "dtype", "phase", "history", "noise", "step")
    return newest(
        kinds.get("accuracy", []),
        lambda row: (*(row[k] for k in keys), row["condition"], row["precision"]),
    )


def accuracy_sections(kinds: dict[str, list[Row]]) -> list[str]:
    """Write the largest error of every kind of history and rank, and every bar that is missed."""
    sections = []
    for (backend, precision), rows in grouped(
        accuracy_rows(kinds), lambda row: (row["backend"], row["precision"])
    ).items():
        ranks = sorted({row["rank"] for row in rows})
        lines = []
        for kind, members in grouped(rows, _cell_kind).items():
            worst = {
                r: max((row for row in members if row["rank"] == r), key=lambda row: row["error"])
                for r in ranks
                if any(row["rank"] == r for row in members)
            }
            bars = {row["bar"] for row in members}
            bar = number(bars.pop()) if len(bars) == 1 else "2 x eager + 1.2e-07"
            eager = max(row["eager"] for row in members)
            missed = sum(not row["ok"] for row in members)
            cells = [f"{worst[r]['error']:.1e}" if r in worst else "" for r in ranks]
            lines.append([kind, *cells, f"{eager:.1e}", bar, f"{missed} of {len(members)}"])
        head = ["largest error of the move", *(f"r={r}" for r in ranks)]
        head += ["plain fp32", "bar", "cells above it"]
        state = max(max(row["state_errors"].values()) for row in rows)
        parts = [
            f"### {backend}, precision {precision}",
            table(head, lines),
            f"Largest relative error of a state tensor: {state:.1e}.",
            provenance(rows),
        ]
        sections.append("\n\n".join(parts))
    return sections


def curve_rows(kinds: dict[str, list[Row]]) -> list[Row]:
    """Return the newest comparison of every setting."""
    return newest(
        kinds.get("curves", []),
        lambda row: (row["gpu"], row["rank"], row["precision"], row["steps"]),
    )


def curve_section(kinds: dict[str, list[Row]]) -> list[str]:
    """Write how far the loss curves of two backends part."""
    rows = curve_rows(kinds)
    if not rows:
        return []
    lines = []
    for row in rows:
        held = {name: curve["held_out"] for name, curve in row["curves"].items()}
        ends = "; ".join(f"{k} {v[0]:.4f} to {v[-1]:.4f}" for k, v in held.items())
        worst = row["worst_relative_difference"]
        lines.append(
            [
                f"r={row['rank']}, {row['steps']} steps, {row['precision']}",
                ends,
                f"{worst['train']:.1e}",
                f"{worst['held_out']:.1e}",
                number(row["limit"]),
                "yes" if row["ok"] else "**no**",
            ]
        )
    head = ["run", "held-out loss", "largest difference, train", "held out", "limit", "within"]
    return ["\n\n".join([table(head, lines), provenance(rows)])]
