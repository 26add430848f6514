"""LoFT in a loop of accelerate, with gradient accumulation and a scheduler.

python examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import peft
import torch
from accelerate import Accelerator
from tiny import TinyDataset, tiny_model

import loft_kernels

EPOCHS = 12


def main() -> None:
    """Train the adapters of a small model."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(), config)
    loader = torch.utils.data.DataLoader(TinyDataset(), batch_size=8, shuffle=True)
    optimizer = loft_kernels.LoFTAdamW(model, lr=1e-2, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, EPOCHS * len(loader) // 2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                # No accelerator.clip_grad_norm_ here: the optimizer clips.
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
