"""LoFT's mathematics in plain PyTorch: the truth that every other backend is measured against.

One small function per building block of the algorithm (arXiv 2505.21289), written once for a
(factor, partner): the *factor* X is ``rows x r`` and its *partner* Y is ``partner_rows x r``.
For ``lora_B`` X = B and Y = A^T; for ``lora_A`` X = A^T and Y = B. With G the gradient of the
virtual weight W, the gradient of the factor is ``grad = s G Y``.

Everything is kept in the partner's orthonormal basis Q (Y = Q L^T) instead of the factor's own
coordinates. Both give the same numbers in exact arithmetic; in floating point the basis removes
the condition number of Y from the stored moments.

Algebra that is only r wide runs in fp64; whatever touches every entry of the m x n weight runs in
the compute dtype of the caller (fp32 or fp64) and streams over tiles, so that no m x n tensor
exists. Nothing here decides, allocates state or reads a device value on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A column whose squared distance to the span of its predecessors is below this share of its
# squared length is dependent. Exact duplicates leave about 1e-15 in an fp64 Gram matrix and
# condition number 1e6 leaves 1e-12, so the tolerance stands between the two.
PIVOT_TOLERANCE = 1e-13

# Entries of one streamed tile: on a CPU it should stay in the cache, on a GPU fill the device.
_TILE_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 24}


class Basis(NamedTuple):
    """Orthonormal basis of a partner's column space: Y = Q L^T, all in fp64.

    Attributes:
        q: ``partner_rows x r``; columns of dropped directions are zero.
        chol: L, ``r x r``, triangular in the order of pivots; a zero on the diagonal marks a
            dropped direction.
        chol_inv: L^+, the pseudo-inverse; L^-1 where no direction was dropped.
    """

    q: Tensor
    chol: Tensor
    chol_inv: Tensor


def packed_length(rank: int) -> int:
    """Return r(r+1)/2, the number of entries stored per row of the second moment."""
    return rank * (rank + 1) // 2


def pack_symmetric(full: Tensor) -> Tensor:
    """Keep the upper triangle of ``... x r x r`` in row-major order: ``... x r(r+1)/2``."""
    rank = full.shape[-1]
    i, j = torch.triu_indices(rank, rank, device=full.device)
    return full[..., i, j]


def unpack_symmetric(packed: Tensor, rank: int) -> Tensor:
    """Rebuild the symmetric ``... x r x r`` matrices from their packed upper triangles."""
    i, j = torch.triu_indices(rank, rank, device=packed.device)
    full = packed.new_empty(*packed.shape[:-1], rank, rank)
    full[..., i, j] = packed
    full[..., j, i] = packed
    return full


def widened(x: Tensor) -> Tensor:
    """Copy to fp64 in row-major order, so that the caller's layout cannot change a bit."""
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def gram(partner: Tensor, damping: float = 0.0) -> Tensor:
    """Compute Y^T Y in fp64, with an optional ridge relative to its mean diagonal entry.

    Args:
        partner: Y, ``partner_rows x r``, any real floating dtype.
        damping: adds ``damping * trace(Y^T Y) / r`` to the diagonal; 0 changes nothing.
    """
    wide = widened(partner)
    product = wide.T @ wide
    if damping:
        product.diagonal().add_(damping * product.diagonal().mean())
    return product


