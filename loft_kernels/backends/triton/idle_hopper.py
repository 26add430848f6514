"""What `moments_hopper` does to the factors that stay: ranks 33 to 64, in Gluon.

m and P take in the gradient, and no residual is formed. P is streamed as it lies in memory, beside
programs of factors that move, whose instructions wait for one another and leave memory idle. Where
a partner was changed from outside its factor's P is carried over first, on its own.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from loft_kernels.backends.triton.operands_hopper import SQUARE, unforeseen
from loft_kernels.backends.triton.tables import BETA2, EXP_AVG, SECOND_MOMENT
from loft_kernels.backends.triton.transport_hopper import (
    BY_ROW,
    carry,
    first_moment,
    lines,
    packed_lines,
    powers_of_trace,
    prefetch_entries,
    shared_halves_of,
)

# Rows from the two that are worked on to the two that the L2 cache is asked for.
AHEAD = gl.constexpr(4)


@gluon.jit
def _carried_rows(p_ptr, c_ptr, rows, RANK: gl.constexpr):
    """Carry P of some rows over."""
    s_c_high, s_c_low = shared_halves_of(c_ptr)
    o_i = gl.arange(0, SQUARE, gl.SliceLayout(1, BY_ROW))
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, BY_ROW))
    o_p = (o_i * RANK - (o_i * (o_i + 1)) // 2)[:, None] + o_j[None, :]
    upper = (o_i[:, None] <= o_j[None, :]) & (o_j < RANK)[None, :]
    diagonal = o_i[:, None] == o_j[None, :]
    for row in range(0, rows):
        # C has been written; memory of the row before is used again.
        tl.debug_barrier()
        p_row = p_ptr + row * (RANK * (RANK + 1) // 2)
        t = gl.load(p_row + o_p, mask=upper, other=0.0)
        up, down = powers_of_trace(gl.sum(gl.sum(gl.where(diagonal, t, 0.0), axis=1), axis=0))
        carried = carry(gl.where(diagonal, 0.5 * t, t), s_c_high, s_c_low, up)
        p = gl.convert_layout(carried, BY_ROW) * down
        gl.store(p_row + o_p, p, mask=upper)


@gluon.jit
def _load_g(g_row, near, far, lane, half, more, RANK: gl.constexpr):
    """Load one row's g, as rows and as columns of a square."""
    g_i = gl.load((g_row + near) + far, mask=(near + far < RANK) & more, other=0.0)
    return g_i, gl.load((g_row + lane) + half, mask=(lane + half < RANK) & more, other=0.0)


@gluon.jit
def _accumulated_rows(p_ptr, g_ptr, hyper_ptr, rows, RANK: gl.constexpr):
    """Have P of some rows take in their g, two rows at a time."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    beta2 = gl.load(hyper_ptr + BETA2)
    fresh2, beta2 = (1.0 - beta2).to(gl.float32), beta2.to(gl.float32)
    near, far, lane, half, upper = lines(RANK)
    for row in range(0, rows, 2):
        here = unforeseen(row)
        p_row, g_row, more = p_ptr + here * PACKED, g_ptr + here * RANK, row + 1 < rows
        if row + AHEAD + 1 < rows:
            prefetch_entries(p_row + AHEAD * PACKED, 2 * PACKED)
        p_row += packed_lines(near, far, lane, here - row, RANK)
        p_row += half[None, :]
        g_i, g_j = _load_g(g_row, near, far, lane, half, True, RANK)
        h_i, h_j = _load_g(g_row + RANK, near, far, lane, half, more, RANK)
        p = gl.load(p_row, mask=upper, other=0.0)
        q = gl.load(p_row + PACKED, mask=upper & more, other=0.0)
        p = beta2 * p + (fresh2 * g_i)[:, None] * g_j[None, :]
        gl.store(p_row, p, mask=upper)
        q = beta2 * q + (fresh2 * h_i)[:, None] * h_j[None, :]
        gl.store(p_row + PACKED, q, mask=upper & more)


@gluon.jit
def keep_moments(
    row_ptr,
    hyper_ptr,
    coefficient,
    inverse_ptr,
    c_ptr,
    changed,
    start,
    rows,
    RANK: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    """Advance both moments of up to 64 rows of a factor that stays."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * RANK
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32)) + start * PACKED
    if changed != 0:
        _carried_rows(p_ptr, c_ptr, rows, RANK)
    g, m, o_m, mask = first_moment(
        row_ptr,
        hyper_ptr,
        coefficient,
        inverse_ptr,
        c_ptr,
        changed,
        start,
        rows,
        m_ptr,
        RANK,
        GRAD_DTYPE,
    )
    # g is needed row by row: it waits in the memory of m.
    gl.store(m_ptr + o_m, g, mask=mask)
    tl.debug_barrier()
    _accumulated_rows(p_ptr, m_ptr, hyper_ptr, rows, RANK)
    tl.debug_barrier()
    gl.store(m_ptr + o_m, m, mask=mask)
