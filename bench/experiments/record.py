"""What an experiment is asked for, and the JSON document that it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "experiments"
FIGURES = ROOT / "docs" / "figures"
DIGITS = 6  # significant ones of every number in a document

Document = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the command line asks of an experiment.

    Attributes:
        size: "small" for two CPU cores, "full" for one GPU, "tiny" for tests.
        device: "cpu" or "cuda".
        backend: of LoFTAdamW.
        workers: processes that train side by side; 1 trains in this one.
        command: what to type to measure the same again.
        model: a model of the Hugging Face hub, for the text experiment.
        dataset: goes with it.
        data: file with scikit-learn's digits, written where scikit-learn is, read elsewhere.
        backends: that must agree, for same-curves.
    """

    size: str = "small"
    device: str = "cpu"
    backend: str = "auto"
    workers: int = 1
    command: str = ""
    model: str | None = None
    dataset: str | None = None
    data: Path | None = None
    backends: tuple[str, ...] = ("reference", "cpu")


def document(name: str, request: Request, settings: Mapping[str, Any], **found: Any) -> Document:
    """Put together what was measured and what it takes to measure it again."""
    # Imported late: reading documents takes no torch.
    from bench.record import environment

    return {
        "name": name,
        "size": request.size,
        "device": request.device,
        "command": request.command,
        "settings": {**settings, "backend": request.backend},
        "environment": environment(),
        **found,
    }


def rounded(value: Any) -> Any:
    """Round every float to six digits; JSON knows no infinity, so a diverged loss is null."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write(made: Document, folder: Path = RESULTS) -> Path:
    """Write a document to ``<name>-<size>-<device>.json``, one row of numbers a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['name']}-{made['size']}-{made['device']}.json"
    path.write_text(_laid_out(rounded(made), 0) + "\n")
    return path


def _laid_out(value: Any, depth: int) -> str:
    """Give objects that hold others, and lists of objects, a line per entry."""
    inside, outside = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and any(_holds_rows(item) for item in value.values()):
        items = [f"{json.dumps(k)}: {_laid_out(item, depth + 1)}" for k, item in value.items()]
        return "{" + inside + f",{inside}".join(items) + outside + "}"
    if _holds_rows(value):
        rows = [json.dumps(item) for item in value] if isinstance(value, list) else []
        if rows:
            return "[" + inside + f",{inside}".join(rows) + outside + "]"
    return json.dumps(value)


def _holds_rows(value: Any) -> bool:
    """Tell objects and non-empty lists of objects from numbers, words and curves."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    )


def read(path: Path) -> Document:
    """Read a document."""
    return json.loads(path.read_text())


def documents(folder: Path = RESULTS) -> Iterator[Document]:
    """Read every document of a folder, in the order of the names."""
    for path in sorted(folder.glob("*.json")):
        yield read(path)


def preferred(folder: Path = RESULTS) -> dict[str, Document]:
    """Pick one document per name: the full size before the small one, the GPU before the CPU."""
    best: dict[str, Document] = {}
    for found in documents(folder):
        best[found["name"]] = max(best.get(found["name"], found), found, key=_weight)
    return best


def _weight(found: Document) -> tuple[int, bool]:
    return ("tiny", "small", "full").index(found["size"]), found["device"] == "cuda"


def kind(found: Document) -> str:
    """Name the experiment that made a document: `text` also for another model's `text-gpt2`."""
    return "text" if found["name"].startswith("text-") else found["name"]
