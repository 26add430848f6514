"""Rule T6: what must not change a single bit of a step, and what may change rounding only."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import TinyLoRA, check_close, generator, make_adapter, normal
from runs import (
    DTYPES,
    OPTIONS,
    Net,
    assert_same,
    give_gradients,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
    without_gradients,
)
from torch import Tensor, nn

import loft_kernels as lk

pytestmark = pytest.mark.usefixtures("host_backend")  # each backend of the CPU

STEPS = 4
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_run(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, lk.LoFTAdamW]:
    net = Net(dtype)
    return net, lk.LoFTAdamW(net, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def adapters(dtype: torch.dtype) -> list[TinyLoRA]:
    """Pairs on both sides of the sizes at which matrix products change their kernels."""
    sizes = [(6, 5, 2), (65, 48, 8), (3, 130, 8)]
    return [make_adapter(*size, seed=k).to(dtype) for k, size in enumerate(sizes)]


def state_of(opt: torch.optim.Optimizer, modules: list[TinyLoRA]) -> dict[str, Any]:
    """Return parameters and state of several pairs, under names that no grouping changes."""
    seen = {}
    for k, module in enumerate(modules):
        for name, p in module.named_parameters():
            seen[f"{k}.{name}"] = p.detach().clone()
            seen |= {f"{k}.{name}.{key}": v.clone() for key, v in opt.state[p].items()}
    return seen


@ALL_OPTIONS
@ALL_DTYPES
def test_repeated_runs_are_equal(dtype, options):
    runs = []
    for _ in range(2):
        net, opt = make_run(dtype, **options)
        take_steps(net, opt, range(STEPS))
        runs.append(picture(opt))
    assert_same(*runs, "repeated")


@ALL_OPTIONS
@ALL_DTYPES
def test_pairs_together_are_pairs_apart_in_any_order(dtype, options):
    apart = {}
    for k in range(3):
        module = adapters(dtype)[k]
        opt = lk.LoFTAdamW(module, lr=1e-2, **options)
        for step in range(STEPS):
            give_gradients(module.parameters(), 10 * step + k)
            opt.step()
        apart |= {f"{k}{key[1:]}": v for key, v in state_of(opt, [module]).items()}
    for order in ((0, 1, 2), (2, 0, 1)):
        modules = adapters(dtype)
        opt = lk.LoFTAdamW(nn.ModuleList([modules[k] for k in order]), lr=1e-2, **options)
        for step in range(STEPS):
            for k, module in enumerate(modules):
                give_gradients(module.parameters(), 10 * step + k)
            opt.step()
        assert_same(apart, state_of(opt, modules), f"order {order}")


def unaligned(t: Tensor) -> Tensor:
    """Copy a tensor to an address that no vector instruction likes."""
    buffer = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    buffer[1:] = t.reshape(-1)
    return buffer[1:].view(t.shape)


@pytest.mark.parametrize("move", [torch.clone, unaligned], ids=["aligned", "unaligned"])
@ALL_DTYPES
def test_parameters_may_move_between_steps(dtype, move):
    runs = []
    for moved in (False, True):
        modules = adapters(dtype)
        opt = lk.LoFTAdamW(nn.ModuleList(modules), lr=1e-2)
        for step in range(STEPS):
            for k, module in enumerate(modules):
                give_gradients(module.parameters(), 10 * step + k)
                for p in module.parameters() if moved else ():
                    p.data = move(p.data)
            opt.step()
        runs.append(state_of(opt, modules))
    assert_same(*runs, "moved parameters")


def strided(grad: Tensor) -> Tensor:
    """Put a gradient into every second column of a matrix of NaN."""
    wide = torch.full((grad.shape[0], 2 * grad.shape[1]), torch.nan, dtype=grad.dtype)
    wide[:, ::2] = grad
    return wide[:, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.T.contiguous().T,
    "strided": strided,
    "strided-transposed": lambda g: strided(g.T).T,
    "unaligned": unaligned,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[f"row16-{name}" for name in LAYOUTS])
@ALL_DTYPES
def test_layout_of_the_gradients_does_not_matter(dtype, layout):
    runs = []
    for change in (torch.clone, layout):
        modules = adapters(dtype)
        opt = lk.LoFTAdamW(nn.ModuleList(modules), lr=1e-2)
        for step in range(STEPS):
            for k, module in enumerate(modules):
                give_gradients(module.parameters(), 10 * step + k)
                for p in module.parameters():
                    p.grad = change(p.grad)
            opt.step()
        runs.append(state_of(opt, modules))
    assert_same(*runs, "layout")


@pytest.mark.parametrize("how", ["row16-expanded", "row16-one-row-expanded"])
@ALL_DTYPES
def test_expanded_gradients_are_read_like_their_copies(dtype, how):
    runs = []
    for expanded in (True, False):
        net, opt = make_run(dtype)
        for step in range(STEPS):
            for k, p in enumerate(p for pair in net.pairs for p in pair.parameters()):
                shape = (1, 1) if how == "row16-expanded" else (1, p.shape[1])
                grad = normal(generator(10 * step + k), *shape).to(dtype).expand(p.shape)
                p.grad = grad if expanded else grad.contiguous()
            opt.step()
        runs.append(without_gradients(picture(opt)))
    assert_same(*runs, "expanded gradients")


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1d"])
@ALL_DTYPES
def test_tensor_learning_rate_is_the_float(dtype, shape):
    runs = []
    # A tensor carries the rate in its own precision, so it is given in that of the state.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for lr in (1e-2, torch.full(shape, 1e-2, dtype=wide)):
        net = Net(dtype)
        opt = lk.LoFTAdamW(nn.ModuleList(net.pairs), lr=lr, weight_decay=0.1)
        take_steps(net, opt, range(STEPS))
        runs.append(state_of(opt, net.pairs))
    assert_same(*runs, "learning rate")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def matmul_settings() -> tuple[str, ...]:
    own = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return (torch.get_float32_matmul_precision(), *own)


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    chosen = matmul_settings()
    try:
        yield
        assert matmul_settings() == chosen, "the step left other settings behind"
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast-bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast-fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default-fp64": lambda: default_dtype(torch.float64),
    "default-fp16": lambda: default_dtype(torch.float16),
    "matmul-medium": lambda: matmul_precision("medium"),
    "matmul-high": lambda: matmul_precision("high"),
    "grad-enabled": torch.enable_grad,
    "no-grad": torch.no_grad,
    "anomaly-mode": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_settings_of_the_caller_do_not_reach_the_step(dtype, setting):
    runs = []
    for context in (contextlib.nullcontext, setting):
        modules = adapters(dtype)
        opt = lk.LoFTAdamW(nn.ModuleList(modules), lr=1e-2)
        for step in range(STEPS):
            for k, module in enumerate(modules):
                give_gradients(module.parameters(), 10 * step + k)
            with context():
                opt.step()
        runs.append(state_of(opt, modules))
        assert all(not v.requires_grad for v in runs[-1].values())
    assert_same(*runs, "settings")


@ALL_OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [0, 1, 2], ids="skip-after{}".format)
def test_skipped_steps_leave_no_trace(first, dtype, options):
    runs = []
    for skipping in (False, True):
        net, opt = make_run(dtype, **options)
        for k in range(STEPS):
            for spoiled in ("first.lora_B", "second.lora_A", "bias") if k == first else ():
                net.set_gradients(70)
                net.get_parameter(spoiled).grad[0] = torch.nan
                if skipping:
                    opt.step()
            take_step(net, opt, k)
        runs.append(picture(opt))
    assert int(runs[1].pop("nonfinite_steps")) == 3
    assert int(runs[0].pop("nonfinite_steps")) == 0
    assert_same(*runs, "skipped steps")


@ALL_DTYPES
def test_gradients_and_their_memory_are_left_alone(dtype):
    net, opt = make_run(dtype, max_grad_norm=1.0, maximize=True)
    for k in range(STEPS):
        net.set_gradients(k)
        held = {n: (p.grad, p.grad.clone(), p.grad.data_ptr()) for n, p in net.named_parameters()}
        opt.step()
        for name, p in net.named_parameters():
            grad, copied, address = held[name]
            assert p.grad is grad
            assert torch.equal(grad, copied), name
            assert grad.data_ptr() == address


@pytest.mark.parametrize("scale", [2.0**7, 2.0**-6, 3.0], ids="scale{}".format)
@ALL_DTYPES
def test_grad_scale_divides_and_found_inf_skips(dtype, scale):
    """What torch's GradScaler hands to optimizers that unscale themselves."""
    net, opt = make_run(dtype, max_grad_norm=2.0)
    scaled, scaled_opt = make_run(dtype, max_grad_norm=2.0)
    for k in range(STEPS):
        take_step(net, opt, k)
        scaled.set_gradients(k)
        for p in scaled.parameters():
            p.grad *= scale
        scaled_opt.grad_scale = torch.tensor(scale)
        before = picture(scaled_opt)
        scaled_opt.found_inf = torch.ones(())
        scaled_opt.step()
        skipped = picture(scaled_opt)
        assert int(skipped.pop("nonfinite_steps")) == int(before.pop("nonfinite_steps")) + 1
        if k > 0:
            assert_same(before, skipped, f"found_inf at step {k}")
        scaled_opt.found_inf = torch.zeros(())
        scaled_opt.step()
    expected, found = (without_gradients(picture(o)) for o in (opt, scaled_opt))
    del expected["nonfinite_steps"], found["nonfinite_steps"]
    if scale != 3.0:  # powers of two are exact
        assert_same(expected, found, "unscaled run")
    else:
        limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-2)
        for (name, a), b in zip(expected.items(), found.values(), strict=True):
            if isinstance(a, Tensor) and a.numel() > 1:
                check_close(b, a, limit, name)


