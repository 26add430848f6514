"""One step of the C++ backend and of the reference path in fp32 and fp64, from one shared state."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from problems import generator, make_adapter, normal
from rules import FLOOR, FLOOR_BETWEEN_PATHS, FLOOR_RANDOM, U32, t2_violations
from runs import DTYPES
from torch import Tensor, nn

import loft_kernels as lk
from loft_kernels.state import HALF_DTYPES

LONG = (
    1.0  # learning rate of the step under test: rounding X - lr * update is no error of the update
)


@dataclass(frozen=True)
class Problem:
    """Some pairs and their history.

    Attributes:
        shapes: m, n, r of every pair.
        dtype: of the parameters, by name.
        seed: of all numbers.
        history: steps before the one under test.
        start: "general", or "zero" for LoRA's usual B = 0.
        layout: how gradients lie in memory: "contiguous", "transposed", "strided", "expanded".
        missing: (pair, factor) without a gradient at the step under test.
        noise: of the gradients, beside a mean of size 1.
        options: of the optimizer.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtype: str = "fp32"
    seed: int = 1
    history: int = 3
    start: str = "general"
    layout: str = "contiguous"
    missing: tuple[tuple[int, str], ...] = ()
    noise: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.ModuleList:
        pairs = [make_adapter(*s, self.seed + k, self.start) for k, s in enumerate(self.shapes)]
        return nn.ModuleList(pairs).to(DTYPES[self.dtype])

    def set_gradients(self, module: nn.ModuleList, step: int) -> None:
        """Give every factor a mean gradient with noise, laid out as asked."""
        mean, noise = generator(self.seed), generator(self.seed * 1000 + step)
        for p in module.parameters():
            grad = normal(mean, *p.shape) + self.noise * normal(noise, *p.shape)
            p.grad = laid_out((0.1 * grad).to(p.dtype), self.layout)
        for k, name in self.missing if step == self.history else ():
            module[k].get_parameter(name).grad = None


def laid_out(grad: Tensor, layout: str) -> Tensor:
    """Copy a gradient into another memory layout."""
    if layout == "transposed":
        return grad.T.contiguous().T
    if layout == "strided":
        wide = torch.full((grad.shape[0], 2 * grad.shape[1]), torch.nan, dtype=grad.dtype)
        wide[:, 1::2] = grad
        return wide[:, 1::2]
    return grad[:1].expand_as(grad) if layout == "expanded" else grad


def twin(
    module: nn.ModuleList, opt: lk.LoFTAdamW, options: dict[str, Any], dtype: torch.dtype | None
) -> tuple[nn.ModuleList, lk.LoFTAdamW]:
    """Copy a run for the reference path, into another dtype if asked."""
    other = copy.deepcopy(module)
    other = other if dtype is None else other.to(dtype)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.to(q.dtype)
    other_opt = lk.LoFTAdamW(other, lr=LONG, backend="reference", **options)
    other_opt.load_state_dict(opt.state_dict())
    other_opt.param_groups[0]["lr"] = LONG
    return other, other_opt


def violations(problem: Problem, *, drawn: bool = False, shaken: bool = False) -> list[str]:
    """Compare parameters and every state tensor of one step by rule T2.

    Args:
        problem: what to compare on.
        drawn: the problem is random: the wider floor of :mod:`rules`, and rule T4's allowance for
            the condition of a factor.
        shaken: compare with an fp64 run from moments changed by what a sum of r(r+1)/2 rounded
            products errs, in place of fp32's own error: that is one draw, small by chance.
    """
    module = problem.build()
    opt = lk.LoFTAdamW(module, lr=1e-2, backend="cpu", **problem.options)
    for step in range(problem.history):
        problem.set_gradients(module, step)
        opt.step()
    problem.set_gradients(module, problem.history)
    condition = largest_condition(module)
    opt.param_groups[0]["lr"] = LONG
    # With damping C is not I where the partner stays, and only equal dtypes see that it stays.
    wide = None if problem.options.get("damping") else torch.float64
    exact, exact_opt = twin(module, opt, problem.options, wide)
    plain, plain_opt = twin(module, opt, problem.options, wide if shaken else None)
    if shaken:
        gen = generator(problem.seed)
        for state in plain_opt.state.values():
            for key in ("exp_avg", "second_moment"):
                signs = torch.randint(0, 2, state[key].shape, generator=gen) * 2 - 1
                state[key].mul_(1 + (1 + state["exp_avg"].shape[1]) * U32 * signs)
    for each in (opt, exact_opt, plain_opt):
        each.step()
    floor = FLOOR if wide else FLOOR_BETWEEN_PATHS
    if drawn:
        floor = FLOOR_RANDOM + U32 * condition
    found = []
    for name, p in module.named_parameters():
        q, e = exact.get_parameter(name), plain.get_parameter(name)
        if not (shaken and p.dtype in HALF_DTYPES):
            found += _compare(name, p, e, q, floor, condition)
        state, own, truth = opt.state[p], plain_opt.state[e], exact_opt.state[q]
        if state.keys() != own.keys() and not shaken:
            found.append(f"{name}: keys {sorted(state)}, expected {sorted(own)}")
        for key, value in state.items():
            # The fp64 run starts from the rounded parameter: only plain fp32 has the master.
            if key == "master" and shaken:
                continue
            other, least = (own, FLOOR_BETWEEN_PATHS) if key == "master" else (truth, floor)
            found += _compare(f"{name} {key}", value, own[key], other[key], least, condition)
    return found


def largest_condition(module: nn.ModuleList) -> float:
    """Return the largest condition number of a factor, exactly dependent columns left out."""
    spectra = [torch.linalg.svdvals(p.detach().double()) for p in module.parameters()]
    spectra = [s[s > 1e-7 * s[0]] for s in spectra if s[0] > 0]
    return max((float(s[0] / s[-1]) for s in spectra), default=1.0)


def _compare(
    what: str, actual: Tensor, plain: Tensor, exact: Tensor, floor: float, condition: float
) -> list[str]:
    """Compare by what the dtype can hold: rule T2, or T5 for half precision."""
    if actual.dtype in HALF_DTYPES:
        # One unit in the last place, where the fp32 masters round to different sides.
        apart = (actual.double() - plain.double()).abs()
        unit = torch.finfo(actual.dtype)
        beyond = apart > (unit.eps * plain.double().abs()).clamp(
            min=unit.smallest_normal * unit.eps
        )
        few = float((apart > 0).double().mean()) <= max(2e-3, 1 / apart.numel())
        return [] if few and not bool(beyond.any()) else [f"{what}: up to {apart.max():.1e} apart"]
    if actual.dtype == torch.float32:
        return t2_violations(actual, plain, exact, what, floor)
    if actual.dtype == torch.int64 or bool(exact.isinf().any()):
        return [] if torch.equal(actual, exact) else [f"{what}: {actual} instead of {exact}"]
    # fp64 on both sides: what remains is rounding in the Gram matrix, which squares the condition.
    error = float((actual.detach() - exact.detach()).abs().max())
    limit = (1e-9 + 2.0**-53 * condition**2) * float(exact.detach().abs().max())
    return [] if error <= limit else [f"{what}: error {error:.1e}, limit {limit:.1e}"]
