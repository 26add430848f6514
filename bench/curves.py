"""Train a small byte model with two backends and compare their loss curves.

    python -m bench curves --steps 200 --out bench/results/curves.jsonl

A GPT-2-shaped model (that of the demo, in plain PyTorch) is pretrained on Python source and adapted
to English by LoRA with LoFTAdamW: same weights, same batches, same seeds for every backend. The
loss of each step and the held-out loss at every tenth must agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import loft_kernels as lk
from bench.record import environment, largest

LIMIT = 1e-3  # largest relative difference of two losses
EVERY = 10  # steps between two looks at the held-out loss
WIDTH, LAYERS, HEADS, BLOCK, BATCH = 128, 3, 4, 128, 8
PRETRAIN_LR, LR, WARMUP = 2e-3, 4e-3, 0.1


class Linear(nn.Module):
    """A frozen-or-not linear layer with an optional LoRA pair."""

    def __init__(self, size_in: int, size_out: int) -> None:
        """Draw the weight as GPT-2 does."""
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(size_out, size_in))
        self.bias = nn.Parameter(torch.zeros(size_out))
        self.scaling = 1.0

    def adapt(self, rank: int) -> None:
        """Freeze the layer and add a pair, B = 0 as usual."""
        device, (size_out, size_in) = self.weight.device, self.weight.shape
        a = (torch.rand(rank, size_in) * 2 - 1) / size_in**0.5
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(size_out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its adapter."""
        y = functional.linear(x, self.weight, self.bias)
        if hasattr(self, "lora_A"):
            y = y + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        return y


class Block(nn.Module):
    """Attention and feed-forward, both behind a layer norm."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.c_fc, self.mlp_proj = Linear(WIDTH, 4 * WIDTH), Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; attention is written out, because fused ones may not repeat bitwise."""
        batch, length, _ = x.shape
        parts = self.c_attn(self.ln_1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf"))
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        hidden = functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp_proj(hidden)


class ByteModel(nn.Module):
    """A GPT-2 that reads bytes; the head is tied to the embedding."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(256, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(BLOCK, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, blocks: Tensor) -> Tensor:
        """Return the mean loss per byte of predicting the next one."""
        # A product with one-hot rows: unlike that of indexing, its gradient repeats bitwise.
        x = functional.one_hot(blocks, 256).to(self.tokens.dtype) @ self.tokens + self.places
        logits = self.ln_f(self.blocks(x)) @ self.tokens.T
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())

    def adapt(self, rank: int) -> None:
        """Freeze everything and put a LoRA pair on every linear layer."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.adapt(rank)


def batches(blocks: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Draw batches of random blocks, the same for every backend."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(blocks), (BATCH,), generator=rng)
        yield blocks[chosen.to(blocks.device)]


def train(
    model: nn.Module, opt: torch.optim.Optimizer, blocks: Tensor, held_out: Tensor, steps: int
) -> dict[str, list[float]]:
    """Train and return the loss of every step and the held-out loss at every tenth."""
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda k: min((k + 1) / warmup, (steps - k) / (steps - warmup + 1))
    )
    losses, held = [], []
    for k, batch in enumerate(batches(blocks, steps, seed=1), start=1):
        opt.zero_grad()
        loss = model(batch)
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.detach())
        if k % EVERY == 0:
            with torch.no_grad():
                held.append(torch.stack([model(part) for part in held_out.split(BATCH)]).mean())
    return {"train": torch.stack(losses).tolist(), "held_out": torch.stack(held).tolist()}


def data(device: str) -> tuple[Any, Any]:
    """Read the demo's two texts, which come with every Python."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from corpus import english_topics, python_source

    return (
        python_source(BLOCK, 4_000_000, 64).to(device),
        english_topics(BLOCK, 64).to(device),
    )


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train with every backend from the same start; the first is the measure of the others."""
    source, english = data(args.device)
    torch.manual_seed(0)
    base = ByteModel().to(args.device)
    adam = torch.optim.AdamW(base.parameters(), lr=PRETRAIN_LR, weight_decay=0.0)
    start = train(base, adam, source.train.long(), source.held_out.long(), args.pretrain_steps)
    print(f"pretrained: held-out loss {start['held_out'][-1]:.3f}", file=sys.stderr)
    base.adapt(args.rank)
    curves: dict[str, dict[str, list[float]]] = {}
    for backend in args.backends.split(","):
        model = copy.deepcopy(base)
        opt = lk.LoFTAdamW(model, lr=LR, backend=backend, precision=args.precision)
        curves[backend] = train(
            model, opt, english.train.long(), english.held_out.long(), args.steps
        )
        first, last = (curves[backend]["held_out"][k] for k in (0, -1))
        print(f"{backend}: held-out loss {first:.4f} -> {last:.4f}", file=sys.stderr)
    truth, *others = curves.values()
    worst = {
        name: largest(
            abs(a - b) / abs(b)
            for curve in others
            for a, b in zip(curve[name], truth[name], strict=True)
        )
        for name in truth
    }
    return {
        "steps": args.steps,
        "rank": args.rank,
        "precision": args.precision,
        "device": args.device,
        "worst_relative_difference": worst,
        "limit": LIMIT,
        "seed": 0,
        "ok": largest(worst.values()) <= LIMIT,
        "curves": curves,
        **environment(),
    }


def main(argv: list[str] | None = None) -> None:
    """Compare, append one JSON line; exit with 1 where the curves part."""
    parser = argparse.ArgumentParser(
        prog="python -m bench curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backends", default="reference,triton", help="the first is the measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("default", "ieee"), default="default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="a JSON line is appended here")
    args = parser.parse_args(argv)
    if args.steps < EVERY or args.pretrain_steps < EVERY:
        parser.error(f"--steps and --pretrain-steps: at least {EVERY}")
    names = args.backends.split(",")
    if not 1 < len(names) == len(set(names)):
        parser.error("--backends: two or more different ones")
    # A backend that hands its work to another one must not be praised for it.
    warnings.filterwarnings("error", message="the LoFT step runs on the reference path")
    row = compare(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "curves"}))
    sys.exit(0 if row["ok"] else 1)
