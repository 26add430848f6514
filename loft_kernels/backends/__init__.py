"""Backends: the implementations of one LoFT step, and which of them run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from loft_kernels.plan import Pair

NAMES = ("auto", "reference", "cpu", "triton")


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What can run here.

    Attributes:
        available: backend name to a sentence about it.
        unavailable: backend name to the reason why it cannot run here.
        chosen: what ``backend="auto"`` takes for LoRA pairs on the GPU if there is one, else
            for pairs on the CPU.
        reason: why.
    """

    available: dict[str, str]
    unavailable: dict[str, str]
    chosen: str
    reason: str

    def __str__(self) -> str:
        """Lay the report out in lines."""
        lines = [f"loft_kernels: backend 'auto' is {self.chosen!r} ({self.reason})"]
        lines += [f"  {name}: {about}" for name, about in self.available.items()]
        lines += [f"  {name}: not here, {why}" for name, why in self.unavailable.items()]
        return "\n".join(lines)


@cache
def triton_missing(device: int = 0) -> str | None:
    """Say why the Triton backend cannot run on a GPU, or None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    if find_spec("triton") is None:
        return "the triton package is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability} is older than 8.0"
    triton = import_module("triton")
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    # Older compilers abort the process on fp64 products for Blackwell.
    needed = (3, 9) if capability >= (10, 0) else (3, 6)
    if found < needed:
        return (
            f"compute capability {capability} needs Triton {needed[0]}.{needed[1]}, found "
            f"{triton.__version__}"
        )
    return None


@cache
def cpu_missing() -> str | None:
    """Say why the C++ backend cannot run here, or None if it can."""
    # Imported late: it needs the modules that ask for this one.
    from loft_kernels.backends import cpu

    return cpu.missing()


def report() -> BackendReport:
    """Tell which backends exist here, which one ``backend="auto"`` takes, and why."""
    available = {"reference": "plain PyTorch on CPU and CUDA, any float dtype; exact, not fast"}
    unavailable = {}
    chosen, why = "reference", []
    for name, missing in (("cpu", cpu_missing()), ("triton", triton_missing())):
        if missing is None:
            chosen = name
            available[name] = _about(name)
        else:
            unavailable[name] = missing
            why.append(missing)
    here = {"triton": "a CUDA GPU and Triton are here", "cpu": "no GPU that Triton serves"}
    return BackendReport(available, unavailable, chosen, here.get(chosen) or "; ".join(why))


def _about(name: str) -> str:
    """Describe a backend that runs here."""
    if name == "triton":
        return "fused kernels for fp32, bf16 and fp16 factors on CUDA"
    from loft_kernels.backends import cpu

    return cpu.about()


def check_name(backend: str) -> None:
    """Refuse a backend that does not exist, or that was asked for and cannot run here.

    Raises:
        ValueError: unknown name.
        RuntimeError: ``backend="cpu"`` or ``"triton"`` without what it needs.
    """
    if backend not in NAMES:
        raise ValueError(f"Invalid backend: {backend!r}: known are {', '.join(NAMES)}")
    needs = {"cpu": cpu_missing, "triton": triton_missing}.get(backend)
    missing = needs() if needs else None
    if missing is not None:
        raise RuntimeError(f"backend={backend!r} cannot run here: {missing}; use backend='auto'")


def choose(backend: str, pairs: Sequence[Pair]) -> tuple[str, str]:
    """Choose the backend of a step.

    Args:
        backend: what the user asked for.
        pairs: the pairs of this step.

    Returns:
        The backend's name and, where what was asked for (on CUDA also ``auto``) had to fall back,
        the reason.
    """
    if backend == "reference" or not pairs:
        return "reference", ""
    devices = {p.b.param.device for p in pairs}
    kinds = {device.type for device in devices}
    if backend == "cpu" or kinds == {"cpu"}:
        return _choose_on_cpu(backend, pairs)
    if "cuda" not in kinds:
        return "reference", ""
    if len(kinds) > 1:
        return "reference", f"some pairs are on a GPU, others not: {_listed(devices)}"
    for device in devices:
        missing = triton_missing(device.index or 0)
        if missing is not None:
            return "reference", missing
    from loft_kernels.backends.triton.step import unsupported

    for pair in pairs:
        reason = unsupported(pair)
        if reason is not None:
            return "reference", f"{pair.name}: {reason}"
    return "triton", ""


def _listed(devices: set[torch.device]) -> str:
    """List devices in order."""
    return ", ".join(sorted(map(str, devices)))


def _choose_on_cpu(backend: str, pairs: Sequence[Pair]) -> tuple[str, str]:
    """Choose for pairs on the CPU, where the reference path serves what the kernels leave out."""
    if backend == "triton" or cpu_missing() is not None:
        return "reference", ""
    from loft_kernels.backends.cpu import unsupported

    for pair in pairs:
        reason = unsupported(pair)
        if reason is not None:
            return "reference", f"{pair.name}: {reason}" if backend == "cpu" else ""
    return "cpu", ""
