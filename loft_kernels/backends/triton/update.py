"""The hot loop: Adam's step in every entry of the virtual weight, projected back on the fly.

For a block of rows i of the moving factor and tiles of partner rows j:

    m~ = m^ Q^T                    v = a m~^2 + R . (Q (x) Q)        (two GEMMs)
    D = m~ / (sqrt(max(v, m~^2 / bound)) + eps)                      (entry by entry)
    D Q                                                              (a third GEMM, accumulated)

and at the end ``X <- (1 - lr wd) X - (lr / s) (D Q) L^+``. The second moment is *centred*:
``R = P^ - a m^^T m^`` with ``a = m^ P^ m^^T / |m^|^4``, so that fp16 touches only the residual,
and m~ is the sum of three products of fp16 halves. ``operands`` prepares what is streamed; tiles
arrive through the tensor memory accelerator. No m x n tensor exists. Up to rank 16 a row's R stays
beside the tiles; above, the contraction over the blocks of R is a GEMM main loop of its own.

The sum over R begins at what a second centre adds to v, ``w~ (2 b m~ + c w~)``, see ``centre``. Its
two narrow products are a small part of the work above rank 16: there it is always on. For ranks 9
to 16 a block of rows takes it where enough of its rows ask for it, in `update_hopper` and in the
interpreter; up to rank 8 there is none.

This is the kernel of every GPU and of the interpreter; ``update_hopper`` is the same step for
compute capability 9.0, with the tensor cores driven by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loft_kernels.backends.triton.centre import from_row, residual_weight, shrink_of
from loft_kernels.backends.triton.operands import load_half, scale_of
from loft_kernels.backends.triton.residual import residual_rows
from loft_kernels.backends.triton.tables import (
    BIAS1,
    BIAS2,
    BOUND,
    COLUMNS,
    EPS,
    EXP_AVG,
    LR_A,
    LR_B,
    MASTER,
    MOVES,
    NUMBERS,
    PARAM,
    PARAM_STRIDE_COL,
    PARAM_STRIDE_ROW,
    PARTNER_ROW,
    RESIDUAL_ROW,
    ROWS,
    SCALING,
    SECOND_MOMENT,
    SKIP,
    WEIGHT_DECAY,
)
from loft_kernels.backends.triton.update_wide import (
    direction_tile,
    first_moment_tile,
    park,
    parked_direction,
)


@triton.jit
def two_entries(m, v, eps):
    """Return ``m / (sqrt(v) + eps)`` in fp16, two entries at a time.

    One reciprocal of a product serves two divisions: three special functions for two entries. v
    is at least 1e-37, so that the product is a normal number.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .f32 s, t, q, d, e;
        sqrt.approx.ftz.f32 s, $3;
        sqrt.approx.ftz.f32 t, $4;
        add.ftz.f32 s, s, $5;
        add.ftz.f32 t, t, $6;
        mul.ftz.f32 q, s, t;
        rcp.approx.ftz.f32 q, q;
        mul.ftz.f32 d, $1, t;
        mul.ftz.f32 e, $2, s;
        mul.ftz.f32 d, d, q;
        mul.ftz.f32 e, e, q;
        cvt.rn.f16x2.f32 $0, e, d;
        }
        """,
        "=r,f,f,f,f,f,f",
        [m, v, eps],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def guarded(m, dot, a, floor):
    """Return v: the centred sum, held at or above m~^2 / bound, and above 0."""
    m_sq = m * m
    return tl.maximum(a[:, None] * m_sq + dot, m_sq * floor[:, None] + 1e-37)


@triton.jit
def _entries(m, dot, a, floor, eps, EXACT: tl.constexpr, ASM: tl.constexpr):
    """Return D for one tile, in the dtype of the operands."""
    v = guarded(m, dot, a, floor)
    if EXACT:
        d = tl.where(m * m > 0, tl.div_rn(m, tl.sqrt_rn(v) + eps[:, None]), 0.0)
    elif ASM:
        d = two_entries(m, v, tl.broadcast_to(eps[:, None], m.shape))
    else:
        d = (m / (tl.sqrt(v) + eps[:, None])).to(tl.float16)
    return d


@triton.jit
def move_rows(
    row_ptr,
    hyper_ptr,
    side,
    direction,
    o_row,
    rows,
    o_r,
    rank,
    HAS_MASTER: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
):
    """Write ``X <- (1 - lr wd) X - (lr / s) direction`` for some rows; direction is fp64."""
    lr = tl.load(hyper_ptr + tl.where(side % 2 == 0, LR_B, LR_A))
    scaling = tl.load(row_ptr + SCALING).to(tl.float64, bitcast=True)
    kept = 1.0 - lr * tl.load(hyper_ptr + WEIGHT_DECAY)
    x_ptr = tl.load(row_ptr + PARAM).to(tl.pointer_type(PARAM_DTYPE))
    stride_row = tl.load(row_ptr + PARAM_STRIDE_ROW)
    stride_col = tl.load(row_ptr + PARAM_STRIDE_COL)
    x_ptr = x_ptr + o_row[:, None] * stride_row + o_r[None, :] * stride_col
    mask = (o_row[:, None] < rows) & (o_r[None, :] < rank)
    stored = tl.load(x_ptr, mask=mask, other=0.0)
    x = stored.to(tl.float32)
    if HAS_MASTER:
        w_ptr = tl.load(row_ptr + MASTER).to(tl.pointer_type(tl.float32))
        w_ptr = w_ptr + o_row[:, None] * rank + o_r[None, :]
        master = tl.load(w_ptr, mask=mask, other=0.0)
        # Entries that someone changed since the master was rounded are taken over.
        x = tl.where(master.to(PARAM_DTYPE) == stored, master, x)
    x = (x.to(tl.float64) * kept - direction * (lr / scaling)).to(tl.float32)
    if HAS_MASTER:
        tl.store(w_ptr, x, mask=mask)
    tl.store(x_ptr, x.to(PARAM_DTYPE), mask=mask)


@triton.jit
def second_part(m_tile, w_tile, b, c):
    """Return what the second centre adds to v."""
    return w_tile * (b[:, None] * m_tile + c[:, None] * w_tile)


@triton.jit
def _first_sum(m_tile, w, q, q_low, b, c, EXACT: tl.constexpr):
    """Return where the sum over R begins: the second centre's part of v for one tile."""
    w_tile = tl.dot(w, tl.trans(q), input_precision="ieee")
    if not EXACT:
        w_tile = tl.dot(w, tl.trans(q_low), w_tile, input_precision="ieee")
    return second_part(m_tile, w_tile, b, c)


