"""Operands of the hot loop, written once and streamed many times.

For every partner row j: the products ``(tau Q_j)_i (tau Q_j)_k`` in the order of packed entries,
and the halves of ``tau Q_j``, in fp16. For every row of the moving factor, above rank 16: the
centred second moment ``sigma^2 R``, its second direction and its coefficients, see ``centre`` (up
to rank 16 they stay in the registers of ``update``). P is read twice there, the second time from
the cache, and four times where a row asks for a second centre. Rows of the triangle are contiguous,
so above rank 16 both are written row of the triangle by row, without gathers; up to rank 16 the two
factors of a product are picked out of a block of rows by products with 0 and 1 on the tensor cores.

tau, a power of two near sqrt(partner rows / r), and sigma put the numbers into fp16's range; D
does not notice. Off-diagonal entries stand once and count twice, which is put into R. The small
helpers take their index tensors from the caller, so that kernels of any layout can use them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.centre import (
    diagonal_of,
    first_centre,
    from_row,
    pair_of,
    residual_weight,
    second_centre,
    shrink_of,
    sigma_sq_of,
    sum_of_squares,
    trace_limit,
    unit_of,
)
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BIAS2,
    COLUMNS,
    EPS,
    EXP_AVG,
    MOVES,
    NUMBERS,
    PARTNER_BASIS,
    PARTNER_ROW,
    RESIDUAL_ROW,
    ROWS,
    SECOND_MOMENT,
    SKIP,
)

# Rows of a triangle whose loads are on their way together.
UNROLLED = tl.constexpr(4)


@triton.jit
def scale_of(partner_rows, rank):
    """Return tau: entries of tau Q are about 1, and their products stay below 2^14."""
    tau = tl.exp2(tl.floor(0.5 * tl.log2(partner_rows.to(tl.float32) / rank)))
    return tl.minimum(tl.maximum(tau, 1.0), 128.0)


@triton.jit
def half_column(o_col, rank, SPLIT: tl.constexpr):
    """Return the column of Q or m that stands in each column of a block of halves, and its part."""
    if SPLIT == 3:
        part = o_col // rank
    elif SPLIT == 2:
        part = o_col // 8
    else:
        part = o_col * 0
    width = rank if SPLIT == 3 else 8
    col = o_col - part * width
    return col, part, (col < rank) & (part < SPLIT)


@triton.jit
def load_half(x_ptr, o_row, rows, o_col, rank, scale, SPLIT: tl.constexpr, DTYPE: tl.constexpr):
    """Load the entries of a block of halves, scaled: the high half, the low half and the part."""
    col, part, valid = half_column(o_col, rank, SPLIT)
    mask = (o_row < rows)[:, None] & valid[None, :]
    x = tl.load(x_ptr + (o_row[:, None] * rank + col[None, :]), mask=mask, other=0.0) * scale
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE), part


@triton.jit
def _clear_padding(out_ptr, o_row, width, packed, PRODUCTS: tl.constexpr, DTYPE: tl.constexpr):
    """Clear the columns between the last packed entry and the next block of operands."""
    o_col = packed + tl.arange(0, 64)
    zero = tl.zeros((o_row.shape[0], 64), DTYPE)
    mask = (o_col < PRODUCTS)[None, :] & (o_row >= 0)[:, None]
    tl.store(out_ptr + (o_row[:, None] * width + o_col[None, :]), zero, mask=mask)


@triton.jit
def select(x, o_pair, live, EXACT: tl.constexpr):
    """Return column o_pair[k] of x in column k, zero where not live: a product with 0 and 1."""
    o_r = tl.arange(0, x.shape[1])
    chosen = (o_r[:, None] == o_pair[None, :]) & live[None, :]
    if EXACT:
        picked = tl.dot(x, tl.where(chosen, 1.0, 0.0), input_precision="ieee")
    else:
        # Two halves hold 22 bits, and only one of the products is not zero.
        high = x.to(tl.float16)
        chosen = tl.where(chosen, 1.0, 0.0).to(tl.float16)
        picked = tl.dot((x - high.to(tl.float32)).to(tl.float16), chosen)
        picked = tl.dot(high, chosen, picked)
    return picked


@triton.jit
def _select_products(
    q_ptr,
    out_ptr,
    pairs_ptr,
    o_row,
    live,
    rank,
    tau,
    R: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the packed products of a block of rows, 16 columns at a time, as two selections."""
    EXACT: tl.constexpr = tl.float32 == DTYPE
    o_r = tl.arange(0, R)
    mask = live[:, None] & (o_r < rank)[None, :]
    q = tl.load(q_ptr + (o_row[:, None] * rank + o_r[None, :]), mask=mask, other=0.0) * tau
    packed = (rank * (rank + 1)) // 2
    for first in tl.static_range(0, PRODUCTS, 16):
        o_k = first + tl.arange(0, 16)
        i, j = pair_of(pairs_ptr, o_k, packed)
        products = select(q, i, o_k < packed, EXACT) * select(q, j, o_k < packed, EXACT)
        tl.store(out_ptr + (o_row[:, None] * WIDTH + o_k[None, :]), products.to(DTYPE))


