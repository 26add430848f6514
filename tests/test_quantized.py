"""LoFT over quantised bases (the paper's QLoFT): only adapters move, as over the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from oracle import DensePair, Hyper, step_pairs
from problems import check_displacement, generator
from runs import (
    DEVICES,
    assert_kernels,
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
)
from tiny import TinyDataset, tiny_model

import loft_kernels as lk

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are its own")


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="the quantised base is optional")
    return transformers.BitsAndBytesConfig(**options)


def torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="a quantised base")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


BASES = {
    "4-bit": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8-bit": lambda: bitsandbytes(load_in_8bit=True),
    "torchao": torchao,
}
PARTS = ("qdata", "scale")  # of torchao's tensors
PAIRS = 14
LIMIT = 5e-4  # a few fp32 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(path)
    return path


def adapted(base: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return peft.get_peft_model(base, config)


def quantized(folder, kind: str, device: str) -> torch.nn.Module:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BASES[kind](), device_map=device, dtype=torch.float32
    )
    return peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def batch(k: int, device: str) -> dict[str, torch.Tensor]:
    rows = [TinyDataset()[8 * k + i] for i in range(8)]
    return {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}


def train(model, opt, steps: range, device: str) -> list[float]:
    losses = []
    for k in steps:
        loss = model(**batch(k % 8, device)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", BASES)
def test_adapters_train_and_the_base_keeps_its_bytes(kind, device, folder):
    model = adapted(quantized(folder, kind, device))
    opt = lk.LoFTAdamW(model, lr=1e-2, max_grad_norm=1.0)
    assert len(opt._slots) == PAIRS
    assert len(opt.param_groups) == 1
    losses = train(model, opt, range(1), device)  # bitsandbytes may repack its weights once
    base = stored_base(model)
    assert any(not t.is_floating_point() for t in base.values())
    losses += train(model, opt, range(1, 6), device)
    assert_kernels(opt, device)
    assert losses[-1] < losses[0] - 0.2
    assert_same(base, stored_base(model), "the base")


def stored_base(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the tensors that the frozen base is stored in."""
    base = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    whole = {n: p for n, p in base.items() if not hasattr(p, "qdata")}
    parts = {f"{n}.{k}": getattr(p, k) for n, p in base.items() for k in PARTS if n not in whole}
    return {n: t.detach().clone() for n, t in (whole | parts).items()}


class Dense:
    """The oracle of every pair, fed with the dense gradients that the quantised model has."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.pairs, self.inputs, self.grads = {}, {}, {}
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                a, b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling
                base = b.weight.new_zeros(b.out_features, a.in_features)
                oracle = DensePair(base.cpu(), b.weight.cpu(), a.weight.cpu(), scaling["default"])
                self.pairs[name] = oracle
                a.register_forward_pre_hook(partial(self._see_input, name))
                b.register_full_backward_hook(partial(self._see_gradient, name))

    def _see_input(self, name, module, inputs) -> None:
        self.inputs[name] = inputs[0].detach().flatten(0, -2).double().cpu()

    def _see_gradient(self, name, module, before, after) -> None:
        outputs = after[0].detach().flatten(0, -2).double().cpu()
        self.grads[name] = outputs.T @ self.inputs[name] / self.pairs[name].scaling

    def step(self, hyper: Hyper) -> None:
        step_pairs(list(self.pairs.values()), [self.grads[name] for name in self.pairs], hyper)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", BASES)
def test_steps_follow_the_dense_oracle(kind, device, folder):
    model = adapted(quantized(folder, kind, device))
    for pair in lk.find_adapters(model).pairs:
        # Drawn on the CPU, wherever the factor is.
        drawn = torch.empty(pair.lora_B.shape, dtype=pair.lora_B.dtype)
        pair.lora_B.data.copy_(drawn.normal_(std=0.1, generator=generator(7)))
    hyper, dense = Hyper(lr=1e-2, max_grad_norm=0.5), Dense(model)
    start = {name: pair.weight for name, pair in dense.pairs.items()}
    # Not in fp16 products: of a layer this small, one entry shows in the second step.
    opt = lk.LoFTAdamW(model, hyper.lr, max_grad_norm=hyper.max_grad_norm, precision="ieee")
    for k in range(4):
        model(**batch(k, device)).loss.backward()
        dense.step(hyper)
        opt.step()
        opt.zero_grad()
    for name, layer in model.named_modules():
        if name in start:
            delta = layer.get_delta_weight("default").detach().cpu()
            check_displacement(delta, dense.pairs[name].weight, start[name], LIMIT, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("kind", BASES)
def test_resume_over_a_quantised_base_is_bitwise(kind, steps, device, folder, tmp_path):
    whole = adapted(quantized(folder, kind, device))
    opt = lk.LoFTAdamW(whole, lr=1e-2)
    train(whole, opt, range(steps), device)
    adapters = {n: p.detach().clone() for n, p in whole.named_parameters() if "lora_" in n}
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    train(whole, opt, range(steps, steps + 2), device)

    again = adapted(quantized(folder, kind, device))
    again.load_state_dict(adapters, strict=False)
    opt = lk.LoFTAdamW(again, lr=1e-2)
    opt.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, opt, range(steps, steps + 2), device)
    ends = [dict(model.named_parameters()) for model in (whole, again)]
    assert_same(*({n: end[n].detach() for n in adapters} for end in ends), "resumed")
    assert_same(stored_base(whole), stored_base(again), "the base")
