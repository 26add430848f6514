"""LoFT with TRL's SFTTrainer, which makes the adapters itself from `peft_config`.

python examples/trl_sft.py
"""

from __future__ import annotations

import datasets
import peft
from tiny import tiny_model, tiny_texts, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from loft_kernels import LoFTFactory


def main() -> None:
    """Train the adapters of a small model."""
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(
            output_dir="results/trl_sft",
            num_train_epochs=8,
            per_device_train_batch_size=16,
            logging_steps=4,
            max_length=16,
            max_grad_norm=0.0,  # the optimizer clips
            bf16=False,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": tiny_texts()}),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"),
        # A factory, because the adapters are not there yet.
        optimizer_cls_and_kwargs=(LoFTFactory, {"lr": 1e-2, "max_grad_norm": 1.0}),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.3f}")


if __name__ == "__main__":
    main()
