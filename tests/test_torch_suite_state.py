"""PyTorch's optimizer behaviours on LoFTAdamW: state dicts and hooks.

One test per behaviour of test/test_optim.py that applies and needs no GPU, under its name there.
"""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_infos import (
    ADAPTED,
    BOTH,
    NO_PAIRS,
    PLAIN,
    Behaviours,
    all_inputs,
    instantiate_device_type_tests,
    make,
    optims,
    plain_problem,
    report_ran,
    train,
)
from runs import (
    assert_same,
    leaves,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    without_gradients,
)
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

pytestmark = pytest.mark.filterwarnings(NO_PAIRS)
ran = pytest.fixture(autouse=True, scope="module")(report_ran)


def copy_of(optim_info: Any, problem: Any, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    """Build a second problem with the first one's parameters and a fresh optimizer."""
    other, opt = make(optim_info, dtype, **kwargs)
    with torch.no_grad():
        for p, value in zip(other.parameters, problem.parameters, strict=True):
            p.copy_(value)
    return other, opt


def assert_continue_equally(first: tuple[Any, Any], second: tuple[Any, Any], what: str) -> None:
    """Check that two runs take the same next steps."""
    for _ in range(3):
        train(*first, 1)
        train(*second, 1)
        assert_same(*(without_gradients(picture(run[1])) for run in (first, second)), what)


class TestTorchSuiteState(Behaviours):
    """Bodies; `optim_info` says which form of the optimizer is tested."""

    @optims(BOTH)
    def test_state_dict_deterministic(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            problem, opt = make(optim_info, dtype, **deepcopy(case.kwargs))
            train(problem, opt, 5)
            other, other_opt = copy_of(optim_info, problem, dtype, **deepcopy(case.kwargs))
            saved = deepcopy(opt.state_dict())
            kept = leaves(deepcopy(saved))
            other_opt.load_state_dict(saved)
            assert_same(kept, leaves(saved), f"{case.desc}: the loaded dict")
            assert_same(leaves(opt.state_dict()), leaves(other_opt.state_dict()), case.desc)
            assert_continue_equally((problem, opt), (other, other_opt), case.desc)
            other_opt.param_groups.extend(other_opt.param_groups)
            mine, theirs = opt.state_dict(), other_opt.state_dict()
            last = (d["param_groups"][-1] for d in (mine, theirs))
            assert_same(*map(leaves, last), f"{case.desc}: repeated groups")

    @optims(BOTH)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            for flag in optim_info.not_og_supported_flags:
                if flag in case.kwargs and flag != "maximize":
                    continue  # no checkpoint from before an option used it
                problem, opt = make(optim_info, dtype, **deepcopy(case.kwargs))
                train(problem, opt, 2)
                saved = deepcopy(opt.state_dict())
                for group in saved["param_groups"]:
                    del group[flag]
                other, other_opt = copy_of(optim_info, problem, dtype, **deepcopy(case.kwargs))
                other_opt.load_state_dict(saved)
                if not case.kwargs.get("maximize"):
                    assert_continue_equally((problem, opt), (other, other_opt), case.desc)
                train(other, other_opt, 1)
                assert all(flag in group for group in other_opt.param_groups)

    @optims(BOTH)
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info):
        for named in (True, False):
            problem, opt = make(optim_info, dtype)
            names = [f"name{i}" for i in range(len(problem.parameters))]
            if optim_info is PLAIN and named:
                opt = optim_info.optim_cls(list(zip(names, problem.parameters, strict=True)))
            train(problem, opt, 2)
            saved = deepcopy(opt.state_dict())
            if optim_info is ADAPTED and not named:
                for group in saved["param_groups"]:
                    del group["param_names"]
            assert ("param_names" in saved["param_groups"][0]) == named
            other, other_opt = copy_of(optim_info, problem, dtype)
            if optim_info is PLAIN and not named:
                other_opt = optim_info.optim_cls(list(zip(names, other.parameters, strict=True)))
            own = deepcopy(other_opt.state_dict()["param_groups"][0].get("param_names"))
            other_opt.load_state_dict(saved)
            expected = own or saved["param_groups"][0].get("param_names")
            assert other_opt.state_dict()["param_groups"][0].get("param_names") == expected
            for _ in range(3):
                train(problem, opt, 1)
                train(other, other_opt, 1)
            for p, q in zip(problem.parameters, other.parameters, strict=True):
                assert torch.equal(p, q)
                assert_same(opt.state[p], other_opt.state[q], "state")

    @optims(BOTH, dtypes=[torch.float32, torch.bfloat16])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            problem, opt = make(optim_info, dtype, **deepcopy(case.kwargs))
            problem.set_gradients(1)
            opt.step()
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            assert_same(leaves(opt.state_dict()), leaves(saved), case.desc)
            other, other_opt = copy_of(optim_info, problem, dtype, **deepcopy(case.kwargs))
            other_opt.load_state_dict(saved)
            for step in range(3):
                for run in (problem, other):
                    run.set_gradients(step)
                opt.step()
                other_opt.step()
                assert_same(picture(opt), picture(other_opt), case.desc)

    @optims(BOTH)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            problem, opt = make(optim_info, dtype, **deepcopy(case.kwargs))
            train(problem, opt, 3)
            saved = deepcopy(opt.state_dict())
            for state in saved["state"].values():
                state["step"] = state["step"].item()
            other, other_opt = copy_of(optim_info, problem, dtype, **deepcopy(case.kwargs))
            other_opt.load_state_dict(saved)
            for p, q in zip(problem.parameters, other.parameters, strict=True):
                assert torch.is_tensor(other_opt.state[q]["step"])
                assert other_opt.state[q]["step"].dtype == opt.state[p]["step"].dtype
            assert_continue_equally((problem, opt), (other, other_opt), case.desc)

    @optims([PLAIN])
    def test_state_dict_is_interchangeable_with_adamw(self, device, dtype, optim_info):
        """A list of tensors may go over to torch's AdamW and back."""
        mine, theirs = plain_problem(dtype), plain_problem(dtype)
        opt = optim_info.optim_cls(mine.argument, weight_decay=0.1)
        other = torch.optim.AdamW(theirs.argument, weight_decay=0.1)
        train(mine, opt, 2)
        train(theirs, other, 2)
        first, second = deepcopy(opt.state_dict()), deepcopy(other.state_dict())
        opt.load_state_dict(second)
        other.load_state_dict(first)
        train(mine, opt, 2)
        train(theirs, other, 2)
        for p, q in zip(mine.parameters, theirs.parameters, strict=True):
            assert torch.equal(p, q)

    @optims(BOTH)
    def test_step_pre_hook(self, device, dtype, optim_info):
        problem, opt = make(optim_info, dtype)
        seen = []

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            seen.append((optimizer, len(args), sorted(kwargs)))

        handle = opt.register_step_pre_hook(hook)
        opt.step(problem.closure(opt))
        opt.step(closure=problem.closure(opt))
        handle.remove()
        opt.step(problem.closure(opt))
        assert seen == [(opt, 2, []), (opt, 1, ["closure"])]

    @optims(BOTH)
    def test_step_post_hook(self, device, dtype, optim_info):
        problem, opt = make(optim_info, dtype)
        seen = []
        before = problem.parameters[0].detach().clone()

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            seen.append(torch.equal(before, problem.parameters[0]))

        handle = opt.register_step_post_hook(hook)
        train(problem, opt, 2)
        handle.remove()
        train(problem, opt, 1)
        assert seen == [False, False]

    @optims(BOTH)
    def test_step_all_hooks(self, device, dtype, optim_info):
        problem, opt = make(optim_info, dtype)
        seen: list[str] = []

        def noting(name: str) -> Any:
            return lambda *_: seen.append(name)

        handles = [
            register_optimizer_step_pre_hook(noting("global pre")),
            register_optimizer_step_post_hook(noting("global post")),
            opt.register_step_pre_hook(noting("first pre")),
            opt.register_step_pre_hook(noting("second pre")),
            opt.register_step_post_hook(noting("post")),
        ]
        order = ["global pre", "first pre", "second pre", "post", "global post"]
        try:
            train(problem, opt, 2)
        finally:
            for handle in handles:
                handle.remove()
        assert seen == 2 * order
        train(problem, opt, 1)
        assert seen == 2 * order

    @optims(BOTH)
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        _problem, opt = make(optim_info, dtype)
        opt.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(note=1))
        assert opt.state_dict()["param_groups"][0]["note"] == 1

    @optims(BOTH)
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        _problem, opt = make(optim_info, dtype)
        opt.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(note=1))
        saved = opt.state_dict()
        assert saved["note"] == 1
        opt.register_state_dict_post_hook(lambda *_: {"other": 2})
        assert opt.state_dict() == {"other": 2}

    @optims(BOTH)
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        _problem, opt = make(optim_info, dtype)
        order: list[str] = []

        def changing(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            order.append("changing")
            changed = deepcopy(state_dict)
            for group in changed["param_groups"]:
                group["lr"] = 0.125
            return changed

        opt.register_load_state_dict_pre_hook(changing)
        opt.register_load_state_dict_pre_hook(lambda *_: order.append("first"), prepend=True)
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        assert order == ["first", "changing"]
        assert [group["lr"] for group in opt.param_groups] == [0.125] * len(opt.param_groups)
        assert saved["param_groups"][0]["lr"] == 1e-3

    @optims(BOTH)
    def test_load_state_dict_pre_hook_may_repair_a_checkpoint(self, device, dtype, optim_info):
        """What hooks make of a checkpoint is what gets checked, not what they were given."""
        problem, opt = make(optim_info, dtype)
        train(problem, opt, 2)
        saved = {"wrapped": deepcopy(opt.state_dict())}
        expected = picture(opt)
        with pytest.raises(ValueError, match=r"lacks \['param_groups', 'state'\]"):
            opt.load_state_dict(saved)
        opt.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
        opt.load_state_dict(saved)
        assert_same(expected, picture(opt), "repaired by the hook")

    @optims(BOTH)
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        problem, opt = make(optim_info, dtype)
        train(problem, opt, 2)
        seen = []
        opt.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
        opt.load_state_dict(deepcopy(opt.state_dict()))
        assert seen == [len(problem.parameters)]

    @optims(BOTH)
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        _problem, opt = make(optim_info, dtype)
        opt.register_load_state_dict_pre_hook(
            lambda _, given: {
                **given,
                "param_groups": [{**g, "lr": 0.5} for g in given["param_groups"]],
            }
        )

        def doubling(optimizer: Optimizer) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 2

        opt.register_load_state_dict_post_hook(doubling)
        opt.load_state_dict(deepcopy(opt.state_dict()))
        assert [group["lr"] for group in opt.param_groups] == [1.0] * len(opt.param_groups)


instantiate_device_type_tests(TestTorchSuiteState, globals(), only_for="cpu")
