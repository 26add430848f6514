"""What ``moments`` does above rank 64: products of squares that no program can hold, by blocks.

``T = P C`` of a row is written block by block into a square of scratch per program, which stays in
the cache, and ``C^T T`` is formed from there. Only its upper triangle is computed and stored; the
blocks of P below the diagonal are those above it, transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows, wide
from loft_kernels.backends.triton.products import C_SCALE, UNSCALE, dot, powers


@triton.jit
def gradient_and_moment(
    grad,
    grad_row,
    grad_col,
    first,
    rows,
    m_ptr,
    live,
    inverse_ptr,
    c_ptr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    CARRY: tl.constexpr,
):
    """Return ``grad L^-T`` and m or ``m C`` of some rows in fp64, from a few columns at a time."""
    K: tl.constexpr = 4096 // R
    o_local, o_r = tl.arange(0, BLOCK_M), tl.arange(0, R)
    g = tl.zeros((BLOCK_M, R), tl.float64)
    m = tl.zeros((BLOCK_M, R), tl.float64)
    for k in range(0, RANK, K):
        o_k = k + tl.arange(0, K)
        x = load_rows(grad, grad_row, grad_col, first + o_local, rows, RANK, K, GRAD_DTYPE, k)
        inverse_t = tl.load(inverse_ptr + o_r[None, :] * R + o_k[:, None])
        g = tl.dot(wide(x, K), inverse_t, g, out_dtype=tl.float64)
        if CARRY:
            mask = (o_local[:, None] < live) & (o_k[None, :] < RANK)
            x = tl.load(m_ptr + o_local[:, None] * RANK + o_k[None, :], mask=mask, other=0.0)
            c = tl.load(c_ptr + o_k[:, None] * R + o_r[None, :]).to(tl.float64)
            m = tl.dot(x.to(tl.float64), c, m, out_dtype=tl.float64)
    if not CARRY:
        mask = (o_local[:, None] < live) & (o_r[None, :] < RANK)
        m = tl.load(m_ptr + o_local[:, None] * RANK + o_r[None, :], mask=mask, other=0.0)
        m = m.to(tl.float64)
    return g, m


@triton.jit
def _packed_at(i, j, RANK: tl.constexpr):
    """Return the place of entry (i, j), i <= j, in a packed row."""
    return i * RANK - (i * (i - 1)) // 2 + j - i


@triton.jit
def _unfolded(p_ptr, i, k, RANK: tl.constexpr, B: tl.constexpr):
    """Load block (i, k) of a symmetric matrix from its packed upper triangle."""
    o_b = tl.arange(0, B)
    row, col = tl.minimum(i, k) + o_b[:, None], tl.maximum(i, k) + o_b[None, :]
    mask = (row <= col) & (col < RANK)
    upper = tl.load(p_ptr + _packed_at(row, col, RANK), mask=mask, other=0.0)
    return tl.where(i + o_b[:, None] <= k + o_b[None, :], upper, tl.trans(upper))


@triton.jit
def _carry_row(
    p_ptr,
    g_ptr,
    c_ptr,
    t_ptr,
    beta2,
    fresh2,
    RANK: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Carry P of one row over and accumulate."""
    B: tl.constexpr = 64
    WIDE: tl.constexpr = 128
    o_b, o_wide, o_r = tl.arange(0, B), tl.arange(0, WIDE), tl.arange(0, R)
    up, down, c_scale = 1.0, beta2, 1.0
    if not EXACT:
        # P is positive semidefinite: its largest entry stands on the diagonal.
        diagonal = tl.load(p_ptr + _packed_at(o_r, o_r, RANK), mask=o_r < RANK, other=0.0)
        up, down = powers(tl.max(tl.abs(diagonal), axis=0))
        down, c_scale = down * (UNSCALE * beta2), C_SCALE
    for i in range(0, RANK, B):
        for j in range(0, RANK, WIDE):
            t = tl.zeros((B, WIDE), tl.float32)
            for k in range(0, RANK, B):
                p = _unfolded(p_ptr, i, k, RANK, B) * up
                c = tl.load(c_ptr + (k + o_b[:, None]) * R + j + o_wide[None, :]) * c_scale
                t += dot(p, c, EXACT)
            tl.store(t_ptr + (i + o_b[:, None]) * R + j + o_wide[None, :], t)
    tl.debug_barrier()
    for i in range(0, RANK, B):
        row = i + o_b
        g_i = tl.load(g_ptr + row, mask=row < RANK, other=0.0) * fresh2
        for j in range(i, RANK, B):
            col = j + o_b
            acc = tl.zeros((B, B), tl.float32)
            for k in range(0, RANK, B):
                o_k = k + o_b
                c_t = tl.load(c_ptr + o_k[None, :] * R + row[:, None]) * c_scale
                acc += dot(c_t, tl.load(t_ptr + o_k[:, None] * R + col[None, :]), EXACT)
            g_j = tl.load(g_ptr + col, mask=col < RANK, other=0.0)
            mask = (row[:, None] <= col[None, :]) & (col[None, :] < RANK)
            p = down * acc + g_i[:, None] * g_j[None, :]
            tl.store(p_ptr + _packed_at(row[:, None], col[None, :], RANK), p, mask=mask)
    tl.debug_barrier()


@triton.jit
def carried_wide_rows(
    p_ptr,
    g_ptr,
    rows,
    c_ptr,
    t_ptr,
    beta2,
    fresh2,
    RANK: tl.constexpr,
    R: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Carry P of some rows over, one after the other, and accumulate."""
    PACKED: tl.constexpr = (RANK * (RANK + 1)) // 2
    for _ in range(0, rows):
        _carry_row(p_ptr, g_ptr, c_ptr, t_ptr, beta2, fresh2, RANK, R, EXACT)
        p_ptr += PACKED
        g_ptr += RANK
