"""`moments` of the factors that move, and all operands, for compute capability 9.0, ranks 33 to 64.

One row's P fills a tile of the tensor cores. Its program reads it once: carries it over
(``C^T P C``), accumulates, writes it back, and forms a, sigma^2 and the residual R in fp16 while it
is still in registers, where ``moments`` and ``operands`` read it three times. Other programs write
the operands of partners, as ``operands`` does; ``moments`` itself only serves the factors that
stay.

P enters as its upper triangle T, half the diagonal: ``C^T P C = S + S^T`` with ``S = C^T T C``, so
that nothing is mirrored before the products. Each is three products of fp16 halves, T scaled by a
power of two; the first one's accumulators are the left operand of the second. g and m are formed in
fp64 for 64 rows at a time; g waits in the memory of the rows' residuals.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loft_kernels.backends.triton.centre import (
    first_centre,
    inverse_of,
    residual_weight,
    shrink_of,
    sigma_sq_of,
    trace_limit,
)
from loft_kernels.backends.triton.operands import scale_of
from loft_kernels.backends.triton.operands_hopper import (
    SQUARE,
    added,
    load_mirrored,
    second_rows,
    unforeseen,
    write_partner,
)
from loft_kernels.backends.triton.products import C_SCALE, UNSCALE, powers
from loft_kernels.backends.triton.tables import (
    BETA1,
    BETA2,
    BIAS1,
    BIAS2,
    COEFFICIENT,
    COLUMNS,
    EPS,
    EXP_AVG,
    GRAD,
    GRAD_STRIDE_COL,
    GRAD_STRIDE_ROW,
    MOVES,
    NUMBERS,
    RESIDUAL_ROW,
    ROWS,
    SCALING,
    SECOND_MOMENT,
    SIGN,
    SKIP,
)

# Triton 3.9 renamed it.
_fetch = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

# Rows of a program, and registers of a thread: three programs share a multiprocessor.
MOVING_ROWS, REGISTERS = 64, 168

# Where the largest square of a row's g is parked behind it, their sum, and that of m.
_G_TOP, _G_SQ, _M_SQ = gl.constexpr(64), gl.constexpr(65), gl.constexpr(66)

# Rows of an fp64 product's instruction, as the compiler itself chooses them.
_ROWS64 = gl.constexpr(16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 8)


@gluon.jit
def _product64(
    a_ptr, a_row, a_col, rows, b_ptr, b_row, b_col, RANK: gl.constexpr, WIDE: gl.constexpr
):
    """Multiply 64 rows of a strided matrix by an R x R matrix in fp64, 16 columns at a time."""
    left: gl.constexpr = gl.DotOperandLayout(0, WIDE, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, WIDE, 1)
    o_row = gl.arange(0, SQUARE, gl.SliceLayout(1, left))
    o_a = gl.arange(0, 16, gl.SliceLayout(0, left))
    o_b = gl.arange(0, 16, gl.SliceLayout(1, right))
    o_col = gl.arange(0, SQUARE, gl.SliceLayout(0, right))
    acc = gl.zeros([SQUARE, SQUARE], gl.float64, WIDE)
    for first in range(0, RANK, 16):
        mask = (o_row < rows)[:, None] & (first + o_a < RANK)[None, :]
        offsets = o_row[:, None] * a_row + (first + o_a)[None, :] * a_col
        a = gl.load(a_ptr + offsets, mask=mask, other=0.0)
        b = gl.load(b_ptr + (first + o_b)[:, None] * b_row + o_col[None, :] * b_col)
        acc = mma_v2(a.to(gl.float64), b.to(gl.float64), acc)
    return acc


@gluon.jit
def _advance_first(
    row_ptr,
    hyper_ptr,
    coefficient,
    inverse_ptr,
    c_ptr,
    changed,
    start,
    rows,
    g_ptr,
    RANK: gl.constexpr,
    STRIDE: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    """Form g and m of 64 rows; g goes to g_ptr, STRIDE entries a row, and sizes of both behind."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [_ROWS64, 8])
    o_row = gl.arange(0, SQUARE, gl.SliceLayout(1, wide))
    o_col = gl.arange(0, SQUARE, gl.SliceLayout(0, wide))
    grad_row, grad_col = gl.load(row_ptr + GRAD_STRIDE_ROW), gl.load(row_ptr + GRAD_STRIDE_COL)
    grad = gl.load(row_ptr + GRAD).to(gl.pointer_type(GRAD_DTYPE)) + start * grad_row
    g = _product64(grad, grad_row, grad_col, rows, inverse_ptr, 1, SQUARE, RANK, wide) * coefficient
    g32 = g.to(gl.float32)
    gl.store(g_ptr + (o_row[:, None] * STRIDE + o_col[None, :]), g32)
    gl.store(g_ptr + (o_row * STRIDE + _G_TOP), gl.max(g32 * g32, axis=1))
    gl.store(g_ptr + (o_row * STRIDE + _G_SQ), gl.sum(g32 * g32, axis=1))
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * RANK
    o_m = o_row[:, None] * RANK + o_col[None, :]
    mask = (o_row < rows)[:, None] & (o_col < RANK)[None, :]
    if changed != 0:
        m = _product64(m_ptr, RANK, 1, rows, c_ptr, SQUARE, 1, RANK, wide)
    else:
        m = gl.load(m_ptr + o_m, mask=mask, other=0.0).to(gl.float64)
    beta1 = gl.load(hyper_ptr + BETA1)
    m = (beta1 * m + (1.0 - beta1) * g).to(gl.float32)
    gl.store(g_ptr + (o_row * STRIDE + _M_SQ), gl.sum(m * m, axis=1))
    # Every warp's rows are its own, but for the product: all have read m before one writes it.
    tl.debug_barrier()
    gl.store(m_ptr + o_m, m, mask=mask)


