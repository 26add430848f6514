"""DeepSpeed: stage 0 is LoFT, bit for bit, and what stands in its way is named."""

from __future__ import annotations

import re
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from runs import (
    Net,
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
)
from torch import nn

import loft_kernels as lk

CLIPPED = (
    "gradients are clipped by deepspeed's gradient_clipping=1.0: that is the norm of the factors' "
    "own gradients, which depends on how W is split into B and A. LoFT clips by the norm of the "
    'projected gradients: set "gradient_clipping": 0.0 in the DeepSpeed config (1.0 where it says '
    "nothing) and LoFTAdamW(max_grad_norm=...)"
)
FLATTENED = (
    "a wrapper (DeepSpeed ZeRO, FSDP) flattened them, or left frozen ones out, and the LoRA "
    "pairing is lost (first, second). LoFT needs whole factors: use DDP or ZeRO stage 0, and both "
    "factors trainable with DeepSpeed's bf16"
)

# The frames that DeepSpeed 0.19 puts around a step, where it is not installed.
STAND_IN = """
class DeepSpeedEngine:
    def __init__(self, optimizer, norm):
        self.optimizer, self.norm = optimizer, norm

    def gradient_clipping(self):
        return self.norm

    def step(self):
        self.optimizer.step()


def initialize_optimizer_states(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def stand_in():
    names = {"__name__": "deepspeed.runtime.stand_in", "torch": torch}
    exec(STAND_IN, names)
    return types.SimpleNamespace(**names)


@pytest.fixture(scope="module")
def deepspeed():
    """Start the real DeepSpeed in one process: once, for it keeps its process groups."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        module = pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield module
        finally:
            dist.destroy_process_group()


class Trained(Net):
    """The net as DeepSpeed wants it: its loss is what it returns."""

    def forward(self, k: int) -> torch.Tensor:
        return self.loss(k)


def start(deepspeed, stage, *, net=None, dtype=None, clip=0.0, **options):
    """Make an engine with LoFT in it."""
    net = net or Trained()
    opt = lk.LoFTAdamW(net, lr=1e-2, **options)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if clip is not None:
        config["gradient_clipping"] = clip
    if dtype is not None:
        config[dtype] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=net, optimizer=opt, config=config)
    return net, opt, engine


def go(engine, steps=range(5)):
    for k in steps:
        engine.backward(engine(k))
        engine.step()


def values(parameters):
    return {str(k): p.detach().clone() for k, p in enumerate(parameters)}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_step_that_only_allocates_is_no_step(stand_in, weight_decay):
    """DeepSpeed's bf16 engine steps on zero gradients, with the real rates, when it is made."""
    runs = []
    for allocate in (False, True):
        net = Net()
        opt = lk.LoFTAdamW(net, lr=1e-2, weight_decay=weight_decay)
        before = picture(opt)
        if allocate:
            stand_in.initialize_optimizer_states(opt)
            after = picture(opt)
            assert all(opt.state[p] for p in net.parameters())
            assert all(s["step"] == 0 for s in opt.state.values())
            assert_same(before, {k: after[k] for k in before}, "allocated only")
        for k in range(4):
            take_step(net, opt, k)
        runs.append(picture(opt))
    assert_same(*runs, "after DeepSpeed's allocation")


def test_zero_gradients_elsewhere_are_a_step():
    net = Net()
    opt = lk.LoFTAdamW(net, lr=1e-2)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(s["step"] == 1 for s in opt.state.values())


