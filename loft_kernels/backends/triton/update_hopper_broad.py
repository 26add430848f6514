"""The hot loop for compute capability 9.0 and ranks 33 to 64, in Gluon; see ``update``.

At these ranks the loop is bound by what it reads: the residuals of a program's rows do not fit its
shared memory, and those of all programs not the L2 cache, so every tile brings them from memory
again. Tiles of 256 partner rows halve that. They fill the registers with one accumulator, so m~ is
formed a quarter of a tile at a time, at the end, and where rows have a second centre at the
beginning, too, for what that adds to v: the accumulator starts from there. Slots of the ring are
unrolled, which leaves a third of the instructions between two products.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from loft_kernels.backends.triton.centre import shrink_of
from loft_kernels.backends.triton.configs import BROAD_TILE
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

# Columns of a block of the contraction.
DEPTH = 32
_M, _N = gl.constexpr(BROAD_TILE.block_m), gl.constexpr(BROAD_TILE.block_n)
_K, _R = gl.constexpr(DEPTH), gl.constexpr(64)
_QUARTER = gl.constexpr(64)


@gluon.jit
def _arm(slot, live):
    """Let the barriers of a slot wait for a block of the contraction."""
    mbarrier.expect(slot[2], _N * _K * 2, pred=live)
    mbarrier.expect(slot[3], _M * _K * 2, pred=live)


@gluon.jit
def _fetch_block(k, row, o_residual, main, residual_main, slot, live):
    """Start to fetch the k-th block of packed entries of a tile; its barriers are armed."""
    fetch_tile(main, [row, k * _K], slot[2], slot[0], pred=live)
    fetch_tile(residual_main, [o_residual, k * _K], slot[3], slot[1], pred=live)


@gluon.jit
def _multiply_block(
    k,
    t,
    group,
    row,
    o_residual,
    main,
    residual_main,
    slots,
    dot,
    S: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add the product of the k-th block, which lies in slot S, and refill the slot before it."""
    s_main, s_residual, ready, residual_ready = slots[S]
    # How often a tile uses the slot; a barrier turns with every use.
    USES: gl.constexpr = (BLOCKS - S + STAGES - 1) // STAGES
    mbarrier.wait(ready, (t * USES + group) & 1)
    mbarrier.wait(residual_ready, (t * USES + group) & 1)
    dot = warpgroup_mma(s_residual, s_main.permute((1, 0)), dot, is_async=True)
    dot = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[dot]))
    # Armed before the barrier below, which the compiler would put between arming and fetching.
    coming = k + STAGES - 1
    live = (coming >= STAGES) & (coming < BLOCKS)
    slot = slots[(S + STAGES - 1) % STAGES]
    _arm(slot, live)
    # What was multiplied before is free in every warp.
    tl.debug_barrier()
    _fetch_block(coming, row, o_residual, main, residual_main, slot, live)
    return dot


@gluon.jit
def _fetch_halves(t, tiles, o_partner, halves, s_high, s_low, head, low_head, FIRST: gl.constexpr):
    """Start to fetch the halves of Q of tile t."""
    live = t < tiles
    row = o_partner + t * _N
    mbarrier.expect(head, _N * _R * 2, pred=live)
    mbarrier.expect(low_head, _N * _R * 2, pred=live)
    tl.debug_barrier()
    fetch_tile(halves, [row, FIRST], head, s_high, pred=live)
    fetch_tile(halves, [row, FIRST + _R], low_head, s_low, pred=live)


@gluon.jit
def _first_tile(s_m_high, s_m_low, high_t, low_t, none):
    """Form m~ of some columns."""
    m = warpgroup_mma(s_m_low, high_t, none, use_acc=False, is_async=True)
    m = warpgroup_mma(s_m_high, low_t, m, is_async=True)
    m = warpgroup_mma(s_m_high, high_t, m, is_async=True)
    return m


@gluon.jit
def _joined(x, y, COLUMNS_X: gl.constexpr):
    """Put two tiles side by side."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * COLUMNS_X, 16])
    both = gl.reshape(gl.permute(gl.join(x, y), (0, 2, 1)), [_M, 2 * COLUMNS_X])
    return gl.convert_layout(both, wide, assert_trivial=True)


@gluon.jit
def _second_part(w, s_m_high, s_m_low, s_high, s_low, none, b, c, K: gl.constexpr):
    """Form what the second centre adds to v in a quarter of a tile."""
    high_t = s_high.slice(K * _QUARTER, _QUARTER).permute((1, 0))
    low_t = s_low.slice(K * _QUARTER, _QUARTER).permute((1, 0))
    w_tile = warpgroup_mma(w, low_t, none, use_acc=False, is_async=True)
    w_tile = warpgroup_mma(w, high_t, w_tile, is_async=True)
    m_tile = _first_tile(s_m_high, s_m_low, high_t, low_t, none)
    w_tile, m_tile = warpgroup_mma_wait(0, deps=[w_tile, m_tile])
    return second_part(m_tile, w_tile, b, c)


@gluon.jit
def _second_parts(direction_ptr, s_m_high, s_m_low, s_high, s_low, none, b, c):
    """Form what the second centre adds to v in a tile, where its accumulator starts from."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _R, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    o_row = gl.arange(0, _M, gl.SliceLayout(1, left))
    o_r = gl.arange(0, _R, gl.SliceLayout(0, left))
    w = gl.load(direction_ptr + (o_row[:, None] * _R + o_r[None, :]))
    parts = ()
    for k in gl.static_range(4):
        part = _second_part(w, s_m_high, s_m_low, s_high, s_low, none, b, c, k)
        parts = parts + (part,)  # noqa: RUF005 - Gluon knows no stars
    left_half = _joined(parts[0], parts[1], _QUARTER)
    return _joined(left_half, _joined(parts[2], parts[3], _QUARTER), 2 * _QUARTER)


