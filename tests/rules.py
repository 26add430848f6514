"""Rule T2 of the test plan: how far an fp32 kernel may be from fp64, in terms of the plain path."""

from __future__ import annotations

import torch
from torch import Tensor

U32 = 2.0**-24

# What the plain path's own error cannot excuse and rounding still costs: two roundings of the
# largest entry. The plan's floor, |(x + 0.3 - 0.3) - x| twice, is the same for entries near 1 and
# far wider for small ones.
FLOOR = 2 * U32
# One or two entries have no typical error to compare, so the ratio of the errors' root mean squares
# carries the same floor, spread over the entries.
RATIO = 1.5
# Two fp32 paths against each other, where no fp64 run takes the same decisions.
FLOOR_BETWEEN_PATHS = 16 * U32

# Of a random problem, which may have one row of rank 1: all its entries share the eight roundings
# that lead to a step, so nothing averages them and the plain path's share may be small by chance.
FLOOR_RANDOM = 8 * U32


def t2_violations(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str, floor: float = FLOOR
) -> list[str]:
    """List how a tensor breaks rule T2.

    Args:
        actual: of the kernel, fp32.
        plain: of the reference path in fp32, from the same state.
        exact: of the reference path in fp64, from the same state.
        what: name for the message.
        floor: relative to the largest entry.
    """
    exact = exact.detach().double()
    errors = [(x.detach().double() - exact).abs() for x in (actual, plain)]
    if not bool(errors[0].isfinite().all()):
        return [f"{what} is not finite"]
    found, floor = [], floor * float(exact.abs().max())
    largest, own = (float(e.max()) for e in errors)
    if largest > 2 * own + floor:
        index = tuple(int(i) for i in torch.unravel_index(errors[0].argmax(), exact.shape))
        found.append(f"{what}: error {largest:.2e} at {index}, limit 2 * {own:.2e} + {floor:.2e}")
    rms, own = (float(e.square().mean().sqrt()) for e in errors)
    if rms > RATIO * own + floor / 2:
        found.append(f"{what}: rms error {rms:.2e}, limit {RATIO} * {own:.2e} + {floor / 2:.2e}")
    return found
