"""LoFT in a plain PyTorch loop.

python examples/plain_loop.py
"""

from __future__ import annotations

import peft
import torch
from tiny import TinyDataset, tiny_model

import loft_kernels

EPOCHS = 8


def main() -> None:
    """Train the adapters of a small model."""
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(), config)
    loader = torch.utils.data.DataLoader(TinyDataset(), batch_size=16, shuffle=True)

    # The model, not its parameters. Clipping is the optimizer's: by the projected gradients.
    optimizer = loft_kernels.LoFTAdamW(model, lr=1e-2, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

    for epoch in range(EPOCHS):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    # Adapters that started from B = 0 and were trained: merge them, or save them for PEFT.
    model.merge_and_unload()


if __name__ == "__main__":
    main()
