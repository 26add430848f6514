"""Inputs with a defined outcome: missing, non-finite, vanishing and huge gradients (rows 5-15)."""

from __future__ import annotations

import io
import math
import multiprocessing
import warnings
from typing import Any

import pytest
import torch
from oracle import DensePair, Hyper, step_pairs
from problems import TinyLoRA, check_close, conditioned, generator, make_adapter, normal
from runs import (
    DTYPES,
    OPTIONS,
    Net,
    assert_same,
    give_gradients,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
    without_gradients,
)
from torch import Tensor, nn

import loft_kernels as lk

FRESH_AND_USED = pytest.mark.parametrize("steps", [0, 1, 2], ids="after{}".format)


def make_run(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, lk.LoFTAdamW]:
    net = Net(dtype)
    return net, lk.LoFTAdamW(net, **{"lr": 1e-2, **options})


def not_finite(opt: torch.optim.Optimizer) -> list[str]:
    """List the entries of a picture that are not finite; the guard may be infinite."""
    seen = without_gradients(picture(opt))
    tensors = {k: v for k, v in seen.items() if isinstance(v, Tensor) and not k.endswith(".guard")}
    return [k for k, v in tensors.items() if not bool(v.isfinite().all())]


@pytest.mark.parametrize("idle", ["lora_A", "lora_B"])
@pytest.mark.parametrize("how", ["frozen", "no-gradient"], ids="row05-{}".format)
def test_one_sided_pair_moves_at_every_step_with_one_warning(idle, how):
    net, opt = make_run()
    if how == "frozen":
        for pair in net.pairs:
            pair.get_parameter(idle).requires_grad_(False)
        opt = lk.LoFTAdamW(net, lr=1e-2)
    lone = "lora_B" if idle == "lora_A" else "lora_A"
    start = [pair.get_parameter(idle).detach().clone() for pair in net.pairs]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(4):
            before = [pair.get_parameter(lone).detach().clone() for pair in net.pairs]
            net.set_gradients(k)
            for pair in net.pairs:
                pair.get_parameter(idle).grad = None
            opt.step()
            for pair, old in zip(net.pairs, before, strict=True):
                moving = pair.get_parameter(lone)
                assert not torch.equal(old, moving), f"{lone} did not move at step {k}"
                assert int(opt.state[moving]["step"]) == k + 1
    assert [w.category for w in caught] == [UserWarning], [str(w.message) for w in caught]
    assert f"first.{idle} has no gradient" in str(caught[0].message)
    assert "one-sided" in str(caught[0].message)
    for pair, old in zip(net.pairs, start, strict=True):
        assert torch.equal(old, pair.get_parameter(idle))
        assert not opt.state.get(pair.get_parameter(idle))


