"""Bad inputs that no optimizer can be built from: rows 1-4, 7, 8, 16 and 20 of the table.

The table of twenty bad inputs and their outcomes is spread over test_bad_inputs*.py (rows 18 and
19: test_state_refused.py); every id begins with the number of its row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from problems import TinyLoRA
from runs import (
    Net,
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_steps,
)
from torch import Tensor, nn

import loft_kernels as lk


def parameter(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **options))


class Layer(nn.Module):
    """A LoRA layer of any tensors."""

    def __init__(self, b: Any, a: Any, scaling: float = 1.0) -> None:
        super().__init__()
        self.scaling = scaling
        if b is not None:
            self.lora_B = b
        if a is not None:
            self.lora_A = a


def model(b: Any, a: Any, scaling: float = 1.0) -> nn.ModuleDict:
    """A healthy pair "good" and a layer "bad" of any tensors."""
    good = TinyLoRA(torch.zeros(4, 3), torch.ones(4, 2), torch.ones(2, 3))
    return nn.ModuleDict({"good": good, "bad": Layer(b, a, scaling)})


def build(module: nn.Module | Callable[[], Any], **options: Any) -> Callable[[], Any]:
    """Return the call that builds an optimizer."""
    return lambda: lk.LoFTAdamW(module if isinstance(module, nn.Module) else module(), **options)


def flat_scaled(*named: tuple[str, Tensor], **options: Any) -> list[dict[str, Any]]:
    """Return one named group with a scaling."""
    return [{"params": list(named), "scaling": 1.0, **options}]


def two_groups(**options: Any) -> list[dict[str, Any]]:
    """Put B and A in two groups that differ in these options."""
    a = [("q.lora_A", parameter(2, 3))]
    return [*flat_scaled(("q.lora_B", parameter(4, 2))), *flat_scaled(*a, **options)]


@dataclass(frozen=True)
class Refusal:
    """A call, its exact error and what the message must name."""

    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...] = field(default=())


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "lr-negative": ({"lr": -1}, "Invalid learning rate: -1"),
    "lr-nan": ({"lr": math.nan}, "Invalid learning rate: nan"),
    "lr-two-elements": ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element"),
    "lr-tensor-negative": ({"lr": torch.tensor(-1.0)}, "Invalid learning rate: -1"),
    "lr-tensor-nan": ({"lr": torch.tensor(math.nan)}, "Invalid learning rate: nan"),
    "beta1-one": ({"betas": (1.0, 0.999)}, "Invalid beta parameter at index 0: 1.0"),
    "beta1-negative": ({"betas": (-0.1, 0.999)}, "Invalid beta parameter at index 0: -0.1"),
    "beta2-one": ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    "beta2-nan": ({"betas": (0.9, math.nan)}, "Invalid beta parameter at index 1: nan"),
    "betas-three": ({"betas": (0.9, 0.99, 0.999)}, "betas"),
    "betas-one": ({"betas": (0.9,)}, "betas"),
    "eps-negative": ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    "eps-nan": ({"eps": math.nan}, "Invalid epsilon value: nan"),
    "weight-decay-negative": ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    "damping-negative": ({"damping": -1.0}, "Invalid damping value: -1.0"),
    "clip-norm-zero": ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0"),
    "clip-norm-nan": ({"max_grad_norm": math.nan}, "Invalid max_grad_norm: nan"),
    "backend-unknown": ({"backend": "metal"}, "Invalid backend: 'metal': known are auto"),
    "precision-unknown": (
        {"precision": "fp4"},
        "Invalid precision: 'fp4': known are default, ieee",
    ),
    "second-moment-unknown": ({"second_moment": "none"}, "known are 'full', 'diagonal'"),
    "on-unsupported-unknown": ({"on_unsupported": "skip"}, "known are error, adamw"),
}


@pytest.mark.filterwarnings("ignore:LoFTAdamW was given parameters without LoRA pairs")
@pytest.mark.parametrize("form", ["module", "list"])
@pytest.mark.parametrize(
    ("options", "words"), ARGUMENTS.values(), ids=[f"row01-{name}" for name in ARGUMENTS]
)
def test_invalid_argument_is_refused(options, words, form):
    net = Net()
    params = net if form == "module" else list(net.parameters())
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"Invalid|Tensor lr|betas") as raised:
        lk.LoFTAdamW(params, **options)
    assert type(raised.value) is ValueError
    assert words in str(raised.value)
    assert_same(before, dict(net.named_parameters()), "parameters")


GROUP_OPTIONS = {
    "lr": ({"lr": -1}, "Invalid learning rate: -1"),
    "eps": ({"eps": -1}, "Invalid epsilon value: -1"),
    "betas": ({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
    "weight_decay": ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    "second_moment": ({"second_moment": "none"}, "known are 'full', 'diagonal'"),
}


@pytest.mark.parametrize(
    ("options", "words"), GROUP_OPTIONS.values(), ids=[f"row01-group-{n}" for n in GROUP_OPTIONS]
)
def test_invalid_option_of_a_group_is_refused(options, words):
    net = Net()
    with pytest.raises(ValueError, match="Invalid") as raised:
        lk.LoFTAdamW(lk.loft_param_groups(net, **options))
    assert words in str(raised.value)
    opt = lk.LoFTAdamW(net)
    take_steps(net, opt, range(2))
    before = picture(opt)
    with pytest.raises(ValueError, match="Invalid") as raised:
        opt.add_param_group({"params": [("extra", parameter(3))], **options})
    assert words in str(raised.value)
    assert_same(before, picture(opt), "the refused group")


def frozen_net() -> Net:
    return Net().requires_grad_(False)


def tied_a() -> nn.ModuleDict:
    shared = parameter(2, 3)
    return nn.ModuleDict({"q": Layer(parameter(4, 2), shared), "v": Layer(parameter(5, 2), shared)})


def duplicate_across_groups() -> list[dict[str, Any]]:
    shared = parameter(4, 2)
    return [{"params": [shared]}, {"params": [shared, parameter(2, 3)]}]


def mixed_names() -> list[Any]:
    return [("q.lora_B", parameter(4, 2)), parameter(2, 3)]


def experts() -> nn.ModuleDict:
    bad = model(parameter(4, 6), parameter(6, 3))
    bad["bad"].num_experts = 3
    return bad


def integer_a() -> nn.ModuleDict:
    ints = nn.Parameter(torch.ones(2, 3, dtype=torch.int32), requires_grad=False)
    return model(parameter(4, 2), ints)


BAD = ("bad.lora_B", "bad.lora_A")
REFUSALS = {
    "row02-empty-list": Refusal(
        build(lambda: []), ValueError, ("optimizer got an empty parameter list",)
    ),
    "row02-no-adapters": Refusal(
        build(nn.Linear(3, 3)),
        ValueError,
        ("no trainable LoRA pair in Linear", "lora_A", "lora_B", "torch.optim.AdamW"),
    ),
    "row02-frozen-adapters": Refusal(
        build(frozen_net()),
        ValueError,
        ("4 lora_A/lora_B", "none is trainable", "is_trainable=True"),
    ),
    "row03-a-without-b": Refusal(
        build(model(None, parameter(2, 3))),
        ValueError,
        ("bad.lora_A", "(2, 3)", "no partner bad.lora_B", "on_unsupported='adamw'"),
    ),
    "row03-b-without-a": Refusal(
        build(model(parameter(4, 2), None)),
        ValueError,
        ("bad.lora_B", "(4, 2)", "no partner bad.lora_A", "on_unsupported='adamw'"),
    ),
    "row03-ranks-differ": Refusal(
        build(model(parameter(4, 2), parameter(3, 5))),
        ValueError,
        (*BAD, "(4, 2)", "(3, 5)", "[m, r]", "[r, n]"),
    ),
    "row03-b-transposed": Refusal(
        build(model(parameter(2, 4), parameter(2, 3))), ValueError, (*BAD, "(2, 4)", "(2, 3)")
    ),
    "row03-b-one-dimensional": Refusal(
        build(model(parameter(8), parameter(2, 3))), ValueError, ("bad.lora_B", "(8,)", "matrix")
    ),
    "row03-names-without-partner": Refusal(
        build(lambda: flat_scaled(("q.lora_A", parameter(2, 3)))),
        ValueError,
        ("q.lora_A", "(2, 3)", "no partner q.lora_B"),
    ),
    "row03-names-ranks-differ": Refusal(
        build(lambda: flat_scaled(("q.lora_A", parameter(2, 3)), ("q.lora_B", parameter(4, 3)))),
        ValueError,
        ("q.lora_A", "q.lora_B", "(2, 3)", "(4, 3)"),
    ),
    "row03-names-without-scaling": Refusal(
        build(lambda: [("q.lora_A", parameter(2, 3)), ("q.lora_B", parameter(4, 2))]),
        ValueError,
        ("q.lora_A", "q.lora_B", "alpha/r", "'scaling'"),
    ),
    "row03-scaling-zero": Refusal(
        build(model(parameter(4, 2), parameter(2, 3), scaling=0.0)), ValueError, ("scaling 0.0",)
    ),
    "row03-scaling-nan": Refusal(
        build(model(parameter(4, 2), parameter(2, 3), math.nan)), ValueError, ("scaling nan",)
    ),
    "row04-tied-a": Refusal(build(tied_a()), ValueError, ("q.lora_A", "share memory", "Untie")),
    "row04-duplicate-across-groups": Refusal(
        build(duplicate_across_groups),
        ValueError,
        ("some parameters appear in more than one parameter group",),
    ),
    "row04-half-named": Refusal(build(mixed_names), ValueError, ("with/without names",)),
    "row07-complex-factor": Refusal(
        build(model(parameter(4, 2, dtype=torch.complex64), parameter(2, 3))),
        TypeError,
        ("bad.lora_B", "complex"),
    ),
    "row07-integer-factor": Refusal(build(integer_a()), TypeError, ("bad.lora_A", "torch.int32")),
    "row08-rank-zero": Refusal(
        build(model(parameter(4, 0), parameter(0, 3))), ValueError, ("bad.lora_A", "rank 0", ">= 1")
    ),
    "row16-expanded-parameter": Refusal(
        build(model(nn.Parameter(torch.ones(1, 2).expand(4, 2)), parameter(2, 3))),
        ValueError,
        ("bad.lora_B", "expanded", "clone()"),
    ),
    "row20-flattened-factors": Refusal(
        build(model(parameter(8), parameter(6))), ValueError, ("bad.lora_B", "FSDP", "use DDP")
    ),
    "row20-interleaved-experts": Refusal(
        build(experts()), NotImplementedError, ("bad.lora_B", "3 experts", "on_unsupported='adamw'")
    ),
    "row20-factory-without-module": Refusal(
        lambda: lk.create_loft_optimizer([parameter(3)], lr=1e-3), TypeError, ("module", "list")
    ),
}
for _option, _value in {
    "betas": (0.8, 0.9),
    "eps": 1e-3,
    "weight_decay": 0.3,
    "maximize": True,
    "damping": 0.1,
    "alternate": False,
    "calibrate": False,
    "second_moment": "diagonal",
}.items():
    REFUSALS[f"row04-groups-differ-in-{_option}"] = Refusal(
        build(lambda o=_option, v=_value: two_groups(**{o: v})),
        ValueError,
        ("q", "different options", "only lr may differ"),
    )


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_input_is_refused_at_construction(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning on the way would be a second opinion
        with pytest.raises(case.error) as raised:
            case.call()
    assert type(raised.value) is case.error
    missing = [w for w in case.words if w not in str(raised.value)]
    assert not missing, f"{missing} not in {raised.value}"


def test_row02_list_of_tensors_is_adamw_with_one_warning():
    with pytest.warns(UserWarning, match="carries no pairing: pass the model itself") as caught:
        lk.LoFTAdamW([parameter(3), parameter(2, 2)])
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:LoFTAdamW was given parameters without LoRA pairs")
@pytest.mark.parametrize("form", ["module", "list"])
def test_row02_empty_group_added_later_changes_nothing(form):
    runs = []
    for extra in (False, True):
        net = Net()
        opt = lk.LoFTAdamW(net if form == "module" else list(net.parameters()), lr=1e-2)
        groups = len(opt.param_groups)
        take_steps(net, opt, range(2))
        if extra:
            # torch wants either all groups named or none; an empty list has no names to show.
            opt.add_param_group({"params": []} | ({"param_names": []} if form == "module" else {}))
        take_steps(net, opt, range(2, 4))
        seen = picture(opt)
        runs.append({k: v for k, v in seen.items() if not k.startswith(f"groups[{groups}]")})
    assert_same(*runs, "with an empty group")


def test_row04_learning_rates_of_the_factors_may_differ():
    opt = lk.LoFTAdamW(two_groups(lr=0.5))
    b, a = (group["params"][0] for group in opt.param_groups)
    for _ in range(2):
        b.grad, a.grad = torch.ones(4, 2), torch.ones(2, 3)
        opt.step()
    # Per unit of the learning rate (0.5 for A, 1e-3 for B) the steps are alike in size.
    assert float((a.detach() - 1).norm()) > 0.1
    assert float((b.detach() - 1).norm()) < 0.01


UNPAIRED_GROUPS = {
    "row03-unpaired": flat_scaled(("x.lora_A", parameter(2, 3)))[0],
    "row03-no-scaling": {"params": [("x.lora_A", parameter(2, 3)), ("x.lora_B", parameter(4, 2))]},
    "row03-ranks-differ": flat_scaled(("x.lora_A", parameter(2, 3)), ("x.lora_B", parameter(4, 3)))[
        0
    ],
}


@pytest.mark.parametrize("group", UNPAIRED_GROUPS.values(), ids=UNPAIRED_GROUPS)
def test_refused_group_is_not_added(group):
    """A caller who catches the error must not train the refused factors with plain AdamW."""
    net = Net()
    opt = lk.LoFTAdamW(net, lr=1e-2)
    take_steps(net, opt, range(2))
    before = picture(opt)
    with pytest.raises(ValueError, match=r"x\.lora_A"):
        opt.add_param_group(group)
    assert_same(before, picture(opt), "after the refused group")
    opt.add_param_group({"params": [("y", parameter(3))]})
    take_steps(net, opt, range(2, 4))


def test_row20_unsupported_factors_train_with_adamw_on_request():
    bad = model(None, parameter(2, 3))
    with pytest.warns(
        UserWarning, match=r"1 LoRA factors train with plain AdamW.*bad\.lora_A"
    ) as w:
        opt = lk.LoFTAdamW(bad, on_unsupported="adamw")
    assert len(w) == 1
    for p in bad.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert set(opt.state[bad["bad"].lora_A]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "second_moment" in opt.state[bad["good"].lora_A]
