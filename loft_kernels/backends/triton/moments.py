"""Scaled gradient, transport and moving averages, row by row.

``g = grad L^-T / s`` in fp64, then per row ``m <- b1 m C + (1 - b1) g`` and
``P <- b2 C^T P C + (1 - b2) g^T g`` in fp32 on packed P. The products with C are skipped where the
partner has not changed, which under alternation is always the idle side. Reads and writes m and P
once; a row's r x r matrix never leaves the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows
from loft_kernels.backends.triton.tables import (
    BETA1,
    BETA2,
    COEFFICIENT,
    COLUMNS,
    EXP_AVG,
    GRAD,
    GRAD_STRIDE_COL,
    GRAD_STRIDE_ROW,
    ROWS,
    SCALING,
    SECOND_MOMENT,
    SIGN,
    SKIP,
)


@triton.jit
def packed_index(i, j, rank):
    """Return the place of entry (i, j) of a symmetric matrix in its packed upper triangle."""
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    return low * rank - (low * (low - 1)) // 2 + high - low


@triton.jit
def _carry(p, c, BLOCK_M: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """Form C^T P C for every row of a ``rows x R x R`` tile."""
    if R < 16:  # too narrow for a matrix product
        p = tl.sum(p[:, :, :, None] * c[None, None, :, :], axis=2)
        p = tl.sum(p[:, :, None, :] * c[None, :, :, None], axis=1)
    else:
        p = tl.dot(tl.reshape(p, (BLOCK_M * R, R)), c, input_precision=PRECISION)
        p = tl.permute(tl.reshape(p, (BLOCK_M, R, R)), (0, 2, 1))
        p = tl.dot(tl.reshape(p, (BLOCK_M * R, R)), c, input_precision=PRECISION)
        p = tl.reshape(p, (BLOCK_M, R, R))
    return p


@triton.jit
def _moments_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    inverse_ptr,
    change_ptr,
    changed_ptr,
    rank,
    BLOCK_M: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    grad = tl.load(row_ptr + GRAD)
    if (grad != 0) & (tl.load(decision_ptr + SKIP) == 0):
        rows = tl.load(row_ptr + ROWS)
        grad_row, grad_col = (
            tl.load(row_ptr + GRAD_STRIDE_ROW),
            tl.load(row_ptr + GRAD_STRIDE_COL),
        )
        beta1 = tl.load(hyper_ptr + BETA1).to(tl.float32)
        beta2 = tl.load(hyper_ptr + BETA2)
        fresh1 = (1.0 - tl.load(hyper_ptr + BETA1)).to(tl.float32)
        fresh2 = (1.0 - beta2).to(tl.float32)
        beta2 = beta2.to(tl.float32)
        scaling = tl.load(row_ptr + SCALING).to(tl.float64, bitcast=True)
        coefficient = tl.load(decision_ptr + COEFFICIENT) * tl.load(hyper_ptr + SIGN) / scaling

        o_r = tl.arange(0, R)
        o_rr = o_r[:, None] * WIDTH + o_r[None, :]
        o_row = start + tl.arange(0, BLOCK_M)
        inverse = tl.load(inverse_ptr + (side ^ 1) * WIDTH * WIDTH + o_rr) * coefficient
        g = load_rows(grad, grad_row, grad_col, o_row, rows, rank, R, GRAD_DTYPE).to(tl.float64)
        g = tl.sum(g[:, :, None] * tl.trans(inverse)[None, :, :], axis=1).to(tl.float32)

        # Addresses inside a tile are 32-bit offsets from its first row: they are most of the
        # kernel's registers.
        o_local = tl.arange(0, BLOCK_M)
        live = o_local < rows - start
        m_row = live[:, None] & (o_r[None, :] < rank)
        m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32)) + start * rank
        m_ptr = m_ptr + (o_local[:, None] * rank + o_r[None, :])
        m = tl.load(m_ptr, mask=m_row, other=0.0)

        i, j = o_r[None, :, None], o_r[None, None, :]
        packed = (rank * (rank + 1)) // 2
        p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32)) + start * packed
        p_ptr = p_ptr + (o_local[:, None, None] * packed + packed_index(i, j, rank))
        m_full = live[:, None, None] & (i < rank) & (j < rank)
        m_upper = m_full & (i <= j)
        if tl.load(changed_ptr + side) != 0:
            c = tl.load(change_ptr + side * WIDTH * WIDTH + o_rr)
            m = tl.sum(m[:, :, None] * c[None, :, :], axis=1)
            p = tl.load(p_ptr, mask=m_full, other=0.0)
            p = _carry(p, c, BLOCK_M, R, PRECISION)
            # Reads of a lower entry and the write of its upper twin come from different threads.
            tl.debug_barrier()
        else:
            p = tl.load(p_ptr, mask=m_upper, other=0.0)
        m = beta1 * m + fresh1 * g
        p = beta2 * p + fresh2 * (g[:, :, None] * g[:, None, :])
        tl.store(m_ptr, m, mask=m_row)
        tl.store(p_ptr, p, mask=m_upper)
