"""A real transformers.Trainer run: the optimizer is handed in, saved and resumed bitwise."""

from __future__ import annotations

import pytest
import torch
from runs import DEVICES, assert_kernels, on_one_gpu
from torch import nn

import loft_kernels as lk

transformers = pytest.importorskip("transformers", reason="Trainer is optional")
peft = pytest.importorskip("peft", reason="PEFT is optional")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

STEPS, SAVED = 6, (3, 4)


class Bytes(torch.utils.data.Dataset):
    """A few fixed random sequences."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randint(0, 32, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": x, "labels": x}


def adapted_model() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=12,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        use_dora=True,
        lora_dropout=0.1,
    )
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)


def run(folder, way: str, device: str = "cpu", resume: str | None = None):
    """Train to the end, from the start or from a checkpoint; return model and optimizer."""
    model = adapted_model()
    options = {"lr": 1e-2, "weight_decay": 0.01, "max_grad_norm": 0.5}
    if way == "factory":
        given = {"optimizer_cls_and_kwargs": (lk.LoFTFactory, options)}
    else:
        given = {"optimizers": (lk.create_loft_optimizer(model, **options), None)}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=1,
        logging_steps=1,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=device == "cpu",
        seed=11,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model, args=on_one_gpu(arguments), train_dataset=Bytes(), **given
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.optimizer.optimizer, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["optimizers", "factory"])
def test_resume_from_a_checkpoint_is_bitwise(way, device, tmp_path):
    model, opt, trainer = run(tmp_path / "whole", way, device)
    assert_kernels(opt, device)
    assert len(opt._slots) == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    for step in SAVED:
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        again, opt_again, _ = run(tmp_path / f"from{step}", way, device, resume=checkpoint)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), f"{name} differs after resuming at step {step}"
        expected, resumed = opt.state_dict()["state"], opt_again.state_dict()["state"]
        assert expected.keys() == resumed.keys()
        for index, entries in expected.items():
            assert entries.keys() == resumed[index].keys()
            for key, value in entries.items():
                assert torch.equal(value, resumed[index][key]), (step, index, key)
                assert value.dtype == resumed[index][key].dtype


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_really_steps_the_loft_optimizer(tmp_path):
    model, opt, _ = run(tmp_path, "factory")
    (first, _) = (s for s in opt._slots)
    state = opt.state[opt.param_groups[first.b[0]]["params"][first.b[1]]]
    assert int(state["step"]) == STEPS
    assert "second_moment" in state
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
