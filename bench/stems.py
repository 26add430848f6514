"""The stems of a step on one pair: as the equations read, on the reference path, as kernels.

Naive results are in the factor's own coordinates and the reference path's in the partner's
orthonormal basis (Y = Q L^T), so each stem says how to bring the latter's into the former's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.contenders import CONTENDERS, HISTORY
from bench.naive import NaiveLoFT, move, observe
from bench.problem import Adapters
from loft_kernels import reference as ref

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1.0
STEMS = "gram", "solve", "basis", "moments", "update"


@dataclass(slots=True)
class Problem:
    """What the B side of a pair in mid-training is about to do.

    Attributes:
        factor: X, ``rows x r``.
        grad: its gradient.
        partner: Y, ``partner_rows x r``.
        partner_prev: Y of the last step.
        exp_avg: m in own coordinates.
        second_moment: P in own coordinates, ``rows x r x r``.
        scaling: s.
    """

    factor: Tensor
    grad: Tensor
    partner: Tensor
    partner_prev: Tensor
    exp_avg: Tensor
    second_moment: Tensor
    scaling: float

    def to(self, dtype: torch.dtype) -> Problem:
        """Return a copy in another dtype."""
        tensors = [getattr(self, name).to(dtype) for name in self.__slots__[:-1]]
        return Problem(*tensors, self.scaling)


def draw(size: int, rank: int, device: str) -> Problem:
    """Take a pair of ``size x size`` through a short history in fp64."""
    model = Adapters([(size, size)], rank, device, torch.float64)
    opt = CONTENDERS["naive"].make(model)
    assert isinstance(opt, NaiveLoFT)
    for _ in range(HISTORY):
        model.new_gradients()
        opt.step()
    model.new_gradients()
    layer = model.layers[0]
    state = opt.state[layer.lora_B]
    b, a = layer.lora_B, layer.lora_A
    values = b.detach(), b.grad, a.detach().T, state["partner"]
    return Problem(*values, state["exp_avg"], state["second_moment"], layer.scaling)


class Naive:
    """Every stem as the equations read, in the problem's dtype."""

    def __init__(self, problem: Problem) -> None:
        """Prepare what earlier stems hand to later ones."""
        self.problem = problem
        self._gram = self.gram()
        self._observed = self._observe()
        counts = [LR, *(1 - beta ** (HISTORY + 1) for beta in BETAS)]
        self._numbers = problem.factor.new_tensor(counts)

    def gram(self) -> Tensor:
        """Multiply ``Y^T Y``."""
        return self.problem.partner.T @ self.problem.partner

    def solve(self) -> Tensor:
        """Invert it."""
        return torch.linalg.inv_ex(self._gram).inverse

    def basis(self) -> Tensor:
        """Form the transition between the subspaces; nothing is orthonormal here."""
        p = self.problem
        return (p.partner_prev.T @ p.partner) @ self._observed[0]

    def moments(self) -> Tensor:
        """Carry both moments over and accumulate."""
        _, m, second = self._observe()
        return torch.cat([m, second.flatten(1)], dim=1)

    def update(self) -> Tensor:
        """Take the dense step and project it; returns how far the factor moves."""
        p = self.problem
        _, m, second = self._observed
        moved = move(
            p.factor,
            p.partner,
            self._observed[0],
            m,
            second,
            self._numbers,
            scaling=p.scaling,
            eps=EPS,
        )
        return moved - p.factor

    def _observe(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        return observe(
            p.grad,
            p.partner,
            p.partner_prev,
            p.exp_avg,
            p.second_moment,
            scaling=p.scaling,
            betas=BETAS,
        )


class Reference:
    """Every stem on the reference path; state in fp32, in the partner's basis."""

    def __init__(self, problem: Problem) -> None:
        """Bring the state into the basis."""
        self.problem = p = problem
        self._gram = ref.gram(p.partner)
        old, self._basis = ref.orthonormal_bases([p.partner_prev, p.partner], [0.0, 0.0])
        self._old = old
        self._g = ref.scaled_gradient(p.grad, self._basis, p.scaling)
        self._change = ref.transition(old.q, self._basis.q)
        wide, chol = p.to(torch.float64), old.chol
        self._before = (
            (wide.exp_avg @ chol).float(),
            ref.pack_symmetric(chol.T @ wide.second_moment @ chol).float(),
        )
        self._after = self._new_moments()

    def gram(self) -> Tensor:
        """Multiply ``Y^T Y`` in fp64."""
        return ref.gram(self.problem.partner)

    def solve(self) -> Tensor:
        """Factor it with pivots; returns L^-1."""
        return ref.cholesky_dropping(self._gram[None])[1][0]

    def basis(self) -> Tensor:
        """Form Q and the transition."""
        q = ref.widened(self.problem.partner) @ self._basis.chol_inv.T
        return ref.transition(self._old.q, q)

    def moments(self) -> Tensor:
        """Scale the gradient, carry both moments over and accumulate."""
        return torch.cat(self._new_moments()[:2], dim=1)

    def update(self) -> Tensor:
        """Take the virtual step over tiles; returns ``D Q``."""
        m, _, residual, centre = self._after
        return ref.virtual_adam_projection(
            m,
            residual,
            centre[None],
            self._basis.q.float(),
            bias_correction1=ref.bias_correction(BETAS[0], HISTORY + 1),
            bias_correction2=ref.bias_correction(BETAS[1], HISTORY + 1),
            eps=EPS,
            guard=float("inf"),
        )

    def _new_moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m, packed = (t.clone() for t in self._before)
        g = ref.scaled_gradient(self.problem.grad, self._basis, self.problem.scaling)
        ref.update_first_moment_(m, g.float(), self._change, BETAS[0])
        parts = ref.update_second_moment_(packed, g, self._change, BETAS[1], m)
        assert parts is not None
        return m, packed, *parts

    def in_own_coordinates(self, stem: str, result: Tensor) -> Tensor:
        """Bring a stem's result into the form of :class:`Naive`'s."""
        inverse, result = self._basis.chol_inv, result.double()
        if stem == "solve":
            return result.T @ result
        if stem == "basis":
            return self._old.chol @ result @ inverse
        if stem == "moments":
            rank = inverse.shape[0]
            second = ref.unpack_symmetric(result[:, rank:], rank)
            second = inverse.T @ second @ inverse
            return torch.cat([result[:, :rank] @ inverse, second.flatten(1)], dim=1)
        if stem == "update":
            return -(LR / self.problem.scaling) * result @ inverse
        return result


@contextmanager
def recorded() -> Iterator[dict[str, list[Callable[[], None]]]]:
    """Collect the Triton launches made within, by stem, each to be launched again."""
    from loft_kernels.backends.triton.launch import Launcher

    launches: dict[str, list[Callable[[], None]]] = {}
    launch = Launcher.__call__

    def recording(self: Any, name: Any, moving: dict[str, Any], describe: Any) -> None:
        moving = dict(moving)
        launch(self, name, moving, describe)
        stem = name if isinstance(name, str) else name[0]
        launches.setdefault(stem, []).append(lambda: launch(self, name, moving, describe))

    Launcher.__call__ = recording  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]
