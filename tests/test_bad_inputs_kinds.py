"""Kinds of adapters and wrappers, row 20 of the table: paired, or plain AdamW with one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from runs import (
    Net,
    assert_same,
    give_gradients,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_steps,
)
from torch import nn

import loft_kernels as lk


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 1, torch.Size(shape).numel()).reshape(shape))


class Adapter(nn.Module):
    """An adapter in PEFT's form: dicts of tensors per adapter name."""

    def __init__(self, b: Any, a: Any, *, prefix: str = "lora_", variant: Any = None) -> None:
        super().__init__()
        names = ("default",) if not isinstance(b, tuple) else ("default", "second")
        b, a = (x if isinstance(x, tuple) else (x,) for x in (b, a))
        self.scaling = {"default": 2.0, "second": 0.5}
        setattr(self, f"{prefix}B", nn.ParameterDict(dict(zip(names, b, strict=True))))
        setattr(self, f"{prefix}A", nn.ParameterDict(dict(zip(names, a, strict=True))))
        if variant is not None:
            self.lora_variant = {"default": variant}


class DoraLinearVariant:
    """Named like PEFT's, whose product is still s * B @ A."""


class MiCALinearVariant:
    """Named like PEFT's, whose product is another one."""


class Kinds(nn.Module):
    """A healthy pair and one adapter of another kind."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.good = Adapter(parameter(4, 2), parameter(2, 3))
        self.other = other


PLAIN = {
    "row20-more-than-two-dimensions": (
        Adapter(parameter(4, 2, 1, 1), parameter(2, 3, 3, 3)),
        "more than two dimensions and is no convolution",
    ),
    "row20-embedding-of-another-product": (
        Adapter(
            parameter(4, 2),
            parameter(2, 9),
            prefix="lora_embedding_",
            variant=MiCALinearVariant(),
        ),
        "MiCALinearVariant",
    ),
    "row20-other-variant": (
        Adapter(parameter(4, 2), parameter(2, 3), variant=MiCALinearVariant()),
        "MiCALinearVariant",
    ),
}


@pytest.mark.parametrize(("other", "reason"), PLAIN.values(), ids=PLAIN)
def test_unsupported_kind_is_never_half_paired(other, reason):
    net = Kinds(other)
    with pytest.warns(UserWarning, match=rf"2 LoRA factors train with plain AdamW.*{reason}") as w:
        opt = lk.LoFTAdamW(net, lr=1e-2)
    assert len(w) == 1
    for name in ("other", "default"):
        assert name in str(w[0].message)
    copies = [nn.Parameter(p.detach().clone()) for p in other.parameters()]
    adamw = torch.optim.AdamW(copies, lr=1e-2, weight_decay=0.0)
    for k in range(3):
        give_gradients(net.parameters(), k)
        for copied, p in zip(copies, other.parameters(), strict=True):
            copied.grad = p.grad.clone()
        opt.step()
        adamw.step()
    assert all(map(torch.equal, copies, other.parameters()))
    assert all("second_moment" in opt.state[p] for p in net.good.parameters())


def test_row20_dora_is_paired_and_its_magnitude_is_plain():
    """DoRA rescales the product s * B @ A, which stays the pair's own; the docstring says so."""
    net = Kinds(Adapter(parameter(4, 2), parameter(2, 3), variant=DoraLinearVariant()))
    net.other.magnitude = parameter(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = lk.LoFTAdamW(net, lr=1e-2)
    give_gradients(net.parameters(), 0)
    opt.step()
    factors = [p for name, p in net.named_parameters() if "lora_" in name]
    assert all("partner_basis" in opt.state[p] for p in factors)
    assert set(opt.state[net.other.magnitude]) == {"step", "exp_avg", "exp_avg_sq"}


def test_row20_each_adapter_of_a_layer_is_its_own_pair():
    both = Adapter((parameter(4, 2), parameter(4, 3)), (parameter(2, 5), parameter(3, 5)))
    opt = lk.LoFTAdamW(both, lr=1e-2)
    apart = {}
    for name, scaling in (("default", 2.0), ("second", 0.5)):
        named = {"x.lora_B": both.lora_B[name], "x.lora_A": both.lora_A[name]}
        named = {k: nn.Parameter(p.detach().clone()) for k, p in named.items()}
        own = lk.LoFTAdamW([{"params": list(named.items()), "scaling": scaling}], lr=1e-2)
        apart[name] = (list(named.values()), own)
    for k in range(3):
        for name, (copies, own) in apart.items():
            factors = both.lora_B[name], both.lora_A[name]
            give_gradients(factors, 10 * k + len(name))
            give_gradients(copies, 10 * k + len(name))
            own.step()
        opt.step()
    for name, (copies, own) in apart.items():
        for p, copied in zip((both.lora_B[name], both.lora_A[name]), copies, strict=True):
            assert torch.equal(p, copied), name
            assert_same(own.state[copied], opt.state[p], name)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile], ids=["row20-ddp-like", "row20-compile"])
def test_wrapped_model_is_paired_by_module(wrap):
    runs = []
    for wrapper in (lambda net: net, wrap):
        net = Net()
        opt = lk.LoFTAdamW(wrapper(net), lr=1e-2)
        assert all(name.count("lora_") == 1 for name in opt.param_groups[0]["param_names"])
        take_steps(net, opt, range(3))
        for group in opt.param_groups:
            names = [n.removeprefix("module.") for n in group["param_names"]]
            group["param_names"] = [n.removeprefix("_orig_mod.") for n in names]
        runs.append(picture(opt))
    assert_same(*runs, "wrapped")
