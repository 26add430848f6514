"""Gram products of every factor: Y^T Y, Q_prev^T Y and grad^T grad, in fp64.

One program reduces one chunk of rows of one side and stores its three r x r partial sums; `solve`
adds them in a fixed order, so two runs agree bitwise. Reads each factor, its gradient and the
basis of the last visit once. The products of fp32 numbers are exact in fp64; anything less would
lose the square of the condition number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.tables import (
    COLUMNS,
    GRAD,
    GRAD_STRIDE_COL,
    GRAD_STRIDE_ROW,
    PARAM,
    PARAM_STRIDE_COL,
    PARAM_STRIDE_ROW,
    PARTNER_BASIS,
    ROWS,
)


@triton.jit
def load_rows(
    address,
    stride_row,
    stride_col,
    o_row,
    rows,
    rank,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    first_col=0,
):
    """Load a ``rows x R`` tile of a strided matrix, zero outside; an address of 0 is all zero."""
    o_col = first_col + tl.arange(0, R)
    x_ptr = address.to(tl.pointer_type(DTYPE))
    rows = tl.where(address != 0, rows, 0)
    mask = (o_row[:, None] < rows) & (o_col[None, :] < rank)
    offsets = o_row[:, None] * stride_row + o_col[None, :].to(tl.int64) * stride_col
    return tl.load(x_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def wide(x, R: tl.constexpr):
    """Raise a ``rows x R`` tile to fp64, exactly.

    A product with the identity stands between 16-bit loads and fp64 products: Triton cannot feed
    the latter from the former's layout.
    """
    if x.dtype.primitive_bitwidth == 16:
        o_r = tl.arange(0, R)
        x = tl.dot(x, tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0).to(x.dtype))
    return x.to(tl.float64)


@triton.jit
def _gram_kernel(
    table_ptr,
    tiles_ptr,
    partial_ptr,
    rank,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    other_ptr = table_ptr + (side ^ 1) * COLUMNS
    rows = tl.load(row_ptr + ROWS)
    param, param_row, param_col = (
        tl.load(row_ptr + PARAM),
        tl.load(row_ptr + PARAM_STRIDE_ROW),
        tl.load(row_ptr + PARAM_STRIDE_COL),
    )
    grad, grad_row, grad_col = (
        tl.load(row_ptr + GRAD),
        tl.load(row_ptr + GRAD_STRIDE_ROW),
        tl.load(row_ptr + GRAD_STRIDE_COL),
    )
    basis = tl.load(other_ptr + PARTNER_BASIS)

    acc_yy = tl.zeros((R, R), tl.float64)
    acc_qy = tl.zeros((R, R), tl.float64)
    acc_gg = tl.zeros((R, R), tl.float64)
    for block in range(0, CHUNK, BLOCK_N):
        o_row = start + block + tl.arange(0, BLOCK_N)
        y = load_rows(param, param_row, param_col, o_row, rows, rank, R, PARAM_DTYPE)
        q = load_rows(basis, rank, 1, o_row, rows, rank, R, tl.float32)
        g = load_rows(grad, grad_row, grad_col, o_row, rows, rank, R, GRAD_DTYPE)
        y, q, g = wide(y, R), wide(q, R), wide(g, R)
        acc_yy = tl.dot(tl.trans(y), y, acc_yy, out_dtype=tl.float64)
        acc_qy = tl.dot(tl.trans(q), y, acc_qy, out_dtype=tl.float64)
        acc_gg = tl.dot(tl.trans(g), g, acc_gg, out_dtype=tl.float64)
    o_r = tl.arange(0, R)
    out_ptr = partial_ptr + i_tile * 3 * R * R + o_r[:, None] * R + o_r[None, :]
    tl.store(out_ptr, acc_yy)
    tl.store(out_ptr + R * R, acc_qy)
    tl.store(out_ptr + 2 * R * R, acc_gg)
