"""Bad inputs that `step` meets: it raises by name before the first write (rows 4-8, 16-20)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import make_adapter
from runs import (
    Net,
    assert_refuses,
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
)
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import loft_kernels as lk

Spoil = Callable[[Net, torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class Refusal:
    """What goes wrong before a step, the exact error and what the message must name."""

    spoil: Spoil
    error: type[Exception]
    words: tuple[str, ...]
    steps: tuple[int, ...] = (0, 3)  # steps taken before: fresh and used optimizers


def sparse(name: str) -> Spoil:
    """Give a parameter a sparse gradient."""

    def spoil(net: Net, _: Any) -> None:
        p = net.get_parameter(name)
        p.grad = p.grad.to_sparse()

    return spoil


def data(values: dict[str, torch.Tensor], with_grad: bool = True) -> Spoil:
    """Replace `p.data`; the gradient becomes one of the same shape, or stays."""

    def spoil(net: Net, _: Any) -> None:
        for name, value in values.items():
            p = net.get_parameter(name)
            stale = p.grad
            p.grad = None
            p.data = value.clone() if 0 not in value.stride() else value
            p.grad = torch.ones_like(p) if with_grad else None
            if not with_grad:
                stale_gradient(p, stale)

    return spoil


def stale_gradient(p: nn.Parameter, grad: torch.Tensor) -> None:
    """Attach a gradient of the shape that a parameter had before."""
    shaped, p.data = p.data, torch.empty_like(grad)
    p.grad = grad
    p.data = shaped


def view(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Replace `p.data` by a view of itself, which keeps its address."""

    def spoil(net: Net, _: Any) -> None:
        p = net.get_parameter(name)
        p.grad = None
        p.data = change(p.data)
        p.grad = torch.ones_like(p)

    return spoil


def in_group(**options: Any) -> Spoil:
    return lambda net, opt: opt.param_groups[0].update(options)


def rescale(value: float) -> Spoil:
    def spoil(net: Net, _: Any) -> None:
        net.second.scaling = value

    return spoil


def flatten(net: Net, opt: torch.optim.Optimizer) -> None:
    """Replace a parameter list as DeepSpeed ZeRO does."""
    group = opt.param_groups[0]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
    flat.grad = torch.ones_like(flat)
    group["params"] = [flat]


def to_integer(net: Net, _: Any) -> None:
    net.bias.grad = None
    net.bias.requires_grad_(False)
    net.bias.data = net.bias.data.to(torch.int64)
    net.bias.grad = torch.ones_like(net.bias)


ones = torch.ones
REFUSALS = {
    "row07-sparse-gradient-of-b": Refusal(
        sparse("first.lora_B"), RuntimeError, ("first.lora_B", "sparse", "sparse=False")
    ),
    "row07-sparse-gradient-of-a": Refusal(
        sparse("second.lora_A"), RuntimeError, ("second.lora_A", "sparse", "sparse=False")
    ),
    "row07-sparse-gradient-of-plain": Refusal(sparse("bias"), RuntimeError, ("bias", "sparse")),
    "row07-complex-factor": Refusal(
        data({"first.lora_B": ones(6, 2, dtype=torch.complex64)}),
        TypeError,
        ("first.lora_B", "complex"),
    ),
    "row07-complex-plain": Refusal(
        data({"bias": ones(6, dtype=torch.complex64)}), TypeError, ("bias", "complex")
    ),
    "row07-integer-plain": Refusal(to_integer, TypeError, ("bias", "torch.int64")),
    "row08-rank-zero": Refusal(
        data({"first.lora_B": ones(6, 0), "first.lora_A": ones(0, 5)}),
        ValueError,
        ("first.lora_A", "rank 0"),
    ),
    "row16-expanded-parameter": Refusal(
        data({"first.lora_A": ones(1, 5).expand(2, 5)}),
        ValueError,
        ("first.lora_A", "expanded", "clone()"),
    ),
    "row16-parameter-expanded-in-place": Refusal(
        view("first.lora_A", lambda t: t[:1].expand(2, 5)),
        ValueError,
        ("first.lora_A", "expanded", "clone()"),
    ),
    "row17-fewer-rows-in-place": Refusal(
        view("first.lora_B", lambda t: t[:3]),
        RuntimeError,
        ("first.lora_B", "(3, 2)", "(6, 2)", "optimizer.state"),
        steps=(3,),
    ),
    "row17-other-rows": Refusal(
        data({"first.lora_B": ones(3, 2)}),
        RuntimeError,
        ("first.lora_B", "(3, 2)", "(6, 2)", "optimizer.state"),
        steps=(3,),
    ),
    "row17-partner-of-other-rows": Refusal(
        data({"first.lora_A": ones(2, 9)}),
        RuntimeError,
        ("first.lora_", "(9, 2)", "(5, 2)", "optimizer.state"),
        steps=(3,),
    ),
    "row17-other-rank": Refusal(
        data({"first.lora_B": ones(6, 3), "first.lora_A": ones(3, 5)}),
        RuntimeError,
        ("first.lora_B", "(6, 2)", "(6, 3)"),
        steps=(3,),
    ),
    "row17-ranks-differ": Refusal(
        data({"first.lora_B": ones(6, 3)}),
        ValueError,
        ("first.lora_B", "first.lora_A", "(6, 3)", "(2, 5)"),
    ),
    "row17-gradient-of-the-old-shape": Refusal(
        data({"first.lora_B": ones(3, 2)}, with_grad=False),
        RuntimeError,
        ("first.lora_B", "(3, 2)", "(6, 2)"),
    ),
    "row17-one-dimensional": Refusal(
        data({"first.lora_B": ones(12)}), ValueError, ("first.lora_B", "(12,)", "matrix")
    ),
    "row17-plain-of-other-shape": Refusal(
        data({"bias": ones(3)}), RuntimeError, ("bias", "(3,)", "(6,)"), steps=(3,)
    ),
    "row17-other-second-moment": Refusal(
        in_group(second_moment="diagonal"), RuntimeError, ("first.lora_B", "(6, 3)"), steps=(3,)
    ),
    "row17-other-calibrate": Refusal(
        in_group(calibrate=False), RuntimeError, ("first.lora_B", "partner_cholesky"), steps=(3,)
    ),
    "row20-scaling-zero": Refusal(rescale(0.0), ValueError, ("scaling 0.0", "second")),
    "row20-scaling-infinite": Refusal(rescale(float("inf")), ValueError, ("scaling inf", "second")),
    "row20-flattened-list": Refusal(flatten, RuntimeError, ("DeepSpeed", "use DDP")),
}


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        pytest.param(case, steps, id=f"{name}-after{steps}")
        for name, case in REFUSALS.items()
        for steps in case.steps
    ],
)
def test_step_is_refused_before_the_first_write(case, steps):
    net = Net()
    opt = lk.LoFTAdamW(net, lr=1e-2)
    take_steps(net, opt, range(steps))
    net.set_gradients(steps)
    case.spoil(net, opt)
    assert_refuses(opt.step, opt, case.error, case.words)