def cholesky_dropping(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Factor Gram matrices as L L^T by Cholesky with diagonal pivoting, dropping dependent columns.

    Columns are weighed by their own length, so that scaling a column changes nothing. The k-th
    pivot, column j of Y, becomes column j of L: L is triangular up to the order of pivots, and
    the basis keeps the columns' places. Pivoting matters: without it a small true pivot before a
    dependent column lets rounding errors pass for a direction.

    Args:
        grams: ``batch x r x r`` fp64, symmetric positive semi-definite.

    Returns:
        ``(L, M)``, each ``batch x r x r``; M inverts L on the kept columns. A dropped column has
        a zero column in L and a zero row in M.
    """
    batch, rank = torch.arange(len(grams), device=grams.device), grams.shape[-1]
    chol, inverse = torch.zeros_like(grams), torch.zeros_like(grams)
    length_sq = grams.diagonal(dim1=-2, dim2=-1)
    left = (length_sq > 0).to(grams.dtype)  # share of each column's length not yet in the span
    identity = torch.eye(rank, dtype=grams.dtype, device=grams.device)
    for _ in range(rank):
        share, j = left.max(dim=1)
        keep = share > PIVOT_TOLERANCE
        row = chol[batch, j]
        column = grams[batch, j] - (chol @ row[:, :, None]).squeeze(-1)
        # Rows of columns that are already pivots are zero in exact arithmetic.
        column = torch.where(left >= 0, column, 0.0)
        root = torch.where(keep, column[batch, j], 1.0).clamp(min=0).sqrt()
        solved = identity[j] - (row[:, None, :] @ inverse).squeeze(1)
        chol[batch, :, j] = torch.where(keep[:, None], column / root[:, None], 0.0)
        inverse[batch, j] = torch.where(keep[:, None], solved / root[:, None], 0.0)
        left = left - torch.where(length_sq > 0, chol[batch, :, j].square() / length_sq, 0.0)
        left[batch, j] = -1.0
    return chol, inverse


def orthonormal_bases(partners: list[Tensor], damping: list[float]) -> list[Basis]:
    """Compute the orthonormal basis of every partner; equal ranks share one batched Cholesky.

    Args:
        partners: Y of each factor, ``partner_rows x r``, any dtype; shapes may differ.
        damping: relative ridge of each.

    Returns:
        One :class:`Basis` per partner. Y = 0 gives Q = 0 and L^+ = 0.
    """
    batches: dict[tuple[int, torch.device], list[int]] = {}
    for k, y in enumerate(partners):
        batches.setdefault((y.shape[1], y.device), []).append(k)
    bases: dict[int, Basis] = {}
    for members in batches.values():
        grams = torch.stack([gram(partners[k], damping[k]) for k in members])
        chol, inverse = cholesky_dropping(grams)
        first = [widened(partners[k]) @ m.T for k, m in zip(members, inverse, strict=True)]
        if not any(damping[k] for k in members):
            first, chol, inverse = _second_pass(first, chol, inverse)
        pseudo = _pseudo_inverse(chol, inverse)
        bases.update(
            (k, Basis(*parts))
            for k, parts in zip(members, zip(first, chol, pseudo, strict=True), strict=True)
        )
    return [bases[k] for k in range(len(partners))]


def _second_pass(
    q: list[Tensor], chol: Tensor, inverse: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Orthonormalise again: the Gram matrix of Y squares its condition, that of Q is close to I."""
    grams = torch.stack([gram(x) for x in q])
    dropped = (grams.diagonal(dim1=-2, dim2=-1) == 0).double()
    # cholesky_ex does not look at the outcome, which would synchronise with the device.
    again, _ = torch.linalg.cholesky_ex(grams + torch.diag_embed(dropped))
    q = [
        torch.linalg.solve_triangular(a, x.T, upper=False).T for x, a in zip(q, again, strict=True)
    ]
    return q, chol @ again, torch.linalg.solve_triangular(again, inverse, upper=False)


def _pseudo_inverse(chol: Tensor, inverse: Tensor) -> Tensor:
    """Compute L^+ from L and its inverse M on the kept columns.

    With the rows of dropped columns written as ``Z = L_dropped M``,
    ``L^+ = M (I + Z^T Z)^-1 (I + Z^T)``; where nothing was dropped Z = 0 and this is M.
    """
    identity = torch.eye(chol.shape[-1], dtype=chol.dtype, device=chol.device)
    kept = (chol.diagonal(dim1=-2, dim2=-1) != 0)[:, :, None]
    z = torch.where(kept, 0.0, chol) @ inverse
    inner, _ = torch.linalg.cholesky_ex(identity + z.mT @ z)
    return inverse @ torch.cholesky_solve(torch.where(kept, identity, 0.0) + z.mT, inner)


def scaled_gradient(grad: Tensor, basis: Basis, scaling: float) -> Tensor:
    """Scale the gradient (Sec. 2.1): ``g~ = grad S / s``, here ``g = grad L^-T / s = G Q``.

    Args:
        grad: gradient of the factor, ``rows x r``, any real floating dtype; not changed.
        basis: basis of the partner.
        scaling: s of ``W = W0 + s B A``.

    Returns:
        ``rows x r`` in fp64. Its Frobenius norm is that of the projected gradient ``G Q Q^T``.
    """
    return widened(grad) @ (basis.chol_inv.T / scaling)


def transition(basis_prev: Tensor, q: Tensor) -> Tensor:
    """Express coordinates of the previous basis in the new one (Eq. 7-8): ``C = Q_prev^T Q``.

    The paper's ``C = (Y_prev^T Y) S`` is the same map between the factor's own coordinates.
    """
    return basis_prev.double().T @ q.double()


def transition_uncalibrated(chol_prev: Tensor, chol: Tensor) -> Tensor:
    """Keep the coordinates in the factor's own basis (ablation): ``C = L_prev^+ L``."""
    return torch.linalg.pinv(chol_prev.double(), rtol=1e-12) @ chol.double()


def update_first_moment_(exp_avg: Tensor, g: Tensor, change: Tensor | None, beta1: float) -> None:
    """Transport and accumulate the first moment (Eq. 7-8): ``m <- b1 m C + (1 - b1) g``.

    Args:
        exp_avg: m, ``rows x r``; changed in place.
        g: scaled gradient, ``rows x r``, dtype of ``exp_avg``.
        change: C, ``r x r``; None where the partner has not changed (C is exactly I).
        beta1: decay rate.
    """
    if change is not None:
        exp_avg.copy_(exp_avg @ change.to(exp_avg.dtype))
    exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)


