"""What `moments_hopper` does to the rows of both factors: g, m and ``C^T P C``, in Gluon.

A row's P is a square of 64 x 64, one tile of the tensor cores. It enters as its upper triangle T
with half the diagonal, scaled by a power of two; the halves of ``P = T + T^T`` come together on
their way to registers. ``Y = P C`` and ``C^T Y`` are three products of fp16 halves each, and Y goes
through shared memory. g and m are formed in fp64 for 64 rows at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loft_kernels.backends.triton.moments import prefetch
from loft_kernels.backends.triton.operands_hopper import SQUARE
from loft_kernels.backends.triton.products import C_SCALE, UNSCALE, powers
from loft_kernels.backends.triton.tables import (
    BETA1,
    GRAD,
    GRAD_STRIDE_COL,
    GRAD_STRIDE_ROW,
)

# How P of a row is laid out as it lies in memory. A warp's entries are contiguous, and the rows of
# the triangle take turns between the warps, which then have as many entries each.
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))

# How P enters the products.
BY_ROW = gl.constexpr(gl.BlockedLayout([16, 2], [1, 32], [4, 1], [1, 0]))

# Triton 3.9 renamed it.
fetch = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

# Rows of an fp64 product's instruction, as the compiler itself chooses them.
_ROWS64 = 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 8

# How g and m of 64 rows are laid out.
WIDE = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [_ROWS64, 8]))


@gluon.jit
def _product64(
    a_ptr, a_row, a_col, rows, b_ptr, b_row, b_col, RANK: gl.constexpr, LAYOUT: gl.constexpr
):
    """Multiply 64 rows of a strided matrix by an R x R matrix in fp64, 16 columns at a time."""
    left: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, LAYOUT, 1)
    o_row = gl.arange(0, SQUARE, gl.SliceLayout(1, left))
    o_a = gl.arange(0, 16, gl.SliceLayout(0, left))
    o_b = gl.arange(0, 16, gl.SliceLayout(1, right))
    o_col = gl.arange(0, SQUARE, gl.SliceLayout(0, right))
    acc = gl.zeros([SQUARE, SQUARE], gl.float64, LAYOUT)
    for first in range(0, RANK, 16):
        mask = (o_row < rows)[:, None] & (first + o_a < RANK)[None, :]
        offsets = o_row[:, None] * a_row + (first + o_a)[None, :] * a_col
        a = gl.load(a_ptr + offsets, mask=mask, other=0.0)
        b = gl.load(b_ptr + (first + o_b)[:, None] * b_row + o_col[None, :] * b_col)
        acc = mma_v2(a.to(gl.float64), b.to(gl.float64), acc)
    return acc


@gluon.jit
def first_moment(
    row_ptr,
    hyper_ptr,
    coefficient,
    inverse_ptr,
    c_ptr,
    changed,
    start,
    rows,
    m_ptr,
    RANK: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    """Form g and m after the step of 64 rows, laid out as WIDE, and return what is to be stored.

    All warps have read m when it returns, so that m may be written.

    Returns:
        g, m, where their entries stand from m_ptr on, and which of them there are.
    """
    o_row = gl.arange(0, SQUARE, gl.SliceLayout(1, WIDE))
    o_col = gl.arange(0, SQUARE, gl.SliceLayout(0, WIDE))
    grad_row, grad_col = gl.load(row_ptr + GRAD_STRIDE_ROW), gl.load(row_ptr + GRAD_STRIDE_COL)
    grad = gl.load(row_ptr + GRAD).to(gl.pointer_type(GRAD_DTYPE)) + start * grad_row
    g = _product64(grad, grad_row, grad_col, rows, inverse_ptr, 1, SQUARE, RANK, WIDE) * coefficient
    o_m = o_row[:, None] * RANK + o_col[None, :]
    mask = (o_row < rows)[:, None] & (o_col < RANK)[None, :]
    if changed != 0:
        m = _product64(m_ptr, RANK, 1, rows, c_ptr, SQUARE, 1, RANK, WIDE)
    else:
        m = gl.load(m_ptr + o_m, mask=mask, other=0.0).to(gl.float64)
    beta1 = gl.load(hyper_ptr + BETA1)
    m = (beta1 * m + (1.0 - beta1) * g).to(gl.float32)
    tl.debug_barrier()
    return g.to(gl.float32), m, o_m, mask


@gluon.jit
def shared_halves_of(c_ptr):
    """Split C, scaled, into fp16 halves in shared memory; a barrier has to follow.

    Returns:
        The high halves and the low ones.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SQUARE, SQUARE], gl.float16)
    o_i = gl.arange(0, SQUARE, gl.SliceLayout(1, BY_ROW))
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, BY_ROW))
    c = gl.load(c_ptr + o_i[:, None] * SQUARE + o_j[None, :]) * C_SCALE
    high = c.to(gl.float16)
    low = (c - high.to(gl.float32)).to(gl.float16)
    s_high = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, high)
    s_low = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, low)
    fence_async_shared()
    return s_high, s_low


