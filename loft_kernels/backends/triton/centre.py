"""How a row's second moment is centred, so that fp16 touches only what is left of it.

With any numbers a, b, c and any vector w, m~ = m^ Q_j^T and w~ = w Q_j^T,

    R = P^ - a m^^T m^ - b (m^^T w + w^T m^) - c w^T w
    Q_j P^ Q_j^T = a m~^2 + 2 b m~ w~ + c w~^2 + Q_j R Q_j^T

and fp16 errs in proportion to |R|. The first centre takes b = c = 0 and the a of the smallest |R|.
It leaves a large R where P is close to rank two: directions taking turns, a direction that has just
changed. There the second one adds w, what P m^ leaves of m^ (a step of Lanczos' method), rounded to
fp16, so that w~ costs two products of halves and is as exact as m~.

All of it is computed in units of the row's largest entry of P, or of its trace (`moments_hopper`).
The helpers make no tensors of their own, so that kernels of any layout can use them: index tensors
come from the caller.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.tables import STEP


@triton.jit
def from_row(m_ptr, p_ptr, rows, start, rank):
    """Move m, P and the number of rows to start at a row, so that offsets fit 32 bits."""
    packed = (rank * (rank + 1)) // 2
    return m_ptr + start * rank, p_ptr + start * packed, (rows - start).to(tl.int32)


@triton.jit
def pair_of(pairs_ptr, o_k, packed):
    """Return the pair (i, j) of every packed entry; (0, 0) beyond the last."""
    pair = tl.load(pairs_ptr + o_k, mask=o_k < packed, other=0)
    return pair & 0xFFFF, pair >> 16


@triton.jit
def pair_entries(x_ptr, o_row, i, j, mask, rank):
    """Load x_i and x_j of some rows for some pairs: ``rows x pairs``."""
    x_i = tl.load(x_ptr + (o_row[:, None] * rank + i[None, :]), mask=mask, other=0.0)
    x_j = tl.load(x_ptr + (o_row[:, None] * rank + j[None, :]), mask=mask, other=0.0)
    return x_i, x_j


@triton.jit
def moment_entries(m_ptr, p_ptr, pairs_ptr, o_row, rows, o_k, rank, unbias1, unbias2):
    """Load a tile of P^ and form m^^T m^ and the weights (2 off the diagonal) beside it."""
    packed = (rank * (rank + 1)) // 2
    i, j = pair_of(pairs_ptr, o_k, packed)
    mask = (o_row < rows)[:, None] & (o_k < packed)[None, :]
    p = tl.load(p_ptr + (o_row[:, None] * packed + o_k[None, :]), mask=mask, other=0.0)
    m_i, m_j = pair_entries(m_ptr, o_row, i, j, mask, rank)
    return p * unbias2, m_i * m_j * (unbias1 * unbias1), tl.where(i == j, 1.0, 2.0)


@triton.jit
def diagonal_of(p_ptr, live, o_row, o_col, rank):
    """Load the diagonals of some rows' P: ``rows x columns``."""
    o_diagonal = (o_col * rank - (o_col * (o_col - 1)) // 2)[None, :]
    o_diagonal += o_row[:, None] * ((rank * (rank + 1)) // 2)
    mask = live[:, None] & (o_col < rank)[None, :]
    return tl.load(p_ptr + o_diagonal, mask=mask, other=0.0)


@triton.jit
def unit_of(diagonal):
    """Return what brings the largest entry of P to 1, so that no square of it underflows.

    P is positive semidefinite: its largest entry stands on the diagonal.
    """
    return inverse_of(tl.max(diagonal, axis=1))


@triton.jit
def inverse_of(top):
    """Return what brings an entry of P to 1, and 1 for one that is next to nothing."""
    return tl.where(top > 1e-37, 1.0 / tl.where(top > 1e-37, top, 1.0), 1.0)


@triton.jit
def sums_of(p, m_m, weight, unit):
    """Return |P|^2 and m P m^T over some packed entries, in units of P's top entry."""
    p, m_m = p * unit[:, None], m_m * unit[:, None]
    return tl.sum(weight * p * p, axis=1), tl.sum(weight * p * m_m, axis=1)


@triton.jit
def sum_of_squares(x):
    """Return the sum of squares of each row, the same in all threads.

    The maximum keeps the compiler from fusing a square with the first addition of another thread's:
    each of the two would round its own, and threads disagree on the row's sum.
    """
    return tl.sum(tl.maximum(x * x, 0.0), axis=1)


@triton.jit
def norm_sq_of(m_ptr, live, o_row, o_col, rank, unbias1, unit):
    """Return |m^|^2 of some rows in units of P's top entry."""
    mask = live[:, None] & (o_col < rank)[None, :]
    m = tl.load(m_ptr + (o_row[:, None] * rank + o_col[None, :]), mask=mask, other=0.0)
    return sum_of_squares(m * (unbias1 * tl.sqrt(unit))[:, None])


@triton.jit
def inverse_norm(norm_sq):
    """Return 1 / sqrt(norm_sq), 0 where there is nothing to divide by."""
    some = norm_sq > 1e-30
    return tl.where(some, tl.rsqrt(tl.where(some, norm_sq, 1.0)), 0.0)


@triton.jit
def clamped(r_sq, p_sq):
    """Hold |R|^2 where rounding limits it, at 2^-22 |P|^2.

    Below, sigma would be of rounding errors alone. It costs fp16 at most 11 bits of range and no
    accuracy.
    """
    return tl.maximum(r_sq, p_sq * 2.384185791015625e-07)


@triton.jit
def sigma_sq_of(r_sq, unit):
    """Return what scales R to about 1, from |R|^2 in units of P's top entry."""
    sigma_sq = tl.where(r_sq > 0, tl.rsqrt(tl.where(r_sq > 0, r_sq, 1.0)), 1.0)
    # A row whose P is below 1e-37 keeps sigma = 1, and one near it a sigma that is too small for
    # fp16: with gradients below 1e-15 the step loses precision.
    return tl.minimum(sigma_sq * unit, 1e30)


@triton.jit
def first_centre(p_sq, mpm, m_sq):
    """Return a and |R|^2 of each row from |P|_F^2, m P m^T and |m|^2 in units of P's top entry.

    |R|_F^2 = |P|_F^2 - (m P m^T)^2 / |m|^4, which rounding limits to about 3e-4 |P|_F.
    """
    some = m_sq > 1e-18
    m_sq = tl.where(some, m_sq, 1.0)
    a = tl.where(some, mpm / (m_sq * m_sq), 0.0)
    return a, clamped(p_sq - a * mpm, p_sq)


@triton.jit
def shrink_of(eps):
    """Return what the denominators of a row are multiplied by: 1, or less under a large eps.

    D = m~ / eps would leave fp16's range where eps, in units of a row, is far above sqrt(v).
    """
    return tl.minimum(1.0, 4096.0 / tl.maximum(eps, 1.0))


@triton.jit
def residual_weight(row_ptr):
    """Return what R counts: 0 at the first step, where P^ = m^^T m^ and R is rounding alone."""
    step_ptr = tl.load(row_ptr + STEP).to(tl.pointer_type(tl.int64))
    return tl.where(tl.load(step_ptr) > 1, 1.0, 0.0)


@triton.jit
def trace_limit(p_sq, r_sq, a, m_sq):
    """Return how large the trace of P is at most, where a row asks for a second centre.

    It does where R, under the first one, is large and close to rank one or two. A trace of R that
    is no larger than its norm leaves no room for noise in the other directions, and these make
    errors in proportion to |R| small. With noise of a tenth of the mean or more hardly a row asks
    from the third step on; all rows do whose mean has lately taken turns.
    """
    return tl.where(r_sq * 64 > p_sq, 1.02 * tl.sqrt(r_sq) + a * m_sq, -1.0)


@triton.jit
def enough(asking, rows):
    """Tell whether a quarter of the rows ask for a second centre."""
    return 4 * tl.sum(asking.to(tl.int32), axis=0) >= rows


@triton.jit
def times_p(m, p_ptr, live, o_row, o_col, rank, scale):
    """Return P m of some rows, and |P|^2 column by column; P times a scale per row.

    m is ``rows x columns`` and zero beyond the rank. Rows of the triangle are read one by one.
    """
    out, p_sq = m * 0.0, m * 0.0
    o_p = o_row[:, None] * ((rank * (rank + 1)) // 2) + o_col[None, :]
    for i in range(0, rank):
        mask = live[:, None] & ((o_col >= i) & (o_col < rank))[None, :]
        p = tl.load(p_ptr + o_p, mask=mask, other=0.0) * scale[:, None]
        own = (o_col == i)[None, :]
        m_i = tl.sum(tl.where(own, m, 0.0), axis=1)
        # Entry (i, j) counts in row i and, off the diagonal, in row j.
        out += tl.where(own, tl.sum(p * m, axis=1)[:, None], p * m_i[:, None])
        p_sq += p * p * tl.where(own, 1.0, 2.0)
        o_p += rank - 1 - i
    return out, p_sq


@triton.jit
def second_direction(m, p_m, alpha, p_ptr, live, o_row, o_col, rank, scale):
    """Return a direction along what one centre leaves of P, orthogonal to m; both of unit length.

    P m is not enough where m is close to an eigenvector: the column of R with the largest entry on
    the diagonal is added, with the sign that cannot cancel.
    """
    packed = (rank * (rank + 1)) // 2
    mask = live[:, None] & (o_col < rank)[None, :]
    diagonal = diagonal_of(p_ptr, live, o_row, o_col, rank) * scale[:, None]
    diagonal = tl.where(mask, diagonal - alpha[:, None] * m * m, -float("inf"))
    largest = diagonal == tl.max(diagonal, axis=1)[:, None]
    k = tl.min(tl.where(largest & mask, o_col[None, :], rank - 1), axis=1)[:, None]
    low, high = tl.minimum(o_col[None, :], k), tl.maximum(o_col[None, :], k)
    o_column = o_row[:, None] * packed + (low * rank - (low * (low + 1)) // 2 + high)
    column = tl.load(p_ptr + o_column, mask=mask, other=0.0) * scale[:, None]
    own = o_col[None, :] == k
    column -= (alpha * tl.sum(tl.where(own, m, 0.0), axis=1))[:, None] * m
    w = p_m - alpha[:, None] * m
    w += column * tl.where(tl.sum(tl.where(own, w, 0.0), axis=1) < 0, -1.0, 1.0)[:, None]
    # Twice: where P is m^T m the first leaves rounding errors, and these are not orthogonal to m.
    w *= inverse_norm(sum_of_squares(w))[:, None]
    w -= tl.sum(w * m, axis=1)[:, None] * m
    w *= inverse_norm(sum_of_squares(w))[:, None]
    return w - tl.sum(w * m, axis=1)[:, None] * m


@triton.jit
def least_squares(a, m_x, x_sq, m_p_x, x_p_x):
    """Return what the second centre adds to a, b, c (all 0 where x is), and what |R|^2 loses.

    From products of m, of unit length, x and P; a = m P m^T.
    """
    m_r_x, x_r_x = m_p_x - a * m_x, x_p_x - a * m_x * m_x
    across = x_sq - m_x * m_x
    inverse = tl.where(across > 0.25, 1.0 / tl.where(across > 0.25, across, 1.0), 0.0)
    own = (x_r_x - 2 * m_x * m_r_x) * inverse
    c = own * inverse
    b = m_r_x * inverse - m_x * c
    return -m_x * (2 * b + m_x * c), b, c, 2 * m_r_x * m_r_x * inverse + own * own


@triton.jit
def second_centre(
    m_ptr, p_ptr, live, o_row, o_col, rank, unbias1, unbias2, unit, DTYPE: tl.constexpr
):
    """Find the second centre of some rows, ``rows x columns``, in units of P's top entry.

    The least squares of ``P^ = a m^T m + b (m^T w + w^T m) + c w^T w`` with m^ of unit length and w
    rounded, which leaves it only almost orthogonal to m.

    Returns:
        m of unit length, w, 1 / |m^|, the a of the first centre, what the second adds to it, b, c
        (all three 0 where w is), and |R|^2.
    """
    mask = live[:, None] & (o_col < rank)[None, :]
    scale = unit * unbias2
    m = tl.load(m_ptr + (o_row[:, None] * rank + o_col[None, :]), mask=mask, other=0.0)
    m *= (unbias1 * tl.sqrt(unit))[:, None]
    by_m = inverse_norm(sum_of_squares(m))
    m *= by_m[:, None]
    p_m, p_sq = times_p(m, p_ptr, live, o_row, o_col, rank, scale)
    a, p_sq = tl.sum(m * p_m, axis=1), tl.sum(p_sq, axis=1)
    w = second_direction(m, p_m, a, p_ptr, live, o_row, o_col, rank, scale).to(DTYPE)
    x = w.to(tl.float32)
    p_x, _ = times_p(x, p_ptr, live, o_row, o_col, rank, scale)
    m_x, x_sq = tl.sum(m * x, axis=1), sum_of_squares(x)
    m_p_x, x_p_x = tl.sum(m * p_x, axis=1), tl.sum(x * p_x, axis=1)
    gain, b, c, less = least_squares(a, m_x, x_sq, m_p_x, x_p_x)
    return m, w, by_m, a, gain, b, c, clamped(p_sq - a * a - less, p_sq)


@triton.jit
def second_entries(
    m_ptr, p_ptr, pairs_ptr, w_i, w_j, o_row, rows, o_k, rank, m_scale, p_scale, a, b, c
):
    """Form R of packed entries, counted twice off the diagonal; m and P times a scale per row."""
    packed = (rank * (rank + 1)) // 2
    i, j = pair_of(pairs_ptr, o_k, packed)
    mask = (o_row < rows)[:, None] & (o_k < packed)[None, :]
    p = tl.load(p_ptr + (o_row[:, None] * packed + o_k[None, :]), mask=mask, other=0.0)
    m_i, m_j = pair_entries(m_ptr, o_row, i, j, mask, rank)
    m_i, m_j = m_i * m_scale[:, None], m_j * m_scale[:, None]
    a, b, c = a[:, None], b[:, None], c[:, None]
    r = p * p_scale[:, None] - m_i * (a * m_j + b * w_j) - w_i * (b * m_j + c * w_j)
    return tl.where(mask, r, 0.0) * tl.where(i == j, 1.0, 2.0)[None, :]
