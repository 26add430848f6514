"""The hot loop for compute capability 9.0 and ranks up to 16, in Gluon; see ``update``.

Same tiles, operands and arithmetic as ``update``. What is different: a row's residual stays in
registers as the left operand of the tensor cores instead of being fetched again for every tile,
all products of a tile are in flight together, the projection ``D Q`` of a tile runs under the
products of the next one, and one barrier covers everything a tile needs. Several programs share a
multiprocessor, so that one's entries hide another's products.
"""

from __future__ import annotations

from functools import cache

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from loft_kernels.backends.triton.centre import shrink_of
from loft_kernels.backends.triton.operands import load_half, scale_of
from loft_kernels.backends.triton.residual_hopper import (
    centred_rows,
    residual_rows,
    second_residual_rows,
)
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BIAS2,
    BOUND,
    COLUMNS,
    EPS,
    EXP_AVG,
    MOVES,
    NUMBERS,
    PARTNER_ROW,
    ROWS,
    SKIP,
)
from loft_kernels.backends.triton.update import guarded, move_rows, second_part, two_entries

# Triton 3.9 renamed it.
fetch_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@cache
def _tile_layout(block: tuple[int, int]) -> gl.NVMMASharedLayout:
    """Return how a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.float16)


def hopper_descriptor(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Describe tiles of an fp16 matrix to the tensor memory accelerator."""
    return TensorDescriptor.from_tensor(tensor, list(block), _tile_layout(block))


# Tiles whose D Q is added up in one accumulator; see ``update``.
FLUSH = gl.constexpr(8)


@gluon.jit
def project_back(
    row_ptr,
    hyper_ptr,
    inverse_ptr,
    side,
    acc,
    tau,
    start,
    rows,
    rank,
    BLOCK_M: gl.constexpr,
    R: gl.constexpr,
    HAS_MASTER: gl.constexpr,
    PARAM_DTYPE: gl.constexpr,
):
    """Move rows by (D Q) L^+, in fp64 because L^+ carries the partner's condition."""
    LANES: gl.constexpr = R // 4
    by_tile: gl.constexpr = gl.BlockedLayout(
        [1, 4], [32 // LANES, LANES], [BLOCK_M // 16, 1], [1, 0]
    )
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    columns = gl.allocate_shared_memory(gl.float32, [R, BLOCK_M], plain)
    columns.permute((1, 0)).store(acc)
    tl.debug_barrier()
    o_r = gl.arange(0, R, gl.SliceLayout(0, by_tile))
    o_row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, by_tile))
    inverse_ptr += (side ^ 1) * R * R
    direction = gl.zeros([BLOCK_M, R], gl.float64, by_tile)
    # Rows of L^+ beyond the rank are zero.
    for k in gl.static_range(R):
        column = columns.slice(k, 1, dim=0).permute((1, 0)).load(by_tile).to(gl.float64)
        direction += column * gl.load(inverse_ptr + k * R + o_r)[None, :]
    direction = direction / tau.to(gl.float64)
    move_rows(row_ptr, hyper_ptr, side, direction, o_row, rows, o_r, rank, HAS_MASTER, PARAM_DTYPE)


# Sizes of a kernel's tiles, as its functions hand them on: BLOCK_M, BLOCK_N, R, MAIN, TAIL, SPLIT.
# They stand in a tuple, as operands, slots and barriers do, since calls know no starred arguments.


@gluon.jit
def _fetch(t, live, o_partner, operands, slots, bars, SIZES: gl.constexpr, STAGES: gl.constexpr):
    """Start to fetch all operands of tile t.

    Each operand has slots and barriers of its own, and all are armed first: the compiler separates
    accesses to one allocation by a barrier of the whole program.
    """
    BLOCK_N: gl.constexpr = SIZES[1]
    R: gl.constexpr = SIZES[2]
    MAIN: gl.constexpr = SIZES[3]
    TAIL: gl.constexpr = SIZES[4]
    SPLIT: gl.constexpr = SIZES[5]
    _, main, tail, halves = operands
    s_main, s_tail, s_high, s_low = slots
    main_full, tail_full, high_full, low_full = bars
    slot = t % STAGES
    row = o_partner + t * BLOCK_N
    mbarrier.expect(main_full.index(slot), BLOCK_N * MAIN * 2, pred=live)
    mbarrier.expect(high_full.index(slot), BLOCK_N * R * 2, pred=live)
    if TAIL > 0:
        mbarrier.expect(tail_full.index(slot), BLOCK_N * TAIL * 2, pred=live)
    if SPLIT == 1:
        mbarrier.expect(low_full.index(slot), BLOCK_N * R * 2, pred=live)
    fetch_tile(main, [row, 0], main_full.index(slot), s_main.index(slot), pred=live)
    column = MAIN + TAIL
    fetch_tile(halves, [row, column], high_full.index(slot), s_high.index(slot), pred=live)
    if TAIL > 0:
        fetch_tile(tail, [row, MAIN], tail_full.index(slot), s_tail.index(slot), pred=live)
    if SPLIT == 1:
        fetch_tile(halves, [row, column + R], low_full.index(slot), s_low.index(slot), pred=live)


