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
    clamped,
    first_centre,
    inverse_norm,
    inverse_of,
    least_squares,
    residual_weight,
    shrink_of,
    sigma_sq_of,
    trace_limit,
)
from loft_kernels.backends.triton.moments import C_SCALE, UNSCALE, powers
from loft_kernels.backends.triton.operands import load_half, scale_of
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
    PARTNER_BASIS,
    PARTNER_ROW,
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

# The padded rank.
_R = gl.constexpr(64)

# Where the largest square of a row's g and the sum of those of its m are parked, behind g.
_G_SQ, _M_SQ = gl.constexpr(64), gl.constexpr(65)

# Rows of an fp64 product's instruction, as the compiler itself chooses them.
_ROWS64 = gl.constexpr(16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 8)


@gluon.jit
def _product64(
    a_ptr, a_row, a_col, rows, b_ptr, b_row, b_col, RANK: gl.constexpr, WIDE: gl.constexpr
):
    """Multiply 64 rows of a strided matrix by an R x R matrix in fp64, 16 columns at a time."""
    left: gl.constexpr = gl.DotOperandLayout(0, WIDE, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, WIDE, 1)
    o_row = gl.arange(0, _R, gl.SliceLayout(1, left))
    o_a = gl.arange(0, 16, gl.SliceLayout(0, left))
    o_b = gl.arange(0, 16, gl.SliceLayout(1, right))
    o_col = gl.arange(0, _R, gl.SliceLayout(0, right))
    acc = gl.zeros([_R, _R], gl.float64, WIDE)
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
    o_row = gl.arange(0, _R, gl.SliceLayout(1, wide))
    o_col = gl.arange(0, _R, gl.SliceLayout(0, wide))
    grad_row, grad_col = gl.load(row_ptr + GRAD_STRIDE_ROW), gl.load(row_ptr + GRAD_STRIDE_COL)
    grad = gl.load(row_ptr + GRAD).to(gl.pointer_type(GRAD_DTYPE)) + start * grad_row
    g = _product64(grad, grad_row, grad_col, rows, inverse_ptr, 1, _R, RANK, wide) * coefficient
    g32 = g.to(gl.float32)
    gl.store(g_ptr + (o_row[:, None] * STRIDE + o_col[None, :]), g32)
    gl.store(g_ptr + (o_row * STRIDE + _G_SQ), gl.max(g32 * g32, axis=1))
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * RANK
    o_m = o_row[:, None] * RANK + o_col[None, :]
    mask = (o_row < rows)[:, None] & (o_col < RANK)[None, :]
    if changed != 0:
        m = _product64(m_ptr, RANK, 1, rows, c_ptr, _R, 1, RANK, wide)
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
    o_i = gl.arange(0, _R, gl.SliceLayout(1, ROWWISE))
    o_j = gl.arange(0, _R, gl.SliceLayout(0, ROWWISE))
    c = gl.load(c_ptr + o_i[:, None] * _R + o_j[None, :]) * C_SCALE
    high = c.to(gl.float16)
    return high, (c - high.to(gl.float32)).to(gl.float16)


