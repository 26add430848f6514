"""Backends: the implementations of one LoFT step, and which of them run here."""

from __future__ import annotations

from dataclasses import dataclass

# Every name that the interface knows; what is not available yet says so.
NAMES = ("auto", "reference")


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What can run here.

    Attributes:
        available: backend name to a sentence about it.
        chosen: what ``backend="auto"`` takes.
        reason: why.
    """

    available: dict[str, str]
    chosen: str
    reason: str

    def __str__(self) -> str:
        """Lay the report out in lines."""
        lines = [f"loft_kernels: backend 'auto' is {self.chosen!r} ({self.reason})"]
        lines += [f"  {name}: {about}" for name, about in self.available.items()]
        return "\n".join(lines)


def report() -> BackendReport:
    """Tell which backends exist here, which one ``backend="auto"`` takes, and why."""
    about = "plain PyTorch on CPU and CUDA, any float dtype; the truth, not the fast path"
    return BackendReport({"reference": about}, "reference", "the only backend of this version")


def resolve(backend: str) -> str:
    """Return the backend that a ``backend=`` argument means.

    Raises:
        ValueError: unknown name.
    """
    if backend not in NAMES:
        raise ValueError(f"Invalid backend: {backend!r}: known are {', '.join(NAMES)}")
    return report().chosen if backend == "auto" else backend
