"""Time the stems of a step on one pair, the naive form beside each.

    pytest bench/ --benchmark-only --size 4096 --rank 16

What is timed passes a comparison with fp64 first: the stems in plain PyTorch one by one, kernels
and the C++ operators by the whole step that they make up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import loft_kernels as lk
from bench.contenders import CONTENDERS, parity
from bench.problem import Adapters
from bench.stems import STEMS, Naive, Problem, Reference, draw, recorded
from loft_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = backends.triton_missing() is None
KERNELS = "gram", "solve", "basis", "moments", "operands", "update"
# fp32 against fp64 on well-conditioned factors; v is a sum of few squares after a short history.
LIMIT = 1e-4


@cache
def problem(size: int, rank: int) -> tuple[Problem, Problem]:
    """Return the pair in fp32, and its fp64 copy."""
    narrow = draw(size, rank, DEVICE).to(torch.float32)
    return narrow, narrow.to(torch.float64)


def timed(benchmark: Any, function: Callable[[], Any], stem: str) -> None:
    """Time a function until the device is idle again."""

    def work() -> None:
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = stem
    benchmark(work)


@pytest.mark.parametrize("form", [Naive, Reference], ids=["naive", "reference"])
@pytest.mark.parametrize("stem", STEMS)
def test_stem(
    stem: str, form: type[Naive] | type[Reference], benchmark: Any, pytestconfig: pytest.Config
) -> None:
    """Time one stem in plain PyTorch."""
    narrow, exact = problem(pytestconfig.getoption("size"), pytestconfig.getoption("rank"))
    stems, truth = form(narrow), getattr(Naive(exact), stem)()
    function = getattr(stems, stem)
    found = function()
    if isinstance(stems, Reference):
        found = stems.in_own_coordinates(stem, found)
    error = float((found.double() - truth).norm() / truth.norm())
    assert error <= LIMIT, f"{stem}: {error:.1e}"
    timed(benchmark, function, stem)


@pytest.mark.skipif(not TRITON, reason=f"the Triton backend: {backends.triton_missing()}")
@pytest.mark.parametrize("stem", KERNELS)
def test_kernel(stem: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    """Time the launches of one stem, again and again on the tensors of one step."""
    size, rank = pytestconfig.getoption("size"), pytestconfig.getoption("rank")
    gate("triton", size, rank)
    model = Adapters([(size, size)], rank, DEVICE)
    opt = CONTENDERS["triton"].make(model)
    for _ in range(2):
        model.new_gradients()
        opt.step()
    model.new_gradients()
    with recorded() as launches:
        opt.step()
    assert launches.keys() == set(KERNELS)

    def work() -> None:
        for launch in launches[stem]:
            launch()

    timed(benchmark, work, stem)


@pytest.mark.parametrize("name", ["naive", "reference", "cpu", "triton"])
def test_step(name: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    """Time the whole step of the pair; the C++ operators serve several stems at once."""
    size, rank = pytestconfig.getoption("size"), pytestconfig.getoption("rank")
    here = {"cpu": DEVICE == "cpu" and backends.cpu_missing() is None, "triton": TRITON}
    if not here.get(name, True):
        pytest.skip(f"no {name} backend for {DEVICE}")
    gate(name, size, rank)
    model = Adapters([(size, size)], rank, DEVICE)
    opt = CONTENDERS[name].make(model)
    model.new_gradients()
    timed(benchmark, opt.step, "step")


@cache
def gate(name: str, size: int, rank: int) -> None:
    """Compare whole steps with fp64 before anything is timed."""
    contender = CONTENDERS[name]
    error = parity(contender, [(size, size)], rank, DEVICE)
    assert error <= contender.limit, f"{name}: {error:.1e}"


def test_the_gate_is_shut_for_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step twice as long is not timed."""
    step = lk.LoFTAdamW.step

    def wrong(self: lk.LoFTAdamW) -> None:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        step(self)
        factors = [p for group in self.param_groups for p in group["params"]]
        if factors[0].dtype == torch.float32:
            for p, old in zip(factors, before, strict=True):
                p.data += p.data - old

    monkeypatch.setattr(lk.LoFTAdamW, "step", wrong)
    with pytest.raises(AssertionError, match="reference: 1"):
        gate.__wrapped__("reference", 24, 2)
