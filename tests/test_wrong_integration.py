"""What breaks LoFT in a framework is loud: the exact words of every refusal."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import (
    Net,
    assert_same,
    one_thread,  # noqa: F401 - an autouse fixture
    picture,
    take_step,
    take_steps,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import loft_kernels as lk

SHARDED = (
    "first.lora_B is a DTensor: LoFT needs whole factors, and sharded or quantized adapters are "
    "not supported. Keep them whole: use DDP, or with FSDP2 pass the LoRA parameters as "
    "fully_shard(ignored_params=...) and all-reduce their gradients before step()"
)


def says(message: str) -> str:
    return f"^{re.escape(message)}$"


def shard(module: nn.Module, **options) -> nn.Module:
    """Shard on the CPU, also where there is a GPU."""
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)), **options)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parameters(module: nn.Module) -> nn.Module:
    """Turn the frozen base into parameters, which FSDP shards."""
    for pair in (module.first, module.second):
        base = pair._buffers.pop("base")
        pair.base = nn.Parameter(base, requires_grad=False)
    return module


def test_fsdp2_model_is_refused_at_construction(one_process):
    net = Net()
    shard(net)
    with pytest.raises(NotImplementedError, match=says(SHARDED)):
        lk.LoFTAdamW(net)


def test_sharded_factors_are_not_called_frozen(one_process):
    net = Net()
    shard(net)
    with pytest.raises(ValueError, match=r"no trainable LoRA pair in .*is a DTensor") as raised:
        lk.LoFTAdamW(net, on_unsupported="adamw")
    assert "none is trainable" not in str(raised.value)


def test_fsdp2_swap_by_accelerate_is_refused_at_the_step(one_process):
    """accelerate puts placeholders into the groups, shards, and swaps the shards in."""
    switch = pytest.importorskip("accelerate.utils.fsdp_utils", reason="accelerate is optional")
    net = Net()
    opt = lk.LoFTAdamW(net)
    old = {p.data_ptr(): name for name, p in net.named_parameters()}
    for group in opt.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1)
            group["params"][i].data_ptr = p.data_ptr()
    placeholder = says(
        "first.lora_B has shape (1,), but a LoRA factor is a matrix. 1-D factors are usually "
        "flattened by FSDP or DeepSpeed ZeRO, which LoFT does not support: use DDP or ZeRO stage 0"
    )
    with pytest.raises(ValueError, match=placeholder):
        opt.step()
    shard(net)
    sharded = dict(net.named_parameters())
    mapping = {pointer: sharded[name] for pointer, name in old.items()}
    switch.fsdp2_switch_optimizer_parameters(opt, mapping)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(NotImplementedError, match=says(SHARDED)):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("part", ["all", "first"])
def test_fsdp2_after_the_optimizer_is_refused_at_the_step(one_process, part):
    """Other parameters stand in the module then, and get the gradients."""
    net = Net()
    opt = lk.LoFTAdamW(net)
    before = picture(opt)
    shard(net if part == "all" else net.first)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(NotImplementedError, match=says(SHARDED)):
        opt.step()
    assert not opt.state
    after = picture(opt)
    assert_same(*({k: v for k, v in x.items() if ".grad" not in k} for x in (before, after)))


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.filterwarnings("ignore:FSDP is switching to use", "ignore::FutureWarning")
def test_fsdp1_with_flat_parameters_is_refused(one_process, made):
    net = Net()
    opt = lk.LoFTAdamW(net) if made == "before" else None
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=False)
    message = (
        "first.lora_B is a part of a flat parameter, as FSDP1 makes it with use_orig_params=False: "
        "LoFT needs whole factors. Use DDP, or FSDP2 with the LoRA parameters in "
        "fully_shard(ignored_params=...) and all-reduce their gradients before step()"
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        lk.LoFTAdamW(wrapped) if opt is None else opt.step()


def test_exchanged_factors_are_refused_at_the_step():
    net = Net()
    opt = lk.LoFTAdamW(net)
    take_step(net, opt, 0)
    opt.zero_grad()
    net.second.load_state_dict(
        {k: v.clone() for k, v in net.second.state_dict().items()}, assign=True
    )
    before = picture(opt)
    net.set_gradients(1)
    message = (
        "second.lora_B has no gradient, because the model holds another tensor in its place since "
        "the optimizer was made (load_state_dict(assign=True)?): make the optimizer afterwards"
    )
    with pytest.raises(RuntimeError, match=says(message)):
        opt.step()
    after = picture(opt)
    assert_same(*({k: v for k, v in x.items() if ".grad" not in k} for x in (before, after)))


def test_copies_in_the_optimizer_are_no_exchange():
    """Somebody's fp32 copies, one of which gets no gradient at this step."""
    net = Net()
    opt = lk.LoFTAdamW(net)
    for group in opt.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    net.set_gradients(0)
    copies = [p for group in opt.param_groups for p in group["params"]]
    for p in copies[1:]:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="has no gradient, so the other factor"):
        opt.step()
    assert [p for p in copies if p not in opt.state] == copies[:1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_the_optimizer_asks_no_model(copied):
    net = Net()
    opt = copied(lk.LoFTAdamW(net))
    net.set_gradients(0)
    with pytest.warns(UserWarning, match="none of the 2 LoRA pairs has a gradient"):
        opt.step()


def test_fsdp2_recipe_of_the_docs_goes_in_one_order(one_process, monkeypatch):
    """A set goes by address, which every rank has its own of: gradients of several factors add."""
    text = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()
    (recipe,) = re.findall(r"```python\n(adapters = .*?)```", text, re.DOTALL)
    net = parameters(Net())
    trained = [p for p in net.parameters() if p.requires_grad]

    class Loss:
        def backward(self) -> None:
            for p in trained:
                p.grad = torch.ones_like(p)

    seen = []
    monkeypatch.setattr(dist, "all_reduce", seen.append)
    names = {"model": net, "loss": Loss(), "fully_shard": shard, "dist": dist}
    exec(recipe, {**names, "LoFTAdamW": lk.LoFTAdamW})
    assert [id(g) for g in seen] == [id(p.grad) for p in trained]


def test_fsdp2_with_whole_adapters_trains_as_without(one_process):
    runs = []
    for sharded in (False, True):
        net = parameters(Net())
        if sharded:
            shard(net, ignored_params={p for p in net.parameters() if p.requires_grad})
            assert type(net.first.base).__name__ == "DTensor"
        opt = lk.LoFTAdamW(net)
        for k in range(3):
            for p in net.parameters():
                if p.requires_grad:
                    p.grad = torch.full_like(p, 0.1 * (k + 1))
            opt.step()
        runs.append(picture(opt))
    assert_same(*runs, "with a sharded base")


def test_sharded_plain_parameter_is_refused_by_name(one_process):
    net = Net()
    shard(net, ignored_params={p for n, p in net.named_parameters() if "lora" in n})
    opt = lk.LoFTAdamW(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    message = (
        "bias is a DTensor, which cannot share a step with whole LoRA factors: give it to a "
        "torch.optim.AdamW of its own"
    )
    with pytest.raises(NotImplementedError, match=says(message)):
        opt.step()


def flatten(opt: torch.optim.Optimizer) -> None:
    """Replace the groups as DeepSpeed ZeRO 1 and 2 do: one flat fp32 partition each."""
    for group in opt.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]


@pytest.mark.parametrize("steps", [0, 3])
def test_zero_1_and_2_are_refused_at_the_step(steps):
    net = Net()
    opt = lk.LoFTAdamW(net)
    take_steps(net, opt, range(steps))
    flatten(opt)
    message = (
        "the parameter groups now hold [1, 1] tensors instead of [4, 1]: a wrapper (DeepSpeed "
        "ZeRO, FSDP) flattened them, or left frozen ones out, and the LoRA pairing is lost (first, "
        "second). LoFT needs whole factors: use DDP or ZeRO stage 0, and both factors trainable "
        "with DeepSpeed's bf16"
    )
    with pytest.raises(RuntimeError, match=says(message)):
        opt.step()


def test_zero_3_is_refused_at_construction():
    net = Net()
    for k, p in enumerate(net.parameters()):
        p.ds_id = k
        p.data = torch.empty(0)
    message = (
        "first.lora_B is partitioned by DeepSpeed ZeRO stage 3: LoFT needs whole factors. Use DDP "
        "or ZeRO stage 0"
    )
    with pytest.raises(NotImplementedError, match=says(message)):
        lk.LoFTAdamW(net)


def test_flattened_factors_are_refused_at_construction():
    net = Net()
    net.first.lora_B.data = net.first.lora_B.data.flatten()
    message = (
        "first.lora_B has shape (12,), but a LoRA factor is a matrix. 1-D factors are usually "
        "flattened by FSDP or DeepSpeed ZeRO, which LoFT does not support: use DDP or ZeRO stage 0"
    )
    with pytest.raises(ValueError, match=says(message)):
        lk.LoFTAdamW(net)


def test_lost_pairing_is_refused_where_names_tell_it():
    named = [(n, p) for n, p in Net().named_parameters()]
    message = (
        "first.lora_B and first.lora_A form a LoRA pair, but names do not tell its scaling "
        "alpha/r. Pass the model itself, LoFTAdamW(model, ...), or give the parameter group a key "
        "'scaling' (a number, or a dict from layer name to number)"
    )
    with pytest.raises(ValueError, match=says(message)):
        lk.LoFTAdamW(named)


def test_a_list_without_names_warns_that_it_is_adamw():
    message = (
        "LoFTAdamW was given parameters without LoRA pairs, so it is plain AdamW. A list of "
        "tensors carries no pairing: pass the model itself, or loft_param_groups(model)"
    )
    with pytest.warns(UserWarning, match=says(message)):
        lk.LoFTAdamW(list(Net().parameters()))


def test_fresh_parameters_in_the_old_places_keep_the_pairing():
    """The pairing goes by place, so a swap of the tensor objects cannot lose it."""
    net = Net()
    opt = lk.LoFTAdamW(net)
    for group in opt.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()
    first, second = (group["params"] for group in opt.param_groups)
    assert all("partner_basis" in opt.state[p] for p in first)
    assert set(opt.state[second[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_zero_trainable_adapters():
    net = Net().requires_grad_(False)
    message = (
        "no trainable LoRA pair in Net: looked for submodules with lora_A and lora_B (parameters, "
        "Linear layers, or dicts of them per adapter). There are 4 lora_A/lora_B parameters, but "
        "none is trainable: load the adapter with is_trainable=True, or activate it with "
        "set_adapter(). For a model without adapters use torch.optim.AdamW"
    )
    with pytest.raises(ValueError, match=says(message)):
        lk.LoFTAdamW(net)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_mixed_devices_in_a_pair():
    with FakeTensorMode():  # no GPU has to be here
        net = nn.Module()
        net.lora_B = nn.Parameter(torch.empty(4, 2, device="cuda:0"))
        net.lora_A = nn.Parameter(torch.empty(2, 3, device="cpu"))
        opt = lk.LoFTAdamW(net)
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        message = "lora_B is on cuda:0 but lora_A on cpu: move both factors of a pair to one device"
        with pytest.raises(RuntimeError, match=says(message)):
            opt.step()


def test_no_gradient_on_any_pair_warns_once():
    """The adapter that is being trained is not the one that the optimizer holds."""
    net = Net()
    opt = lk.LoFTAdamW(net)
    take_step(net, opt, 0)
    before = picture(opt)
    opt.zero_grad()
    message = (
        "none of the 2 LoRA pairs has a gradient at this step, so no adapter moves. Are these the "
        "active adapters? An optimizer holds those that were trainable when it was made"
    )
    with pytest.warns(UserWarning, match=says(message)):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    after = picture(opt)
    assert all(after[k] is None for k in after if k.endswith(".grad"))
    assert_same(*({k: v for k, v in x.items() if not k.endswith(".grad")} for x in (before, after)))
