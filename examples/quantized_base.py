"""LoFT over a base of 4 or 8 bits (the paper's QLoFT): only the adapters are trained.

python examples/quantized_base.py --bits 4
"""

from __future__ import annotations

import argparse
import tempfile

import peft
import torch
from tiny import TinyDataset, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loft_kernels

EPOCHS = 8


def quantized_model(bits: int, device: str) -> torch.nn.Module:
    """Load the base with its linear layers quantised."""
    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    with tempfile.TemporaryDirectory() as folder:  # a name on the hub would stand here
        tiny_model().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map=device
        )


def main() -> None:
    """Train the adapters of a small quantised model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = peft.prepare_model_for_kbit_training(
        quantized_model(args.bits, device), use_gradient_checkpointing=False
    )
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    optimizer = loft_kernels.LoFTAdamW(model, lr=1e-2, max_grad_norm=1.0)

    loader = torch.utils.data.DataLoader(TinyDataset(), batch_size=16, shuffle=True)
    for epoch in range(EPOCHS):
        for batch in loader:
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
