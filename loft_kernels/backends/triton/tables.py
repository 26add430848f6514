"""What the kernels read to find their work: one row of addresses per factor, lists of tiles.

A *side* is one factor of a pair: side 2k is B of pair k, side 2k + 1 its A, and ``side ^ 1`` the
partner. Parameters, gradients and state are separate allocations, so each side's row holds their
addresses, strides and sizes; every kernel serves all pairs of a bucket through this table.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from loft_kernels.plan import Factor, Moving, Pair, addresses_and_strides

# Columns of the address table. Constexpr, so that kernels can use them as literals.
PARAM = tl.constexpr(0)
PARAM_STRIDE_ROW = tl.constexpr(1)
PARAM_STRIDE_COL = tl.constexpr(2)
GRAD = tl.constexpr(3)  # 0 where there is no gradient at this step
GRAD_STRIDE_ROW = tl.constexpr(4)
GRAD_STRIDE_COL = tl.constexpr(5)
EXP_AVG = tl.constexpr(6)
SECOND_MOMENT = tl.constexpr(7)
PARTNER_BASIS = tl.constexpr(8)
MASTER = tl.constexpr(9)
STEP = tl.constexpr(10)
GUARD = tl.constexpr(11)
ROWS = tl.constexpr(12)
SCALING = tl.constexpr(13)  # bits of an fp64
FIRST_CHUNK = tl.constexpr(14)
CHUNKS = tl.constexpr(15)
PARTNER_ROW = tl.constexpr(16)  # first row in the workspace of the partner's operands
RESIDUAL_ROW = tl.constexpr(17)  # first row in the workspace of residuals
COLUMNS = tl.constexpr(18)

# Columns of the per-side numbers (fp64).
NORM_SQ = tl.constexpr(0)
MOVES = tl.constexpr(1)  # 1 if the side moves at this step
BIAS1 = tl.constexpr(2)
BIAS2 = tl.constexpr(3)
BOUND = tl.constexpr(4)  # m^~^2 <= BOUND * v^
NUMBERS = tl.constexpr(5)

# Entries of the decision of a step (fp64).
SKIP = tl.constexpr(0)
COEFFICIENT = tl.constexpr(1)
NORM = tl.constexpr(2)

# Entries of the hyper-parameters (fp64).
LR_B = tl.constexpr(0)
LR_A = tl.constexpr(1)
BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
EPS = tl.constexpr(4)
WEIGHT_DECAY = tl.constexpr(5)
MAX_NORM = tl.constexpr(6)  # infinite for no clipping
SIGN = tl.constexpr(7)  # -1 to maximise
DAMPING = tl.constexpr(8)


def address_rows(
    pairs: Sequence[Pair], chunk_rows: int, workspace_rows: Sequence[tuple[int, int]]
) -> Tensor:
    """Build the address table of a bucket on the host.

    Args:
        pairs: checked pairs with allocated state.
        chunk_rows: rows per tile of the row-wise kernels.
        workspace_rows: per side, the first row of its partner's operands and of its residuals.

    Returns:
        int64, ``2 * pairs x COLUMNS``.
    """
    table: list[list[int]] = []
    first = 0
    for k, pair in enumerate(pairs):
        for side, factor in enumerate((pair.b, pair.a)):
            chunks = -(-factor.rows.shape[0] // chunk_rows)
            places = workspace_rows[2 * k + side]
            table.append([*_addresses(factor, pair.scaling), first, chunks, *places])
            first += chunks
    return torch.tensor(table, dtype=torch.int64)


def _addresses(factor: Factor, scaling: float) -> list[int]:
    """List one side's addresses, strides and sizes in the order of the columns."""
    rows, state = factor.rows, factor.state

    def address(key: str) -> int:
        return state[key].data_ptr() if key in state else 0

    grad = [0, 0, 0]
    if factor.grad is not None:
        grad = [factor.grad_rows.data_ptr(), *factor.grad_rows.stride()]
    keys = ("exp_avg", "second_moment", "partner_basis", "master", "step", "guard")
    return [
        rows.data_ptr(),
        *rows.stride(),
        *grad,
        *map(address, keys),
        rows.shape[0],
        struct.unpack("<q", struct.pack("<d", scaling))[0],
    ]


def moving_entries(pairs: Sequence[Pair]) -> Moving:
    """List what changes from step to step; see ``plan.Moving``."""
    grads = [f.grad for pair in pairs for f in (pair.b, pair.a)]
    return (*addresses_and_strides(grads), [pair.scaling for pair in pairs])


