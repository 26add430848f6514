"""A network of two adapted layers, and the same network trained densely by the oracle."""

from __future__ import annotations

import pytest
import torch
from oracle import DensePair, Hyper, projected_norm, step_pairs
from problems import generator, normal
from torch import Tensor, nn
from torch.func import functional_call

peft = pytest.importorskip("peft", reason="PEFT is optional; the adapters are its own")

SAMPLES = 16
LAYERS = ("first", "second")


class Net(nn.Module):
    """Two linear layers and a loss, in the form that trainers of language models call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.second(torch.tanh(self.first(x)))
        return {"loss": (out - labels).square().mean(), "logits": out}


class Samples(torch.utils.data.Dataset):
    """Fixed random samples; one batch is all of them, so that their order does not matter."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        gen = generator(index)
        return {"x": normal(gen, 6), "labels": 3 * normal(gen, 4)}


def batch() -> dict[str, Tensor]:
    """Return all samples."""
    samples = [Samples()[k] for k in range(SAMPLES)]
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def single_precision(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate samples for a network in fp32."""
    return {k: torch.stack([s[k] for s in samples]).float() for k in samples[0]}


def adapted(**options) -> nn.Module:
    """Return the network with random adapters of rank 2 and 3, alpha 6, in fp64."""
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=list(LAYERS), rank_pattern={"second": 3}, **options
    )
    model = peft.get_peft_model(Net(), config).double()
    for k, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(p, std=0.5, generator=generator(100 + k))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the effective weights of both layers."""
    found = {}
    for name, module in model.named_modules():
        layer = name.rpartition(".")[2]
        if layer in LAYERS and hasattr(module, "lora_A"):
            b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
            base = module.get_base_layer().weight
            found[layer] = (base + module.scaling["default"] * b @ a).detach()
    return found


class Oracle:
    """The same training in the dense weights."""

    def __init__(self, model: nn.Module) -> None:
        self.net = Net()
        self.pairs = {}
        for name, module in model.named_modules():
            layer = name.rpartition(".")[2]
            if layer in LAYERS and hasattr(module, "lora_A"):
                self.pairs[layer] = DensePair(
                    module.get_base_layer().weight,
                    module.lora_B["default"].weight,
                    module.lora_A["default"].weight,
                    module.scaling["default"],
                )

    def step(self, hyper: Hyper) -> float:
        """Take one step on all samples and return the norm of the projected gradients."""
        dense = {name: pair.weight.requires_grad_() for name, pair in self.pairs.items()}
        named = {f"{name}.weight": weight for name, weight in dense.items()}
        loss = functional_call(self.net, named, kwargs=batch())["loss"]
        grads = torch.autograd.grad(loss, list(dense.values()))
        norm = projected_norm(self.pairs.values(), grads, [], hyper)
        step_pairs(list(self.pairs.values()), grads, hyper)
        return norm

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: pair.weight.detach() for name, pair in self.pairs.items()}