def update_second_moment_(
    second_moment: Tensor,
    g: Tensor,
    change: Tensor | None,
    beta2: float,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Transport and accumulate the second moment row by row (Eq. 11-12), in fp64.

    ``P_i <- b2 C^T P_i C + (1 - b2) g_i^T g_i``. A row with coordinates g in the old basis has
    coordinates g C in the new one, hence C^T on the left.

    Args:
        second_moment: packed P, ``rows x r(r+1)/2``; changed in place.
        g: scaled gradient, ``rows x r``.
        change: C, ``r x r``; None where the partner has not changed.
        beta2: decay rate.
        centre: m after this step, ``rows x r``, to split P along; None if P need not be split.

    Returns:
        With a centre, :func:`split_along` of every row, in the dtype of P.
    """
    rank = g.shape[1]
    block = max(1, _tile_entries(g.device) // (rank * rank))
    i, j = torch.triu_indices(rank, rank, device=g.device)
    parts = None
    if centre is not None:
        parts = torch.empty_like(second_moment), torch.empty_like(centre)
    for start in range(0, g.shape[0], block):
        rows = slice(start, start + block)
        packed, g_rows = second_moment[rows].double(), g[rows].double()
        if change is not None:
            c = change.double()
            packed = pack_symmetric(c.T @ (unpack_symmetric(packed, rank) @ c))
        packed = (packed * beta2).addcmul_(g_rows[:, i], g_rows[:, j], value=1 - beta2)
        second_moment[rows] = packed
        if centre is not None and parts is not None:
            parts[0][rows], parts[1][rows] = split_along(centre[rows], packed)
    return parts


def split_along(exp_avg: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``P_i = R_i + c_i^T c_i`` with c along m, as long as leaves R least.

    Where gradients differ little, v is a small difference of large products of P. Split before P is
    rounded to fp32, it is the sum of a square and of what a small R contributes.

    Args:
        exp_avg: m, ``rows x r``; its dtype is that of c, whose rounding R takes into account.
        packed: P, ``rows x r(r+1)/2`` fp64.

    Returns:
        R, packed fp64, and c, ``rows x r``.
    """
    i, j = torch.triu_indices(exp_avg.shape[1], exp_avg.shape[1], device=packed.device)
    wide = exp_avg.double()
    length = wide.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, wide / length, 0.0)
    share = (packed * khatri_rao_square(unit)).sum(1, keepdim=True).clamp_(min=0)
    c = (unit * share.sqrt_()).to(exp_avg.dtype)
    return packed - c.double()[:, i] * c.double()[:, j], c


