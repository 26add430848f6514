"""Lightning: its closure runs the backward pass inside `step`, its wrapper clips and resumes."""

from __future__ import annotations

import warnings

import pytest
import torch
from dense_net import SAMPLES, Oracle, Samples, adapted, batch, weights
from oracle import Hyper
from problems import check_displacement
from runs import (
    DEVICES,
    assert_kernels,
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    without_gradients,
)

import loft_kernels as lk

lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is optional")

LR = 3e-2


class Module(lightning.LightningModule):
    """The adapted network under automatic optimisation."""

    def __init__(self, dtype=torch.float64, **options) -> None:
        super().__init__()
        self.model = adapted().to(dtype)
        self.options = {"lr": LR, **options}

    def training_step(self, batch, index):
        dtype = next(self.model.parameters()).dtype
        return self.model(**{k: v.to(dtype) for k, v in batch.items()})["loss"]

    def configure_optimizers(self):
        return lk.create_loft_optimizer(self.model, **self.options)


def trainer(folder, steps: int, **options) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", "devices": 1, **options},
    )


def fit(folder, steps: int, *, batch_size=SAMPLES, options=None, resume=None, **trainer_options):
    module = Module(**(options or {}))
    run = trainer(folder, steps, **trainer_options)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    clipped = [str(w.message) for w in caught if "gradients are clipped" in str(w.message)]
    return module, run, clipped


@pytest.mark.parametrize("max_norm", [None, 0.2], ids=["no-clipping", "clipping"])
def test_closure_with_backward_inside_equals_the_dense_oracle(max_norm, tmp_path):
    oracle = Oracle(adapted())
    start, hyper = oracle.weights, Hyper(lr=LR, max_grad_norm=max_norm)
    for _ in range(5):
        oracle.step(hyper)
    module, _, warned = fit(tmp_path, 5, options={"max_grad_norm": max_norm})
    for name, weight in weights(module.model).items():
        check_displacement(weight, oracle.weights[name], start[name], 1e-8, name)
    assert warned == []


def test_accumulated_batches_are_one_step(tmp_path):
    module, run, _ = fit(tmp_path, 3, batch_size=SAMPLES // 2, accumulate_grad_batches=2)
    (opt,) = run.optimizers
    assert {int(s["step"]) for s in opt.state.values()} == {3}
    model = adapted()
    plain = lk.LoFTAdamW(model, LR)
    for _ in range(3):
        for half in range(2):
            part = {k: v[half * 8 : half * 8 + 8] for k, v in batch().items()}
            (model(**part)["loss"] / 2).backward()
        plain.step()
        plain.zero_grad()
    for name, weight in weights(module.model).items():
        assert torch.equal(weight, weights(model)[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [3, 4])
def test_resume_from_a_checkpoint_is_bitwise(steps, device, tmp_path):
    how = {"options": {"dtype": torch.float32}, "accelerator": device}
    _, whole, _ = fit(tmp_path, steps + 3, **how)
    assert_kernels(whole.optimizers[0], device)
    _, first, _ = fit(tmp_path, steps, **how)
    first.save_checkpoint(tmp_path / "saved.ckpt")
    _, resumed, _ = fit(tmp_path, steps + 3, resume=tmp_path / "saved.ckpt", **how)
    pictures = [without_gradients(picture(run.optimizers[0])) for run in (whole, resumed)]
    assert_same(*pictures, "resumed")


def test_clipping_by_lightning_is_named_once(tmp_path):
    _, _, warned = fit(tmp_path, 3, options={"max_grad_norm": 1.0}, gradient_clip_val=0.5)
    (message,) = warned
    assert "pytorch_lightning's gradient_clip_val=0.5 and again by LoFTAdamW" in message
    assert "Trainer(gradient_clip_val=None)" in message


def test_clip_takes_the_wrapped_optimizer(tmp_path):
    norms = []

    class Logging(Module):
        def on_before_optimizer_step(self, optimizer):
            norms.append(lk.clip_grad_norm_(self.optimizers(), float("inf")).item())

    module = Logging(max_grad_norm=0.2)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=SAMPLES)
    trainer(tmp_path, 3).fit(module, loader)
    oracle = Oracle(adapted())
    expected = [oracle.step(Hyper(lr=LR, max_grad_norm=0.2)) for _ in range(3)]
    assert norms == pytest.approx(expected, rel=1e-6)
