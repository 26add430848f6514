"""Timing of optimizer steps: device time, wall time, host time, launches, peak memory."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Step = Callable[[], Any]


def quantiles(samples: list[float]) -> dict[str, float]:
    """Summarise samples by p20, p50, p80, between neighbours where need be, and mean."""
    ordered = sorted(samples)
    found = {}
    for q in (20, 50, 80):
        below, part = divmod(q * (len(ordered) - 1), 100)
        above = min(below + 1, len(ordered) - 1)
        found[f"p{q}"] = ordered[below] + part / 100 * (ordered[above] - ordered[below])
    return {**found, "mean": statistics.fmean(samples)}


@dataclass(slots=True)
class Samples:
    """Milliseconds of every timed step.

    Attributes:
        wall: from an idle device until the device is idle again, host work included.
        host: until the call returned.
        device: between two events on the device, waits for the host included.
    """

    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the fields of a row: wall time under "ms", device time under "device_ms"."""
        row: dict[str, Any] = {"ms": quantiles(self.wall)}
        if self.device:
            row["device_ms"] = quantiles(self.device)
            row["host_ms"] = statistics.median(self.host)
        return row


def timed(step: Step, fresh: Step, *, steps: int, warmup: int, cuda: bool) -> Samples:
    """Time whole steps.

    Args:
        step: what is timed.
        fresh: makes new gradients before each step; not timed.
        steps: number of timed steps; an even number, so that both phases count alike.
        warmup: steps before that.
        cuda: synchronise around each step, and turn the L2 cache over before it.
    """
    samples = Samples()
    flush = _l2_flush() if cuda else (lambda: None)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    for k in range(warmup + steps):
        fresh()
        flush()
        if begin is not None:
            torch.cuda.synchronize()
            begin.record()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        if end is not None:
            end.record()
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
        if k < warmup:
            continue
        samples.wall.append(wall * 1e3)
        samples.host.append(host * 1e3)
        if begin is not None and end is not None:
            samples.device.append(begin.elapsed_time(end))
    return samples


def _l2_flush() -> Step:
    """Return a function that writes four times the L2 cache."""
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    buffer = torch.empty(max(size, 1 << 20), dtype=torch.int8, device="cuda")
    return buffer.zero_


def peak_extra_memory(step: Step, fresh: Step) -> int:
    """Return the bytes that a step of either phase needs beyond what was allocated before it."""
    worst = 0
    for _ in range(2):
        fresh()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        worst = max(worst, torch.cuda.max_memory_allocated() - before)
    return worst


def kernels(step: Step, fresh: Step, steps: int = 2) -> tuple[Counter[str], dict[str, float]]:
    """Return how often each kernel ran and its milliseconds, over some steps together.

    torch's own fills are kernels, too; copies and clearings by the driver are not.
    """
    from torch.profiler import ProfilerActivity, profile

    counts: Counter[str] = Counter()
    times: dict[str, float] = {}
    for _ in range(steps):
        fresh()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            step()
            torch.cuda.synchronize()
        for event in record.events() or []:
            # Events of the host's launch calls stand in the same record.
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device and not event.name.startswith(("Memcpy", "Memset")):
                counts[event.name] += 1
                duration = event.time_range.elapsed_us() / 1e3
                times[event.name] = times.get(event.name, 0.0) + duration
    return counts, times
