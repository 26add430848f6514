"""The hot loop for compute capability 9.0 and ranks 17 to 32, in Gluon; see ``update``.

The contraction over r(r+1)/2 packed entries is a GEMM main loop over blocks of 64. The residual of
the rows stays in shared memory; the blocks of the partners arrive in a ring. One product is always
in flight while the slot of the one before is filled again; the projection ``D Q`` of a tile runs
under m~ and w~ of the next. These come first, because the sum over R begins at the second centre's
part of v.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from loft_kernels.backends.triton.centre import shrink_of
from loft_kernels.backends.triton.operands import load_half, scale_of
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BOUND,
    COLUMNS,
    EPS,
    EXP_AVG,
    MOVES,
    NUMBERS,
    PARTNER_ROW,
    RESIDUAL_ROW,
    ROWS,
    SKIP,
)
from loft_kernels.backends.triton.update import guarded, second_part, two_entries
from loft_kernels.backends.triton.update_hopper import fetch_tile, project_back


@gluon.jit
def _fetch_block(
    n,
    total,
    o_partner,
    main,
    s_main,
    full,
    BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Start to fetch the n-th block of 64 packed entries, counted over all tiles."""
    live = n < total
    slot = n % STAGES
    row, column = o_partner + (n // BLOCKS) * BLOCK_N, 64 * (n % BLOCKS)
    ready = full.index(slot)
    mbarrier.expect(ready, BLOCK_N * 64 * 2, pred=live)
    fetch_tile(main, [row, column], ready, s_main.index(slot), pred=live)


@gluon.jit
def _fetch_halves(
    t,
    tiles,
    o_partner,
    column,
    halves,
    s_high,
    s_low,
    high_full,
    low_full,
    BLOCK_N: gl.constexpr,
    R: gl.constexpr,
):
    """Start to fetch the halves of Q of tile t: the high ones are read until the tile after."""
    live = t < tiles
    row = o_partner + t * BLOCK_N
    high_ready = high_full.index(t % 2)
    mbarrier.expect(high_ready, BLOCK_N * R * 2, pred=live)
    mbarrier.expect(low_full, BLOCK_N * R * 2, pred=live)
    fetch_tile(halves, [row, column], high_ready, s_high.index(t % 2), pred=live)
    fetch_tile(halves, [row, column + R], low_full, s_low, pred=live)


@gluon.jit
def _update_hopper_wide_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    centre_ptr,
    direction_ptr,
    main,
    tail,
    halves,
    residual_main,
    residual_tail,
    rank,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    R: gl.constexpr,
    BLOCKS: gl.constexpr,
    TAIL: gl.constexpr,
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
        narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, R, 16])
        left_wide: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
        left_narrow: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
        rows = gl.load(row_ptr + ROWS)
        partner_rows = gl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        tau = scale_of(partner_rows, rank)
        tiles = (partner_rows.to(gl.int32) + BLOCK_N - 1) // BLOCK_N
        o_partner = gl.load(row_ptr + PARTNER_ROW).to(gl.int32)
        first = gl.load(row_ptr + RESIDUAL_ROW) + start
        o_residual = first.to(gl.int32)

        s_main = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N, 64], main.layout)
        s_tail = gl.allocate_shared_memory(gl.float16, [BLOCK_N, TAIL], tail.layout)
        s_high = gl.allocate_shared_memory(gl.float16, [2, BLOCK_N, R], halves.layout)
        s_low = gl.allocate_shared_memory(gl.float16, [BLOCK_N, R], halves.layout)
        s_residual = gl.allocate_shared_memory(
            gl.float16, [BLOCKS, BLOCK_M, 64], residual_main.layout
        )
        s_rest = gl.allocate_shared_memory(gl.float16, [BLOCK_M, TAIL], residual_tail.layout)
        one: gl.constexpr = mbarrier.MBarrierLayout()
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
        high_full = gl.allocate_shared_memory(gl.int64, [2, 1], one)
        low_full = gl.allocate_shared_memory(gl.int64, [1], one)
        tail_full = gl.allocate_shared_memory(gl.int64, [1], one)
        held = gl.allocate_shared_memory(gl.int64, [1], one)
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
        for part in gl.static_range(2):
            mbarrier.init(high_full.index(part), count=1)
        mbarrier.init(low_full, count=1)
        mbarrier.init(tail_full, count=1)
        mbarrier.init(held, count=1)
        o_high: gl.constexpr = 64 * BLOCKS + TAIL
        _fetch_halves(
            0, tiles, o_partner, o_high, halves, s_high, s_low, high_full, low_full, BLOCK_N, R
        )
        mbarrier.expect(held, BLOCK_M * (TAIL + 64 * BLOCKS) * 2)
        fetch_tile(residual_tail, [o_residual, 64 * BLOCKS], held, s_rest)
        for c in range(0, BLOCKS):
            fetch_tile(residual_main, [o_residual, 64 * c], held, s_residual.index(c))
        for stage in gl.static_range(STAGES - 1):
            _fetch_block(
                stage,
                tiles * BLOCKS,
                o_partner,
                main,
                s_main,
                full,
                BLOCK_N,
                BLOCKS,
                STAGES,
            )

        # The rows' operands: sigma m in two halves, and w.
        centre_ptr += 4 * first
        o_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, wide))
        eps = gl.sqrt(gl.load(centre_ptr + 4 * o_row + 3))
        eps = eps * gl.load(hyper_ptr + EPS).to(gl.float32) * tau
        shrink = shrink_of(eps)
        a = gl.load(centre_ptr + 4 * o_row) * shrink * shrink
        b = gl.load(centre_ptr + 4 * o_row + 1) * shrink * shrink
        c = gl.load(centre_ptr + 4 * o_row + 2) * shrink * shrink
        # Rows beyond the last have no centre.
        some = ((b != 0.0) | (c != 0.0)) & (start + o_row < rows)
        second = gl.max(some.to(gl.int32), axis=0) > 0
        floor = (1.0 / gl.load(numbers_ptr + side * NUMBERS + BOUND)).to(gl.float32)
        floor, eps = floor * shrink * shrink, eps * shrink
        unbias1 = 1.0 / gl.load(numbers_ptr + side * NUMBERS + BIAS1).to(gl.float32)
        m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * rank
        o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, left_wide))
        o_r = gl.arange(0, R, gl.SliceLayout(0, left_wide))
        scale = gl.sqrt(gl.load(centre_ptr + 4 * o_m + 3))[:, None] * unbias1
        left = (rows - start).to(gl.int32)
        m_high, m_low, _ = load_half(m_ptr, o_m, left, o_r, rank, scale, 1, gl.float16)

        none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, wide)
        empty = gl.zeros([BLOCK_M, R], gl.float32, narrow)
        projected = empty
        mbarrier.wait(held, 0)
        acc = warpgroup_mma_init(empty)
        for t in range(0, tiles):
            mbarrier.wait(high_full.index(t % 2), (t // 2) & 1)
            mbarrier.wait(low_full, t & 1)
            q = s_high.index(t % 2)
            q_t, low_t = q.permute((1, 0)), s_low.permute((1, 0))
            m_tile = warpgroup_mma(m_high, q_t, none, use_acc=False, is_async=True)
            m_tile = warpgroup_mma(m_low, q_t, m_tile, is_async=True)
            m_tile = warpgroup_mma(m_high, low_t, m_tile, is_async=True)
            m_tile, acc = warpgroup_mma_wait(0, deps=[m_tile, acc])
            # Added up apart at once: there are no registers for D Q and both of m~ and w~.
            projected += acc
            dot = none
            if second:
                w = gl.load(direction_ptr + first * R + (o_m[:, None] * R + o_r[None, :]))
                w_tile = warpgroup_mma(w, q_t, none, use_acc=False, is_async=True)
                w_tile = warpgroup_mma(w, low_t, w_tile, is_async=True)
                dot = second_part(m_tile, warpgroup_mma_wait(0, deps=[w_tile]), b, c)
            # All products of the tile before are done in every warp, and those with the low
            # halves of this one: their slots are free.
            tl.debug_barrier()
            _fetch_halves(
                t + 1,
                tiles,
                o_partner,
                o_high,
                halves,
                s_high,
                s_low,
                high_full,
                low_full,
                BLOCK_N,
                R,
            )
            mbarrier.expect(tail_full, BLOCK_N * TAIL * 2)
            fetch_tile(tail, [o_partner + t * BLOCK_N, 64 * BLOCKS], tail_full, s_tail)
            dot = warpgroup_mma_init(dot)
            for k in range(0, BLOCKS):
                n = t * BLOCKS + k
                slot = n % STAGES
                mbarrier.wait(full.index(slot), (n // STAGES) & 1)
                block = s_residual.index(k)
                block_t = s_main.index(slot).permute((1, 0))
                dot = warpgroup_mma(block, block_t, dot, is_async=True)
                dot = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[dot]))
                # What was multiplied before is free in every warp: a slot of the ring.
                tl.debug_barrier()
                _fetch_block(
                    n + STAGES - 1,
                    tiles * BLOCKS,
                    o_partner,
                    main,
                    s_main,
                    full,
                    BLOCK_N,
                    BLOCKS,
                    STAGES,
                )
            mbarrier.wait(tail_full, t & 1)
            dot = warpgroup_mma(s_rest, s_tail.permute((1, 0)), dot, is_async=True)
            dot = warpgroup_mma_wait(0, deps=[dot])
            v = guarded(m_tile, dot, a, floor)
            d = two_entries(m_tile, v, tl.broadcast_to(eps[:, None], m_tile.shape))
            d = gl.convert_layout(d, left_narrow)
            acc = warpgroup_mma(d, q, empty, use_acc=False, is_async=True)
        projected += warpgroup_mma_wait(0, deps=[acc])
        projected *= gl.convert_layout(shrink, gl.SliceLayout(1, narrow))[:, None]
        for stage in gl.static_range(STAGES):
            mbarrier.invalidate(full.index(stage))
        for part in gl.static_range(2):
            mbarrier.invalidate(high_full.index(part))
        mbarrier.invalidate(low_full)
        mbarrier.invalidate(tail_full)
        mbarrier.invalidate(held)
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