def update_elementwise_moment_(
    second_moment: Tensor, g: Tensor, basis: Basis, beta2: float
) -> None:
    """Accumulate "LoFT simple"'s second moment: ``v <- b2 v + (1 - b2) g~^2``, no transport.

    Args:
        second_moment: v of the factor's own entries, ``rows x r``; changed in place.
        g: scaled gradient in the partner's basis, fp64; ``g~ = g L^-1 = grad S / s``.
        basis: the partner's basis.
        beta2: decay rate.
    """
    own = (g @ basis.chol_inv).to(second_moment.dtype)
    second_moment.mul_(beta2).addcmul_(own, own, value=1 - beta2)


def update_guard(guard: float, beta1: float, beta2: float) -> float:
    """Advance the Cauchy-Schwarz bound ``m~^2 <= guard * v`` by one step.

    With m = sum a_k g_k and v = sum w_k g_k^2, ``guard = sum a_k^2 / w_k``. For constant betas it
    is the closed form ``(1-b1)^2 (1-q^t) / ((1-b2) (1-q))``, q = b1^2 / b2; the recursion also
    holds when a schedule changes the betas on the way.

    Args:
        guard: bound after the last step; 0 before the first.
        beta1: decay rate of the first moment at this step.
        beta2: decay rate of the second moment at this step.
    """
    fresh = (1 - beta1) ** 2 / (1 - beta2)
    if guard == 0 or beta1 == 0:
        return fresh
    return fresh + (guard * beta1**2 / beta2 if beta2 else math.inf)


def early_moments(
    exp_avg: Tensor,
    g: Tensor,
    change: Tensor | None,
    *,
    guard: float,
    beta1: float,
    beta2: float,
) -> tuple[Tensor, Tensor]:
    """Compute both moments after a factor's first or second step without reading P back.

    P is of rank one (two) there, and rounding it to fp32 ruins every small ``v = Q_j P_i Q_j^T``.
    One gradient makes the bound of :func:`update_guard` an equality, ``P = m^T m / guard``, hence
    ``P <- b2 (m C)^T (m C) / guard + (1 - b2) g^T g`` from m, which is stored well enough.

    Args:
        exp_avg: m before this step, ``rows x r``; not changed.
        g: scaled gradient, ``rows x r`` fp64.
        change: C, ``r x r``; None where the partner has not changed.
        guard: bound after the last step; 0 before the first.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.

    Returns:
        In fp64, m after this step and the roots of P, ``1 or 2 x rows x r``: each row's P is
        ``sum_k roots_ki^T roots_ki``.
    """
    root = math.sqrt(1 - beta2) * g
    if guard == 0:
        return (1 - beta1) * g, root[None]
    carried = exp_avg.double() if change is None else exp_avg.double() @ change
    roots = torch.stack([math.sqrt(beta2 / guard) * carried, root])
    return beta1 * carried + (1 - beta1) * g, roots


def khatri_rao_square(q: Tensor) -> Tensor:
    """Expand rows of Q so that ``Q_j P Q_j^T`` is a dot product with the packed P.

    Returns:
        ``partner_rows x r(r+1)/2``; off-diagonal products appear twice in the quadratic form and
        are doubled here, because P stores them once.
    """
    rank = q.shape[1]
    i, j = torch.triu_indices(rank, rank, device=q.device)
    return q[:, i] * q[:, j] * torch.where(i == j, 1.0, 2.0).to(q.dtype)


