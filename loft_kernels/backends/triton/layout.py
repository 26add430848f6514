"""Tiles and workspace of a bucket's launches, built anew only when its pairs change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.plan import Pair

# The operands of half the pairs are in memory at one time; more parts are more launches.
_PARTS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs whose operands share the workspace at one time.

    Attributes:
        operand_tiles: (side, first row, kind), see ``tables.Workspace``.
        update_tiles: (side, first row).
    """

    operand_tiles: Tensor
    update_tiles: Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Tiles and workspace of a bucket.

    Attributes:
        row_tiles: tiles of `gram` and `basis`.
        moment_tiles: tiles of `moments`, where that is launched.
        places: workspace rows of every side.
        parts: what `operands` and `update` serve one after the other, in the same workspace.
        partner_rows: rows of the workspace of partners' operands.
        residual_rows: rows of the workspace of residuals.
        tile: tile of the hot loop.
    """

    row_tiles: Tensor
    moment_tiles: Tensor
    places: list[tuple[int, int]]
    parts: list[Part]
    partner_rows: int
    residual_rows: int
    tile: configs.UpdateTile


def signature(pairs: Sequence[Pair]) -> tuple:
    """Name everything that a layout depends on beside the bucket."""
    return (
        pairs[0].options.alternate,
        *((*p.b.param.shape, *p.a.param.shape, p.b.grad is None, p.a.grad is None) for p in pairs),
    )


def step_counts(pairs: Sequence[Pair]) -> list[Tensor]:
    """List the tensors that count the steps of the factors, on the device."""
    return [f.state["step"] for p in pairs for f in (p.b, p.a) if "step" in f.state]


def new_layout(
    rank: int,
    pairs: Sequence[Pair],
    device: torch.device,
    capability: configs.Capability,
    tile: configs.UpdateTile,
    operand_rows: int,
) -> Layout:
    """Lay out tiles and workspace; reads the step counts once, the only synchronisation.

    Args:
        rank: of all pairs.
        pairs: of a bucket, with their gradients.
        device: where the tiles go.
        capability: of the device.
        tile: of the hot loop.
        operand_rows: rows of a tile that writes operands.
    """
    shapes = [(p.b.param.shape[0], p.a.param.shape[1]) for p in pairs]
    both = all(p.b.grad is not None and p.a.grad is not None for p in pairs)
    shared = pairs[0].options.alternate and both and len(_phases(pairs)) == 1
    size = -(-len(pairs) // _PARTS)
    places: list[tuple[int, int]] = []
    parts = []
    partner_rows = residual_rows = 0
    for start in range(0, len(pairs), size):
        part = slice(start, start + size)
        space = tables.workspace(
            shapes[part],
            operand_rows,
            max(configs.PADDED_ROWS, tile.block_n),
            shared=shared,
            residuals=not configs.resident(rank),
        )
        places += space.places
        partner_rows = max(partner_rows, space.partner_rows)
        residual_rows = max(residual_rows, space.residual_rows)
        update = tables.row_tiles(pairs[part], tile.block_m, heaviest_first=True)
        for tiles in (space.tiles, update):
            tiles[:, 0] += 2 * start
        parts.append(Part(space.tiles.to(device), update.to(device)))
    return Layout(
        tables.row_tiles(pairs, configs.row_tile(capability, rank).chunk).to(device),
        tables.row_tiles(pairs, configs.moment_tile(capability, rank).chunk).to(device),
        places,
        parts,
        partner_rows,
        residual_rows,
        tile,
    )


def _phases(pairs: Sequence[Pair]) -> set[int]:
    """Return the phases that some pairs are in, read from the device."""
    steps = [
        torch.stack([f.state["step"] for f in (p.b, p.a) if "step" in f.state]).max() for p in pairs
    ]
    return {int(step) % 2 for step in torch.stack(steps).tolist()}
