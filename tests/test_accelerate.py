"""accelerate: prepared loops are the plain loop, and a scaler's overflow leaves no trace."""

from __future__ import annotations

import pytest
import torch
from dense_net import SAMPLES, Samples, adapted, batch, single_precision
from runs import (
    DEVICES,
    assert_kernels,
    assert_same,
    differences,
    forget_accelerate,
    on_one_gpu,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    without_gradients,
)
from torch import nn

import loft_kernels as lk

accelerate = pytest.importorskip("accelerate", reason="accelerate is optional")
transformers = pytest.importorskip("transformers", reason="Trainer is optional")

OPTIONS = {"lr": 2e-2, "weight_decay": 0.1, "max_grad_norm": 0.3}


@pytest.fixture(autouse=True)
def own_state() -> None:
    forget_accelerate()


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def halves() -> list[dict[str, torch.Tensor]]:
    return [{k: v[i::2] for k, v in batch().items()} for i in range(2)]


def plain_run(steps: int) -> dict:
    model = adapted()
    opt = lk.LoFTAdamW(model, **OPTIONS)
    scheduler = decay(opt)
    for _ in range(steps):
        for part in halves():
            (model(**part)["loss"] / 2).backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
    return picture(opt)


def test_prepared_loop_with_accumulation_is_the_plain_loop_bitwise():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted()
    opt = lk.LoFTAdamW(model, **OPTIONS)
    model, prepared, scheduler = accelerator.prepare(model, opt, decay(opt))
    assert len(opt._slots) == 2
    for _ in range(5):
        for part in halves():
            with accelerator.accumulate(model):
                accelerator.backward(model(**part)["loss"])
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
    assert_same(plain_run(5), picture(opt), "prepared")


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoint_of_accelerate_resumes_bitwise(device, tmp_path):
    accelerator = accelerate.Accelerator(cpu=device == "cpu")
    inputs = {k: v.float().to(device) for k, v in batch().items()}

    def run(steps: range, resume: bool) -> dict:
        model = adapted().float()
        opt = lk.LoFTAdamW(model, **OPTIONS)
        model, prepared = accelerator.prepare(model, opt)
        if resume:
            accelerator.load_state(str(tmp_path))
        for k in steps:
            accelerator.backward(model(**inputs)["loss"])
            prepared.step()
            prepared.zero_grad()
            if k == 2 and not resume:
                accelerator.save_state(str(tmp_path), safe_serialization=False)
        accelerator.free_memory()
        assert_kernels(opt, device)
        return picture(opt)

    assert_same(run(range(6), resume=False), run(range(3, 6), resume=True), "resumed")


class Overflow(transformers.TrainerCallback):
    """Make one gradient infinite at some steps, and look at everything around each step.

    As in a real overflow, the gradient is infinite from the backward pass on: a Trainer divides
    by the scale, and looks for infinities, before it calls `on_pre_optimizer_step`.
    """

    def __init__(self, at: set[int]) -> None:
        self.at, self.calls, self.log = at, 0, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        first = next(p for n, p in model.named_parameters() if "lora_A" in n)
        first.register_post_accumulate_grad_hook(self.overflow)

    def overflow(self, factor: torch.Tensor) -> None:
        if self.calls in self.at:
            factor.grad[0, 0] = float("inf")

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        inner = optimizer.optimizer
        self.before = without_gradients(picture(inner)), inner.param_groups[0]["lr"]

    def on_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        after = without_gradients(picture(optimizer.optimizer))
        unchanged = not differences(self.before[0], after)
        self.log.append((self.calls, unchanged, optimizer.step_was_skipped, self.before[1]))
        self.calls += 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overflows", [{3}, {0, 2}], ids=["A-phase", "first-and-B-phase"])
