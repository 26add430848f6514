"""Tile sizes per rank: fixed tables, so that every rank of a job runs the same kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loft_kernels.backends.triton.packing import packing

# The largest rank that has run on a GPU.
MAX_RANK = 64

# The workspace of a side is padded to a multiple of every block_m and block_n below.
PADDED_ROWS = 128


@dataclass(frozen=True, slots=True)
class RowTile:
    """Tile of the row-wise kernels (gram, basis): rows of a program, rows at a time, warps."""

    chunk: int
    block: int
    warps: int


# Measured on one NVIDIA H200.
_ROW_TILES = {
    16: RowTile(512, 16, 1),
    32: RowTile(256, 32, 4),
    64: RowTile(256, 32, 4),
}


def row_tile(rank: int) -> RowTile:
    """Return the tile of `gram` and `basis` for a rank."""
    return _ROW_TILES[padded_rank(rank)]


@dataclass(frozen=True, slots=True)
class UpdateTile:
    """Tile of the hot loop: rows, partner rows, warps, pipeline stages, registers a thread."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None


# Measured on one NVIDIA H200 (sm_90); the fallback is small enough for 99 KiB of shared memory.
_UPDATE_TILES = {
    (9, 8): UpdateTile(64, 64, 4, 3),
    (9, 16): UpdateTile(64, 64, 4, 3),
    (9, 32): UpdateTile(64, 128, 4, 4),
    (9, 64): UpdateTile(128, 128, 8, 4),
}
_FALLBACK = UpdateTile(64, 64, 4, 2)
# fp32 operands take twice the shared memory.
EXACT_TILE = UpdateTile(64, 64, 4, 2)

# Bytes of shared memory that a program of compute capability 9.0 can have, less its barriers.
_HOPPER_SHARED = 227 * 1024 - 1024

# Of `update_hopper`: registers leave room for four or three programs on a multiprocessor; and of
# `update_hopper_wide`: one program fills the shared memory.
_HOPPER_TILES = {
    4: UpdateTile(64, 64, 4, 4, 128),
    8: UpdateTile(64, 64, 4, 4, 168),
    16: UpdateTile(64, 64, 4, 3, 168),
    32: UpdateTile(128, 128, 8, 4),
    64: UpdateTile(128, 128, 8, 5),
}


def padded_rank(rank: int) -> int:
    """Return the power of two, at least 16, that a contraction over the rank is padded to."""
    return max(16, 1 << (rank - 1).bit_length())


def resident(rank: int) -> bool:
    """Tell whether a row's residual stays beside the tiles through the hot loop."""
    return rank <= 16


def update_tile(capability: int, rank: int) -> UpdateTile:
    """Return the tile of the hot loop for a compute capability (its major number) and rank."""
    width = max(8, 1 << (rank - 1).bit_length())
    return _UPDATE_TILES.get((capability, width), _FALLBACK)


def operand_rows(rank: int) -> int:
    """Return the rows of a tile of `operands`: few, where P is to stay cached between its reads."""
    return 128 if resident(rank) else 8


def hopper_tile(rank: int) -> UpdateTile:
    """Return the tile of the hot loop on compute capability 9.0, as deep as memory allows."""
    tile = _HOPPER_TILES[max(4, 1 << (rank - 1).bit_length())]
    if resident(rank):
        return tile
    columns = packing(rank)
    rows, partner_rows = tile.block_m, tile.block_n
    stage = 64 * (partner_rows + (0 if residual_held(rank) else rows))
    held = 64 * columns.blocks * rows if residual_held(rank) else 0
    head = partner_rows * (columns.tail + 2 * columns.half)
    fixed = held + head + rows * (columns.tail + columns.half)
    left = _HOPPER_SHARED - 2 * fixed
    return replace(tile, stages=min(tile.stages, left // (2 * stage)))


def residual_held(rank: int) -> bool:
    """Tell whether the residual of a tile of rows fits shared memory (`update_hopper_wide`)."""
    return rank <= 32


def narrow_rank(rank: int) -> int:
    """Return the power of two, at least 2, that a tile of rows is padded to."""
    return max(2, 1 << (rank - 1).bit_length())


@dataclass(frozen=True, slots=True)
class MomentTile:
    """Tile of `moments`.

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


# Measured on one NVIDIA H200. Triton 3.6 cannot compile fp64 products of 64 rows for sm_100, where
# the backend asks for a newer one.
_MOMENT_TILES = {
    4: MomentTile(512, 64, 64, 64, 16, 4, 128),
    8: MomentTile(512, 64, 16, 32, 64, 2),
    16: MomentTile(128, 32, 8, 32, 128, 4, 128),
    32: MomentTile(64, 32, 2, 16, 128, 2),
    64: MomentTile(16, 16, 1, 16, 256, 4),
}


def moment_tile(rank: int) -> MomentTile:
    """Return the tile of `moments` for a rank."""
    return _MOMENT_TILES[max(4, 1 << (rank - 1).bit_length())]