@gluon.jit
def _carry(t, s_c_high, s_c_low, up):
    """Form C^T P C, scaled, from the upper triangle of P with half its diagonal.

    What lies in shared memory lies there one after the other, in the same place.
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _R, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_R, _R], gl.float16)
    t = t * up
    high = t.to(gl.float16)
    s_high = gl.allocate_shared_memory(gl.float16, [_R, _R], tile, high)
    low = (t - high.to(gl.float32)).to(gl.float16)
    s_low = gl.allocate_shared_memory(gl.float16, [_R, _R], tile, low)
    # One of two mirrored entries is zero, so the halves of P are the sums of the halves of T.
    high = s_high.load(left) + s_high.permute((1, 0)).load(left)
    low = s_low.load(left) + s_low.permute((1, 0)).load(left)
    none = gl.zeros([_R, _R], gl.float32, wide)
    y = warpgroup_mma(low, s_c_high, none, use_acc=False, is_async=True)
    y = warpgroup_mma(high, s_c_low, y, is_async=True)
    y = warpgroup_mma(high, s_c_high, y, is_async=True)
    y = warpgroup_mma_wait(0, deps=[y])
    y_high = y.to(gl.float16)
    s_y_high = gl.allocate_shared_memory(gl.float16, [_R, _R], tile, y_high)
    y_low = (y - y_high.to(gl.float32)).to(gl.float16)
    s_y_low = gl.allocate_shared_memory(gl.float16, [_R, _R], tile, y_low)
    fence_async_shared()
    tl.debug_barrier()
    c_low_t, c_high_t = s_c_low.permute((1, 0)), s_c_high.permute((1, 0))
    p = warpgroup_mma(c_low_t, s_y_high, none, use_acc=False, is_async=True)
    p = warpgroup_mma(c_high_t, s_y_low, p, is_async=True)
    p = warpgroup_mma(c_high_t, s_y_high, p, is_async=True)
    return warpgroup_mma_wait(0, deps=[p])


@gluon.jit
def _unforeseen(x):
    """Return a number that the compiler knows nothing about.

    Addresses that grow by a constant from row to row it would all keep, in more registers than
    there are.
    """
    return tl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _triangle_row(o_row, nothing, RANK: gl.constexpr):
    """Return where rows of a packed triangle begin, less their number; nothing is 0.

    From the row of the warp and a literal, so that they need not be kept.
    """
    warp, own = o_row & 48, o_row & 15
    begin = warp * RANK - (warp * (warp + 1)) // 2 + nothing
    return begin + own * (RANK - warp + nothing) - (own * (own + 1)) // 2


@gluon.jit
def _added(a, b, c, d, e, f):
    """Add triples of numbers."""
    return a + d, b + e, c + f


@gluon.jit
def _direction(p, m_i, m_j, p_m, diagonal, alpha, o_u):
    """Find the direction of a row's second centre; see ``centre.second_direction``."""
    p_d = gl.sum(gl.where(diagonal, p, 0.0), axis=0)
    left = p_d - alpha * m_j * m_j
    # The first column of R whose entry on the diagonal is the largest.
    o_j = gl.arange(0, _R, left.type.layout)
    k = gl.min(gl.where(left == gl.max(left, axis=0), o_j, _R - 1), axis=0)
    column = gl.sum(gl.where(o_u[:, None] == k, p, 0.0), axis=0)
    column -= alpha * gl.sum(gl.where(o_j == k, m_j, 0.0), axis=0) * m_j
    w = p_m - alpha * m_j
    w += column * gl.where(gl.sum(gl.where(o_j == k, w, 0.0), axis=0) < 0, -1.0, 1.0)
    # Twice: where P is m^T m the first leaves rounding errors, and these are not orthogonal to m.
    w *= inverse_norm(gl.sum(w * w, axis=0))
    w -= gl.sum(w * m_j, axis=0) * m_j
    w *= inverse_norm(gl.sum(w * w, axis=0))
    return (w - gl.sum(w * m_j, axis=0) * m_j).to(gl.float16)


