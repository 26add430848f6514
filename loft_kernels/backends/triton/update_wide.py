"""The hot loop above rank 64, where neither the halves of m nor L^+ fit beside the tiles.

m~ and w~ are sums over blocks of 64 columns, whose operands are formed anew for every tile. At the
end ``D Q`` of a program's rows is parked in the memory of their residuals, which is larger and
which nothing else reads; ``(D Q) L^+`` is formed and applied from there, a few columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.operands import load_half


@triton.jit
def first_moment_tile(
    m_ptr,
    partner,
    o_row,
    rows,
    first,
    rank,
    scale,
    BLOCK_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return m~ of some rows for the partner rows from first on."""
    acc = tl.zeros((o_row.shape[0], BLOCK_N), tl.float32)
    for k in range(0, rank, 64):
        high, low, _ = load_half(m_ptr, o_row, rows, k + tl.arange(0, 64), rank, scale, 1, DTYPE)
        q = tl.trans(partner.load([first, PRODUCTS + k]))
        acc = tl.dot(high, q, acc, input_precision="ieee")
        if tl.float16 == DTYPE:
            acc = tl.dot(low, q, acc, input_precision="ieee")
            q_low = tl.trans(partner.load([first, PRODUCTS + R + k]))
            acc = tl.dot(high, q_low, acc, input_precision="ieee")
    return acc


@triton.jit
def direction_tile(
    w_ptr,
    partner,
    o_row,
    first,
    rank,
    BLOCK_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return w~ of some rows for the partner rows from first on."""
    acc = tl.zeros((o_row.shape[0], BLOCK_N), tl.float32)
    for k in range(0, rank, 64):
        w = tl.load(w_ptr + o_row[:, None] * R + k + tl.arange(0, 64)[None, :])
        q = tl.trans(partner.load([first, PRODUCTS + k]))
        acc = tl.dot(w, q, acc, input_precision="ieee")
        if tl.float16 == DTYPE:
            q_low = tl.trans(partner.load([first, PRODUCTS + R + k]))
            acc = tl.dot(w, q_low, acc, input_precision="ieee")
    return acc


@triton.jit
def park(projected, park_ptr, o_row):
    """Write a tile of D Q where :func:`parked_direction` finds it."""
    o_r = tl.arange(0, projected.shape[1])
    tl.debug_barrier()
    tl.store(park_ptr + o_row[:, None] * projected.shape[1] + o_r[None, :], projected)
    tl.debug_barrier()


@triton.jit
def parked_direction(park_ptr, inverse_ptr, o_row, col, rank, R: tl.constexpr, B: tl.constexpr):
    """Return columns ``col .. col + B`` of ``(D Q) L^+``, in fp64."""
    o_b = tl.arange(0, B)
    direction = tl.zeros((o_row.shape[0], B), tl.float64)
    for k in range(0, rank, B):
        x = tl.load(park_ptr + o_row[:, None] * R + k + o_b[None, :]).to(tl.float64)
        inverse = tl.load(inverse_ptr + (k + o_b[:, None]) * R + col + o_b[None, :])
        direction = tl.dot(x, inverse, direction, out_dtype=tl.float64)
    return direction