@pytest.mark.parametrize(("norm", "expected"), [(1.0, [CLIPPED]), (0.0, [])])
def test_clipping_by_deepspeed_is_named_once(stand_in, norm, expected):
    net = Net()
    engine = stand_in.DeepSpeedEngine(lk.LoFTAdamW(net), norm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(2):
            net.set_gradients(k)
            engine.step()
    assert [str(w.message) for w in caught] == expected


def test_callback_without_gradients_says_so():
    pytest.importorskip("transformers", reason="Trainer is optional")
    from loft_kernels.integrations.trainer_callback import ProjectedNormCallback

    callback, logs = ProjectedNormCallback(), {"loss": 1.0}
    arguments = types.SimpleNamespace(logging_strategy="epoch", logging_first_step=False)
    state = types.SimpleNamespace(global_step=0, log_history=[{}])
    opt = lk.LoFTAdamW(Net())
    with pytest.warns(UserWarning, match="no gradient left to measure"):
        callback.on_pre_optimizer_step(arguments, state, None, optimizer=opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_pre_optimizer_step(arguments, state, None, optimizer=opt)
    callback.on_log(arguments, state, None, logs=logs)
    assert logs == {"loss": 1.0}


def test_stage_0_is_the_plain_loop_bit_for_bit(deepspeed):
    net, _, engine = start(deepspeed, 0)
    go(engine)
    plain = Trained()
    opt = lk.LoFTAdamW(plain, lr=1e-2)
    for k in range(5):
        plain(k).backward()
        opt.step()
        opt.zero_grad()
    assert_same(values(net.parameters()), values(plain.parameters()), "stage 0")


def test_stage_0_in_bf16_is_a_loop_on_fp32_copies_bit_for_bit(deepspeed):
    _, opt, engine = start(deepspeed, 0, dtype="bf16", weight_decay=0.1)
    assert type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer"
    go(engine)
    net = Trained()
    plain = lk.LoFTAdamW(net, lr=1e-2, weight_decay=0.1)
    for p in net.parameters():  # buffers stay fp32
        p.data = p.data.bfloat16()
    low = [list(group["params"]) for group in plain.param_groups]
    for group in plain.param_groups:
        group["params"] = [nn.Parameter(p.detach().float()) for p in group["params"]]
    for k in range(5):
        net(k).backward()
        for group, half in zip(plain.param_groups, low, strict=True):
            for p, q in zip(group["params"], half, strict=True):
                p.grad, q.grad = q.grad.float(), None
        plain.step()
        for group, half in zip(plain.param_groups, low, strict=True):
            for p, q in zip(group["params"], half, strict=True):
                q.data.copy_(p.data)
    copies = [[p for group in o.param_groups for p in group["params"]] for o in (opt, plain)]
    assert_same(*map(values, copies), "bf16 at stage 0")
    assert {int(s["step"]) for s in opt.state.values()} == {5}


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_its_checkpoint_resumes_bitwise(deepspeed, dtype, tmp_path):
    net, _, engine = start(deepspeed, 0, dtype=dtype)
    go(engine, range(3))
    engine.save_checkpoint(str(tmp_path))
    go(engine, range(3, 6))
    again, opt, resumed = start(deepspeed, 0, dtype=dtype)
    resumed.load_checkpoint(str(tmp_path))
    go(resumed, range(3, 6))
    assert_same(values(net.parameters()), values(again.parameters()), "resumed")
    assert {int(s["step"]) for s in opt.state.values()} == {6}


def test_in_bf16_a_missing_gradient_is_zero(deepspeed):
    """So an adapter that rests takes steps."""

    class Resting(Trained):
        def forward(self, k: int) -> torch.Tensor:
            return (self.first.weight * self.targets(k)[0].float()).sum()

    _, opt, engine = start(deepspeed, 0, dtype="bf16", net=Resting())
    go(engine, range(2))
    assert {int(s["step"]) for s in opt.state.values()} == {2}


def test_in_bf16_a_frozen_factor_is_refused(deepspeed):
    net = Trained()
    net.first.lora_A.requires_grad_(False)
    with pytest.raises(RuntimeError, match=re.escape(FLATTENED) + "$"):
        start(deepspeed, 0, dtype="bf16", net=net)


def test_clipping_by_the_default_of_deepspeed_is_named(deepspeed):
    _, _, engine = start(deepspeed, 0, clip=None)
    with pytest.warns(UserWarning, match="deepspeed's gradient_clipping=1.0: that is"):
        go(engine, range(1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_at_the_first_step(deepspeed, stage):
    net, opt, engine = start(deepspeed, stage)
    with pytest.raises(RuntimeError, match=re.escape(FLATTENED) + "$"):
        go(engine, range(1))
    assert not opt.state
    if stage < 3:
        assert_same(values(net.parameters()), values(Trained().parameters()), "refused")
