"""Per side: pivoted Cholesky of Y^T Y, its pseudo-inverse, the transition and the clip norm.

One program per side, everything r x r and fp64 in registers. Pivoting, tolerance and the
minimal-norm treatment of dropped columns are those of ``reference.cholesky_dropping``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.tables import (
    CHUNKS,
    COLUMNS,
    DAMPING,
    FIRST_CHUNK,
    GRAD,
    MOVES,
    NORM_SQ,
    NUMBERS,
    SCALING,
    STEP,
)
from loft_kernels.reference import PIVOT_TOLERANCE

_TOLERANCE = tl.constexpr(PIVOT_TOLERANCE)


@triton.jit
def _sum_chunks(partial_ptr, row_ptr, WHICH: tl.constexpr, R: tl.constexpr):
    """Add the partial sums of one side in order."""
    o_r = tl.arange(0, R)
    first = tl.load(row_ptr + FIRST_CHUNK)
    chunks = tl.load(row_ptr + CHUNKS)
    acc = tl.zeros((R, R), tl.float64)
    for chunk in range(0, chunks):
        base = partial_ptr + ((first + chunk) * 3 + WHICH) * R * R
        acc += tl.load(base + o_r[:, None] * R + o_r[None, :])
    return acc


@triton.jit
def _pick_row(x, j, o_r):
    """Return row j of a square tile."""
    return tl.sum(tl.where(o_r[:, None] == j, x, 0.0), axis=0)


@triton.jit
def _steps_of(row_ptr):
    """Return the step count of a side; 0 where it has no state."""
    address = tl.load(row_ptr + STEP)
    return tl.load(address.to(tl.pointer_type(tl.int64)), mask=address != 0, other=0)


@triton.jit
def store_numbers(row_ptr, other_ptr, numbers_ptr, other, norm_sq, ALTERNATE: tl.constexpr):
    """Store the norm of the other side, and whether it moves."""
    # The phase is the parity of the pair's own count: B (even sides) first, then in turns.
    own, partner_has = tl.load(other_ptr + GRAD) != 0, tl.load(row_ptr + GRAD) != 0
    steps = tl.maximum(_steps_of(row_ptr), _steps_of(other_ptr))
    moves = own
    if ALTERNATE:
        moves = own & (((steps + other) % 2 == 0) | (partner_has == 0))
    tl.store(numbers_ptr + other * NUMBERS + NORM_SQ, norm_sq)
    tl.store(numbers_ptr + other * NUMBERS + MOVES, moves.to(tl.float64))


@triton.jit
def _solve_kernel(
    table_ptr,
    partial_ptr,
    hyper_ptr,
    inverse_ptr,
    change_ptr,
    changed_ptr,
    numbers_ptr,
    rank,
    R: tl.constexpr,
    ALTERNATE: tl.constexpr,
):
    side = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    other_ptr = table_ptr + (side ^ 1) * COLUMNS
    o_r = tl.arange(0, R)
    eye = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0).to(tl.float64)

    gram = _sum_chunks(partial_ptr, row_ptr, 0, R)
    trace = tl.sum(tl.sum(gram * eye, axis=0), axis=0)
    live = tl.where(o_r < rank, 1.0, 0.0).to(tl.float64)
    gram += eye * live[:, None] * (tl.load(hyper_ptr + DAMPING) * trace / rank)
    length_sq = tl.sum(gram * eye, axis=0)

    # Every pivot is taken off all columns to come at once: `gram` becomes what is left of it, and a
    # row of `inverse`, at first of the identity, what is left of it until it is a pivot's own.
    inverse = eye
    left = tl.where(length_sq > 0, 1.0, 0.0).to(tl.float64)
    left = tl.where(o_r < rank, left, -1.0)
    kept = tl.zeros((R,), tl.int32)
    for _ in range(0, rank):
        j = tl.argmax(left, axis=0)
        keep = tl.max(left, axis=0) > _TOLERANCE
        column = tl.where(left >= 0, _pick_row(gram, j, o_r), 0.0)
        pivot = tl.sum(tl.where(o_r == j, column, 0.0), axis=0)
        scale = tl.where(keep, 1.0 / tl.sqrt(tl.where(keep & (pivot > 0), pivot, 1.0)), 0.0)
        column = column * scale
        solved = _pick_row(inverse, j, o_r) * scale
        gram -= column[:, None] * column[None, :]
        is_j = o_r == tl.where(keep, j, -1)
        inverse -= tl.where(is_j, 0.0, column)[:, None] * solved[None, :]
        inverse = tl.where(is_j[:, None], solved[None, :], inverse)
        kept = tl.where(is_j, 1, kept)
        left -= tl.where(
            length_sq > 0, column * column / tl.where(length_sq > 0, length_sq, 1.0), 0.0
        )
        left = tl.where(o_r == j, -1.0, left)

    kept = kept != 0
    # What is left of a dropped row d is e_d - Z_d.
    z = tl.where(kept[:, None], 0.0, eye - inverse)
    inverse = tl.where(kept[:, None], inverse, 0.0)
    if tl.sum(kept.to(tl.int32), axis=0) < rank:
        # L^+ = M (I + Z^T Z)^-1 (I + Z^T), Z = L_dropped M; Gauss-Jordan, for I + Z^T Z >= I.
        inner = eye + tl.dot(tl.trans(z), z, out_dtype=tl.float64)
        right = tl.where(kept[:, None], eye, 0.0) + tl.trans(z)
        for j in range(0, rank):
            pivot = tl.sum(tl.where(o_r == j, _pick_row(inner, j, o_r), 0.0), axis=0)
            inner_row = _pick_row(inner, j, o_r) / pivot
            right_row = _pick_row(right, j, o_r) / pivot
            factor = tl.sum(tl.where(o_r[None, :] == j, inner, 0.0), axis=1)
            factor = tl.where(o_r == j, 0.0, factor)
            inner -= factor[:, None] * inner_row[None, :]
            right -= factor[:, None] * right_row[None, :]
            inner = tl.where(o_r[:, None] == j, inner_row[None, :], inner)
            right = tl.where(o_r[:, None] == j, right_row[None, :], right)
        inverse = tl.dot(inverse, right, out_dtype=tl.float64)

    o_rr = o_r[:, None] * R + o_r[None, :]
    tl.store(inverse_ptr + side * R * R + o_rr, inverse)

    # The other side is the factor whose partner this side is; `basis` marks it if Q changes.
    other = side ^ 1
    tl.store(changed_ptr + other, 0)
    cross = _sum_chunks(partial_ptr, row_ptr, 1, R)
    change = tl.dot(cross, tl.trans(inverse), out_dtype=tl.float64)
    tl.store(change_ptr + other * R * R + o_rr, change.to(tl.float32))
    grads = _sum_chunks(partial_ptr, other_ptr, 2, R)
    scaling = tl.load(other_ptr + SCALING).to(tl.float64, bitcast=True)
    projected = tl.dot(inverse, grads, out_dtype=tl.float64) * inverse
    norm_sq = tl.sum(tl.sum(projected, axis=0), axis=0) / (scaling * scaling)
    store_numbers(row_ptr, other_ptr, numbers_ptr, other, norm_sq, ALTERNATE)