@FRESH_AND_USED
def test_row06_pair_without_gradients_stands_still_and_does_not_count(steps):
    net, opt = make_run()
    alone, alone_opt = make_run()
    take_steps(net, opt, range(steps))
    take_steps(alone, alone_opt, range(steps))
    for k in range(steps, steps + 3):
        net.set_gradients(k)
        if k == steps:
            net.second.lora_A.grad = net.second.lora_B.grad = None
            before = [p.detach().clone() for p in net.second.parameters()]
            opt.step()
            assert all(map(torch.equal, before, net.second.parameters()))
        else:
            opt.step()
            alone.set_gradients(k)
            alone_opt.step()
    # The second pair is one step behind and in the phase of the run that never had that step.
    for mine, theirs in zip(net.second.parameters(), alone.second.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        expected = alone_opt.state[theirs]
        assert all(torch.equal(v, expected[key]) for key, v in opt.state[mine].items())


@FRESH_AND_USED
def test_row06_step_without_any_gradient_does_nothing(steps):
    net, opt = make_run(weight_decay=0.1)
    take_steps(net, opt, range(steps))
    opt.zero_grad()
    before = picture(opt)
    opt.step()
    assert_same(before, picture(opt), "no gradients")


@pytest.mark.parametrize("size", ["m", "n"], ids="row08-{}-zero".format)
def test_empty_weight_is_a_no_op_beside_others(size):
    m, n = (0, 5) if size == "m" else (6, 0)
    empty = TinyLoRA(torch.zeros(m, n), torch.ones(m, 2), torch.ones(2, n))
    healthy, alone = make_adapter(4, 3, 2, 1), make_adapter(4, 3, 2, 1)
    opt = lk.LoFTAdamW(nn.ModuleDict({"empty": empty, "healthy": healthy}), lr=1e-2)
    alone_opt = lk.LoFTAdamW(alone, lr=1e-2)
    for k in range(3):
        give_gradients(empty.parameters(), k)
        for module in (healthy, alone):
            give_gradients(module.parameters(), k)
        opt.step()
        alone_opt.step()
    assert all(bool((p == 1).all()) for p in empty.parameters())
    assert all(map(torch.equal, healthy.parameters(), alone.parameters()))


RANKS = [(4, 5, 1), (4, 5, 3), (4, 5, 7), (9, 3, 8), (1, 1, 2)]


@pytest.mark.parametrize("shape", RANKS, ids="row09-{0[0]}x{0[1]}-r{0[2]}".format)
def test_any_rank_is_defined_by_the_pseudo_inverse(shape):
    check_against_oracle(make_adapter(*shape, seed=3), steps=4)


DEFICIENT = {
    "row10-zero-b": (torch.zeros(6, 3), None),
    "row10-zero-both": (torch.zeros(6, 3), torch.zeros(3, 5)),
    "row10-duplicate-rows-of-a": (None, torch.ones(3, 5)),
    "row10-rank-one-b": (torch.arange(6.0)[:, None] * torch.ones(3), None),
}


@pytest.mark.parametrize(("b", "a"), DEFICIENT.values(), ids=DEFICIENT)
def test_partner_of_lower_rank_is_defined_by_the_pseudo_inverse(b, a):
    module = make_adapter(6, 5, 3, 2)
    with torch.no_grad():
        for p, value in ((module.lora_B, b), (module.lora_A, a)):
            if value is not None:
                p.copy_(value)
    check_against_oracle(module, steps=1)


def check_against_oracle(module: TinyLoRA, steps: int) -> None:
    """Compare both phases of a few fp64 steps with the dense oracle."""
    hyper = Hyper(lr=1e-2)
    oracle = DensePair(module.base, module.lora_B, module.lora_A, module.scaling)
    opt = lk.LoFTAdamW(module, lr=1e-2)
    target = normal(generator(9), *module.base.shape)
    for _ in range(steps):
        gradient = (module.weight - target).detach()
        module.lora_B.grad = module.scaling * gradient @ module.lora_A.detach().T
        module.lora_A.grad = module.scaling * module.lora_B.detach().T @ gradient
        opt.step()
        step_pairs([oracle], [oracle.weight - target], hyper)
    check_close(module.lora_B.detach(), oracle.factor_b, 1e-9, "B")
    check_close(module.lora_A.detach(), oracle.factor_a, 1e-9, "A")
    assert not_finite(opt) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("condition", [1e6, 1e8, 1e12, 1e20], ids="row11-cond{:.0e}".format)
def test_ill_conditioned_partner_stays_finite_and_bounded(dtype, condition):
    module = make_adapter(12, 12, 6, 1)
    with torch.no_grad():
        module.lora_A.copy_(conditioned(12, condition, 3)[:6] / condition)
        module.lora_B.copy_(conditioned(12, condition, 4)[:, :6] / condition)
    module.to(dtype)
    opt = lk.LoFTAdamW(module, lr=1e-3)
    for k in range(4):
        before = module.weight.detach().clone()
        gradient = normal(generator(k), 12, 12).to(dtype)
        module.lora_B.grad = module.scaling * gradient @ module.lora_A.detach().T
        module.lora_A.grad = module.scaling * module.lora_B.detach().T @ gradient
        opt.step()
        assert not_finite(opt) == []
        # Every |D_ij| is at most c_t < 7.3, and a projection does not lengthen D.
        moved = float((module.weight.detach() - before).norm())
        assert moved <= 7.3 * 1e-3 * 12 * (1 + 1e-3), f"W moved by {moved} at step {k}"


NON_FINITE = {"nan": math.nan, "inf": math.inf, "minus-inf": -math.inf}
PLACES = ["first.lora_B", "first.lora_A", "second.lora_B", "second.lora_A", "bias"]


@pytest.mark.parametrize("value", NON_FINITE.values(), ids=NON_FINITE)
@FRESH_AND_USED
@pytest.mark.parametrize("place", PLACES, ids="row12-{}".format)
def test_non_finite_gradient_skips_the_whole_step(steps, place, value):
    for dtype in (torch.float32, torch.bfloat16):
        net, opt = make_run(dtype, weight_decay=0.1)
        take_steps(net, opt, range(steps))
        net.set_gradients(steps)
        net.get_parameter(place).grad.view(-1)[-1] = value
        check_skipped(opt, opt.step)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("place", PLACES[:2], ids="row12-zero-b-{}".format)
def test_non_finite_gradient_is_seen_where_the_partner_is_zero(options, place):
    net, opt = make_run(**options)
    with torch.no_grad():
        net.first.lora_B.zero_()
    net.set_gradients(0)
    net.get_parameter(place).grad.view(-1)[0] = math.nan
    check_skipped(opt, opt.step)


def check_skipped(opt: lk.LoFTAdamW, step: Any) -> None:
    """Check that a step changes nothing but the number of skipped steps."""
    before = picture(opt)
    step()
    after = picture(opt)
    assert int(after.pop("nonfinite_steps")) == int(before.pop("nonfinite_steps")) + 1
    # A skipped first step may allocate state, but only that of zero steps.
    for key in [k for k in after.keys() - before.keys() if k.startswith("state[")]:
        assert key.endswith(".master") or not bool(after[key].any()), key
        del after[key]
    assert_same(before, after, "skipped step")


@FRESH_AND_USED
@pytest.mark.parametrize("scaled", [False, True], ids=["row13-alone", "row13-with-grad-scale"])
def test_found_inf_skips_the_whole_step(steps, scaled):
    net, opt = make_run(weight_decay=0.1)
    take_steps(net, opt, range(steps))
    net.set_gradients(steps)
    opt.found_inf = torch.ones(())
    if scaled:
        opt.grad_scale = torch.tensor(128.0)
    check_skipped(opt, opt.step)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("eps", [1e-8, 0.0], ids="row14-eps{}".format)
def test_zero_gradients_keep_every_parameter(dtype, options, eps):
    net, opt = make_run(dtype, eps=eps, **options)
    start = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        for pair in net.pairs:
            for p in pair.parameters():
                p.grad = torch.zeros_like(p)
        opt.step()
    assert all(map(torch.equal, start, net.parameters()))
    assert not_finite(opt) == []
    assert int(opt.state[net.first.lora_B]["step"]) == 3


MAGNITUDES = [1e-44, 1e-38, 1e-30, 1e-22, 1e-18, 1e-10, 1e10, 1e18]


@pytest.mark.parametrize("eps", [1e-8, 0.0], ids="eps{}".format)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("scale", MAGNITUDES, ids="row15-{:.0e}".format)
def test_extreme_gradients_leave_everything_finite(options, eps, scale):
    net, opt = make_run(eps=eps, **options)
    for k in range(4):
        for pair in net.pairs:
            give_gradients(pair.parameters(), k, scale)
        opt.step()
        assert not_finite(opt) == [], f"step {k}"
    assert int(opt.nonfinite_steps) == 0
    assert int(opt.state[net.first.lora_B]["step"]) == 4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@FRESH_AND_USED
@pytest.mark.parametrize("scale", [1e22, 1e30], ids="row15-{:.0e}".format)
def test_gradients_whose_squares_overflow_skip_the_step(steps, options, scale):
    net, opt = make_run(**options)
    take_steps(net, opt, range(steps))
    net.set_gradients(steps)
    net.second.lora_A.grad *= scale
    check_skipped(opt, opt.step)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [1e-15, 1e-18, 1e-25], ids="row15-partner{:.0e}".format)
