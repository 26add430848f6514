"""Seeded bugs: each must turn the suite red.

Every mutant is a copy of the package with one line changed, against which the tests named here run
in a process of their own. The unchanged copy runs through the same tests and must stay green, so
that a mutant is not killed by the set-up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import loft_kernels

TESTS = Path(__file__).parent
PACKAGE = Path(loft_kernels.__file__).parent

TRAJECTORY = "test_oracle.py::test_trajectory_and_state_equal_the_oracle"
TRAJECTORY += "[reference-12x12-r8-decay-clip-general]"
SIMULTANEOUS = "test_oracle.py::test_options_equal_the_oracle[reference-both-at-once-decay-12x9-r3]"
LARGE_EPS = "test_oracle.py::test_options_equal_the_oracle[reference-large-eps-12x9-r3]"
ALPHA = "test_oracle.py::test_alpha_keeps_the_trajectory[reference-decay-alpha/r=2]"
RESUME = "test_state.py::test_resume_is_bitwise_the_uninterrupted_run[after1-fp32-full]"
CLIP = "test_oracle.py::test_clip_grad_norm[reference-clips-alternate-B-phase]"


UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Mutant:
    """One seeded bug: in `file`, `old` becomes `new`, and `test` has to notice."""

    file: str
    old: str
    new: str
    test: str


MUTANTS = {
    "transposed-transport": Mutant(
        "reference.py",
        "c.T @ (unpack_symmetric(packed, rank) @ c)",
        "c @ (unpack_symmetric(packed, rank) @ c.T)",
        TRAJECTORY,
    ),
    "sequential-factors": Mutant(
        "functional.py",
        "        _advance_moments_(side, prepared.pair, coefficient)\n",
        "        partner = next(y for x, y in prepared.pair.sides if x is side.factor)\n"
        "        moved = ref.orthonormal_bases([partner.rows], [0.0])[0]\n"
        "        host, side = side.host, _side(prepared.pair, side.factor, moved)\n"
        "        side.host = host\n"
        "        _advance_moments_(side, prepared.pair, coefficient)\n",
        SIMULTANEOUS,
    ),
    "missing-snapshot": Mutant(
        "functional.py",
        "    memory.copy_(side.remembered)\n",
        "    if not host.step:\n        memory.copy_(side.remembered)\n",
        TRAJECTORY,
    ),
    "decay-without-lr": Mutant(
        "reference.py", "(1 - lr * weight_decay)", "(1 - weight_decay)", TRAJECTORY
    ),
    "one-sided-step-count": Mutant(
        "functional.py",
        '    state["step"].fill_(host.step)\n',
        '    if not side.factor.transposed:\n        state["step"].fill_(host.step)\n',
        TRAJECTORY,
    ),
    "eps-inside-the-root": Mutant(
        "reference.py",
        "_divide(m, v.sqrt_().add_(eps))",
        "_divide(m, v.add_(eps).sqrt_())",
        LARGE_EPS,
    ),
    "missing-scaling": Mutant("reference.py", "* (lr / scaling)", "* lr", ALPHA),
    "phase-lost-on-resume": Mutant(
        "state.py",
        "    if factor.param.dtype not in HALF_DTYPES:\n        loaded.pop",
        '    loaded["step"] = loaded["step"] // 2 * 2\n'
        "    if factor.param.dtype not in HALF_DTYPES:\n        loaded.pop",
        RESUME,
    ),
    "unhalved-off-diagonals": Mutant(
        "reference.py", "torch.where(i == j, 1.0, 2.0)", "torch.where(i == j, 1.0, 1.0)", TRAJECTORY
    ),
    "clip-in-factor-space": Mutant(
        "functional.py",
        "norm_sq = stored_sq = side.g.square().sum()",
        "norm_sq = stored_sq = side.factor.grad_rows.double().square().sum()",
        CLIP,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How one run ended, and how often the seeded line stood in the source."""

    code: int
    output: str
    places: int


def run_suite(folder: Path, mutant: Mutant | None, tests: list[str]) -> Outcome:
    """Run tests against a copy of the package, which a fresh interpreter finds first."""
    package = folder / "loft_kernels"
    # Without its extension the copy takes the reference path, where the bugs are seeded.
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "_native*"))
    places = 1
    if mutant is not None:
        source = (package / mutant.file).read_text()
        places = source.count(mutant.old)
        (package / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *(str(TESTS / t) for t in tests)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(done.returncode, done.stdout + done.stderr, places)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """Run the unchanged copy and all mutants, two at a time."""
    everything = sorted({m.test for m in MUTANTS.values()})
    with ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(run_suite, tmp_path_factory.mktemp(name), mutant, [mutant.test])
            for name, mutant in MUTANTS.items()
        }
        runs[UNCHANGED] = pool.submit(
            run_suite, tmp_path_factory.mktemp(UNCHANGED), None, everything
        )
        return {name: run.result() for name, run in runs.items()}


def test_the_unchanged_copy_is_green(outcomes):
    outcome = outcomes[UNCHANGED]
    assert outcome.code == 0, outcome.output[-3000:]
    assert f"{len({m.test for m in MUTANTS.values()})} passed" in outcome.output


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_turns_the_suite_red(outcomes, name):
    outcome, mutant = outcomes[name], MUTANTS[name]
    assert outcome.places == 1, f"{mutant.old!r} stands {outcome.places} times in {mutant.file}"
    assert outcome.code == 1, f"the mutant survived {mutant.test}:\n{outcome.output[-3000:]}"
    assert "AssertionError" in outcome.output, outcome.output[-3000:]
    assert "NameError" not in outcome.output, outcome.output[-3000:]
