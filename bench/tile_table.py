"""Write entries of the frozen tile tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loft_kernels.backends.triton import configs

# What an entry remembers of the machine it was measured on, of what a row says.
MEASURED = ("commit", "date", "gpu", "torch", "triton")


def _order(name: str) -> tuple[int, str]:
    """Sort padded ranks by their number, and names by theirs."""
    return (int(name) if name.isdigit() else 0, name)


def formatted(document: dict[str, Any], depth: int = 4, indent: str = "") -> str:
    """Return the text of a file of tables: sorted, a line for a tile and one for its origin."""
    if depth == 0:
        return json.dumps(document, sort_keys=True)
    inner = indent + "  "
    lines = [
        f"{inner}{json.dumps(name)}: {formatted(document[name], depth - 1, inner)}"
        for name in sorted(document, key=_order)
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" + ("" if indent else "\n")


def write(
    path: Path,
    capability: configs.Capability,
    table: str,
    width: int,
    tile: configs.Tile,
    row: dict[str, Any],
) -> None:
    """Enter a tile into a file of tables, which is checked before it is replaced.

    Args:
        path: the file.
        capability: of the GPU that the tile was measured on.
        table: of the entry.
        width: padded rank of the entry.
        tile: what to enter.
        row: of the measurement; says on what and with what it was made.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    entries = document.setdefault("{}.{}".format(*capability), {}).setdefault(table, {})
    measured = {name: row[name] for name in MEASURED if row.get(name) is not None}
    entries[str(width)] = {"measured": measured, "tile": asdict(tile)}
    configs.parse(document)
    # Replaced at once: a step may read the file at any time.
    beside = path.with_suffix(".new")
    beside.write_text(formatted(document), encoding="utf-8")
    beside.replace(path)
    configs.frozen.cache_clear()
