"""Adapters on layers other than Linear, from PEFT: exact against the dense oracle, or by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracle import DensePair, Hyper, step_pairs
from problems import check_displacement, generator, normal
from runs import one_thread  # noqa: F401 - an autouse fixture
from torch import Tensor, nn
from torch.nn import functional

import loft_kernels as lk

peft = pytest.importorskip("peft", reason="the layers are PEFT's")

STEPS = 6
HYPER = Hyper(lr=2e-2, weight_decay=0.1, max_grad_norm=0.5)


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Args:
        base: makes the layer.
        inputs: draws the inputs of a step.
        dense: the layer as a function of its whole weight.
        turned: the virtual weight is the stored one transposed.
    """

    base: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    dense: Callable[[nn.Module, Tensor, Tensor], Tensor]
    turned: bool = False


def conv(kind: int, **options) -> Layer:
    base = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[kind]
    apply = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[kind]
    return Layer(
        lambda: base(3, 5, **options),
        lambda gen: normal(gen, 4, 3, *(7,) * kind),
        lambda layer, x, w: apply(
            x, w, layer.bias, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
        ),
    )


LAYERS = {
    "conv1d-3": conv(1, kernel_size=3),
    "conv2d-3x2-stride2-pad1": conv(2, kernel_size=(3, 2), stride=2, padding=1),
    "conv2d-1x1": conv(2, kernel_size=1),
    "conv3d-2": conv(3, kernel_size=2),
    "linear": Layer(
        lambda: nn.Linear(7, 5),
        lambda gen: normal(gen, 9, 7),
        lambda layer, x, w: functional.linear(x, w, layer.bias),
    ),
    "embedding": Layer(
        lambda: nn.Embedding(11, 6),
        lambda gen: torch.randint(0, 11, (4, 5), generator=gen),
        lambda layer, x, w: functional.embedding(x, w),
        turned=True,
    ),
}


def adapted(layer: Layer, **options) -> tuple[nn.Module, nn.Module]:
    """Return a PEFT model of one layer in fp64, and the layer; B and A are random."""
    torch.manual_seed(0)
    net = nn.Sequential(layer.base())
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], **options}
    model = peft.get_peft_model(net, peft.LoraConfig(**config)).double()
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, generator=generator(len(name)))
    return model, model.base_model.model[0]


def loss_of(outputs: Tensor, k: int) -> Tensor:
    return (outputs - normal(generator(500 + k), *outputs.shape)).square().mean()


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        *(pytest.param(name, False, id=name) for name in LAYERS),
        pytest.param("conv2d-3x2-stride2-pad1", True, id="channels-last-gradients"),
    ],
)
def test_adapted_layer_follows_the_dense_oracle(name, channels_last):
    layer = LAYERS[name]
    model, wrapped = adapted(layer)
    opt = lk.LoFTAdamW(
        model, HYPER.lr, weight_decay=HYPER.weight_decay, max_grad_norm=HYPER.max_grad_norm
    )
    (pair,) = lk.find_adapters(model).pairs
    base = wrapped.base_layer
    shape = base.weight.T.shape if layer.turned else base.weight.shape
    oracle = DensePair(
        (base.weight.T if layer.turned else base.weight).detach().flatten(1),
        pair.lora_B.flatten(1),
        pair.lora_A.flatten(1),
        pair.scaling.read(),
    )
    start = oracle.weight
    for k in range(STEPS):
        x = layer.inputs(generator(k))
        weight = oracle.weight.requires_grad_()
        whole = weight.T if layer.turned else weight.view(shape)
        (grad,) = torch.autograd.grad(loss_of(layer.dense(base, x, whole), k), weight)
        step_pairs([oracle], [grad], HYPER)

        loss_of(model(x), k).backward()
        if channels_last:
            pair.lora_A.grad = pair.lora_A.grad.to(memory_format=torch.channels_last)
        opt.step()
        opt.zero_grad()
    b, a = pair.lora_B.detach().flatten(1), pair.lora_A.detach().flatten(1)
    trained = oracle.base + pair.scaling.read() * b @ a
    check_displacement(trained, oracle.weight, start, 1e-8, "the layer's weight")