@gluon.jit
def _load_mirrored(p_ptr, o_u, o_v, RANK: gl.constexpr):
    """Load one row's P whole, from its upper triangle."""
    low = gl.minimum(o_u[:, None], o_v[None, :])
    high = gl.maximum(o_u[:, None], o_v[None, :])
    mask = (o_u < RANK)[:, None] & (o_v < RANK)[None, :]
    return gl.load(p_ptr + (low * RANK - (low * (low + 1)) // 2 + high), mask=mask, other=0.0)


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
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_R, _R], gl.float16)
    if CARRY:
        c_high, c_low = _halves_of(c_ptr, by_row)
        s_c_high = gl.allocate_shared_memory(gl.float16, [_R, _R], tile, c_high)
        s_c_low = gl.allocate_shared_memory(gl.float16, [_R, _R], tile, c_low)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        s_t = gl.allocate_shared_memory(
            gl.float32, [_R, _R], plain, gl.zeros([_R, _R], gl.float32, by_row)
        )
        fence_async_shared()
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_g = gl.allocate_shared_memory(gl.float32, [_R], vector)
    s_m = gl.allocate_shared_memory(gl.float32, [_R], vector)
    s_w = gl.allocate_shared_memory(gl.float32, [_R], vector)
    tl.debug_barrier()
    beta2 = gl.load(hyper_ptr + BETA2)
    fresh2, beta2 = (1.0 - beta2).to(gl.float32), beta2.to(gl.float32)
    unbias1 = 1.0 / gl.load(number_ptr + BIAS1).to(gl.float32)
    unbias2 = 1.0 / gl.load(number_ptr + BIAS2).to(gl.float32)
    # As the tensor cores take P: j = i compares one number of the thread with literals.
    o_i = gl.arange(0, _R, gl.SliceLayout(1, by_row))
    o_j = gl.arange(0, _R, gl.SliceLayout(0, by_row))
    across = (o_j >> 1)[None, :] - ((o_i >> 4) << 3)[:, None]
    diagonal = (across == ((o_i & 15) >> 1)[:, None]) & ((o_i & 1)[:, None] == (o_j & 1)[None, :])
    # As P and R lie in memory: every line of a warp is contiguous, and so it is with j >= i.
    o_u = gl.arange(0, _R, gl.SliceLayout(1, by_line))
    o_v = gl.arange(0, _R, gl.SliceLayout(0, by_line))
    u_warp, u_own = o_u & 48, o_u & 15
    v_lane, v_own = o_v & 31, o_v & 32
    ahead, behind = v_lane[None, :] - u_warp[:, None], u_own[:, None] - v_own[None, :]
    upper, diagonal_p = ahead >= behind, ahead == behind
    if RANK < _R:
        upper = upper & (o_v < RANK)[None, :]
    o_d, m_d = o_v * RANK - (o_v * (o_v - 1)) // 2, o_v < RANK
    if CARRY:
        o_p = _triangle_row(o_u, 0, RANK)[:, None] + v_lane[None, :]
        _fetch(s_t, (p_ptr + o_p) + v_own[None, :], mask=upper)
        async_copy.commit_group()
    # P is positive semidefinite: its largest entry stands on the diagonal.
    top = gl.max(gl.load(p_ptr + o_d, mask=m_d, other=0.0), axis=0)
    for row in range(0, rows):
        here = _unforeseen(row)
        p_row, m_row = p_ptr + here * PACKED, m_ptr + here * RANK
        g_row, out_row = g_ptr + here * (PRODUCTS // 2), residual_ptr + here * PRODUCTS
        # Early, so that they have arrived when they are needed.
        g_j = gl.load((g_row + v_lane) + v_own)
        m_j = gl.load((m_row + v_lane) + v_own, mask=o_v < RANK, other=0.0)
        g_sq, m_sq = gl.load(g_row + _G_SQ), gl.load(g_row + _M_SQ)
        if CARRY:
            up, down = powers(top)
            async_copy.wait_group(0)
            tl.debug_barrier()
            t = s_t.load(by_row)
            carried = _carry(gl.where(diagonal, 0.5 * t, t), s_c_high, s_c_low, up)
            s_g.store(g_j)
            s_m.store(m_j)
            s_p = gl.allocate_shared_memory(gl.float32, [_R, _R], swizzled, carried)
            p = s_p.load(by_line) * (beta2 * down * UNSCALE)
        else:
            p = beta2 * _load_mirrored(p_row, o_u, o_v, RANK)
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
        fresh = fresh2 * g_sq
        unit = inverse_of(gl.maximum(beta2 * top, fresh) * unbias2)
        p = p * (unbias2 * unit)
        root = gl.sqrt(unit) * unbias1
        m_i, m_j = m_i * root, m_j * root
        p_m, p_sq, trace = gl.reduce(
            (p * m_i[:, None], p * p, gl.where(diagonal_p, p, 0.0)), 0, _added
        )
        m_sq = m_sq * (root * root)
        mpm, p_sq = gl.sum(p_m * m_j, axis=0), gl.sum(p_sq, axis=0)
        a, r_sq = first_centre(p_sq, mpm, m_sq)
        limit = trace_limit(p_sq, r_sq, a, m_sq)
        asks = (gl.sum(trace, axis=0) < limit) & (counts > 0.0)
        b, c = a * 0.0, a * 0.0
        w = gl.zeros([_R], gl.float16, gl.SliceLayout(0, by_line))
        if asks:
            by_m = inverse_norm(m_sq)
            m_i, m_j, p_m = m_i * by_m, m_j * by_m, p_m * by_m
            alpha = gl.sum(p_m * m_j, axis=0)
            w = _direction(p, m_i, m_j, p_m, diagonal_p, alpha, o_u)
            x_j = w.to(gl.float32)
            s_w.store(x_j)
            tl.debug_barrier()
            x_i = s_w.load(gl.SliceLayout(1, by_line))
            p_x = gl.sum(p * x_i[:, None], axis=0)
            m_x, x_sq = gl.sum(m_j * x_j, axis=0), gl.sum(x_j * x_j, axis=0)
            m_p_x, x_p_x = gl.sum(p_x * m_j, axis=0), gl.sum(p_x * x_j, axis=0)
            gain, b, c, less = least_squares(alpha, m_x, x_sq, m_p_x, x_p_x)
            a = alpha + gain
            p -= m_i[:, None] * (a * m_j + b * x_j)[None, :]
            p -= x_i[:, None] * (b * m_j + c * x_j)[None, :]
            r_sq = clamped(p_sq - alpha * alpha - less, p_sq)
            a, b = a * by_m * by_m, 2.0 * b * by_m
        else:
            p -= (a * m_i)[:, None] * m_j[None, :]
        sigma_sq = sigma_sq_of(r_sq, unit)
        by_unit = sigma_sq / unit
        shrink = shrink_of(eps * gl.sqrt(sigma_sq))
        kept = by_unit * shrink * shrink * counts
        p = p * gl.where(diagonal_p, kept, 2.0 * kept)
        centre = centre_ptr + 4 * row
        gl.store(centre, a)
        gl.store(centre + 1, b * gl.sqrt(by_unit))
        gl.store(centre + 2, c * by_unit)
        gl.store(centre + 3, sigma_sq)
        gl.store(direction_ptr + row * _R + o_v, w)
        gl.store((out_row + o_p) + v_own[None, :], p.to(gl.float16), mask=upper)
        PADDING: gl.constexpr = PRODUCTS - PACKED
        if PADDING > 0:
            zero = gl.zeros([_R], gl.float16, gl.SliceLayout(0, by_row))
            gl.store(out_row + PACKED + o_j, zero, mask=o_j < PADDING)
        top = gl.max(diagonal_next, axis=0)


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
    direction_ptr += first_row * _R
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


@gluon.jit
def _write_partner(
    row_ptr,
    start,
    partner_rows,
    out_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Write the operands of 64 partner rows; rows beyond the last are zero."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    by_line: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    q_ptr = gl.load(row_ptr + PARTNER_BASIS).to(gl.pointer_type(gl.float32)) + start * RANK
    out_ptr += (gl.load(row_ptr + PARTNER_ROW) + start) * WIDTH
    rows = (partner_rows - start).to(gl.int32)
    tau = scale_of(partner_rows, RANK)
    o_row = gl.arange(0, _R, gl.SliceLayout(1, by_line))
    o_j = gl.arange(0, _R, gl.SliceLayout(0, by_line))
    # A number of the thread and literals, so that addresses cost next to nothing.
    near, far = o_row & 3, o_row & 60
    q_rows, live = (q_ptr + near * RANK) + far * RANK, o_row < rows
    m_q = live[:, None] & (o_j < RANK)[None, :]
    q = gl.load(q_rows[:, None] + o_j[None, :], mask=m_q, other=0.0) * (tau * tau)
    # Row i of the triangle: its entries (i, i) .. (i, r - 1) are contiguous.
    q_i = gl.load(q_rows, mask=live, other=0.0)
    for i in range(0, RANK):
        here = _unforeseen(i)
        q_now, q_next = q_i, ((q_ptr + here + 1) + near * RANK) + far * RANK
        q_i = gl.load(q_next, mask=live & (i + 1 < RANK), other=0.0)
        out = out_ptr + (here * RANK - (here * (here + 1)) // 2)
        out = ((out + near * WIDTH)[:, None] + (o_j & 31)[None, :]) + (far * WIDTH)[:, None]
        mask = ((o_j >= i) & (o_j < RANK))[None, :]
        gl.store(out + (o_j & 32)[None, :], (q_now[:, None] * q).to(gl.float16), mask=mask)
    PADDING: gl.constexpr = PRODUCTS - PACKED
    o_half = o_row[:, None] * WIDTH + o_j[None, :]
    if PADDING > 0:
        zero = gl.zeros([_R, _R], gl.float16, by_line)
        gl.store(out_ptr + PACKED + o_half, zero, mask=(o_j < PADDING)[None, :])
    high, low, _ = load_half(q_ptr, o_row, rows, o_j, RANK, tau, 1, gl.float16)
    gl.store(out_ptr + PRODUCTS + o_half, high)
    gl.store(out_ptr + PRODUCTS + _R + o_half, low)


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
            _write_partner(row_ptr, start, partner_rows, partner_ptr, RANK, PRODUCTS, WIDTH)
        else:
            _move_moments(
                row_ptr,
                number_ptr,
                hyper_ptr,
                decision_ptr,
                inverse_ptr + (side ^ 1) * _R * _R,
                change_ptr + side * _R * _R,
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
