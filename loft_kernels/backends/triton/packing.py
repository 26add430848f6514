"""How a symmetric r x r contraction is laid out for the tensor cores.

The contraction of a packed second moment with ``Q_j (x) Q_j`` runs over the r(r+1)/2 packed
entries in their stored order, padded to a multiple of 16: blocks of `main` columns and one block
of `tail` columns, each a power of two wide. A lookup table gives the pair (i, j) of every entry.
m~ is a product of fp16 halves, ``mh Qh + ml Qh + mh Ql``, laid side by side where they are narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Columns of the operands of one rank.

    Attributes:
        packed: r(r+1)/2.
        main: width of a block of packed entries.
        blocks: number of such blocks.
        tail: width of the last block, 0 for none.
        split: how the halves of Q stand: 3 for [Qh | Qh | Ql] in one block, 2 for [Qh | Ql] in one
            block, 1 for a block each.
        half: width of a block of halves.
    """

    packed: int
    main: int
    blocks: int
    tail: int
    split: int
    half: int

    @property
    def products(self) -> int:
        """Columns of the packed products."""
        return self.main * self.blocks + self.tail

    @property
    def width(self) -> int:
        """Columns of a partner row's operands."""
        return self.products + self.half * (2 if self.split == 1 else 1)


@cache
def packing(rank: int) -> Packing:
    """Return the layout of a rank: one resident block up to rank 16, blocks of 64 above."""
    packed = rank * (rank + 1) // 2
    split = 3 if rank <= 5 else 2 if rank <= 8 else 1
    half = max(16, 1 << (rank - 1).bit_length())
    if rank <= 16:
        candidates = [(main + tail, tail, main) for main in (16, 32, 64, 128) for tail in (0, 16)]
        _, tail, main = min(c for c in candidates if c[0] >= packed)
        return Packing(packed, main, 1, tail, split, half)
    blocks, left = divmod(packed, 64)
    tail = max(16, 1 << (left - 1).bit_length()) if left else 0
    return Packing(packed, 64, blocks, tail, split, half)


def pair_table(rank: int) -> Tensor:
    """List the pair of every packed entry as ``i + 65536 j``: int32, r(r+1)/2."""
    i, j = torch.triu_indices(rank, rank)
    return (i + 65536 * j).to(torch.int32)


def selection(rank: int) -> Tensor:
    """Build what picks both factors of every packed entry out of a vector: fp16, 2 x products x 16.

    Column k of a product with the first is entry i of the vector, of one with the second entry j,
    twice off the diagonal; up to rank 16.
    """
    chosen = torch.zeros(2, packing(rank).products, 16, dtype=torch.float16)
    i, j = torch.triu_indices(rank, rank)
    k = torch.arange(len(i))
    chosen[0, k, i] = 1
    chosen[1, k, j] = weights(rank)[k].half()
    return chosen


def weights(rank: int) -> Tensor:
    """List how often every packed entry counts: fp32, 1 on the diagonal, 0 in the padding."""
    i, j = torch.triu_indices(rank, rank)
    counts = torch.zeros(packing(rank).products)
    counts[: len(i)] = torch.where(i == j, 1.0, 2.0)
    return counts