def test_tiny_factors_leave_everything_finite_or_skip(size, options):
    """Diagonal: g~ = grad S / s is 1/|partner| times larger than g, and so may its square be."""
    net, opt = make_run(lr=0.0, **options)
    with torch.no_grad():
        for pair in net.pairs:
            pair.lora_A.mul_(size)
            pair.lora_B.mul_(size)
    for k in range(4):
        for pair in net.pairs:
            give_gradients(pair.parameters(), k, 1e-3)
        opt.step()
        assert not_finite(opt) == [], f"step {k}"


def test_row15_vanishing_second_moment_leaves_m_over_eps():
    module = make_adapter(6, 5, 2, 1).float()
    opt = lk.LoFTAdamW(module, lr=1.0, eps=1e-8)
    give_gradients(module.parameters(), 1, 1e-30)
    with torch.no_grad():
        module.lora_B.zero_()  # so that the update is not rounded away
    opt.step()
    a = module.lora_A.detach().double()
    # D = m^ Q^T / eps, hence D Q L^-1 = grad (A A^T)^-1 / (s eps).
    step = module.lora_B.grad.double() @ torch.linalg.inv(a @ a.T) / module.scaling / 1e-8
    check_close(module.lora_B.detach(), -step / module.scaling, 1e-5, "B")


