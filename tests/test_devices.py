"""Layers of one model on several devices of one process, as `device_map` places them.

    LOFT_REQUIRE_GPU=1 python -m pytest tests/test_devices.py -n 0

runs everything where there are two GPUs; one CPU stands in for them elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from problems import check_displacement, generator, make_adapter, normal
from runs import one_thread  # noqa: F401 - an autouse fixture
from torch import nn

import loft_kernels as lk

SIZES = ((96, 80, 8), (64, 96, 16), (80, 64, 8), (48, 80, 4))
STEPS = 6


def two_gpus(*values: str):
    return pytest.param(values, marks=pytest.mark.gpu, id="-".join(values))


PLACES = [pytest.param(("cpu", "cpu"), id="cpu"), two_gpus("cuda:0", "cuda:1")]


@pytest.fixture(autouse=True)
def devices_are_here(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec is None:
        return
    text = str(callspec.params)
    if "cuda:1" in text and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


class Net(nn.Module):
    """Pairs that take turns on the devices, and a plain parameter on each."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            make_adapter(m, n, r, seed=k).float().to(devices[k % len(devices)])
            for k, (m, n, r) in enumerate(SIZES)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(5, device=device)) for device in devices
        )

    def set_gradients(self, k: int) -> None:
        for i, p in enumerate(self.parameters()):
            if p.requires_grad:
                p.grad = normal(generator(100 * k + i), *p.shape).float().to(p.device)

    def weights(self) -> list[torch.Tensor]:
        return [layer.weight.detach().cpu() for layer in self.layers]


def train(net: Net, opt: lk.LoFTAdamW, steps: range) -> None:
    for k in steps:
        net.set_gradients(k)
        opt.step()


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("devices", PLACES)
def test_pairs_on_several_devices_train_as_on_one(devices, max_norm):
    ends = []
    for places in (devices[:1], devices):
        net = Net(places)
        if len(places) == 1:
            net.biases.append(nn.Parameter(torch.zeros(5, device=places[0])))
        start = net.weights()
        precision = "ieee" if max_norm else "default"
        opt = lk.LoFTAdamW(net, 1e-2, max_grad_norm=max_norm, precision=precision)
        train(net, opt, range(STEPS))
        ends.append(net.weights())
        if "cuda:0" in devices:
            assert {str(bucket.device) for bucket in opt._plan.buckets()} == set(places)
    for k, (one, several) in enumerate(zip(*ends, strict=True)):
        # The norm is a sum in another order, whose last bit may be another.
        check_displacement(several, one, start[k], 1e-5 if max_norm else 0.0, f"layer {k}")


@pytest.mark.parametrize("devices", PLACES)
def test_state_saved_on_several_devices_loads_on_one(devices, tmp_path):
    net = Net(devices)
    opt = lk.LoFTAdamW(net, 1e-2)
    train(net, opt, range(3))
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", map_location="cpu", weights_only=True)
    ends = []
    for places in (devices, devices[:1] * 2):
        again = Net(places)
        again.load_state_dict(saved["net"])
        start = again.weights()
        resumed = lk.LoFTAdamW(again, 1e-2)
        resumed.load_state_dict(saved["opt"])
        for p in again.parameters():
            for key, value in resumed.state.get(p, {}).items():
                # AdamW keeps its counts on the CPU, as torch does.
                assert value.device == p.device or (key == "step" and value.dtype != torch.int64)
        train(again, resumed, range(3, STEPS))
        ends.append(again.weights())
    for k, (several, one) in enumerate(zip(*ends, strict=True)):
        check_displacement(one, several, start[k], 0.0, f"layer {k}")


@pytest.mark.parametrize("devices", PLACES)
def test_current_device_is_not_the_parameters_device(devices):
    """All pairs on the second GPU while the first is current: the same bits as the other way."""
    ends = []
    for device in devices:
        net = Net((device, device))
        train(net, lk.LoFTAdamW(net, 1e-2, max_grad_norm=1.0), range(STEPS))
        ends.append(net.weights())
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("devices", [("cpu",), two_gpus("cuda:0", "cuda:1")])
def test_model_moved_after_construction_goes_on(devices):
    net = Net(("cpu", "cpu"))
    opt = lk.LoFTAdamW(net, 1e-2)
    train(net, opt, range(2))
    for k, device in enumerate(devices, start=2):
        net.to(device)
        train(net, opt, range(k, k + 1))
        for p in net.layers.parameters():
            assert opt.state[p]["exp_avg"].device == p.device
            assert int(opt.state[p]["step"]) == k + 1


@pytest.mark.gpu
def test_pair_on_two_devices_is_refused_by_name():
    net = make_adapter(6, 5, 2, seed=0).float()
    opt = lk.LoFTAdamW(net)
    net.lora_B.data = net.lora_B.data.cuda()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    message = "lora_B is on cuda:0 but lora_A on cpu: move both factors of a pair to one device"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert not opt.state


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (("cuda:0", "cpu"), "some pairs are on a GPU, others not: cpu, cuda:0"),
        (("cpu", "cuda:0"), "some pairs are on a GPU, others not: cpu, cuda:0"),
        (("cuda:0",), "some parameters are on a GPU, others not"),
    ],
)
def test_cpu_and_gpu_in_one_step_take_the_reference_path_and_say_so(devices, reason):
    net = Net(devices)
    net.biases.append(nn.Parameter(torch.zeros(5)))
    with pytest.warns(UserWarning, match=f"on the reference path .{reason}"):
        train(net, lk.LoFTAdamW(net, 1e-2, max_grad_norm=1.0), range(2))
