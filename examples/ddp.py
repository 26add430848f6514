"""LoFT with DistributedDataParallel: every process holds whole adapters, and they stay equal.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import os

import peft
import torch
import torch.distributed as dist
from tiny import TinyDataset, tiny_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import loft_kernels

EPOCHS = 8


def main() -> None:
    """Train the adapters of a small model in all processes together."""
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")

    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(), config).to(device)
    model = DistributedDataParallel(model, device_ids=[device] if gpus else None)
    optimizer = loft_kernels.LoFTAdamW(model, lr=1e-2, max_grad_norm=1.0)  # wrapped or not

    dataset = TinyDataset()
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
