"""The operators of the C++ backend as torch sees them: opcheck, and errors that name the tensor."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import generator

from loft_kernels import backends

pytestmark = pytest.mark.skipif(
    backends.cpu_missing() is not None, reason=f"no C++ backend: {backends.cpu_missing()}"
)

SHAPES = ((6, 5, 3), (4, 7, 2))
CALLS = 1000
Arguments = dict[str, Any]


def prepare_arguments() -> Arguments:
    """Return valid arguments of prepare_ for two pairs."""
    rng = generator(3)
    sizes = [size for m, n, r in SHAPES for size in ((m, r), (r, n))]
    square = sum(6 * r * r for _, _, r in SHAPES)
    settings = torch.tensor([[0.5, 0.0, 1e-2, 0.1, 0.9, 0.999, 1e-8, 1.0, 1.0]] * len(sizes))
    return {
        "factors": [torch.randn(size, generator=rng) for size in sizes],
        "grads": [torch.randn(size, generator=rng) for size in sizes],
        "steps": [torch.tensor(3) for _ in sizes],
        "settings": settings.double(),
        "transforms": torch.zeros(square, dtype=torch.float64),
        "numbers": torch.zeros(len(sizes), 2, dtype=torch.float64),
    }


def apply_arguments() -> Arguments:
    """Return valid arguments of apply_, measured by prepare_."""
    rng = generator(4)
    args = prepare_arguments()
    torch.ops.loft_kernels.prepare_(*args.values())
    rows = [size for m, n, r in SHAPES for size in ((m, n, r), (n, m, r))]
    args.pop("numbers")
    settings, transforms = args.pop("settings"), args.pop("transforms")
    return args | {
        "guards": [torch.tensor(1.0, dtype=torch.float64) for _ in rows],
        "exp_avgs": [torch.randn(m, r, generator=rng) for m, _, r in rows],
        "second_moments": [torch.rand(m, r * (r + 1) // 2, generator=rng) for m, _, r in rows],
        "partner_bases": [torch.randn(n, r, generator=rng) for _, n, r in rows],
        "masters": [torch.empty(0) for _ in rows],
        "settings": settings,
        "transforms": transforms,
        "coefficient": 0.5,
    }


OPERATORS: dict[str, Callable[[], Arguments]] = {
    "prepare_": prepare_arguments,
    "apply_": apply_arguments,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator = getattr(torch.ops.loft_kernels, name).default
    torch.library.opcheck(operator, tuple(OPERATORS[name]().values()))


def spoil(name: str, value: torch.Tensor, how: str, rng: random.Random) -> torch.Tensor:
    """Return a tensor that an operator has to refuse."""
    if how == "dtype":
        wrong = [torch.int32, torch.complex64, torch.bool]
        # Factors, gradients and masters may have any of four dtypes.
        return value.to(rng.choice(wrong))
    if how == "shape":
        return torch.zeros([size + 1 for size in value.shape] or [2], dtype=value.dtype)
    if how == "rank":
        return value.unsqueeze(0)
    if how == "meta":
        return value.to("meta")
    if how == "sparse":
        return value.to_sparse()
    if how == "expanded":
        return value[:1].expand(value.shape)
    return torch.cat([value, value], dim=-1)[..., ::2]


# What may be wrong with each argument; values of `settings` are the caller's business.
WRONG = ("dtype", "shape", "rank", "meta")
MATRICES = ("factors", "grads", "exp_avgs", "second_moments", "partner_bases")


def spoilt_calls(seed: int) -> tuple[str, Arguments, str]:
    """Draw an operator, and arguments with one defect; returns the name to look for."""
    rng = random.Random(seed)
    operator = rng.choice(list(OPERATORS))
    args = OPERATORS[operator]()
    name = rng.choice([k for k in args if k not in ("coefficient", "masters")])
    value = args[name]
    if not isinstance(value, list):
        args[name] = spoil(name, value, rng.choice(WRONG), rng)
        return operator, args, name
    index = rng.randrange(len(value))
    kinds = [*WRONG, "count", "alias"]
    if name in MATRICES and name not in ("grads",):
        kinds.append("sparse")
    if name in ("exp_avgs", "second_moments", "partner_bases"):
        kinds += ["expanded", "strided"]
    how = rng.choice(kinds)
    if how == "alias" and (operator == "apply_" and name != "grads"):
        other = (index + 1) % len(value)
        # Of one buffer, so that both keep their shapes and overlap.
        buffer = torch.zeros(64, dtype=value[index].dtype)
        for place, start in ((index, 0), (other, 1 if value[index].dim() else 0)):
            part = buffer[start : start + max(1, value[place].numel())]
            value[place] = part.reshape(value[place].shape)
    elif how in ("count", "alias"):
        value.append(value[0].clone())
    else:
        value[index] = spoil(name, value[index], how, rng)
        if how == "sparse":
            name = f"{name}[{index}]"
    return operator, args, name


def snapshot(args: Arguments) -> list[torch.Tensor]:
    tensors = [t for v in args.values() for t in (v if isinstance(v, list) else [v])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta]
    return [t.to_dense().clone() for t in tensors if not t.is_sparse]


@pytest.mark.parametrize("part", range(4))
def test_bad_arguments_are_refused_by_name_and_nothing_is_written(part):
    for seed in range(part * CALLS // 4, (part + 1) * CALLS // 4):
        operator, args, name = spoilt_calls(seed)
        before = snapshot(args)
        with pytest.raises((RuntimeError, NotImplementedError)) as raised:
            getattr(torch.ops.loft_kernels, operator)(*args.values())
        message = str(raised.value)
        # torch's dispatcher refuses sparse tensors itself.
        refused = isinstance(raised.value, NotImplementedError) and "Sparse" in message
        assert name in message or refused, f"seed {seed}: {name} not in {message!r}"
        # prepare_ clears its own outputs while it checks.
        if operator == "apply_":
            for old, new in zip(before, snapshot(args), strict=True):
                assert torch.equal(old, new), f"seed {seed} wrote"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda a: a["exp_avgs"].__setitem__(2, a["exp_avgs"][2].double()),
            "exp_avgs[2] must be float32",
        ),
        (
            lambda a: a["second_moments"].__setitem__(1, torch.zeros(5, 5)),
            "second_moments[1] has shape (5, 5), expected (5, 6)",
        ),
        (
            lambda a: a["factors"].__setitem__(0, torch.zeros(6, 2)),
            "factors[0] has rank 2, but factors[1] has rank 3",
        ),
        (
            lambda a: a["grads"].__setitem__(3, torch.zeros(2, 6)),
            "grads[3] has shape (2, 6), but factors[3] has shape (2, 7)",
        ),
        (
            lambda a: a["partner_bases"].__setitem__(0, torch.zeros(3, 5).T),
            "partner_bases[0] must be contiguous",
        ),
        (lambda a: a["steps"].__setitem__(1, torch.tensor(1.0)), "steps[1] must be int64"),
        (lambda a: a["guards"].pop(), "guards has 3 entries, but factors has 4"),
        (
            lambda a: a["exp_avgs"].__setitem__(0, a["factors"][0]),
            "factors[0] and exp_avgs[0] share memory",
        ),
        (
            lambda a: a["grads"].__setitem__(0, a["factors"][0]),
            "factors[0] and grads[0] share memory",
        ),
        (
            lambda a: a["factors"].__setitem__(0, torch.zeros(1, 3).expand(6, 3)),
            "factors[0] is expanded",
        ),
        (
            lambda a: a["factors"].__setitem__(0, a["factors"][0].to(torch.bfloat16)),
            "masters[0] has shape (0), expected (6, 3)",
        ),
    ],
)
def test_message(change, words):
    args = apply_arguments()
    change(args)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.loft_kernels.apply_(*args.values())
    assert words in str(raised.value)
