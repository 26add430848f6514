"""Random pairs, options and histories: the C++ backend against the reference path by rule T2."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import one_thread  # noqa: F401 - an autouse fixture
from teacher import Problem, violations

from loft_kernels import backends

pytestmark = pytest.mark.skipif(
    backends.cpu_missing() is not None, reason=f"no C++ backend: {backends.cpu_missing()}"
)

CASES = int(os.environ.get("LOFT_FUZZ_CASES", "5000"))

# Large ranks cost the reference path most of the time, so they come seldom and with few rows.
sizes = st.integers(1, 24) | st.integers(1, 24) | st.integers(1, 24) | st.integers(1, 200)
small = st.tuples(sizes, sizes, st.integers(1, 17))
large = st.tuples(st.integers(1, 24), st.integers(1, 70), st.sampled_from([31, 32, 33, 64]))
shapes = st.integers(0, 29).flatmap(lambda k: large if k == 0 else small)
flags = st.tuples(st.integers(0, 1), st.sampled_from(["lora_A", "lora_B"]))
problems = st.builds(
    Problem,
    shapes=st.lists(shapes, min_size=1, max_size=2).map(tuple),
    dtype=st.sampled_from(["fp32", "fp32", "fp32", "fp64", "bf16", "fp16"]),
    seed=st.integers(0, 100_000),
    history=st.integers(0, 3),
    start=st.sampled_from(["general", "general", "zero"]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    missing=st.lists(flags, max_size=1).map(tuple),
    noise=st.sampled_from([1.0, 0.1]),
    options=st.fixed_dictionaries(
        {
            "betas": st.sampled_from([(0.9, 0.999), (0.9, 0.999), (0.5, 0.9), (0.0, 0.9)]),
            "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "alternate": st.booleans(),
            "maximize": st.booleans(),
            "max_grad_norm": st.sampled_from([None, 0.1]),
        }
    ),
)


def defined(problem: Problem) -> Problem:
    """Leave out what has no answer beyond rounding, and gradients of pairs that are not there."""
    changed = vars(problem) | {
        "missing": tuple(place for place in problem.missing if place[0] < len(problem.shapes))
    }
    if any(2 * r > min(m, n) for m, n, r in problem.shapes):
        # From B = 0 the first step of a wide adapter makes columns that are dependent but for fp32
        # rounding, or nearly: at the pivot tolerance, or far above the condition number of rule T4.
        changed["start"] = "general"
    return Problem(**changed)


@pytest.mark.filterwarnings("ignore:.*one-sided")
@settings(max_examples=CASES, derandomize=True, deadline=None, database=None)
@given(problem=problems)
def test_random_steps_follow_rule_t2(problem):
    found = violations(defined(problem), drawn=True)
    if found:
        # Where v nearly cancels in some entry, that entry decides both errors, by chance.
        again = {
            line.split(":")[0] for line in violations(defined(problem), drawn=True, shaken=True)
        }
        found = [line for line in found if line.split(":")[0] in again]
    assert not found, "; ".join(found)
