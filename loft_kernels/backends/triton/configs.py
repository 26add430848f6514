"""Tile sizes per architecture and rank: frozen, so that every rank of a job runs the same kernels.

The tables stand in ``tiles.json``, by compute capability, table and padded rank; ``python -m bench
tiles --write`` writes the entries of the GPU it runs on, each with what it was measured on. An
entry that an architecture does not have is that of ``default``, which no bench writes: its hot loop
is small enough for 99 KiB of shared memory, its other tiles are those of compute capability 9.0,
but for `moments` where that has kernels or fetches of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loft_kernels.backends.triton.packing import packing

# The largest rank that there are tiles for: a row of P has 32,896 entries there.
MAX_RANK = 256

# The largest square that a program of the row-wise kernels holds; wider ones are cut into blocks.
LARGEST_SQUARE = 64

# Entries of L that `solve` reads at a time where it works in memory.
SOLVE_ENTRIES = 4096

# The workspace of a side is padded to a multiple of every block_m and block_n of the tables.
PADDED_ROWS = 128

# Bytes of shared memory that a program of compute capability 9.0 can have, less its barriers.
_HOPPER_SHARED = 227 * 1024 - 1024

PATH = Path(__file__).with_name("tiles.json")

Capability = tuple[int, int]
HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class RowTile:
    """Tile of the row-wise kernels (gram, basis): rows of a program, rows at a time, warps."""

    chunk: int
    block: int
    warps: int


@dataclass(frozen=True, slots=True)
class UpdateTile:
    """Tile of the hot loop: rows, partner rows, warps, pipeline stages, registers a thread."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class MomentTile:
    """Tile of `moments`.

    Triton 3.6 cannot compile fp64 products of 64 rows for sm_100, where the backend asks for a
    newer one.

    Attributes:
        chunk: rows of a program.
        rows: rows of g and m at a time.
        group: rows of P at a time where the partner has changed; a power of two up to `rows`.
        idle: rows of P at a time where it has not; a power of two up to `rows`.
        columns: entries of a packed row at a time; up to rank 8 the whole row.
        warps: warps of a program.
        registers: limit per thread.
    """

    chunk: int
    rows: int
    group: int
    idle: int
    columns: int
    warps: int
    registers: int | None = None


Tile = RowTile | UpdateTile | MomentTile

# What an entry of each table is, and the padded ranks of the entries. `hopper` holds the tiles of
# `update_hopper`, whose registers leave room for four or three programs on a multiprocessor, and
# of `update_hopper_wide`, one of which fills the shared memory. `update_hopper_broad` has one tile.
TABLES: dict[str, tuple[type[Tile], tuple[int, ...]]] = {
    "update": (UpdateTile, (8, 16, 32, 64, 128, 256)),
    "hopper": (UpdateTile, (4, 8, 16, 32)),
    "rows": (RowTile, (16, 32, 64, 128, 256)),
    "moments": (MomentTile, (4, 8, 16, 32, 64, 128, 256)),
}

# fp32 operands take twice the shared memory.
EXACT_TILE = UpdateTile(64, 64, 4, 2)
EXACT_WIDE_TILE = UpdateTile(64, 32, 8, 1)

# The tile of `update_hopper_broad`: one program fills the registers and the shared memory.
BROAD_TILE = UpdateTile(128, 256, 8, 4)

# By capability (None for the defaults), table and padded rank.
Key = tuple[Capability | None, str, int]


def entry_rank(table: str, rank: int) -> int:
    """Return the padded rank whose entry of a table serves a rank."""
    return max(TABLES[table][1][0], 1 << (rank - 1).bit_length())


