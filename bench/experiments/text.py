"""The paper's Figure 7: which of LoFT's parts language models need.

A GPT-2 of bytes, pretrained on the standard library's source, is adapted to the English of
Python's language reference; with a network, any model and text of the Hugging Face hub instead.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import finetune
import torch
from comparison import state_bytes
from corpus import Corpus, english_topics
from tqdm import tqdm

from bench.experiments.methods import (
    FULL,
    LOFT,
    LORA,
    METHODS,
    SIMPLE,
    SIMULTANEOUS,
    UNCALIBRATED,
    make_optimizer,
)
from bench.experiments.record import Document, Request, document
from bench.experiments.study import Run, study

COMPARED = (FULL, LORA, LOFT, SIMPLE, SIMULTANEOUS, UNCALIBRATED)
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "shape": {"width": 32, "layers": 1, "heads": 2},
        "block_size": 32,
        "batch_size": 4,
        "held_out_blocks": 16,
        "pretrain_steps": 10,
        "steps": 6,
        "rank": 2,
        "grid": [2e-3, 8e-3],
        "seeds": 2,
        "extensions": 0,
    },
    "small": {
        "shape": {"width": 64, "layers": 2, "heads": 4},
        "block_size": 64,
        "batch_size": 8,
        "held_out_blocks": 128,
        "pretrain_steps": 400,
        "steps": 100,
        "rank": 4,
        "grid": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "seeds": 3,
        "extensions": 3,
    },
    "full": {
        "shape": {"width": 256, "layers": 4, "heads": 8},
        "block_size": 256,
        "batch_size": 16,
        "held_out_blocks": 128,
        "pretrain_steps": 1000,
        "steps": 200,
        "rank": 8,
        "grid": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "seeds": 3,
        "extensions": 2,
    },
}
# With a model of the hub; its block, batch and rates are those of a pretrained model.
HUB = {
    "shape": None,
    "block_size": 256,
    "batch_size": 8,
    "held_out_blocks": 128,
    "steps": 200,
    "rank": 8,
    "grid": [5e-5, 1e-4, 2e-4, 4e-4],
    "seeds": 3,
    "extensions": 3,
}


def start(settings: Mapping[str, Any], request: Request, folder: str) -> Path:
    """Make or load the model to adapt and its text, and leave them in a file for all runs."""
    named = {k: v for k, v in settings.items() if k != "shape"}
    args = argparse.Namespace(**named, device=request.device, seed=0)
    targets: Sequence[str] | str = finetune.BYTE_TARGETS
    if request.model:
        args.model, args.dataset = request.model, request.dataset
        known = ("wikitext", "Salesforce/wikitext")
        args.dataset_config = "wikitext-2-raw-v1" if args.dataset in known else None
        try:
            model, corpus, targets = finetune.load(args)
        except (OSError, ValueError) as error:  # a name that is not there, a text too short
            raise SystemExit(f"text: {error}") from error
    else:
        model = finetune.pretrained(args, **settings["shape"])
        corpus = english_topics(args.block_size, args.held_out_blocks)
    if len(corpus.held_out) < 2:
        raise SystemExit("text: two blocks must be held out at least, one to choose the rate by")
    path = Path(folder) / "start.pt"
    # What is held out serves two ends: every other block chooses the rate, the rest is reported.
    torch.save(
        {
            "model": model.cpu(),
            "train": corpus.train.cpu(),
            "validation": corpus.held_out[0::2].cpu(),
            "test": corpus.held_out[1::2].cpu(),
            "targets": targets,
        },
        path,
    )
    return path


@functools.lru_cache(maxsize=1)
def loaded(path: Path, device: str) -> dict[str, Any]:
    """Read the file of :func:`start` once per process."""
    found = torch.load(path, map_location=device, weights_only=False)
    return found | {"corpus": Corpus(found["train"], found["validation"])}


def prepare(
    begun: Mapping[str, Any], settings: Mapping[str, Any], run: Run
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Copy the base model and make it ready for a method."""
    # PEFT asks transformers for an attribute by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    kind = finetune.FULL if METHODS[run.method].adapter is None else finetune.LORA
    model, _ = finetune.prepare(
        kind, begun["model"], run.lr, settings["rank"], begun["targets"], run.seed
    )
    return model, make_optimizer(run.method, model, run.lr, settings["backend"])


def train(settings: Mapping[str, Any], path: Path, run: Run) -> dict[str, Any]:
    """Adapt the model once; the seed is that of the adapter and of the order of the batches."""
    begun = loaded(path, settings["device"])
    model, optimizer = prepare(begun, settings, run)
    steps, size = settings["steps"], settings["batch_size"]
    with tqdm(disable=True) as bar:
        curve, _ = finetune.train(
            model,
            optimizer,
            begun["corpus"],
            steps,
            size,
            run.seed,
            bar,
            evaluations=settings.get("evaluations", finetune.EVALUATIONS),
        )
    return {
        "steps": [step for step, _ in curve],
        "curve": [loss for _, loss in curve],
        "validation": curve[-1][1],
        "test": finetune.held_out_loss(model, begun["test"], size),
        "state_bytes": state_bytes(optimizer),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def compare(
    methods: Sequence[str], request: Request, settings: Mapping[str, Any], title: str
) -> dict[str, Any]:
    """Compare methods on one base model."""
    asked = dict(settings) | {"device": request.device, "backend": request.backend}
    with tempfile.TemporaryDirectory() as folder:
        path = start(settings, request, folder)
        return study(partial(train, asked, path), methods, settings, request.workers, title)


def measure(request: Request) -> Document:
    """Compare LoFT, its ablations, LoRA and the full weights."""
    settings, name = SIZES[request.size], "text"
    if request.model:
        settings = HUB | {"model": request.model, "dataset": request.dataset}
        name += f"-{Path(request.model).name}"
    found = compare(COMPARED, request, settings, name)
    return document(name, request, settings, studies={"text": found})