@gluon.jit
def _halves_of(c_ptr, ROWWISE: gl.constexpr):
    """Split C, scaled, into fp16 high and low halves."""
    o_i = gl.arange(0, SQUARE, gl.SliceLayout(1, ROWWISE))
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, ROWWISE))
    c = gl.load(c_ptr + o_i[:, None] * SQUARE + o_j[None, :]) * C_SCALE
    high = c.to(gl.float16)
    return high, (c - high.to(gl.float32)).to(gl.float16)


@gluon.jit
def _carry(t, s_c_high, s_c_low, up):
    """Form C^T P C, scaled, from the upper triangle of P with half its diagonal.

    What lies in shared memory lies there one after the other, in the same place.
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SQUARE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SQUARE, SQUARE], gl.float16)
    t = t * up
    high = t.to(gl.float16)
    s_high = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, high)
    low = (t - high.to(gl.float32)).to(gl.float16)
    s_low = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, low)
    # One of two mirrored entries is zero, so the halves of P are the sums of the halves of T.
    high = s_high.load(left) + s_high.permute((1, 0)).load(left)
    low = s_low.load(left) + s_low.permute((1, 0)).load(left)
    none = gl.zeros([SQUARE, SQUARE], gl.float32, wide)
    y = warpgroup_mma(low, s_c_high, none, use_acc=False, is_async=True)
    y = warpgroup_mma(high, s_c_low, y, is_async=True)
    y = warpgroup_mma(high, s_c_high, y, is_async=True)
    y = warpgroup_mma_wait(0, deps=[y])
    y_high = y.to(gl.float16)
    s_y_high = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, y_high)
    y_low = (y - y_high.to(gl.float32)).to(gl.float16)
    s_y_low = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, y_low)
    fence_async_shared()
    tl.debug_barrier()
    c_low_t, c_high_t = s_c_low.permute((1, 0)), s_c_high.permute((1, 0))
    p = warpgroup_mma(c_low_t, s_y_high, none, use_acc=False, is_async=True)
    p = warpgroup_mma(c_high_t, s_y_low, p, is_async=True)
    p = warpgroup_mma(c_high_t, s_y_high, p, is_async=True)
    return warpgroup_mma_wait(0, deps=[p])


@gluon.jit
def _triangle_row(o_row, nothing, RANK: gl.constexpr):
    """Return where rows of a packed triangle begin, less their number; nothing is 0.

    From the row of the warp and a literal, so that they need not be kept.
    """
    warp, own = o_row & 48, o_row & 15
    begin = warp * RANK - (warp * (warp + 1)) // 2 + nothing
    return begin + own * (RANK - warp + nothing) - (own * (own + 1)) // 2


@gluon.jit
def _larger_and_added(a, b, c, d):
    """Take the larger of two numbers and the sum of two others."""
    return gl.maximum(a, c), b + d


@gluon.jit
def _flat(x, y):
    """Lay tiles out in one dimension, so that a sum over all entries begins in every thread."""
    return gl.reshape(x, [SQUARE * SQUARE]), gl.reshape(y, [SQUARE * SQUARE])


@gluon.jit
def _advance_second(
    number_ptr,
    hyper_ptr,
    c_ptr,
    counts,
    eps,
    rows,
    m_ptr,
    p_ptr,
    g_ptr,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    CARRY: gl.constexpr,
):
    """Advance P of some rows and write their residuals; m is that of after the step."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    by_row: gl.constexpr = gl.BlockedLayout([16, 2], [1, 32], [4, 1], [1, 0])
    by_line: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [4, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SQUARE, SQUARE], gl.float16)
    if CARRY:
        c_high, c_low = _halves_of(c_ptr, by_row)
        s_c_high = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, c_high)
        s_c_low = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, c_low)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        s_t = gl.allocate_shared_memory(
            gl.float32, [SQUARE, SQUARE], plain, gl.zeros([SQUARE, SQUARE], gl.float32, by_row)
        )
        fence_async_shared()
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_g = gl.allocate_shared_memory(gl.float32, [SQUARE], vector)
    s_m = gl.allocate_shared_memory(gl.float32, [SQUARE], vector)
    tl.debug_barrier()
    beta2 = gl.load(hyper_ptr + BETA2)
    fresh2, beta2 = (1.0 - beta2).to(gl.float32), beta2.to(gl.float32)
    unbias1 = 1.0 / gl.load(number_ptr + BIAS1).to(gl.float32)
    unbias2 = 1.0 / gl.load(number_ptr + BIAS2).to(gl.float32)
    # As the tensor cores take P: j = i compares one number of the thread with literals.
    o_i = gl.arange(0, SQUARE, gl.SliceLayout(1, by_row))
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, by_row))
    across = (o_j >> 1)[None, :] - ((o_i >> 4) << 3)[:, None]
    diagonal = (across == ((o_i & 15) >> 1)[:, None]) & ((o_i & 1)[:, None] == (o_j & 1)[None, :])
    # As P and R lie in memory: every line of a warp is contiguous, and so it is with j >= i.
    o_u = gl.arange(0, SQUARE, gl.SliceLayout(1, by_line))
    o_v = gl.arange(0, SQUARE, gl.SliceLayout(0, by_line))
    u_warp, u_own = o_u & 48, o_u & 15
    v_lane, v_own = o_v & 31, o_v & 32
    ahead, behind = v_lane[None, :] - u_warp[:, None], u_own[:, None] - v_own[None, :]
    upper, diagonal_p = ahead >= behind, ahead == behind
    if RANK < SQUARE:
        upper = upper & (o_v < RANK)[None, :]
    o_d, m_d = o_v * RANK - (o_v * (o_v - 1)) // 2, o_v < RANK
    shortens = rows < 0
    if CARRY:
        c = gl.load(c_ptr + o_u[:, None] * SQUARE + o_v[None, :])
        shortens = gl.sum(gl.sum(c * c, axis=1), axis=0) < 0.99 * RANK
        o_p = _triangle_row(o_u, 0, RANK)[:, None] + v_lane[None, :]
        _fetch(s_t, (p_ptr + o_p) + v_own[None, :], mask=upper)
        async_copy.commit_group()
    # P is positive semidefinite: its largest entry stands on the diagonal.
    first_d = gl.load(p_ptr + o_d, mask=m_d, other=0.0)
    top, trace = gl.reduce((first_d, first_d), 0, _larger_and_added)
    for row in range(0, rows):
        here = unforeseen(row)
        p_row, m_row = p_ptr + here * PACKED, m_ptr + here * RANK
        g_row, out_row = g_ptr + here * (PRODUCTS // 2), residual_ptr + here * PRODUCTS
        # Early, so that they have arrived when they are needed.
        g_j = gl.load((g_row + v_lane) + v_own)
        m_j = gl.load((m_row + v_lane) + v_own, mask=o_v < RANK, other=0.0)
        g_top, g_sq = gl.load(g_row + _G_TOP), gl.load(g_row + _G_SQ)
        m_sq = gl.load(g_row + _M_SQ)
        if CARRY:
            up, down = powers(top)
            async_copy.wait_group(0)
            tl.debug_barrier()
            t = s_t.load(by_row)
            carried = _carry(gl.where(diagonal, 0.5 * t, t), s_c_high, s_c_low, up)
            s_g.store(g_j)
            s_m.store(m_j)
            s_p = gl.allocate_shared_memory(gl.float32, [SQUARE, SQUARE], swizzled, carried)
            p = s_p.load(by_line) * (beta2 * down * UNSCALE)
        else:
            p = beta2 * load_mirrored(p_row, o_u, o_v, RANK)
            s_g.store(g_j)
            s_m.store(m_j)
            tl.debug_barrier()
        g_i, m_i = s_g.load(gl.SliceLayout(1, by_line)), s_m.load(gl.SliceLayout(1, by_line))
        p += (fresh2 * g_i)[:, None] * g_j[None, :]
        o_p = _triangle_row(o_u, here - row, RANK)[:, None] + v_lane[None, :]
        gl.store((p_row + o_p) + v_own[None, :], p, mask=upper)
        # The next row's P arrives while this one's is worked on.
        more = row + 1 < rows
        if CARRY:
            _fetch(s_t, ((p_row + o_p) + v_own[None, :]) + PACKED, mask=upper & more)
            async_copy.commit_group()
        diagonal_next = gl.load((p_row + PACKED) + o_d, mask=m_d & more, other=0.0)

        # R in units of P's largest entry, up to what C does to it, so that no square underflows.
        unit = inverse_of(gl.maximum(beta2 * top, fresh2 * g_top) * unbias2)
        p = p * (unbias2 * unit)
        root = gl.sqrt(unit) * unbias1
        m_i, m_j = m_i * root, m_j * root
        m_sq = m_sq * (root * root)
        mpm, p_sq = gl.reduce(_flat((p * m_i[:, None]) * m_j[None, :], p * p), 0, added)
        a, r_sq = first_centre(p_sq, mpm, m_sq)
        # C shortens what it carries, if at all, so that this is the trace of P or a little more,
        # unless the partner has turned away.
        trace = (beta2 * trace + fresh2 * g_sq) * (unbias2 * unit)
        if shortens:
            trace = gl.sum(gl.reshape(gl.where(diagonal_p, p, 0.0), [SQUARE * SQUARE]), axis=0)
        asks = (trace < trace_limit(p_sq, r_sq, a, m_sq)) & (counts > 0.0)
        p -= (a * m_i)[:, None] * m_j[None, :]
        sigma_sq = sigma_sq_of(r_sq, unit)
        by_unit = sigma_sq / unit
        shrink = shrink_of(eps * gl.sqrt(sigma_sq))
        kept = by_unit * shrink * shrink * counts
        p = p * gl.where(diagonal_p, kept, 2.0 * kept)
        # What stands for b tells `second_rows` which rows ask for a second centre.
        centre = centre_ptr + 4 * row
        gl.store(centre, a)
        gl.store(centre + 1, gl.where(asks, 1.0, 0.0))
        gl.store(centre + 2, 0.0)
        gl.store(centre + 3, sigma_sq)
        gl.store(
            direction_ptr + row * SQUARE + o_v,
            gl.zeros([SQUARE], gl.float16, gl.SliceLayout(0, by_line)),
        )
        gl.store((out_row + o_p) + v_own[None, :], p.to(gl.float16), mask=upper)
        PADDING: gl.constexpr = PRODUCTS - PACKED
        if PADDING > 0:
            zero = gl.zeros([SQUARE], gl.float16, gl.SliceLayout(0, by_row))
            gl.store(out_row + PACKED + o_j, zero, mask=o_j < PADDING)
        top, trace = gl.reduce((diagonal_next, diagonal_next), 0, _larger_and_added)
    if CARRY:
        # The last row fetched zeros alone, but into memory that is given to others next.
        async_copy.wait_group(0)


@gluon.jit
def _move_moments(
    row_ptr,
    number_ptr,
    hyper_ptr,
    decision_ptr,
    inverse_ptr,
    c_ptr,
    changed,
    start,
    partner_rows,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    """Advance both moments of up to 64 rows and write their residuals."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    rows = gl.minimum((gl.load(row_ptr + ROWS) - start).to(gl.int32), 64)
    scaling = gl.load(row_ptr + SCALING).to(gl.float64, bitcast=True)
    coefficient = gl.load(decision_ptr + COEFFICIENT) * gl.load(hyper_ptr + SIGN) / scaling
    first_row = gl.load(row_ptr + RESIDUAL_ROW) + start
    residual_ptr += first_row * PRODUCTS
    centre_ptr += 4 * first_row
    direction_ptr += first_row * SQUARE
    g_ptr = residual_ptr.to(gl.pointer_type(gl.float32))
    _advance_first(
        row_ptr,
        hyper_ptr,
        coefficient,
        inverse_ptr,
        c_ptr,
        changed,
        start,
        rows,
        g_ptr,
        RANK,
        PRODUCTS // 2,
        GRAD_DTYPE,
    )
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * RANK
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32)) + start * PACKED
    eps = gl.load(hyper_ptr + EPS).to(gl.float32) * scale_of(partner_rows, RANK)
    counts = residual_weight(row_ptr)
    if changed != 0:
        _advance_second(
            number_ptr,
            hyper_ptr,
            c_ptr,
            counts,
            eps,
            rows,
            m_ptr,
            p_ptr,
            g_ptr,
            residual_ptr,
            centre_ptr,
            direction_ptr,
            RANK,
            PRODUCTS,
            True,
        )
    else:
        _advance_second(
            number_ptr,
            hyper_ptr,
            c_ptr,
            counts,
            eps,
            rows,
            m_ptr,
            p_ptr,
            g_ptr,
            residual_ptr,
            centre_ptr,
            direction_ptr,
            RANK,
            PRODUCTS,
            False,
        )
    tl.debug_barrier()
    second_rows(
        number_ptr,
        counts,
        eps,
        rows,
        m_ptr,
        p_ptr,
        residual_ptr,
        centre_ptr,
        direction_ptr,
        RANK,
        PRODUCTS,
    )


@gluon.jit
def _moments_hopper_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    change_ptr,
    changed_ptr,
    partner_ptr,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    WIDTH: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    i_tile = gl.program_id(0).to(gl.int64)
    side = gl.load(tiles_ptr + 3 * i_tile).to(gl.int64)
    start = gl.load(tiles_ptr + 3 * i_tile + 1).to(gl.int64)
    of_partner = gl.load(tiles_ptr + 3 * i_tile + 2)
    row_ptr = table_ptr + side * COLUMNS
    number_ptr = numbers_ptr + side * NUMBERS
    if (gl.load(number_ptr + MOVES) != 0) & (gl.load(decision_ptr + SKIP) == 0):
        partner_rows = gl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        if of_partner != 0:
            write_partner(row_ptr, start, partner_rows, partner_ptr, RANK, PRODUCTS, WIDTH)
        # The workspace is padded to tiles of which the last may have no rows.
        elif start < gl.load(row_ptr + ROWS):
            _move_moments(
                row_ptr,
                number_ptr,
                hyper_ptr,
                decision_ptr,
                inverse_ptr + (side ^ 1) * SQUARE * SQUARE,
                change_ptr + side * SQUARE * SQUARE,
                gl.load(changed_ptr + side),
                start,
                partner_rows,
                residual_ptr,
                centre_ptr,
                direction_ptr,
                RANK,
                PRODUCTS,
                GRAD_DTYPE,
            )
