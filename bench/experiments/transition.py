"""LoFT with another transition between subspaces than the exact one, for experiments alone.

Moments live in the coordinates of the factor, D = m Y^T, and the partner moves from Y_prev to Y.
The paper's transition C = (Y_prev^T Y) (Y^T Y)^-1 (Eq. 7-8) projects what m means on the new
subspace. The cheaper rules below change C in these coordinates, the paper's own, in which leaving
it out means C = I. The product has the exact rule and the identity (`calibrate=False`) only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import loft_kernels as lk
from loft_kernels import reference as ref

RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda c: c,
    # Half way between following the subspace and staying where the coordinates are.
    "averaged": lambda c: (c + torch.eye(len(c), dtype=c.dtype, device=c.device)) / 2,
    # Each direction is rescaled, none is mixed into another.
    "diagonal": lambda c: c.diagonal().diag(),
    "identity": lambda c: torch.eye(len(c), dtype=c.dtype, device=c.device),
}


class TransportedLoFT(torch.optim.Optimizer):
    """Alternating LoFT, all in fp64, whose transition goes through a rule first.

    Built from the blocks of :mod:`loft_kernels.reference`; with the rules "exact" and "identity" it
    is LoFTAdamW with and without `calibrate`.

    Args:
        model: every trainable parameter must belong to a LoRA pair.
        lr: learning rate.
        transition: a key of RULES.
        betas: decay rates of the moments.
        eps: as in AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        transition: str,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Find the pairs."""
        groups = lk.loft_param_groups(model)
        self.pairs = [pair for group in groups for pair in group.get("lora_pairs", ())]
        factors = [f for pair in self.pairs for f in (pair.lora_B, pair.lora_A)]
        if len(factors) != sum(p.requires_grad for p in model.parameters()):
            raise ValueError("the experiment's LoFT trains LoRA pairs and nothing else")
        self.rule = RULES[transition]
        super().__init__(factors, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step: both factors' moments, then the factor whose turn it is."""
        # The snapshot, before anything moves.
        partners = [y.double() for p in self.pairs for y in (p.lora_A.T.clone(), p.lora_B.clone())]
        bases = ref.orthonormal_bases(partners, [0.0] * len(partners))
        sides = [
            (factor, transposed, pair.scaling.read())
            for pair in self.pairs
            for factor, transposed in ((pair.lora_B, False), (pair.lora_A, True))
        ]
        for (factor, transposed, scaling), partner, basis in zip(
            sides, partners, bases, strict=True
        ):
            state, rows = self.state[factor], factor.T if transposed else factor
            grad = factor.grad.T if transposed else factor.grad
            self._advance(state, ref.scaled_gradient(grad, basis, scaling), partner, basis)
            if state["step"] % 2 != transposed:  # B first
                self._move(state, rows, basis, scaling)

    def _advance(self, state: dict[str, Any], g: Tensor, partner: Tensor, basis: ref.Basis) -> None:
        """Transport and accumulate one factor's moments."""
        beta1, beta2 = self.param_groups[0]["betas"]
        if not state:
            self._start(state, g, partner, basis)
        change = self._change(state, partner, basis)
        ref.update_first_moment_(state["exp_avg"], g, change, beta1)
        ref.update_second_moment_(state["second_moment"], g, change, beta2)
        state["guard"] = ref.update_guard(state["guard"], beta1, beta2)
        state["step"] += 1
        state["partner"], state["chol_inv"] = partner, basis.chol_inv

    def _move(self, state: dict[str, Any], rows: Tensor, basis: ref.Basis, scaling: float) -> None:
        """Take the virtual Adam step, project it back and write the factor."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        projected = ref.virtual_adam_projection(
            state["exp_avg"],
            state["second_moment"],
            state["exp_avg"].new_empty(0, *state["exp_avg"].shape),
            basis.q,
            bias_correction1=ref.bias_correction(beta1, state["step"]),
            bias_correction2=ref.bias_correction(beta2, state["step"]),
            eps=group["eps"],
            guard=state["guard"],
        )
        direction = projected @ basis.chol_inv
        rows.copy_(
            ref.moved_factor(rows, direction, lr=group["lr"], weight_decay=0.0, scaling=scaling)
        )

    @staticmethod
    def _start(state: dict[str, Any], g: Tensor, partner: Tensor, basis: ref.Basis) -> None:
        """Make the state of a factor that has not been stepped."""
        packed = ref.packed_length(g.shape[1])
        state.update(
            exp_avg=torch.zeros_like(g),
            second_moment=g.new_zeros(len(g), packed),
            guard=0.0,
            step=0,
            partner=partner,
            chol_inv=basis.chol_inv,
        )

    def _change(self, state: dict[str, Any], partner: Tensor, basis: ref.Basis) -> Tensor | None:
        """Apply the rule to C and express it in the orthonormal bases: ``L_prev^+ C L``."""
        if torch.equal(state["partner"], partner):
            return None
        c = state["partner"].T @ partner @ basis.chol_inv.T @ basis.chol_inv
        return state["chol_inv"] @ self.rule(c) @ basis.chol