@gluon.jit
def powers_of_trace(trace):
    """Return a power of two that brings the trace of P to 512..1024, and what undoes `carry`.

    No entry of P is above its trace, and if all of the diagonal is alike it stays above 8.
    """
    up, down = powers(trace)
    return up * 64.0, down * (UNSCALE / 64.0)


@gluon.jit
def carry(t, s_c_high, s_c_low, up):
    """Form C^T P C, scaled, from the upper triangle of P with half its diagonal.

    What lies in shared memory lies there one after the other, in the same place.
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SQUARE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SQUARE, SQUARE], gl.float16)
    t = t * up
    high = t.to(gl.float16)
    s_high = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, high)
    low = (t - high.to(gl.float32)).to(gl.float16)
    s_low = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, low)
    # One of two mirrored entries is zero, so the halves of P are the sums of the halves of T.
    high = s_high.load(left) + s_high.permute((1, 0)).load(left)
    low = s_low.load(left) + s_low.permute((1, 0)).load(left)
    none = gl.zeros([SQUARE, SQUARE], gl.float32, wide)
    y = warpgroup_mma(low, s_c_high, none, use_acc=False, is_async=True)
    y = warpgroup_mma(high, s_c_low, y, is_async=True)
    y = warpgroup_mma(high, s_c_high, y, is_async=True)
    y = warpgroup_mma_wait(0, deps=[y])
    y_high = y.to(gl.float16)
    s_y_high = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, y_high)
    y_low = (y - y_high.to(gl.float32)).to(gl.float16)
    s_y_low = gl.allocate_shared_memory(gl.float16, [SQUARE, SQUARE], tile, y_low)
    fence_async_shared()
    tl.debug_barrier()
    c_low_t, c_high_t = s_c_low.permute((1, 0)), s_c_high.permute((1, 0))
    p = warpgroup_mma(c_low_t, s_y_high, none, use_acc=False, is_async=True)
    p = warpgroup_mma(c_high_t, s_y_low, p, is_async=True)
    p = warpgroup_mma(c_high_t, s_y_high, p, is_async=True)
    return warpgroup_mma_wait(0, deps=[p])


@gluon.jit
def lines(RANK: gl.constexpr):
    """Lay a square out as LINES: rows u = near + far, columns v = lane + half.

    What differs between threads stands apart from literals, so that little needs to be kept.

    Returns:
        near, far, lane, half, and which entries are in the upper triangle.
    """
    o_u = gl.arange(0, SQUARE, gl.SliceLayout(1, LINES))
    o_v = gl.arange(0, SQUARE, gl.SliceLayout(0, LINES))
    near, far, lane, half = o_u & 3, o_u & 60, o_v & 31, o_v & 32
    upper = lane[None, :] - near[:, None] >= far[:, None] - half[None, :]
    if RANK < SQUARE:
        upper = upper & (o_v < RANK)[None, :]
    return near, far, lane, half, upper


@gluon.jit
def packed_lines(near, far, lane, nothing, RANK: gl.constexpr):
    """Return where the entries of a packed triangle stand, less half; nothing is 0."""
    begin = near * RANK - (near * (near + 1)) // 2 + nothing
    begin += far * (RANK - near + nothing) - (far * (far + 1)) // 2
    return begin[:, None] + lane[None, :]


@gluon.jit
def prefetch_entries(ptr, ENTRIES: gl.constexpr):
    """Have the L2 cache fetch fp32 numbers, but for some at both ends."""
    address = ptr.to(gl.int64, bitcast=True) + 15
    prefetch(address - address % 16, 4 * ENTRIES // 16 * 16 - 16)