@gluon.jit
def _parted(x, NARROW: gl.constexpr, COLUMNS_X: gl.constexpr):
    """Take the left and the right half of a tile."""
    left, right = gl.split(gl.permute(gl.reshape(x, [_M, 2, COLUMNS_X // 2]), (0, 2, 1)))
    left = gl.convert_layout(left, NARROW, assert_trivial=True)
    return left, gl.convert_layout(right, NARROW, assert_trivial=True)


@gluon.jit
def _update_hopper_broad_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    centre_ptr,
    direction_ptr,
    main,
    halves,
    residual_main,
    rank,
    PRODUCTS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_MASTER: gl.constexpr,
    PARAM_DTYPE: gl.constexpr,
):
    i_tile = gl.program_id(0).to(gl.int64)
    side = gl.load(tiles_ptr + 2 * i_tile).to(gl.int64)
    start = gl.load(tiles_ptr + 2 * i_tile + 1).to(gl.int64)
    row_ptr = table_ptr + side * COLUMNS
    if (gl.load(numbers_ptr + side * NUMBERS + MOVES) != 0) & (gl.load(decision_ptr + SKIP) == 0):
        BLOCKS: gl.constexpr = (PRODUCTS + _K - 1) // _K
        broad: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _N, 16])
        half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _N // 2, 16])
        narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _R, 16])
        left_narrow: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
        by_tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
        own: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_M, _R], gl.float16)
        rows = gl.load(row_ptr + ROWS)
        partner_rows = gl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        tau = scale_of(partner_rows, rank)
        tiles = (partner_rows.to(gl.int32) + _N - 1) // _N
        o_partner = gl.load(row_ptr + PARTNER_ROW).to(gl.int32)
        first = gl.load(row_ptr + RESIDUAL_ROW) + start
        o_residual = first.to(gl.int32)

        # Slots are allocations of their own: the compiler separates accesses to one by a barrier.
        one: gl.constexpr = mbarrier.MBarrierLayout()
        slots = ()
        for _ in gl.static_range(STAGES):
            s_main = gl.allocate_shared_memory(gl.float16, [_N, _K], main.layout)
            s_residual = gl.allocate_shared_memory(gl.float16, [_M, _K], residual_main.layout)
            main_ready = gl.allocate_shared_memory(gl.int64, [1], one)
            residual_ready = gl.allocate_shared_memory(gl.int64, [1], one)
            slot = s_main, s_residual, main_ready, residual_ready
            slots = slots + (slot,)  # type: ignore[assignment] # noqa: RUF005 - no stars in Gluon
        s_high = gl.allocate_shared_memory(gl.float16, [_N, _R], halves.layout)
        s_low = gl.allocate_shared_memory(gl.float16, [_N, _R], halves.layout)
        head = gl.allocate_shared_memory(gl.int64, [1], one)
        low_head = gl.allocate_shared_memory(gl.int64, [1], one)
        for stage in gl.static_range(STAGES):
            mbarrier.init(slots[stage][2], count=1)
            mbarrier.init(slots[stage][3], count=1)
        mbarrier.init(head, count=1)
        mbarrier.init(low_head, count=1)
        _fetch_halves(0, tiles, o_partner, halves, s_high, s_low, head, low_head, PRODUCTS)
        for stage in gl.static_range(STAGES):
            _arm(slots[stage], True)
        tl.debug_barrier()
        for stage in gl.static_range(STAGES):
            _fetch_block(stage, o_partner, o_residual, main, residual_main, slots[stage], True)

        # The rows' operands: sigma m in two halves, and w.
        centre_ptr += 4 * first
        direction_ptr += first * _R
        o_row = gl.arange(0, _M, gl.SliceLayout(1, narrow))
        eps = gl.sqrt(gl.load(centre_ptr + 4 * o_row + 3))
        eps = eps * gl.load(hyper_ptr + EPS).to(gl.float32) * tau
        shrink = shrink_of(eps)
        shrink_sq = shrink * shrink
        a = gl.load(centre_ptr + 4 * o_row) * shrink_sq
        b = gl.load(centre_ptr + 4 * o_row + 1) * shrink_sq
        c = gl.load(centre_ptr + 4 * o_row + 2) * shrink_sq
        # Rows beyond the last have no centre.
        some = ((b != 0.0) | (c != 0.0)) & (start + o_row < rows)
        second = gl.max(some.to(gl.int32), axis=0) > 0
        floor = (1.0 / gl.load(numbers_ptr + side * NUMBERS + BOUND)).to(gl.float32)
        floor, eps = floor * shrink_sq, eps * shrink
        unbias1 = 1.0 / gl.load(numbers_ptr + side * NUMBERS + BIAS1).to(gl.float32)
        m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * rank
        o_m = gl.arange(0, _M, gl.SliceLayout(1, by_tile))
        o_r = gl.arange(0, _R, gl.SliceLayout(0, by_tile))
        scale = gl.sqrt(gl.load(centre_ptr + 4 * o_m + 3))[:, None] * unbias1
        left = (rows - start).to(gl.int32)
        m_high, m_low, _ = load_half(m_ptr, o_m, left, o_r, rank, scale, 1, gl.float16)
        s_m_high = gl.allocate_shared_memory(gl.float16, [_M, _R], own, m_high)
        s_m_low = gl.allocate_shared_memory(gl.float16, [_M, _R], own, m_low)
        # Where D Q is added up over the tiles: there are no registers for it.
        lines: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        s_sum = gl.allocate_shared_memory(
            gl.float32, [_M, _R], lines, gl.zeros([_M, _R], gl.float32, narrow)
        )
        fence_async_shared()
        tl.debug_barrier()

        none = gl.zeros([_M, _QUARTER], gl.float32, narrow)
        none_broad = gl.zeros([_M, _N], gl.float32, broad)
        for t in range(0, tiles):
            mbarrier.wait(head, t & 1)
            mbarrier.wait(low_head, t & 1)
            dot = none_broad
            if second:
                dot = _second_parts(direction_ptr, s_m_high, s_m_low, s_high, s_low, none, b, c)
            dot = warpgroup_mma_init(dot)
            row = o_partner + t * _N
            for group in range(0, BLOCKS // STAGES):
                for stage in gl.static_range(STAGES):
                    k = group * STAGES + stage
                    dot = _multiply_block(
                        k,
                        t,
                        group,
                        row,
                        o_residual,
                        main,
                        residual_main,
                        slots,
                        dot,
                        stage,
                        BLOCKS,
                        STAGES,
                    )
            for stage in gl.static_range(BLOCKS % STAGES):
                dot = _multiply_block(
                    BLOCKS - BLOCKS % STAGES + stage,
                    t,
                    BLOCKS // STAGES,
                    row,
                    o_residual,
                    main,
                    residual_main,
                    slots,
                    dot,
                    stage,
                    BLOCKS,
                    STAGES,
                )
            dot = warpgroup_mma_wait(0, deps=[dot])
            # The blocks of the next tile come while this one's entries are worked on.
            more = t + 1 < tiles
            for stage in gl.static_range(STAGES):
                _arm(slots[stage], more)
            tl.debug_barrier()
            for stage in gl.static_range(STAGES):
                _fetch_block(stage, row + _N, o_residual, main, residual_main, slots[stage], more)
            dots = _parted(dot, half, _N)
            dots = _parted(dots[0], narrow, _N // 2) + _parted(dots[1], narrow, _N // 2)
            acc = warpgroup_mma_init(none)
            for quarter in gl.static_range(4):
                q = s_high.slice(quarter * _QUARTER, _QUARTER)
                low_t = s_low.slice(quarter * _QUARTER, _QUARTER).permute((1, 0))
                m_tile = _first_tile(s_m_high, s_m_low, q.permute((1, 0)), low_t, none)
                m_tile, acc = warpgroup_mma_wait(0, deps=[m_tile, acc])
                v = guarded(m_tile, dots[quarter], a, floor)
                d = two_entries(m_tile, v, tl.broadcast_to(eps[:, None], m_tile.shape))
                d = gl.convert_layout(d, left_narrow)
                acc = warpgroup_mma(d, q, acc, use_acc=quarter > 0, is_async=True)
            # Added up apart: tensor cores truncate what they add to a large sum.
            s_sum.store(s_sum.load(narrow) + warpgroup_mma_wait(0, deps=[acc]))
            tl.debug_barrier()
            _fetch_halves(t + 1, tiles, o_partner, halves, s_high, s_low, head, low_head, PRODUCTS)
        projected = s_sum.load(narrow) * shrink[:, None]
        for stage in gl.static_range(STAGES):
            mbarrier.invalidate(slots[stage][2])
            mbarrier.invalidate(slots[stage][3])
        mbarrier.invalidate(head)
        mbarrier.invalidate(low_head)
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
            _M,
            _R,
            HAS_MASTER,
            PARAM_DTYPE,
        )
