"""The `moments` kernel alone, row by row, against the reference path in fp64.

Rows of one tile differ by many orders of magnitude, so that a scale shared between rows, or an
error relative to anything but a row's own entries, shows. Runs interpreted where there is no GPU.
"""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton backend is optional")
import triton.language as tl

from loft_kernels import reference
from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.moments import _moments_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA1, BETA2, SCALING, COEFFICIENT = 0.9, 0.99, 2.0, 0.5
# On top of twice the eager fp32 error, of a row's largest: what products of fp16 halves drop.
FLOOR = 2.0**-22


def contraction(rank: int, rng: torch.Generator) -> Tensor:
    """Return Q_prev^T Q of two bases that share most of their span."""
    q = torch.linalg.qr(torch.randn(4 * rank, rank, generator=rng, dtype=torch.float64))[0]
    moved = q + 0.1 * torch.randn(4 * rank, rank, generator=rng, dtype=torch.float64)
    return q.T @ torch.linalg.qr(moved)[0]


def launch(rank: int, grad: Tensor, m: Tensor, p: Tensor, inverse: Tensor, c: Tensor | None, exact):
    """Advance m and P of one side in place; its partner's side is empty."""
    width, rows = configs.padded_rank(rank), len(grad)
    tile = configs.moment_tile(configs.capability_of(torch.device(DEVICE)), rank)
    table = torch.zeros((2, tables.COLUMNS.value), dtype=torch.int64)
    entries = {
        tables.GRAD: grad.data_ptr(),
        tables.GRAD_STRIDE_ROW: grad.stride(0),
        tables.GRAD_STRIDE_COL: grad.stride(1),
        tables.EXP_AVG: m.data_ptr(),
        tables.SECOND_MOMENT: p.data_ptr(),
        tables.ROWS: rows,
        tables.SCALING: struct.unpack("<q", struct.pack("<d", SCALING))[0],
    }
    for column, value in entries.items():
        table[0, column.value] = value
    starts = list(range(0, rows, tile.chunk))
    hyper = torch.zeros(9, dtype=torch.float64)
    hyper[tables.BETA1.value], hyper[tables.BETA2.value] = BETA1, BETA2
    hyper[tables.SIGN.value] = 1
    inverses = torch.full((2, width, width), float("nan"), dtype=torch.float64)
    changes = torch.full((2, width, width), float("nan"), dtype=torch.float32)
    inverses[1], changes[0] = 0, 0
    inverses[1, :rank, :rank] = inverse
    if c is not None:
        changes[0, :rank, :rank] = c
    scratch = torch.full((len(starts), width, width), float("nan"), device=DEVICE)
    _moments_kernel[(len(starts),)](
        table_ptr=table.to(DEVICE),
        tiles_ptr=torch.tensor([(0, s) for s in starts], dtype=torch.int32, device=DEVICE),
        hyper_ptr=hyper.to(DEVICE),
        decision_ptr=torch.tensor([0.0, COEFFICIENT, 0.0], dtype=torch.float64, device=DEVICE),
        inverse_ptr=inverses.to(DEVICE),
        change_ptr=changes.to(DEVICE),
        changed_ptr=torch.tensor([c is not None, 0], dtype=torch.int32, device=DEVICE),
        scratch_ptr=scratch if width > 64 else None,
        RANK=rank,
        R=width,
        CHUNK=tile.chunk,
        BLOCK_M=tile.rows,
        GROUP=tile.group,
        IDLE=tile.idle,
        COLUMNS_P=tile.columns,
        GRAD_DTYPE=tl.float32,
        EXACT=exact,
        PREFETCH=False,
        num_warps=tile.warps,
    )


def advanced(m, p, grad, inverse, c, dtype) -> tuple[Tensor, Tensor]:
    """Evaluate the formulas as they read, in one dtype throughout."""
    m, p, rank = m.to(dtype), reference.unpack_symmetric(p.to(dtype), m.shape[1]), m.shape[1]
    g = (grad.double() @ inverse.T * (COEFFICIENT / SCALING)).to(dtype)
    c = torch.eye(rank, dtype=dtype) if c is None else c.to(dtype)
    m = BETA1 * (m @ c) + (1 - BETA1) * g
    p = BETA2 * (c.T @ (p @ c)) + (1 - BETA2) * g[:, :, None] * g[:, None, :]
    return m.double(), reference.pack_symmetric(p).double()


@pytest.mark.parametrize("exact", [False, True], ids=["default", "ieee"])
@pytest.mark.parametrize("moving", [False, True], ids=["idle", "moving"])
@pytest.mark.parametrize("rank", [1, 5, 8, 12, 16, 17, 32, 48, 64, 65, 130, 256], ids="r{}".format)
def test_every_row_is_right_at_its_own_scale(rank, moving, exact):
    rng = torch.Generator().manual_seed(rank)
    rows = 70 if rank <= 16 else 37 if rank <= 64 else 5
    scale = 10.0 ** torch.linspace(-15, 15, rows, dtype=torch.float64)
    scale = scale[torch.randperm(rows, generator=rng)][:, None]
    history = torch.randn(rows, rank + 2, rank, generator=rng, dtype=torch.float64)
    square = history.mT @ history * scale.square()[:, :, None]
    p = reference.pack_symmetric(square).float()
    p[rows // 2] = 0
    m = (torch.randn(rows, rank, generator=rng, dtype=torch.float64) * scale).float()
    grad = (torch.randn(rows, rank, generator=rng, dtype=torch.float64) * scale).float()
    inverse = torch.randn(rank, rank, generator=rng, dtype=torch.float64).tril()
    c = contraction(rank, rng).float() if moving else None

    runs = [advanced(m, p, grad, inverse, c, dtype) for dtype in (torch.float64, torch.float32)]
    # Each row begins where the last one ends: a write beside a row shows in its neighbour.
    grad, m, p = (x.to(DEVICE) for x in (grad, m, p))
    launch(rank, grad, m, p, inverse, c, exact)
    for name, actual, truth, eager in zip("mP", (m, p), *runs, strict=True):
        largest = truth.abs().amax(1)
        error = (actual.cpu().double() - truth).abs().amax(1) / largest
        limit = 2 * float(((eager - truth).abs().amax(1) / largest).max()) + FLOOR
        row = int(error.argmax())
        assert float(error.max()) <= limit, f"{name}: row {row} errs {float(error[row]):.1e}"