@pytest.mark.parametrize("steps", [0, 3], ids="after{}".format)
def test_row07_healthy_run_goes_on_after_a_refused_step(steps):
    runs = []
    for refused in (False, True):
        net = Net()
        opt = lk.LoFTAdamW(net, lr=1e-2)
        take_steps(net, opt, range(steps))
        if refused:
            net.set_gradients(50)
            sparse("bias")(net, opt)
            with pytest.raises(RuntimeError, match="sparse"):
                opt.step()
        take_steps(net, opt, range(steps, steps + 3))
        runs.append(picture(opt))
    assert_same(*runs, "after a refused step")


def test_row04_groups_that_part_ways_in_mid_run_are_refused():
    module = make_adapter(4, 3, 2, 1)
    named = dict(module.named_parameters())
    opt = lk.LoFTAdamW(
        [{"params": [(n, named[n])], "scaling": 1.0} for n in ("lora_B", "lora_A")], lr=1e-2
    )
    for _ in range(2):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    opt.param_groups[1]["betas"] = (0.5, 0.9)
    assert_refuses(opt.step, opt, ValueError, ("different options", "only lr may differ"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_row17_plain_parameter_of_another_dtype_is_followed_or_refused_whole(dtype):
    """torch's AdamW refuses state of another dtype; then the pairs must not have moved either."""
    net = Net()
    opt = lk.LoFTAdamW(net, lr=1e-2)
    take_steps(net, opt, range(2))
    net.bias.grad = None
    net.bias.data = net.bias.data.to(dtype)
    net.set_gradients(2)
    before = picture(opt)
    try:
        opt.step()
    except RuntimeError:
        assert_same(before, picture(opt), "a refused step")
    else:
        assert not torch.equal(before["bias"], net.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("steps", [0, 3], ids="after{}".format)
def test_row17_same_shape_at_another_address_is_followed(steps, dtype):
    runs = []
    for swap in (False, True):
        net = Net(dtype)
        opt = lk.LoFTAdamW(net, lr=1e-2)
        take_steps(net, opt, range(steps))
        if swap:
            for p in net.parameters():
                p.data = p.data.clone()
        take_steps(net, opt, range(steps, steps + 3))
        runs.append(picture(opt))
    assert_same(*runs, "moved parameters")


def test_row20_meta_model_trains_after_to_empty():
    net = Net().to("meta")
    opt = lk.LoFTAdamW(net, lr=1e-2)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    assert_refuses(opt.step, opt, RuntimeError, ("first.lora_B", "to_empty()"))
    real = Net()
    net.to_empty(device="cpu")
    net.load_state_dict(real.state_dict())
    # to_empty() makes new parameters unless torch.__future__ says otherwise, as for any optimizer.
    runs = [(real, lk.LoFTAdamW(real, lr=1e-2)), (net, lk.LoFTAdamW(net, lr=1e-2))]
    for run in runs:
        take_steps(*run, range(3))
    assert_same(*(picture(opt) for _, opt in runs), "after to_empty()")


@pytest.fixture
def one_process_mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_row20_sharded_factor_is_refused_by_its_type(one_process_mesh):
    net = Net()
    opt = lk.LoFTAdamW(net)
    take_step(net, opt, 0)
    shard = DTensor.from_local(net.first.lora_B.detach().clone(), one_process_mesh, [Shard(0)])
    net.first.lora_B = nn.Parameter(shard)
    with pytest.raises(NotImplementedError, match=r"first\.lora_B is a DTensor.*use DDP"):
        lk.LoFTAdamW(net)
    opt.param_groups[0]["params"][0] = net.first.lora_B  # as FSDP2 swaps them under an optimizer
    words = ("first.lora_B", "DTensor", "fully_shard", "DDP")
    assert_refuses(opt.step, opt, NotImplementedError, words)
