"""The residual of rows that stays in registers beside the tiles of the hot loop, in Gluon.

The same as ``residual``, as left operands of the tensor cores, for ``update_hopper``.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from loft_kernels.backends.triton.centre import (
    clamped,
    diagonal_of,
    enough,
    from_row,
    pair_of,
    residual_weight,
    second_centre,
    second_entries,
    shrink_of,
    sigma_sq_of,
    sum_of_squares,
    trace_limit,
    unit_of,
)
from loft_kernels.backends.triton.tables import EXP_AVG, ROWS, SECOND_MOMENT


@gluon.jit
def _gathered(w, pairs_ptr, o_row, o_k, rank):
    """Pick w_i and w_j of packed entries."""
    i, j = pair_of(pairs_ptr, o_k, (rank * (rank + 1)) // 2)
    row = o_row[:, None] * 0
    return tl.gather(w, row + i[None, :], 1), tl.gather(w, row + j[None, :], 1)


@gluon.jit
def second_residual_rows(
    row_ptr,
    pairs_ptr,
    start,
    rank,
    unbias1,
    unbias2,
    eps,
    BLOCK_M: gl.constexpr,
    BY_MAIN: gl.constexpr,
    BY_16: gl.constexpr,
    WIDE: gl.constexpr,
    MAIN: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Return what ``residual_rows`` does, with a second centre; see ``residual``.

    Few blocks come here: all is loaded again, so that the others keep nothing for it.
    """
    rowwise: gl.constexpr = gl.SliceLayout(1, BY_MAIN)
    rowwise16: gl.constexpr = gl.SliceLayout(1, BY_16)
    left_wide: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32))
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32))
    m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, gl.load(row_ptr + ROWS), start, rank)
    o_row16 = gl.arange(0, BLOCK_M, rowwise16)
    o_16 = gl.arange(0, 16, gl.SliceLayout(0, BY_16))
    live = o_row16 < left
    unit = unit_of(diagonal_of(p_ptr, live, o_row16, o_16, rank) * unbias2)
    _, w, by_m, a, gain, b, c, r_sq = second_centre(
        m_ptr, p_ptr, live, o_row16, o_16, rank, unbias1, unbias2, unit, gl.float16
    )
    a += gain
    sigma_sq = sigma_sq_of(r_sq, unit)
    by_unit = sigma_sq / unit
    shrink = shrink_of(eps * gl.sqrt(sigma_sq))
    scale = by_unit * shrink * shrink
    m_scale, p_scale = by_m * gl.sqrt(unit) * unbias1, unit * unbias2
    x = w.to(gl.float32)
    o_main = gl.arange(0, BLOCK_M, rowwise)
    o_k = gl.arange(0, MAIN, gl.SliceLayout(0, BY_MAIN))
    w_i, w_j = _gathered(x, pairs_ptr, o_main, o_k, rank)
    main = second_entries(
        m_ptr,
        p_ptr,
        pairs_ptr,
        w_i,
        w_j,
        o_main,
        left,
        o_k,
        rank,
        gl.convert_layout(m_scale, rowwise),
        gl.convert_layout(p_scale, rowwise),
        gl.convert_layout(a, rowwise),
        gl.convert_layout(b, rowwise),
        gl.convert_layout(c, rowwise),
    )
    main = (main * gl.convert_layout(scale, rowwise)[:, None]).to(gl.float16)
    main = gl.convert_layout(main, left_wide)
    tail = main
    if TAIL > 0:
        w_i, w_j = _gathered(x, pairs_ptr, o_row16, MAIN + o_16, rank)
        tail = second_entries(
            m_ptr,
            p_ptr,
            pairs_ptr,
            w_i,
            w_j,
            o_row16,
            left,
            MAIN + o_16,
            rank,
            m_scale,
            p_scale,
            a,
            b,
            c,
        )
        tail = gl.convert_layout((tail * scale[:, None]).to(gl.float16), left_wide)
    a = gl.convert_layout(a * by_m * by_m, gl.SliceLayout(1, WIDE))
    b *= 2 * by_m * gl.sqrt(by_unit) * shrink * shrink
    b = gl.convert_layout(b, gl.SliceLayout(1, WIDE))
    c = gl.convert_layout(c * scale, gl.SliceLayout(1, WIDE))
    sigma_sq = gl.convert_layout(sigma_sq, gl.SliceLayout(1, WIDE))
    return a, b, c, sigma_sq, gl.convert_layout(w, left_wide), main, tail


@gluon.jit
def _block(
    of_rows,
    tables,
    FIRST: gl.constexpr,
    COLUMNS: gl.constexpr,
    PRODUCTS: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LEFT: gl.constexpr,
    SQUARE: gl.constexpr,
):
    """Return P, P counted twice off the diagonal, and m^T m likewise, of a block of columns."""
    m_high, m_low, p_ptr, scale, left = of_rows
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    right: gl.constexpr = gl.DotOperandLayout(1, SQUARE, 2)
    selection_ptr, weight_ptr = tables
    o_r = gl.arange(0, 16, gl.SliceLayout(1, right))
    o_n = gl.arange(0, COLUMNS, gl.SliceLayout(0, right))
    chosen_ptrs = selection_ptr + FIRST * 16 + (o_n[None, :] * 16 + o_r[:, None])
    none = gl.zeros([BLOCK_M, COLUMNS], gl.float32, SQUARE)
    chosen = gl.load(chosen_ptrs)
    m_i = mma_v2(m_high, chosen, mma_v2(m_low, chosen, none))
    chosen = gl.load(chosen_ptrs + PRODUCTS * 16)
    m_j = mma_v2(m_high, chosen, mma_v2(m_low, chosen, none))
    m_m = gl.convert_layout(m_i * m_j, LEFT, assert_trivial=True)
    o_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LEFT))
    o_k = FIRST + gl.arange(0, COLUMNS, gl.SliceLayout(0, LEFT))
    mask = (o_row < left)[:, None] & (o_k < PACKED)[None, :]
    p = gl.load(p_ptr + ((o_row * PACKED)[:, None] + o_k[None, :]), mask=mask, other=0.0)
    p = p * scale[:, None]
    return p, p * gl.load(weight_ptr + o_k)[None, :], m_m


