"""fp32 accuracy of one step against fp64, for well and ill conditioned partners (rule T4).

Every step is teacher-forced: the fp64 twin starts from the fp32 run's parameters, state and
gradients, so that errors of earlier steps neither add up nor cancel.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import TinyLoRA, relative_distance
from runs import one_thread  # noqa: F401 - an autouse fixture
from torch import Tensor

import loft_kernels as lk
from loft_kernels import reference as ref

pytestmark = pytest.mark.usefixtures("host_backend")  # each backend of the CPU

U32 = 2.0**-24
M, N, RANK, SCALING = 96, 80, 8, 0.5
SEEDS = range(7, 11)


def factor_of_condition(rows: int, rank: int, condition: float, rng: torch.Generator) -> Tensor:
    """Draw a rows x rank matrix with singular values spread evenly in the logarithm."""
    left, _ = torch.linalg.qr(torch.randn(rows, rank, generator=rng, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(rank, rank, generator=rng, dtype=torch.float64))
    return left @ torch.diag(torch.logspace(0, -1, rank, base=condition).double()) @ right


def deviations(opt: lk.LoFTAdamW, param: Tensor) -> Tensor:
    """Rebuild the square root of the virtual second moment from the state."""
    state = opt.state[param]
    products = ref.khatri_rao_square(state["partner_basis"].double())
    return (state["second_moment"].double() @ products.T).clamp(min=0).sqrt()


def twin_of(module: TinyLoRA, opt: lk.LoFTAdamW) -> tuple[TinyLoRA, lk.LoFTAdamW]:
    """Copy a run into fp64: parameters, gradients, state."""
    twin = copy.deepcopy(module).double()
    for name, p in module.named_parameters():
        twin.get_parameter(name).grad = p.grad.double()
    twin_opt = lk.LoFTAdamW(twin)
    twin_opt.load_state_dict(opt.state_dict())
    return twin, twin_opt


def set_gradients(module: TinyLoRA, gradient: Tensor) -> None:
    """Give the factors the gradients that a gradient of W implies."""
    b, a = module.lora_B, module.lora_A
    b.grad = (SCALING * gradient @ a.detach().double().T).to(b.dtype)
    a.grad = (SCALING * b.detach().double().T @ gradient).to(a.dtype)


def one_step_errors(
    condition: float, steps: int, noise: float, seed: int, late: int = 0, **options: Any
) -> tuple[float, float]:
    """Return the relative errors of the last of some steps: in W's displacement and sqrt(v).

    lora_A has no gradient in the first `late` steps, as if it had been frozen.
    """
    rng = torch.Generator().manual_seed(seed)
    module = TinyLoRA(
        torch.zeros(M, N),
        factor_of_condition(M, RANK, condition, rng).float(),
        factor_of_condition(N, RANK, condition, rng).T.float(),
        SCALING,
    )
    opt = lk.LoFTAdamW(module, lr=1e-3, eps=0.0, **options)
    mean = torch.randn(M, N, generator=rng, dtype=torch.float64)
    for step in range(1, steps + 1):
        fresh = torch.randn(M, N, generator=rng, dtype=torch.float64)
        set_gradients(module, mean + noise * fresh)
        if step <= late:
            module.lora_A.grad = None
        if step < steps:
            opt.step()
    # A long step: rounding the sum X - lr * update is no error of the update.
    opt.param_groups[0]["lr"] = 1e3
    twin, twin_opt = twin_of(module, opt)
    start = copy.deepcopy(twin)
    opt.step()
    twin_opt.step()
    moved = [n for n, p in twin.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    # One factor at a time, so that a simultaneous step shows both.
    errors = [relative_distance(*displacements(n, module, twin, start)) for n in moved]
    roots = [
        (deviations(o, m.get_parameter(n)) for o, m in ((opt, module), (twin_opt, twin)))
        for n in moved
        if options.get("calibrate", True)
    ]
    return max(errors), max((relative_distance(*pair) for pair in roots), default=0.0)


def displacements(name: str, *runs: TinyLoRA) -> tuple[Tensor, Tensor]:
    """Return how far W moves by one factor in two runs from the common start given last."""
    *ends, start = runs
    partner = (start.lora_A if name == "lora_B" else start.lora_B).detach()
    moves = [r.get_parameter(name).detach().double() - start.get_parameter(name) for r in ends]
    first, second = (m @ partner if name == "lora_B" else partner @ m for m in moves)
    return first.detach(), second.detach()


def check_t4(condition: float, steps: int, noise: float, **options: Any) -> float:
    """Hold one step to rule T4 over some seeds, and return the largest error in W."""
    limit = U32 * condition + 1e-6
    worst = 0.0
    for seed in SEEDS:
        error, v_error = one_step_errors(condition, steps, noise, seed, **options)
        where = f"cond {condition:.0e}, step {steps}, noise {noise}, seed {seed}"
        assert error <= limit, f"{where}: W moved with error {error:.1e}, limit {limit:.1e}"
        assert v_error <= 1e-5, f"{where}: sqrt(v) has relative error {v_error:.1e}"
        worst = max(worst, error)
    return worst


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6], ids="cond{:.0e}".format)
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 1.0], ids="noise{}".format)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 21], ids="step{}".format)
def test_error_of_a_step_grows_no_faster_than_the_condition(
    condition, steps, noise, record_property
):
    record_property("error", check_t4(condition, steps, noise))


OPTIONS = {
    "simultaneous": {"alternate": False},
    "uncalibrated": {"calibrate": False},
    "no-momentum": {"betas": (0.0, 0.999)},
    "no-memory": {"betas": (0.9, 0.0)},
    "short-memory": {"betas": (0.95, 0.9)},
}


# Without memory m~ / |g~| is unbounded from the third step on: no rounding is small enough.
OPTION_CASES = [(n, k) for n in OPTIONS for k in (1, 2, 5) if n != "no-memory" or k <= 2]


@pytest.mark.parametrize(("name", "steps"), OPTION_CASES)
def test_steps_are_accurate_under_every_option(name, steps):
    check_t4(1.0, steps, 0.1, **OPTIONS[name])


@pytest.mark.filterwarnings("ignore:.*one-sided mode:UserWarning")
@pytest.mark.parametrize("late", [4, 5], ids=["own-step2", "own-step1"])
def test_thawed_factor_counts_its_own_early_steps(late):
    check_t4(1.0, 6, 0.1, late=late)


@pytest.mark.parametrize("beta1", [0.9, 0.0], ids="beta1={}".format)
@pytest.mark.parametrize("transported", [True, False], ids=["transported", "same-basis"])
def test_early_moments_are_those_that_are_stored(transported, beta1):
    """The formula for P without P is the recursion of Eq. 11-12, also when betas change."""
    rng = torch.Generator().manual_seed(3)
    m, p, guard = torch.zeros(5, 3).double(), torch.zeros(5, 6).double(), 0.0
    for beta2 in (0.999, 0.9):
        g, c = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (5, 3))
        change = c if transported else None
        early, roots = ref.early_moments(m, g, change, guard=guard, beta1=beta1, beta2=beta2)
        ref.update_first_moment_(m, g, change, beta1)
        ref.update_second_moment_(p, g, change, beta2)
        guard = ref.update_guard(guard, beta1, beta2)
        torch.testing.assert_close(early, m, rtol=1e-13, atol=1e-15)
        squares = ref.pack_symmetric(torch.einsum("kia,kib->iab", roots, roots))
        torch.testing.assert_close(squares, p, rtol=1e-13, atol=1e-15)


def test_split_of_the_second_moment_takes_rounding_into_account():
    """R + c^T c is P to fp64's last digits though c is rounded to fp32, also where m vanishes."""
    rng = torch.Generator().manual_seed(4)
    m = torch.randn(4, 3, generator=rng)
    m[1] = 0
    samples = m.double() + 0.01 * torch.randn(6, 4, 3, generator=rng, dtype=torch.float64)
    packed = ref.pack_symmetric(torch.einsum("kia,kib->iab", samples, samples))
    residual, c = ref.split_along(m, packed)
    rebuilt = residual + ref.pack_symmetric(torch.einsum("ia,ib->iab", c.double(), c.double()))
    assert c.dtype == torch.float32
    torch.testing.assert_close(rebuilt, packed, rtol=1e-13, atol=1e-15)
    assert bool((residual.norm(dim=1) <= packed.norm(dim=1)).all())
    assert float(residual[0].norm()) < 1e-2 * float(packed[0].norm())


