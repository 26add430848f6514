"""Take a few steps at shapes one off each block, for compute-sanitizer to watch.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench sanitize

Before the third step both factors are edited, so that those that stay are carried over, too.
Without the caching allocator every tensor is an allocation of its own, so that memcheck sees each
access outside it. racecheck, initcheck and synccheck take the same command.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import loft_kernels as lk

SHAPES = (63, 129), (64, 128), (65, 127), (17, 31), (1, 255), (257, 15)


class Pair(nn.Module):
    """A LoRA pair."""

    def __init__(self, m: int, n: int, rank: int, device: str) -> None:
        """Draw both factors."""
        super().__init__()
        self.scaling = 2.0
        self.lora_A = nn.Parameter(torch.randn(rank, n, device=device))
        self.lora_B = nn.Parameter(torch.randn(m, rank, device=device))


def main(argv: list[str] | None = None) -> None:
    """Take four steps, two of each factor, at every rank and in both precisions."""
    parser = argparse.ArgumentParser(
        prog="python -m bench sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", default="3,16,24,33,64")
    parser.add_argument("--precisions", default="default,ieee")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    for rank in map(int, args.ranks.split(",")):
        for precision in args.precisions.split(","):
            model = nn.ModuleList(Pair(m, n, rank, args.device) for m, n in SHAPES)
            opt = lk.LoFTAdamW(
                model, lr=1e-3, max_grad_norm=1.0, backend=args.backend, precision=precision
            )
            for step in range(4):
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                    if step == 2:  # somebody else moves both factors
                        p.data += 0.1 * torch.randn_like(p)
                opt.step()
            finite = all(bool(p.isfinite().all()) for p in model.parameters())
            print(f"r={rank} {precision}: {'finite' if finite else 'NOT FINITE'}", flush=True)
            if not finite:
                raise SystemExit(1)
