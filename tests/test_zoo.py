"""PEFT's rarer kinds on real models: tied adapters, experts in one tensor, adapters that switch."""

from __future__ import annotations

import pytest
import torch
from oracle import DensePair, Hyper, step_pairs
from problems import check_displacement, generator, normal
from runs import (
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
)
from torch import nn

import loft_kernels as lk

peft = pytest.importorskip("peft", reason="the kinds are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are its own")

TOKENS = torch.randint(0, 48, (2, 12), generator=generator(1))


def small(kind: str, **options) -> nn.Module:
    """A model of one or two layers with random weights."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    opt.step()
    opt.zero_grad()


@pytest.fixture
def tied():
    """Embedding and output layer adapted, their adapters over one storage."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    config.ensure_weight_tying = True
    return peft.get_peft_model(small("Llama", tie_word_embeddings=True), config)


def test_tied_adapters_are_refused_by_name(tied):
    one = r"\S*(lm_head\.lora_|lora_embedding_)[AB]\S*"  # the first in memory comes first
    message = rf"^{one} and {one} share memory \(tied adapters\).*ensure_weight_tying=False"
    with pytest.raises(ValueError, match=message):
        lk.LoFTAdamW(tied)
    with pytest.raises(ValueError, match=message):  # AdamW would move them twice as well
        lk.LoFTAdamW(tied, on_unsupported="adamw")


def test_untied_adapters_of_tied_layers_are_pairs():
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    with pytest.warns(UserWarning, match="tie"):
        model = peft.get_peft_model(small("Llama", tie_word_embeddings=True), config)
    opt = lk.LoFTAdamW(model, lr=1e-2)
    assert len(opt._slots) == 3
    step(model, opt)


@pytest.fixture
def experts():
    """A mixture whose eight experts stand in one tensor; in and out are equally wide."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    base = small("Mixtral", num_local_experts=8, num_experts_per_tok=2)
    return peft.get_peft_model(base, config)


def test_experts_in_one_tensor_are_refused_by_name(experts):
    message = r"experts.*lora_B.*factors of 8 experts interleaved \(PEFT target_parameters\)"
    with pytest.raises(NotImplementedError, match=message):
        lk.LoFTAdamW(experts)


def test_experts_train_with_adamw_on_request_and_at_its_memory(experts):
    with pytest.warns(UserWarning, match=r"4 LoRA factors train with plain AdamW.*8 experts"):
        opt = lk.LoFTAdamW(experts, lr=1e-2, on_unsupported="adamw")
    assert len(opt._slots) == 1
    step(experts, opt)
    for p in opt.param_groups[1]["params"]:
        assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


def test_one_weight_as_a_target_parameter_is_a_pair():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(7, 5)

        def forward(self, x):
            return self.linear(x)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[], target_parameters=["linear.weight"]
    )
    model = peft.get_peft_model(Net(), config).double()
    (pair,) = lk.find_adapters(model).pairs
    nn.init.normal_(pair.lora_B, generator=generator(3))
    inner = model.base_model.model.linear
    base = inner.base_layer
    oracle = DensePair(base.weight, pair.lora_B, pair.lora_A, pair.scaling.read())
    opt, start, hyper = lk.LoFTAdamW(model, 2e-2), oracle.weight, Hyper(lr=2e-2)
    for k in range(4):
        gen = generator(k)
        x, target = normal(gen, 9, 7), normal(gen, 9, 5)
        weight = oracle.weight.requires_grad_()
        loss = (nn.functional.linear(x, weight, base.bias) - target).square().mean()
        step_pairs([oracle], torch.autograd.grad(loss, weight), hyper)
        (model(x) - target).square().mean().backward()
        opt.step()
        opt.zero_grad()
    delta = pair.scaling.read() * (pair.lora_B @ pair.lora_A).detach()
    check_displacement(oracle.base + delta, oracle.weight, start, 1e-8, "the weight")


def test_switching_adapters_moves_the_active_one_alone():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(small("Llama"), config, adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["one", "two"])
    opt = lk.LoFTAdamW(model, lr=1e-2)
    assert len(opt._slots) == 2

    def seen(adapter: str) -> dict:
        factors = {n: p for n, p in model.named_parameters() if f".{adapter}." in n}
        state = {f"{n}.{k}": v for n, p in factors.items() for k, v in opt.state[p].items()}
        return {k: v.detach().clone() for k, v in {**factors, **state}.items()}

    for active, resting in (("one", "two"), ("two", "one"), ("one", "two")):
        model.set_adapter(active)
        before, moving = seen(resting), seen(active)
        for _ in range(3):
            step(model, opt)
        assert_same(before, seen(resting), f"{resting} while {active} trains")
        after = seen(active)
        assert not any(torch.equal(p, moving[n]) for n, p in after.items() if ".weight." not in n)
    counts = {n: int(opt.state[p]["step"]) for n, p in model.named_parameters() if p in opt.state}
    assert {count for n, count in counts.items() if ".one." in n} == {6}
    assert {count for n, count in counts.items() if ".two." in n} == {3}


def test_adapter_added_after_the_optimizer_is_missed_loudly_and_can_join():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(small("Llama"), config, adapter_name="one")
    opt = lk.LoFTAdamW(model, lr=1e-2)
    model.add_adapter("two", config)
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="Are these the active adapters"):
        step(model, opt)
    for group in lk.loft_param_groups(model):
        opt.add_param_group(group)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".two." in n}
    step(model, opt)
    step(model, opt)
    after = dict(model.named_parameters())
    assert not any(torch.equal(p, after[n]) for n, p in before.items())
