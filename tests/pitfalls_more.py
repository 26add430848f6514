"""Pitfalls 7 to 12: aliases, memory, stale addresses, numerics, replicas, import."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_net import Oracle, adapted, batch, weights
from oracle import Hyper
from pitfalls import pitfall, refused, wrap
from problems import check_displacement, make_adapter
from runs import Net, assert_same, give_gradients, picture, take_steps, without_gradients
from torch import nn

import loft_kernels as lk
from loft_kernels import adapters, functional, gather, optimizer, plan

# 7. Aliased and strided tensors.


def storage_order(patch: pytest.MonkeyPatch) -> None:
    def rows(self):
        grad = torch.as_strided(self.grad, self.grad.shape, (self.grad.shape[1], 1))
        return grad.T if self.transposed else grad

    patch.setattr(plan.Factor, "grad_rows", property(rows))


@pitfall(
    "07-aliased-and-strided",
    aliased=wrap(adapters, "_overlapping", lambda _: lambda pairs: {}),
    strided=storage_order,
)
def check_aliases() -> None:
    tied = nn.ModuleList([make_adapter(6, 6, 6, seed=0), make_adapter(6, 6, 6, seed=1)])
    tied[1].lora_A.data = tied[0].lora_B.data.T
    refused(lambda: lk.LoFTAdamW(tied), ValueError, "share memory")
    runs = []
    for transposed in (False, True):
        layer = make_adapter(7, 6, 3, seed=0)
        opt = lk.LoFTAdamW(layer, 1e-2)
        for k in range(2):
            give_gradients(layer.parameters(), k)
            for p in layer.parameters() if transposed else ():
                p.grad = p.grad.T.contiguous().T
            opt.step()
        runs.append({k: v for k, v in picture(opt).items() if not k.endswith(".grad")})
    assert_same(*runs, "gradients with foreign strides")


# 8. State grows with r^2.


def keep_unpacked(original: Callable) -> Callable:
    def ready(factor, partner, options):
        original(factor, partner, options)
        rows, rank = factor.rows.shape
        factor.state["blocks"] = torch.zeros(rows, rank, rank)

    return ready


@pitfall("08-state-memory", unpacked=wrap(optimizer, "ready_state", keep_unpacked))
def check_state_memory() -> None:
    for rank in (3, 12, 40):
        layer = make_adapter(20, 31, rank, seed=0).float()
        opt = lk.LoFTAdamW(layer)
        give_gradients(layer.parameters(), 0)
        opt.step()
        for p, rows, others in ((layer.lora_B, 20, 31), (layer.lora_A, 31, 20)):
            measured = sum(t.numel() * t.itemsize for t in opt.state[p].values())
            assert measured == lk.state_bytes(rows, others, rank), f"rank {rank}"


# 9. Stale addresses, casts, missing gradients.


def stale_gradients(patch: pytest.MonkeyPatch) -> None:
    original = gather.Gathered.bind

    def bind(self):
        kept = self.__dict__.setdefault("_stale", [f.param.grad for f in self._factors])
        original(self)
        for factor, grad in zip(self._factors, kept, strict=True):
            factor.grad = grad

    patch.setattr(gather.Gathered, "bind", bind)


@pitfall("09-stale-addresses", cached=stale_gradients)
def check_addresses() -> None:
    runs = []
    for disturbed in (False, True):
        net = Net()
        opt = lk.LoFTAdamW(net, 1e-2)
        litter = []
        for k in range(5):
            if disturbed:
                opt.zero_grad(set_to_none=True)
                gc.collect()
                litter.append([torch.empty(n) for n in (7, 64, 1000)])
                for p in net.parameters():
                    p.data = p.data.clone()
            net.set_gradients(k)
            if k == 3:
                net.first.lora_A.grad = None
            opt.step()
        net.bfloat16()
        take_steps(net, opt, range(5, 8))
        runs.append(without_gradients(picture(opt)))
    assert_same(*runs, "reallocated between steps")


# 10. B = 0, dependent columns, and settings of the process.


def ridge(original: Callable) -> Callable:
    return lambda partners, damping: original(partners, [1e-3] * len(damping))


@pitfall("10-numerics", ridge=wrap(functional.ref, "orthonormal_bases", ridge))
def check_numerics() -> None:
    for spoil in ("zero", "duplicate rows", "tiny"):
        model = adapted()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if spoil == "zero" and "lora_B" in name:
                    p.zero_()
                elif spoil == "duplicate rows" and "lora_A" in name:
                    p[1].copy_(p[0])
                elif spoil == "tiny" and "lora_" in name:
                    p.mul_(1e-6)
        oracle, hyper = Oracle(model), Hyper(lr=1e-2)
        start = oracle.weights
        opt = lk.LoFTAdamW(model, hyper.lr)
        for _ in range(2):
            model(**batch())["loss"].backward()
            opt.step()
            opt.zero_grad()
            oracle.step(hyper)
        for name, weight in weights(model).items():
            assert weight.isfinite().all()
            check_displacement(weight, oracle.weights[name], start[name], 1e-7, f"{spoil} {name}")


# 11. Replicas that drift, and the order of the factors.


def sequential(original: Callable) -> Callable:
    def apply(prepared, coefficient):
        for index in range(len(prepared.sides)):
            (again,), _ = functional.prepare([prepared.pair], [])
            original(functional.PreparedPair(again.pair, [again.sides[index]]), coefficient)

    return apply


def noise(original: Callable) -> Callable:
    calls = itertools.count()

    def apply(prepared, coefficient):
        original(prepared, coefficient * (1 + 1e-12 * next(calls)))

    return apply


@pitfall(
    "11-replicas",
    sequential=wrap(functional, "apply_", sequential),
    noise=wrap(functional, "apply_", noise),
)
def check_replicas() -> None:
    hyper, ends = Hyper(lr=2e-2, alternate=False), []
    for _ in range(2):
        model = adapted()
        oracle, opt = Oracle(model), lk.LoFTAdamW(model, hyper.lr, alternate=False)
        start = oracle.weights
        for _ in range(4):
            model(**batch())["loss"].backward()
            opt.step()
            opt.zero_grad()
            oracle.step(hyper)
        for name, weight in weights(model).items():
            check_displacement(weight, oracle.weights[name], start[name], 1e-8, name)
        ends.append(picture(opt))
    assert_same(*ends, "two replicas")


# 12. Import where there is neither Triton nor CUDA.

ALONE = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, loft_kernels as lk
net = torch.nn.Module()
net.lora_A, net.lora_B = (torch.nn.Parameter(torch.randn(s)) for s in ((2, 5), (4, 2)))
opt = lk.LoFTAdamW(net)
for p in net.parameters():
    p.grad = torch.ones_like(p)
opt.step()
report = lk.report()
assert report.chosen in ("cpu", "reference") and "triton" in report.unavailable, report
foreign = {"transformers", "peft", "accelerate"} & set(sys.modules)
assert not foreign, f"importing loft_kernels imports {foreign}"
"""


def hard_import(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules[__name__], "_seeded_import", "import triton\n")


_seeded_import = ""


@pitfall("12-import", triton=hard_import)
def check_import() -> None:
    source = Path(lk.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, "loft_kernels")
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
        start = copied / "__init__.py"
        start.write_text(_seeded_import + start.read_text())
        done = subprocess.run(
            [sys.executable, "-c", ALONE],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
