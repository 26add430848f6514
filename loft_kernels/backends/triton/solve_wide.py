"""``solve`` above rank 64, where squares do not fit registers: the same factors, row by row.

One program per side works on squares in memory. Pivots, tolerance and what is dropped are those of
``solve``; L and its inverse M are kept transposed and in the order of pivots, so that a step of the
elimination reads the rows of its predecessors. Dropped columns come last. Each leaves
``e_d - Z_d``, a direction that L^T maps to zero; they are orthonormalised as they come, and the
pseudo-inverse is ``L^+ = M (I - N^T N)``, N the rows of these directions. That is
``M (I + Z^T Z)^-1 (I + Z^T)`` of ``reference`` without a second factorisation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.solve import _TOLERANCE, store_numbers
from loft_kernels.backends.triton.tables import (
    CHUNKS,
    COLUMNS,
    DAMPING,
    FIRST_CHUNK,
    SCALING,
)

# Squares of workspace per side: three sums, L^T and M.
SQUARES = tl.constexpr(5)


@triton.jit
def _sum_chunks(partial_ptr, row_ptr, out_ptr, WHICH: tl.constexpr, R: tl.constexpr):
    """Add the partial sums of one side in order, into memory."""
    first = tl.load(row_ptr + FIRST_CHUNK)
    chunks = tl.load(row_ptr + CHUNKS)
    for start in range(0, R * R, 4096):
        o_entry = start + tl.arange(0, 4096)
        acc = tl.zeros((4096,), tl.float64)
        for chunk in range(0, chunks):
            acc += tl.load(partial_ptr + ((first + chunk) * 3 + WHICH) * R * R + o_entry)
        tl.store(out_ptr + o_entry, acc)


@triton.jit
def _eliminated(chol_ptr, rows_ptr, j, kept, BLOCK: tl.constexpr, R: tl.constexpr):
    """Return what the kept pivots contribute to column j of L L^T, and to row j of L M."""
    o_block, o_r = tl.arange(0, BLOCK), tl.arange(0, R)
    column = tl.zeros((BLOCK, R), tl.float64)
    solved = tl.zeros((BLOCK, R), tl.float64)
    for first in range(0, kept, BLOCK):
        o_k = first + o_block
        live = o_k < kept
        entry = tl.load(chol_ptr + o_k * R + j, mask=live, other=0.0)[:, None]
        o_rows = o_k[:, None] * R + o_r[None, :]
        column += entry * tl.load(chol_ptr + o_rows, mask=live[:, None], other=0.0)
        solved += entry * tl.load(rows_ptr + o_rows, mask=live[:, None], other=0.0)
    return tl.sum(column, axis=0), tl.sum(solved, axis=0)


@triton.jit
def _without(x, rows_ptr, first, last, BLOCK: tl.constexpr, R: tl.constexpr):
    """Project orthonormal rows out of a vector."""
    o_block, o_r = tl.arange(0, BLOCK), tl.arange(0, R)
    for start in range(first, last, BLOCK):
        o_k = start + o_block
        mask = (o_k < last)[:, None]
        rows = tl.load(rows_ptr + o_k[:, None] * R + o_r[None, :], mask=mask, other=0.0)
        x -= tl.sum(tl.sum(rows * x[None, :], axis=1)[:, None] * rows, axis=0)
    return x


@triton.jit
def _invert(
    gram_ptr,
    chol_ptr,
    rows_ptr,
    inverse_ptr,
    damping,
    rank,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
):
    """Write the pseudo-inverse of the pivoted Cholesky factor of a Gram matrix."""
    o_r = tl.arange(0, R)
    length_sq = tl.load(gram_ptr + o_r * (R + 1))
    ridge = damping * tl.sum(length_sq, axis=0) / rank
    length_sq += tl.where(o_r < rank, ridge, 0.0)
    left = tl.where(length_sq > 0, 1.0, 0.0).to(tl.float64)
    left = tl.where(o_r < rank, left, -1.0)
    kept = 0
    for k in range(0, rank):
        j = tl.argmax(left, axis=0)
        keep = tl.max(left, axis=0) > _TOLERANCE
        known, solved = _eliminated(chol_ptr, rows_ptr, j, kept, BLOCK, R)
        solved = tl.where(o_r == j, 1.0, 0.0) - solved
        row = solved * 0.0
        if keep:
            column = tl.load(gram_ptr + j * R + o_r) + tl.where(o_r == j, ridge, 0.0) - known
            column = tl.where(left >= 0, column, 0.0)
            pivot = tl.sum(tl.where(o_r == j, column, 0.0), axis=0)
            scale = 1.0 / tl.sqrt(tl.where(pivot > 0, pivot, 1.0))
            column, row = column * scale, solved * scale
            tl.store(chol_ptr + kept * R + o_r, column)
            tl.store(rows_ptr + kept * R + o_r, row)
            left -= tl.where(
                length_sq > 0, column * column / tl.where(length_sq > 0, length_sq, 1.0), 0.0
            )
            kept += 1
        elif kept > 0:
            # Twice is enough; without a kept column there is nothing to correct.
            for _ in range(0, 2):
                solved = _without(solved, rows_ptr, kept, k, BLOCK, R)
            solved /= tl.sqrt(tl.sum(solved * solved, axis=0))
            tl.store(rows_ptr + k * R + o_r, solved)
        tl.store(inverse_ptr + j * R + o_r, row)
        left = tl.where(o_r == j, -1.0, left)
        tl.debug_barrier()
    for j in range(rank, R):
        tl.store(inverse_ptr + j * R + o_r, tl.zeros((R,), tl.float64))
    if (kept > 0) & (kept < rank):
        for j in range(0, rank):
            row = tl.load(inverse_ptr + j * R + o_r)
            tl.store(inverse_ptr + j * R + o_r, _without(row, rows_ptr, kept, rank, BLOCK, R))


@triton.jit
def _block(x_ptr, i, j, B: tl.constexpr, R: tl.constexpr):
    """Load block (i, j) of a square."""
    o_b = tl.arange(0, B)
    return tl.load(x_ptr + (i + o_b[:, None]) * R + j + o_b[None, :])


@triton.jit
def _solve_wide_kernel(
    table_ptr,
    partial_ptr,
    hyper_ptr,
    inverse_ptr,
    change_ptr,
    changed_ptr,
    numbers_ptr,
    squares_ptr,
    rank,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    ALTERNATE: tl.constexpr,
):
    B: tl.constexpr = 32  # rows and columns of a block of the products
    side = tl.program_id(0).to(tl.int64)
    other = side ^ 1
    row_ptr = table_ptr + side * COLUMNS
    other_ptr = table_ptr + other * COLUMNS
    gram_ptr = squares_ptr + side * SQUARES * R * R
    cross_ptr, grads_ptr = gram_ptr + R * R, gram_ptr + 2 * R * R
    inverse_ptr += side * R * R
    _sum_chunks(partial_ptr, row_ptr, gram_ptr, 0, R)
    _sum_chunks(partial_ptr, row_ptr, cross_ptr, 1, R)
    _sum_chunks(partial_ptr, other_ptr, grads_ptr, 2, R)
    tl.debug_barrier()
    _invert(
        gram_ptr,
        gram_ptr + 3 * R * R,
        gram_ptr + 4 * R * R,
        inverse_ptr,
        tl.load(hyper_ptr + DAMPING),
        rank,
        BLOCK,
        R,
    )
    tl.debug_barrier()

    # The other side is the factor whose partner this side is; `basis` marks it if Q changes.
    tl.store(changed_ptr + other, 0)
    change_ptr += other * R * R
    o_b = tl.arange(0, B)
    norm_sq = tl.zeros((B, B), tl.float64)
    for block in range(0, (R // B) * (R // B)):
        i, j = block // (R // B) * B, block % (R // B) * B
        change = tl.zeros((B, B), tl.float64)
        projected = tl.zeros((B, B), tl.float64)
        for k in range(0, R, B):
            inverse_t = tl.trans(_block(inverse_ptr, j, k, B, R))
            change = tl.dot(_block(cross_ptr, i, k, B, R), inverse_t, change, out_dtype=tl.float64)
            inverse, grads = _block(inverse_ptr, i, k, B, R), _block(grads_ptr, k, j, B, R)
            projected = tl.dot(inverse, grads, projected, out_dtype=tl.float64)
        tl.store(change_ptr + (i + o_b[:, None]) * R + j + o_b[None, :], change.to(tl.float32))
        norm_sq += projected * _block(inverse_ptr, i, j, B, R)
    scaling = tl.load(other_ptr + SCALING).to(tl.float64, bitcast=True)
    norm_sq = tl.sum(tl.sum(norm_sq, axis=0), axis=0) / (scaling * scaling)
    store_numbers(row_ptr, other_ptr, numbers_ptr, other, norm_sq, ALTERNATE)
