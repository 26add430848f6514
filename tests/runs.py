"""Small networks to step an optimizer on, and bitwise pictures of what it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from problems import TinyLoRA, generator, make_adapter, normal
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Every combination of options that stores another kind of state or moves other factors.
OPTIONS = {
    "full": {},
    "diagonal": {"second_moment": "diagonal"},
    "uncalibrated": {"calibrate": False},
    "simultaneous": {"alternate": False},
}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# Where a GPU is, a run of a framework goes through the kernels as well.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep tiny matrices off the thread pool; modules that import this use it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Two pairs of different shape, rank and scaling, and a bias that plain AdamW serves."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> None:
        super().__init__()
        self.first = make_adapter(6, 5, 2, seed)
        self.second = make_adapter(4, 7, 3, seed + 1)
        self.bias = nn.Parameter(normal(generator(seed + 2), 6))
        self.to(dtype)

    @property
    def pairs(self) -> list[TinyLoRA]:
        return [self.first, self.second]

    def targets(self, k: int) -> list[Tensor]:
        """Return what the weights of both pairs are drawn to at step k."""
        gen = generator(1000 + k)
        return [normal(gen, *pair.base.shape) for pair in self.pairs]

    def loss(self, k: int) -> Tensor:
        """Return the loss of step k, for autograd."""
        weights = self.first.weight + self.bias[:, None], self.second.weight
        targets = [t.to(self.bias.dtype) for t in self.targets(k)]
        return sum((w - t).square().sum() for w, t in zip(weights, targets, strict=True)) / 16

    @torch.no_grad()
    def set_gradients(self, k: int) -> None:
        """Give what is trainable the gradients of the loss, exact before they are rounded.

        Autograd would do, but a half-precision matmul on a CPU takes longer than ten steps.
        """
        exact: dict[nn.Parameter, Tensor] = {}
        shift = [self.bias.double()[:, None], 0.0]
        targets = [t.to(self.bias.device) for t in self.targets(k)]
        for pair, target, added in zip(self.pairs, targets, shift, strict=True):
            b, a = pair.lora_B.double(), pair.lora_A.double()
            gradient = (pair.base.double() + pair.scaling * b @ a + added - target) / 8
            exact[pair.lora_B] = pair.scaling * gradient @ a.T
            exact[pair.lora_A] = pair.scaling * b.T @ gradient
            exact.setdefault(self.bias, gradient.sum(1))
        for p, grad in exact.items():
            p.grad = grad.to(p.dtype) if p.requires_grad else None


def assert_kernels(opt: Any, device: str) -> None:
    """Fail if a run on a GPU did not end on the kernels."""
    if device == "cuda":
        assert opt._plan is not None
        assert {bucket.device.type for bucket in opt._plan.buckets()} == {"cuda"}


def on_one_gpu(arguments: Any) -> Any:
    """Keep a Trainer from DataParallel where there are several GPUs."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def forget_accelerate() -> None:
    """Let the next Accelerator choose: the first one's device is kept for the whole process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)


def take_step(net: Net, opt: torch.optim.Optimizer, k: int) -> None:
    """Take step k on fresh gradients."""
    net.set_gradients(k)
    opt.step()


def take_steps(net: Net, opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take several steps."""
    for k in steps:
        take_step(net, opt, k)


def give_gradients(parameters: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """Set gradients that do not depend on the parameters' values."""
    gen = generator(seed)
    for p in parameters:
        p.grad = (scale * normal(gen, *p.shape)).to(p.dtype)


def picture(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy everything that a step or a load may change, under readable names."""
    seen: dict[str, Any] = {"nonfinite_steps": getattr(opt, "nonfinite_steps", None)}
    for g, group in enumerate(opt.param_groups):
        seen |= {f"groups[{g}].{k}": v for k, v in group.items() if k != "params"}
        for i, param in enumerate(group["params"]):
            name = group["param_names"][i] if "param_names" in group else f"groups[{g}][{i}]"
            seen |= {name: param.detach(), f"{name}.grad": param.grad}
            state = opt.state.get(param, {})
            seen |= {f"state[{name}].{k}": v for k, v in state.items()}
    return {k: _copy(v) for k, v in seen.items()}


def _copy(value: Any) -> Any:
    """Copy one entry of a picture; sparse and distributed tensors as what they hold here."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.detach().to_dense().clone()


def without_gradients(seen: dict[str, Any]) -> dict[str, Any]:
    """Leave the gradients out of a picture."""
    return {k: v for k, v in seen.items() if not k.endswith(".grad")}


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists, to compare them with :func:`assert_same`."""
    if not isinstance(tree, dict | list | tuple):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = {path: type(tree)}
    for key, value in items:
        found |= leaves(value, f"{path}[{key!r}]")
    return found


def same_bits(a: Any, b: Any) -> bool:
    """Tell whether two values agree to the last bit: NaN equals itself, -0 differs from 0."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    if a.is_meta:
        return True
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List what differs between two pictures."""
    found = [f"{k} appeared" for k in after.keys() - before.keys()]
    found += [f"{k} vanished" for k in before.keys() - after.keys()]
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if not same_bits(a, b):
            found.append(f"{key}: {_describe(a, b)}")
    return sorted(found)


def _describe(a: Any, b: Any) -> str:
    """Say how two values differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return f"{a.dtype} against {b.dtype}, largest {(a.double() - b.double()).abs().max():.3g}"
    return f"{a!r} against {b!r}"


def assert_same(before: dict[str, Any], after: dict[str, Any], what: str = "") -> None:
    """Fail unless two pictures are equal to the last bit."""
    found = differences(before, after)
    assert not found, f"{what}: {len(found)} entries differ: " + "; ".join(found[:6])


def assert_refuses(
    action: Callable[[], Any],
    opt: torch.optim.Optimizer,
    error: type[Exception],
    words: Iterable[str],
) -> str:
    """Check that an action raises exactly this error with these words and writes nothing."""
    before = picture(opt)
    with pytest.raises(error) as raised:
        action()
    message = str(raised.value)
    assert type(raised.value) is error, f"{type(raised.value).__name__}: {message}"
    assert_same(before, picture(opt), f"after {error.__name__}({message[:80]})")
    missing = [w for w in words if w not in message]
    assert not missing, f"{missing} not in the message {message!r}"
    return message
