"""Persistence: a run continues bitwise from a checkpoint, a copy or a pickle."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from problems import make_adapter
from runs import (
    DTYPES,
    OPTIONS,
    Net,
    assert_same,
    differences,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
    without_gradients,
)
from torch import nn

import loft_kernels as lk

AFTER = 4  # steps after the interruption: two of each phase


def make_run(dtype: torch.dtype, seed: int = 1, **options: Any) -> tuple[Net, lk.LoFTAdamW]:
    net = Net(dtype, seed)
    return net, lk.LoFTAdamW(net, lr=1e-2, weight_decay=0.1, **options)


def through_a_file(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def assert_continues(
    first: tuple[Net, lk.LoFTAdamW], second: tuple[Net, lk.LoFTAdamW], start: int, what: str
) -> None:
    """Check that two runs are equal now and after each of the next steps."""
    assert_same(
        without_gradients(picture(first[1])),
        without_gradients(picture(second[1])),
        f"{what}, start",
    )
    for k in range(start, start + AFTER):
        take_step(*first, k)
        take_step(*second, k)
        assert_same(picture(first[1]), picture(second[1]), f"{what}, step {k}")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("steps", range(6), ids="after{}".format)
def test_resume_is_bitwise_the_uninterrupted_run(steps, dtype, options):
    run = make_run(dtype, **options)
    take_steps(*run, range(steps))
    saved = through_a_file({"net": run[0].state_dict(), "opt": run[1].state_dict()})
    resumed = make_run(dtype, seed=50, **options)  # other weights, so that they must come along
    resumed[0].load_state_dict(saved["net"])
    resumed[1].load_state_dict(saved["opt"])
    assert_continues(run, resumed, steps, "resumed")


def test_a_checkpoint_brings_its_options_along():
    run = make_run(torch.float32, second_moment="diagonal", alternate=False, betas=(0.8, 0.9))
    take_steps(*run, range(3))
    net = copy.deepcopy(run[0])
    opt = lk.LoFTAdamW(net)
    opt.load_state_dict(through_a_file(run[1].state_dict()))
    assert_continues(run, (net, opt), 3, "options of the checkpoint")


@pytest.mark.parametrize("steps", [2, 3], ids="after{}".format)
def test_resume_into_an_optimizer_that_has_already_stepped(steps):
    run = make_run(torch.bfloat16)
    take_steps(*run, range(steps))
    used = make_run(torch.bfloat16, seed=50)
    take_steps(*used, range(5))
    used[0].load_state_dict(run[0].state_dict())
    used[1].load_state_dict(through_a_file(run[1].state_dict()))
    assert_continues(run, used, steps, "loaded over another state")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_state_of_half_precision_factors_stays_fp32(dtype):
    net, opt = make_run(dtype)
    take_steps(net, opt, range(3))
    opt.load_state_dict(through_a_file(opt.state_dict()))
    wide = {"step": torch.int64, "guard": torch.float64}
    for pair in net.pairs:
        for param in (pair.lora_A, pair.lora_B):
            kept = opt.state[param]
            assert set(kept) == {
                "step", "exp_avg", "second_moment", "partner_basis", "guard", "master"
            }  # fmt: skip
            for key, value in kept.items():
                assert value.dtype == wide.get(key, torch.float32), key


def test_state_tensors_have_the_documented_shapes():
    for options, keys in (
        ({}, {"second_moment": 3, "partner_basis": 2, "guard": 0}),
        ({"second_moment": "diagonal"}, {"second_moment": 2, "partner_basis": 2}),
        ({"calibrate": False}, {"second_moment": 3, "partner_cholesky": 2, "guard": 0}),
    ):
        net, opt = make_run(torch.float32, **options)
        take_step(net, opt, 0)
        m, n, r = 6, 5, 2
        for param, rows, others in ((net.first.lora_B, m, n), (net.first.lora_A, n, m)):
            expected = {"step": (), "exp_avg": (rows, r)}
            expected["second_moment"] = (rows, keys["second_moment"])
            if "partner_basis" in keys:
                expected["partner_basis"] = (others, r)
            else:
                expected["partner_cholesky"] = (r, r)
            if "guard" in keys:
                expected["guard"] = ()
            assert {k: tuple(v.shape) for k, v in opt.state[param].items()} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["factors", "plain"])
def test_nothing_is_shared_with_the_loaded_dict(kind, dtype):
    run = make_run(dtype)
    take_steps(*run, range(3))
    source = copy.deepcopy(run[1].state_dict())
    kept = copy.deepcopy(source)
    net, opt = make_run(dtype)
    opt.load_state_dict(source)
    mine = {k: v for k, v in source["state"].items() if ("exp_avg_sq" in v) == (kind == "plain")}
    assert mine
    take_steps(net, opt, range(2))
    shared = [
        f"{k}.{name}"
        for k, entries in mine.items()
        for name, value in entries.items()
        if not torch.equal(value, kept["state"][k][name])
    ]
    assert not shared, f"stepping the loaded optimizer changed {shared} of the loaded dict"
    opt.load_state_dict(source)
    before = picture(opt)
    for entries in mine.values():
        for value in entries.values():
            value.fill_(77)
    found = [d for d in differences(before, picture(opt)) if d.startswith("state[")]
    assert not found, f"changing the loaded dict changed the optimizer: {found}"


def test_order_of_the_parameters_does_not_matter_where_they_have_names():
    run = make_run(torch.float32)
    take_steps(*run, range(3))
    net = copy.deepcopy(run[0])
    groups = lk.loft_param_groups(net)
    groups[0]["params"].reverse()
    opt = lk.LoFTAdamW(groups)
    opt.load_state_dict(through_a_file(run[1].state_dict()))
    order = opt.param_groups[0]["param_names"]
    assert order == run[1].param_groups[0]["param_names"][::-1]
    for k in range(3, 3 + AFTER):
        take_step(*run, k)
        take_step(net, opt, k)
        expected, found = picture(run[1]), picture(opt)
        del expected["groups[0].param_names"], found["groups[0].param_names"]
        assert_same(expected, found, f"other order, step {k}")


class Wrapper(nn.Module):
    """Puts "module." before all names, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrapped", [True, False], ids=["into-wrapped", "from-wrapped"])
