"""LoFTAdamW as entries of PyTorch's own optimizer database, and the problems they are run on.

The parametrizer and the shared error inputs are PyTorch's (``torch.testing._internal``, which is
private and ships with the wheel); the bodies of the tests are ours, named after PyTorch's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import TinyLoRA
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import loft_kernels as lk

try:
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerInfo,
        OptimizerInput,
        _get_optim_inputs_including_global_cliquey_kwargs,
        get_error_inputs_for_all_optims,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase
except ImportError as error:
    pytest.skip(
        f"PyTorch {torch.__version__} has no such private test module ({error}): none of its "
        "optimizer behaviours are tested",
        allow_module_level=True,
    )

__all__ = [
    "ADAPTED",
    "BOTH",
    "NO_PAIRS",
    "PLAIN",
    "Behaviours",
    "all_inputs",
    "instantiate_device_type_tests",
    "make",
    "optims",
    "plain_problem",
    "report_ran",
    "train",
]

NO_PAIRS = "ignore:LoFTAdamW was given parameters without LoRA pairs"


class PlainLoFT(lk.LoFTAdamW):
    """The fallback path: a list of tensors, which must be torch's AdamW to the last bit."""


class AdaptedLoFT(lk.LoFTAdamW):
    """The same optimizer over a small adapted model."""


class Adapted(nn.Module):
    """A 10 x 5 weight as a LoRA pair of rank 2, and a bias."""

    def __init__(self, weight: Tensor, b: Tensor, a: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.proj = TinyLoRA(weight, b, a, scaling=2.0)
        # TinyLoRA's clones are dense, and some behaviours want other strides.
        self.proj.lora_B, self.proj.lora_A = nn.Parameter(b), nn.Parameter(a)
        self.bias = nn.Parameter(bias)

    @property
    def weight(self) -> Tensor:
        return self.proj.weight


@dataclass
class Problem:
    """What to train.

    Attributes:
        argument: what the optimizer's constructor takes.
        parameters: everything that is trained, factors of pairs first.
        groups: parameter groups, the weight's first and then the bias's.
        loss: returns the loss.
    """

    argument: Any
    parameters: list[nn.Parameter]
    groups: Callable[[], list[dict[str, Any]]]
    loss: Callable[[], Tensor]

    def closure(self, opt: torch.optim.Optimizer) -> Callable[[], Tensor]:
        """Return what `step` calls."""

        def evaluate() -> Tensor:
            opt.zero_grad()
            loss = self.loss()
            if loss.requires_grad:
                loss.backward()
            return loss

        return evaluate

    def set_gradients(self, seed: int) -> None:
        """Set gradients that do not depend on the parameters."""
        gen = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, contiguous: bool) -> Tensor:
    """Draw a matrix; not contiguous means every second entry of a larger one."""
    gen = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape, 2, generator=gen, dtype=torch.float64).to(dtype)
    return wide[..., 0].contiguous() if contiguous else wide[..., 0]


def plain_problem(dtype: torch.dtype = torch.float32, contiguous: bool = True) -> Problem:
    """PyTorch's problem: a weight and a bias in a list."""
    weight = nn.Parameter(draw((10, 5), 1, dtype, contiguous))
    bias = nn.Parameter(draw((10,), 2, dtype, contiguous))
    data = draw((5,), 3, dtype, True)
    return Problem(
        argument=[weight, bias],
        parameters=[weight, bias],
        groups=lambda: [{"params": [weight]}, {"params": [bias]}],
        loss=lambda: (weight.mv(data) + bias).pow(2).sum(),
    )


def adapted_problem(dtype: torch.dtype = torch.float32, contiguous: bool = True) -> Problem:
    """The same problem with a LoRA pair in the weight's place."""
    module = Adapted(
        draw((10, 5), 1, dtype, True),
        draw((10, 2), 4, dtype, contiguous),
        draw((2, 5), 5, dtype, contiguous),
        draw((10,), 2, dtype, contiguous),
    )
    data = draw((5,), 3, dtype, True)
    return Problem(
        argument=module,
        parameters=[module.proj.lora_B, module.proj.lora_A, module.bias],
        groups=lambda: lk.loft_param_groups(module),
        loss=lambda: (module.weight.mv(data) + module.bias).pow(2).sum(),
    )