@triton.jit
def _update_kernel(
    table_ptr,
    tiles_ptr,
    hyper_ptr,
    decision_ptr,
    numbers_ptr,
    inverse_ptr,
    pairs_ptr,
    centre_ptr,
    direction_ptr,
    residual_ptr,
    main,
    tail,
    halves,
    residual_main,
    residual_tail,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    MAIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    RESIDENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    side = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    row_ptr = table_ptr + side * COLUMNS
    if (tl.load(numbers_ptr + side * NUMBERS + MOVES) != 0) & (tl.load(decision_ptr + SKIP) == 0):
        OPERAND: tl.constexpr = tl.float32 if EXACT else tl.float16
        PRODUCTS: tl.constexpr = MAIN * BLOCKS + TAIL
        PRECISION: tl.constexpr = "ieee"
        # Ranks 9 to 16, where R is rounded to fp16. Not on a GPU: compiled for one, an earlier form
        # of this branch was wrong by 1e-3 where the interpreter and `update_hopper` were right.
        SECOND: tl.constexpr = (SPLIT == 1) & (not EXACT) & (not ASM)
        rows = tl.load(row_ptr + ROWS)
        partner_rows = tl.load(table_ptr + (side ^ 1) * COLUMNS + ROWS)
        unbias1 = 1.0 / tl.load(numbers_ptr + side * NUMBERS + BIAS1).to(tl.float32)
        unbias2 = 1.0 / tl.load(numbers_ptr + side * NUMBERS + BIAS2).to(tl.float32)
        floor = (1.0 / tl.load(numbers_ptr + side * NUMBERS + BOUND)).to(tl.float32)
        counts = residual_weight(row_ptr)
        m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32))
        p_ptr = tl.load(row_ptr + SECOND_MOMENT).to(tl.pointer_type(tl.float32))
        m_ptr, p_ptr, left = from_row(m_ptr, p_ptr, rows, start, rank)
        o_row = tl.arange(0, BLOCK_M)
        tau = scale_of(partner_rows, rank)

        # The rows' operands: sigma m in two halves, and the residual.
        eps = tl.load(hyper_ptr + EPS).to(tl.float32) * tau
        if RESIDENT:
            second, a, b, c, sigma_sq, w, r_main, r_tail = residual_rows(
                m_ptr,
                p_ptr,
                pairs_ptr,
                o_row,
                left,
                rank,
                unbias1,
                unbias2,
                counts,
                eps,
                R,
                MAIN,
                TAIL,
                SECOND,
                OPERAND,
            )
        else:
            first = tl.load(row_ptr + RESIDUAL_ROW) + start
            centre_ptrs = centre_ptr + 4 * (first + o_row)
            a, b, c = tl.load(centre_ptrs), tl.load(centre_ptrs + 1), tl.load(centre_ptrs + 2)
            sigma_sq = tl.load(centre_ptrs + 3)
            w_ptr = direction_ptr + first * R
            if R <= 64:
                w = tl.load(w_ptr + o_row[:, None] * R + tl.arange(0, R)[None, :])
            o_residual = first.to(tl.int32)
        sigma = tl.sqrt(sigma_sq)
        shrink = shrink_of(eps * sigma)
        a, b, c = a * shrink * shrink, b * shrink * shrink, c * shrink * shrink
        floor, eps = floor * shrink * shrink, eps * sigma * shrink
        if R <= 64:
            m_high, m_low, part = load_half(
                m_ptr, o_row, left, tl.arange(0, R), rank, sigma[:, None] * unbias1, SPLIT, OPERAND
            )
            if SPLIT == 3:
                m_high = tl.where((part == 1)[None, :], m_low, m_high)
            if SPLIT == 2:
                m_low = tl.where((part == 0)[None, :], m_low, 0.0)

        o_partner = tl.load(row_ptr + PARTNER_ROW).to(tl.int32)
        # Thousands of additions to one accumulator drift: tensor cores truncate what they add, by
        # 2^-24 of the sum each time. So D Q is added up over a few tiles, and these sums apart.
        FLUSH: tl.constexpr = 2 if EXACT else 8
        acc = tl.zeros((BLOCK_M, R), tl.float32)
        projected = tl.zeros((BLOCK_M, R), tl.float32)
        rest = tl.zeros((BLOCK_M, R), tl.float32)  # what rounding took from projected
        for j in range(0, partner_rows.to(tl.int32), BLOCK_N):
            if R <= 64:
                q = halves.load([o_partner + j, PRODUCTS])
                m_tile = tl.dot(m_high, tl.trans(q), input_precision=PRECISION)
                if (SPLIT < 3) & (not EXACT):
                    m_tile = tl.dot(m_low, tl.trans(q), m_tile, input_precision=PRECISION)
                q_low = q
                if (SPLIT == 1) & (not EXACT):
                    q_low = halves.load([o_partner + j, PRODUCTS + R])
                    m_tile = tl.dot(m_high, tl.trans(q_low), m_tile, input_precision=PRECISION)
            if RESIDENT:
                dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                if SECOND:  # noqa: SIM102  the compiler knows SECOND, not second
                    if second:
                        dot = _first_sum(m_tile, w, q, q_low, b, c, EXACT)
                product = main.load([o_partner + j, 0])
                dot = tl.dot(r_main, tl.trans(product), dot, input_precision=PRECISION)
                if TAIL > 0:
                    product = tail.load([o_partner + j, MAIN])
                    dot = tl.dot(r_tail, tl.trans(product), dot, input_precision=PRECISION)
            else:
                dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                if R <= 64:
                    dot = _first_sum(m_tile, w, q, q_low, b, c, EXACT)
                for k in range(0, BLOCKS):
                    rows_of = residual_main.load([o_residual, k * MAIN])
                    product = main.load([o_partner + j, k * MAIN])
                    dot = tl.dot(rows_of, tl.trans(product), dot, input_precision=PRECISION)
                if TAIL > 0:
                    rows_of = residual_tail.load([o_residual, BLOCKS * MAIN])
                    product = tail.load([o_partner + j, BLOCKS * MAIN])
                    dot = tl.dot(rows_of, tl.trans(product), dot, input_precision=PRECISION)
            if R > 64:
                # Last, for the registers: through the products above there is only their sum.
                m_tile = first_moment_tile(
                    m_ptr,
                    main,
                    o_row,
                    left,
                    o_partner + j,
                    rank,
                    sigma[:, None] * unbias1,
                    BLOCK_N,
                    PRODUCTS,
                    R,
                    OPERAND,
                )
                w_tile = direction_tile(
                    w_ptr, main, o_row, o_partner + j, rank, BLOCK_N, PRODUCTS, R, OPERAND
                )
                dot += second_part(m_tile, w_tile, b, c)
                q = halves.load([o_partner + j, PRODUCTS])
            d = _entries(m_tile, dot, a, floor, eps, EXACT, ASM)
            if R > 64:
                flushed = tl.dot(d, q, input_precision=PRECISION)
            else:
                keep = tl.where((j // BLOCK_N) % FLUSH == 0, 0.0, 1.0)
                flushed = acc * (1.0 - keep)
            if EXACT:
                total = projected + flushed
                added = total - projected
                rest += (projected - (total - added)) + (flushed - added)
                projected = total
            else:
                projected += flushed
            if R <= 64:
                acc = tl.dot(d, q, acc * keep, input_precision=PRECISION)
        projected += acc + rest

        # In fp64, because L^+ carries the partner's condition.
        o_r = tl.arange(0, R)
        inverse_ptr += (side ^ 1) * R * R
        if R <= 64:
            inverse = tl.load(inverse_ptr + o_r[:, None] * R + o_r[None, :])
            live = (o_r < rank)[None, :]
            projected = tl.where(live, projected * (shrink / tau)[:, None], 0.0).to(tl.float64)
            direction = tl.dot(projected, inverse, out_dtype=tl.float64)
            move_rows(
                row_ptr,
                hyper_ptr,
                side,
                direction,
                start + o_row,
                rows,
                o_r,
                rank,
                HAS_MASTER,
                PARAM_DTYPE,
            )
        else:
            live = (o_r < rank)[None, :]
            projected = tl.where(live, projected * (shrink / tau)[:, None], 0.0)
            park_ptr = (residual_ptr + first * PRODUCTS).to(tl.pointer_type(tl.float32))
            park(projected, park_ptr, o_row)
            for col in range(0, rank, 32):
                direction = parked_direction(park_ptr, inverse_ptr, o_row, col, rank, R, 32)
                move_rows(
                    row_ptr,
                    hyper_ptr,
                    side,
                    direction,
                    start + o_row,
                    rows,
                    col + tl.arange(0, 32),
                    rank,
                    HAS_MASTER,
                    PARAM_DTYPE,
                )
