"""Many independent runs, side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm import tqdm

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def run_all(
    train: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int, title: str
) -> list[Outcome]:
    """Call a function for every job and return the outcomes in the order of the jobs.

    Args:
        train: picklable where there are several workers; its outcome depends on the job alone.
        jobs: arguments.
        workers: processes; on a GPU each has a CUDA context of its own on the same card. 1 stays
            in this process.
        title: of the progress bar.
    """
    if workers <= 1:
        return [train(job) for job in _with_bar(jobs, len(jobs), title)]
    # Forked children cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        places = {pool.submit(train, job): k for k, job in enumerate(jobs)}
        outcomes: dict[int, Outcome] = {}
        try:
            for future in _with_bar(as_completed(places), len(jobs), title):
                outcomes[places[future]] = future.result()
        except BaseException:
            # One failure is enough; the others would only delay its message.
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[k] for k in range(len(jobs))]


def _with_bar(items: Iterable, total: int, title: str) -> Iterable:
    return tqdm(items, total=total, desc=title, unit="run")


def _one_thread() -> None:
    """Keep processes off each other's cores."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
