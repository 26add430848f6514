"""The decision of the step, and the orthonormal basis of every partner: ``Q = Y L^-T``.

Every program takes the same decision from the norms of all sides (is everything finite, what is
the clip coefficient?), which costs a few hundred loads and spares a launch. One program per chunk
of rows (above rank 64 also for BLOCK_R columns) replaces the stored basis by the new one and marks
where a single bit differs: only then do the moments have to be carried over. The first chunk of
each side also advances its counters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows, wide
from loft_kernels.backends.triton.tables import (
    BETA1,
    BETA2,
    BIAS1,
    BIAS2,
    BOUND,
    COEFFICIENT,
    COLUMNS,
    GRAD,
    GUARD,
    MAX_NORM,
    MOVES,
    NORM,
    NORM_SQ,
    NUMBERS,
    PARAM,
    PARAM_STRIDE_COL,
    PARAM_STRIDE_ROW,
    PARTNER_BASIS,
    ROWS,
    SKIP,
    STEP,
)

_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _decide(all_numbers_ptr, all_sides, hyper_ptr, outside_ptr, SIDES: tl.constexpr):
    """Return (skip, coefficient, norm) of the whole step; see ``clipping.decide``."""
    o_side = tl.arange(0, SIDES)
    m_side = o_side < all_sides
    norm_sq = tl.load(all_numbers_ptr + o_side * NUMBERS + NORM_SQ, mask=m_side, other=0.0)
    moves = tl.load(all_numbers_ptr + o_side * NUMBERS + MOVES, mask=m_side, other=0.0)
    plain_sq = tl.load(outside_ptr)
    scale = tl.load(outside_ptr + 1)
    found_inf = tl.load(outside_ptr + 2)
    norm = tl.sqrt(tl.sum(tl.where(moves != 0, norm_sq, 0.0), axis=0) + plain_sq) / scale
    max_norm = tl.load(hyper_ptr + MAX_NORM)
    coefficient = 1.0 / scale
    if max_norm < float("inf"):
        coefficient = tl.minimum(max_norm / (norm + 1e-6), 1.0) / scale
    # Squares of the scaled gradients have to fit the fp32 state; NaN fails every comparison.
    fits = tl.where(norm_sq * coefficient * coefficient < _LARGEST, 0, 1)
    misfits = tl.sum(tl.where(m_side, fits, 0), axis=0)
    finite = (norm < float("inf")) & (misfits == 0) & (found_inf == 0.0)
    return tl.where(finite, 0.0, 1.0), coefficient, norm


@triton.jit
def _advance_counters(row_ptr, numbers_ptr, side, hyper_ptr):
    """Count the step of one side and derive its bias corrections and guard."""
    step_ptr = tl.load(row_ptr + STEP).to(tl.pointer_type(tl.int64))
    guard_ptr = tl.load(row_ptr + GUARD).to(tl.pointer_type(tl.float64))
    beta1, beta2 = tl.load(hyper_ptr + BETA1), tl.load(hyper_ptr + BETA2)
    step = tl.load(step_ptr) + 1
    count = step.to(tl.float64)
    bias1 = 1.0 - tl.where(beta1 > 0, tl.exp(count * tl.log(tl.where(beta1 > 0, beta1, 1.0))), 0.0)
    bias2 = 1.0 - tl.where(beta2 > 0, tl.exp(count * tl.log(tl.where(beta2 > 0, beta2, 1.0))), 0.0)
    guard = tl.load(guard_ptr)
    carried = tl.where(
        beta2 > 0, guard * beta1 * beta1 / tl.where(beta2 > 0, beta2, 1.0), float("inf")
    )
    carried = tl.where((guard == 0) | (beta1 == 0), 0.0, carried)
    guard = carried + (1 - beta1) * (1 - beta1) / (1 - beta2)
    tl.store(step_ptr, step)
    tl.store(guard_ptr, guard)
    tl.store(numbers_ptr + side * NUMBERS + BIAS1, bias1)
    tl.store(numbers_ptr + side * NUMBERS + BIAS2, bias2)
    tl.store(numbers_ptr + side * NUMBERS + BOUND, guard * bias2 / (bias1 * bias1))


@triton.jit
def _basis_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    outside_ptr,
    inverse_ptr,
    numbers_ptr,
    all_numbers_ptr,
    all_sides,
    decision_ptr,
    skipped_ptr,
    changed_ptr,
    rank,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R: tl.constexpr,
    SIDES: tl.constexpr,
    COUNT_SKIPS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
):
    i_tile, col = tl.program_id(0).to(tl.int64), 0
    if BLOCK_R < R:
        i_tile, col = i_tile // (R // BLOCK_R), i_tile % (R // BLOCK_R) * BLOCK_R
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    skip, coefficient, norm = _decide(all_numbers_ptr, all_sides, hyper_ptr, outside_ptr, SIDES)
    if (i_tile == 0) & (col == 0):
        tl.store(decision_ptr + SKIP, skip)
        tl.store(decision_ptr + COEFFICIENT, coefficient)
        tl.store(decision_ptr + NORM, norm)
        if COUNT_SKIPS:
            tl.store(skipped_ptr, tl.load(skipped_ptr) + skip.to(tl.int64))

    # This side is the partner of the other one, whose state keeps the basis.
    factor = side ^ 1
    factor_ptr = table_ptr + factor * COLUMNS
    row_ptr = table_ptr + side * COLUMNS
    if (skip == 0) & (tl.load(factor_ptr + GRAD) != 0):
        if (start == 0) & (col == 0):
            _advance_counters(factor_ptr, numbers_ptr, factor, hyper_ptr)
        rows = tl.load(row_ptr + ROWS)
        param = tl.load(row_ptr + PARAM)
        param_row, param_col = (
            tl.load(row_ptr + PARAM_STRIDE_ROW),
            tl.load(row_ptr + PARAM_STRIDE_COL),
        )
        basis = tl.load(factor_ptr + PARTNER_BASIS)
        o_r = tl.arange(0, BLOCK_R)
        # Rows of L^-1 are columns of L^-T.
        block_ptr = inverse_ptr + side * R * R + (col + o_r[:, None]) * R + o_r[None, :]
        if BLOCK_R == R:
            inverse = tl.load(block_ptr)
        differs = 0
        for block in range(0, CHUNK, BLOCK_N):
            o_row = start + block + tl.arange(0, BLOCK_N)
            if BLOCK_R == R:
                y = load_rows(param, param_row, param_col, o_row, rows, rank, R, PARAM_DTYPE)
            q_prev = load_rows(basis, rank, 1, o_row, rows, rank, BLOCK_R, tl.float32, col)
            if BLOCK_R == R:
                q = tl.dot(wide(y, R), tl.trans(inverse), out_dtype=tl.float64)
            else:
                q = tl.zeros((BLOCK_N, BLOCK_R), tl.float64)
                for k in range(0, R, BLOCK_R):
                    y = load_rows(
                        param, param_row, param_col, o_row, rows, rank, BLOCK_R, PARAM_DTYPE, k
                    )
                    inverse_t = tl.trans(tl.load(block_ptr + k))
                    q = tl.dot(wide(y, BLOCK_R), inverse_t, q, out_dtype=tl.float64)
            q = q.to(tl.float32)
            differs += tl.sum(tl.sum(tl.where(q != q_prev, 1, 0), axis=1), axis=0)
            mask = (o_row[:, None] < rows) & (col + o_r[None, :] < rank)
            q_ptr = basis.to(tl.pointer_type(tl.float32))
            tl.store(q_ptr + o_row[:, None] * rank + col + o_r[None, :], q, mask=mask)
        if differs > 0:
            tl.atomic_or(changed_ptr + factor, 1)
