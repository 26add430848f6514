"""The oracle is checked before anything is checked against it; the package is not imported here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from literal import LiteralPair
from oracle import DensePair, Hyper, adamw_trajectory, pinv, projector, step_pairs
from problems import LeastSquares, generator, make_adapter, normal, relative_distance
from problems import displacement_error as displacement

# eps = 0.1: at 1e-8 the literal form loses digits (see the test of the practical eps below).
VARIANTS = {
    "default": Hyper(),
    "decay": Hyper(weight_decay=0.3),
    "both-at-once": Hyper(alternate=False),
    "uncalibrated": Hyper(calibrate=False),
    "uncalibrated-both": Hyper(calibrate=False, alternate=False),
    "diagonal": Hyper(second_moment="diagonal"),
    "diagonal-uncalibrated": Hyper(second_moment="diagonal", calibrate=False),
    "maximize": Hyper(maximize=True),
    "betas": Hyper(betas=(0.8, 0.95)),
}
SHAPES = [(12, 9, 3), (7, 15, 4), (9, 9, 1), (5, 6, 5)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep these tiny matrices off the thread pool, which costs more than the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense_pair(m: int, n: int, r: int, seed: int, start: str = "general") -> DensePair:
    """Return the oracle of a random adapter."""
    module = make_adapter(m, n, r, seed, start)
    return DensePair(module.base, module.lora_B, module.lora_A, module.scaling)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-r{s[2]}")
@pytest.mark.parametrize("name", VARIANTS)
def test_full_space_equals_the_paper_in_factor_coordinates(
    name: str, shape: tuple[int, int, int]
) -> None:
    """The full-space form and the literal equations are the same trajectory and moments."""
    m, n, r = shape
    hyper = replace(VARIANTS[name], eps=0.1)
    problem = LeastSquares.make(m, n, steps=12, seed=3)
    dense = dense_pair(m, n, r, seed=4)
    literal = LiteralPair(dense.base, dense.factor_b, dense.factor_a, dense.scaling)
    start = dense.weight
    for k in range(problem.steps):
        # betas that change half way must enter the bias corrections of both forms alike.
        now = replace(hyper, betas=(0.7, 0.97)) if name == "betas" and k >= 6 else hyper
        dense.step(problem.grad(dense.weight, k), now)
        literal.step(problem.grad(literal.weight, k), now)
        assert displacement(dense.weight, literal.weight, start) <= 1e-12
        for ours, paper in ((dense.side_b, literal.side_b), (dense.side_a, literal.side_a)):
            assert relative_distance(ours.first, paper.m @ paper.partner.mT) <= 1e-12
            krons = torch.stack([torch.kron(row, row) for row in paper.partner])
            assert relative_distance(ours.variance, paper.p @ krons.mT) <= 1e-12
            square = paper.p.unflatten(1, (r, r))
            full = paper.partner @ square @ paper.partner.mT
            assert relative_distance(ours.second, full) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-r{s[2]}")
def test_practical_eps_up_to_the_cancellation_of_the_literal_form(
    shape: tuple[int, int, int],
) -> None:
    """At eps = 1e-8 both forms agree to T1; Y_j P_i Y_j^T cancels where one gradient is small."""
    problem = LeastSquares.make(*shape[:2], steps=12, seed=3)
    dense = dense_pair(*shape, seed=4)
    literal = LiteralPair(dense.base, dense.factor_b, dense.factor_a, dense.scaling)
    start = dense.weight
    for k in range(problem.steps):
        dense.step(problem.grad(dense.weight, k), Hyper())
        literal.step(problem.grad(literal.weight, k), Hyper())
    assert displacement(dense.weight, literal.weight, start) <= 1e-8


@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["no-decay", "decay"])
def test_full_rank_limit_is_adamw_on_the_weight(decay: float) -> None:
    """At m = n = r with W0 = 0 the oracle is torch's AdamW on W."""
    hyper = Hyper(weight_decay=decay)
    problem = LeastSquares.make(12, 12, steps=50, seed=5)
    pair = dense_pair(12, 12, 12, seed=6)
    pair.base.zero_()
    start = pair.weight
    path = adamw_trajectory(start, problem.grad, problem.steps, hyper)
    for k, expected in enumerate(path):
        pair.step(problem.grad(pair.weight, k), hyper)
        assert displacement(pair.weight, expected, start) <= 1e-11


def test_zero_start_leaves_a_alone_and_moves_b() -> None:
    """With B = 0 the first step moves B; the state of A sees a projector of rank zero."""
    pair = dense_pair(8, 6, 3, seed=7, start="zero")
    problem = LeastSquares.make(8, 6, steps=2, seed=8)
    before = pair.factor_a
    pair.step(problem.grad(pair.weight, 0), Hyper())
    assert torch.equal(pair.factor_a, before)
    assert pair.side_a.first.count_nonzero() == 0
    assert pair.side_a.second.count_nonzero() == 0
    assert pair.factor_b.count_nonzero() == pair.factor_b.numel()


def test_projector_and_inverse_of_a_deficient_partner() -> None:
    """Dependent columns leave a true projector and the Moore-Penrose inverse."""
    partner = normal(generator(9), 10, 4)
    partner[:, 3] = partner[:, 0] - 2 * partner[:, 1]
    project = projector(partner)
    assert relative_distance(project @ project, project) <= 1e-14
    assert float(project.trace()) == pytest.approx(3, abs=1e-12)
    assert relative_distance(partner @ pinv(partner) @ partner, partner) <= 1e-14
    assert relative_distance(pinv(partner), torch.linalg.pinv(partner)) <= 1e-13


def test_clipping_scales_every_pair_by_one_coefficient() -> None:
    """The coefficient is torch's, from the projected norms of the factors that move."""
    hyper = Hyper(max_grad_norm=0.5)
    pairs = [dense_pair(8, 6, 3, seed=10), dense_pair(5, 9, 2, seed=11)]
    grads = [normal(generator(12), 8, 6), normal(generator(13), 5, 9)]
    bias = normal(generator(14), 7)
    basis = [torch.linalg.qr(pair.factor_a.mT).Q for pair in pairs]
    squares = [(g @ q).square().sum() for g, q in zip(grads, basis, strict=True)]
    norm = float((sum(squares) + bias.square().sum()).sqrt())
    coefficient = step_pairs(pairs, grads, hyper, [bias])
    assert coefficient == pytest.approx(0.5 / (norm + 1e-6), rel=1e-12)
    for pair, grad, q in zip(pairs, grads, basis, strict=True):
        expected = 0.1 * coefficient * grad @ q @ q.mT
        assert relative_distance(pair.side_b.first, expected) <= 1e-12
