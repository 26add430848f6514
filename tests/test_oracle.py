"""LoFTAdamW against the full-space oracle, torch's AdamW and its own symmetries (rules T1, T3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from oracle import (
    DensePair,
    Hyper,
    adamw_trajectory,
    clip_coefficient,
    pinv,
    projected_norm,
    step_pairs,
)
from problems import (
    LeastSquares,
    TinyLoRA,
    check_close,
    check_displacement,
    conditioned,
    generator,
    make_adapter,
    normal,
)
from torch import Tensor, nn

import loft_kernels as lk

# Every test runs on both backends of the CPU.
pytestmark = pytest.mark.usefixtures("host_backend")

T1 = 1e-8  # fp64 against the oracle
T3 = 5e-4  # fp32 against fp64, free run of 24 steps
SHAPES = [(12, 12), (6, 9), (9, 6), (1, 7), (7, 1), (3, 20), (24, 5), (17, 33), (40, 16)]


@dataclass(frozen=True)
class Case:
    """A shape with the name that pytest shows."""

    m: int
    n: int
    r: int

    def __str__(self) -> str:
        """Return the id."""
        return f"{self.m}x{self.n}-r{self.r}"


CASES = [Case(m, n, r) for (m, n), r in itertools.product(SHAPES, (1, 3, 8))]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep these tiny matrices off the thread pool, which costs more than the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_optimizer(module: nn.Module, hyper: Hyper) -> torch.optim.Optimizer:
    """Return the optimizer under test."""
    return lk.LoFTAdamW(module, **asdict(hyper))


def make_oracle(module: TinyLoRA) -> DensePair:
    """Return the oracle at the adapter's present weights."""
    return DensePair(module.base, module.lora_B, module.lora_A, module.scaling)


def train(
    module: TinyLoRA,
    problem: LeastSquares,
    hyper: Hyper,
    after: Callable[[int, torch.optim.Optimizer], None] | None = None,
) -> Tensor:
    """Train for every step of the problem and return W."""
    optimizer = make_optimizer(module, hyper)
    for k in range(problem.steps):
        optimizer.zero_grad()
        problem.loss(module.weight, k).backward()
        optimizer.step()
        if after is not None:
            after(k, optimizer)
    return module.weight.detach()


def unpack(packed: Tensor, rank: int) -> Tensor:
    """Return the symmetric matrices of a packed upper triangle, rows x r x r."""
    row, col = torch.triu_indices(rank, rank)
    full = packed.new_zeros(packed.shape[0], rank, rank)
    full[:, row, col] = packed
    full[:, col, row] = packed
    return full


def basis_of(state: dict[str, Tensor], partner: Tensor) -> Tensor:
    """Return Q of a state: stored, or Y L^-T where the uncalibrated ablation stores L only."""
    if "partner_basis" in state:
        return state["partner_basis"]
    return partner @ pinv(state["partner_cholesky"]).mT


def check_state(
    optimizer: torch.optim.Optimizer,
    module: TinyLoRA,
    pair: DensePair,
    what: str,
    diagonal: bool = False,
) -> None:
    """Compare step, first and second moment of both factors in the weight space."""
    for name, side in (("lora_B", pair.side_b), ("lora_A", pair.side_a)):
        state = optimizer.state[getattr(module, name)]
        assert int(state["step"]) == pair.count
        basis = basis_of(state, side.partner)
        check_close(state["exp_avg"] @ basis.mT, side.first, T1, f"{what}: exp_avg of {name}")
        if diagonal:
            check_close(state["second_moment"], side.coordinates, T1, f"{what}: v of {name}")
            continue
        moment = unpack(state["second_moment"], basis.shape[1])
        variance = torch.einsum("ja,iab,jb->ij", basis, moment, basis)
        check_close(variance, side.variance, T1, f"{what}: variance of {name}")
        if what == "last step":
            check_close(basis @ moment @ basis.mT, side.second, T1, f"second moment of {name}")


def compare(
    module: TinyLoRA,
    problem: LeastSquares,
    hyper_at: Callable[[int], Hyper],
) -> float:
    """Run optimizer and oracle side by side, compare every step, return the least coefficient."""
    pair = make_oracle(module)
    start = pair.weight
    optimizer = make_optimizer(module, hyper_at(0))
    least = 1.0
    for k in range(problem.steps):
        hyper = hyper_at(k)
        for group in optimizer.param_groups:
            group["betas"] = hyper.betas
        optimizer.zero_grad()
        problem.loss(module.weight, k).backward()
        optimizer.step()
        least = min(least, step_pairs([pair], [problem.grad(pair.weight, k)], hyper))
        check_displacement(module.weight.detach(), pair.weight, start, T1, f"W after step {k}")
        what = "last step" if k == problem.steps - 1 else f"step {k}"
        check_state(optimizer, module, pair, what, hyper.second_moment == "diagonal")
    return least


