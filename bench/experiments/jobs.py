"""Many independent runs, side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import TypeVar

import torch
from tqdm import tqdm

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


class Workers:
    """Processes that live as long as the `with` block; on a GPU they share the card.

    Args:
        count: how many; each has a CUDA context of its own. 1 stays in this process.
    """

    def __init__(self, count: int) -> None:
        """Start nothing yet."""
        self.pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Forked children cannot use CUDA.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(count, context, initializer=_one_thread)

    def __enter__(self) -> Workers:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; after a failure, what has not begun would only delay its message."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=kind is not None)

    def run(
        self, train: Callable[[Job], Outcome], jobs: Sequence[Job], title: str
    ) -> list[Outcome]:
        """Call a function for every job and return the outcomes in the order of the jobs.

        Args:
            train: picklable where there are processes; its outcome depends on the job alone.
            jobs: arguments.
            title: of the progress bar.
        """
        if self.pool is None:
            return [train(job) for job in tqdm(jobs, desc=title, unit="run")]
        places = {self.pool.submit(train, job): k for k, job in enumerate(jobs)}
        outcomes = {}
        for done in tqdm(as_completed(places), total=len(jobs), desc=title, unit="run"):
            outcomes[places[done]] = done.result()
        return [outcomes[k] for k in range(len(jobs))]


def run_all(
    train: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int, title: str
) -> list[Outcome]:
    """Do :meth:`Workers.run` once, by processes of its own."""
    with Workers(workers) as side_by_side:
        return side_by_side.run(train, jobs, title)


def _one_thread() -> None:
    """Keep processes off each other's cores."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
