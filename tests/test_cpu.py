"""The C++ backend against fp64 by rule T2, its bit equalities (T6), its instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from problems import make_adapter
from runs import Net, assert_same, picture, take_steps
from teacher import Problem, violations
from torch import nn

import loft_kernels as lk
from loft_kernels import backends

pytestmark = pytest.mark.skipif(
    backends.cpu_missing() is not None, reason=f"no C++ backend: {backends.cpu_missing()}"
)

SMALL = ((70, 45, 8), (33, 130, 8))
CASES = {
    **{f"r{r}": Problem(((150, 97, r), (96, 193, r))) for r in (1, 2, 3, 5, 8, 16, 17, 24, 33)},
    "r64": Problem(((100, 70, 64),)),
    "r128": Problem(((10, 150, 128),)),
    "mixed-ranks": Problem(((70, 45, 3), (33, 130, 16), (1, 1, 1))),
    "tile-edges": Problem(((95, 127, 4), (96, 128, 4), (97, 129, 4), (192, 31, 4))),
    "one-row": Problem(((1, 40, 2), (40, 1, 2))),
    "rank-above-size": Problem(((6, 40, 9), (40, 6, 9))),
    "large": Problem(((700, 1100, 8),)),
    "zero-start": Problem(SMALL, start="zero", history=1),
    "transposed": Problem(SMALL, layout="transposed"),
    "strided": Problem(SMALL, layout="strided"),
    "expanded": Problem(SMALL, layout="expanded"),
    "missing": Problem(SMALL, missing=((0, "lora_A"),)),
    "missing-pair": Problem(SMALL, missing=((0, "lora_A"), (0, "lora_B"))),
    "decay": Problem(SMALL, options={"weight_decay": 0.3}),
    "betas": Problem(SMALL, options={"betas": (0.5, 0.9)}),
    "no-momentum": Problem(SMALL, options={"betas": (0.0, 0.9)}),
    "no-memory": Problem(SMALL, options={"betas": (0.0, 0.0)}),
    "eps-zero": Problem(SMALL, options={"eps": 0.0}),
    "eps-large": Problem(SMALL, options={"eps": 1.0}),
    "both-at-once": Problem(SMALL, options={"alternate": False}),
    "maximize": Problem(SMALL, options={"maximize": True}),
    "damping": Problem(SMALL, options={"damping": 1e-2}),
    "clip": Problem(SMALL, options={"max_grad_norm": 0.05}),
    "quiet": Problem(SMALL, noise=0.01, options={"eps": 0.0}),
    **{dtype: Problem(SMALL, dtype=dtype) for dtype in ("fp64", "bf16", "fp16")},
}


@pytest.mark.filterwarnings("ignore:.*one-sided")
@pytest.mark.parametrize("history", [0, 1, 2, 3, 6], ids="after{}".format)
@pytest.mark.parametrize("name", CASES)
def test_step_follows_rule_t2(name, history):
    case = CASES[name]
    found = violations(Problem(**{**vars(case), "history": history}))
    assert not found, "; ".join(found)


def final_picture(threads: int, order: int = 1) -> dict:
    """Train three pairs under their names, in one order or the other, on some threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = [(300, 120, 8), (70, 401, 5), (129, 33, 16)]
        pairs = {str(k): make_adapter(*shape, k).float() for k, shape in enumerate(shapes)}
        module = nn.ModuleDict(dict(list(pairs.items())[::order]))
        opt = lk.LoFTAdamW(module, lr=1e-2, backend="cpu")
        for step in range(4):
            gen = torch.Generator().manual_seed(step)
            for key in sorted(pairs):
                for p in pairs[key].parameters():
                    p.grad = torch.randn(p.shape, generator=gen)
            opt.step()
        seen = picture(opt)
        return {k: v for k, v in seen.items() if not k.startswith("groups")}
    finally:
        torch.set_num_threads(before)


def test_bits_depend_neither_on_threads_nor_on_order_nor_on_the_run():
    expected = final_picture(1)
    for threads, order in ((1, 1), (2, 1), (3, 1), (2, -1)):
        assert_same(expected, final_picture(threads, order), f"{threads} threads, order {order}")


def test_auto_takes_it_and_the_ablations_take_the_reference_path_without_a_word(recwarn):
    for options, name in (({}, "cpu"), ({"second_moment": "diagonal"}, "reference")):
        net = Net()
        opt = lk.LoFTAdamW(net, **options)
        take_steps(net, opt, range(2))
        assert opt._choose_backend(opt._gather(allocate=True)[0]) == (name, "")
    assert not [w for w in recwarn if "reference path" in str(w.message)]


def test_asked_for_by_name_it_says_what_it_leaves_to_the_reference_path():
    net = Net()
    opt = lk.LoFTAdamW(net, backend="cpu", calibrate=False)
    with pytest.warns(UserWarning, match="reference path .*calibrate=False"):
        take_steps(net, opt, range(1))


def test_columns_of_one_buffer_may_be_factors_and_versions_grow():
    both = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    pairs = [make_adapter(20, 11, 4, k).float() for k in range(2)]
    opt = lk.LoFTAdamW(nn.ModuleList(pairs), lr=1e-2, backend="cpu")
    for k, pair in enumerate(pairs):
        pair.lora_B.data = both[:, 4 * k : 4 * k + 4]
    start, versions = both.clone(), [p._version for pair in pairs for p in pair.parameters()]
    for pair in pairs:
        for p in pair.parameters():
            p.grad = torch.ones_like(p)
    opt.step()
    assert bool((both != start).all())
    grown = [p._version for pair in pairs for p in pair.parameters()]
    assert all(a > b for a, b in zip(grown, versions, strict=True)), "autograd would not notice"


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_pass_the_selftest(capability):
    names = {"default": "portable", "avx2": "avx2"}
    done = subprocess.run(
        [sys.executable, "-m", "loft_kernels", "selftest", "--require", "cpu"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{names[capability]} instructions" in done.stdout