def test_closure_runs_once_under_enabled_gradients_and_its_loss_is_returned():
    run, other = make_run(), make_run()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        other[1].zero_grad()
        loss = other[0].loss(0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = other[1].step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert loss.requires_grad
    run[0].loss(0).backward()
    run[1].step()
    assert_same(picture(run[1]), picture(other[1]), "closure")
    assert loss.item() == Net().loss(0).item()


@ALL_OPTIONS
@pytest.mark.parametrize("share", [0.25, 0.9, 4.0], ids="share{}".format)
def test_clipping_inside_the_step_is_clip_grad_norm_before_it(share, options):
    limits = {torch.float64: 1e-12, torch.float32: 1e-5}
    for dtype, limit in limits.items():
        net, plain = make_run(dtype, **options)
        net.set_gradients(0)
        max_norm = share * float(lk.clip_grad_norm_(plain, 1e9))
        inside, inside_opt = make_run(dtype, max_grad_norm=max_norm, **options)
        outside, outside_opt = make_run(dtype, **options)
        for k in range(STEPS):
            take_step(inside, inside_opt, k)
            outside.set_gradients(k)
            unclipped = [p.grad.clone() for p in outside.parameters()]
            norm = float(lk.clip_grad_norm_(outside_opt, max_norm))
            coefficient = min(1.0, max_norm / (norm + 1e-6))
            for p, grad in zip(outside.parameters(), unclipped, strict=True):
                # Rounded to fp32 on the way: the returned norm, the coefficient and the product.
                check_close(p.grad, coefficient * grad, 3 * 2.0**-24, "clipped gradient")
            outside_opt.step()
        expected, found = (without_gradients(picture(o)) for o in (outside_opt, inside_opt))
        for (name, a), b in zip(expected.items(), found.values(), strict=True):
            if isinstance(a, Tensor):
                check_close(b, a, limit, name)


@ALL_OPTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_factors_follow_the_fp32_run_from_the_same_inputs(dtype, options):
    """T5, one step at a time from a shared state: fp32 throughout but for the stored factor."""
    net, opt = make_run(dtype, **options)
    for k in range(2 * STEPS):
        net.set_gradients(k)
        twin = Net()
        twin.load_state_dict(net.state_dict())
        twin_opt = lk.LoFTAdamW(twin)
        twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        masters = [opt.state[p].get("master") for pair in net.pairs for p in pair.parameters()]
        masters = [None if m is None else m.clone() for m in masters]
        starts = [p.detach().clone() for pair in twin.pairs for p in pair.parameters()]
        for p, half in zip(twin.parameters(), net.parameters(), strict=True):
            p.grad = half.grad.float()
        opt.step()
        twin_opt.step()
        halves = [p for pair in net.pairs for p in pair.parameters()]
        wides = [p for pair in twin.pairs for p in pair.parameters()]
        for half, wide, master, start in zip(halves, wides, masters, starts, strict=True):
            state = dict(opt.state[half])
            kept = state.pop("master")
            kept = kept.T if kept.shape != half.shape else kept
            assert_same(state, twin_opt.state[wide], f"state at step {k}")
            assert torch.equal(half, kept.to(dtype)), "the factor is not its rounded master"
            if master is not None:
                master = master.T if master.shape != half.shape else master
                scale = float(start.abs().max()) * 1.19e-7
                moved = (kept - master) - (wide.detach() - start)
                # Rounding of a master, a wide factor and their difference; decay acts on both.
                slack = 4 * scale + 1e-2 * 0.1 * float((master - start).abs().max())
                assert float(moved.abs().max()) <= slack, f"master at step {k}"


def test_gradients_are_not_kept_alive_between_steps():
    net = Net()
    opt = lk.LoFTAdamW(net, lr=1e-2)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        kept = [weakref.ref(p.grad) for p in net.parameters()]
        opt.step()
        opt.zero_grad()
        assert [ref() for ref in kept] == [None] * len(kept)
