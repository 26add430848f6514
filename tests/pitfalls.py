"""Pitfalls 1 to 6: pairing, resume, rehearsal, hyper-parameters, contract, experts.

Each check stands under the seeded bugs that it has to notice (see ``test_pitfalls.py``). The bugs
are those that were found in the wild.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dense_net import Oracle, adapted, batch, weights
from oracle import Hyper
from problems import check_close, check_displacement, make_adapter
from runs import (
    Net,
    assert_same,
    forget_accelerate,
    give_gradients,
    picture,
    take_step,
    take_steps,
    without_gradients,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import loft_kernels as lk
from loft_kernels import adapters, checkpoint, functional, gather, optimizer

Bug = Callable[[pytest.MonkeyPatch], None]
PITFALLS: dict[str, tuple[Callable[[], None], dict[str, Bug]]] = {}


def pitfall(name: str, **bugs: Bug) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a check under the bugs that it has to notice."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        PITFALLS[name] = check, bugs
        return check

    return register


def wrap(owner: object, name: str, make: Callable) -> Bug:
    """Replace a function by what `make` does of it."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def refused(action: Callable[[], object], error: type[Exception], words: str) -> None:
    """Check that an action is refused with these words."""
    with pytest.raises(error, match=words):
        action()


# 1. Silent plain AdamW when the pairing is lost.


def pairs_by_identity(original: Callable) -> Callable:
    def gathered(self, *, allocate):
        known = self.__dict__.setdefault(
            "_known", {id(p) for g in self.param_groups for p in g["params"]}
        )
        self._slots = [
            s
            for s in self._slots
            if all(
                i < len(self.param_groups[g]["params"])
                and id(self.param_groups[g]["params"][i]) in known
                for g, i in (s.b, s.a)
            )
        ]
        self._sizes = [len(g["params"]) for g in self.param_groups]
        return original(self, allocate=allocate)

    return gathered


@pitfall("01-lost-pairing", identity=wrap(lk.LoFTAdamW, "_gather", pairs_by_identity))
def check_lost_pairing() -> None:
    net = Net()
    opt = lk.LoFTAdamW(net)
    take_step(net, opt, 0)
    for group in opt.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        give_gradients(group["params"], 0)
    opt.step()
    swapped = opt.param_groups[0]["params"]
    assert all("partner_basis" in opt.state[p] for p in swapped), "plain AdamW after a swap"
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in swapped]))
    flat.grad = torch.ones_like(flat)
    opt.param_groups[0]["params"] = [flat]
    refused(opt.step, RuntimeError, "the LoRA pairing is lost")


# 2. Resume is not the same run.


def loses(change: Callable[[dict, object], None]) -> Bug:
    def make(original: Callable) -> Callable:
        def load(saved, factor, partner, group):
            loaded = original(saved, factor, partner, group)
            change(loaded, factor)
            return loaded

        return load

    return wrap(checkpoint, "check_loaded_state", make)


def lose_phase(loaded: dict, factor: object) -> None:
    loaded["step"] = loaded["step"] // 2 * 2


def lose_snapshot(loaded: dict, factor: object) -> None:
    loaded["partner_basis"] = torch.zeros_like(loaded["partner_basis"])


def lose_bits(loaded: dict, factor) -> None:
    loaded["exp_avg"] = loaded["exp_avg"].to(factor.param.dtype).float()


@pitfall("02-resume", phase=loses(lose_phase), snapshot=loses(lose_snapshot), fp32=loses(lose_bits))
def check_resume() -> None:
    for steps in (3, 4):
        whole = Net(torch.bfloat16)
        opt = lk.LoFTAdamW(whole, 1e-2)
        take_steps(whole, opt, range(steps))
        again = Net(torch.bfloat16)
        again.load_state_dict(whole.state_dict())
        resumed = lk.LoFTAdamW(again, 1e-2)
        resumed.load_state_dict(opt.state_dict())
        take_steps(whole, opt, range(steps, steps + 2))
        take_steps(again, resumed, range(steps, steps + 2))
        assert_same(picture(opt), picture(resumed), f"resumed after {steps}")


# 3. The rehearsal step of torch.distributed.checkpoint.


@pitfall("03-dcp-rehearsal", counts=wrap(checkpoint, "is_rehearsal", lambda _: lambda opt: False))
def check_rehearsal() -> None:
    runs = []
    for asked in (False, True):
        net = Net()
        opt = lk.LoFTAdamW(net, 1e-2, weight_decay=0.1)
        if asked:
            get_optimizer_state_dict(net, opt)
        take_steps(net, opt, range(3))
        runs.append(picture(opt))
    assert_same(*runs, "after a rehearsal")


