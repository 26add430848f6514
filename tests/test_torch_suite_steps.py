"""PyTorch's optimizer behaviours on LoFTAdamW: what it equals, refuses and skips.

One test per behaviour of test/test_optim.py that applies and needs no GPU, under its name there.
"""

from __future__ import annotations

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
from runs import assert_same, one_thread, picture, without_gradients  # noqa: F401 - one_thread is an autouse fixture
from torch import nn

pytestmark = pytest.mark.filterwarnings(NO_PAIRS)
ran = pytest.fixture(autouse=True, scope="module")(report_ran)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TestTorchSuiteSteps(Behaviours):
    """Bodies; `optim_info` says which form of the optimizer is tested."""

    @optims([PLAIN], dtypes=FLOATS)
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        """Seven steps with freezing, missing gradients and an empty tensor equal AdamW's bits."""
        for case in all_inputs(optim_info, dtype):
            runs = []
            for cls in (torch.optim.AdamW, optim_info.optim_cls):
                problem = plain_problem(dtype)
                params = [*problem.parameters, nn.Parameter(torch.empty(0, dtype=dtype))]
                params.append(nn.Parameter(torch.ones((), dtype=dtype)))
                # torch's default is 0.01 and ours, for adapters, is 0.
                opt = cls(params, **{"weight_decay": 0.0, **deepcopy(case.kwargs)})
                problem.parameters = params
                for step in range(7):
                    problem.set_gradients(step)
                    params[0].requires_grad_(step != 3)
                    params[1].grad = None if step in (0, 5) else params[1].grad
                    params[0].grad = None if step == 3 else params[0].grad
                    opt.step()
                runs.append({f"{i}": p.detach() for i, p in enumerate(params)})
                runs[-1] |= {
                    f"{i}.{k}": v for i, p in enumerate(params) for k, v in opt.state[p].items()
                }
            assert_same(*runs, case.desc)

    @optims([ADAPTED], dtypes=FLOATS)
    def test_fused_matches_forloop_for_the_bias(self, device, dtype, optim_info):
        """Beside LoRA pairs, other tensors take AdamW's steps to the last bit."""
        for case in all_inputs(optim_info, dtype):
            kwargs = {k: v for k, v in case.kwargs.items() if k in ("lr", "weight_decay", "eps")}
            problem, opt = make(optim_info, dtype, **kwargs)
            bias = nn.Parameter(problem.parameters[-1].detach().clone())
            other = torch.optim.AdamW([bias], **{"weight_decay": 0.0, **kwargs})
            for step in range(7):
                problem.set_gradients(step)
                bias.grad = problem.parameters[-1].grad.clone()
                opt.step()
                other.step()
            assert torch.equal(bias, problem.parameters[-1]), case.desc
            assert_same(other.state[bias], opt.state[problem.parameters[-1]], case.desc)

    @optims(BOTH)
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        problem, _ = make(optim_info, dtype)
        module = nn.Module() if optim_info is PLAIN else problem.argument
        if optim_info is PLAIN:
            module.weight, module.bias = problem.parameters
        start = deepcopy(module.state_dict())
        # Keep the parameters' identities, so that the optimizer's references stay valid.
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            module.to("meta")
            opt = optim_info.optim_cls(
                list(module.parameters()) if optim_info is PLAIN else module, lr=0.1
            )
            for p in module.parameters():
                p.grad = torch.empty_like(p)
            with pytest.raises(RuntimeError, match="is on the meta device: call to_empty"):
                opt.step()
            opt.zero_grad()
            module.to_empty(device=device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
        module.load_state_dict(start)
        for _ in range(2):
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            opt.step()
        for name, p in module.named_parameters():
            assert not torch.equal(p, start[name]), name
            assert bool(p.isfinite().all()), name

    @optims(BOTH)
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info):
        for case in all_inputs(optim_info, dtype):
            for primed in (0, 1, 2):
                for scale in (None, torch.tensor(64.0)):
                    problem, opt = make(optim_info, dtype, **case.kwargs)
                    train(problem, opt, primed)
                    problem.set_gradients(9)
                    opt.grad_scale, opt.found_inf = scale, torch.ones(())
                    before = {k: v for k, v in picture(opt).items() if k != "nonfinite_steps"}
                    opt.step()
                    after = picture(opt)
                    assert int(after.pop("nonfinite_steps")) == 1
                    kept = after if primed else {k: after[k] for k in before}
                    assert_same(before, kept, case.desc)
                    for p in problem.parameters:
                        assert int(opt.state[p].get("step", 0)) == primed

    @optims(BOTH)
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        default = torch.get_default_dtype()
        for chosen in (torch.float64, torch.float16):
            problem, opt = make(optim_info, dtype)
            theirs = nn.Parameter(problem.parameters[-1].detach().clone())
            other = torch.optim.AdamW([theirs], weight_decay=0.0)
            torch.set_default_dtype(chosen)
            try:
                for step in range(3):
                    problem.set_gradients(step)
                    theirs.grad = problem.parameters[-1].grad.clone()
                    opt.step()
                    other.step()
            finally:
                torch.set_default_dtype(default)
            assert_same(other.state[theirs], opt.state[problem.parameters[-1]], str(chosen))
            for p in problem.parameters[:-1] if optim_info is ADAPTED else ():
                assert opt.state[p]["step"].dtype == torch.int64
                assert opt.state[p]["exp_avg"].dtype == dtype

    @optims(BOTH)
    def test_mixed_device_dtype(self, device, dtype, optim_info):
        """Parameters of all dtypes in one optimizer step as in optimizers of their own."""
        problems = [make(optim_info, d)[0] for d in FLOATS]
        alone = [make(optim_info, d, eps=0.1) for d in FLOATS]
        if optim_info is PLAIN:
            argument: Any = [p for problem in problems for p in problem.parameters]
        else:
            argument = nn.ModuleList([problem.argument for problem in problems])
        opt = optim_info.optim_cls(argument, eps=0.1)
        for step in range(4):
            for problem, (other, other_opt) in zip(problems, alone, strict=True):
                problem.set_gradients(step)
                other.set_gradients(step)
                other_opt.step()
            opt.step()
        for problem, (other, other_opt) in zip(problems, alone, strict=True):
            for p, q in zip(problem.parameters, other.parameters, strict=True):
                assert torch.equal(p, q), str(p.dtype)
                assert_same(other_opt.state[q], opt.state[p], str(p.dtype))

    @optims([PLAIN])
    def test_complex(self, device, dtype, optim_info):
        for start in (torch.randn(5, 5, dtype=torch.complex64), torch.ones(2).to(torch.complex64)):
            p = nn.Parameter(start)
            opt = optim_info.optim_cls([p])
            p.grad = torch.ones_like(p)
            with pytest.raises(TypeError, match="is complex"):
                opt.step()

    @optims(BOTH)
    def test_rosenbrock_sparse(self, device, dtype, optim_info):
        problem, opt = make(optim_info, dtype)
        train(problem, opt, 2)
        for p in problem.parameters:
            problem.set_gradients(1)
            p.grad = p.grad.to_sparse()
            before = picture(opt)
            with pytest.raises(RuntimeError, match="does not support sparse gradients"):
                opt.step()
            assert_same(before, picture(opt), "sparse gradient")

    @optims(BOTH)
    def test_grad_scaling_autocast_fused_optimizers(self, device, dtype, optim_info):
        """GradScaler and autocast: a scaled run equals the unscaled one; an inf step is skipped."""
        for case in all_inputs(optim_info, dtype):
            problem, opt = make(optim_info, dtype, **deepcopy(case.kwargs))
            scaled, scaled_opt = make(optim_info, dtype, **deepcopy(case.kwargs))
            scaler = torch.amp.GradScaler(device, init_scale=128.0, growth_interval=100)
            for step in range(4):
                for spoiled in (True, False) if step == 2 else (False,):
                    scaled_opt.zero_grad()
                    with torch.autocast(device, dtype=torch.bfloat16):
                        loss = scaled.loss()
                    scaler.scale(loss).backward()
                    if spoiled:
                        scaled.parameters[0].grad.view(-1)[0] = torch.inf
                    scaler.step(scaled_opt)
                    scaler.update()
                opt.zero_grad()
                with torch.autocast(device, dtype=torch.bfloat16):
                    loss = problem.loss()
                loss.backward()
                opt.step()
            assert scaler.get_scale() == 64.0
            assert_same(*(without_gradients(picture(o)) for o in (opt, scaled_opt)), case.desc)


instantiate_device_type_tests(TestTorchSuiteSteps, globals(), only_for="cpu")