def test_a_wrappers_prefix_does_not_matter(wrapped):
    net = Net(torch.float32)
    run = net, lk.LoFTAdamW(net if wrapped else Wrapper(net), lr=1e-2)
    take_steps(*run, range(3))
    other = copy.deepcopy(net)
    opt = lk.LoFTAdamW(Wrapper(other) if wrapped else other)
    opt.load_state_dict(through_a_file(run[1].state_dict()))
    own = opt.param_groups[0]["param_names"]
    assert all(name.startswith("module.") == wrapped for name in own), own
    for k in range(3, 3 + AFTER):
        take_step(*run, k)
        take_step(other, opt, k)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(v, opt.state[b][key]) for key, v in run[1].state[a].items())


class Nested(nn.Module):
    """A layer with a pair of its own around one that is called "module" inside it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        outer = make_adapter(6, 5, 2, seed).float()
        self.lora_A, self.lora_B, self.scaling = outer.lora_A, outer.lora_B, outer.scaling
        self.module = make_adapter(6, 5, 2, seed + 1).float()


def test_names_that_differ_by_a_wrappers_prefix_alone_stay_apart():
    net = Nested(1)
    opt = lk.LoFTAdamW(net)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    opt.step()
    other = lk.LoFTAdamW(copy.deepcopy(net))
    other.load_state_dict(opt.state_dict())
    assert_same(without_gradients(picture(opt)), without_gradients(picture(other)), "loaded")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("steps", [0, 1, 2], ids="after{}".format)
def test_copies_keep_the_pairing_and_continue_bitwise(steps, dtype, how, options):
    run = make_run(dtype, max_grad_norm=0.5, **options)
    take_steps(*run, range(steps))
    copied = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
    assert copied[1].state.keys().isdisjoint(run[1].state.keys())
    assert_continues(run, copied, steps, how)


def test_scaling_is_followed_live():
    """With the same gradient of W and twice the scaling, the factor moves half as far."""
    moved, moments = [], []
    for scaling in (1.0, 2.0):
        module = make_adapter(6, 5, 2, 1)
        module.scaling = 1.0
        opt = lk.LoFTAdamW(module, lr=1e-2)
        for k in range(3):
            if k == 2:
                module.scaling = scaling
            gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(k)).double()
            before = module.lora_B.detach().clone()
            # The chain rule on a gradient of W that does not depend on W; powers of two are exact.
            module.lora_B.grad = module.scaling * gradient @ module.lora_A.detach().T
            module.lora_A.grad = module.scaling * before.T @ gradient
            opt.step()
        moved.append(module.lora_B.detach() - before)
        moments.append(opt.state[module.lora_B])
    assert float(moved[0].norm()) > 0
    torch.testing.assert_close(2 * moved[1], moved[0], rtol=1e-12, atol=1e-15)
    assert all(torch.equal(v, moments[1][key]) for key, v in moments[0].items())


@pytest.mark.parametrize("steps", [1, 2], ids="after{}".format)
def test_a_copy_keeps_the_last_scaling(steps):
    run = make_run(torch.float32)
    run[0].first.scaling = 3.0
    take_steps(*run, range(steps))
    copied = copy.deepcopy(run)
    assert_continues(run, copied, steps, "scaling changed before the copy")


@pytest.mark.parametrize("start", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("steps", [1, 2], ids="after{}".format)
def test_parameters_cast_to_bf16_on_the_way(steps, start):
    """`p.data = p.data.bfloat16()` is the same as a checkpoint loaded into a bf16 model."""
    run = make_run(start)
    take_steps(*run, range(steps))
    run[1].zero_grad()
    saved = through_a_file(run[1].state_dict())
    for module in run[0].modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.bfloat16())
    for p in run[0].parameters():
        p.data = p.data.bfloat16()
    # Plain AdamW is torch's own and does not take its state along.
    run[0].bias.requires_grad_(False)
    net = Net(torch.bfloat16)
    net.load_state_dict(run[0].state_dict())
    net.bias.requires_grad_(True)
    opt = lk.LoFTAdamW(net)
    opt.load_state_dict(saved)
    net.bias.requires_grad_(False)
    for k in range(steps, steps + AFTER):
        take_step(*run, k)
        take_step(net, opt, k)
        for pair, other in zip(run[0].pairs, net.pairs, strict=True):
            for name in ("lora_A", "lora_B"):
                a, b = pair.get_parameter(name), other.get_parameter(name)
                assert a.dtype == torch.bfloat16
                assert torch.equal(a, b), f"{name} after step {k}"
                kept = run[1].state[a]
                assert kept["exp_avg"].dtype == kept["master"].dtype == torch.float32
                assert all(torch.equal(v, opt.state[b][key]) for key, v in kept.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_master_follows_a_parameter_that_its_owner_overwrites(dtype):
    net, opt = make_run(dtype)
    take_steps(net, opt, range(4))
    for group in opt.param_groups:
        group["lr"] = 0.0
    masters = {name: opt.state[p]["master"].clone() for name, p in named_factors(net)}
    written = {}
    with torch.no_grad():
        for name, p in named_factors(net):
            p[0] += 1
            written[name] = p.detach().clone()
    take_steps(net, opt, range(4, 6))  # both phases: a master is read when its factor moves
    for name, p in named_factors(net):
        master, owned = opt.state[p]["master"], torch.zeros(p.shape, dtype=torch.bool)
        owned[0] = True
        if name.endswith("lora_A"):
            master, masters[name] = master.T, masters[name].T
        assert torch.equal(p, written[name]), f"{name} moved at lr 0"
        assert torch.equal(master[owned], p[owned].float()), f"master of {name} did not follow"
        assert torch.equal(master[~owned], masters[name][~owned]), f"{name}: hidden bits are lost"


def named_factors(net: Net) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in net.named_parameters() if "lora_" in n]


def test_loading_and_saving_give_no_warning():
    run = make_run(torch.bfloat16)
    take_steps(*run, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run[1].load_state_dict(through_a_file(run[1].state_dict()))
        take_step(*run, 2)
