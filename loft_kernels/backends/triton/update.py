"""The hot loop: Adam's step in every entry of the virtual weight, projected back on the fly.

For a block of rows i of the moving factor and tiles of partner rows j:

    m~ = m^ Q^T                    v = a m~^2 + R . (Q (x) Q)        (two GEMMs)
    D = m~ / (sqrt(max(v, m~^2 / bound)) + eps)                      (entry by entry)
    D Q                                                              (a third GEMM, accumulated)

and at the end ``X <- (1 - lr wd) X - (lr / s) (D Q) L^+``. The second moment is *centred*:
``R = P^ - a m^^T m^`` with ``a = m^ P^ m^^T / |m^|^4``, so that fp16 touches only the residual,
and m~ is the sum of three products of fp16 halves. ``operands`` prepares what is streamed; tiles
arrive through the tensor memory accelerator. No m x n tensor exists. Up to rank 16 a row's R stays
beside the tiles; above, the contraction over the slices of R is a GEMM main loop of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows
from loft_kernels.backends.triton.operands import centre, from_row, residual_slice, scale_of
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
    PARTNER_ROW,
    RESIDUAL_ROW,
    ROWS,
    SCALING,
    SECOND_MOMENT,
    SKIP,
    WEIGHT_DECAY,
)


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
    products,
    halves,
    residual,
    centre_ptr,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    NB: tl.constexpr,
    B: tl.constexpr,
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
        o_row = start + tl.arange(0, BLOCK_M)
        o_r = tl.arange(0, R)
        tau = scale_of(partner_rows, rank)

        # The rows' operands: sigma m in two halves, and the residual.
        if RESIDENT:
            m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, rows, start, rank)
            o_local = tl.arange(0, BLOCK_M)
            a, sigma_sq = centre(m_ptr, p_ptr, o_local, left, rank, bias1, bias2, BLOCK_M, NB, B)
        else:
            first = tl.load(row_ptr + RESIDUAL_ROW)
            o_residual = (first + start).to(tl.int32)
            a = tl.load(centre_ptr + 2 * (first + o_row))
            sigma_sq = tl.load(centre_ptr + 2 * (first + o_row) + 1)
        sigma = tl.sqrt(sigma_sq)
        eps = tl.load(hyper_ptr + EPS).to(tl.float32) * sigma * tau
        m = load_rows(tl.load(row_ptr + EXP_AVG), rank, 1, o_row, rows, rank, R, tl.float32)
        m = m / bias1 * sigma[:, None]
        m_high = m.to(OPERAND)
        m_low = (m - m_high.to(tl.float32)).to(OPERAND)
        if RESIDENT:
            r_00 = residual_slice(
                m_ptr, p_ptr, o_local, left, rank, a, sigma_sq, bias1, bias2, 0, 0, BLOCK_M, B
            ).to(OPERAND)
            if NB == 2:
                r_01 = residual_slice(
                    m_ptr,
                    p_ptr,
                    o_local,
                    left,
                    rank,
                    a,
                    2 * sigma_sq,
                    bias1,
                    bias2,
                    0,
                    1,
                    BLOCK_M,
                    B,
                ).to(OPERAND)
                r_11 = residual_slice(
                    m_ptr, p_ptr, o_local, left, rank, a, sigma_sq, bias1, bias2, 1, 1, BLOCK_M, B
                ).to(OPERAND)

        SLICES: tl.constexpr = (NB * (NB + 1)) // 2
        S: tl.constexpr = B * B
        o_partner = tl.load(row_ptr + PARTNER_ROW).to(tl.int32)
        acc = tl.zeros((BLOCK_M, R), tl.float32)
        for j in range(0, partner_rows.to(tl.int32), BLOCK_N):
            q_high = halves.load([o_partner + j, SLICES * S])
            q_low = halves.load([o_partner + j, SLICES * S + R])
            m_tile = tl.dot(m_high, tl.trans(q_high), input_precision=PRECISION)
            if not EXACT:
                m_tile = tl.dot(m_low, tl.trans(q_high), m_tile)
                m_tile = tl.dot(m_high, tl.trans(q_low), m_tile)
            if RESIDENT:
                product = products.load([o_partner + j, 0])
                dot = tl.dot(r_00, tl.trans(product), input_precision=PRECISION)
                if NB == 2:
                    product = products.load([o_partner + j, S])
                    dot = tl.dot(r_01, tl.trans(product), dot, input_precision=PRECISION)
                    product = products.load([o_partner + j, 2 * S])
                    dot = tl.dot(r_11, tl.trans(product), dot, input_precision=PRECISION)
            else:
                dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for k in range(0, SLICES):
                    rows_of = residual.load([o_residual, k * S])
                    product = products.load([o_partner + j, k * S])
                    dot = tl.dot(rows_of, tl.trans(product), dot, input_precision=PRECISION)
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