def test_clip_reaches_gradients_that_are_no_matrix_in_place():
    model, _ = adapted(LAYERS["conv2d-3x2-stride2-pad1"])
    opt = lk.LoFTAdamW(model)
    loss_of(model(LAYERS["conv2d-1x1"].inputs(generator(0))), 0).backward()
    (pair,) = lk.find_adapters(model).pairs
    pair.lora_A.grad = pair.lora_A.grad.to(memory_format=torch.channels_last)
    before = pair.lora_A.grad.clone()
    norm = lk.clip_grad_norm_(opt, 1e-3)
    torch.testing.assert_close(pair.lora_A.grad, before * (1e-3 / (norm.double() + 1e-6)))


def test_resume_of_a_convolution_is_bitwise():
    layer, ends = LAYERS["conv2d-3x2-stride2-pad1"], []
    for resumed_at in (None, 3):
        model, _ = adapted(layer)
        opt = lk.LoFTAdamW(model, 2e-2)
        for k in range(STEPS):
            if k == resumed_at:
                saved = opt.state_dict()
                opt = lk.LoFTAdamW(model, 2e-2)
                opt.load_state_dict(saved)
            loss_of(model(layer.inputs(generator(k))), k).backward()
            opt.step()
            opt.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_half_precision_convolution_keeps_a_master():
    model, _ = adapted(LAYERS["conv2d-3x2-stride2-pad1"])
    model.bfloat16()
    opt = lk.LoFTAdamW(model, 1e-2)
    for k in range(2):
        x = LAYERS["conv2d-1x1"].inputs(generator(k)).bfloat16()
        loss_of(model(x).double(), k).backward()
        opt.step()
        opt.zero_grad()
    (pair,) = lk.find_adapters(model).pairs
    for p in (pair.lora_B, pair.lora_A):
        master = opt.state[p]["master"]
        rows = p.flatten(1) if p is pair.lora_B else p.flatten(1).T
        assert torch.equal(master.bfloat16(), rows)
        assert not torch.equal(master, rows.float())


def test_convolution_with_groups_is_adamw_by_name():
    layer = Layer(lambda: nn.Conv2d(4, 6, 3, groups=2), None, None)
    with pytest.warns(UserWarning, match="groups > 1"):
        model, _ = adapted(layer)
    mixed = nn.ModuleList([model, adapted(LAYERS["linear"])[0]])
    with pytest.warns(UserWarning, match=r"lora_B\.default.*with groups.*block-diagonal"):
        opt = lk.LoFTAdamW(mixed)
    assert len(opt._slots) == 1


def test_channels_last_factor_is_refused_by_name():
    model, _ = adapted(LAYERS["conv2d-3x2-stride2-pad1"])
    opt = lk.LoFTAdamW(model)
    model.to(memory_format=torch.channels_last)
    loss_of(model(LAYERS["conv2d-1x1"].inputs(generator(0))), 0).backward()
    message = (
        r"lora_A\.default\.weight of shape \(2, 3, 3, 2\) is not contiguous \(channels_last\?\)"
    )
    with pytest.raises(ValueError, match=message):
        opt.step()
    with pytest.raises(ValueError, match=message):
        lk.LoFTAdamW(model)
    model.to(memory_format=torch.contiguous_format)
    opt.step()


def test_named_embedding_factors_are_paired_and_not_adamw():
    model, _ = adapted(LAYERS["embedding"])
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    opt = lk.LoFTAdamW([{"params": named, "scaling": 3.0}])
    assert [slot.name for slot in opt._slots] == ["base_model.model.0"]
    with pytest.raises(ValueError, match=r"lora_embedding_A.* no partner .*lora_embedding_B"):
        lk.LoFTAdamW([{"params": named[:1], "scaling": 3.0}])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize("name", LAYERS)
def test_merged_weights_are_the_trained_ones(name, options):
    layer = LAYERS[name]
    model, _ = adapted(layer, **options)
    opt = lk.LoFTAdamW(model, 2e-2)
    assert len(opt._slots) == 1
    for k in range(2):
        loss_of(model(layer.inputs(generator(k))), k).backward()
        opt.step()
        opt.zero_grad()
    x = layer.inputs(generator(9))
    trained = model(x).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), trained, rtol=1e-6, atol=1e-8)