@gluon.jit
def centred_rows(
    row_ptr,
    tables,
    start,
    unbias1,
    unbias2,
    RANK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WIDE: gl.constexpr,
    MAIN: gl.constexpr,
    TAIL: gl.constexpr,
    SECOND: gl.constexpr,
):
    """Load P of some rows and centre it along m.

    Whatever is picked out of a row, a product with 0, 1 and 2 on the tensor cores picks: rows lie
    as the products of tiles take them, and their sums are sums over four threads.

    Returns:
        Whether a second centre is asked for (never without SECOND), and what `residual_rows` takes:
        P and m^T m of both blocks of packed entries, counted twice off the diagonal, a, m P m^T,
        sigma^2 and its share of P.
    """
    SQUARE: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCK_M // 16, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    taken: gl.constexpr = gl.DotOperandLayout(0, SQUARE, 2)
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32))
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32))
    m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, gl.load(row_ptr + ROWS), start, RANK)
    o_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LEFT))
    o_16 = gl.arange(0, 16, gl.SliceLayout(0, LEFT))
    live = o_row < left
    diagonal = diagonal_of(p_ptr, live, o_row, o_16, RANK) * unbias2
    unit = unit_of(diagonal)
    mask = live[:, None] & (o_16 < RANK)[None, :]
    m = gl.load(m_ptr + (o_row[:, None] * RANK + o_16[None, :]), mask=mask, other=0.0)
    m *= (unbias1 * gl.sqrt(unit))[:, None]
    m_sq = sum_of_squares(m)
    some = m_sq > 1e-18
    by_m_sq = gl.where(some, 1.0 / gl.where(some, m_sq, 1.0), 0.0)
    # Of length 16, so that its low halves are no subnormal numbers.
    m *= 16.0 * gl.sqrt(by_m_sq)[:, None]
    m_high = m.to(gl.float16)
    m_low = gl.convert_layout((m - m_high.to(gl.float32)).to(gl.float16), taken)
    m_high = gl.convert_layout(m_high, taken)
    of_rows = (m_high, m_low, p_ptr, unit * unbias2, left)
    PRODUCTS: gl.constexpr = MAIN + TAIL
    p, main, m_m = _block(of_rows, tables, 0, MAIN, PRODUCTS, RANK, BLOCK_M, LEFT, SQUARE)
    p_sq, mpm = gl.sum(p * main, axis=1), gl.sum(p * m_m, axis=1)
    tail, m_m_t = main, m_m
    if TAIL > 0:
        p, tail, m_m_t = _block(of_rows, tables, MAIN, TAIL, PRODUCTS, RANK, BLOCK_M, LEFT, SQUARE)
        p_sq += gl.sum(p * tail, axis=1)
        mpm += gl.sum(p * m_m_t, axis=1)
    along = mpm * (1.0 / 256.0)
    r_sq = clamped(p_sq - along * along, p_sq)
    second = left < 0
    if SECOND:
        trace = gl.sum(diagonal, axis=1) * unit
        asking = trace < trace_limit(p_sq, r_sq, along, 1.0)
        second = enough(asking, gl.minimum(left, BLOCK_M))
    sigma_sq = sigma_sq_of(r_sq, unit)
    moments = (main, tail, m_m, m_m_t)
    return second, (moments, along * by_m_sq, mpm * (1.0 / 65536.0), sigma_sq, sigma_sq / unit)


@gluon.jit
def residual_rows(row_ptr, centred, eps, BLOCK_M: gl.constexpr, WIDE: gl.constexpr):
    """Form the centred second moment of some rows in two blocks, as left operands of products.

    Before it: a, 2 b and c as rows of a tile have them (2 b and c with all scales, 0 without a
    second centre), sigma^2 and w.
    """
    of_tile: gl.constexpr = gl.SliceLayout(1, WIDE)
    moments, a, along, sigma_sq, by_unit = centred
    main, tail, m_m, m_m_t = moments
    shrink = shrink_of(eps * gl.sqrt(sigma_sq))
    counts = by_unit * shrink * shrink * residual_weight(row_ptr)
    main = ((main - along[:, None] * m_m) * counts[:, None]).to(gl.float16)
    tail = ((tail - along[:, None] * m_m_t) * counts[:, None]).to(gl.float16)
    a, sigma_sq = gl.convert_layout(a, of_tile), gl.convert_layout(sigma_sq, of_tile)
    none = gl.zeros([BLOCK_M], gl.float32, of_tile)
    w = gl.zeros([BLOCK_M, 16], gl.float16, gl.DotOperandLayout(0, WIDE, 2))
    return a, none, none, sigma_sq, w, main, tail
