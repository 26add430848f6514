"""Adapt one language model to new text by three methods, and compare them.

Full fine-tuning with AdamW, LoRA with AdamW and LoRA with LoFTAdamW start from the same weights,
see the same batches and try the same learning rates; the best run of each is shown.

Without arguments everything is made on the spot, with no download: a small GPT-2 is pretrained on
Python source code, then adapted to the English of the Python language reference.
With a network, a model and a data set of the Hugging Face hub:

    python examples/finetune.py --model gpt2 --dataset wikitext
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from comparison import Run, plot, record, state_bytes, table
from corpus import Corpus, batches, english_topics, python_source, text_dataset
from torch.nn import functional
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import loft_kernels

METHODS = FULL, LORA, LOFT = "full, AdamW", "LoRA, AdamW", "LoRA, LoFTAdamW"
BYTE_TARGETS = ["c_attn", "c_proj", "c_fc"]
PRETRAIN_LR = 2e-3
PRETRAIN_BYTES = 4_000_000
EVALUATIONS = 8  # points on a loss curve, after the one at step 0
WARMUP = 0.1  # part of the steps

# What the command line leaves open, without arguments, with --model and with --quick.
DEMO = {
    "steps": 100,
    "pretrain_steps": 600,
    "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
    "held_out_blocks": 64,
}
HUB = DEMO | {"steps": 200, "pretrain_steps": 0, "learning_rates": [5e-5, 2e-4, 8e-4]}
QUICK = {
    "steps": 4,
    "pretrain_steps": 8,
    "learning_rates": [2e-3, 4e-3, 8e-3],
    "held_out_blocks": 8,
}


def byte_model(
    block: int, seed: int, width: int = 128, layers: int = 3, heads: int = 4
) -> torch.nn.Module:
    """Make a small GPT-2 that reads bytes, with random weights."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=block,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        # GPT-2's own activation, in one kernel instead of eight.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=None,
        eos_token_id=None,
        # A model this small, trained this briefly, only underfits.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def prepare(
    method: str, base: torch.nn.Module, lr: float, rank: int, targets: list[str] | str, seed: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Copy the base model and make it ready for one method; return it with its optimizer.

    LoRA's alpha is its rank, so the scale is 1. The seed fixes the random factor A and the dropout.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if method == FULL:
        return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    model = peft.get_peft_model(model, config)
    if method == LORA:
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    return model, loft_kernels.LoFTAdamW(model, lr=lr)