@pytest.mark.parametrize("decay", [0.0, 0.1, 2.0], ids=lambda d: f"decay{d:g}")
def test_full_rank_pair_is_adamw_on_the_weight(decay: float) -> None:
    """At m = n = r, W0 = 0 and non-singular factors LoFT is torch's AdamW on W."""
    hyper = Hyper(weight_decay=decay)
    problem = LeastSquares.make(12, 12, steps=50, seed=1)
    module = make_adapter(12, 12, 12, seed=2)
    module.base.zero_()
    start = module.weight.detach()
    path = adamw_trajectory(start, problem.grad, problem.steps, hyper)
    final = train(module, problem, hyper)
    check_close(final, path[-1], 1e-9, "W")
    check_displacement(final, path[-1], start, T1, "displacement of W")


@pytest.mark.parametrize("start", ["general", "zero"])
@pytest.mark.parametrize("options", ["plain", "decay-clip"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory_and_state_equal_the_oracle(case: Case, options: str, start: str) -> None:
    """24 steps: W, both moments and the step count of both factors, every step (T1)."""
    problem = LeastSquares.make(case.m, case.n, steps=24, seed=3)
    module = make_adapter(case.m, case.n, case.r, seed=4, start=start)
    hyper = Hyper()
    if options == "decay-clip":
        pair = make_oracle(module)
        norm = projected_norm([pair], [problem.grad(pair.weight, 0)], [], hyper)
        hyper = replace(hyper, weight_decay=0.5, max_grad_norm=0.5 * norm)
    least = compare(module, problem, lambda _: hyper)
    assert (least < 1) == (hyper.max_grad_norm is not None)


DEFICIENT = {
    "zero-row": lambda a: torch.cat([torch.zeros_like(a[:1]), a[1:]]),
    "repeated-row": lambda a: torch.cat([a[:1], a[:1], a[2:]]),
    "dependent-last": lambda a: torch.cat([a[:-1], a[:1] - 2 * a[1:2]]),
    # A small true pivot before a dependent row: without pivoting, rounding errors pass for a row.
    "close-then-dependent": lambda a: torch.cat([a[:1], a[:1] + 1e-4 * a[1:2], a[1:2], a[3:]]),
    "rank-one": lambda a: torch.arange(1.0, len(a) + 1, dtype=a.dtype)[:, None] * a[:1],
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("phase", ["B-step", "A-step"])
@pytest.mark.parametrize("name", DEFICIENT)
def test_one_step_with_a_deficient_partner(name: str, phase: str) -> None:
    """The partner of the moving factor loses rank, by an edit between two steps."""
    problem = LeastSquares.make(13, 11, steps=4, seed=5)
    module = make_adapter(13, 11, 4, seed=6)
    pair = make_oracle(module)
    hyper = Hyper(weight_decay=0.1)
    optimizer = make_optimizer(module, hyper)
    # One step per factor first: the moments that have to be projected must not be zero.
    edit = 2 if phase == "B-step" else 3
    for k in range(edit + 1):
        if k == edit and phase == "B-step":
            pair.factor_a = DEFICIENT[name](pair.factor_a)
            module.lora_A.data.copy_(pair.factor_a)
        elif k == edit:
            pair.factor_b = DEFICIENT[name](pair.factor_b.mT).mT
            module.lora_B.data.copy_(pair.factor_b)
        optimizer.zero_grad()
        problem.loss(module.weight, k).backward()
        optimizer.step()
        before = pair.weight
        pair.step(problem.grad(before, k), hyper)
    check_displacement(module.weight.detach(), pair.weight, before, 1e-9, "W")
    check_state(optimizer, module, pair, "last step")


@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["no-decay", "decay"])
@pytest.mark.parametrize("case", [Case(12, 17, 3), Case(20, 9, 8)], ids=str)
def test_general_change_of_factors_keeps_the_trajectory(case: Case, decay: float) -> None:
    """(B T^-1, T A) with cond(T) = 100 gives the same W."""
    hyper = Hyper(weight_decay=decay)
    problem = LeastSquares.make(case.m, case.n, steps=30, seed=7)
    module = make_adapter(case.m, case.n, case.r, seed=8)
    change = conditioned(case.r, 100, seed=9)
    other_b = torch.linalg.solve(change, module.lora_B.detach(), left=False)
    other = TinyLoRA(module.base, other_b, change @ module.lora_A.detach(), module.scaling)
    start = module.weight.detach()
    expected = train(module, problem, hyper)
    check_displacement(train(other, problem, hyper), expected, start, T1, "W")


@pytest.mark.parametrize("turn", ["swap", "rotate"])
@pytest.mark.parametrize("case", [Case(6, 9, 8), Case(9, 6, 8), Case(4, 5, 8)], ids=str)
def test_rotated_factors_keep_the_trajectory_above_full_rank(case: Case, turn: str) -> None:
    """At r > min(m, n) an orthogonal T is all that a pseudo-inverse allows, and it must hold."""
    problem = LeastSquares.make(case.m, case.n, steps=24, seed=7)
    module = make_adapter(case.m, case.n, case.r, seed=8)
    change = torch.eye(case.r, dtype=torch.float64).flip(0)
    if turn == "rotate":
        change = conditioned(case.r, 1, seed=9)
    lora_b, lora_a = module.lora_B.detach() @ change.mT, change @ module.lora_A.detach()
    other = TinyLoRA(module.base, lora_b, lora_a, module.scaling)
    start = module.weight.detach()
    expected = train(module, problem, Hyper())
    check_displacement(train(other, problem, Hyper()), expected, start, T1, "W")


@pytest.mark.parametrize("scaling", [0.5, 2.0, 3.0, 4.0], ids=lambda s: f"alpha/r={s:g}")
@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["no-decay", "decay"])
def test_alpha_keeps_the_trajectory(scaling: float, decay: float) -> None:
    """Any alpha gives the trajectory of alpha = r if the initial W is the same."""
    hyper = Hyper(weight_decay=decay)
    problem = LeastSquares.make(12, 17, steps=30, seed=10)
    start = make_adapter(12, 17, 4, seed=11)
    unit = TinyLoRA(start.base, start.lora_B, start.lora_A, 1.0)
    scaled = TinyLoRA(start.base, start.lora_B / scaling, start.lora_A, scaling)
    begin = unit.weight.detach()
    expected = train(unit, problem, hyper)
    check_displacement(train(scaled, problem, hyper), expected, begin, T1, "W")


@pytest.mark.parametrize("factor", [1e-4, 3e3], ids=lambda f: f"{f:g}")
def test_scale_of_the_loss_does_not_matter_without_eps(factor: float) -> None:
    """With eps = 0 a multiple of the loss gives the same trajectory."""
    hyper = Hyper(eps=0.0, weight_decay=0.1)
    problem = LeastSquares.make(12, 17, steps=24, seed=12)
    module, other = make_adapter(12, 17, 4, seed=13), make_adapter(12, 17, 4, seed=13)
    start = module.weight.detach()
    expected = train(module, problem, hyper)
    actual = train(other, problem.scaled(factor), hyper)
    check_displacement(actual, expected, start, T1, "W")


def test_permuted_rows_and_columns_give_the_permuted_trajectory() -> None:
    """No row and no column of W is special."""
    hyper = Hyper(weight_decay=0.1)
    problem = LeastSquares.make(12, 17, steps=24, seed=14)
    module = make_adapter(12, 17, 4, seed=15)
    rows = torch.randperm(12, generator=generator(16))
    cols = torch.randperm(17, generator=generator(17))
    lora_b, lora_a = module.lora_B.detach()[rows], module.lora_A.detach()[:, cols]
    other = TinyLoRA(module.base[rows][:, cols], lora_b, lora_a, module.scaling)
    start = module.weight.detach()
    expected = train(module, problem, hyper)
    actual = train(other, problem.permuted(rows, cols), hyper)
    check_displacement(actual, expected[rows][:, cols], start[rows][:, cols], T1, "W")


ABLATIONS = {
    "decay": Hyper(weight_decay=0.5),
    "clip": Hyper(max_grad_norm=5.0),
    "both-at-once": Hyper(alternate=False),
    "both-at-once-decay": Hyper(alternate=False, weight_decay=0.5),
    "both-at-once-clip": Hyper(alternate=False, max_grad_norm=5.0),
    "uncalibrated": Hyper(calibrate=False),
    "uncalibrated-both": Hyper(calibrate=False, alternate=False),
    "diagonal": Hyper(second_moment="diagonal"),
    "diagonal-decay": Hyper(second_moment="diagonal", weight_decay=0.5),
    "diagonal-clip": Hyper(second_moment="diagonal", max_grad_norm=5.0),
    "diagonal-uncalibrated": Hyper(second_moment="diagonal", calibrate=False),
    "diagonal-both": Hyper(second_moment="diagonal", alternate=False),
    "maximize": Hyper(maximize=True),
    "maximize-decay-clip": Hyper(maximize=True, weight_decay=0.5, max_grad_norm=5.0),
    "maximize-diagonal": Hyper(maximize=True, second_moment="diagonal"),
    "large-eps": Hyper(eps=0.1),
    "no-momentum": Hyper(betas=(0.0, 0.999)),
    "no-memory": Hyper(betas=(0.0, 0.0)),
    "beta1-above-beta2": Hyper(betas=(0.99, 0.9)),
}


@pytest.mark.parametrize("case", [Case(12, 9, 3), Case(7, 18, 5)], ids=str)
@pytest.mark.parametrize("name", ABLATIONS)
def test_options_equal_the_oracle(name: str, case: Case) -> None:
    """Every switch and unusual number, 16 steps."""
    hyper = ABLATIONS[name]
    problem = LeastSquares.make(case.m, case.n, steps=16, seed=18)
    module = make_adapter(case.m, case.n, case.r, seed=19)
    least = compare(module, problem, lambda _: hyper)
    assert (least < 1) == (hyper.max_grad_norm is not None)


@pytest.mark.parametrize("alternate", [True, False], ids=["alternate", "both-at-once"])
def test_nothing_over_nothing_moves_nothing(alternate: bool) -> None:
    """With eps = 0, B = 0 and a zero column of A meet 0/0 in whole rows and columns of D."""
    problem = LeastSquares.make(9, 11, steps=12, seed=45)
    module = make_adapter(9, 11, 3, seed=46, start="zero")
    module.lora_A.data[:, 4] = 0.0
    hyper = Hyper(eps=0.0, alternate=alternate)
    compare(module, problem, lambda _: hyper)


BETAS = {
    "down": ((0.9, 0.999), (0.5, 0.9)),
    "up": ((0.5, 0.9), (0.95, 0.9999)),
    "beta1-only-up": ((0.5, 0.999), (0.95, 0.999)),
    "beta1-only-down": ((0.95, 0.999), (0.5, 0.999)),
    "beta2-only-up": ((0.9, 0.95), (0.9, 0.9999)),
    "beta2-only-down": ((0.9, 0.9999), (0.9, 0.95)),
}


@pytest.mark.parametrize("turn", [1, 2, 7], ids="at{}".format)
@pytest.mark.parametrize("noise", [0.5, 0.0], ids=["noisy", "noiseless"])
@pytest.mark.parametrize("name", BETAS)
def test_betas_may_change_in_mid_run(name: str, noise: float, turn: int) -> None:
    """Corrections use the current betas; a bound derived for constant betas must not act."""
    before, after = (Hyper(betas=betas) for betas in BETAS[name])
    problem = LeastSquares.make(12, 9, steps=18, seed=20, noise=noise)
    if noise == 0.0:
        # The same batch every step: gradients that hardly change sit at the Cauchy-Schwarz bound.
        problem = replace(
            problem,
            inputs=problem.inputs[:1].expand_as(problem.inputs),
            targets=problem.targets[:1].expand_as(problem.targets),
        )
    module = make_adapter(12, 9, 3, seed=21)
    compare(module, problem, lambda k: before if k < turn else after)


class Several(nn.Module):
    """Pairs of different shape and rank beside a plain parameter."""

    def __init__(self, cases: list[Case], seed: int) -> None:
        """Draw the adapters."""
        super().__init__()
        self.layers = nn.ModuleList(
            make_adapter(case.m, case.n, case.r, seed + i) for i, case in enumerate(cases)
        )
        self.bias = nn.Parameter(normal(generator(seed), 7))

    def loss(self, problems: list[LeastSquares], bias_targets: Tensor, k: int) -> Tensor:
        """Return the sum of separate losses."""
        total = (self.bias - bias_targets[k]).square().sum()
        for layer, problem in zip(self.layers, problems, strict=True):
            total = total + problem.loss(layer.weight, k)
        return total


SEVERAL = [Case(12, 9, 3), Case(5, 20, 4), Case(16, 6, 1)]


@pytest.mark.parametrize("max_norm", [None, 8.0], ids=["free", "clip"])
def test_several_pairs_and_a_bias_equal_separate_optimizers(max_norm: float | None) -> None:
    """Pairs meet only in the clip coefficient, and the bias gets torch's AdamW."""
    hyper = Hyper(weight_decay=0.1, max_grad_norm=max_norm)
    problems = [LeastSquares.make(c.m, c.n, 16, seed=22 + i) for i, c in enumerate(SEVERAL)]
    targets = normal(generator(25), 16, 7)
    model = Several(SEVERAL, seed=26)
    pairs = [make_oracle(layer) for layer in model.layers]
    starts = [pair.weight for pair in pairs]
    bias = nn.Parameter(model.bias.detach().clone())
    adamw = torch.optim.AdamW([bias], lr=hyper.lr, betas=hyper.betas, weight_decay=0.1)
    optimizer = make_optimizer(model, hyper)
    for k in range(16):
        optimizer.zero_grad()
        model.loss(problems, targets, k).backward()
        kept = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, grad in zip(model.parameters(), kept, strict=True):
            assert torch.equal(p.grad, grad), "step must leave gradients alone"
        grads = [q.grad(pair.weight, k) for q, pair in zip(problems, pairs, strict=True)]
        bias_grad = 2 * (bias.detach() - targets[k])
        coefficient = step_pairs(pairs, grads, hyper, [bias_grad])
        assert (coefficient < 1) == (max_norm is not None)
        bias.grad = coefficient * bias_grad
        adamw.step()
        for i, (layer, pair) in enumerate(zip(model.layers, pairs, strict=True)):
            check_displacement(layer.weight.detach(), pair.weight, starts[i], T1, f"W{i}, {k}")
            check_state(optimizer, layer, pair, f"pair {i}, step {k}")
        check_close(model.bias.detach(), bias.detach(), T1, f"bias after step {k}")
        if max_norm is None:
            assert torch.equal(model.bias, bias)


@pytest.mark.parametrize("steps_before", [0, 1], ids=["B-phase", "A-phase"])
@pytest.mark.parametrize("alternate", [True, False], ids=["alternate", "both-at-once"])
@pytest.mark.parametrize("share", [0.25, 4.0], ids=["clips", "leaves"])
def test_clip_grad_norm(share: float, alternate: bool, steps_before: int) -> None:
    """The norm is that of the dense projected gradients; all gradients are scaled in place."""
    hyper = Hyper(alternate=alternate)
    problems = [LeastSquares.make(c.m, c.n, 2, seed=30 + i) for i, c in enumerate(SEVERAL)]
    targets = normal(generator(33), 2, 7)
    model = Several(SEVERAL, seed=34)
    optimizer = make_optimizer(model, hyper)
    for k in range(steps_before):
        model.loss(problems, targets, k).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = [make_oracle(layer) for layer in model.layers]
    for pair in pairs:
        pair.count = steps_before
    model.loss(problems, targets, steps_before).backward()
    grads = [q.grad(p.weight, steps_before) for q, p in zip(problems, pairs, strict=True)]
    expected = projected_norm(pairs, grads, [model.bias.grad], hyper)
    kept = [p.grad.clone() for p in model.parameters()]
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    norm = lk.clip_grad_norm_(optimizer, share * expected)
    assert isinstance(norm, Tensor)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    coefficient = clip_coefficient(expected, share * expected)
    for (name, p), grad in zip(model.named_parameters(), kept, strict=True):
        check_close(p.grad, coefficient * grad, 1e-6, f"gradient of {name}")
        assert share < 1 or torch.equal(p.grad, grad)
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses


def rounded(module: TinyLoRA) -> TinyLoRA:
    """Return the adapter with fp32 values in fp64 tensors, a start both precisions share."""
    tensors = (module.base, module.lora_B.detach(), module.lora_A.detach())
    return TinyLoRA(*(t.float().double() for t in tensors), module.scaling)


@pytest.mark.parametrize("start", ["general", "zero"])
@pytest.mark.parametrize("case", [Case(17, 33, 3), Case(40, 16, 8), Case(24, 30, 1)], ids=str)
def test_fp32_free_run_stays_at_the_fp64_run(case: Case, start: str) -> None:
    """24 steps in fp32, errors free to feed back (T3), on many seeds."""
    for seed in range(40, 56):
        problem = LeastSquares.make(case.m, case.n, steps=24, seed=seed)
        exact = rounded(make_adapter(case.m, case.n, case.r, seed=seed + 1, start=start))
        single = TinyLoRA(exact.base, exact.lora_B, exact.lora_A, exact.scaling).float()
        begin = exact.weight.detach()
        expected = train(exact, problem, Hyper())
        train(single, problem.to(torch.float32), Hyper())
        # W in fp64 from the fp32 factors: the rounding of the frozen base is not the optimizer's.
        actual = single.double().weight.detach()
        check_displacement(actual, expected, begin, T3, f"W, seed {seed}")