@gluon.jit
def _copy(row_ptr, slots, SIZES: gl.constexpr):
    """Bring all operands of a tile, whose first row is given, to the first slot by plain loads.

    For the loop that few blocks take: were it to fetch as the usual one does, the compiler would
    move the usual one's descriptors to uniform registers anew in every tile.
    """
    BLOCK_M: gl.constexpr = SIZES[0]
    BLOCK_N: gl.constexpr = SIZES[1]
    R: gl.constexpr = SIZES[2]
    MAIN: gl.constexpr = SIZES[3]
    TAIL: gl.constexpr = SIZES[4]
    WARPS: gl.constexpr = BLOCK_M // 16
    s_main, s_tail, s_high, s_low = slots
    WIDTH: gl.constexpr = MAIN + TAIL + 2 * R
    LANES: gl.constexpr = MAIN // 8
    by_main: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    by_16: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    o_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, by_main))
    o_k = gl.arange(0, MAIN, gl.SliceLayout(0, by_main))
    s_main.index(0).store(gl.load(row_ptr + (o_row[:, None] * WIDTH + o_k[None, :])))
    o_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, by_16))
    o_k = MAIN + gl.arange(0, 16, gl.SliceLayout(0, by_16))
    row_ptr += o_row[:, None] * WIDTH + o_k[None, :]
    if TAIL > 0:
        s_tail.index(0).store(gl.load(row_ptr))
    s_high.index(0).store(gl.load(row_ptr + TAIL))
    s_low.index(0).store(gl.load(row_ptr + (TAIL + R)))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def _stream(
    tiles,
    o_partner,
    operands,
    slots,
    bars,
    left_operands,
    of_rows,
    SIZES: gl.constexpr,
    STAGES: gl.constexpr,
    SECOND: gl.constexpr,
):
    """Return D Q of some rows, over all tiles of partner rows."""
    BLOCK_M: gl.constexpr = SIZES[0]
    BLOCK_N: gl.constexpr = SIZES[1]
    R: gl.constexpr = SIZES[2]
    MAIN: gl.constexpr = SIZES[3]
    TAIL: gl.constexpr = SIZES[4]
    SPLIT: gl.constexpr = SIZES[5]
    WARPS: gl.constexpr = BLOCK_M // 16
    WIDTH: gl.constexpr = MAIN + TAIL + 2 * R
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, R, 16])
    left_narrow: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    m_high, m_low, w, r_main, r_tail = left_operands
    a, b, c, floor, eps = of_rows
    s_main, s_tail, s_high, s_low = slots
    main_full, tail_full, high_full, low_full = bars
    none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, wide)
    projected = gl.zeros([BLOCK_M, R], gl.float32, narrow)
    for first_tile in range(0, tiles, FLUSH):
        acc = warpgroup_mma_init(gl.zeros([BLOCK_M, R], gl.float32, narrow))
        for t in range(first_tile, gl.minimum(first_tile + FLUSH, tiles)):
            slot, phase = t % STAGES, (t // STAGES) & 1
            if SECOND:
                slot = 0
                acc = warpgroup_mma_wait(0, deps=[acc])
                tl.debug_barrier()
                first_row = (o_partner + t * BLOCK_N).to(gl.int64)
                _copy(operands[0] + first_row * WIDTH, slots, SIZES)
            else:
                mbarrier.wait(high_full.index(slot), phase)
            q = s_high.index(slot)
            q_t = q.permute((1, 0))
            m_tile = warpgroup_mma(m_high, q_t, none, use_acc=False, is_async=True)
            if SPLIT < 3:
                m_tile = warpgroup_mma(m_low, q_t, m_tile, is_async=True)
            if SPLIT == 1:
                if not SECOND:
                    mbarrier.wait(low_full.index(slot), phase)
                low_t = s_low.index(slot).permute((1, 0))
                m_tile = warpgroup_mma(m_high, low_t, m_tile, is_async=True)
            dot = none
            if SECOND:
                w_tile = warpgroup_mma(w, q_t, none, use_acc=False, is_async=True)
                w_tile = warpgroup_mma(w, low_t, w_tile, is_async=True)
                m_tile, w_tile, acc = warpgroup_mma_wait(0, deps=[m_tile, w_tile, acc])
                dot = second_part(m_tile, w_tile, b, c)
            else:
                mbarrier.wait(main_full.index(slot), phase)
            main_t = s_main.index(slot).permute((1, 0))
            dot = warpgroup_mma(r_main, main_t, dot, use_acc=SECOND, is_async=True)
            if TAIL > 0:
                if not SECOND:
                    mbarrier.wait(tail_full.index(slot), phase)
                tail_t = s_tail.index(slot).permute((1, 0))
                dot = warpgroup_mma(r_tail, tail_t, dot, is_async=True)
            m_tile, dot, acc = warpgroup_mma_wait(0, deps=[m_tile, dot, acc])
            if not SECOND:
                # All products of the tile before are done in every warp: its slot is free.
                tl.debug_barrier()
                ahead = t + STAGES - 1
                _fetch(ahead, ahead < tiles, o_partner, operands, slots, bars, SIZES, STAGES)
            v = guarded(m_tile, dot, a, floor)
            d = two_entries(m_tile, v, tl.broadcast_to(eps[:, None], m_tile.shape))
            d = gl.convert_layout(d, left_narrow)
            acc = warpgroup_mma(d, q, acc, is_async=True)
        projected += warpgroup_mma_wait(0, deps=[acc])
    return projected


@gluon.jit
def _move_block(
    of_block,
    of_step,
    residual,
    operands,
    SIZES: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_MASTER: gl.constexpr,
    PARAM_DTYPE: gl.constexpr,
    SECOND: gl.constexpr,
):
    """Move a block of rows, given their residual with one centre or two."""
    BLOCK_M: gl.constexpr = SIZES[0]
    BLOCK_N: gl.constexpr = SIZES[1]
    R: gl.constexpr = SIZES[2]
    MAIN: gl.constexpr = SIZES[3]
    TAIL: gl.constexpr = SIZES[4]
    SPLIT: gl.constexpr = SIZES[5]
    WARPS: gl.constexpr = BLOCK_M // 16
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, R, 16])
    left_wide: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    table_ptr, hyper_ptr, inverse_ptr, side, start, rank = of_block
    unbias1, floor, eps, tau, partner_rows = of_step
    a, b, c, sigma_sq, w, r_main, r_tail = residual
    _, main, tail, halves = operands
    row_ptr = table_ptr + side * COLUMNS
    rows = gl.load(row_ptr + ROWS)

    # sigma m in two halves, in registers too.
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32))
    m_ptr, left = m_ptr + start * rank, (rows - start).to(gl.int32)
    o_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, left_wide))
    o_16 = gl.arange(0, 16, gl.SliceLayout(0, left_wide))
    sigma = gl.sqrt(sigma_sq)
    scale = gl.convert_layout(sigma, gl.SliceLayout(1, left_wide))[:, None] * unbias1
    m_high, m_low, part = load_half(m_ptr, o_row, left, o_16, rank, scale, SPLIT, gl.float16)
    if SPLIT == 3:
        m_high = gl.where((part == 1)[None, :], m_low, m_high)
    if SPLIT == 2:
        m_low = gl.where((part == 0)[None, :], m_low, gl.full_like(m_low, 0.0))
    eps = eps * sigma
    shrink = shrink_of(eps)
    a, floor, eps = a * shrink * shrink, floor * shrink * shrink, eps * shrink
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, narrow))

    s_main = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, MAIN], main.layout)
    s_high = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, R], halves.layout)
    s_tail, s_low = s_main, s_high
    if TAIL > 0:
        s_tail = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, TAIL], tail.layout)
    if SPLIT == 1:
        s_low = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, R], halves.layout)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    main_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    tail_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    high_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    low_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    bars = (main_full, tail_full, high_full, low_full)
    slots = (s_main, s_tail, s_high, s_low)
    o_partner = gl.load(row_ptr + PARTNER_ROW).to(gl.int32)
    tiles = (partner_rows.to(gl.int32) + BLOCK_N - 1) // BLOCK_N
    if not SECOND:
        for operand in gl.static_range(4):
            for stage in gl.static_range(STAGES):
                mbarrier.init(bars[operand].index(stage), count=1)
        for stage in gl.static_range(STAGES - 1):
            _fetch(stage, stage < tiles, o_partner, operands, slots, bars, SIZES, STAGES)
    projected = _stream(
        tiles,
        o_partner,
        operands,
        slots,
        bars,
        (m_high, m_low, w, r_main, r_tail),
        (a, b, c, floor, eps),
        SIZES,
        STAGES,
        SECOND,
    )
    projected *= shrink[:, None]
    if not SECOND:
        for operand in gl.static_range(4):
            for stage in gl.static_range(STAGES):
                mbarrier.invalidate(bars[operand].index(stage))
    project_back(
        row_ptr,
        hyper_ptr,
        inverse_ptr,
        side,
        projected,
        tau,
        start,
        rows,
        rank,
        BLOCK_M,
        R,
        HAS_MASTER,
        PARAM_DTYPE,
    )


