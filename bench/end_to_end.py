"""Measure training steps of LLaMA-7B with PEFT adapters: the pass, the optimizer, and its share.

    python -m bench end-to-end --out bench/results/x.jsonl

The model is drawn at random, its base in bf16 and its adapters in fp32 under bf16 autocast, as a
Trainer with bf16=True runs it. Gradients are clipped: by the optimizer's own projected norm, or by
torch's function before AdamW. B starts away from zero, where the naive loop would divide by zero.
Every optimizer passes its parity check on the model's shapes first.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loft_kernels as lk
from bench.contenders import CONTENDERS, parity
from bench.naive import NaiveLoFT, NaivePair
from bench.record import append, command, environment, even, failure, progress
from bench.run import clear
from bench.timing import quantiles

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LR, MAX_NORM = 1e-5, 1.0


def build(args: argparse.Namespace) -> nn.Module:
    """Draw the model on its device and wrap it with adapters."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,  # 11008 of 4096
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 128),
        num_key_value_heads=max(1, args.hidden // 128),
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(args.device):
            base = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    adapters = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS)
    model = peft.get_peft_model(base, adapters)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=1e-2)
    return model.train()


def pairs_of(model: nn.Module) -> list[NaivePair]:
    """List the adapters of a PEFT model."""
    return [
        NaivePair(
            module.lora_B["default"].weight,
            module.lora_A["default"].weight,
            module.scaling["default"],
        )
        for module in model.modules()
        if "default" in getattr(module, "lora_A", {})
    ]


def adamw(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    """Build LoRA's usual optimizer and what a loop calls after the backward pass."""
    factors = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(factors, lr=LR, weight_decay=0.0, fused=True)

    def clipped_step() -> None:
        torch.nn.utils.clip_grad_norm_(factors, MAX_NORM)
        opt.step()

    return opt, clipped_step


def loft(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    """Build LoFT as a user would."""
    opt = lk.LoFTAdamW(model, lr=LR, max_grad_norm=MAX_NORM)
    return opt, opt.step


def naive(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    """Build the loop over adapters."""
    opt = NaiveLoFT(pairs_of(model), lr=LR, max_grad_norm=MAX_NORM)
    return opt, opt.step


OPTIMIZERS = {"adamw": adamw, "loft": loft, "naive": naive}


class Marks:
    """Points in time of one step: events on a GPU, the host's clock on a CPU."""

    def __init__(self, cuda: bool) -> None:
        """Start with no point."""
        self._cuda, self._points = cuda, []

    def set(self) -> None:
        """Mark this point."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def between(self) -> list[float]:
        """Return the milliseconds between neighbours, after synchronising."""
        pairs = zip(self._points, self._points[1:], strict=False)
        if self._cuda:
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    step: Callable[[], Any],
    tokens: Tensor,
    *,
    steps: int,
    warmup: int,
) -> tuple[dict[str, list[float]], float]:
    """Take whole training steps; returns their times in milliseconds and the last loss."""
    device = tokens.device.type
    cuda = device == "cuda"
    times: dict[str, list[float]] = {
        name: [] for name in ("forward_backward_ms", "optimizer_ms", "step_ms", "wall_ms")
    }
    loss = tokens.new_zeros(())
    for k in range(warmup + steps):
        if cuda:
            torch.cuda.synchronize()
            if k == warmup:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        marks = Marks(cuda)
        marks.set()
        opt.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        marks.set()
        step()
        marks.set()
        if cuda:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - start) * 1e3
        if k >= warmup:
            forward_backward, optimizer = marks.between()
            values = forward_backward, optimizer, forward_backward + optimizer, wall
            for samples, value in zip(times.values(), values, strict=True):
                samples.append(value)
    return times, float(loss.detach())


def measure(
    name: str, model: nn.Module, tokens: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Check and time one optimizer."""
    cuda = args.device == "cuda"
    gated = {"loft": "triton" if cuda else "cpu"}.get(name, name)
    pairs = pairs_of(model)
    shapes = [(pair.b.shape[0], pair.a.shape[1]) for pair in pairs]
    contender = CONTENDERS[gated]
    error = parity(contender, sorted(set(shapes)), args.rank, args.device)
    row = {"backend": gated, "pairs": len(shapes), "parity_error": error}
    if not error <= contender.limit:
        return {**row, "error": f"parity {error:.1e} > {contender.limit}: not timed"}
    clear()
    opt, step = OPTIMIZERS[name](model)
    slow = name == "naive"
    steps, warmup = (args.baseline_steps, 2) if slow else (args.steps, args.warmup)
    times, loss = train(model, opt, step, tokens, steps=steps, warmup=warmup)
    row |= {"steps": steps, "loss": loss}
    if loss != loss:
        return {**row, "error": "the loss is not a number: not timed"}
    row |= {key: quantiles(samples) for key, samples in times.items()}
    row["optimizer_share"] = row["optimizer_ms"]["mean"] / row["step_ms"]["mean"]
    states = [t for s in opt.state.values() for t in s.values()]
    row["state_bytes"] = sum(t.numel() * t.element_size() for t in states)
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def compare(args: argparse.Namespace) -> bool:
    """Measure every optimizer from the same start, on one model; tells whether one failed."""
    failed = False
    model = build(args)
    factors = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in factors]
    rng = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(args.vocab, (args.batch, args.length), generator=rng).to(args.device)
    about = {
        "bench": "end-to-end",
        "command": args.command,
        **{k: getattr(args, k) for k in ("layers", "hidden", "rank", "batch", "length", "seed")},
        "device": args.device,
        "adapter_dtype": str(factors[0].dtype).removeprefix("torch."),
    }
    for name in progress(args.optimizers.split(","), "end-to-end"):
        with torch.no_grad():
            for p, value in zip(factors, start, strict=True):
                p.copy_(value)
                p.grad = None
        try:
            row = measure(name, model, tokens, args)
        except Exception as error:
            row = failure(error)
        failed |= "error" in row
        append([{**about, "optimizer": name, **row, **environment()}], args.out)
        clear()
    return failed


def main(argv: list[str] | None = None) -> None:
    """Run the comparison and write one JSON line per optimizer."""
    parser = argparse.ArgumentParser(
        prog="python -m bench end-to-end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="comma-separated")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=even, default=10, help="an even number")
    parser.add_argument("--baseline-steps", type=even, default=2, help="of the naive loop")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    args.command = command("end-to-end", argv)
    unknown = set(args.optimizers.split(",")) - OPTIMIZERS.keys()
    if unknown:
        parser.error(f"--optimizers: {', '.join(sorted(unknown))} unknown")
    # A step that hands its work to another path must not be praised for it.
    warnings.filterwarnings("error", message="the LoFT step runs on the reference path")
    sys.exit(int(compare(args)))