@triton.jit
def _stream_products(
    q_ptr,
    out_ptr,
    o_row,
    live,
    rank,
    tau,
    N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the packed products of a block of rows, row of the triangle by row."""
    o_j = tl.arange(0, N)
    q_ptrs = q_ptr + o_row * rank
    mask = live[:, None] & (o_j < rank)[None, :]
    q = tl.load(q_ptrs[:, None] + o_j[None, :], mask=mask, other=0.0) * (tau * tau)
    # Row i of the triangle: its entries (i, i) .. (i, r - 1) are contiguous.
    o_out = o_row[:, None] * WIDTH + o_j[None, :]
    q_next = tl.load(q_ptrs, mask=live, other=0.0)
    for i in range(0, rank):
        q_i = q_next
        q_next = tl.load(q_ptrs + tl.minimum(i + 1, rank - 1), mask=live, other=0.0)
        products = (q_i[:, None] * q).to(DTYPE)
        tl.store(out_ptr + o_out, products, mask=((o_j >= i) & (o_j < rank))[None, :])
        o_out += rank - 1 - i
    _clear_padding(out_ptr, o_row, WIDTH, (rank * (rank + 1)) // 2, PRODUCTS, DTYPE)


@triton.jit
def _write_partner(
    row_ptr,
    start,
    partner_rows,
    out_ptr,
    pairs_ptr,
    rank,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the operands of a block of partner rows; rows beyond the last are zero."""
    basis = tl.load(row_ptr + PARTNER_BASIS)
    q_ptr = basis.to(tl.pointer_type(tl.float32)) + start * rank
    o_row, rows = tl.arange(0, BLOCK), (partner_rows - start).to(tl.int32)
    live = o_row < rows
    tau = scale_of(partner_rows, rank)
    out_ptr += (tl.load(row_ptr + PARTNER_ROW) + start) * WIDTH
    if R == 16:
        _select_products(
            q_ptr, out_ptr, pairs_ptr, o_row, live, rank, tau, R, PRODUCTS, WIDTH, DTYPE
        )
    else:
        _stream_products(q_ptr, out_ptr, o_row, live, rank, tau, N, PRODUCTS, WIDTH, DTYPE)
    o_col = tl.arange(0, R)
    high, low, part = load_half(q_ptr, o_row, rows, o_col, rank, tau, SPLIT, DTYPE)
    out = out_ptr + o_row[:, None] * WIDTH + PRODUCTS + o_col[None, :]
    if SPLIT == 1:
        tl.store(out + R, low)
    else:
        high = tl.where((part == SPLIT - 1)[None, :], low, high)
    tl.store(out, high)


@triton.jit
def _residual_lines(
    p_ptr,
    out_ptr,
    m_ptrs,
    m,
    w,
    m_scale,
    p_scale,
    a,
    b,
    c,
    counts,
    live,
    o_row,
    o_j,
    rank,
    SECOND: tl.constexpr,
    PRODUCTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write R of a block of rows, row of the triangle by row; m and P times a scale per row."""
    packed = (rank * (rank + 1)) // 2
    o_p = o_row[:, None] * packed + o_j[None, :]
    o_out = o_row[:, None] * PRODUCTS + o_j[None, :]
    first = live[:, None] & (o_j < rank)[None, :]
    # Stores hold up the loads behind them: these are made a row ahead.
    p_next = tl.load(p_ptr + o_p, mask=first, other=0.0)
    m_next = tl.load(m_ptrs, mask=live, other=0.0)
    for i in range(0, rank):
        kept = ((o_j >= i) & (o_j < rank))[None, :]
        r, m_i = p_next * p_scale[:, None], m_next * m_scale
        o_p += rank - 1 - i
        later = ((o_j > i) & (o_j < rank))[None, :]
        p_next = tl.load(p_ptr + o_p, mask=live[:, None] & later, other=0.0)
        m_next = tl.load(m_ptrs + tl.minimum(i + 1, rank - 1), mask=live, other=0.0)
        own = (o_j == i)[None, :]
        if SECOND:
            w_i = tl.sum(tl.where(own, w, 0.0), axis=1)
            r -= (a * m_i + b * w_i)[:, None] * m + (b * m_i + c * w_i)[:, None] * w
        else:
            r -= (a * m_i)[:, None] * m
        r *= counts[:, None] * tl.where(own, 1.0, 2.0)
        tl.store(out_ptr + o_out, r.to(DTYPE), mask=kept)
        o_out += rank - 1 - i


@triton.jit
def _store_centre(centre_ptrs, a, b, c, sigma_sq):
    """Write the coefficients of some rows; b and c in the units of the hot loop."""
    tl.store(centre_ptrs, a)
    tl.store(centre_ptrs + 1, b)
    tl.store(centre_ptrs + 2, c)
    tl.store(centre_ptrs + 3, sigma_sq)


@triton.jit
def _first_sums(m_ptrs, m, p_ptr, m_scale, p_scale, live, o_row, o_j, rank):
    """Return |P|^2 and m P m^T of some rows; m and P times a scale per row."""
    p_sq, mpm = m * 0.0, m * 0.0
    o_p = o_row[:, None] * ((rank * (rank + 1)) // 2) + o_j[None, :]
    for i in tl.range(0, rank, loop_unroll_factor=UNROLLED):
        mask = live[:, None] & ((o_j >= i) & (o_j < rank))[None, :]
        p = tl.load(p_ptr + o_p, mask=mask, other=0.0) * p_scale[:, None]
        m_i = tl.load(m_ptrs + i, mask=live, other=0.0) * m_scale
        weighted = p * tl.where(o_j == i, 1.0, 2.0)[None, :]
        p_sq += weighted * p
        mpm += weighted * (m_i[:, None] * m)
        o_p += rank - 1 - i
    return tl.sum(p_sq, axis=1), tl.sum(mpm, axis=1)


@triton.jit
def _write_residual(
    row_ptr,
    number_ptr,
    hyper_ptr,
    start,
    partner_rows,
    out_ptr,
    centre_ptr,
    direction_ptr,
    rank,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    PRODUCTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the centred second moment of a block of rows, its direction and its coefficients."""
    unbias1 = 1.0 / tl.load(number_ptr + BIAS1).to(tl.float32)
    unbias2 = 1.0 / tl.load(number_ptr + BIAS2).to(tl.float32)
    m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32))
    p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32))
    m_ptr, p_ptr, rows = from_row(m_ptr, p_ptr, tl.load(row_ptr + ROWS), start, rank)
    o_row, o_j = tl.arange(0, BLOCK), tl.arange(0, N)
    live = o_row < rows
    first_row = tl.load(row_ptr + RESIDUAL_ROW) + start
    centre_ptrs = centre_ptr + 4 * (first_row + o_row)
    direction_ptrs = direction_ptr + (first_row + o_row)[:, None] * R + o_j[None, :]
    out_ptr += first_row * PRODUCTS
    diagonal = diagonal_of(p_ptr, live, o_row, o_j, rank) * unbias2
    unit = unit_of(diagonal)
    p_scale, m_scale = unit * unbias2, tl.sqrt(unit) * unbias1
    m_ptrs = m_ptr + o_row * rank
    mask = live[:, None] & (o_j < rank)[None, :]
    m = tl.load(m_ptrs[:, None] + o_j[None, :], mask=mask, other=0.0) * m_scale[:, None]
    p_sq, mpm = _first_sums(m_ptrs, m, p_ptr, m_scale, p_scale, live, o_row, o_j, rank)
    m_sq = sum_of_squares(m)
    a, r_sq = first_centre(p_sq, mpm, m_sq)
    weight = residual_weight(row_ptr)
    eps = tl.load(hyper_ptr + EPS).to(tl.float32) * scale_of(partner_rows, rank)
    # A limit of -1 is for rows that do not ask, and those beyond the last; none do where nothing is
    # rounded to fp16.
    limit = tl.where(live, trace_limit(p_sq, r_sq, a, m_sq), -1.0)
    if tl.float32 == DTYPE:
        limit = limit * 0.0 - 1.0
    asked = tl.where(tl.sum(diagonal, axis=1) * unit < limit, weight, 0.0)
    if tl.max(asked, axis=0) > 0.0:
        m, w, by_m, a, gain, b, c, r_sq = second_centre(
            m_ptr, p_ptr, live, o_row, o_j, rank, unbias1, unbias2, unit, DTYPE
        )
        tl.store(direction_ptrs, w)
        a += gain
        sigma_sq = sigma_sq_of(r_sq, unit)
        by_unit = sigma_sq / unit
        second_a, second_b = a * by_m * by_m, 2 * b * by_m * tl.sqrt(by_unit)
        _store_centre(centre_ptrs, second_a, second_b, c * by_unit, sigma_sq)
        shrink = shrink_of(eps * tl.sqrt(sigma_sq))
        _residual_lines(
            p_ptr,
            out_ptr,
            m_ptrs,
            m,
            w.to(tl.float32),
            m_scale * by_m,
            p_scale,
            a,
            b,
            c,
            by_unit * shrink * shrink * weight,
            live,
            o_row,
            o_j,
            rank,
            True,
            PRODUCTS,
            DTYPE,
        )
    else:
        tl.store(direction_ptrs, tl.zeros((BLOCK, N), DTYPE))
        sigma_sq = sigma_sq_of(r_sq, unit)
        _store_centre(centre_ptrs, a, a * 0.0, a * 0.0, sigma_sq)
        shrink = shrink_of(eps * tl.sqrt(sigma_sq))
        _residual_lines(
            p_ptr,
            out_ptr,
            m_ptrs,
            m,
            m,
            m_scale,
            p_scale,
            a,
            a,
            a,
            sigma_sq / unit * shrink * shrink * weight,
            live,
            o_row,
            o_j,
            rank,
            False,
            PRODUCTS,
            DTYPE,
        )
    _clear_padding(out_ptr, o_row, PRODUCTS, (rank * (rank + 1)) // 2, PRODUCTS, DTYPE)


@triton.jit
def _operands_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    pairs_ptr,
    partner_ptr,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    rank,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 3 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 3 * i_tile + 1).to(tl.int64)
    of_partner = tl.load(tiles_ptr + 3 * i_tile + 2)
    row_ptr = table_ptr + side * COLUMNS
    number_ptr = numbers_ptr + side * NUMBERS
    if (tl.load(number_ptr + MOVES) != 0) & (tl.load(decision_ptr + SKIP) == 0):
        partner_rows = tl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        if of_partner != 0:
            _write_partner(
                row_ptr,
                start,
                partner_rows,
                partner_ptr,
                pairs_ptr,
                rank,
                BLOCK,
                N,
                R,
                PRODUCTS,
                WIDTH,
                SPLIT,
                DTYPE,
            )
        else:
            _write_residual(
                row_ptr,
                number_ptr,
                hyper_ptr,
                start,
                partner_rows,
                residual_ptr,
                centre_ptr,
                direction_ptr,
                rank,
                BLOCK,
                N,
                R,
                PRODUCTS,
                DTYPE,
            )