# 4. What alpha/r and weight decay mean.


def decay_without_rate(patch: pytest.MonkeyPatch) -> None:
    original = gather.step_options

    def options(group):
        read = original(group)
        return replace(read, weight_decay=read.weight_decay / float(group["lr"]))

    patch.setattr(gather, "step_options", options)
    patch.setattr(optimizer, "step_options", options)


@pitfall(
    "04-hyper-parameters",
    alpha=wrap(lk.Scaling, "read", lambda _: lambda self: 1.0),
    decay=decay_without_rate,
)
def check_hyper_parameters() -> None:
    ends = []
    for s in (1.0, 0.5, 2.0, 4.0):
        layer = make_adapter(7, 6, 3, seed=1)
        with torch.no_grad():
            layer.lora_A.mul_((layer.scaling / s) ** 0.5)
            layer.lora_B.mul_((layer.scaling / s) ** 0.5)
        layer.scaling = s
        opt = lk.LoFTAdamW(layer, 1e-2)
        for _ in range(4):
            opt.zero_grad()
            (layer.weight - 1).square().sum().backward()
            opt.step()
        ends.append(layer.weight.detach())
    for s, end in zip((0.5, 2.0, 4.0), ends[1:], strict=True):
        check_close(end, ends[0], 1e-9, f"alpha/r = {s}")
    layer = make_adapter(7, 6, 3, seed=1)
    start = layer.lora_B.detach().clone()
    opt = lk.LoFTAdamW(layer, 1e-2, weight_decay=0.1)
    for _ in range(4):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    check_close(layer.lora_B.detach(), start * (1 - 1e-3) ** 2, 1e-12, "decay by lr * wd")


# 5. Clipping, scaler and closure.


def clip_factors(original: Callable) -> Callable:
    def prepare(pairs, extra):
        prepared, values = original(pairs, extra)
        for entry in prepared:
            for side in entry.sides:
                side.host.norm_sq = float(side.factor.grad_rows.double().square().sum())
        return prepared, values

    return staticmethod(prepare)


def closure_without_grad(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "enable_grad", torch.no_grad)


def own_scaler_protocol(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lk.LoFTAdamW, "_step_supports_amp_scaling", True, raising=False)


@pitfall(
    "05-clipping-scaler-closure",
    clip=wrap(functional.ReferenceStep, "prepare", clip_factors),
    closure=closure_without_grad,
    scaler=own_scaler_protocol,
)
def check_contract() -> None:
    accelerate = pytest.importorskip("accelerate")
    forget_accelerate()
    accelerate.Accelerator(cpu=True)
    model, hyper = adapted(), Hyper(lr=2e-2, max_grad_norm=0.2)
    oracle = Oracle(model)
    start = oracle.weights
    opt = lk.LoFTAdamW(model, hyper.lr, max_grad_norm=hyper.max_grad_norm)

    def closure():
        opt.zero_grad()
        loss = model(**batch())["loss"]
        assert loss.requires_grad, "the closure runs without gradients"
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        oracle.step(hyper)
    for name, weight in weights(model).items():
        check_displacement(weight, oracle.weights[name], start[name], 1e-8, name)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    prepared = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=scaler)
    before = without_gradients(picture(opt))
    scaler.scale(model(**batch())["loss"]).backward()
    next(iter(opt.state)).grad[0, 0] = float("inf")
    prepared.step()
    assert_same(before, without_gradients(picture(opt)), "after an overflow")
    assert prepared.step_was_skipped, "the scheduler would advance over a skipped step"


# 6. Experts interleaved in one tensor.


def one_expert(original: Callable) -> Callable:
    def strict(candidate):
        number = candidate.layer.num_experts if hasattr(candidate.layer, "num_experts") else None
        if number is not None:
            candidate.layer.num_experts = 1
        return original(candidate)

    return strict


@pitfall("06-experts", naive=wrap(adapters, "_strict_pair", one_expert))
def check_experts() -> None:
    layer = make_adapter(6, 6, 8, seed=0)  # 4 experts of rank 2, in == out: no shape tells
    layer.num_experts = 4
    refused(lambda: lk.LoFTAdamW(layer), NotImplementedError, "factors of 4 experts interleaved")