def test_overflow_in_a_trainer_run_changes_nothing_and_holds_the_scheduler(
    overflows, device, tmp_path
):
    """On a CPU the scaler is put there by hand: a Trainer makes one for fp16 on a GPU only."""
    model, seen = adapted().float(), Overflow(overflows)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=SAMPLES,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=device == "cpu",
        fp16=device == "cuda",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=on_one_gpu(arguments),
        train_dataset=Samples(),
        data_collator=single_precision,
        optimizer_cls_and_kwargs=(lk.LoFTFactory, OPTIONS),
        callbacks=[seen],
    )
    # Small enough that nothing overflows by itself.
    trainer.accelerator.scaler = torch.amp.GradScaler(device, init_scale=2.0**7)
    trainer.train()
    assert [call for call, unchanged, _, _ in seen.log if unchanged] == sorted(overflows)
    assert [call for call, _, skipped, _ in seen.log if skipped] == sorted(overflows)
    rates = [rate for *_, rate in seen.log]
    for call in overflows:
        assert rates[call + 1] == rates[call], "the scheduler advanced over a skipped step"
    assert len(set(rates)) == 6 - len(overflows)
    opt = trainer.optimizer.optimizer
    assert_kernels(opt, device)
    assert {int(s["step"]) for s in opt.state.values()} == {6 - len(overflows)}
    assert trainer.optimizer.scaler.get_scale() == 2.0 ** (7 - len(overflows))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")
def test_real_fp16_overflow_backs_off_and_then_trains():
    """Autocast to fp16 under a scale that overflows: skipped until the scale fits."""
    torch.manual_seed(0)
    model = adapted().float()
    opt = lk.LoFTAdamW(model, **OPTIONS)
    accelerate.Accelerator(cpu=True)  # AcceleratedOptimizer reads its state
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    prepared = accelerate.optimizer.AcceleratedOptimizer(opt, scaler=scaler)
    scheduler = accelerate.scheduler.AcceleratedScheduler(decay(opt), prepared)
    inputs = {k: v.float() for k, v in batch().items()}
    skipped = 0
    for _ in range(30):
        before = without_gradients(picture(opt))
        rate = scheduler.get_last_lr()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs)["loss"]
        scaler.scale(loss).backward()
        prepared.step()
        scheduler.step()
        after = without_gradients(picture(opt))
        if prepared.step_was_skipped:
            skipped += 1
            assert_same(before, after, "skipped")
            assert scheduler.get_last_lr() == rate
        else:
            assert scheduler.get_last_lr() != rate
        prepared.zero_grad()
    assert 0 < skipped < 30
    assert {int(opt.state[p]["step"]) for p in opt.state} == {30 - skipped}


@pytest.mark.parametrize("steps", [2, 3])
def test_torch_scaler_in_a_plain_loop(steps):
    model, clean = adapted().float(), adapted().float()
    ends = []
    for net, overflow in ((model, True), (clean, False)):
        opt = lk.LoFTAdamW(net, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
        for k in range(steps + 2):
            inputs = {name: v.float() for name, v in batch().items()}
            scaler.scale(net(**inputs)["loss"]).backward()
            if overflow and k == steps:
                next(p for p in net.parameters() if p.grad is not None).grad.fill_(float("nan"))
            elif not overflow and k == steps:
                opt.zero_grad()
                continue
            scaler.step(opt)
            scaler.update(4.0)
            opt.zero_grad()
        ends.append(without_gradients(picture(opt)))
    assert_same(*ends, "the run without the overflow")


def test_moved_after_construction_is_followed():
    """`prepare` may cast or move the model when the optimizer is there already."""
    model: nn.Module = adapted()
    opt = lk.LoFTAdamW(model, **OPTIONS)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        inputs = {k: v.to(dtype) for k, v in batch().items()}
        model(**inputs)["loss"].backward()
        opt.step()
        opt.zero_grad()
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        for state in opt.state.values():
            assert state["exp_avg"].dtype == kept
            assert ("master" in state) == (dtype == torch.bfloat16)
    assert {int(s["step"]) for s in opt.state.values()} == {3}
