"""Pairs on several devices in one step of the Triton backend.

One device goes by two names here, so that every machine can tell: each name has buckets, workspace
and a decision of its own. `tests/test_devices.py` takes two GPUs.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loft_kernels import backends

pytest.importorskip("triton", reason="the Triton backend is optional")
from test_triton import DEVICE, Case, build, set_gradients
from test_triton_kept import copies, on_triton  # noqa: F401 - an autouse fixture

import loft_kernels as lk
from loft_kernels.backends.triton import step as triton_step

NAMES = (torch.device("cuda"), torch.device("cuda", 0))
if DEVICE == "cpu":
    NAMES = (torch.device("cpu"), torch.device("cpu", 0))

CASE = Case("devices", shapes=((9, 7), (6, 9), (8, 5)), ranks=(2, 2, 3))


@pytest.fixture
def spread(monkeypatch):
    """Return a function that spreads the pairs of a model over both names, as digits say."""

    def over(module, digits):
        names = {id(p.lora_B): NAMES[int(k)] for p, k in zip(module, digits, strict=True)}
        monkeypatch.setattr(triton_step, "device_of", lambda pair: names[id(pair.b.param)])

    return over


def state_of(opt):
    return [t.clone() for s in opt.state.values() for t in s.values()]


def run(spread, places, *, max_norm=None, steps=3, frozen=()):
    """Train; `places` says per step where the pairs are, `frozen` which have no gradient in one."""
    case = Case(CASE.name, CASE.shapes, CASE.ranks, options={"max_grad_norm": max_norm})
    module, opt = build(case, "ieee")
    for step in range(steps):
        spread(module, places[step % len(places)])
        if len(places) > 1:
            opt._gathered = None  # a real move has other addresses: everything is laid out anew
        set_gradients(module, case, step)
        for k in frozen if step == 1 else ():
            module[k].lora_A.grad = module[k].lora_B.grad = None
        opt.step()
    return module, opt


def names_of(opt):
    return {bucket.device for bucket in opt._plan.buckets()}


@pytest.mark.parametrize(
    ("places", "frozen"),
    [(["010"], ()), (["010", "100"], ()), (["011"], (1, 2)), (["011"], (0,))],
    ids=["spread", "moved", "second idle", "first idle"],
)
def test_the_bits_are_those_of_one_device(spread, places, frozen):
    one, one_opt = run(spread, ["000"], frozen=frozen)
    several, opt = run(spread, places, frozen=frozen)
    assert names_of(one_opt) == {NAMES[0]}
    assert names_of(opt) == set(NAMES)
    for p, q in zip(
        [*copies(one), *state_of(one_opt)], [*copies(several), *state_of(opt)], strict=True
    ):
        assert torch.equal(p, q)


def test_the_norm_is_that_of_all_devices(spread):
    """Clipped so far that a part of the norm would be seen in every factor."""
    start = copies(build(CASE, "ieee")[0])
    one, one_opt = run(spread, ["000"], max_norm=1e-3, steps=2)
    several, opt = run(spread, ["010"], max_norm=1e-3, steps=2)
    decided = [opt._plan.decision(name).values for name in NAMES]
    assert torch.equal(*decided)
    assert float(decided[0][1]) < 0.1  # the coefficient
    for p, q in zip(one_opt.state.values(), opt.state.values(), strict=True):
        torch.testing.assert_close(p["exp_avg"], q["exp_avg"], rtol=1e-6, atol=0)
    for p, q, before in zip(copies(one), copies(several), start, strict=True):
        moved = (p - before).abs().max()
        assert (p - q).abs().max() <= 1e-5 * moved


@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_that_is_not_finite_stops_all_devices(spread, bad):
    module, opt = run(spread, ["010"], steps=1)
    set_gradients(module, CASE, 2)
    module[bad].lora_A.grad[0, 0] = float("inf")
    before = [*copies(module), *state_of(opt)]
    opt.step()
    assert int(opt.nonfinite_steps) == 1
    for p, q in zip(before, [*copies(module), *state_of(opt)], strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_scaler_stops_all_devices_or_none(spread, found):
    """Gradients 8 times too large, in the protocol of torch's fused optimizers."""
    ends = []
    for scale in (1.0, 8.0):
        module, opt = run(spread, ["010"], steps=1)
        set_gradients(module, CASE, 2)
        before = copies(module)
        if scale > 1.0:
            for p in module.parameters():
                p.grad *= scale
            opt.grad_scale = torch.tensor(scale, device=DEVICE)
            opt.found_inf = torch.tensor(found, device=DEVICE)
        opt.step()
        ends.append(copies(module))
    assert int(opt.nonfinite_steps) == found
    for p, q in zip(before if found else ends[0], ends[1], strict=True):
        assert torch.equal(p, q)


def test_other_parameters_take_part_on_every_device(spread):
    """They enter the norm, are clipped and stand still with the pairs."""
    ends = []
    for places in ("000", "010"):
        module, _ = build(CASE, "ieee")
        module.register_parameter("bias", torch.nn.Parameter(torch.zeros(3, device=DEVICE)))
        backend = "triton" if DEVICE == "cuda" else "auto"
        opt = lk.LoFTAdamW(module, 1e-2, backend=backend, max_grad_norm=1.0)
        spread([p for p in module if hasattr(p, "lora_B")], places)
        for step in range(3):
            set_gradients(module, CASE, step)
            module.bias.grad = torch.full_like(module.bias, [30.0, float("nan"), 20.0][step])
            opt.step()
        assert int(opt.nonfinite_steps) == 1
        layers = [p for p in module if hasattr(p, "lora_B")]
        assert [int(opt.state[layer.lora_B]["step"]) for layer in layers] == [2, 2, 2]
        ends.append(module.bias.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


def pairs_on(devices):
    """Make the pairs that an optimizer would gather, on devices that need not be here."""
    module, opt = build(CASE, "ieee")
    set_gradients(module, CASE, 0)
    pairs = opt._gather(allocate=False)[0][: len(devices)]
    for pair, device in zip(pairs, devices, strict=True):
        for factor in (pair.b, pair.a):
            tensor = SimpleNamespace(
                device=torch.device(device), dtype=torch.float32, shape=factor.param.shape
            )
            factor.param = factor.grad = tensor
    return pairs


def test_which_devices_can_share_a_step(monkeypatch):
    monkeypatch.undo()  # this file's choice
    old = "compute capability (7, 0) is older than 8.0"
    monkeypatch.setattr(backends, "triton_missing", lambda device=0: old if device == 2 else None)
    assert backends.choose("auto", pairs_on(["cuda:1", "cuda:0"])) == ("triton", "")
    assert backends.choose("auto", pairs_on(["cuda:0", "cuda:2"])) == ("reference", old)
    for devices in (["cuda:1", "cpu"], ["cpu", "cuda:1"]):
        reason = "some pairs are on a GPU, others not: cpu, cuda:1"
        assert backends.choose("auto", pairs_on(devices)) == ("reference", reason)
