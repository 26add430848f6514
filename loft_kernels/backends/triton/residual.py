"""The residual of rows that stays beside the tiles of the hot loop: ranks up to 16.

One block of MAIN packed entries and one of TAIL, formed where they are used, once for a block of
rows. ``operands`` writes that of higher ranks to memory, ``residual_hopper`` is the same in Gluon.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.centre import (
    diagonal_of,
    enough,
    first_centre,
    moment_entries,
    norm_sq_of,
    pair_of,
    second_centre,
    second_entries,
    shrink_of,
    sigma_sq_of,
    sums_of,
    trace_limit,
    unit_of,
)
from loft_kernels.backends.triton.operands import select


@triton.jit
def residual_rows(
    m_ptr,
    p_ptr,
    pairs_ptr,
    o_row,
    rows,
    rank,
    unbias1,
    unbias2,
    counts,
    eps,
    R: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    SECOND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Form the centred second moment of some rows in two blocks; up to rank 16.

    Before it: whether there is a second centre, the coefficients of ``centre``, sigma^2 and w.
    """
    EXACT: tl.constexpr = tl.float32 == DTYPE
    packed = (rank * (rank + 1)) // 2
    o_k, o_t, o_r = tl.arange(0, MAIN), MAIN + tl.arange(0, 16), tl.arange(0, R)
    live = o_row < rows
    diagonal = diagonal_of(p_ptr, live, o_row, o_r, rank) * unbias2
    unit = unit_of(diagonal)
    m_sq = norm_sq_of(m_ptr, live, o_row, o_r, rank, unbias1, unit)
    p, m_m, weight = moment_entries(
        m_ptr, p_ptr, pairs_ptr, o_row, rows, o_k, rank, unbias1, unbias2
    )
    weight = weight[None, :]
    p_sq, mpm = sums_of(p, m_m, weight, unit)
    if TAIL > 0:
        p_t, m_m_t, weight_t = moment_entries(
            m_ptr, p_ptr, pairs_ptr, o_row, rows, o_t, rank, unbias1, unbias2
        )
        weight_t = weight_t[None, :]
        more = sums_of(p_t, m_m_t, weight_t, unit)
        p_sq, mpm = p_sq + more[0], mpm + more[1]
    a, r_sq = first_centre(p_sq, mpm, m_sq)
    sigma_sq = sigma_sq_of(r_sq, unit)
    shrink = shrink_of(eps * tl.sqrt(sigma_sq))
    scale = (sigma_sq * shrink * shrink)[:, None] * counts
    main = ((p - a[:, None] * m_m) * (scale * weight)).to(DTYPE)
    tail = main
    if TAIL > 0:
        tail = ((p_t - a[:, None] * m_m_t) * (scale * weight_t)).to(DTYPE)

    # The same with a second centre, if enough of the rows ask for it.
    b, c = tl.zeros_like(a), tl.zeros_like(a)
    w = tl.zeros((o_row.shape[0], R), DTYPE)
    second = rows < 0
    if SECOND:
        asking = tl.sum(diagonal, axis=1) * unit < trace_limit(p_sq, r_sq, a, m_sq)
        second = enough(asking, tl.minimum(rows, o_row.shape[0]))
        if second:
            _, w, by_m, a, gain, b, c, r_sq = second_centre(
                m_ptr, p_ptr, live, o_row, o_r, rank, unbias1, unbias2, unit, DTYPE
            )
            a += gain
            sigma_sq = sigma_sq_of(r_sq, unit)
            by_unit = sigma_sq / unit
            shrink = shrink_of(eps * tl.sqrt(sigma_sq))
            scale = (by_unit * shrink * shrink)[:, None]
            x = w.to(tl.float32)
            m_scale, p_scale = by_m * tl.sqrt(unit) * unbias1, unit * unbias2
            i, j = pair_of(pairs_ptr, o_k, packed)
            main = second_entries(
                m_ptr,
                p_ptr,
                pairs_ptr,
                select(x, i, o_k < packed, EXACT),
                select(x, j, o_k < packed, EXACT),
                o_row,
                rows,
                o_k,
                rank,
                m_scale,
                p_scale,
                a,
                b,
                c,
            )
            main = (main * scale).to(DTYPE)
            if TAIL > 0:
                i, j = pair_of(pairs_ptr, o_t, packed)
                tail = second_entries(
                    m_ptr,
                    p_ptr,
                    pairs_ptr,
                    select(x, i, o_t < packed, EXACT),
                    select(x, j, o_t < packed, EXACT),
                    o_row,
                    rows,
                    o_t,
                    rank,
                    m_scale,
                    p_scale,
                    a,
                    b,
                    c,
                )
                tail = (tail * scale).to(DTYPE)
            a, b, c = a * by_m * by_m, 2 * b * by_m * tl.sqrt(by_unit), c * by_unit
    return second, a, b, c, sigma_sq, w, main, tail
