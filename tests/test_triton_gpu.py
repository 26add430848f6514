"""What only a GPU can show of the Triton backend: launches, synchronisation, graphs, scalers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import loft_kernels as lk

pytest.importorskip("triton", reason="the Triton backend is optional")
from test_triton import Case, compare

pytestmark = pytest.mark.gpu


class Layer(nn.Module):
    def __init__(self, m: int, n: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scaling = 2.0
        a = torch.randn(rank, n, device="cuda") / n**0.5
        b = torch.randn(m, rank, device="cuda") / rank**0.5
        self.lora_A, self.lora_B = nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))


def make(pairs: int = 3, rank: int = 16, **options) -> tuple[nn.Module, lk.LoFTAdamW]:
    torch.manual_seed(0)
    shapes = [(300, 200), (129, 257), (64, 512)]
    module = nn.ModuleList(Layer(*shapes[k % 3], rank) for k in range(pairs))
    options = {"lr": 1e-2, "backend": "triton", **options}
    return module, lk.LoFTAdamW(module, **options)


def new_gradients(module: nn.Module, step: int, *, in_place: bool = False) -> None:
    rng = torch.Generator("cuda").manual_seed(step)
    for p in module.parameters():
        grad = torch.randn(p.shape, generator=rng, device="cuda").to(p.dtype)
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


def test_launch_hooks_hear_of_every_kernel_and_change_nothing():
    from triton import knobs

    heard, runs = [], []

    def hear(metadata):
        heard.append(metadata.get()["name"])

    for listening in (False, True):
        module, opt = make()
        for step in range(4):
            new_gradients(module, step)
            if listening and step == 3:
                knobs.runtime.launch_enter_hook.add(hear)
            try:
                opt.step()
            finally:
                knobs.runtime.launch_enter_hook.remove(hear)
        runs.append(everything(module, opt))
    assert len(heard) == 8
    assert_equal(*runs)


def test_workspace_is_returned_after_every_step():
    module, opt = make(6)
    held = []
    for step in range(8):
        new_gradients(module, step, in_place=True)
        opt.step()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[2:])) == 1, held


def test_steps_that_follow_each_other_at_once_read_their_own_gradients():
    """Addresses are staged in pinned memory, which a copy under way must find as it was."""
    runs = []
    for waiting in (False, True):
        module, opt = make(40)
        kept = []
        for step in range(12):
            new_gradients(module, step)
            kept.append([p.grad for p in module.parameters()])
            if not waiting and step == 2:
                torch.cuda._sleep(200_000_000)
            opt.step()
            if waiting:
                torch.cuda.synchronize()
        runs.append(everything(module, opt))
    assert_equal(*runs)


def test_options_and_scalings_may_change_between_steps():
    runs = []
    for known in (True, False):
        module, opt = make()
        for step in range(6):
            new_gradients(module, step)
            opt.param_groups[0]["alternate"] = step != 3
            module[1].scaling = 2.0 if step < 2 else 0.5
            if not known:
                opt._gathered = None  # everything is looked at anew
            opt.step()
        runs.append(everything(module, opt))
    assert_equal(*runs)


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


def mixed_bag() -> nn.ModuleList:
    """Pairs of all kinds: ranks of every padded width, odd shapes, three dtypes."""
    torch.manual_seed(0)
    shapes = [(300, 200), (129, 257), (64, 512), (1, 40), (1025, 96)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    ranks = [1, 3, 8, 16, 33, 64]
    return nn.ModuleList(Layer(*shapes[k % 5], ranks[k % 6], dtypes[k // 6 % 4]) for k in range(24))


@torch.no_grad()
def test_a_thousand_steps_from_one_state_are_bitwise_equal():
    module = mixed_bag()
    opt = lk.LoFTAdamW(module, lr=1e-2, max_grad_norm=5.0, backend="triton")
    for step in range(4):
        new_gradients(module, step)
        opt.step()
    new_gradients(module, 4)
    held = everything(module, opt)
    start = [t.clone() for t in held]
    first: list[torch.Tensor] = []
    for _ in range(1000):
        for t, saved in zip(held, start, strict=True):
            t.copy_(saved)
        opt.step()
        first = first or [t.clone() for t in held]
        assert_equal(first, held)
    assert int(opt.nonfinite_steps) == 0
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    # What is compared has to be written by the step, or equality would show nothing.
    assert sum(not torch.equal(a, b) for a, b in zip(start, first, strict=True)) > len(first) // 2


@torch.no_grad()
def test_more_than_two_to_the_31_entries_of_packed_state():
    """The ends of a factor too long for 32-bit offsets step as they do in a pair of their own."""
    m, n, rank, ends = 1_040_000, 96, 64, 150
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    torch.manual_seed(0)
    big = Layer(m, n, rank)
    rows = torch.cat([torch.arange(ends), torch.arange(m - ends, m)]).cuda()
    small = Layer(2 * ends, n, rank)
    opts = [lk.LoFTAdamW(x, lr=1.0, backend="triton") for x in (big, small)]
    rng = torch.Generator("cuda").manual_seed(1)
    mean = torch.randn(m, rank, generator=rng, device="cuda")
    small.lora_B.copy_(big.lora_B[rows])
    for step in range(3):
        # The other factor sees all rows, so it is handed over; B's rows know nothing of each other.
        small.lora_A.copy_(big.lora_A)
        big.lora_B.grad = mean + torch.randn(m, rank, generator=rng, device="cuda")
        big.lora_A.grad = torch.randn(rank, n, generator=rng, device="cuda")
        small.lora_B.grad = big.lora_B.grad[rows].contiguous()
        small.lora_A.grad = big.lora_A.grad.clone()
        before = small.lora_B.clone()
        for opt in opts:
            opt.step()
        assert bool(big.lora_B.isfinite().all() & big.lora_A.isfinite().all()), step
        moved, expected = big.lora_B[rows] - before, small.lora_B - before
        assert (float(expected.norm()) > 0) == (step != 1)
        assert float((moved - expected).norm()) <= 1e-5 * float(expected.norm()), step
        state, own = opts[0].state[big.lora_B], opts[1].state[small.lora_B]
        assert state["second_moment"].numel() > 2**31
        for key in ("exp_avg", "second_moment"):
            error = float((state[key][rows] - own[key]).norm() / own[key].norm())
            assert error <= 1e-6, f"step {step}: {key} of the ends has error {error:.1e}"


AROUND = [(b + d, 2 * b - d) for b in (64, 128, 256) for d in (-1, 0, 1)]
SMALL_AROUND = [(b + d, 33 - d) for b in (16, 32) for d in (-1, 0, 1)] + AROUND[:3]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rank", [1, 8, 17, 64], ids="r{}".format)
def test_nothing_is_written_beside_shapes_around_the_blocks(rank):
    case = Case("around", shapes=tuple(AROUND), ranks=(rank,))
    for step in (0, 1):
        compare(case, "default", step)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rank", [3, 64], ids="r{}".format)
def test_nothing_is_written_beside_small_shapes_in_ieee_precision(rank):
    case = Case("around", shapes=tuple(SMALL_AROUND), ranks=(rank,))
    for step in (0, 1):
        compare(case, "ieee", step)


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
