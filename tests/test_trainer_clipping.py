"""Clipping under a real Trainer: by the projected norm, once, and logged without being changed."""

from __future__ import annotations

import warnings

import pytest
from dense_net import SAMPLES, Oracle, Samples, adapted, single_precision, weights
from oracle import Hyper
from problems import check_close, check_displacement
from runs import (
    DEVICES,
    assert_kernels,
    on_one_gpu,
    one_thread,  # noqa: F401 - an autouse fixture
)

import loft_kernels as lk

transformers = pytest.importorskip("transformers", reason="Trainer is optional")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

STEPS, LR = 6, 3e-2


def train(
    folder, *, trainer_norm=0.0, loft_norm=None, log_norm=False, logging_steps=1, device="cpu"
):
    """Train with the factory, as a Trainer makes the optimizer itself."""
    from loft_kernels.integrations.trainer_callback import ProjectedNormCallback

    options, collate = {"lr": LR, "max_grad_norm": loft_norm}, None
    model = adapted()
    if device == "cuda":  # the kernels serve no fp64
        model, collate = model.float(), single_precision
        options["precision"] = "ieee"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=SAMPLES,
        lr_scheduler_type="constant",
        logging_steps=logging_steps,
        save_strategy="no",
        max_grad_norm=trainer_norm,
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=on_one_gpu(arguments),
        train_dataset=Samples(),
        data_collator=collate,
        optimizer_cls_and_kwargs=(lk.LoFTFactory, options),
        callbacks=[ProjectedNormCallback()] if log_norm else [],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    clipped = [str(w.message) for w in caught if "gradients are clipped" in str(w.message)]
    return model, trainer, clipped


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_norm", [None, 0.2], ids=["no-clipping", "clipping"])
def test_trainer_run_equals_the_dense_oracle(max_norm, device, tmp_path):
    oracle = Oracle(adapted())
    start, hyper = oracle.weights, Hyper(lr=LR, max_grad_norm=max_norm)
    norms = [oracle.step(hyper) for _ in range(STEPS)]
    if max_norm is not None:
        assert min(norms) > max_norm, "the case must clip at every step"
    model, trainer, warned = train(tmp_path, loft_norm=max_norm, log_norm=True, device=device)
    assert_kernels(trainer.optimizer.optimizer, device)
    limit = 1e-8 if device == "cpu" else 5e-4  # a few steps in fp32
    for name, weight in weights(model).items():
        check_displacement(weight.cpu(), oracle.weights[name], start[name], limit, name)
    logged = [e["projected_grad_norm"] for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == STEPS
    # The callback logs what torch's function would return, in fp32.
    assert logged == pytest.approx(norms, rel=1e-6 if device == "cpu" else 1e-4)
    assert warned == []


def test_callback_only_logs_and_only_at_logged_steps(tmp_path):
    plain, _, _ = train(tmp_path, loft_norm=0.2)
    seen, trainer, _ = train(tmp_path, loft_norm=0.2, log_norm=True, logging_steps=3)
    for name, weight in weights(plain).items():
        assert weight.equal(weights(seen)[name]), name
    entries = [e for e in trainer.state.log_history if "projected_grad_norm" in e]
    assert [e["step"] for e in entries] == [3, 6]


def test_clipping_by_trainer_and_optimizer_warns_once(tmp_path):
    _, _, warned = train(tmp_path, trainer_norm=1.0, loft_norm=0.2)
    assert warned == [
        "gradients are clipped by transformers's max_grad_norm=1.0 and again by LoFTAdamW: that is "
        "the norm of the factors' own gradients, which depends on how W is split into B and A. "
        "LoFT clips by the norm of the projected gradients: set "
        "TrainingArguments(max_grad_norm=0.0) and LoFTAdamW(max_grad_norm=...)"
    ]


def test_clipping_by_trainer_alone_warns_too(tmp_path):
    _, _, warned = train(tmp_path, trainer_norm=1.0)
    (message,) = warned
    assert "max_grad_norm=1.0: that is" in message


def test_clip_looks_through_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = adapted()
    opt = lk.LoFTAdamW(model)
    for p in model.parameters():
        p.grad = p.detach().clone() if p.requires_grad else None
    norm = lk.clip_grad_norm_(opt, float("inf"))
    check_close(lk.clip_grad_norm_(Wrapper(Wrapper(opt)), 1.0), norm, 0.0, "wrapped")
    check_close(lk.clip_grad_norm_(opt, float("inf")), norm.new_ones(()), 1e-5, "clipped")