def served_ranks(table: str, width: int) -> range:
    """Return the ranks that the entry of a padded rank serves."""
    return range(1 if width == TABLES[table][1][0] else width // 2 + 1, width + 1)


def _rules(table: str, width: int, tile: Any) -> Iterable[tuple[bool, str]]:
    """List what the kernels ask of a tile beside powers of two, and whether it holds."""
    if table == "rows":
        yield tile.block >= 16, "block is at least 16"
        yield tile.chunk % tile.block == 0, "chunk is a multiple of block"
        return
    yield tile.registers is None or 24 <= tile.registers <= 255, "registers is null or 24 to 255"
    if table == "moments":
        yield tile.rows >= 16, "rows is at least 16"
        yield tile.chunk % tile.rows == 0, "chunk is a multiple of rows"
        yield max(tile.group, tile.idle) <= tile.rows, "group and idle are at most rows"
        yield tile.columns >= 16, "columns is at least 16"
        if width <= 8:
            yield tile.group >= 16, "group is at least 16 up to rank 8"
            yield tile.columns >= packing(width).packed, "columns holds a packed row up to rank 8"
        return
    yield 16 <= tile.block_m <= PADDED_ROWS, f"block_m is 16 to {PADDED_ROWS}"
    yield 16 <= tile.block_n <= PADDED_ROWS, f"block_n is 16 to {PADDED_ROWS}"
    if table == "hopper":
        yield tile.block_m >= 64, "block_m is at least 64"
        yield tile.warps == tile.block_m // 16, "warps is block_m / 16"
        # With one stage a program would wait for what it has yet to fetch.
        stages = min(_deepest(tile, rank).stages for rank in served_ranks(table, width))
        yield stages >= 2, "two stages fit shared memory"


def fault(table: str, width: int, tile: Tile) -> str | None:
    """Say why the kernels cannot run a tile of a table and padded rank, or None if they can."""
    for name, value in asdict(tile).items():
        if name == "registers" and value is None:
            continue
        if type(value) is not int or value < 1:
            return f"{name} is {value!r}, not a positive number"
        # Chunks are only walked through in blocks, stages and registers only counted.
        if name not in ("chunk", "stages", "registers") and value & (value - 1):
            return f"{name} is {value}, not a power of two"
    broken = (rule for holds, rule in _rules(table, width, tile) if not holds)
    rule = next(broken, None)
    return rule and f"{tile} breaks the rule that {rule}"


def _members(value: Any, where: str) -> Iterator[tuple[str, Any, str]]:
    """Walk through a JSON object: name, value and where that stands."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object but {value!r}")
    for name, inner in value.items():
        yield name, inner, f"{where}: {name}"


def _tile(table: str, width: str, entry: Any, where: str) -> Tile:
    """Read one entry of a file of tables."""
    kind, widths = TABLES[table]
    if width not in map(str, widths):
        raise ValueError(f"{where}: the padded ranks of {table!r} are {widths}")
    parts = {name: part for name, part, _ in _members(entry, where)}
    if "tile" not in parts or not parts.keys() <= {"tile", "measured"}:
        raise ValueError(f'{where}: an entry is "tile" and perhaps "measured", not {list(parts)}')
    values = {name: value for name, value, _ in _members(parts["tile"], f"{where}: tile")}
    wanted = {field.name for field in fields(kind)}
    if values.keys() != wanted:
        wrong = sorted(values.keys() ^ wanted)
        raise ValueError(f"{where}: tile: {', '.join(wrong)} missing or unknown")
    tile = kind(**values)
    if why := fault(table, int(width), tile):
        raise ValueError(f"{where}: {why}")
    return tile


def parse(document: Any) -> dict[Key, Tile]:
    """Check the content of a file of tables.

    Raises:
        ValueError: an entry is missing, misshapen or nothing that the kernels can run; the message
            names it.
    """
    found: dict[Key, Tile] = {}
    for architecture, tables, where in _members(document, PATH.name):
        number = re.fullmatch(r"([1-9]\d*)\.(\d)", architecture)
        if number is None and architecture != "default":
            raise ValueError(f"{where} is neither 'default' nor a compute capability like '9.0'")
        capability = (int(number[1]), int(number[2])) if number else None
        for table, entries, inside in _members(tables, where):
            if table not in TABLES or (table == "hopper" and capability != HOPPER):
                raise ValueError(f"{inside} is no table of {architecture}")
            for width, entry, place in _members(entries, inside):
                tile = _tile(table, width, entry, place)
                found[capability, table, int(width)] = tile
    for table, (_, widths) in TABLES.items():
        owner, name = (HOPPER, "9.0") if table == "hopper" else (None, "default")
        for padded in widths:
            if (owner, table, padded) not in found:
                raise ValueError(f"{PATH.name}: {name}: {table}: {padded} is missing")
    return found


@cache
def frozen() -> dict[Key, Tile]:
    """Return the tables, read from the file once."""
    return parse(json.loads(PATH.read_text(encoding="utf-8")))


def capability_of(device: torch.device) -> Capability:
    """Return the compute capability of a device, (0, 0) where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def entry(capability: Capability, table: str, rank: int) -> Any:
    """Return the tile of a table that serves a rank on an architecture."""
    tables, width = frozen(), entry_rank(table, rank)
    return tables.get((capability, table, width)) or tables[None, table, width]


def row_tile(capability: Capability, rank: int) -> RowTile:
    """Return the tile of `gram` and `basis`."""
    return entry(capability, "rows", rank)


def moment_tile(capability: Capability, rank: int) -> MomentTile:
    """Return the tile of `moments`."""
    return entry(capability, "moments", rank)


def update_tile(capability: Capability, rank: int) -> UpdateTile:
    """Return the tile of the portable hot loop."""
    return entry(capability, "update", rank)


def exact_tile(rank: int) -> UpdateTile:
    """Return the tile of the hot loop in fp32."""
    return EXACT_TILE if rank <= LARGEST_SQUARE else EXACT_WIDE_TILE


def hopper_tile(rank: int) -> UpdateTile:
    """Return the tile of the hot loop on compute capability 9.0, as deep as memory allows."""
    if broad(rank):
        return BROAD_TILE
    return _deepest(entry(HOPPER, "hopper", rank), rank)


def _deepest(tile: UpdateTile, rank: int) -> UpdateTile:
    """Return a tile of `hopper` with as many of its stages as fit beside what a rank holds."""
    if resident(rank):
        return tile
    columns = packing(rank)
    rows, partner_rows = tile.block_m, tile.block_n
    stage, held = 64 * partner_rows, 64 * columns.blocks * rows
    head = partner_rows * (columns.tail + 3 * columns.half)
    fixed = held + head + rows * columns.tail
    left = _HOPPER_SHARED - 2 * fixed
    return replace(tile, stages=min(tile.stages, left // (2 * stage)))


def padded_rank(rank: int) -> int:
    """Return the power of two, at least 16, that a contraction over the rank is padded to."""
    return max(16, 1 << (rank - 1).bit_length())


def narrow_rank(rank: int) -> int:
    """Return the power of two, at least 2, that a tile of rows is padded to."""
    return max(2, 1 << (rank - 1).bit_length())


def resident(rank: int) -> bool:
    """Tell whether a row's residual stays beside the tiles through the hot loop."""
    return rank <= 16


def apart(rank: int) -> bool:
    """Tell whether `gram` has a program for each of its three sums; see `gram_wide`."""
    return padded_rank(rank) >= LARGEST_SQUARE


def solve_warps(rank: int) -> int:
    """Return the warps of `solve`."""
    return 4 if rank <= LARGEST_SQUARE else 8


def operand_registers(rank: int) -> int | None:
    """Return the limit of registers a thread of `operands`: it gains at ranks up to 16 only."""
    return 128 if resident(rank) else None


def prefetches(capability: Capability, rank: int) -> bool:
    """Tell whether `moments` has P of the next rows fetched into L2, while a block is small."""
    return capability[0] == 9 and rank <= 32


def operand_rows(rank: int) -> int:
    """Return the rows of a tile of `operands`: few, where P is to stay cached between its reads."""
    if resident(rank):
        return 128
    return 16 if rank <= 32 else 8


def broad(rank: int) -> bool:
    """Tell whether one row's P fills a tile of the tensor cores.

    `moments_hopper` and `update_hopper_broad` serve these ranks on compute capability 9.0.
    """
    return 32 < rank <= 64