def virtual_adam_projection(
    exp_avg: Tensor,
    second_moment: Tensor | None,
    roots: Tensor,
    q: Tensor,
    *,
    bias_correction1: float,
    bias_correction2: float,
    eps: float,
    guard: float,
) -> Tensor:
    """Take Adam's step in every entry of the virtual weight and project it back: ``D Q``.

    ``D_ij = m^_i.Q_j / (sqrt(Q_j P^_i Q_j^T) + eps)``, streamed over tiles of rows and partner
    rows. ``v >= m~^2 / guard`` holds in exact arithmetic, so the maximum removes rounding errors
    only; it replaces the clamp at zero and bounds |D|. 0/0 counts as 0.

    Args:
        exp_avg: m, ``rows x r``, after this step's update.
        second_moment: packed P, ``rows x r(r+1)/2``, after this step's update, less what the roots
            contain; None for nothing.
        roots: ``k x rows x r``; each row's P is the second moment plus
            ``sum_k roots_ki^T roots_ki``.
        q: the partner's basis, ``partner_rows x r``, dtype of ``exp_avg``.
        bias_correction1: ``1 - b1^t``.
        bias_correction2: ``1 - b2^t``.
        eps: Adam's epsilon, added to the square root.
        guard: bound of :func:`update_guard`; may be infinite.

    Returns:
        ``rows x r``, dtype of ``exp_avg``.
    """
    projected = torch.zeros_like(exp_avg)
    bound = guard * bias_correction2 / bias_correction1**2
    tile = _tile_entries(q.device)
    columns = max(1, min(q.shape[0], math.isqrt(tile)))
    rows = max(1, tile // columns)
    for q_tile in q.split(columns):
        products = None if second_moment is None else khatri_rao_square(q_tile).T
        for start in range(0, exp_avg.shape[0], rows):
            block = slice(start, start + rows)
            m = (exp_avg[block] / bias_correction1) @ q_tile.T
            v = (roots[:, block] @ q_tile.T).square_().sum(0)
            if second_moment is not None:
                v.addmm_(second_moment[block], products)
            v.div_(bias_correction2)
            v = torch.maximum(v, m.square().div_(bound), out=v)
            step = _divide(m, v.sqrt_().add_(eps))
            projected[block].addmm_(step, q_tile)
    return projected


def elementwise_adam_step(
    exp_avg: Tensor,
    second_moment: Tensor,
    basis: Basis,
    *,
    bias_correction1: float,
    bias_correction2: float,
    eps: float,
) -> Tensor:
    """Take Adam's step in the entries of the factor ("LoFT simple"): ``m~^ / (sqrt(v^) + eps)``.

    Args:
        exp_avg: m in the partner's basis, ``rows x r``, calibrated.
        second_moment: elementwise second moment of g~ = grad S / s, ``rows x r``, not calibrated.
        basis: the partner's basis; ``m~ = m L^-1`` are the factor's own coordinates.
        bias_correction1: ``1 - b1^t``.
        bias_correction2: ``1 - b2^t``.
        eps: Adam's epsilon.
    """
    m = (exp_avg.double() @ basis.chol_inv).to(exp_avg.dtype) / bias_correction1
    return _divide(m, (second_moment / bias_correction2).sqrt_().add_(eps))


def moved_factor(
    factor: Tensor, direction: Tensor, *, lr: float, weight_decay: float, scaling: float
) -> Tensor:
    """Apply decay and the projected update: ``(1 - lr wd) X - (lr / s) direction``.

    Args:
        factor: X, ``rows x r``; not changed.
        direction: ``D Q L^-1`` (full second moment) or the elementwise step, fp64 or narrower.
        lr: learning rate of the virtual weight.
        weight_decay: decoupled decay, multiplied by lr as in ``torch.optim.AdamW``.
        scaling: s of ``W = W0 + s B A``.

    Returns:
        The new factor in fp64; rounding happens once, where it is stored.
    """
    return factor.double() * (1 - lr * weight_decay) - direction.double() * (lr / scaling)


def bias_correction(beta: float, step: int) -> float:
    """Return ``1 - beta^step`` without cancellation for betas close to 1."""
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide entry by entry with x/0 = 0: no direction is known where v and eps vanish."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _tile_entries(device: torch.device) -> int:
    """Return how many entries a streamed tile may have on this device."""
    return _TILE_ENTRIES.get(device.type, _TILE_ENTRIES["cpu"])
