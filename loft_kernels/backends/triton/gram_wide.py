"""``gram`` above rank 32: a program has one block of one of the three sums of a chunk of rows.

Three sums of 64 x 64 fp64 numbers do not fit the registers of one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows, wide
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
def _product(
    left,
    right,
    place,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """Return block (i, j) of X^T Y over a chunk of the rows of two strided matrices.

    A matrix is its address and strides, the place the first row, the rows, the rank, i and j.
    """
    start, rows, rank, i, j = place
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    for block in range(0, CHUNK, BLOCK_N):
        o_row = start + block + tl.arange(0, BLOCK_N)
        x = load_rows(left[0], left[1], left[2], o_row, rows, rank, BLOCK_R, LEFT, i)
        y = load_rows(right[0], right[1], right[2], o_row, rows, rank, BLOCK_R, RIGHT, j)
        x, y = wide(x, BLOCK_R), wide(y, BLOCK_R)
        acc = tl.dot(tl.trans(x), y, acc, out_dtype=tl.float64)
    return acc


@triton.jit
def _gram_wide_kernel(
    table_ptr,
    tiles_ptr,
    partial_ptr,
    rank,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
):
    SIZE: tl.constexpr = R // BLOCK_R
    i_program = tl.program_id(0).to(tl.int64)
    i_tile, which = i_program // (3 * SIZE * SIZE), i_program // (SIZE * SIZE) % 3
    i, j = i_program // SIZE % SIZE * BLOCK_R, i_program % SIZE * BLOCK_R
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    rows = tl.load(row_ptr + ROWS)
    y, y_row = tl.load(row_ptr + PARAM), tl.load(row_ptr + PARAM_STRIDE_ROW)
    y = (y, y_row, tl.load(row_ptr + PARAM_STRIDE_COL))
    g, g_row = tl.load(row_ptr + GRAD), tl.load(row_ptr + GRAD_STRIDE_ROW)
    g = (g, g_row, tl.load(row_ptr + GRAD_STRIDE_COL))
    q = (tl.load(table_ptr + (side ^ 1) * COLUMNS + PARTNER_BASIS), rank, 1)
    place = (start, rows, rank, i, j)
    if which == 0:
        acc = _product(y, y, place, CHUNK, BLOCK_N, BLOCK_R, PARAM_DTYPE, PARAM_DTYPE)
    elif which == 1:
        acc = _product(q, y, place, CHUNK, BLOCK_N, BLOCK_R, tl.float32, PARAM_DTYPE)
    else:
        acc = _product(g, g, place, CHUNK, BLOCK_N, BLOCK_R, GRAD_DTYPE, GRAD_DTYPE)
    o_r = tl.arange(0, BLOCK_R)
    out_ptr = partial_ptr + (i_tile * 3 + which) * R * R
    tl.store(out_ptr + (i + o_r[:, None]) * R + j + o_r[None, :], acc)
