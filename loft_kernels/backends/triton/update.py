"""The hot loop: Adam's step in every entry of the virtual weight, projected back on the fly.

For a block of rows i of the moving factor and tiles of partner rows j:

    m~ = m^ Q^T                    v = a m~^2 + R . (Q (x) Q)        (two GEMMs)
    D = m~ / (sqrt(max(v, m~^2 / bound)) + eps)                      (entry by entry)
    D Q                                                              (a third GEMM, accumulated)

and at the end ``X <- (1 - lr wd) X - (lr / s) (D Q) L^+``. The second moment is *centred*:
``R = P^ - a m^^T m^`` with ``a = m^ P^ m^^T / |m^|^4``, so that fp16 touches only the residual,
and m~ is the sum of three products of fp16 halves. Q is scaled by ``tau`` (about sqrt(n / r)) and
row i by ``sigma_i``, which fp16's range wants; D does not notice, only eps is scaled along.

The symmetric r x r contraction runs over pairs (p <= q) of 8-wide blocks of Q: each is a slice of
64, the outer products are formed in registers, and pairs p < q count twice. No m x n tensor and,
up to rank 16, no workspace exists; above, ``residual`` writes R in fp16 first, because it no
longer fits beside the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows
from loft_kernels.backends.triton.moments import packed_index
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BIAS2,
    BOUND,
    COLUMNS,
    EPS,
    EXP_AVG,
    LR_A,
    LR_B,
    MASTER,
    MOVES,
    NUMBERS,
    PARAM,
    PARAM_STRIDE_COL,
    PARAM_STRIDE_ROW,
    PARTNER_BASIS,
    RESIDUAL_ROW,
    ROWS,
    SCALING,
    SECOND_MOMENT,
    SKIP,
    WEIGHT_DECAY,
)


@triton.jit
def _load_slice(p_ptr, o_row, rows, rank, p, q):
    """Load the 8 x 8 block (p, q) of P of some rows: ``rows x 64``."""
    o_pair = tl.arange(0, 64)
    i, j = 8 * p + o_pair // 8, 8 * q + o_pair % 8
    packed = (rank * (rank + 1)) // 2
    mask = (o_row[:, None] < rows) & ((i < rank) & (j < rank))[None, :]
    return tl.load(p_ptr + o_row[:, None] * packed + packed_index(i, j, rank)[None, :], mask, 0.0)


@triton.jit
def _load_eighth(x_ptr, o_row, rows, rank, p):
    """Load columns 8p .. 8p + 7 of a contiguous matrix: ``rows x 8``."""
    o_col = 8 * p + tl.arange(0, 8)
    mask = (o_row[:, None] < rows) & (o_col[None, :] < rank)
    return tl.load(x_ptr + o_row[:, None] * rank + o_col[None, :], mask=mask, other=0.0)


@triton.jit
def _outer(x, y, ROWS_: tl.constexpr):
    """Form the row-wise outer products of two ``rows x 8`` tiles: ``rows x 64``."""
    return tl.reshape(x[:, :, None] * y[:, None, :], (ROWS_, 64))


@triton.jit
def _centre(m_ptr, p_ptr, o_row, rows, rank, bias1, bias2, BLOCK_M: tl.constexpr, NB: tl.constexpr):
    """Return a and sigma^2 of each row, from one pass over P.

    |R|_F^2 = |P|_F^2 - (m P m^T)^2 / |m|^4. Rounding limits it to about 3e-4 |P|_F; sigma is
    clamped there, which costs fp16 at most 11 bits of range and no accuracy.
    """
    p_sq = tl.zeros((BLOCK_M,), tl.float32)
    mpm = tl.zeros((BLOCK_M,), tl.float32)
    m_sq = tl.zeros((BLOCK_M,), tl.float32)
    for p in tl.static_range(NB):
        m_p = _load_eighth(m_ptr, o_row, rows, rank, p) / bias1
        m_sq += tl.sum(m_p * m_p, axis=1)
        for q in tl.static_range(p, NB):
            weight = 1.0 if p == q else 2.0
            m_q = _load_eighth(m_ptr, o_row, rows, rank, q) / bias1
            block = _load_slice(p_ptr, o_row, rows, rank, p, q) / bias2
            p_sq += weight * tl.sum(block * block, axis=1)
            mpm += weight * tl.sum(block * _outer(m_p, m_q, BLOCK_M), axis=1)
    m_4 = m_sq * m_sq
    a = tl.where(m_4 > 0, mpm / tl.where(m_4 > 0, m_4, 1.0), 0.0)
    r_sq = tl.maximum(p_sq - a * mpm, p_sq * 2.384185791015625e-07)  # 2^-22
    sigma_sq = tl.where(r_sq > 0, tl.rsqrt(tl.where(r_sq > 0, r_sq, 1.0)), 1.0)
    # A row whose squares underflow has v = 0 everywhere: eps alone decides, any sigma serves.
    return a, tl.minimum(sigma_sq, 1e30)


@triton.jit
def _residual_slice(
    m_ptr, p_ptr, o_row, rows, rank, a, sigma_sq, bias1, bias2, p, q, weight, BLOCK_M: tl.constexpr
):
    """Form the slice (p, q) of sigma^2 R, doubled off the block diagonal: ``rows x 64`` fp32."""
    m_p = _load_eighth(m_ptr, o_row, rows, rank, p) / bias1
    m_q = _load_eighth(m_ptr, o_row, rows, rank, q) / bias1
    block = _load_slice(p_ptr, o_row, rows, rank, p, q) / bias2
    return (block - a[:, None] * _outer(m_p, m_q, BLOCK_M)) * (weight * sigma_sq)[:, None]


@triton.jit
def _next_pair(p, q, NB: tl.constexpr):
    """Step through the block pairs p <= q in the order (0, 0), (0, 1), ..., (1, 1), ..."""
    wrap = q + 1 == NB
    p = tl.where(wrap, p + 1, p)
    return p, tl.where(wrap, p, q + 1)


@triton.jit
def _residual_kernel(
    table_ptr,
    tiles_ptr,
    decision_ptr,
    numbers_ptr,
    residual_ptr,
    centre_ptr,
    residual_rows,
    rank,
    BLOCK_M: tl.constexpr,
    NB: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    if (tl.load(numbers_ptr + side * NUMBERS + MOVES) != 0) & (tl.load(decision_ptr + SKIP) == 0):
        rows = tl.load(row_ptr + ROWS)
        bias1 = tl.load(numbers_ptr + side * NUMBERS + BIAS1).to(tl.float32)
        bias2 = tl.load(numbers_ptr + side * NUMBERS + BIAS2).to(tl.float32)
        m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32))
        p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32))
        first = tl.load(row_ptr + RESIDUAL_ROW)
        o_row = start + tl.arange(0, BLOCK_M)
        m_row = o_row < rows
        a, sigma_sq = _centre(m_ptr, p_ptr, o_row, rows, rank, bias1, bias2, BLOCK_M, NB)
        tl.store(centre_ptr + 2 * (first + o_row), a, mask=m_row)
        tl.store(centre_ptr + 2 * (first + o_row) + 1, sigma_sq, mask=m_row)
        o_pair = tl.arange(0, 64)
        out_ptr = residual_ptr + (first + o_row[:, None]) * 64 + o_pair[None, :]
        p, q = 0, 0
        for _ in range(0, (NB * (NB + 1)) // 2):
            weight = tl.where(p == q, 1.0, 2.0)
            block = _residual_slice(
                m_ptr, p_ptr, o_row, rows, rank, a, sigma_sq, bias1, bias2, p, q, weight, BLOCK_M
            )
            tl.store(out_ptr, block.to(DTYPE), mask=m_row[:, None])
            out_ptr += residual_rows * 64
            p, q = _next_pair(p, q, NB)


@triton.jit
def _entries(m, dot, a, floor, eps, EXACT: tl.constexpr, ASM: tl.constexpr):
    """Return D for one tile; the guard keeps v at or above m~^2 / bound, and above 0."""
    m_sq = m * m
    v = tl.maximum(a[:, None] * m_sq + dot, m_sq * floor + 1e-37)
    if EXACT:
        return tl.where(m_sq > 0, tl.div_rn(m, tl.sqrt_rn(v) + eps[:, None]), 0.0)
    eps = tl.broadcast_to(eps[:, None], m.shape)
    if ASM:
        # x = eps / sqrt(v): below 2^-8 a polynomial of 1 / (1 + x) is exact to 6e-8 and spares the
        # special-function unit, which binds here; predicated off, the reciprocal costs it nothing.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .pred far;
            .reg .f32 y, x, w;
            rsqrt.approx.ftz.f32 y, $2;
            mul.f32 x, y, $3;
            setp.gt.f32 far, x, 0f3B800000;
            add.f32 w, x, 0fBF800000;
            fma.rn.f32 w, w, x, 0f3F800000;
            @far add.f32 x, x, 0f3F800000;
            @far rcp.approx.ftz.f32 w, x;
            mul.f32 y, y, w;
            mul.f32 $0, y, $1;
            }
            """,
            "=f,f,f,f",
            [m, v, eps],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    y = tl.rsqrt(v)
    return m * (y / (1.0 + y * eps))


