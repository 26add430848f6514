"""A parity check of every backend that runs here, for an installed package without its tests.

Each backend takes steps from a shared state and is compared, tensor by tensor, with the reference
path in fp64: both phases, the first steps and later ones, ranks and sizes that fill no tile, half
precision, missing and strided gradients, a factor that is zero. Limits are those of the tests.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loft_kernels import backends
from loft_kernels.optimizer import LoFTAdamW

STEPS = 5
# Largest error of a factor's displacement, and of a state tensor, relative to the tensor's norm.
# The Triton kernels multiply in fp16, centred (README, What is promised).
_MOVED = {"reference": 2e-5, "cpu": 2e-5, "triton": 1e-3}
# At step 2 P has rank two, and v of a few entries of the weight is below what fp16 resolves. In
# weights as small as these a single one shows, by 6e-3 at most in these cases.
_SECOND_STEP = 1e-2
# At step 3 it has rank three, which above rank 64 shows, too: 1.4e-3 in all.
_THIRD_STEP = 1e-3
_STATE = {torch.float64: 1e-11, torch.float32: 2e-6}


@dataclass(frozen=True, slots=True)
class Case:
    """One model of a few pairs and how it is trained."""

    name: str
    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype = torch.float32
    spoil: str = ""
    options: dict[str, Any] = field(default_factory=dict)


# Few ranks: on a GPU most of the time goes into compiling the kernels of each. Cases of one largest
# rank and dtype share them.
CASES = (
    Case("r1-r4", ((45, 70, 1), (33, 20, 4))),
    Case("r8", ((150, 97, 8), (96, 193, 8))),
    Case("r16", ((130, 64, 16),)),
    Case("r64", ((70, 129, 64),)),
    Case("r100", ((110, 129, 100),)),
    Case("one-row", ((1, 9, 1), (9, 1, 1))),
    Case("bf16", ((60, 50, 4),), torch.bfloat16),
    Case("fp16", ((60, 50, 4),), torch.float16),
    Case("fp64", ((60, 50, 4),), torch.float64),
    Case("clip-decay", ((60, 50, 4),), options={"max_grad_norm": 0.1, "weight_decay": 0.1}),
    Case("both-at-once", ((60, 50, 4),), options={"alternate": False, "betas": (0.5, 0.9)}),
    Case("eps-zero", ((60, 50, 4),), options={"eps": 0.0}),
    Case("strided-gradients", ((60, 50, 4),), spoil="strided"),
    Case("missing-gradient", ((60, 50, 4), (33, 20, 4)), spoil="missing"),
    Case("zero-factor", ((60, 50, 4),), spoil="zero"),
)


class _Pair(nn.Module):
    """The smallest module with a LoRA pair."""

    def __init__(self, m: int, n: int, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self.scaling = 0.5
        self.lora_A = nn.Parameter(torch.randn(rank, n, generator=rng))
        self.lora_B = nn.Parameter(torch.randn(m, rank, generator=rng))


def check(backend: str, case: Case, device: str) -> list[str]:
    """Compare the steps of one backend with the reference path in fp64.

    Returns:
        What is wrong, in words; empty if nothing is.
    """
    rng = torch.Generator().manual_seed(7)
    module = nn.ModuleList(_Pair(*shape, rng) for shape in case.shapes).to(device, case.dtype)
    if case.spoil == "zero":
        nn.init.zeros_(module.get_parameter("0.lora_B"))
    # A long step: rounding the sum X - lr * update is no error of the update.
    opt = LoFTAdamW(module, lr=1.0, backend=backend, **case.options)
    found = []
    for step in range(STEPS):
        for p in module.parameters():
            grad = 0.1 * torch.randn(p.shape, generator=rng).to(device, p.dtype)
            p.grad = grad.T.contiguous().T if case.spoil == "strided" else grad
        if case.spoil == "missing" and step % 2:
            module.get_parameter("0.lora_A").grad = None
        exact, exact_opt = _twin(module, opt, case)
        before = {name: p.detach().double().clone() for name, p in module.named_parameters()}
        opt.step()
        with _one_thread():
            exact_opt.step()
        for name, p in module.named_parameters():
            twin = exact.get_parameter(name)
            moved = p.detach().double() - before[name], twin.detach() - before[name]
            limit = _MOVED[backend] + 2 * torch.finfo(p.dtype).eps * _ratio(p, moved[1])
            if backend == "triton" and step == 1:
                limit += _SECOND_STEP
            if backend == "triton" and step == 2 and max(rank for *_, rank in case.shapes) > 64:
                limit += _THIRD_STEP
            found += _compare(f"{case.name}, step {step + 1}: {name}", *moved, limit)
            for key, value in opt.state.get(p, {}).items():
                if key != "master":
                    what = f"{case.name}, step {step + 1}: {key} of {name}"
                    limit = _STATE.get(value.dtype, 0.0) if key != "guard" else 1e-12
                    found += _compare(what, value.double(), exact_opt.state[twin][key], limit)
    return found


def _twin(module: nn.Module, opt: LoFTAdamW, case: Case) -> tuple[nn.Module, LoFTAdamW]:
    """Copy a run into fp64 on the reference path: parameters, gradients, state."""
    exact = copy.deepcopy(module).double()
    for name, p in module.named_parameters():
        exact.get_parameter(name).grad = None if p.grad is None else p.grad.double()
    exact_opt = LoFTAdamW(exact, lr=1.0, backend="reference", **case.options)
    exact_opt.load_state_dict(opt.state_dict())
    return exact, exact_opt


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the small matrices of the reference path off the thread pool, which costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ratio(p: Tensor, moved: Tensor) -> float:
    """Return how large a parameter is beside its step: that much its rounding shows."""
    distance = float(moved.norm())
    return float(p.detach().double().norm()) / distance if distance else 0.0


def _compare(what: str, actual: Tensor, exact: Tensor, limit: float) -> list[str]:
    """Describe a difference above the limit, relative to the norm of what is expected."""
    scale = float(exact.double().norm())
    error = float((actual - exact.double()).norm()) / (scale or 1.0)
    return [] if error <= limit else [f"{what} has error {error:.1e}, limit {limit:.1e}"]


def run() -> dict[str, list[str]]:
    """Check every backend that runs here.

    Returns:
        Per available backend what is wrong; an empty list is a pass.
    """
    results: dict[str, list[str]] = {}
    for backend in backends.report().available:
        if backend == "triton":
            results[backend] = side_by_side(backend, "cuda")
        else:
            results[backend] = _check_all(backend, CASES, "cpu")
    return results


def side_by_side(backend: str, device: str) -> list[str]:
    """Check all cases in processes of their own, so that kernels are compiled at the same time.

    Where there can be no others, one after the other here: in a process of somebody's pool, in
    a script without a main guard, on a GPU that admits one process.
    """
    if multiprocessing.parent_process() is not None:
        return _check_all(backend, CASES, device)
    kinds = _that_share_kernels(CASES)
    workers = max(1, min(len(kinds), os.cpu_count() or 1))
    try:
        # CUDA does not survive a fork.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(_check_all, backend, cases, device) for cases in kinds]
            return [wrong for future in running for wrong in future.result()]
    except (OSError, RuntimeError) as error:
        warnings.warn(f"cases are checked one after the other: {error}", UserWarning, stacklevel=2)
        return _check_all(backend, CASES, device)


def _that_share_kernels(cases: Sequence[Case]) -> list[list[Case]]:
    """Sort cases by their largest rank and their dtype."""
    kinds: dict[tuple, list[Case]] = {}
    for case in cases:
        kinds.setdefault((max(rank for *_, rank in case.shapes), case.dtype), []).append(case)
    return list(kinds.values())


def _check_all(backend: str, cases: Sequence[Case], device: str) -> list[str]:
    """Check some cases; returns what is wrong."""
    with warnings.catch_warnings():
        # Cases that a backend leaves to the reference path, and one-sided pairs, say so.
        warnings.simplefilter("ignore", UserWarning)
        return [wrong for case in cases for wrong in check(backend, case, device)]
