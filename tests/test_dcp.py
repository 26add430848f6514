"""`torch.distributed.checkpoint`: its rehearsal changes nothing, and its round trip is bitwise."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import (
    DEVICES,
    DTYPES,
    OPTIONS,
    Net,
    assert_kernels,
    assert_same,
    leaves,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
    without_gradients,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import loft_kernels as lk

HYPER = {"lr": 1e-2, "weight_decay": 0.1}


def fresh(dtype=torch.float32, device="cpu", **options) -> tuple[Net, lk.LoFTAdamW]:
    net = Net(dtype).to(device)
    return net, lk.LoFTAdamW(net, **HYPER, **options)


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(options, rate):
    runs = []
    for asked in (False, True):
        net = Net()
        opt = lk.LoFTAdamW(net, rate, weight_decay=0.1, **options)
        before = {k: p.detach().clone() for k, p in net.named_parameters()}
        if asked:
            saved = get_optimizer_state_dict(net, opt)
            assert {int(s["step"]) for s in saved["state"].values()} == {0}
            assert_same(before, {k: p.detach() for k, p in net.named_parameters()}, "parameters")
        take_steps(net, opt, range(5))
        runs.append(picture(opt))
    assert_same(*runs, "five steps after the call")


def test_a_warm_up_step_from_rate_zero_is_a_real_step():
    net, opt = fresh()
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in net.parameters()]
    take_step(net, opt, 0)
    assert all(map(torch.equal, before, net.parameters()))
    assert {int(opt.state[p]["step"]) for p in net.parameters()} == {1}
    assert opt.state[net.first.lora_B]["exp_avg"].any()


def test_zero_gradients_after_the_first_step_count():
    net, opt = fresh()
    take_step(net, opt, 0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert {int(opt.state[p]["step"]) for p in net.parameters()} == {2}


def _on_cpu(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


ROUND_TRIPS = [
    *(
        pytest.param(name, steps, dtype, False, id=f"{name}-{steps}-{dtype}")
        for name in OPTIONS
        for steps in (3, 4)
        for dtype in ("fp32", "bf16")
    ),
    pytest.param("full", 3, "bf16", True, id="flattened"),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:the LoFT step runs on the reference path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "steps", "dtype", "flat"), ROUND_TRIPS)
def test_round_trip_through_a_folder_is_bitwise(name, steps, dtype, flat, device, tmp_path):
    dtype = DTYPES[dtype]
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole_net, whole = fresh(dtype, device, **OPTIONS[name])
    take_steps(whole_net, whole, range(steps))
    assert_kernels(whole, device if name in ("full", "simultaneous") else "cpu")
    saved = get_optimizer_state_dict(whole_net, whole, options=how)
    content = {"optim": saved, "model": whole_net.state_dict()}
    dcp.save(content, checkpoint_id=tmp_path, no_dist=True)
    at_save = without_gradients(picture(whole))
    take_steps(whole_net, whole, range(steps, steps + 3))

    net, opt = fresh(dtype, device, **OPTIONS[name])
    loaded = {
        "optim": get_optimizer_state_dict(net, opt, options=how),
        "model": net.state_dict(),
    }
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    net.load_state_dict(loaded["model"])
    set_optimizer_state_dict(net, opt, loaded["optim"], options=how)
    # Counts of what is no pair stay on the CPU until the first step.
    here, there = ({k: _on_cpu(v) for k, v in x.items()} for x in (at_save, picture(opt)))
    assert_same(here, without_gradients(there), "as loaded")
    assert {t.device.type for s in opt.state.values() for t in s.values() if t.dim()} == {device}
    take_steps(net, opt, range(steps, steps + 3))
    assert_same(
        without_gradients(picture(whole)), without_gradients(picture(opt)), "after three more steps"
    )


def test_a_foreign_checkpoint_is_refused_before_anything_changes():
    net, opt = fresh()
    take_steps(net, opt, range(3))
    other = torch.optim.AdamW(list(net.named_parameters()))
    take_step(net, other, 0)
    foreign = get_optimizer_state_dict(net, other)
    net, opt = fresh()
    take_steps(net, opt, range(3))
    before = picture(opt)
    with pytest.raises(ValueError, match=r"lacks .*partner_basis.* Was it saved by another opt"):
        set_optimizer_state_dict(net, opt, foreign)
    assert_same(before, picture(opt), "after the refusal")


def test_the_state_dict_is_keyed_by_parameter_name():
    net, opt = fresh()
    take_step(net, opt, 0)
    saved = get_optimizer_state_dict(net, opt)
    assert set(saved["state"]) == {name for name, _ in net.named_parameters()}
    assert all(isinstance(v, torch.Tensor) for s in saved["state"].values() for v in s.values())
    assert leaves(saved)
