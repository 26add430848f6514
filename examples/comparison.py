"""What finetune.py found out: the numbers of every run, as a table, a plot and a record."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import loft_kernels


@dataclass(frozen=True)
class Run:
    """What one method did at one learning rate."""

    method: str
    learning_rate: float
    curve: list[tuple[int, float]]  # (step, held-out loss)
    optimizer_ms: float  # median over the steps
    state_bytes: int
    trained_parameters: int

    @property
    def loss(self) -> float:
        """The held-out loss at the end; a diverged run counts as infinite."""
        final = self.curve[-1][1]
        return final if math.isfinite(final) else math.inf


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Add up the bytes of all tensors in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def best_runs(runs: Sequence[Run]) -> list[Run]:
    """Pick the run with the lowest held-out loss of each method."""
    return [
        min((run for run in runs if run.method == method), key=lambda run: run.loss)
        for method in dict.fromkeys(run.method for run in runs)
    ]


def table(runs: Sequence[Run]) -> str:
    """Lay out one line per method, and below it the loss at every learning rate."""
    rates = sorted({run.learning_rate for run in runs})
    losses = {(run.method, run.learning_rate): run.loss for run in runs}
    lines = [
        f"{'method':<18}{'best lr':>9}{'held-out loss':>15}{'optimizer ms/step':>19}"
        f"{'optimizer state':>17}{'trained':>12}"
    ]
    lines += [
        f"{run.method:<18}{run.learning_rate:>9g}{run.loss:>15.4f}{run.optimizer_ms:>19.2f}"
        f"{run.state_bytes / 2**20:>13.2f} MiB{run.trained_parameters:>12,}"
        for run in best_runs(runs)
    ]
    lines += ["", "held-out loss".ljust(18) + "".join(f"{f'lr {lr:g}':>12}" for lr in rates)]
    lines += [
        method.ljust(18) + "".join(f"{losses[method, lr]:>12.4f}" for lr in rates)
        for method in dict.fromkeys(run.method for run in runs)
    ]
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw held-out loss against step for the best run of each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for run, style in zip(best_runs(runs), ("o-", "s-", "^-"), strict=True):
        label = f"{run.method}, lr {run.learning_rate:g}"
        axes.plot(*zip(*run.curve, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def record(runs: Sequence[Run], settings: Mapping[str, object]) -> dict[str, object]:
    """Collect every number of every run, and what it takes to repeat them."""
    # Imported late: the rest of this module needs neither.
    import peft
    import transformers

    modules = (loft_kernels, torch, transformers, peft)
    on_gpu = settings["device"] == "cuda"
    return {
        "settings": dict(settings),
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
        # JSON knows no infinity: the loss of a diverged run is null.
        "runs": [
            asdict(run)
            | {"curve": [(step, y if math.isfinite(y) else None) for step, y in run.curve]}
            for run in runs
        ],
    }
