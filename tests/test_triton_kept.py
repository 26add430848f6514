"""What is kept from step to step: never stale, and never more than the next step needs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from loft_kernels import backends

pytest.importorskip("triton", reason="the Triton backend is optional")
from test_triton import Case, build, set_gradients

CASE = Case("kept", shapes=((33, 45), (20, 33)), ranks=(4,))


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Let the interpreter take what a GPU would."""

    def choose(backend, pairs):
        full = all(p.options.second_moment == "full" for p in pairs)
        return ("triton", "") if full else ("reference", "an ablation")

    monkeypatch.setattr(backends, "choose", choose)


def started(case=CASE, lr=1e-2, steps=2):
    """Build a model and take some steps; the gradients of the next one are there."""
    module, opt = build(case, "ieee")
    opt.param_groups[0]["lr"] = lr
    for step in range(steps):
        set_gradients(module, case, step)
        opt.step()
    set_gradients(module, case, steps)
    return module, opt


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("parted", ["by frozen layers", "by new state", "on another path"])
def test_a_layout_is_not_taken_for_pairs_in_other_phases(parted):
    """Pairs in one phase share workspace between their sides; others of the same shapes may not."""
    case, everyone = Case("phases", shapes=((140, 20),) * 4, ranks=(4,)), (0, 1, 2, 3)
    moving = {
        "by frozen layers": [everyone, (1, 2, 3), (0, 1, 2)],
        "by new state": [everyone] * 4,
        "on another path": [everyone] * 3,
    }[parted]
    ends = []
    for fresh in (False, True):
        module, opt = build(case, "ieee")
        for step, members in enumerate(moving):
            set_gradients(module, case, step)
            elsewhere = parted == "on another path" and step == 1
            for k in everyone:
                if k not in members or (elsewhere and k == 0):
                    module[k].lora_A.grad = module[k].lora_B.grad = None
            if parted == "by new state" and step == 3:
                del opt.state[module[0].lora_A], opt.state[module[0].lora_B]
            if fresh:
                opt._plan = None
            with pytest.MonkeyPatch.context() as patched:
                if elsewhere:
                    patched.setattr(backends, "choose", lambda *_: ("reference", "for once"))
                    patched.setattr(opt, "_warned_fallback", True)
                opt.step()
        ends.append(copies(module))
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("missing", [False, True])
def test_nothing_is_read_of_what_the_last_step_left_in_workspace(missing):
    ends = []
    for poisoned in (False, True):
        module, opt = started(steps=3)
        for step in (3, 4):
            if missing:
                module[1].lora_A.grad = None
            opt.step()
            for bucket in opt._plan.buckets() if poisoned else ():
                for kept in (bucket.inverse, bucket.change, bucket.all_numbers, bucket.decision):
                    kept.fill_(float("nan"))
                bucket.changed.fill_(7)
            set_gradients(module, CASE, step)
        opt.step()
        assert opt.nonfinite_steps == 0
        ends.append(copies(module))
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q)


def test_a_rate_of_zero_in_place_of_a_tensor_is_seen():
    module, opt = started(lr=torch.tensor(1e-2))
    before = copies(module)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    for p, q in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("option", [{"second_moment": "diagonal"}, {"calibrate": False}])
def test_options_that_do_not_fit_the_state_are_refused_until_they_are_taken_back(option):
    module, opt = started()
    twin, twin_opt = started()
    group, before = opt.param_groups[0], copies(module)
    kept = {key: group[key] for key in option}
    state = [v.clone() for s in opt.state.values() for v in s.values()]
    group.update(option)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=next(iter(option))):
            opt.step()
        now = [v for s in opt.state.values() for v in s.values()]
        for p, q in zip([*module.parameters(), *now], [*before, *state], strict=True):
            assert torch.equal(p, q)
    group.update(kept)
    opt.step()
    twin_opt.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_lost_group_is_explained():
    _, opt = started()
    opt.param_groups.pop()
    with pytest.raises(RuntimeError, match="pairing is lost"):
        opt.step()


def test_kernels_may_follow_another_path_that_has_the_same_pairs():
    """A parameter on another device sends single steps to the reference path."""
    module, opt = build(CASE, "ieee")
    chosen = opt._choose_backend

    def elsewhere(pairs):
        chosen(pairs)
        return "reference", ""

    for step in range(4):
        set_gradients(module, CASE, step)
        opt._choose_backend = chosen if step == 3 else elsewhere
        opt.step()
    assert opt._plan.holds(opt._gathered.pairs)


@pytest.mark.parametrize("taken", ["by another path", "by other pairs"])
def test_workspace_goes_with_what_it_was_made_for(taken):
    module, opt = started()
    seen = [weakref.ref(b.inverse) for b in opt._plan.buckets()]
    if taken == "by another path":
        opt._choose_backend = lambda pairs: ("reference", "")
    else:
        module[1].lora_A.grad = module[1].lora_B.grad = None
    opt.step()
    assert seen
    assert [ref() for ref in seen] == [None] * len(seen)


def test_state_elsewhere_gives_its_memory_back():
    """As a trainer offloads it between phases of its own."""
    _, opt = started()
    # The counts of steps are kept: they tell whose phases a layout knows.
    seen = [weakref.ref(v) for s in opt.state.values() for k, v in s.items() if k != "step"]
    for state in opt.state.values():
        for key, value in list(state.items()):
            state[key] = value.clone()
            del value
    assert [ref() for ref in seen] == [None] * len(seen)


@pytest.mark.parametrize("how", ["deleted", "loaded anew"])
def test_state_goes_with_the_optimizer(how):
    """At once: a cycle would keep twice the memory until the collector runs."""
    module, opt = started()
    seen = weakref.ref(opt.state[module[0].lora_B]["second_moment"])
    checkpoint = copy.deepcopy(opt.state_dict())
    gc.collect()
    gc.disable()
    try:
        if how == "deleted":
            del opt
        else:
            opt.load_state_dict(checkpoint)
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_go_with_zero_grad(frozen):
    module, opt = started(steps=1)
    if frozen:
        module[1].lora_A.grad = module[1].lora_B.grad = None
    opt.step()
    seen = weakref.ref(module[0].lora_B.grad)
    opt.zero_grad()
    assert seen() is None
