"""What only a GPU can show of the Triton backend: launches, synchronisation, graphs, scalers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import loft_kernels as lk

pytest.importorskip("triton", reason="the Triton backend is optional")
pytestmark = pytest.mark.gpu


class Layer(nn.Module):
    def __init__(self, m: int, n: int, rank: int) -> None:
        super().__init__()
        self.scaling = 2.0
        self.lora_A = nn.Parameter(torch.randn(rank, n, device="cuda") / n**0.5)
        self.lora_B = nn.Parameter(torch.randn(m, rank, device="cuda") / rank**0.5)


def make(pairs: int = 3, rank: int = 16, **options) -> tuple[nn.Module, lk.LoFTAdamW]:
    torch.manual_seed(0)
    shapes = [(300, 200), (129, 257), (64, 512)]
    module = nn.ModuleList(Layer(*shapes[k % 3], rank) for k in range(pairs))
    options = {"lr": 1e-2, "backend": "triton", **options}
    return module, lk.LoFTAdamW(module, **options)


def new_gradients(module: nn.Module, step: int, *, in_place: bool = False) -> None:
    rng = torch.Generator("cuda").manual_seed(step)
    for p in module.parameters():
        grad = torch.randn(p.shape, generator=rng, device="cuda")
        if in_place and p.grad is not None:
            p.grad.copy_(grad)
        else:
            p.grad = grad


def everything(module: nn.Module, opt: lk.LoFTAdamW) -> list[torch.Tensor]:
    return [*module.parameters(), *(t for s in opt.state.values() for t in s.values())]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for k, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), f"tensor {k} differs"


def test_auto_takes_triton_and_says_so():
    module, opt = make(backend="auto")
    new_gradients(module, 0)
    opt.step()
    assert opt._plan is not None
    assert lk.report().chosen == "triton"


@pytest.mark.parametrize("rank", [4, 16, 64], ids="r{}".format)
def test_launches_are_few_and_independent_of_the_number_of_pairs(rank):
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for pairs in (4, 40):
        module, opt = make(pairs, rank)
        for step in range(2):
            new_gradients(module, step)
            opt.step()
        new_gradients(module, 2)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            opt.step()
            torch.cuda.synchronize()
        kernels = [e.name for e in record.events() if e.name.startswith("_")]
        counts.append(len(kernels))
    assert counts[0] == counts[1] <= 8


def test_a_step_never_synchronises():
    module, opt = make(max_grad_norm=1.0)
    for step in range(2):
        new_gradients(module, step)
        opt.step()
    new_gradients(module, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replays_equal_eager_steps():
    lr = torch.tensor(1e-2, device="cuda")
    runs = []
    for captured in (False, True):
        module, opt = make(lr=lr.clone(), max_grad_norm=5.0)
        for step in range(3):
            new_gradients(module, step, in_place=True)
            opt.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            saved = [t.clone() for t in everything(module, opt)]
            with torch.cuda.graph(graph):
                opt.step()
            assert_equal(saved, everything(module, opt))
        for step in range(3, 13):
            new_gradients(module, step, in_place=True)
            opt.param_groups[0]["lr"].fill_(1e-2 / step)
            graph.replay() if captured else opt.step()
        torch.cuda.synchronize()
        runs.append([t.clone() for t in everything(module, opt)])
    assert_equal(*runs)


def test_many_repeats_are_bitwise_equal():
    module, opt = make(6, 16)
    for step in range(3):
        new_gradients(module, step)
        opt.step()
    new_gradients(module, 3)
    first = None
    for _ in range(200):
        twin = copy.deepcopy(module)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad
        again = lk.LoFTAdamW(twin, lr=1e-2, backend="triton")
        again.load_state_dict(opt.state_dict())
        again.step()
        end = everything(twin, again)
        first = first or end
        assert_equal(first, end)


def test_found_inf_on_the_device_leaves_everything_untouched():
    module, opt = make()
    for step in range(3):
        new_gradients(module, step)
        opt.step()
    before = [t.clone() for t in everything(module, opt)]
    new_gradients(module, 3)
    opt.grad_scale = torch.tensor(4.0, device="cuda")
    opt.found_inf = torch.tensor(1.0, device="cuda")
    opt.step()
    assert_equal(before, everything(module, opt))
    assert int(opt.nonfinite_steps) == 1


def test_other_parameters_share_the_decision():
    module, opt = make()
    bias = nn.Parameter(torch.zeros(7, device="cuda"))
    opt.add_param_group({"params": [("bias", bias)], "lora_pairs": []})
    for step in range(3):
        new_gradients(module, step)
        bias.grad = torch.ones_like(bias)
        if step == 1:
            bias.grad[3] = float("nan")
            before = [t.clone() for t in [bias, *everything(module, opt)]]
        opt.step()
        if step == 1:
            assert_equal(before, [bias, *everything(module, opt)])
    plain = nn.Parameter(torch.zeros(7, device="cuda"))
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0, fused=True)
    for _ in range(2):
        plain.grad = torch.ones_like(plain)
        reference.step()
    assert torch.equal(plain, bias)


def test_state_moves_between_backends():
    module, opt = make()
    for step in range(3):
        new_gradients(module, step)
        opt.step()
    twin = copy.deepcopy(module)
    other = lk.LoFTAdamW(twin, lr=1e-2, backend="reference")
    other.load_state_dict(opt.state_dict())
    for step in range(3, 9):
        new_gradients(module, step)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert float(((p - q).norm() / q.norm()).detach()) < 1e-4
