"""Operands of the hot loop for compute capability 9.0, ranks 33 to 64, in Gluon; see ``operands``.

``moments_hopper`` calls them: it writes what most rows need itself, while their P is at hand.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from loft_kernels.backends.triton.centre import (
    clamped,
    inverse_norm,
    inverse_of,
    least_squares,
    shrink_of,
    sigma_sq_of,
)
from loft_kernels.backends.triton.operands import load_half, scale_of
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BIAS2,
    PARTNER_BASIS,
    PARTNER_ROW,
)

# The padded rank.
SQUARE = gl.constexpr(64)


@gluon.jit
def unforeseen(x):
    """Return a number that the compiler knows nothing about.

    Addresses that grow by a constant from row to row it would all keep, in more registers than
    there are.
    """
    return tl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
    )


@gluon.jit
def added(a, b, c, d):
    """Add pairs of numbers."""
    return a + c, b + d


@gluon.jit
def load_mirrored(p_ptr, o_u, o_v, RANK: gl.constexpr):
    """Load one row's P whole, from its upper triangle."""
    low = gl.minimum(o_u[:, None], o_v[None, :])
    high = gl.maximum(o_u[:, None], o_v[None, :])
    mask = (o_u < RANK)[:, None] & (o_v < RANK)[None, :]
    return gl.load(p_ptr + (low * RANK - (low * (low + 1)) // 2 + high), mask=mask, other=0.0)


@gluon.jit
def _direction(p, m_j, p_m, diagonal, alpha, o_u):
    """Find the direction of a row's second centre; see ``centre.second_direction``."""
    p_d = gl.sum(gl.where(diagonal, p, 0.0), axis=0)
    left = p_d - alpha * m_j * m_j
    # The first column of R whose entry on the diagonal is the largest.
    by_line: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [4, 1], [1, 0])
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, by_line))
    k = gl.min(gl.where(left == gl.max(left, axis=0), o_j, SQUARE - 1), axis=0)
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
def second_rows(
    number_ptr,
    counts,
    eps,
    rows,
    m_ptr,
    p_ptr,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
):
    """Write the residuals of the rows that ask for it again, with a second centre.

    On its own, and from memory: what few rows need must not take registers from all.
    """
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    by_line: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [4, 1], [1, 0])
    unbias1 = 1.0 / gl.load(number_ptr + BIAS1).to(gl.float32)
    unbias2 = 1.0 / gl.load(number_ptr + BIAS2).to(gl.float32)
    o_u = gl.arange(0, SQUARE, gl.SliceLayout(1, by_line))
    o_v = gl.arange(0, SQUARE, gl.SliceLayout(0, by_line))
    o_p = (o_u * RANK - (o_u * (o_u + 1)) // 2)[:, None] + o_v[None, :]
    upper = (o_u[:, None] <= o_v[None, :]) & (o_v < RANK)[None, :]
    diagonal = o_u[:, None] == o_v[None, :]
    for row in range(0, rows):
        centre = centre_ptr + 4 * row
        if gl.load(centre + 1) != 0.0:
            p = load_mirrored(p_ptr + row * PACKED, o_u, o_v, RANK) * unbias2
            unit = inverse_of(gl.max(gl.max(gl.where(diagonal, p, 0.0), axis=0), axis=0))
            p = p * unit
            root = gl.sqrt(unit) * unbias1
            m_row = m_ptr + row * RANK
            m_i = gl.load(m_row + o_u, mask=o_u < RANK, other=0.0) * root
            m_j = gl.load(m_row + o_v, mask=o_v < RANK, other=0.0) * root
            by_m = inverse_norm(gl.sum(m_j * m_j, axis=0))
            m_i, m_j = m_i * by_m, m_j * by_m
            p_m, p_sq = gl.reduce((p * m_i[:, None], p * p), 0, added)
            alpha, p_sq = gl.sum(p_m * m_j, axis=0), gl.sum(p_sq, axis=0)
            w = _direction(p, m_j, p_m, diagonal, alpha, o_u)
            x_j = w.to(gl.float32)
            x_i = gl.convert_layout(x_j, gl.SliceLayout(1, by_line))
            p_x = gl.sum(p * x_i[:, None], axis=0)
            m_x, x_sq = gl.sum(m_j * x_j, axis=0), gl.sum(x_j * x_j, axis=0)
            m_p_x, x_p_x = gl.sum(p_x * m_j, axis=0), gl.sum(p_x * x_j, axis=0)
            gain, b, c, less = least_squares(alpha, m_x, x_sq, m_p_x, x_p_x)
            a = alpha + gain
            p -= m_i[:, None] * (a * m_j + b * x_j)[None, :]
            p -= x_i[:, None] * (b * m_j + c * x_j)[None, :]
            sigma_sq = sigma_sq_of(clamped(p_sq - alpha * alpha - less, p_sq), unit)
            by_unit = sigma_sq / unit
            shrink = shrink_of(eps * gl.sqrt(sigma_sq))
            kept = by_unit * shrink * shrink * counts
            p = (p * gl.where(diagonal, kept, 2.0 * kept)).to(gl.float16)
            gl.store(residual_ptr + row * PRODUCTS + o_p, p, mask=upper)
            gl.store(direction_ptr + row * SQUARE + o_v, w)
            # Every warp has read what stood for b.
            tl.debug_barrier()
            gl.store(centre, a * by_m * by_m)
            gl.store(centre + 1, 2.0 * b * by_m * gl.sqrt(by_unit))
            gl.store(centre + 2, c * by_unit)
            gl.store(centre + 3, sigma_sq)


@gluon.jit
def write_partner(
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
    o_row = gl.arange(0, SQUARE, gl.SliceLayout(1, by_line))
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, by_line))
    # A number of the thread and literals, so that addresses cost next to nothing.
    near, far = o_row & 3, o_row & 60
    q_rows, live = (q_ptr + near * RANK) + far * RANK, o_row < rows
    m_q = live[:, None] & (o_j < RANK)[None, :]
    q = gl.load(q_rows[:, None] + o_j[None, :], mask=m_q, other=0.0) * (tau * tau)
    # Row i of the triangle: its entries (i, i) .. (i, r - 1) are contiguous.
    q_i = gl.load(q_rows, mask=live, other=0.0)
    for i in range(0, RANK):
        here = unforeseen(i)
        q_now, q_next = q_i, ((q_ptr + here + 1) + near * RANK) + far * RANK
        q_i = gl.load(q_next, mask=live & (i + 1 < RANK), other=0.0)
        out = out_ptr + (here * RANK - (here * (here + 1)) // 2)
        out = ((out + near * WIDTH)[:, None] + (o_j & 31)[None, :]) + (far * WIDTH)[:, None]
        mask = ((o_j >= i) & (o_j < RANK))[None, :]
        gl.store(out + (o_j & 32)[None, :], (q_now[:, None] * q).to(gl.float16), mask=mask)
    PADDING: gl.constexpr = PRODUCTS - PACKED
    o_half = o_row[:, None] * WIDTH + o_j[None, :]
    if PADDING > 0:
        zero = gl.zeros([SQUARE, SQUARE], gl.float16, by_line)
        gl.store(out_ptr + PACKED + o_half, zero, mask=(o_j < PADDING)[None, :])
    high, low, _ = load_half(q_ptr, o_row, rows, o_j, RANK, tau, 1, gl.float16)
    gl.store(out_ptr + PRODUCTS + o_half, high)
    gl.store(out_ptr + PRODUCTS + SQUARE + o_half, low)