@triton.jit
def _update_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    residual_ptr,
    centre_ptr,
    residual_rows,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    NB: tl.constexpr,
    RESIDENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    if (tl.load(numbers_ptr + side * NUMBERS + MOVES) != 0) & (tl.load(decision_ptr + SKIP) == 0):
        OPERAND: tl.constexpr = tl.float32 if EXACT else tl.float16
        PRECISION: tl.constexpr = "ieee"
        rows = tl.load(row_ptr + ROWS)
        partner_rows = tl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        bias1 = tl.load(numbers_ptr + side * NUMBERS + BIAS1).to(tl.float32)
        bias2 = tl.load(numbers_ptr + side * NUMBERS + BIAS2).to(tl.float32)
        floor = (1.0 / tl.load(numbers_ptr + side * NUMBERS + BOUND)).to(tl.float32)
        m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32))
        p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32))
        basis = tl.load(row_ptr + PARTNER_BASIS)
        q_ptr = basis.to(tl.pointer_type(tl.float32))
        o_row = start + tl.arange(0, BLOCK_M)
        o_r = tl.arange(0, R)
        # tau, a power of two near sqrt(partner rows / r): entries of tau Q are about 1.
        tau = tl.exp2(tl.floor(0.5 * tl.log2(partner_rows.to(tl.float32) / rank)))
        tau = tl.minimum(tl.maximum(tau, 1.0), 128.0)

        # The rows' operands: sigma m in two halves, and the residual.
        if RESIDENT:
            a, sigma_sq = _centre(m_ptr, p_ptr, o_row, rows, rank, bias1, bias2, BLOCK_M, NB)
        else:
            first = tl.load(row_ptr + RESIDUAL_ROW)
            m_row = o_row < rows
            a = tl.load(centre_ptr + 2 * (first + o_row), mask=m_row, other=0.0)
            sigma_sq = tl.load(centre_ptr + 2 * (first + o_row) + 1, mask=m_row, other=1.0)
        sigma = tl.sqrt(sigma_sq)
        eps = tl.load(hyper_ptr + EPS).to(tl.float32) * sigma * tau
        m = load_rows(tl.load(row_ptr + EXP_AVG), rank, 1, o_row, rows, rank, R, tl.float32)
        m = m / bias1 * sigma[:, None]
        m_high = m.to(OPERAND)
        m_low = (m - m_high.to(tl.float32)).to(OPERAND)
        if RESIDENT:
            one = tl.full((BLOCK_M,), 1.0, tl.float32)
            r_00 = _residual_slice(
                m_ptr, p_ptr, o_row, rows, rank, a, sigma_sq, bias1, bias2, 0, 0, one, BLOCK_M
            ).to(OPERAND)
            if NB == 2:
                r_01 = _residual_slice(
                    m_ptr,
                    p_ptr,
                    o_row,
                    rows,
                    rank,
                    a,
                    sigma_sq,
                    bias1,
                    bias2,
                    0,
                    1,
                    2 * one,
                    BLOCK_M,
                ).to(OPERAND)
                r_11 = _residual_slice(
                    m_ptr, p_ptr, o_row, rows, rank, a, sigma_sq, bias1, bias2, 1, 1, one, BLOCK_M
                ).to(OPERAND)

        acc = tl.zeros((BLOCK_M, R), tl.float32)
        for j in range(0, partner_rows, BLOCK_N):
            o_col = j + tl.arange(0, BLOCK_N)
            q = load_rows(basis, rank, 1, o_col, partner_rows, rank, R, tl.float32)
            q = q * tau
            q_high = q.to(OPERAND)
            m_tile = tl.dot(m_high, tl.trans(q_high), input_precision=PRECISION)
            if not EXACT:
                q_low = (q - q_high.to(tl.float32)).to(OPERAND)
                m_tile = tl.dot(m_low, tl.trans(q_high), m_tile)
                m_tile = tl.dot(m_high, tl.trans(q_low), m_tile)
            if RESIDENT:
                q_0 = (_load_eighth(q_ptr, o_col, partner_rows, rank, 0) * tau).to(OPERAND)
                dot = tl.dot(r_00, tl.trans(_outer(q_0, q_0, BLOCK_N)), input_precision=PRECISION)
                if NB == 2:
                    q_1 = (_load_eighth(q_ptr, o_col, partner_rows, rank, 1) * tau).to(OPERAND)
                    dot = tl.dot(
                        r_01, tl.trans(_outer(q_0, q_1, BLOCK_N)), dot, input_precision=PRECISION
                    )
                    dot = tl.dot(
                        r_11, tl.trans(_outer(q_1, q_1, BLOCK_N)), dot, input_precision=PRECISION
                    )
            else:
                dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                r_ptr = residual_ptr + (first + o_row[:, None]) * 64 + tl.arange(0, 64)[None, :]
                p, s = 0, 0
                for _ in range(0, (NB * (NB + 1)) // 2):
                    q_p = (_load_eighth(q_ptr, o_col, partner_rows, rank, p) * tau).to(OPERAND)
                    q_s = (_load_eighth(q_ptr, o_col, partner_rows, rank, s) * tau).to(OPERAND)
                    r_tile = tl.load(r_ptr, mask=(o_row < rows)[:, None], other=0.0)
                    outer = _outer(q_p, q_s, BLOCK_N)
                    dot = tl.dot(r_tile, tl.trans(outer), dot, input_precision=PRECISION)
                    r_ptr += residual_rows * 64
                    p, s = _next_pair(p, s, NB)
            d = _entries(m_tile, dot, a, floor, eps, EXACT, ASM)
            acc = tl.dot(d.to(OPERAND), q_high, acc, input_precision=PRECISION)

        # X <- (1 - lr wd) X - (lr / s) (D Q) L^+, in fp64: L^+ carries the partner's condition.
        o_rr = o_r[:, None] * R + o_r[None, :]
        inverse = tl.load(inverse_ptr + (side ^ 1) * R * R + o_rr)
        direction = tl.dot((acc / tau).to(tl.float64), inverse, out_dtype=tl.float64)
        lr = tl.load(hyper_ptr + tl.where(side % 2 == 0, LR_B, LR_A))
        scaling = tl.load(row_ptr + SCALING).to(tl.float64, bitcast=True)
        kept = 1.0 - lr * tl.load(hyper_ptr + WEIGHT_DECAY)
        x_ptr = tl.load(row_ptr + PARAM).to(tl.pointer_type(PARAM_DTYPE))
        stride_row = tl.load(row_ptr + PARAM_STRIDE_ROW)
        stride_col = tl.load(row_ptr + PARAM_STRIDE_COL)
        x_ptr = x_ptr + o_row[:, None] * stride_row + o_r[None, :] * stride_col
        mask = (o_row[:, None] < rows) & (o_r[None, :] < rank)
        stored = tl.load(x_ptr, mask=mask, other=0.0)
        x = stored.to(tl.float32)
        if HAS_MASTER:
            w_ptr = tl.load(row_ptr + MASTER).to(tl.pointer_type(tl.float32))
            w_ptr = w_ptr + o_row[:, None] * rank + o_r[None, :]
            master = tl.load(w_ptr, mask=mask, other=0.0)
            # Entries that someone changed since the master was rounded are taken over.
            x = tl.where(master.to(PARAM_DTYPE) == stored, master, x)
        x = (x.to(tl.float64) * kept - direction * (lr / scaling)).to(tl.float32)
        if HAS_MASTER:
            tl.store(w_ptr, x, mask=mask)
        tl.store(x_ptr, x.to(PARAM_DTYPE), mask=mask)