def next_token_loss(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Return the mean loss per token, in nats."""
    logits = model(input_ids=blocks).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor, batch_size: int) -> float:
    """Return the mean loss over all blocks, without dropout."""
    model.eval()
    parts = [next_token_loss(model, part) * len(part) for part in blocks.split(batch_size)]
    model.train()
    return torch.stack(parts).sum().item() / len(blocks)


def warm_up_and_decay(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Raise the learning rate over the first tenth of the steps, then lower it to zero."""
    warmup = max(1, round(WARMUP * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    steps: int,
    batch_size: int,
    seed: int,
    bar: tqdm,
    evaluations: int = EVALUATIONS,
) -> tuple[list[tuple[int, float]], float]:
    """Train for some steps, and look at the held-out loss on the way.

    Args:
        model: trained in place.
        optimizer: holds the model's trainable parameters.
        corpus: blocks on the model's device.
        steps: number of optimizer steps.
        batch_size: blocks per step.
        seed: fixes the order of the batches.
        bar: moves by one per step.
        evaluations: points of the curve, after the one at step 0.

    Returns:
        The points (step, held-out loss), and the median time of `optimizer.step()` in ms.
    """
    schedule = warm_up_and_decay(optimizer, steps)
    wait = torch.cuda.synchronize if corpus.train.is_cuda else lambda: None
    marks = {round(steps * k / evaluations) for k in range(1, evaluations + 1)}
    curve = [(0, held_out_loss(model, corpus.held_out, batch_size))]
    times = []
    for step, batch in enumerate(batches(corpus.train, batch_size, steps, seed), start=1):
        next_token_loss(model, batch).backward()
        wait()
        start = time.perf_counter()
        optimizer.step()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
        optimizer.zero_grad()
        schedule.step()
        bar.update()
        if step in marks:
            curve.append((step, held_out_loss(model, corpus.held_out, batch_size)))
            bar.set_postfix(held_out_loss=f"{curve[-1][1]:.3f}")
    return curve, statistics.median(times)


def compare(
    base: torch.nn.Module, corpus: Corpus, targets: list[str] | str, args: argparse.Namespace
) -> list[Run]:
    """Run every method at every learning rate, each from the same base model."""
    runs = []
    with tqdm(total=len(METHODS) * len(args.learning_rates) * args.steps, unit="step") as bar:
        for method in METHODS:
            for lr in args.learning_rates:
                bar.set_description(f"{method}, lr {lr:g}")
                model, optimizer = prepare(method, base, lr, args.rank, targets, args.seed)
                curve, ms = train(
                    model, optimizer, corpus, args.steps, args.batch_size, args.seed, bar
                )
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                runs.append(Run(method, lr, curve, ms, state_bytes(optimizer), trained))
    return runs


def pretrained(args: argparse.Namespace, **shape: int) -> torch.nn.Module:
    """Make a model of bytes and pretrain it on Python source; the shape is :func:`byte_model`'s."""
    model = byte_model(args.block_size, args.seed, **shape).to(args.device)
    source = python_source(args.block_size, PRETRAIN_BYTES, args.held_out_blocks).to(args.device)
    print(f"Pretraining on Python source: {source.description}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.0)
    steps, batch_size = args.pretrain_steps, args.batch_size
    with tqdm(total=steps, desc="pretraining", unit="step") as bar:
        curve, _ = train(model, optimizer, source, steps, batch_size, args.seed, bar)
    print(f"Held-out loss on Python source: {curve[0][1]:.3f} -> {curve[-1][1]:.3f}")
    return model


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, Corpus, list[str] | str]:
    """Return the model to start from, the text to adapt it to and the names of its LoRA targets."""
    model: torch.nn.Module
    if args.model:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        longest = getattr(model.config, "max_position_embeddings", args.block_size)
        if args.block_size > longest:
            raise ValueError(
                f"--block-size {args.block_size}: {args.model} reads at most {longest}"
            )
        corpus = text_dataset(
            tokenizer,
            args.dataset,
            args.dataset_config,
            args.block_size,
            limit=args.steps * args.batch_size * args.block_size,
            held_out_blocks=args.held_out_blocks,
        )
        return model.to(args.device), corpus.to(args.device), "all-linear"
    model = pretrained(args)
    corpus = english_topics(args.block_size, args.held_out_blocks).to(args.device)
    return model, corpus, BYTE_TARGETS


def parse_arguments() -> argparse.Namespace:
    """Read the command line, fill in the defaults and refuse what cannot work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="name on the Hugging Face hub, or folder (default: made on the spot)")
    add("--dataset", help="name on the hub, text file, or folder; goes with --model")
    add("--dataset-config", help="configuration of the data set (wikitext: wikitext-2-raw-v1)")
    add("--steps", type=positive, help="steps of each fine-tuning run")
    add("--pretrain-steps", type=positive, help="steps of pretraining, without --model")
    add("--learning-rates", type=float, nargs="+", metavar="LR", help="tried by every method")
    add("--rank", type=positive, default=8, help="rank and alpha of LoRA (default: 8)")
    add("--batch-size", type=positive, default=8, help="blocks per step (default: 8)")
    add("--block-size", type=positive, default=128, help="tokens per block (default: 128)")
    add("--held-out-blocks", type=positive, help="blocks to measure the loss on, at most")
    add("--seed", type=int, default=0, help="of weights, batches and adapters (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, default=Path("results/demo"), help="folder for the results")
    add("--quick", action="store_true", help="a few steps: shows that it runs, not how it learns")
    args = parser.parse_args()

    if bool(args.model) != bool(args.dataset):
        parser.error("--model and --dataset go together: give both, or none")
    if args.dataset_config and not args.dataset:
        parser.error("--dataset-config goes with --dataset")
    if args.pretrain_steps and args.model:
        parser.error("--pretrain-steps: a model given with --model is pretrained already")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if not all(0 < lr < math.inf for lr in args.learning_rates or []):
        parser.error("--learning-rates: wants numbers above zero")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dataset in ("wikitext", "Salesforce/wikitext") and not args.dataset_config:
        args.dataset_config = "wikitext-2-raw-v1"
    defaults = QUICK if args.quick else HUB if args.model else DEMO
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.learning_rates = sorted(set(args.learning_rates))
    return args


def positive(text: str) -> int:
    """Read a whole number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number above zero, not {text}")
    return number


def main() -> None:
    """Run the comparison, print the table and write the numbers and the plot."""
    args = parse_arguments()
    # PEFT asks transformers for an attribute by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        base, corpus, targets = load(args)
    except (OSError, ValueError) as error:  # a name that is not there, a text that does not fit
        raise SystemExit(f"finetune.py: error: {error}") from error
    print(f"Adapting to {args.dataset or 'English'}: {corpus.description}")
    runs = compare(base, corpus, targets, args)
    print(f"\n{table(runs)}\n")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "results.json").write_text(json.dumps(record(runs, settings), indent=1) + "\n")
    plot(runs, args.out / "loss.png")
    print(f"Every number: {args.out / 'results.json'}, loss curves: {args.out / 'loss.png'}")


if __name__ == "__main__":
    main()
