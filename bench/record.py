"""What a number was measured on, and where rows of numbers go."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import traceback
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@cache
def _git(*words: str) -> str | None:
    """Ask git about the working tree; None where there is no history or no git."""
    try:
        asked = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


@cache
def _driver() -> str | None:
    """Return the version of the GPU's driver, as its own tool prints it."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    lines = asked.stdout.split()
    return lines[0] if asked.returncode == 0 and lines else None


def _version(package: str) -> str | None:
    """Return the version of an installed package, imported or not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Describe what a number was measured on.

    A copy of the tree, without its history or with an older one, is told by ``LOFT_COMMIT`` which
    commit it is; nothing then says whether it was changed, and ``dirty`` is None.
    """
    told = os.environ.get("LOFT_COMMIT")
    # Rows are appended to files of the tree, which changes nothing that is measured.
    code = "--", ":/", ":(top,exclude)bench/results", ":(top,exclude)docs"
    changes = None if told else _git("status", "--porcelain", "--untracked-files=no", *code)
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": told or _git("rev-parse", "--short", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if cuda else None,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def largest(values: Iterable[float]) -> float:
    """Return the largest of some errors; one that is no number is infinite, and none is 0."""
    return max((value if value == value else math.inf for value in values), default=0.0)


def command(name: str, words: Sequence[str] | None) -> str:
    """Write down the command that a row comes from, less where it was written to."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    kept, left = ["python", "-m", "bench", name], iter(words or ())
    if policy:
        kept.insert(0, f"OMP_WAIT_POLICY={policy}")
    for word in left:
        if word == "--out":
            next(left, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(kept)


def even(text: str) -> int:
    """Read a number of steps that counts both phases alike."""
    steps = int(text)
    if steps < 2 or steps % 2:
        raise ValueError(f"{steps} is not an even number of steps")
    return steps


def failure(error: Exception) -> dict[str, str]:
    """Return the field of a row that could not be measured; the traceback goes to stderr.

    What was measured before and what comes after is worth more than a run that stops.
    """
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return {"skipped": f"out of memory: {first}"}
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {first}"}


def progress(cases: Sequence[Any], about: str) -> Iterable[Any]:
    """Show how far a long run is, on a terminal and where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, desc=about, disable=None)


def append(rows: Iterable[dict[str, Any]], out: Path | None, *, show: bool = True) -> None:
    """Print rows as JSON lines, unless told not to, and append them to a file, if one is given."""
    lines = [json.dumps(row) for row in rows]
    for line in lines if show else ():
        print(line, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(line + "\n" for line in lines)
