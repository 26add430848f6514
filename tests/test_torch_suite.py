"""PyTorch's optimizer behaviours on LoFTAdamW: construction and steps.

One test per behaviour of test/test_optim.py that applies, under its name there. Those that need a
GPU are not here: peak memory, CPU = CUDA, 2^32 elements, CPU state into CUDA, graph capture.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from optim_infos import (
    ADAPTED,
    BOTH,
    NO_PAIRS,
    Behaviours,
    all_inputs,
    instantiate_device_type_tests,
    make,
    optims,
    report_ran,
    train,
)
from runs import assert_same, one_thread, picture  # noqa: F401 - one_thread is an autouse fixture
from torch import Tensor
from torch.optim import lr_scheduler as schedules

pytestmark = pytest.mark.filterwarnings(NO_PAIRS)
ran = pytest.fixture(autouse=True, scope="module")(report_ran)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCHEDULERS = {
    "none": [],
    "step": [lambda opt: schedules.StepLR(opt, gamma=0.9, step_size=10)],
    "plateau": [schedules.ReduceLROnPlateau],
    "chain": [
        lambda opt: schedules.StepLR(opt, gamma=0.99, step_size=10),
        lambda opt: schedules.ExponentialLR(opt, gamma=0.99),
        schedules.ReduceLROnPlateau,
    ],
    # Moves beta1 as well.
    "one-cycle": [lambda opt: schedules.OneCycleLR(opt, max_lr=1e-2, total_steps=40)],
    "warm-up": [
        lambda opt: schedules.SequentialLR(
            opt,
            [schedules.ConstantLR(opt, 0.4, 2), schedules.PolynomialLR(opt, 40, 0.9)],
            milestones=[3],
        )
    ],
}


class TestTorchSuite(Behaviours):
    """Bodies; `optim_info` says which form of the optimizer is tested."""

    @optims(BOTH)
    def test_errors(self, device, dtype, optim_info):
        cases = optim_info.optim_error_inputs_func(device, dtype)
        assert len(cases) >= 11
        for case in cases:
            given = case.optimizer_error_input
            argument = make(optim_info, dtype)[0].argument
            params = argument if given.params is None else given.params
            catch = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
            with catch(case.error_type, match=case.error_regex):
                optim_info.optim_cls(params, **given.kwargs)

    @optims(BOTH)
    def test_global_cliquey_flags_are_not_offered(self, device, dtype, optim_info):
        problem, _ = make(optim_info, dtype)
        for flag in ("foreach", "fused", "differentiable", "capturable", "amsgrad"):
            with pytest.raises(TypeError, match=flag):
                optim_info.optim_cls(problem.argument, **{flag: True})

    @optims(BOTH)
    def test_forloop_goes_right_direction(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            for contiguous in (True, False):
                for name, makers in SCHEDULERS.items():
                    problem, opt = make(optim_info, dtype, contiguous, **deepcopy(case.kwargs))
                    before = problem.loss().item()
                    train(problem, opt, 20, [m(opt) for m in makers])
                    after = problem.loss().item()
                    rose = case.kwargs.get("maximize", False)
                    what = f"{case.desc}, {name}, contiguous={contiguous}: {before} to {after}"
                    assert after > before if rose else after < before, what

    @optims(BOTH)
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for name, makers in SCHEDULERS.items():
            problem, _ = make(optim_info, dtype)
            weight, bias = problem.groups()
            opt = optim_info.optim_cls([weight, {**bias, "lr": 0.01}], lr=0.001)
            before = problem.loss().item()
            train(problem, opt, 20, [m(opt) for m in makers])
            assert problem.loss().item() < before, name

    @optims(BOTH)
    def test_tensor_lr(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            kwargs = {k: v for k, v in case.kwargs.items() if k != "lr"}
            runs = []
            for lr in (0.001, torch.tensor(0.001), torch.tensor([[0.001]])):
                problem, opt = make(optim_info, dtype, lr=lr, **kwargs)
                train(problem, opt, 5)
                # torch's AdamW rounds a tensor lr otherwise than a float; LoRA pairs do not.
                factors = problem.parameters[:-1] if optim_info is ADAPTED else []
                runs.append([p.detach().clone() for p in factors or problem.parameters])
                torch.testing.assert_close(runs[0], runs[-1])
                if factors:
                    for a, b in zip(runs[0], runs[-1], strict=True):
                        assert torch.equal(a, b), case.desc

    @optims(BOTH)
    def test_param_groups_lr(self, device, dtype, optim_info):
        for still in (0, 1):
            problem, _ = make(optim_info, dtype)
            groups = problem.groups()
            groups[still]["lr"] = 1e-28
            opt = optim_info.optim_cls(groups, lr=0.01)
            start = [[p.detach().clone() for p in g["params"]] for g in opt.param_groups]
            before = problem.loss().item()
            train(problem, opt, 20)
            assert problem.loss().item() < before
            for index, (group, old) in enumerate(zip(opt.param_groups, start, strict=True)):
                for p, value in zip(group["params"], old, strict=True):
                    assert torch.equal(p, value) == (index == still)

    @optims(BOTH)
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        problem, _ = make(optim_info, dtype)
        groups = problem.groups()
        groups[0]["weight_decay"] = 0.1
        opt = optim_info.optim_cls(groups, lr=0.01)
        start = [[p.detach().clone() for p in g["params"]] for g in opt.param_groups]
        for p in problem.parameters:
            p.grad = torch.zeros_like(p)
        opt.step()
        opt.step()
        # A factor decays when it moves, which is at every second step.
        times = 1 if optim_info is ADAPTED else 2
        for p, value in zip(opt.param_groups[0]["params"], start[0], strict=True):
            torch.testing.assert_close(p.detach(), value * (1 - 0.01 * 0.1) ** times)
        assert torch.equal(opt.param_groups[1]["params"][0], start[1][0])

    @optims(BOTH)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            _, opt = make(optim_info, dtype, **case.kwargs)
            before = picture(opt)
            assert opt.step() is None
            assert_same(before, picture(opt), case.desc)

    @optims(BOTH)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            if case.kwargs.get("weight_decay"):
                continue
            problem, opt = make(optim_info, dtype, **case.kwargs)
            before = [p.detach().clone() for p in problem.parameters]
            for _ in range(2):
                for p in problem.parameters:
                    p.grad = torch.zeros_like(p)
                opt.step()
            for p, value in zip(problem.parameters, before, strict=True):
                assert torch.equal(p, value), case.desc

    @optims(BOTH)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            _, opt = make(optim_info, dtype, **case.kwargs)
            text = repr(opt)
            assert optim_info.name in text
            assert "weight_decay" in text

    @optims(BOTH)
    def test_non_empty_state(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            problem, opt = make(optim_info, dtype, **case.kwargs)
            train(problem, opt, 1)
            for p in problem.parameters:
                assert "step" in opt.state[p]
                assert all(isinstance(v, Tensor) for v in opt.state[p].values())

    @optims(BOTH)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(opt: torch.optim.Optimizer) -> set[str]:
            return {k for k in opt.__dict__ if not k.startswith("_")}

        for case in all_inputs(optim_info, dtype):
            problem, opt = make(optim_info, dtype, **case.kwargs)
            assert public(opt) == public(deepcopy(opt))
            train(problem, opt, 2)
            assert public(opt) == public(deepcopy(opt))


instantiate_device_type_tests(TestTorchSuite, globals(), only_for="cpu")
