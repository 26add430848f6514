"""`moments` and all operands in one launch, for compute capability 9.0, ranks 33 to 64, in Gluon.

One row's P fills a tile of the tensor cores. Where a factor moves its program reads P once: carries
it over (see ``transport_hopper``), accumulates, writes it back, and forms a, sigma^2 and the
residual R in fp16 while it is still in registers, where ``moments`` and ``operands`` read it three
times; g waits in the memory of the rows' residuals. Other programs write the operands of partners,
as ``operands`` does, and serve the factors that stay (``idle_hopper``).
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from loft_kernels.backends.triton.centre import (
    first_centre,
    inverse_of,
    residual_weight,
    shrink_of,
    sigma_sq_of,
    trace_limit,
)
from loft_kernels.backends.triton.idle_hopper import keep_moments
from loft_kernels.backends.triton.operands import scale_of
from loft_kernels.backends.triton.operands_hopper import (
    SQUARE,
    added,
    second_rows,
    unforeseen,
    write_partner,
)
from loft_kernels.backends.triton.tables import (
    BETA2,
    BIAS1,
    BIAS2,
    COEFFICIENT,
    COLUMNS,
    EPS,
    EXP_AVG,
    GRAD,
    MOVES,
    NUMBERS,
    RESIDUAL_ROW,
    ROWS,
    SCALING,
    SECOND_MOMENT,
    SIGN,
    SKIP,
)
from loft_kernels.backends.triton.transport_hopper import (
    BY_ROW,
    LINES,
    WIDE,
    carry,
    fetch,
    first_moment,
    lines,
    packed_lines,
    powers_of_trace,
    prefetch_entries,
    shared_halves_of,
)

# Rows of a program, and registers of a thread: three programs share a multiprocessor.
ROWS_OF_TILE, REGISTERS = SQUARE.value, 168

# Where the squared norms of a row's g and m are parked behind its g.
_G_SQ, _M_SQ = gl.constexpr(64), gl.constexpr(65)


@gluon.jit
def _park(g_ptr, g, m, STRIDE: gl.constexpr):
    """Write g of 64 rows, STRIDE entries a row, and the squared norms of g and m behind it."""
    o_row = gl.arange(0, SQUARE, gl.SliceLayout(1, WIDE))
    o_col = gl.arange(0, SQUARE, gl.SliceLayout(0, WIDE))
    g_rows = g_ptr + o_row * STRIDE
    gl.store(g_rows[:, None] + o_col[None, :], g)
    gl.store(g_rows + _G_SQ, gl.sum(g * g, axis=1))
    gl.store(g_rows + _M_SQ, gl.sum(m * m, axis=1))


@gluon.jit
def _flat(x, y):
    """Lay tiles out in one dimension, so that a sum over all entries begins in every thread."""
    return gl.reshape(x, [SQUARE * SQUARE]), gl.reshape(y, [SQUARE * SQUARE])


@gluon.jit
def _advance_second(
    number_ptr,
    hyper_ptr,
    c_ptr,
    counts,
    eps,
    rows,
    m_ptr,
    p_ptr,
    g_ptr,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    CARRY: gl.constexpr,
):
    """Advance P of some rows and write their residuals; m is that of after the step."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    if CARRY:
        s_c_high, s_c_low = shared_halves_of(c_ptr)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        s_t = gl.allocate_shared_memory(gl.float32, [SQUARE, SQUARE], plain)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_g = gl.allocate_shared_memory(gl.float32, [SQUARE], vector)
    s_m = gl.allocate_shared_memory(gl.float32, [SQUARE], vector)
    tl.debug_barrier()
    beta2 = gl.load(hyper_ptr + BETA2)
    fresh2, beta2 = (1.0 - beta2).to(gl.float32), beta2.to(gl.float32)
    unbias1 = 1.0 / gl.load(number_ptr + BIAS1).to(gl.float32)
    unbias2 = 1.0 / gl.load(number_ptr + BIAS2).to(gl.float32)
    # As the tensor cores take P: j = i compares one number of the thread with literals.
    o_i = gl.arange(0, SQUARE, gl.SliceLayout(1, BY_ROW))
    o_j = gl.arange(0, SQUARE, gl.SliceLayout(0, BY_ROW))
    across = (o_j >> 1)[None, :] - ((o_i >> 4) << 3)[:, None]
    diagonal = (across == ((o_i & 15) >> 1)[:, None]) & ((o_i & 1)[:, None] == (o_j & 1)[None, :])
    near, far, lane, half, upper = lines(RANK)
    o_v = lane + half
    diagonal_p = lane[None, :] - near[:, None] == far[:, None] - half[None, :]
    o_d, m_d = o_v * RANK - (o_v * (o_v - 1)) // 2, o_v < RANK
    if CARRY:
        c = gl.load(c_ptr + (near + far)[:, None] * SQUARE + o_v[None, :])
        # By a direction that the partner has given away, if only in part.
        shortens = gl.sum(gl.sum(c * c, axis=1), axis=0) < RANK - 2e-3
        o_p = packed_lines(near, far, lane, 0, RANK)
        fetch(s_t, (p_ptr + o_p) + half[None, :], mask=upper)
        async_copy.commit_group()
    trace = gl.sum(gl.load(p_ptr + o_d, mask=m_d, other=0.0), axis=0)
    for row in range(0, rows):
        here = unforeseen(row)
        p_row, m_row = p_ptr + here * PACKED, m_ptr + here * RANK
        g_row, out_row = g_ptr + here * (PRODUCTS // 2), residual_ptr + here * PRODUCTS
        # Early, so that they have arrived when they are needed.
        g_j = gl.load((g_row + lane) + half)
        m_j = gl.load((m_row + lane) + half, mask=m_d, other=0.0)
        g_sq, m_sq = gl.load(g_row + _G_SQ), gl.load(g_row + _M_SQ)
        # Memory answers in order, registers that were spilled included: P comes from nearby then.
        if row + 2 < rows:
            prefetch_entries(p_row + 2 * PACKED, PACKED)
        if CARRY:
            up, down = powers_of_trace(trace)
            async_copy.wait_group(0)
            tl.debug_barrier()
            t = s_t.load(BY_ROW)
            carried = carry(gl.where(diagonal, 0.5 * t, t), s_c_high, s_c_low, up)
            s_g.store(g_j)
            s_m.store(m_j)
            s_p = gl.allocate_shared_memory(gl.float32, [SQUARE, SQUARE], swizzled, carried)
            p = s_p.load(LINES) * (beta2 * down)
        else:
            o_p = packed_lines(near, far, lane, here - row, RANK)
            p = beta2 * gl.load((p_row + o_p) + half[None, :], mask=upper, other=0.0)
            s_g.store(g_j)
            s_m.store(m_j)
            tl.debug_barrier()
        g_i, m_i = s_g.load(gl.SliceLayout(1, LINES)), s_m.load(gl.SliceLayout(1, LINES))
        p = gl.where(upper, p + (fresh2 * g_i)[:, None] * g_j[None, :], 0.0)
        # C shortens what it carries by next to nothing, unless the partner has turned away.
        trace = beta2 * trace + fresh2 * g_sq
        if CARRY:  # noqa: SIM102  the compiler knows CARRY, not shortens
            if shortens:
                trace = gl.sum(gl.reshape(gl.where(diagonal_p, p, 0.0), [SQUARE * SQUARE]), axis=0)
        o_p = packed_lines(near, far, lane, here - row, RANK)
        gl.store((p_row + o_p) + half[None, :], p, mask=upper)
        # The next row's P arrives while this one's is worked on.
        more = row + 1 < rows
        if CARRY:
            fetch(s_t, ((p_row + o_p) + half[None, :]) + PACKED, mask=upper & more)
            async_copy.commit_group()
        diagonal_next = gl.load((p_row + PACKED) + o_d, mask=m_d & more, other=0.0)

        # R in units of the trace of P, so that no square underflows.
        trace *= unbias2
        unit = inverse_of(trace)
        p = p * (unbias2 * unit)
        root = gl.sqrt(unit) * unbias1
        m_i, m_j = m_i * root, m_j * root
        m_sq = m_sq * (root * root)
        # Sums over the square, which are twice those over the triangle with half its diagonal.
        halved = gl.where(diagonal_p, 0.5 * p, p)
        mpm, p_sq = gl.reduce(_flat((halved * m_i[:, None]) * m_j[None, :], halved * p), 0, added)
        mpm, p_sq = 2.0 * mpm, 2.0 * p_sq
        a, r_sq = first_centre(p_sq, mpm, m_sq)
        asks = (trace * unit < trace_limit(p_sq, r_sq, a, m_sq)) & (counts > 0.0)
        p -= (a * m_i)[:, None] * m_j[None, :]
        sigma_sq = sigma_sq_of(r_sq, unit)
        by_unit = sigma_sq / unit
        shrink = shrink_of(eps * gl.sqrt(sigma_sq))
        kept = by_unit * shrink * shrink * counts
        p = p * gl.where(diagonal_p, kept, 2.0 * kept)
        # What stands for b tells `second_rows` which rows ask for a second centre.
        centre = centre_ptr + 4 * row
        gl.store(centre, a)
        gl.store(centre + 1, gl.where(asks, 1.0, 0.0))
        gl.store(centre + 2, 0.0)
        gl.store(centre + 3, sigma_sq)
        none = gl.zeros([SQUARE], gl.float16, gl.SliceLayout(0, LINES))
        gl.store(direction_ptr + row * SQUARE + o_v, none)
        gl.store((out_row + o_p) + half[None, :], p.to(gl.float16), mask=upper)
        PADDING: gl.constexpr = PRODUCTS - PACKED
        if PADDING > 0:
            zero = gl.zeros([SQUARE], gl.float16, gl.SliceLayout(0, BY_ROW))
            gl.store(out_row + PACKED + o_j, zero, mask=o_j < PADDING)
        trace = gl.sum(diagonal_next, axis=0)
    if CARRY:
        # The last row fetched zeros alone, but into memory that is given to others next.
        async_copy.wait_group(0)


@gluon.jit
def _move_moments(
    row_ptr,
    number_ptr,
    hyper_ptr,
    coefficient,
    inverse_ptr,
    c_ptr,
    changed,
    start,
    rows,
    partner_rows,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    """Advance both moments of up to 64 rows and write their residuals."""
    PACKED: gl.constexpr = RANK * (RANK + 1) // 2
    first_row = gl.load(row_ptr + RESIDUAL_ROW) + start
    residual_ptr += first_row * PRODUCTS
    centre_ptr += 4 * first_row
    direction_ptr += first_row * SQUARE
    g_ptr = residual_ptr.to(gl.pointer_type(gl.float32))
    m_ptr = gl.load(row_ptr + EXP_AVG).to(gl.pointer_type(gl.float32)) + start * RANK
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
    gl.store(m_ptr + o_m, m, mask=mask)
    _park(g_ptr, g, m, PRODUCTS // 2)
    p_ptr = gl.load(row_ptr + SECOND_MOMENT).to(gl.pointer_type(gl.float32)) + start * PACKED
    eps = gl.load(hyper_ptr + EPS).to(gl.float32) * scale_of(partner_rows, RANK)
    counts = residual_weight(row_ptr)
    if changed != 0:
        _advance_second(
            number_ptr,
            hyper_ptr,
            c_ptr,
            counts,
            eps,
            rows,
            m_ptr,
            p_ptr,
            g_ptr,
            residual_ptr,
            centre_ptr,
            direction_ptr,
            RANK,
            PRODUCTS,
            True,
        )
    else:
        _advance_second(
            number_ptr,
            hyper_ptr,
            c_ptr,
            counts,
            eps,
            rows,
            m_ptr,
            p_ptr,
            g_ptr,
            residual_ptr,
            centre_ptr,
            direction_ptr,
            RANK,
            PRODUCTS,
            False,
        )
    tl.debug_barrier()
    second_rows(
        number_ptr,
        counts,
        eps,
        rows,
        m_ptr,
        p_ptr,
        residual_ptr,
        centre_ptr,
        direction_ptr,
        RANK,
        PRODUCTS,
    )


@gluon.jit
def _moments_hopper_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    change_ptr,
    changed_ptr,
    partner_ptr,
    residual_ptr,
    centre_ptr,
    direction_ptr,
    RANK: gl.constexpr,
    PRODUCTS: gl.constexpr,
    WIDTH: gl.constexpr,
    GRAD_DTYPE: gl.constexpr,
):
    i_tile = gl.program_id(0).to(gl.int64)
    side = gl.load(tiles_ptr + 3 * i_tile).to(gl.int64)
    start = gl.load(tiles_ptr + 3 * i_tile + 1).to(gl.int64)
    of_partner = gl.load(tiles_ptr + 3 * i_tile + 2)
    row_ptr = table_ptr + side * COLUMNS
    number_ptr = numbers_ptr + side * NUMBERS
    if gl.load(decision_ptr + SKIP) == 0:
        moves = gl.load(number_ptr + MOVES) != 0
        rows = gl.minimum(gl.load(row_ptr + ROWS) - start, SQUARE).to(gl.int32)
        partner_rows = gl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        if of_partner != 0:
            if moves:
                write_partner(row_ptr, start, partner_rows, partner_ptr, RANK, PRODUCTS, WIDTH)
        # The workspace is padded to tiles of which the last may have no rows.
        elif (rows > 0) & (gl.load(row_ptr + GRAD) != 0):
            scaling = gl.load(row_ptr + SCALING).to(gl.float64, bitcast=True)
            coefficient = gl.load(decision_ptr + COEFFICIENT) * gl.load(hyper_ptr + SIGN) / scaling
            if moves:
                _move_moments(
                    row_ptr,
                    number_ptr,
                    hyper_ptr,
                    coefficient,
                    inverse_ptr + (side ^ 1) * SQUARE * SQUARE,
                    change_ptr + side * SQUARE * SQUARE,
                    gl.load(changed_ptr + side),
                    start,
                    rows,
                    partner_rows,
                    residual_ptr,
                    centre_ptr,
                    direction_ptr,
                    RANK,
                    PRODUCTS,
                    GRAD_DTYPE,
                )
            else:
                keep_moments(
                    row_ptr,
                    hyper_ptr,
                    coefficient,
                    inverse_ptr + (side ^ 1) * SQUARE * SQUARE,
                    change_ptr + side * SQUARE * SQUARE,
                    gl.load(changed_ptr + side),
                    start,
                    rows,
                    RANK,
                    GRAD_DTYPE,
                )