PROBLEMS = {PlainLoFT: plain_problem, AdaptedLoFT: adapted_problem}


def make(
    optim_info: OptimizerInfo,
    dtype: torch.dtype = torch.float32,
    contiguous: bool = True,
    **kwargs: Any,
) -> tuple[Problem, lk.LoFTAdamW]:
    """Build an info's problem and its optimizer; equal arguments build equal problems."""
    problem = PROBLEMS[optim_info.optim_cls](dtype, contiguous)
    return problem, optim_info.optim_cls(problem.argument, **kwargs)


def train(
    problem: Problem, opt: torch.optim.Optimizer, steps: int, schedules: Sequence[Any] = ()
) -> None:
    """Take steps with closures, and the schedules' steps after them."""
    for _ in range(steps):
        loss = opt.step(problem.closure(opt))
        for schedule in schedules:
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(loss.detach())
            else:
                schedule.step()


COMMON = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "Tensor lr": {"lr": torch.tensor(0.001)},
}
LORA = {
    "simultaneous": {"alternate": False},
    "uncalibrated": {"calibrate": False},
    "diagonal": {"second_moment": "diagonal"},
    "clipped": {"max_grad_norm": 0.5},
}


def inputs_of(configs: dict[str, dict[str, Any]]) -> Callable[..., list[OptimizerInput]]:
    """Return the function that lists an info's configurations, as PyTorch expects it."""

    def optim_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        # In fp16 the default eps is 0, and PyTorch's own list takes 0.1 for that reason.
        extra = {"eps": 0.1} if dtype == torch.float16 else {}
        return [OptimizerInput(None, {**kw, **extra}, desc) for desc, kw in configs.items()]

    return optim_inputs


def all_inputs(optim_info: OptimizerInfo, dtype: torch.dtype) -> list[OptimizerInput]:
    """List all configurations of an info, through PyTorch's helper."""
    found = _get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, optim_info)
    extra = {"eps": 0.1} if dtype == torch.float16 else {}
    return [OptimizerInput(None, {**deepcopy(i.kwargs), **extra}, i.desc) for i in found]


OWN_ERRORS = {
    "lr should be >= 0": ({"lr": -1}, "Invalid learning rate: -1"),
    "beta1 should be between 0 and 1": (
        {"lr": 1e-2, "betas": (1.0, 0.0)},
        "Invalid beta parameter at index 0: 1.0",
    ),
    "beta2 should be between 0 and 1": (
        {"lr": 1e-2, "betas": (0.0, 1.0)},
        "Invalid beta parameter at index 1: 1.0",
    ),
    "eps should be >= 0": ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    "weight_decay should > 0": ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
}


def error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """List PyTorch's shared construction errors and AdamW's own."""
    own = [
        ErrorOptimizerInput(
            OptimizerInput(None, kwargs, desc), error_type=ValueError, error_regex=regex
        )
        for desc, (kwargs, regex) in OWN_ERRORS.items()
    ]
    return get_error_inputs_for_all_optims(device, dtype) + own


PLAIN = OptimizerInfo(
    PlainLoFT,
    optim_inputs_func=inputs_of(COMMON),
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    supports_complex=False,
    not_og_supported_flags=("maximize",),
)
ADAPTED = OptimizerInfo(
    AdaptedLoFT,
    optim_inputs_func=inputs_of(COMMON | LORA),
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    supports_complex=False,
    not_og_supported_flags=(
        "maximize",
        "damping",
        "alternate",
        "calibrate",
        "second_moment",
        "format",
    ),
)
BOTH = [PLAIN, ADAPTED]

# Behaviours that ran, by info: filled by the tests' set-up, so that skips do not count.
RAN: dict[str, set[str]] = {}


class Behaviours(TestCase):
    """Base class of the suites: notes what runs."""

    def setUp(self) -> None:
        super().setUp()
        for info in BOTH:
            behaviour, found, _ = self._testMethodName.partition(f"_{info.name}_")
            if found:
                RAN.setdefault(info.name, set()).add(behaviour)


def report_ran(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print how many behaviours ran on each info, visibly and not only under -s."""
    RAN.clear()
    yield
    counts = ", ".join(f"{len(found)} on {name}" for name, found in sorted(RAN.items()))
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stdout.write(f"\ntorch's optimizer behaviours in {request.path.name}: {counts}\n")
