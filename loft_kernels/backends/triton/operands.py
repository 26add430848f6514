"""Operands of the hot loop, written once and streamed many times.

For every partner row j: the products ``(tau Q_j) (x) (tau Q_j)`` and the halves of ``tau Q_j``, in
fp16. For every row i of the moving factor, above rank 16: the centred second moment
``sigma_i^2 R_i`` (up to rank 16 it stays in the registers of ``update``).

The symmetric r x r contraction runs over pairs (p <= q) of B-wide blocks of Q: each is a slice of
B^2 columns, and slices with p < q count twice, which is put into R. tau, a power of two near
sqrt(partner rows / r), and sigma_i put the numbers into fp16's range; D does not notice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows
from loft_kernels.backends.triton.moments import packed_index
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BIAS2,
    COLUMNS,
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


@triton.jit
def scale_of(partner_rows, rank):
    """Return tau: entries of tau Q are about 1, and their products stay below 2^14."""
    tau = tl.exp2(tl.floor(0.5 * tl.log2(partner_rows.to(tl.float32) / rank)))
    return tl.minimum(tl.maximum(tau, 1.0), 128.0)


@triton.jit
def _load_slice(p_ptr, o_row, rows, rank, p, q, B: tl.constexpr):
    """Load the B x B block (p, q) of P of some rows, counted from p_ptr: ``rows x B^2``."""
    o_pair = tl.arange(0, B * B)
    i, j = B * p + o_pair // B, B * q + o_pair % B
    packed = (rank * (rank + 1)) // 2
    mask = (o_row[:, None] < rows) & ((i < rank) & (j < rank))[None, :]
    return tl.load(p_ptr + (o_row[:, None] * packed + packed_index(i, j, rank)[None, :]), mask, 0.0)


@triton.jit
def _load_block(x_ptr, o_row, rows, rank, p, B: tl.constexpr):
    """Load columns Bp .. Bp + B - 1 of a contiguous fp32 matrix: ``rows x B``."""
    o_col = B * p + tl.arange(0, B)
    mask = (o_row[:, None] < rows) & (o_col[None, :] < rank)
    return tl.load(x_ptr + (o_row[:, None] * rank + o_col[None, :]), mask=mask, other=0.0)


@triton.jit
def _outer(x, y, COUNT: tl.constexpr, B: tl.constexpr):
    """Form the row-wise outer products of two ``rows x B`` tiles: ``rows x B^2``."""
    return tl.reshape(x[:, :, None] * y[:, None, :], (COUNT, B * B))


@triton.jit
def from_row(m_ptr, p_ptr, rows, start, rank):
    """Move m, P and the number of rows to start at a row, so that offsets fit 32 bits."""
    packed = (rank * (rank + 1)) // 2
    return m_ptr + start * rank, p_ptr + start * packed, (rows - start).to(tl.int32)


@triton.jit
def _next_pair(p, q, NB: tl.constexpr):
    """Step through the block pairs p <= q in the order (0, 0), (0, 1), ..., (1, 1), ..."""
    wrap = q + 1 == NB
    p = tl.where(wrap, p + 1, p)
    return p, tl.where(wrap, p, q + 1)


@triton.jit
def centre(
    m_ptr,
    p_ptr,
    o_row,
    rows,
    rank,
    bias1,
    bias2,
    BLOCK_M: tl.constexpr,
    NB: tl.constexpr,
    B: tl.constexpr,
):
    """Return a and sigma^2 of each row, from one pass over P.

    |R|_F^2 = |P|_F^2 - (m P m^T)^2 / |m|^4. Rounding limits it to about 3e-4 |P|_F; sigma is
    clamped there, which costs fp16 at most 11 bits of range and no accuracy.
    """
    acc_p = tl.zeros((BLOCK_M, B * B), tl.float32)
    acc_mpm = tl.zeros((BLOCK_M, B * B), tl.float32)
    acc_m = tl.zeros((BLOCK_M, B), tl.float32)
    p, q = 0, 0
    for _ in range(0, (NB * (NB + 1)) // 2):
        weight = tl.where(p == q, 1.0, 2.0)
        m_p = _load_block(m_ptr, o_row, rows, rank, p, B) / bias1
        m_q = _load_block(m_ptr, o_row, rows, rank, q, B) / bias1
        acc_m += tl.where(p == q, m_p * m_p, 0.0)
        block = _load_slice(p_ptr, o_row, rows, rank, p, q, B) / bias2
        acc_p += weight * block * block
        acc_mpm += weight * block * _outer(m_p, m_q, BLOCK_M, B)
        p, q = _next_pair(p, q, NB)
    p_sq, mpm, m_sq = tl.sum(acc_p, axis=1), tl.sum(acc_mpm, axis=1), tl.sum(acc_m, axis=1)
    m_4 = m_sq * m_sq
    a = tl.where(m_4 > 0, mpm / tl.where(m_4 > 0, m_4, 1.0), 0.0)
    r_sq = tl.maximum(p_sq - a * mpm, p_sq * 2.384185791015625e-07)  # 2^-22
    sigma_sq = tl.where(r_sq > 0, tl.rsqrt(tl.where(r_sq > 0, r_sq, 1.0)), 1.0)
    # A row whose squares underflow has v = 0 everywhere: eps alone decides, any sigma serves.
    return a, tl.minimum(sigma_sq, 1e30)


@triton.jit
def residual_slice(
    m_ptr,
    p_ptr,
    o_row,
    rows,
    rank,
    a,
    weight,
    bias1,
    bias2,
    p,
    q,
    BLOCK_M: tl.constexpr,
    B: tl.constexpr,
):
    """Form the slice (p, q) of R times a weight per row: ``rows x B^2`` fp32."""
    m_p = _load_block(m_ptr, o_row, rows, rank, p, B) / bias1
    m_q = _load_block(m_ptr, o_row, rows, rank, q, B) / bias1
    block = _load_slice(p_ptr, o_row, rows, rank, p, q, B) / bias2
    return (block - a[:, None] * _outer(m_p, m_q, BLOCK_M, B)) * weight[:, None]


@triton.jit
def _write_partner(
    row_ptr,
    start,
    partner_rows,
    out_ptr,
    rank,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    NB: tl.constexpr,
    B: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the operands of a block of partner rows; rows beyond the last are zero."""
    SLICES: tl.constexpr = (NB * (NB + 1)) // 2
    WIDTH: tl.constexpr = SLICES * B * B + 2 * R
    basis = tl.load(row_ptr + PARTNER_BASIS)
    q_ptr = basis.to(tl.pointer_type(tl.float32)) + start * rank
    o_row = start + tl.arange(0, BLOCK)
    o_local, left = tl.arange(0, BLOCK), (partner_rows - start).to(tl.int32)
    tau = scale_of(partner_rows, rank)
    out_ptr += (tl.load(row_ptr + PARTNER_ROW) + o_row[:, None]) * WIDTH
    o_r, o_pair = tl.arange(0, R), tl.arange(0, B * B)
    q = load_rows(basis, rank, 1, o_row, partner_rows, rank, R, tl.float32) * tau
    high = q.to(DTYPE)
    tl.store(out_ptr + SLICES * B * B + o_r[None, :], high)
    tl.store(out_ptr + SLICES * B * B + R + o_r[None, :], (q - high.to(tl.float32)).to(DTYPE))
    p, s = 0, 0
    for index in range(0, SLICES):
        q_p = _load_block(q_ptr, o_local, left, rank, p, B) * tau
        q_s = _load_block(q_ptr, o_local, left, rank, s, B) * tau
        outer = _outer(q_p, q_s, BLOCK, B).to(DTYPE)
        tl.store(out_ptr + index * B * B + o_pair[None, :], outer)
        p, s = _next_pair(p, s, NB)


