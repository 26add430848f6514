"""Rows of measurements: read from the result files, and the newest of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def kind_of(row: Row) -> str:
    """Name the command that wrote a row; older rows do not say it."""
    if "bench" in row:
        return str(row["bench"])
    for key, kind in (("history", "accuracy"), ("curves", "curves"), ("median_ms", "host")):
        if key in row:
            return kind
    return "run"


def read(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """Read all rows by kind, oldest first; rows without a date are older than any with one."""
    rows: list[Row] = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            rows.append({**json.loads(line), "file": file.name})
    rows.sort(key=lambda row: row.get("date") or "")
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row), []).append(row)
    return kinds


def newest(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """Keep the last row of every key, in the order in which keys first appear."""
    found: dict[Hashable, Row] = {}
    for row in rows:
        found[key(row)] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Sort rows into groups, in the order in which keys first appear."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def machine(row: Row) -> str:
    """Name what a row was measured on."""
    if row.get("gpu"):
        return f"one {row['gpu']}"
    return f"a CPU ({row.get('threads')} threads, {row.get('cpu_capability', 'unknown')})"


def command_of(row: Row) -> str:
    """Return the command of a row; of older rows, what their fields say it was."""
    if "command" in row:
        return str(row["command"])
    kind = kind_of(row)
    keys = {"run": ("shapes", "ranks", "backends", "steps"), "curves": ("steps", "rank")}
    values = {**row, "ranks": row.get("rank"), "backends": row.get("backend")}
    words = [f"--{key} {values[key]}" for key in keys.get(kind, ())]
    return " ".join(["python -m bench", kind, *words])


def provenance(rows: Iterable[Row]) -> str:
    """Say by which commands, at which commits and with which versions rows were measured."""
    rows = list(rows)
    commits = sorted({str(row["commit"]) + ("+" if row.get("dirty") else "") for row in rows})
    torches = sorted({str(row["torch"]) for row in rows})
    drivers = sorted({str(row["driver"]) for row in rows if row.get("driver")})
    files = sorted({row["file"] for row in rows})
    parts = [
        f"Measured on {' and '.join(sorted({machine(row) for row in rows}))}",
        f"commit {', '.join(commits)}",
        f"torch {', '.join(torches)}",
        *([f"driver {', '.join(drivers)}"] if drivers else []),
    ]
    commands = "; ".join(f"`{text}`" for text in _commands(rows))
    return f"{'; '.join(parts)}. Rows in {', '.join(f'`{f}`' for f in files)}, made by {commands}."


def _commands(rows: list[Row]) -> list[str]:
    """List the commands once; older rows that differ by rank only share one."""
    told = [command_of(row) for row in rows if "command" in row or kind_of(row) != "run"]
    old = [row for row in rows if "command" not in row and kind_of(row) == "run"]
    for members in grouped(old, lambda row: (row["shapes"], row["backend"], row["steps"])).values():
        ranks = ",".join(str(row["rank"]) for row in members)
        told.append(command_of({**members[0], "rank": ranks}))
    return list(dict.fromkeys(told))
