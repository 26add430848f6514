"""TRL makes the adapters inside its trainer, and casts them to bf16 over a quantised base."""

from __future__ import annotations

import pytest
import torch
from runs import (
    DEVICES,
    assert_kernels,
    on_one_gpu,
    one_thread,  # noqa: F401 - an autouse fixture
)
from tiny import tiny_model, tiny_texts, tiny_tokenizer

import loft_kernels as lk

trl = pytest.importorskip("trl", reason="TRL is optional")
peft = pytest.importorskip("peft", reason="PEFT is optional")
datasets = pytest.importorskip("datasets", reason="TRL trains on them")
transformers = pytest.importorskip("transformers", reason="TRL is built on it")

STEPS = 6


def sft(folder, model, way: str = "peft-config", device: str = "cpu", **arguments):
    """Return an SFTTrainer that makes LoFT by the factory."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    given = {"peft_config": config}
    if way == "peft-model":
        model, given = peft.get_peft_model(model, config), {}
    settings = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        max_length=16,
        logging_steps=1,
        report_to="none",
        use_cpu=device == "cpu",
        bf16=False,
        disable_tqdm=True,
        **{"max_steps": STEPS, "save_steps": 3, **arguments},
    )
    return trl.SFTTrainer(
        model=model,
        args=on_one_gpu(settings),
        train_dataset=datasets.Dataset.from_dict({"text": tiny_texts()}),
        processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=(lk.LoFTFactory, {"lr": 1e-2, "max_grad_norm": 1.0}),
        **given,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["peft-config", "peft-model"])
def test_factory_sees_adapters_wherever_they_are_made(way, tmp_path):
    trainer = sft(tmp_path, tiny_model(), way, save_strategy="no")
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert isinstance(opt, lk.LoFTAdamW)
    assert len(opt._slots) == 14
    assert {int(s["step"]) for s in opt.state.values()} == {STEPS}
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_resume_at_an_odd_step_is_bitwise(device, tmp_path):
    whole = sft(tmp_path / "whole", tiny_model(), device=device)
    whole.train()
    assert_kernels(whole.optimizer.optimizer, device)
    resumed = sft(tmp_path / "again", tiny_model(), device=device)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, p), q in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_bf16_adapters_over_a_quantised_base(device, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the quantised base")
    tiny_model().save_pretrained(tmp_path / "base")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four_bits, device_map=device
    )
    trainer = sft(tmp_path, model, device=device, save_strategy="no", max_steps=4)
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert_kernels(opt, device)
    assert len(opt._slots) == 14
    assert {p.dtype for p in opt.state} == {torch.bfloat16}
    for p, state in opt.state.items():
        assert state["master"].dtype == state["second_moment"].dtype == torch.float32
        rows = p if state["master"].shape == p.shape else p.T
        assert torch.equal(state["master"].bfloat16(), rows)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.1
