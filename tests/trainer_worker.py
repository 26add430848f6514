"""One process of a Trainer run, started by torchrun: adapters and state are equal on all ranks."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import transformers
from ddp_worker import compare, finish
from dense_net import Samples, adapted

import loft_kernels as lk

STEPS = 6


def main() -> None:
    """Train with the factory, compare, report."""
    model = adapted()
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=4,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=Samples(),
            optimizer_cls_and_kwargs=(lk.LoFTFactory, {"lr": 1e-2, "max_grad_norm": 0.1}),
        )
        trainer.train()
        opt = trainer.optimizer.optimizer
        seen = {
            "world": dist.get_world_size(),
            "pairs": len(opt._slots),
            "wrapper": type(trainer.model_wrapped).__name__,
            "tensors": compare(model, opt, STEPS),
        }
    finish(seen)


if __name__ == "__main__":
    main()