@gluon.jit
def _update_hopper_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    pairs_ptr,
    selection_ptr,
    weight_ptr,
    partner_ptr,
    main,
    tail,
    halves,
    RANK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    R: gl.constexpr,
    MAIN: gl.constexpr,
    TAIL: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_MASTER: gl.constexpr,
    PARAM_DTYPE: gl.constexpr,
):
    WARPS: gl.constexpr = BLOCK_M // 16
    i_tile = gl.program_id(0).to(gl.int64)
    side = gl.load(tiles_ptr + 2 * i_tile).to(gl.int64)
    start = gl.load(tiles_ptr + 2 * i_tile + 1).to(gl.int64)
    row_ptr = table_ptr + side * COLUMNS
    if (gl.load(numbers_ptr + side * NUMBERS + MOVES) != 0) & (gl.load(decision_ptr + SKIP) == 0):
        wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
        LANES: gl.constexpr = MAIN // 4 if MAIN < 128 else 32
        by_main: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [WARPS, 1], [1, 0])
        by_16: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
        partner_rows = gl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        unbias1 = 1.0 / gl.load(numbers_ptr + side * NUMBERS + BIAS1).to(gl.float32)
        unbias2 = 1.0 / gl.load(numbers_ptr + side * NUMBERS + BIAS2).to(gl.float32)
        floor = (1.0 / gl.load(numbers_ptr + side * NUMBERS + BOUND)).to(gl.float32)
        tau = scale_of(partner_rows, RANK)
        eps = gl.load(hyper_ptr + EPS).to(gl.float32) * tau
        of_block = (table_ptr, hyper_ptr, inverse_ptr, side, start, RANK)
        of_step = (unbias1, floor, eps, tau, partner_rows)

        # The rows' residual, in registers.
        SECOND: gl.constexpr = SPLIT == 1  # above rank 8
        second, centred = centred_rows(
            row_ptr,
            (selection_ptr, weight_ptr),
            start,
            unbias1,
            unbias2,
            RANK,
            BLOCK_M,
            wide,
            MAIN,
            TAIL,
            SECOND,
        )
        operands = (partner_ptr, main, tail, halves)
        SIZES: gl.constexpr = (BLOCK_M, BLOCK_N, R, MAIN, TAIL, SPLIT)
        # All of it in two branches, so that the usual one keeps nothing for the other.
        if SECOND:
            if second:
                twofold = second_residual_rows(
                    row_ptr,
                    pairs_ptr,
                    start,
                    RANK,
                    unbias1,
                    unbias2,
                    eps,
                    BLOCK_M,
                    by_main,
                    by_16,
                    wide,
                    MAIN,
                    TAIL,
                )
                _move_block(
                    of_block, of_step, twofold, operands, SIZES, 1, HAS_MASTER, PARAM_DTYPE, True
                )
            else:
                usual = residual_rows(row_ptr, centred, eps, BLOCK_M, wide)
                _move_block(
                    of_block,
                    of_step,
                    usual,
                    operands,
                    SIZES,
                    STAGES,
                    HAS_MASTER,
                    PARAM_DTYPE,
                    False,
                )
        else:
            usual = residual_rows(row_ptr, centred, eps, BLOCK_M, wide)
            _move_block(
                of_block, of_step, usual, operands, SIZES, STAGES, HAS_MASTER, PARAM_DTYPE, False
            )
