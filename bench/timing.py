"""Timing of optimizer steps: device time, wall time, launches, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], None]


def quantiles(samples: list[float]) -> dict[str, float]:
    """Summarise samples by p20, p50, p80 and mean."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    found = {f"p{q}": ordered[round(q / 100 * last)] for q in (20, 50, 80)}
    return {**found, "mean": statistics.fmean(samples)}


def step_times(step: Step, fresh: Step, *, steps: int, warmup: int, cuda: bool) -> dict[str, float]:
    """Time whole steps, host work included, in milliseconds.

    Args:
        step: what is timed.
        fresh: makes new gradients before each step; not timed. On a GPU it also turns the L2
            cache over, since the gradients of a model are larger than it.
        steps: number of timed steps; an even number, so that both phases count alike.
        warmup: steps before that.
        cuda: synchronise around each step.
    """
    samples = []
    for k in range(warmup + steps):
        fresh()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if k >= warmup:
            samples.append((time.perf_counter() - start) * 1e3)
    return quantiles(samples)


def host_time(step: Step, fresh: Step, *, steps: int) -> float:
    """Return the median time until `step` returns, in milliseconds, with an idle device."""
    samples = []
    for _ in range(steps):
        fresh()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(samples)


def peak_extra_memory(step: Step, fresh: Step) -> int:
    """Return the bytes that one step needs beyond what was allocated before it."""
    fresh()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(step: Step, fresh: Step) -> int:
    """Count the kernels that one step runs on the device, torch's own fills included."""
    from torch.profiler import ProfilerActivity, profile

    fresh()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    events = record.events() or []
    # Events of the host's launch calls stand in the same record.
    on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(1 for e in on_device if not e.name.startswith(("Memcpy", "Memset")))
