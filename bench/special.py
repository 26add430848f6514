"""A kernel of special functions alone, for their ceiling: reads and writes next to nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
ROUNDS = 512


@triton.jit
def _special_kernel(x_ptr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o_x)
    for _ in range(ROUNDS):
        # 1 / (1 / sqrt(x)) tends to 1: no number leaves the range, and none is known beforehand.
        x = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        x = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(x_ptr + o_x, x)


def launch_special(x: torch.Tensor) -> None:
    """Run ``2 ROUNDS`` special functions on every entry, in place; a multiple of BLOCK entries."""
    _special_kernel[(x.numel() // BLOCK,)](x, BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=4)