class AddressTable:
    """The address table of a bucket: on the host, and as it was brought to the device.

    Args:
        rows: see :func:`address_rows`; changed in place from now on.
        device: where the kernels read it.
    """

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        """Start with rows whose gradients and scalings may be of any step."""
        self._rows, self._device = rows, device
        self._addresses = rows[:, GRAD.value]
        self._moving: Moving | None = None
        self._on_device: Tensor

    def enter(self, moving: Moving) -> Tensor:
        """Return the table on the device, brought there if gradients or scalings have changed.

        A table there is never written again: what reads it may still be running.
        """
        if moving == self._moving:
            return self._on_device
        addresses, strides, scalings = moving
        known = self._moving
        self._moving = None
        # torch.tensor reads a list twice as slowly.
        self._addresses.copy_(torch.frombuffer(array("q", addresses), dtype=torch.int64))
        if known is None or strides != known[1]:
            stored = torch.tensor([s or (0, 0) for s in strides])
            # Sides alternate between B, whose rows are stored rows, and A, whose rows are columns.
            self._rows[0::2, GRAD.value + 1 : GRAD.value + 3] = stored[0::2]
            self._rows[1::2, GRAD.value + 1 : GRAD.value + 3] = stored[1::2].flip(1)
        if known is None or scalings != known[2]:
            bits = torch.tensor(scalings, dtype=torch.float64).view(torch.int64)
            self._rows[:, SCALING.value] = bits.repeat_interleave(2)
        self._on_device = to_device(self._rows, self._device)
        self._moving = moving
        return self._on_device


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it; `host` may be written again at once."""
    # Pageable memory would be waited for, and pinned memory read after this returns: torch gives
    # a pinned block out again only when the copy that it serves is done.
    staging = torch.empty_like(host, pin_memory=device.type == "cuda")
    return staging.copy_(host).to(device, non_blocking=True)


def row_tiles(pairs: Sequence[Pair], block_rows: int, heaviest_first: bool = False) -> Tensor:
    """List (side, first row) of every tile of `block_rows` rows: int32, ``tiles x 2``.

    Args:
        pairs: pairs of a bucket.
        block_rows: rows per tile.
        heaviest_first: tiles with long partners come first, so that no long tile starts last.
    """
    tiles = []
    for k, pair in enumerate(pairs):
        for side, (factor, partner) in enumerate(pair.sides):
            weight = partner.rows.shape[0]
            tiles += [
                (weight, 2 * k + side, start)
                for start in range(0, factor.rows.shape[0], block_rows)
            ]
    if heaviest_first:
        tiles.sort(key=lambda tile: -tile[0])
    return torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the operands of each side go, and which tiles write them.

    Attributes:
        places: per side, the first row of its partner's operands and of its residuals.
        partner_rows: rows to allocate for partners' operands.
        residual_rows: rows to allocate for residuals.
        tiles: (side, first row, 1 for the partner's operands or 0 for residuals), int32.
    """

    places: list[tuple[int, int]]
    partner_rows: int
    residual_rows: int
    tiles: Tensor


def workspace(
    shapes: Sequence[tuple[int, int]], block: int, padding: int, *, shared: bool, residuals: bool
) -> Workspace:
    """Lay out the workspace of some pairs; see ``padding``.

    Args:
        shapes: (m, n) of each pair.
        block: rows per tile.
        padding: every range is padded to a multiple of this many rows.
        shared: all pairs are in one phase, so the B sides and the A sides can share the memory.
        residuals: residuals are written too.
    """
    places: list[tuple[int, int]] = [(0, 0)] * (2 * len(shapes))
    by_side: list[list[tuple[int, int, int]]] = [[], []]
    totals, ends = [0, 0], (0, 0)
    for side in (0, 1):
        used = [0, 0] if shared else list(ends)
        for k, shape in enumerate(shapes):
            places[2 * k + side] = (used[0], used[1])
            for kind, rows in ((1, shape[1 - side]), (0, shape[side])):
                if kind == 0 and not residuals:
                    continue
                padded = -(-rows // padding) * padding
                by_side[side] += [(2 * k + side, start, kind) for start in range(0, padded, block)]
                used[1 - kind] += padded
        ends = (used[0], used[1])
        totals = [max(t, u) for t, u in zip(totals, used, strict=True)]
    # Sides in turns, in proportion: one of the two mostly moves, the other stays, and programs that
    # wait for memory run beside others.
    turns = [(k / len(own), tile) for own in by_side for k, tile in enumerate(own)]
    tiles = [tile for _, tile in sorted(turns, key=lambda turn: turn[0])]
    return Workspace(places, totals[0], totals[1], torch.tensor(tiles, dtype=torch.int32))