def test_matmul_settings_of_the_caller_do_not_reach_the_step():
    exact = one_step_errors(1.0, 6, 0.3, 7)
    torch.set_float32_matmul_precision("medium")
    try:
        assert one_step_errors(1.0, 6, 0.3, 7) == exact
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("rank", [1, 3, 8], ids="r{}".format)
def test_guard_bounds_the_ratio_of_the_moments_and_never_binds_in_exact_arithmetic(rank):
    rng = torch.Generator().manual_seed(rank)
    guard, m, v = 0.0, torch.zeros(rank, dtype=torch.float64), torch.zeros(rank).double()
    # OneCycleLR moves beta1 during training, so the bound must follow changing betas.
    for step in range(60):
        beta1, beta2 = 0.85 + 0.1 * (step % 13) / 13, 0.9 + 0.09 * (step % 7) / 7
        g = torch.randn(rank, generator=rng, dtype=torch.float64) * 10.0 ** (step % 5)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        guard = ref.update_guard(guard, beta1, beta2)
        assert bool((m * m <= guard * v * (1 + 1e-12)).all())


def test_guard_bounds_the_step_where_rounding_lost_the_second_moment():
    # v = 0 under m != 0 happens to a stored P in fp32, never in exact arithmetic.
    q = torch.eye(3)
    step = ref.virtual_adam_projection(
        torch.tensor([[0.3, -2.0, 0.0]]),
        None,
        torch.zeros(1, 1, 3),
        q,
        bias_correction1=0.5,
        bias_correction2=0.25,
        eps=0.0,
        guard=9.0,
    )
    bound = (9.0 * 0.25 / 0.5**2) ** 0.5
    torch.testing.assert_close(step, torch.tensor([[bound, -bound, 0.0]]))


def test_guard_is_the_closed_form_for_constant_betas():
    beta1, beta2, guard = 0.9, 0.999, 0.0
    for step in range(1, 201):
        guard = ref.update_guard(guard, beta1, beta2)
        q = beta1**2 / beta2
        closed = (1 - beta1) ** 2 * (1 - q**step) / ((1 - beta2) * (1 - q))
        assert guard == pytest.approx(closed, rel=1e-12)
        bound = guard * ref.bias_correction(beta2, step) / ref.bias_correction(beta1, step) ** 2
        assert step > 1 or bound == pytest.approx(1.0, rel=1e-12)
    for _ in range(5000):
        guard = ref.update_guard(guard, beta1, beta2)
    assert guard**0.5 == pytest.approx(7.27, abs=5e-3)


@pytest.mark.parametrize("step", [1, 10, 2**24 + 2], ids="t{}".format)
def test_bias_correction_does_not_cancel(step):
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    exact = 1 - Decimal.from_float(0.999) ** step
    assert ref.bias_correction(0.999, step) == pytest.approx(float(exact), rel=1e-14)
    assert ref.bias_correction(0.0, step) == 1.0
