"""Random pairs, options and histories: finite, in phase, and each pair as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TinyLoRA, generator, make_adapter, normal
from runs import DTYPES, assert_same, one_thread  # noqa: F401 - one_thread is an autouse fixture
from torch import Tensor, nn

import loft_kernels as lk

STEPS = 3
EXAMPLES = 200


@dataclass(frozen=True)
class Drawn:
    """One pair and its history.

    Attributes:
        shape: m, n, r.
        dtype: name of the parameters' dtype.
        start: "zero" is LoRA's usual B = 0.
        seed: of its numbers.
        layout: how its gradients lie in memory.
        given: per step, whether B and whether A has a gradient.
    """

    shape: tuple[int, int, int]
    dtype: str
    start: str
    seed: int
    layout: str
    given: tuple[tuple[bool, bool], ...]

    def build(self) -> TinyLoRA:
        m, n, r = self.shape
        return make_adapter(m, n, r, self.seed, self.start).to(DTYPES[self.dtype])

    def set_gradients(self, module: TinyLoRA, step: int) -> None:
        gen = generator(self.seed * STEPS + step)
        for p, present in zip((module.lora_B, module.lora_A), self.given[step], strict=True):
            grad = normal(gen, *p.shape).to(p.dtype)
            p.grad = laid_out(grad, self.layout) if present else None


def laid_out(grad: Tensor, layout: str) -> Tensor:
    """Copy a gradient into another memory layout."""
    if layout == "transposed":
        return grad.T.contiguous().T
    if layout == "strided":
        wide = torch.full((grad.shape[0], 2 * grad.shape[1]), torch.nan, dtype=grad.dtype)
        wide[:, 1::2] = grad
        return wide[:, 1::2]
    return grad


def tuples(strategy: st.SearchStrategy, size: int) -> st.SearchStrategy:
    return st.tuples(*[strategy] * size)


pairs = st.builds(
    Drawn,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)),
    dtype=st.sampled_from(list(DTYPES)),
    start=st.sampled_from(["general", "zero"]),
    seed=st.integers(0, 10_000),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    given=tuples(tuples(st.sampled_from([True, True, True, False]), 2), STEPS),
)
hyper_parameters = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 1e-2]),
        "betas": tuples(st.sampled_from([0.0, 0.5, 0.9, 0.999]), 2),
        "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "alternate": st.booleans(),
        "calibrate": st.booleans(),
        "second_moment": st.sampled_from(["full", "full", "diagonal"]),
        "maximize": st.booleans(),
    }
)


def expected_moves(given: tuple[bool, bool], counts: list[int], alternate: bool) -> list[bool]:
    """Tell which factors a step moves: B, then A; a lone one always."""
    if not (all(given) and alternate):
        return list(given)
    turn = max(counts) % 2
    return [turn == 0, turn == 1]


def snapshot(module: TinyLoRA, opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy a pair's factors and state."""
    seen = {}
    for name, p in module.named_parameters():
        seen[name] = p.detach().clone()
        seen |= {f"{name}.{k}": v.clone() for k, v in opt.state.get(p, {}).items()}
    return seen


def check_pair(
    drawn: Drawn, before: dict[str, Any], after: dict[str, Any], step: int, options: dict[str, Any]
) -> None:
    """Check what one step did to one pair: counts, who moved, and that all is finite."""
    present = drawn.given[step]
    sides = ("lora_B", "lora_A")
    counts = [int(before.get(f"{side}.step", 0)) for side in sides]
    moves = expected_moves(present, counts, options["alternate"])
    for side, has_grad, moved, count in zip(sides, present, moves, counts, strict=True):
        assert int(after.get(f"{side}.step", 0)) == count + has_grad, f"count of {side}"
        if not moved:
            assert torch.equal(before[side], after[side]), f"{side} moved out of turn"
    for name, value in after.items():
        if not name.endswith(".guard"):  # infinite where beta2 is 0: no bound is known
            assert bool(value.isfinite().all()), f"{name} is not finite"


@pytest.mark.filterwarnings("ignore:.*one-sided")
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
@given(drawn=st.lists(pairs, min_size=1, max_size=3), options=hyper_parameters)
def test_random_pairs_step_as_if_alone(drawn, options):
    together = [d.build() for d in drawn]
    opt = lk.LoFTAdamW(nn.ModuleList(together), **options)
    apart = [d.build() for d in drawn]
    alone = [lk.LoFTAdamW(module, **options) for module in apart]
    for step in range(STEPS):
        before = [snapshot(module, opt) for module in together]
        for d, module, other, other_opt in zip(drawn, together, apart, alone, strict=True):
            d.set_gradients(module, step)
            d.set_gradients(other, step)
            other_opt.step()
        opt.step()
        assert int(opt.nonfinite_steps) == 0
        for k, d in enumerate(drawn):
            after = snapshot(together[k], opt)
            check_pair(d, before[k], after, step, options)
            assert_same(snapshot(apart[k], alone[k]), after, f"pair {k} at step {step}")
