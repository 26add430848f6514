"""Measure the paper's experiments, one command each, and draw what was measured.

    python -m bench experiments factorisation --size small
    python -m bench experiments same-curves --backends reference,cpu
    python -m bench experiments plot

An experiment leaves a JSON document and a figure, and prints its table. Measuring needs neither
matplotlib nor, with --data, scikit-learn; `plot` needs nothing but the documents.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from bench.experiments import record, sections

EXPERIMENTS = "factorisation", "text", "dynamics", "cross-term", "memory", "calibration"
COMMANDS = (*EXPERIMENTS, "same-curves", "all", "plot")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line and refuse what cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m bench experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", choices=COMMANDS, help="what to measure; plot: draw every document again")
    add("--size", choices=("tiny", "small", "full"), default="small")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--backend", choices=("auto", "reference", "cpu", "triton"), default="auto")
    add("--backends", help="same-curves: comma-separated, the first is the measure of the others")
    add("--workers", type=int, help="processes (default: a core each; 12 at most on a GPU)")
    add("--out", type=Path, default=record.RESULTS, help="folder of the documents")
    add("--figures", type=Path, help="folder of the figures (default: docs/figures, else --out)")
    add("--model", help="text: a model of the Hugging Face hub, or a folder")
    add("--dataset", help="text: a data set of the hub, a text file or a folder; with --model")
    add("--data", type=Path, help="dynamics: the digits as .npz, made where scikit-learn is")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.dataset):
        parser.error("--model and --dataset go together: give both, or none")
    if args.model and args.name != "text":
        parser.error("--model and --dataset are for the experiment text")
    if args.workers is not None and args.workers < 1:
        parser.error("--workers: at least 1")
    if args.figures is None:
        args.figures = record.FIGURES if args.out == record.RESULTS else args.out
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = min(cores or 1, 12) if args.device == "cuda" else cores or 1
    names = (args.backends or f"reference,{_fast(args.device)}").split(",")
    if not 1 < len(names) == len(set(names)):
        parser.error("--backends: two or more different ones")
    args.backends = tuple(names)
    return args


def _fast(device: str) -> str:
    """Name the backend that is made for a device."""
    return "triton" if device == "cuda" else "cpu"


def request_of(args: argparse.Namespace, name: str) -> record.Request:
    """Turn the command line into a request, with what to type for it to happen again."""
    words = [f"python -m bench experiments {name} --size {args.size} --device {args.device}"]
    if args.backend != "auto":
        words.append(f"--backend {args.backend}")
    if name == "same-curves":
        words.append(f"--backends {','.join(args.backends)}")
    if args.model:
        words.append(f"--model {args.model} --dataset {args.dataset}")
    return record.Request(
        size=args.size,
        device=args.device,
        backend=args.backend,
        workers=args.workers,
        command=" ".join(words),
        model=args.model,
        dataset=args.dataset,
        data=args.data,
        backends=args.backends,
    )


def measured(args: argparse.Namespace, name: str) -> record.Document:
    """Measure one experiment, write its document and print its table."""
    experiment = import_module(f"bench.experiments.{name.replace('-', '_')}")
    found = experiment.measure(request_of(args, name))
    path = record.write(found, args.out)
    print(f"\n{sections.section(record.read(path))}\n\nwritten: {path}", flush=True)
    return found


def draw(args: argparse.Namespace) -> None:
    """Draw the figure of every document, where matplotlib is."""
    from bench.experiments import plots

    try:
        for path in plots.draw_all(args.out, args.figures):
            print(f"drawn: {path}")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no figures: matplotlib is not here; draw them elsewhere by the command plot")


def passed(found: record.Document) -> bool:
    """Tell whether every row that has a limit keeps it."""
    rows = [*found.get("rows", ()), *found.get("recovery", ())]
    return all(row.get("ok", True) for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Do what is asked; exit with 1 where a limit is exceeded."""
    args = parse(argv)
    names = (*EXPERIMENTS, "same-curves") if args.name == "all" else (args.name,)
    right = True
    if args.name != "plot":
        for name in names:
            right = passed(measured(args, name)) and right
    draw(args)
    if not right:
        sys.exit(1)
