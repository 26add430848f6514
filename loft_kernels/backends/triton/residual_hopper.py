"""The residual of rows that stays in registers beside the tiles of the hot loop, in Gluon.

The same as ``residual``, as left operands of the tensor cores, for ``update_hopper``.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from loft_kernels.backends.triton.centre import (
    diagonal_of,
    enough,
    first_centre,
    from_row,
    moment_entries,
    norm_sq_of,
    pair_of,
    residual_weight,
    second_centre,
    second_entries,
    shrink_of,
    sigma_sq_of,
    sums_of,
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
    return a, b, c, sigma_sq, gl.convert_layout(w, left_wide), main, tail


@gluon.jit
def centred_rows(
    row_ptr,
    pairs_ptr,
    start,
    rank,
    unbias1,
    unbias2,
    BLOCK_M: gl.constexpr,
    BY_MAIN: gl.constexpr,
    BY_16: gl.constexpr,
    MAIN: gl.constexpr,
    TAIL: gl.constexpr,
    SECOND: gl.constexpr,
):
    """Load P of some rows and centre it along m.

    Returns:
        Whether a second centre is asked for (never without SECOND), and what `residual_rows` takes:
        P, m^T m and weights of both blocks of packed entries, a and sigma^2 in the rows of BY_MAIN.
    """
    rowwise16: gl.constexpr = gl.SliceLayout(1, BY_16)
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32))
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32))
    m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, gl.load(row_ptr + ROWS), start, rank)
    rowwise: gl.constexpr = gl.SliceLayout(1, BY_MAIN)
    o_row16 = gl.arange(0, BLOCK_M, rowwise16)
    o_16 = gl.arange(0, 16, gl.SliceLayout(0, BY_16))
    diagonal = diagonal_of(p_ptr, o_row16 < left, o_row16, o_16, rank) * unbias2
    unit16 = unit_of(diagonal)
    trace = gl.sum(diagonal, axis=1) * unit16
    m_sq = norm_sq_of(m_ptr, o_row16 < left, o_row16, o_16, rank, unbias1, unit16)
    unit = gl.convert_layout(unit16, rowwise)
    m_sq = gl.convert_layout(m_sq, rowwise)
    o_row = gl.arange(0, BLOCK_M, rowwise)
    o_k = gl.arange(0, MAIN, gl.SliceLayout(0, BY_MAIN))
    main = moment_entries(m_ptr, p_ptr, pairs_ptr, o_row, left, o_k, rank, unbias1, unbias2)
    p, m_m, weight = main
    p_sq, mpm = sums_of(p, m_m, weight[None, :], unit)
    tail = main
    if TAIL > 0:
        o_k = MAIN + o_16
        tail = moment_entries(m_ptr, p_ptr, pairs_ptr, o_row16, left, o_k, rank, unbias1, unbias2)
        p_t, m_m_t, weight_t = tail
        more = sums_of(p_t, m_m_t, weight_t[None, :], unit16)
        p_sq += gl.convert_layout(more[0], rowwise)
        mpm += gl.convert_layout(more[1], rowwise)
    a, r_sq = first_centre(p_sq, mpm, m_sq)
    second = left < 0
    if SECOND:
        limit = gl.convert_layout(trace_limit(p_sq, r_sq, a, m_sq), rowwise16)
        second = enough(trace < limit, gl.minimum(left, BLOCK_M))
    return second, (main, tail, a, sigma_sq_of(r_sq, unit))


@gluon.jit
def residual_rows(
    row_ptr,
    centred,
    eps,
    BLOCK_M: gl.constexpr,
    BY_16: gl.constexpr,
    WIDE: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Form the centred second moment of some rows in two blocks, as left operands of products.

    Before it: a, 2 b and c as rows of a tile have them (2 b and c with all scales, 0 without a
    second centre), sigma^2 in the rows of BY_16 and w.
    """
    rowwise16: gl.constexpr = gl.SliceLayout(1, BY_16)
    of_tile: gl.constexpr = gl.SliceLayout(1, WIDE)
    left_wide: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    main, tail, a, sigma_sq = centred
    p, m_m, weight = main
    shrink = shrink_of(eps * gl.sqrt(sigma_sq))
    counts = sigma_sq * shrink * shrink * residual_weight(row_ptr)
    r_main = (p - a[:, None] * m_m) * (counts[:, None] * weight[None, :])
    r_main = gl.convert_layout(r_main.to(gl.float16), left_wide)
    r_tail = r_main
    if TAIL > 0:
        p, m_m, weight = tail
        counts = gl.convert_layout(counts, rowwise16)
        r_tail = p - gl.convert_layout(a, rowwise16)[:, None] * m_m
        r_tail = (r_tail * (counts[:, None] * weight[None, :])).to(gl.float16)
        r_tail = gl.convert_layout(r_tail, left_wide)
    a = gl.convert_layout(a, of_tile)
    sigma_sq = gl.convert_layout(sigma_sq, rowwise16)
    none = gl.zeros([BLOCK_M], gl.float32, of_tile)
    w = gl.zeros([BLOCK_M, 16], gl.float16, left_wide)
    return a, none, none, sigma_sq, w, r_main, r_tail
