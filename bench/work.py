"""What each stage of a step has to do: bytes, floating-point operations, special functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from loft_kernels.backends.triton.configs import HOPPER, broad, row_tile
from loft_kernels.reference import packed_length

STAGES = ("gram", "solve", "basis", "moments", "operands", "update")


@dataclass(frozen=True, slots=True)
class Work:
    """Counts of one stage, summed over all pairs.

    Attributes:
        bytes: through the memory of the device, every tensor counted once.
        flop: operations of the products that take the fast matrix units.
        flop64: operations of fp64 products.
        special: roots and reciprocals.
    """

    bytes: float = 0.0
    flop: float = 0.0
    flop64: float = 0.0
    special: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Add the counts."""
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


def work_of(
    shapes: Sequence[tuple[int, int]], rank: int, *, gpu: bool, merged: bool | None = None
) -> dict[str, Work]:
    """Count one step in fp32 with alternation, averaged over both phases.

    Args:
        shapes: (m, n) of every pair.
        rank: r.
        gpu: by the kernels, or by the C++ step.
        merged: moments and operands are one kernel, which reads P and m once; by default as on
            compute capability 9.0.

    With R = sum(m + n) over the pairs, V = sum(m n), r the rank, K = r(r+1)/2:

    * gram: reads factor, gradient and last basis, ``12 r R`` bytes; three products, ``6 r^2 R``
      fp64 operations.
    * solve: reads three r x r partial sums of every program of gram, ``24 r^2 R / chunk``
      bytes with the rows of a program from the tile table.
    * basis: reads the factor and the last basis, writes the basis, ``12 r R`` bytes; ``2 r^2 R``
      fp64 operations.
    * moments: reads gradient, m and P, writes m and P, ``(12 r + 8 K) R`` bytes; g, and m C of
      the moving side, half the rows, are ``3 r^2 R`` fp64 operations, and C^T P C of that side
      ``4 r^3 R / 2``.
    * operands (GPU): reads the partner's basis and writes ``K + 2 r`` fp16 numbers a row of it;
      above rank 16 also reads m and P of the moving side and writes K fp16 numbers a row: of half
      the rows each. Merged, all but that reading belongs to moments.
    * update: reads P and m (above rank 16 on a GPU: K fp16 numbers and m) and factor of the moving
      side, writes the factor, and reads the operands once (a CPU: the basis). Per entry of W
      ``r^2 + 5 r`` operations (v, m~ and the projection) and special functions: a root and, on a
      GPU, half a reciprocal (one serves two divisions); a CPU divides.
    """
    r, k = rank, packed_length(rank)
    rows, entries = sum(m + n for m, n in shapes), sum(m * n for m, n in shapes)
    half = rows / 2
    operand_bytes, residual, moment_bytes = 2 * (k + 2 * r), 2 * k, 4 * (k + r)
    streamed = moment_bytes
    merged = gpu and (broad(r) if merged is None else merged)
    moments = Work(bytes=(12 * r + 8 * k) * rows, flop64=3 * r**2 * rows, flop=4 * r**3 * half)
    operands = Work()
    if gpu:
        operands = Work(bytes=(4 * r + operand_bytes) * half)
        if r > 16:
            streamed = residual + 4 * r
            read = 0 if merged else moment_bytes
            operands += Work(bytes=(read + residual) * half)
    if merged:
        moments, operands = moments + operands, Work()
    partner = operand_bytes if gpu else 4 * r
    return {
        "gram": Work(bytes=12 * r * rows, flop64=6 * r**2 * rows),
        "solve": Work(bytes=24 * r**2 * rows / row_tile(HOPPER, r).chunk),
        "basis": Work(bytes=12 * r * rows, flop64=2 * r**2 * rows),
        "moments": moments,
        "operands": operands,
        "update": Work(
            bytes=(streamed + partner + 8 * r) * half,
            flop=(r**2 + 5 * r) * entries,
            special=1.5 * entries,
        ),
    }


def share(work: Work, ms: float, tops: dict[str, float], matrix: str) -> dict[str, Any]:
    """Return a stage's numbers and its share of every ceiling over its time.

    Args:
        work: that was done.
        ms: that it took.
        tops: what the machine was measured to do a second at most, by name.
        matrix: the ceiling of the products that take the fast matrix units.
    """
    counted = {
        "bytes": work.bytes,
        matrix: work.flop,
        "flop64": work.flop64,
        "special": work.special,
    }
    shares = {
        name: amount / tops[name] / (ms / 1e3) for name, amount in counted.items() if name in tops
    }
    bound = max(shares, key=lambda name: shares[name])
    return {"ms": ms, "work": counted, "shares": shares, "bound": bound, "share": shares[bound]}