def test_zero_learning_rate_moves_nothing_and_keeps_counting():
    net, opt = make_run(lr=0.0, weight_decay=0.5)
    start = [p.detach().clone() for p in net.parameters()]
    take_steps(net, opt, range(3))
    assert all(map(torch.equal, start, net.parameters()))
    assert int(opt.state[net.first.lora_A]["step"]) == 3


def test_group_added_in_mid_run_starts_with_its_own_phase():
    """The phase is the parity of a pair's own count: a new pair begins with B, as alone."""
    net, opt = make_run()
    late, alone = make_adapter(4, 3, 2, 5), make_adapter(4, 3, 2, 5)
    take_step(net, opt, 0)
    named = [(f"late.{n}", p) for n, p in late.named_parameters()]
    opt.add_param_group({"params": named, "scaling": late.scaling})
    alone_opt = lk.LoFTAdamW(alone, lr=1e-2)
    for k in range(1, 4):
        for module in (late, alone):
            give_gradients(module.parameters(), k)
        take_step(net, opt, k)
        alone_opt.step()
    assert all(map(torch.equal, late.parameters(), alone.parameters()))


@pytest.mark.filterwarnings("ignore:.*one-sided")
def test_frozen_and_thawed_factor_rejoins_the_phase_of_its_pair():
    net, opt = make_run()
    pair = net.first
    for k in range(8):
        frozen = 2 <= k < 5
        before = {n: p.detach().clone() for n, p in pair.named_parameters()}
        net.set_gradients(k)
        if frozen:
            pair.lora_A.grad = None
        opt.step()
        moved = {n for n, p in pair.named_parameters() if not torch.equal(before[n], p)}
        expected = {"lora_B"} if frozen or k % 2 == 0 else {"lora_A"}
        assert moved == expected, f"step {k}"
    assert int(opt.state[pair.lora_B]["step"]) == 8
    assert int(opt.state[pair.lora_A]["step"]) == 5
    assert not_finite(opt) == []


def test_step_in_a_forked_process_is_the_step_of_its_parent():
    net, opt = make_run()
    take_steps(net, opt, range(2))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        take_steps(net, opt, range(2, 4))
        file = io.BytesIO()
        torch.save([p.detach() for p in net.parameters()], file)
        sender.send_bytes(file.getvalue())

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(60), "the forked process does not step"
        received = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=True)
    finally:
        process.kill()
        process.join()
    take_steps(net, opt, range(2, 4))
    assert all(map(torch.equal, received, net.parameters()))
