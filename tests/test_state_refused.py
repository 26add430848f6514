"""Checkpoints that do not fit: refused whole before anything changes, or taken with a warning."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import make_adapter
from runs import (
    Net,
    assert_refuses,
    assert_same,
    leaves,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
    without_gradients,
)
from torch import nn

import loft_kernels as lk

State = dict[str, Any]

# Positions of the parameters in Net's groups: B and A of both pairs, then the bias.
FIRST_B, FIRST_A, SECOND_B, BIAS = 0, 1, 2, 4


def make_run(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, lk.LoFTAdamW]:
    net = Net(dtype)
    return net, lk.LoFTAdamW(net, lr=1e-2, **options)


def put(place: int, key: str, value: Any) -> Callable[[State], None]:
    """Replace one state entry by a value, or by what a function makes of it."""

    def change(saved: State) -> None:
        entry = saved["state"][place]
        entry[key] = value(entry[key]) if callable(value) else value

    return change


def drop(place: int, key: str) -> Callable[[State], None]:
    """Delete one state entry."""
    return lambda saved: saved["state"][place].pop(key)


def in_groups(**entries: Any) -> Callable[[State], None]:
    """Set entries of all groups; None deletes them."""

    def change(saved: State) -> None:
        for group in saved["param_groups"]:
            for key, value in entries.items():
                if value is None:
                    del group[key]
                else:
                    group[key] = value

    return change


def rename(saved: State) -> None:
    names = saved["param_groups"][0]["param_names"]
    names[:] = [n.replace("second", "third") for n in names]


def foreign(optimizer: type[torch.optim.Optimizer], steps: int) -> Callable[[State], None]:
    """Replace the checkpoint by that of another optimizer over the same parameters."""

    def change(saved: State) -> None:
        net = Net()
        named = dict(net.named_parameters())
        groups = [
            {"params": [(n, named[n]) for n in g["param_names"]]} for g in saved["param_groups"]
        ]
        other = optimizer(groups, lr=1e-2)
        take_steps(net, other, range(steps))
        saved.clear()
        saved.update(other.state_dict())

    return change


def other_rank(saved: State) -> None:
    """Give the first pair the state that it would have with rank 3."""
    module = make_adapter(6, 5, 3, 1).float()
    opt = lk.LoFTAdamW(module)
    module.lora_B.grad, module.lora_A.grad = torch.ones(6, 3), torch.ones(3, 5)
    opt.step()
    saved["state"][FIRST_B], saved["state"][FIRST_A] = opt.state_dict()["state"].values()


@dataclass(frozen=True)
class Misfit:
    """A change that makes a checkpoint unusable, and what the message must say."""

    change: Callable[[State], Any]
    words: tuple[str, ...]


def one_row(t: torch.Tensor) -> torch.Tensor:
    return t[:1]


B_NAME = "first.lora_B"
MISFITS = {
    "no-state": Misfit(lambda s: s.pop("state"), ("state",)),
    "no-groups": Misfit(lambda s: s.pop("param_groups"), ("param_groups",)),
    "empty": Misfit(lambda s: s.clear(), ("state", "param_groups")),
    "fewer-groups": Misfit(lambda s: s["param_groups"].pop(), ("number of parameter groups",)),
    "fewer-parameters": Misfit(lambda s: s["param_groups"][0]["params"].pop(), ("size",)),
    "group-without-params": Misfit(lambda s: s["param_groups"][0].pop("params"), ("params",)),
    "group-without-lr": Misfit(in_groups(lr=None), ("lr",)),
    "group-without-betas": Misfit(in_groups(betas=None), ("betas",)),
    "newer-format": Misfit(in_groups(format=2), ("format 2", "up to 1", "update loft_kernels")),
    "renamed": Misfit(rename, ("third.lora", "second.lora", "param_names")),
    "other-rank": Misfit(other_rank, (B_NAME, "(6, 3)", "(6, 2)")),
    "other-second-moment": Misfit(
        in_groups(second_moment="diagonal"), (B_NAME, "(6, 3)", "(6, 2)")
    ),
    "other-calibrate": Misfit(in_groups(calibrate=False), (B_NAME, "partner_cholesky")),
    "adamw": Misfit(foreign(torch.optim.AdamW, 1), (B_NAME, "second_moment", "another optimizer")),
    "sgd-momentum": Misfit(
        foreign(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 1),
        (B_NAME, "another optimizer"),
    ),
    "sgd-without-state": Misfit(foreign(torch.optim.SGD, 0), ("betas",)),
    "exp_avg-rows": Misfit(
        put(FIRST_B, "exp_avg", one_row), (B_NAME, "exp_avg", "(1, 2)", "(6, 2)")
    ),
    "exp_avg-transposed": Misfit(
        put(FIRST_A, "exp_avg", torch.Tensor.t), ("first.lora_A", "exp_avg", "(2, 5)", "(5, 2)")
    ),
    "second_moment-rows": Misfit(
        put(SECOND_B, "second_moment", one_row), ("second.lora_B", "second_moment", "(4, 6)")
    ),
    "partner_basis-rows": Misfit(put(FIRST_B, "partner_basis", one_row), (B_NAME, "partner_basis")),
    "master-rows": Misfit(put(FIRST_B, "master", torch.zeros(1, 2)), (B_NAME, "master", "(6, 2)")),
    "step-not-a-number": Misfit(put(FIRST_B, "step", torch.zeros(2)), (B_NAME, "step", "(2,)")),
    "step-text": Misfit(put(FIRST_B, "step", "three"), (B_NAME, "step", "str")),
    "guard-shape": Misfit(put(FIRST_B, "guard", torch.zeros(2)), (B_NAME, "guard")),
    "exp_avg-list": Misfit(
        put(FIRST_B, "exp_avg", torch.Tensor.tolist), (B_NAME, "exp_avg", "list")
    ),
    "exp_avg-none": Misfit(put(FIRST_B, "exp_avg", None), (B_NAME, "exp_avg", "NoneType")),
    "exp_avg-complex": Misfit(
        put(FIRST_B, "exp_avg", lambda t: t.to(torch.complex64)), (B_NAME, "exp_avg", "complex64")
    ),
    "exp_avg-integer": Misfit(
        put(FIRST_B, "exp_avg", lambda t: t.to(torch.int64)), (B_NAME, "exp_avg", "int64")
    ),
    "state-of-a-factor-not-a-dict": Misfit(lambda s: s["state"].update({FIRST_B: 3}), (B_NAME,)),
    "plain-exp_avg-shape": Misfit(
        put(BIAS, "exp_avg", one_row), ("bias", "exp_avg", "(1,)", "(6,)")
    ),
    "plain-without-exp_avg_sq": Misfit(drop(BIAS, "exp_avg_sq"), ("bias", "exp_avg_sq")),
} | {
    f"no-{key}": Misfit(drop(FIRST_B, key), (B_NAME, key))
    for key in ("step", "exp_avg", "second_moment", "partner_basis", "guard")
}


@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "used"])
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=[f"row18-{name}" for name in MISFITS])
def test_misfit_is_refused_before_anything_changes(misfit, steps):
    run = make_run()
    take_steps(*run, range(2))
    saved = copy.deepcopy(run[1].state_dict())
    misfit.change(saved)
    kept = copy.deepcopy(saved)
    net, opt = make_run()
    take_steps(net, opt, range(steps))
    assert_refuses(lambda: opt.load_state_dict(saved), opt, ValueError, misfit.words)
    assert_same(leaves(kept), leaves(saved), "the refused checkpoint")
    # The refusal leaves no hook behind: the true checkpoint still loads and runs on.
    opt.load_state_dict(copy.deepcopy(run[1].state_dict()))
    net.load_state_dict(run[0].state_dict())
    take_step(*run, 2)
    take_step(net, opt, 2)
    assert_same(picture(run[1]), picture(opt), "after the refusal")


def test_row18_state_of_pairs_is_refused_by_an_optimizer_without_pairs():
    module = make_adapter(6, 5, 2, 1)
    opt = lk.LoFTAdamW(module)
    module.lora_B.grad, module.lora_A.grad = torch.ones(6, 2).double(), torch.ones(2, 5).double()
    opt.step()
    saved = opt.state_dict()
    with pytest.warns(UserWarning, match="carries no pairing"):
        plain = lk.LoFTAdamW([nn.Parameter(p.detach().clone()) for p in module.parameters()])
    assert_refuses(lambda: plain.load_state_dict(saved), plain, ValueError, ("exp_avg_sq",))


def test_row18_truncated_file_leaves_the_optimizer_as_it_was():
    net, opt = make_run()
    take_steps(net, opt, range(2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    before = picture(opt)
    for length in (10, len(file.getvalue()) // 2, len(file.getvalue()) - 10):
        with pytest.raises(Exception, match=r"(?i)zip|pickle|corrupt|archive|EOF|seek"):
            opt.load_state_dict(torch.load(io.BytesIO(file.getvalue()[:length]), weights_only=True))
    assert_same(before, picture(opt), "truncated file")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_row19_half_precision_state_is_raised_with_a_warning(dtype):
    """As older exporters or a careless `.half()` over a checkpoint leave it."""
    run = make_run()
    take_steps(*run, range(3))
    rounded, exact = copy.deepcopy(run[1].state_dict()), copy.deepcopy(run[1].state_dict())
    for k in range(4):
        for key in ("exp_avg", "second_moment", "partner_basis"):
            rounded["state"][k][key] = rounded["state"][k][key].to(dtype)
            exact["state"][k][key] = rounded["state"][k][key].float()
    runs = []
    for saved in (rounded, exact):
        net, opt = make_run()
        net.load_state_dict(run[0].state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.load_state_dict(saved)
        named = [w for w in caught if "raised to fp32" in str(w.message)]
        # One for each of three tensors of four factors; nothing where nothing was raised.
        assert len(named) == len(caught) == (12 if saved is rounded else 0)
        assert all(w.category is UserWarning and ".lora_" in str(w.message) for w in named)
        take_steps(net, opt, range(3, 6))
        runs.append(picture(opt))
    assert_same(*runs, "raised state")


def test_row18_unknown_entry_of_a_state_is_kept_with_a_warning():
    net, opt = make_run()
    take_steps(net, opt, range(3))
    expected = picture(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][FIRST_B]["note"] = torch.arange(3)
    with pytest.warns(UserWarning, match=r"unknown entry 'note'.*first\.lora_B"):
        opt.load_state_dict(saved)
    assert torch.equal(opt.state[net.first.lora_B]["note"], torch.arange(3))
    assert torch.equal(opt.state_dict()["state"][FIRST_B]["note"], torch.arange(3))
    del opt.state[net.first.lora_B]["note"]
    assert_same(expected, picture(opt), "the rest of the state")


def test_row18_unknown_part_of_a_checkpoint_is_named_in_a_warning():
    net, opt = make_run()
    take_steps(net, opt, range(3))
    expected = picture(opt)
    with pytest.warns(UserWarning, match=r"unknown entries \['epoch'\]"):
        opt.load_state_dict({**opt.state_dict(), "epoch": 3})
    assert_same(expected, picture(opt), "loaded")


def test_unknown_option_of_a_group_is_kept():
    """Trainers and schedulers leave their own keys (initial_lr, ...) in the groups."""
    net, opt = make_run()
    take_steps(net, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    in_groups(initial_lr=0.5)(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)
    assert all(group["initial_lr"] == 0.5 for group in opt.param_groups)
    assert all(group["initial_lr"] == 0.5 for group in opt.state_dict()["param_groups"])


def test_options_added_later_may_be_missing():
    """Checkpoints from before an option existed have its default."""
    run = make_run()
    take_steps(*run, range(3))
    saved = copy.deepcopy(run[1].state_dict())
    later = ("maximize", "damping", "alternate", "calibrate", "second_moment", "format")
    in_groups(**dict.fromkeys(later))(saved)
    net, opt = make_run()
    net.load_state_dict(run[0].state_dict())
    opt.load_state_dict(saved)
    expected = without_gradients(picture(run[1]))
    assert_same(expected, without_gradients(picture(opt)), "older checkpoint")
    take_step(*run, 3)
    take_step(net, opt, 3)
    assert_same(picture(run[1]), picture(opt), "older checkpoint, next step")
