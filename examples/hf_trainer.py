"""LoFT with transformers.Trainer, which makes the optimizer from a factory.

    python examples/hf_trainer.py

Checkpoints resume bitwise: ``trainer.train(resume_from_checkpoint=True)``.
"""

from __future__ import annotations

import peft
from tiny import TinyDataset, tiny_model
from transformers import Trainer, TrainingArguments

from loft_kernels import LoFTFactory
from loft_kernels.integrations.trainer_callback import ProjectedNormCallback


def main() -> None:
    """Train the adapters of a small model."""
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(), config)
    arguments = TrainingArguments(
        output_dir="results/hf_trainer",
        num_train_epochs=8,
        per_device_train_batch_size=16,
        logging_steps=4,
        max_grad_norm=0.0,  # the optimizer clips
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=TinyDataset(),
        # The learning rate stands here: a Trainer does not hand its own to a factory.
        optimizer_cls_and_kwargs=(LoFTFactory, {"lr": 1e-2, "max_grad_norm": 1.0}),
        callbacks=[ProjectedNormCallback()],  # logs projected_grad_norm, and nothing else
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            norm = entry["projected_grad_norm"]
            print(f"step {entry['step']}: loss {entry['loss']:.3f}, projected norm {norm:.3f}")


if __name__ == "__main__":
    main()
