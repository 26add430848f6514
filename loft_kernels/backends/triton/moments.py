"""Scaled gradient, transport and moving averages, row by row.

``g = grad L^-T / s`` and ``m <- b1 m C + (1 - b1) g`` in fp64 products, then per row
``P <- b2 C^T P C + (1 - b2) g^T g`` on packed P. The products with C are skipped where the partner
has not changed, which under alternation is always the idle side. Reads and writes m and P once.

One program serves CHUNK rows of a side: g and m of BLOCK_M rows, then their P, GROUP rows at a
time. Where the partner stays P is streamed as it lies in memory, and up to rank 8 a packed row
times one matrix is the whole transport; above, P is unfolded to r x r and multiplied from both
sides. g is needed there row by row and tiles cannot be indexed: it is parked in the memory of m,
whose new values wait in registers.

Unfolded, a product is three fp16 products of high and low halves (22 bits), each row of P scaled
by a power of two; packed rows take tf32x3, and EXACT plain fp32. Above rank 64 squares are products
of blocks, see ``moments_wide``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.gram import load_rows, wide
from loft_kernels.backends.triton.moments_wide import carried_wide_rows, gradient_and_moment
from loft_kernels.backends.triton.products import C_SCALE, UNSCALE, dot, powers
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
def _unpacked_index(k, RANK: tl.constexpr, K: tl.constexpr):
    """Return the entry (i, j), i <= j, at places k of a packed triangle."""
    # Row i begins where the root is 2 RANK + 1 - 2i; the 4 keeps rounding away from the edges.
    root = tl.sqrt(tl.maximum((2 * RANK + 1) * (2 * RANK + 1) - 8 * k - 4, 0).to(tl.float32))
    i = ((2 * RANK + 1 - root) * 0.5).to(tl.int32)
    j = k - (i * RANK - (i * (i - 1)) // 2) + i
    # Not quite true, but it lays the loads of g out as that of P. The addresses of both are known
    # to the entry only, so that no load becomes wider than one.
    return tl.max_contiguous(i, K), tl.max_contiguous(j, K)


@triton.jit
def _carry(t, c, c_t, GROUP: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """Form C^T P C from the upper triangles t of P, up to a factor per row: both are returned."""
    o_r = tl.arange(0, R)
    p = tl.where(o_r[:, None] <= o_r[None, :], t, tl.permute(t, (0, 2, 1)))
    if EXACT:
        down = tl.full((GROUP,), 1.0, tl.float32)
    else:
        up, down = powers(tl.max(tl.max(tl.abs(t), axis=1), axis=1))
        p, down = p * up[:, None, None], down * UNSCALE
    if R == 16:
        # P and C^T P C are symmetric: both products are of tall matrices with C.
        p = dot(tl.reshape(p, (GROUP * R, R)), c, EXACT)
        p = tl.permute(tl.reshape(p, (GROUP, R, R)), (0, 2, 1))
        p = tl.reshape(dot(tl.reshape(p, (GROUP * R, R)), c, EXACT), (GROUP, R, R))
    elif GROUP == 1:
        p = dot(dot(c_t, tl.reshape(p, (R, R)), EXACT), c, EXACT)
        p = tl.reshape(p, (1, R, R))
    else:
        c_t = tl.broadcast_to(c_t[None, :, :], (GROUP, R, R))
        c = tl.broadcast_to(c[None, :, :], (GROUP, R, R))
        p = dot(dot(c_t, p, EXACT), c, EXACT)
    return p, down


@triton.jit
def _carried_rows(
    p_ptr,
    g_ptr,
    rows,
    c_ptr,
    beta2,
    fresh2,
    RANK: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Carry P of some rows over, unfolded to ``GROUP x R x R``, and accumulate."""
    o_group, o_r = tl.arange(0, GROUP), tl.arange(0, R)
    i, j = o_r[:, None], o_r[None, :]
    PACKED: tl.constexpr = (RANK * (RANK + 1)) // 2
    o_p = o_group[:, None, None] * PACKED + (i * RANK - (i * (i - 1)) // 2 + j - i)[None, :, :]
    m_upper = ((i <= j) & (j < RANK))[None, :, :]
    o_g = o_group[:, None] * RANK + o_r[None, :]
    c = tl.load(c_ptr + o_r[:, None] * R + o_r[None, :])
    c_t = tl.load(c_ptr + o_r[None, :] * R + o_r[:, None])
    if not EXACT:
        c, c_t = c * C_SCALE, c_t * C_SCALE
    ahead = tl.load(p_ptr + o_p, mask=m_upper & (o_group < rows)[:, None, None], other=0.0)
    for start in range(0, rows, GROUP):
        left = rows - start
        p, m_p = ahead, m_upper & (o_group < left)[:, None, None]
        m_next = m_upper & (o_group < left - GROUP)[:, None, None]
        m_g = (o_r < RANK)[None, :] & (o_group < left)[:, None]
        ahead = tl.load(p_ptr + GROUP * PACKED + o_p, mask=m_next, other=0.0)
        g = tl.load(g_ptr + o_g, mask=m_g, other=0.0)
        p, scale = _carry(p, c, c_t, GROUP, R, EXACT)
        p = (beta2 * scale)[:, None, None] * p + (fresh2 * g)[:, :, None] * g[:, None, :]
        tl.store(p_ptr + o_p, p, mask=m_p)
        p_ptr, g_ptr = p_ptr + GROUP * PACKED, g_ptr + GROUP * RANK


@triton.jit
def _packed_change(c_ptr, RANK: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Form the matrix that carries a packed row: P_ij goes by C_iu C_jv, and P_ji by C_ju C_iv."""
    i, j = _unpacked_index(tl.arange(0, K), RANK, K)
    live = (i < RANK) & (j < RANK)
    mask = live[:, None] & live[None, :]
    i, j, u, v = i[:, None] * R, j[:, None] * R, i[None, :], j[None, :]
    straight = tl.load(c_ptr + i + u, mask, 0.0) * tl.load(c_ptr + j + v, mask, 0.0)
    crossed = tl.load(c_ptr + j + u, mask, 0.0) * tl.load(c_ptr + i + v, mask, 0.0)
    return straight + tl.where(i < j, crossed, 0.0)


@triton.jit
def _packed_group(
    p_ptr,
    i_ptr,
    j_ptr,
    mask,
    change,
    beta2,
    fresh2,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Advance P of GROUP rows; the pointers are those of the first one."""
    o_group = tl.arange(0, GROUP)[:, None]
    p_ptr += o_group * ((RANK * (RANK + 1)) // 2)
    p = tl.load(p_ptr, mask=mask, other=0.0)
    g_i = tl.load(i_ptr + o_group * RANK, mask=mask, other=0.0)
    g_j = tl.load(j_ptr + o_group * RANK, mask=mask, other=0.0)
    if CARRY:
        p = tl.dot(p, change, input_precision="ieee" if EXACT else "tf32x3")
    tl.store(p_ptr, beta2 * p + (fresh2 * g_i) * g_j, mask=mask)


@triton.jit
def _packed_rows(
    p_ptr,
    g_ptr,
    rows,
    change,
    beta2,
    fresh2,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS_P: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Advance P of some rows as it lies in memory, ``GROUP x COLUMNS_P`` at a time."""
    PACKED: tl.constexpr = (RANK * (RANK + 1)) // 2
    for first in range(0, PACKED, COLUMNS_P):
        o_k = first + tl.arange(0, COLUMNS_P)
        i, j = _unpacked_index(o_k, RANK, COLUMNS_P)
        mask = (o_k < PACKED)[None, :]
        # Rows are constants away from three pointers a column, and only the last rows are masked.
        p_row, i_row, j_row = p_ptr + o_k[None, :], g_ptr + i[None, :], g_ptr + j[None, :]
        for _ in range(0, rows // GROUP):
            _packed_group(
                p_row, i_row, j_row, mask, change, beta2, fresh2, RANK, GROUP, CARRY, EXACT
            )
            p_row += GROUP * PACKED
            i_row += GROUP * RANK
            j_row += GROUP * RANK
        if rows % GROUP > 0:
            m_tail = mask & (tl.arange(0, GROUP) < rows % GROUP)[:, None]
            _packed_group(
                p_row, i_row, j_row, m_tail, change, beta2, fresh2, RANK, GROUP, CARRY, EXACT
            )


@triton.jit
def prefetch(address, size):
    """Have the L2 cache fetch bytes of global memory; address and size are multiples of 16."""
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_rows(p_ptr, rows, RANK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Ask for P of the next rows, as far as they go."""
    PACKED: tl.constexpr = (RANK * (RANK + 1)) // 2
    size = tl.minimum(tl.maximum(rows, 0), BLOCK_M).to(tl.int32) * (4 * PACKED)
    address = p_ptr.to(tl.int64, bitcast=True)
    size = tl.where(address % 16 == 0, size - size % 16, 0)
    if size > 0:
        prefetch(address, size)


@triton.jit
def _advance_rows(
    row_ptr,
    start,
    hyper_ptr,
    coefficient,
    inverse_ptr,
    c_ptr,
    scratch_ptr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS_P: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Advance m and P of up to CHUNK rows of a side, and carry them over if asked."""
    rows = tl.load(row_ptr + ROWS)
    grad = tl.load(row_ptr + GRAD)
    grad_row, grad_col = tl.load(row_ptr + GRAD_STRIDE_ROW), tl.load(row_ptr + GRAD_STRIDE_COL)
    m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32)) + start * RANK
    p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32))
    p_ptr += start * ((RANK * (RANK + 1)) // 2)
    beta1, beta2 = tl.load(hyper_ptr + BETA1), tl.load(hyper_ptr + BETA2)
    fresh1, fresh2 = 1.0 - beta1, (1.0 - beta2).to(tl.float32)
    beta2 = beta2.to(tl.float32)

    # Inside a tile addresses are 32-bit offsets from its first row.
    o_r, o_local = tl.arange(0, R), tl.arange(0, BLOCK_M)
    o_m = o_local[:, None] * RANK + o_r[None, :]
    packed_change = 0.0
    if CARRY and RANK <= 8:
        packed_change = _packed_change(c_ptr, RANK, R, COLUMNS_P)
    if PREFETCH:
        _prefetch_rows(p_ptr, rows - start, RANK, BLOCK_M)
    end = tl.minimum(start + CHUNK, rows)
    for first in range(start, end, BLOCK_M):
        if PREFETCH:
            p_next = p_ptr + BLOCK_M * ((RANK * (RANK + 1)) // 2)
            _prefetch_rows(p_next, end - first - BLOCK_M, RANK, BLOCK_M)
        live = tl.minimum(rows - first, BLOCK_M).to(tl.int32)
        if R > 64:
            m_row = (o_local[:, None] < live) & (o_r[None, :] < RANK)
            g, m = gradient_and_moment(
                grad,
                grad_row,
                grad_col,
                first,
                rows,
                m_ptr,
                live,
                inverse_ptr,
                c_ptr,
                RANK,
                R,
                BLOCK_M,
                GRAD_DTYPE,
                CARRY,
            )
            g *= coefficient
        else:
            g = load_rows(grad, grad_row, grad_col, first + o_local, rows, RANK, R, GRAD_DTYPE)
            # Loaded again for every block: cheaper than the registers that would hold it.
            inverse_t = tl.load(inverse_ptr + o_r[None, :] * R + o_r[:, None]) * coefficient
            g = tl.dot(wide(g, R), inverse_t, out_dtype=tl.float64)
            m_row = (o_local[:, None] < live) & (o_r[None, :] < RANK)
            m = tl.load(m_ptr + o_m, mask=m_row, other=0.0).to(tl.float64)
            if CARRY:
                c = tl.load(c_ptr + o_r[:, None] * R + o_r[None, :]).to(tl.float64)
                m = tl.dot(m, c, out_dtype=tl.float64)
        m = (beta1 * m + fresh1 * g).to(tl.float32)

        tl.debug_barrier()
        tl.store(m_ptr + o_m, g.to(tl.float32), mask=m_row)
        tl.debug_barrier()
        if CARRY and RANK > 64:
            carried_wide_rows(p_ptr, m_ptr, live, c_ptr, scratch_ptr, beta2, fresh2, RANK, R, EXACT)
        elif CARRY and RANK > 8:
            _carried_rows(p_ptr, m_ptr, live, c_ptr, beta2, fresh2, RANK, R, GROUP, EXACT)
        else:
            _packed_rows(
                p_ptr,
                m_ptr,
                live,
                packed_change,
                beta2,
                fresh2,
                RANK,
                GROUP,
                COLUMNS_P,
                CARRY,
                EXACT,
            )
        tl.debug_barrier()
        tl.store(m_ptr + o_m, m, mask=m_row)
        m_ptr += BLOCK_M * RANK
        p_ptr += BLOCK_M * ((RANK * (RANK + 1)) // 2)


@triton.jit
def _moments_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    inverse_ptr,
    change_ptr,
    changed_ptr,
    scratch_ptr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    IDLE: tl.constexpr,
    COLUMNS_P: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    serves = (tl.load(row_ptr + GRAD) != 0) & (tl.load(decision_ptr + SKIP) == 0)
    if serves:
        scaling = tl.load(row_ptr + SCALING).to(tl.float64, bitcast=True)
        coefficient = tl.load(decision_ptr + COEFFICIENT) * tl.load(hyper_ptr + SIGN) / scaling
        inverse_ptr += (side ^ 1) * R * R
        c_ptr = change_ptr + side * R * R
        if R > 64:
            scratch_ptr += i_tile * R * R
        if tl.load(changed_ptr + side) != 0:
            _advance_rows(
                row_ptr,
                start,
                hyper_ptr,
                coefficient,
                inverse_ptr,
                c_ptr,
                scratch_ptr,
                RANK,
                R,
                CHUNK,
                BLOCK_M,
                GROUP,
                COLUMNS_P,
                GRAD_DTYPE,
                True,
                EXACT,
                PREFETCH,
            )
        else:
            _advance_rows(
                row_ptr,
                start,
                hyper_ptr,
                coefficient,
                inverse_ptr,
                c_ptr,
                scratch_ptr,
                RANK,
                R,
                CHUNK,
                BLOCK_M,
                IDLE,
                COLUMNS_P,
                GRAD_DTYPE,
                False,
                EXACT,
                PREFETCH,
            )
