"""The residual of rows that stays in registers beside the tiles of the hot loop, in Gluon.

The same as ``residual``, as left operands of the tensor cores, for ``update_hopper``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from loft_kernels.backends.triton.centre import (
    clamped,
    diagonal_of,
    enough,
    first_centre,
    from_row,
    less_second,
    moment_entries,
    norm_sq_of,
    residual_weight,
    second_centre,
    second_direction,
    second_sums,
    second_terms,
    shrink_of,
    sigma_sq_of,
    sums_of,
    trace_limit,
    unit_of,
)
from loft_kernels.backends.triton.tables import EXP_AVG, ROWS, SECOND_MOMENT


@gluon.jit
def _first_rows(
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
):
    """Load the moments of some rows and find the first centre.

    Returns what a block of packed entries is made of (P^, m^^T m^, weights) for both blocks, the
    units in both layouts, a, |P|^2, |R|^2 and how far the trace is below its limit.
    """
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32))
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32))
    m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, gl.load(row_ptr + ROWS), start, rank)
    rowwise: gl.constexpr = gl.SliceLayout(1, BY_MAIN)
    rowwise16: gl.constexpr = gl.SliceLayout(1, BY_16)
    o_row16 = gl.arange(0, BLOCK_M, rowwise16)
    o_16 = gl.arange(0, 16, gl.SliceLayout(0, BY_16))
    diagonal = diagonal_of(p_ptr, o_row16 < left, o_row16, o_16, rank) * unbias2
    unit16 = unit_of(diagonal)
    m_sq = norm_sq_of(m_ptr, o_row16 < left, o_row16, o_16, rank, unbias1, unit16)
    unit = gl.convert_layout(unit16, rowwise)
    m_sq = gl.convert_layout(m_sq, rowwise)
    o_row = gl.arange(0, BLOCK_M, rowwise)
    o_k = gl.arange(0, MAIN, gl.SliceLayout(0, BY_MAIN))
    p, m_m, weight = moment_entries(
        m_ptr, p_ptr, pairs_ptr, o_row, left, o_k, rank, unbias1, unbias2
    )
    main = (p, m_m, weight[None, :])
    tail = main
    p_sq, mpm = sums_of(main[0], main[1], main[2], unit)
    if TAIL > 0:
        p_t, m_m_t, weight_t = moment_entries(
            m_ptr, p_ptr, pairs_ptr, o_row16, left, MAIN + o_16, rank, unbias1, unbias2
        )
        tail = (p_t, m_m_t, weight_t[None, :])
        more = sums_of(tail[0], tail[1], tail[2], unit16)
        p_sq += gl.convert_layout(more[0], rowwise)
        mpm += gl.convert_layout(more[1], rowwise)
    a, r_sq = first_centre(p_sq, mpm, m_sq)
    limit = gl.convert_layout(trace_limit(p_sq, r_sq, a, m_sq), rowwise16)
    below = limit - gl.sum(diagonal, axis=1) * unit16
    return main, tail, unit, unit16, a, p_sq, r_sq, below


@gluon.jit
def _second_rows(
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
    """Return what ``residual_rows`` does, anew for a second centre; see ``residual``.

    Few blocks come here: all is loaded again, so that the others keep nothing for it.
    """
    rowwise: gl.constexpr = gl.SliceLayout(1, BY_MAIN)
    rowwise16: gl.constexpr = gl.SliceLayout(1, BY_16)
    left_wide: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    main, tail, unit, unit16, a, p_sq, r_sq, _ = _first_rows(
        row_ptr, pairs_ptr, start, rank, unbias1, unbias2, BLOCK_M, BY_MAIN, BY_16, MAIN, TAIL
    )
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32))
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32))
    m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, gl.load(row_ptr + ROWS), start, rank)
    o_row, o_row16 = gl.arange(0, BLOCK_M, rowwise), gl.arange(0, BLOCK_M, rowwise16)
    o_16 = gl.arange(0, 16, gl.SliceLayout(0, BY_16))
    o_k = gl.arange(0, MAIN, gl.SliceLayout(0, BY_MAIN))
    m, w, by_m, _, _ = second_direction(
        m_ptr, p_ptr, o_row16 < left, o_row16, o_16, rank, unbias1, unbias2, unit16
    )
    half = w.to(gl.float16)
    w = half.to(gl.float32)
    m_w = gl.convert_layout(gl.sum(m * w, axis=1), rowwise)
    w_sq = gl.convert_layout(gl.sum(w * w, axis=1), rowwise)
    m_scale16 = by_m * gl.sqrt(unit16) * unbias1
    m_scale = gl.convert_layout(m_scale16, rowwise)
    by_m = gl.convert_layout(by_m, rowwise)
    r_main = (main[0] - a[:, None] * main[1]) * unit[:, None]
    terms = second_terms(m_ptr, w, pairs_ptr, o_row, left, o_k, rank, m_scale)
    m_r_w, w_r_w = second_sums(r_main, main[2], terms)
    if TAIL > 0:
        r_tail = (tail[0] - gl.convert_layout(a, rowwise16)[:, None] * tail[1]) * unit16[:, None]
        terms_t = second_terms(m_ptr, w, pairs_ptr, o_row16, left, MAIN + o_16, rank, m_scale16)
        sums = second_sums(r_tail, tail[2], terms_t)
        m_r_w += gl.convert_layout(sums[0], rowwise)
        w_r_w += gl.convert_layout(sums[1], rowwise)
    b, c, gain, lost = second_centre(m_r_w, w_r_w, m_w, w_sq)
    sigma_sq = sigma_sq_of(clamped(r_sq - lost, p_sq), unit)
    by_unit = sigma_sq / unit
    shrink = shrink_of(eps * gl.sqrt(sigma_sq))
    counts = by_unit * shrink * shrink
    r_main = less_second(r_main, terms, gain, b, c) * (counts[:, None] * main[2])
    r_main = gl.convert_layout(r_main.to(gl.float16), left_wide)
    if TAIL > 0:
        r_tail = less_second(
            r_tail,
            terms_t,
            gl.convert_layout(gain, rowwise16),
            gl.convert_layout(b, rowwise16),
            gl.convert_layout(c, rowwise16),
        )
        r_tail *= gl.convert_layout(counts, rowwise16)[:, None] * tail[2]
        r_tail = gl.convert_layout(r_tail.to(gl.float16), left_wide)
    else:
        r_tail = r_main
    a = gl.convert_layout(a + gain * by_m * by_m, gl.SliceLayout(1, WIDE))
    b *= 2 * by_m * gl.sqrt(by_unit) * shrink * shrink
    b = gl.convert_layout(b, gl.SliceLayout(1, WIDE))
    c = gl.convert_layout(c * counts, gl.SliceLayout(1, WIDE))
    w = gl.convert_layout(half, left_wide)
    return a, b, c, gl.convert_layout(sigma_sq, rowwise16), w, r_main, r_tail


@gluon.jit
def residual_rows(
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
    SECOND: gl.constexpr,
):
    """Form the centred second moment of some rows in two blocks, as left operands of products.

    Before it: whether there is a second centre, a, 2 b and c as rows of a tile have them (2 b and c
    with all scales, 0 without a second centre), sigma^2 in the rows of BY_16 and w.
    """
    rowwise16: gl.constexpr = gl.SliceLayout(1, BY_16)
    left_wide: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    main, tail, unit, _, a, _, r_sq, below = _first_rows(
        row_ptr, pairs_ptr, start, rank, unbias1, unbias2, BLOCK_M, BY_MAIN, BY_16, MAIN, TAIL
    )
    sigma_sq = sigma_sq_of(r_sq, unit)
    shrink = shrink_of(eps * gl.sqrt(sigma_sq))
    counts = sigma_sq * shrink * shrink * residual_weight(row_ptr)
    r_main = (main[0] - a[:, None] * main[1]) * (counts[:, None] * main[2])
    r_main = gl.convert_layout(r_main.to(gl.float16), left_wide)
    r_tail = r_main
    if TAIL > 0:
        counts16 = gl.convert_layout(counts, rowwise16)
        r_tail = tail[0] - gl.convert_layout(a, rowwise16)[:, None] * tail[1]
        r_tail = (r_tail * (counts16[:, None] * tail[2])).to(gl.float16)
        r_tail = gl.convert_layout(r_tail, left_wide)
    a = gl.convert_layout(a, gl.SliceLayout(1, WIDE))
    sigma_sq = gl.convert_layout(sigma_sq, rowwise16)
    b = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, WIDE))
    c = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, WIDE))
    w = gl.zeros([BLOCK_M, 16], gl.float16, left_wide)
    left = (gl.load(row_ptr + ROWS) - start).to(gl.int32)
    second = left < 0
    if SECOND:
        second = enough(below > 0, gl.minimum(left, BLOCK_M))
        if second:
            a, b, c, sigma_sq, w, r_main, r_tail = _second_rows(
                row_ptr,
                pairs_ptr,
                start,
                rank,
                unbias1,
                unbias2,
                eps,
                BLOCK_M,
                BY_MAIN,
                BY_16,
                WIDE,
                MAIN,
                TAIL,
            )
    return second, a, b, c, sigma_sq, w, r_main, r_tail
