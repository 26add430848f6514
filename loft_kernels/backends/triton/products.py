"""Products of fp32 matrices on the tensor cores, as three products of fp16 halves (22 bits)."""

from __future__ import annotations

import triton
import triton.language as tl

# C is multiplied by this before it is halved: its smallest entries keep 2^-29.
C_SCALE = tl.constexpr(16.0)
UNSCALE = tl.constexpr(1.0 / 256.0)


@triton.jit
def halves(x):
    """Split fp32 numbers into fp16 high and low halves."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """Multiply fp32 matrices: exactly, or three products of halves, the small ones first."""
    if EXACT:
        acc = tl.dot(a, b, input_precision="ieee")
    else:
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        acc = tl.dot(a_low, b_high)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    return acc


@triton.jit
def powers(top):
    """Return a power of two that brings top to 8..16, and its inverse."""
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 16)
    up, down = (257 - exponent) << 23, (exponent - 3) << 23
    return up.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True)