@triton.jit
def _write_residual(
    row_ptr,
    number_ptr,
    start,
    out_ptr,
    centre_ptr,
    rank,
    BLOCK: tl.constexpr,
    NB: tl.constexpr,
    B: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write the centred second moment of a block of rows, and its a and sigma^2."""
    WIDTH: tl.constexpr = (NB * (NB + 1)) // 2 * B * B
    rows = tl.load(row_ptr + ROWS)
    bias1 = tl.load(number_ptr + BIAS1).to(tl.float32)
    bias2 = tl.load(number_ptr + BIAS2).to(tl.float32)
    m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32))
    p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32))
    m_ptr, p_ptr, rows = from_row(m_ptr, p_ptr, rows, start, rank)
    o_row = tl.arange(0, BLOCK)
    a, sigma_sq = centre(m_ptr, p_ptr, o_row, rows, rank, bias1, bias2, BLOCK, NB, B)
    o_out = tl.load(row_ptr + RESIDUAL_ROW) + start + o_row
    tl.store(centre_ptr + 2 * o_out, a)
    tl.store(centre_ptr + 2 * o_out + 1, sigma_sq)
    out_ptr += o_out[:, None] * WIDTH + tl.arange(0, B * B)[None, :]
    p, q = 0, 0
    for index in range(0, (NB * (NB + 1)) // 2):
        weight = sigma_sq * tl.where(p == q, 1.0, 2.0)
        block = residual_slice(
            m_ptr, p_ptr, o_row, rows, rank, a, weight, bias1, bias2, p, q, BLOCK, B
        )
        tl.store(out_ptr + index * B * B, block.to(DTYPE))
        p, q = _next_pair(p, q, NB)


@triton.jit
def _operands_kernel(
    table_ptr,
    tiles_ptr,
    decision_ptr,
    numbers_ptr,
    partner_ptr,
    residual_ptr,
    centre_ptr,
    rank,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    NB: tl.constexpr,
    B: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 3 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 3 * i_tile + 1).to(tl.int64)
    of_partner = tl.load(tiles_ptr + 3 * i_tile + 2)
    row_ptr = table_ptr + side * COLUMNS
    number_ptr = numbers_ptr + side * NUMBERS
    if (tl.load(number_ptr + MOVES) != 0) & (tl.load(decision_ptr + SKIP) == 0):
        if of_partner != 0:
            partner_rows = tl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
            _write_partner(row_ptr, start, partner_rows, partner_ptr, rank, BLOCK, R, NB, B, DTYPE)
        else:
            _write_residual(
                row_ptr, number_ptr, start, residual_ptr, centre_ptr, rank, BLOCK, NB, B, DTYPE
            )
