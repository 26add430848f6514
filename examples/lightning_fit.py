"""LoFT with Lightning.

python examples/lightning_fit.py
"""

from __future__ import annotations

import peft
import pytorch_lightning as lightning
import torch
from tiny import TinyDataset, tiny_model

import loft_kernels


class AdaptedModel(lightning.LightningModule):
    """A small model with adapters, under automatic optimisation."""

    def __init__(self) -> None:
        """Make the model."""
        super().__init__()
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
        self.model = peft.get_peft_model(tiny_model(), config)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer; it clips, so that the Trainer has no gradient_clip_val."""
        return loft_kernels.LoFTAdamW(self.model, lr=1e-2, max_grad_norm=1.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm that LoFT clips by: an infinite limit changes no gradient."""
        norm = loft_kernels.clip_grad_norm_(optimizer, float("inf"))
        self.log("projected_grad_norm", norm)

    def on_train_batch_end(self, outputs: dict, batch: object, index: int) -> None:
        """Print the loss now and then."""
        if self.global_step % 4 == 0:
            print(f"step {self.global_step}: loss {outputs['loss'].item():.3f}")


def main() -> None:
    """Train the adapters of a small model."""
    trainer = lightning.Trainer(
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(AdaptedModel(), torch.utils.data.DataLoader(TinyDataset(), batch_size=16))


if __name__ == "__main__":
    main()
