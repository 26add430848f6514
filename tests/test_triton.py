"""The Triton kernels against the reference path: parameters and every state tensor.

On a GPU the optimizer itself runs them; without one, Triton's interpreter does, on small and odd
shapes. Steps are teacher-forced: both sides start from one state, which a few reference steps have
filled. Memory that nobody wrote is NaN, and every tensor that the kernels reach through the address
table lies between bands of NaN.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loft_kernels as lk
from loft_kernels import backends

pytest.importorskip("triton", reason="the Triton backend is optional")
from loft_kernels.backends.triton import configs
from loft_kernels.backends.triton.launch import Launch, Launcher
from loft_kernels.backends.triton.step import LaunchPlan, unsupported
from loft_kernels.plan import Outside

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAND = 64  # entries of NaN before and after every tensor

# fp16 operands err by 2^-11 each, at random; a projection onto 30 to 130 columns averages less of
# that away than one onto the thousands of columns of a real layer, where 3e-4 is the bar.
DEFAULT_LIMIT = 1e-3


class Pair(nn.Module):
    """A LoRA pair in memory of its own, between bands of NaN."""

    def __init__(self, m: int, n: int, rank: int, rng: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.scaling = 0.5
        self.lora_A = nn.Parameter(banded(torch.randn(rank, n, generator=rng).to(dtype)))
        self.lora_B = nn.Parameter(banded(torch.randn(m, rank, generator=rng).to(dtype)))


def banded(value: Tensor) -> Tensor:
    """Copy a tensor into the middle of a buffer of NaN (of its largest integer for counts)."""
    empty = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
    # fp64 and int64 entries behind narrower ones need their own alignment: one buffer each.
    buffer = torch.full((value.numel() + 2 * BAND,), empty, dtype=value.dtype, device=DEVICE)
    inner = buffer[BAND : BAND + value.numel()].view(value.shape)
    inner.copy_(value)
    return inner


def assert_bands_untouched(tensor: Tensor, name: str) -> None:
    """Check that nothing was written beside a banded tensor."""
    whole = torch.as_strided(tensor.detach(), (tensor.numel() + 2 * BAND,), (1,), 0)
    for band in (whole[:BAND], whole[-BAND:]):
        intact = band.isnan() if band.is_floating_point() else band == torch.iinfo(band.dtype).max
        assert bool(intact.all()), f"{name}: a kernel wrote outside its tensor"


@dataclass(frozen=True)
class Case:
    """Shapes, rank and options of one comparison."""

    name: str
    shapes: tuple[tuple[int, int], ...] = ((70, 45), (33, 130))
    ranks: tuple[int, ...] = (8,)
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    spoil: str = ""
    rate: float = 1.0  # so that rounding X - lr * update to fp32 is no error of the update
    steps: tuple[int, ...] = (0, 1)  # numbers of steps by kernels before the step under test
    history: int = 5  # reference steps before those


CASES = [
    *(Case(f"r{r}", ranks=(r,)) for r in (1, 3, 8, 16)),
    *(Case(f"r{r}", shapes=((33, 45),), ranks=(r,)) for r in (4, 12, 17, 24, 32)),
    *(Case(f"r{r}", shapes=((33, 70),), ranks=(r,)) for r in (48, 64)),
    Case("tile-edges", shapes=((64, 128), (65, 63), (127, 129)), ranks=(4,)),
    Case("one-row", shapes=((1, 7), (7, 1)), ranks=(2,)),
    Case("rank-above-size", shapes=((6, 40),), ranks=(9,)),
    Case("mixed-ranks", ranks=(3, 16)),
    # The interpreter rounds to bf16 by cutting off, so only a GPU can tell.
    *([Case("bf16", dtype=torch.bfloat16)] if DEVICE == "cuda" else []),
    Case("fp16", dtype=torch.float16),
    Case("clip", options={"max_grad_norm": 0.05}),
    Case("decay", options={"weight_decay": 0.3}),
    Case("betas", options={"betas": (0.5, 0.9)}),
    Case("no-momentum", options={"betas": (0.0, 0.9)}),
    Case("eps-zero", options={"eps": 0.0}),
    Case("eps-large", options={"eps": 1.0}),
    # The square of P is below fp32's range.
    Case("tiny-gradients", options={"eps": 0.0}, spoil="tiny"),
    Case("tiny-gradients-r24", ((33, 45),), (24,), options={"eps": 0.0}, spoil="tiny"),
    Case("tiniest-gradients", spoil="tiniest", rate=1e7),
    Case("tiniest-gradients-r24", ((33, 45),), (24,), spoil="tiniest", rate=1e7),
    Case("eps-above-all", options={"eps": 1e-3}, spoil="tiny", rate=1e7),
    Case("eps-above-all-r24", ((33, 45),), (24,), options={"eps": 1e-3}, spoil="tiny", rate=1e7),
    Case("simultaneous", options={"alternate": False}),
    Case("maximize", options={"maximize": True}),
    Case("damping", options={"damping": 1e-2}),
    Case("strided-gradients", spoil="strided"),
    Case("missing-gradient", spoil="missing"),
    Case("missing-pair", spoil="missing-pair"),
    Case("zero-partner", spoil="zero"),
    Case("dependent-columns", spoil="dependent"),
    # Somebody else moved both factors: P of the one that stays is carried over, too.
    *(Case(f"edited-r{r}", ((33, 25),), (r,), spoil="edited", steps=(0,)) for r in (8, 24)),
    # Compute capability 9.0 has a kernel of its own for these, which nothing interprets.
    *(
        Case(f"{name}-r{r}", ((33, 70), (66, 135)), (r,), spoil=name)
        for r, name in ((33, "edited"), (64, "edited"), (48, "missing"), (48, "missing-pair"))
        if DEVICE == "cuda"
    ),
    *([Case("simultaneous-r48", ranks=(48,), options={"alternate": False})] * (DEVICE == "cuda")),
    # Squares of blocks; the interpreter needs seconds for each of their factorisations.
    Case("dependent-columns-r65", ((3, 68), (4, 3)), (65,), spoil="dependent", steps=(1,)),
    Case(
        "fp16-clip-r65",
        ((3, 4), (4, 3)),
        (65,),
        torch.float16,
        {"max_grad_norm": 0.05},
        "zero",
        steps=(0,),
    ),
    Case("r256", ((2, 3),), (256,), steps=(0,), history=2),
]
FULL_R66 = Case("r66", ((3, 70),), (66,), steps=(0,))


def build(case: Case, precision: str) -> tuple[nn.ModuleList, lk.LoFTAdamW]:
    """Make the adapters and an optimizer for the kernels."""
    rng = torch.Generator().manual_seed(3)
    ranks = case.ranks * len(case.shapes)
    pairs = [Pair(m, n, r, rng, case.dtype) for (m, n), r in zip(case.shapes, ranks, strict=False)]
    module = nn.ModuleList(pairs)
    backend = "triton" if DEVICE == "cuda" else "auto"
    return module, lk.LoFTAdamW(
        module, lr=1e-2, backend=backend, precision=precision, **case.options
    )


def set_gradients(module: nn.ModuleList, case: Case, step: int) -> None:
    """Give every factor a gradient, spoilt as the case asks."""
    rng = torch.Generator().manual_seed(100 + step)
    mean = torch.Generator().manual_seed(7)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=rng) + torch.randn(p.shape, generator=mean)
        size = {"tiny": 1e-11, "tiniest": 1e-15}.get(case.spoil, 0.1)
        grad = (size * noise).to(device=DEVICE, dtype=p.dtype)
        p.grad = grad.T.contiguous().T if case.spoil == "strided" else grad
    if case.spoil == "missing":
        module[0].lora_A.grad = None
    if case.spoil == "missing-pair":
        module[0].lora_A.grad = module[0].lora_B.grad = None


def spoil_factors(module: nn.ModuleList, case: Case) -> None:
    """Make a factor zero or rank-deficient before the step under test."""
    with torch.no_grad():
        if case.spoil == "zero":
            module[0].lora_A.zero_()
            module[1].lora_B.zero_()
        if case.spoil == "dependent":
            module[0].lora_A[3] = module[0].lora_A[1]
            module[1].lora_B[:, 0] = 2 * module[1].lora_B[:, 5] - module[1].lora_B[:, 2]
        if case.spoil == "edited":
            rng = torch.Generator().manual_seed(11)
            for p in module.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=rng).to(p))


def twin_of(module: nn.ModuleList, opt: lk.LoFTAdamW, case: Case, dtype: torch.dtype | None):
    """Copy a run for the reference path, into another dtype if asked."""
    twin = copy.deepcopy(module)
    if dtype is not None:
        twin = twin.to(dtype)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.to(q.dtype)
    twin_opt = lk.LoFTAdamW(twin, lr=1e-2, backend="reference", **case.options)
    twin_opt.load_state_dict(opt.state_dict())
    for group, own in zip(twin_opt.param_groups, opt.param_groups, strict=True):
        group["lr"] = own["lr"]
    return twin, twin_opt


def kernel_step(opt: lk.LoFTAdamW, plan: LaunchPlan) -> None:
    """Take one step with the kernels: through the optimizer, or interpreted."""
    if DEVICE == "cuda":
        opt.step()
        return
    with torch.no_grad():
        pairs, _ = opt._gather(allocate=True)
        plan.step(
            pairs,
            Outside(),
            opt.nonfinite_steps,
            moving=opt._gathered.moving if opt._gathered is not None else None,
            max_norm=opt.max_grad_norm,
            exact=opt.precision == "ieee",
        )


def reference_history(module: nn.ModuleList, opt: lk.LoFTAdamW, case: Case) -> None:
    """Fill the state with reference steps, and put it between bands."""
    backend, opt.backend = opt.backend, "reference"
    for step in range(case.history):
        set_gradients(module, case, step)
        opt.step()
    opt.backend = backend
    for state in opt.state.values():
        for key, value in state.items():
            state[key] = banded(value)
    spoil_factors(module, case)


def displacement_error(actual: Tensor, exact: Tensor, before: Tensor) -> float:
    """Return the error relative to how far a factor moves; absolute where it stays."""
    moved = float((exact.double() - before).norm())
    error = float((actual.double() - exact.double()).norm())
    return error / moved if moved > 0 else error


def compare(case: Case, precision: str, step: int) -> None:
    """Compare one step of the kernels with fp64 and with the fp32 reference."""
    module, opt = build(case, precision)
    plan = LaunchPlan()
    reference_history(module, opt, case)
    for k in range(step):
        set_gradients(module, case, case.history + k)
        kernel_step(opt, plan)
    set_gradients(module, case, case.history + step)
    if case.dtype == torch.float32:
        opt.param_groups[0]["lr"] = case.rate
    # With damping C is not I where the partner stays, and only equal dtypes see that it stays.
    truth = None if "damping" in case.options else torch.float64
    exact, exact_opt = twin_of(module, opt, case, truth)
    eager, eager_opt = twin_of(module, opt, case, None)
    before = [p.detach().double().clone() for p in module.parameters()]
    kernel_step(opt, plan)
    exact_opt.step()
    eager_opt.step()
    names = [n for n, _ in module.named_parameters()]
    runs = zip(
        names, module.parameters(), exact.parameters(), eager.parameters(), before, strict=True
    )
    for name, p, q, e, x in runs:
        assert_bands_untouched(p, name)
        assert bool(p.isfinite().all()), f"{name} is not finite"
        if case.dtype == torch.float32:
            error = displacement_error(p.detach(), q.detach(), x)
            own = displacement_error(e.detach(), q.detach(), x)
            limit = DEFAULT_LIMIT if precision == "default" else 2 * own + 2e-6
            assert error <= limit, f"{name} moved with error {error:.1e}, limit {limit:.1e}"
        else:
            torch.testing.assert_close(p, e, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-6)
        assert_state_equal(name, opt.state.get(p, {}), exact_opt.state.get(q, {}))


def assert_state_equal(name: str, state: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Compare every state tensor with fp64's; counts and bounds exactly."""
    assert state.keys() - {"master"} == exact.keys()
    for key, value in exact.items():
        assert_bands_untouched(state[key], f"{name} {key}")
        if key in ("step", "guard"):
            torch.testing.assert_close(state[key], value, rtol=1e-14, atol=0)
            continue
        scale = float(value.norm())
        error = float((state[key].double() - value.double()).norm())
        assert error <= 5e-7 * scale + 1e-30, f"{name}: {key} has error {error / scale:.1e}"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill memory that nobody wrote with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _tall_tiles(monkeypatch):
    """Give wide squares fewer tiles: the interpreter takes as long for 8 rows as for 64."""
    rows = configs.operand_rows
    if DEVICE == "cpu":
        monkeypatch.setattr(configs, "operand_rows", lambda rank: 64 if rank > 64 else rows(rank))
        monkeypatch.setattr(configs, "SOLVE_ENTRIES", 64 * 256)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step_equals_the_reference_in_both_phases(case):
    for step in case.steps:
        compare(case, "default", step)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", [CASES[1], CASES[3], FULL_R66], ids=lambda case: case.name)
def test_ieee_step_is_at_most_twice_as_far_as_the_eager_one(case):
    for step in case.steps:
        compare(case, "ieee", step)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25], ids=["nan", "inf", "overflow"])
def test_bad_gradient_skips_the_whole_step_on_the_device(bad):
    case = Case("skip")
    module, opt = build(case, "default")
    plan = LaunchPlan()
    reference_history(module, opt, case)
    set_gradients(module, case, 9)
    module[1].lora_A.grad[2, 5] = bad
    before = copy.deepcopy((list(module.parameters()), opt.state_dict()["state"]))
    kernel_step(opt, plan)
    assert int(opt.nonfinite_steps) == 1
    for p, q in zip(module.parameters(), before[0], strict=True):
        assert torch.equal(p, q)
    for index, state in opt.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[1][index][key]), (index, key)


def test_alternation_may_be_turned_off_and_on_between_steps():
    case = Case("turning", shapes=((33, 20), (20, 45)), ranks=(4,))
    module, opt = build(case, "default")
    plan = LaunchPlan()
    reference_history(module, opt, case)
    for step, alternate in enumerate((True, False, True)):
        opt.param_groups[0]["alternate"] = alternate
        set_gradients(module, case, case.history + step)
        exact, exact_opt = twin_of(module, opt, case, torch.float64)
        exact_opt.param_groups[0]["alternate"] = alternate
        before = [p.detach().double().clone() for p in module.parameters()]
        kernel_step(opt, plan)
        exact_opt.step()
        for p, q, x in zip(module.parameters(), exact.parameters(), before, strict=True):
            # At lr 1e-2 rounding X - lr * update to fp32 is a visible part of the error.
            assert displacement_error(p.detach(), q.detach(), x) <= 2 * DEFAULT_LIMIT


@pytest.mark.parametrize("rank", [4, 24])
def test_betas_may_change_from_the_first_steps_on(rank):
    """OneCycleLR moves beta1, and with it the bound of m by v, but never makes P of rank one."""
    case = Case("cycle", shapes=((33, 45),), ranks=(rank,))
    module, opt = build(case, "ieee")
    plan = LaunchPlan()
    for step in range(5):
        betas = (0.95 - 0.025 * step, 0.999)
        opt.param_groups[0] |= {"betas": betas, "lr": 1.0}
        set_gradients(module, case, step)
        exact, exact_opt = twin_of(module, opt, case, torch.float64)
        exact_opt.param_groups[0] |= {"betas": betas, "lr": 1.0}
        before = [p.detach().double().clone() for p in module.parameters()]
        kernel_step(opt, plan)
        exact_opt.step()
        for p, q, x in zip(module.parameters(), exact.parameters(), before, strict=True):
            assert displacement_error(p.detach(), q.detach(), x) <= DEFAULT_LIMIT, step


def test_betas_that_let_m_outlive_v_are_left_to_the_reference_path():
    for betas, served in (((0.9, 0.81), True), ((0.9, 0.8), False), ((0.5, 0.0), False)):
        case = Case("outlive", options={"betas": betas})
        module, opt = build(case, "default")
        set_gradients(module, case, 0)
        pairs, _ = opt._gather(allocate=True)
        reason = unsupported(pairs[0])
        assert (reason is None) == served, betas
        assert served or "beta1^2 is above beta2" in str(reason)


def test_ranks_above_the_largest_are_left_to_the_reference_path():
    for rank, reason in ((256, None), (257, "rank 257 is above 256")):
        case = Case("largest", ((3, 5),), (rank,))
        module, opt = build(case, "default")
        set_gradients(module, case, 0)
        pairs, _ = opt._gather(allocate=True)
        assert unsupported(pairs[0]) == reason


@pytest.mark.parametrize(
    ("how", "keys"),
    [
        ("exchanged", ("second_moment",)),
        ("exchanged", ("partner_basis",)),
        ("moved", ("exp_avg", "second_moment", "partner_basis")),
    ],
)
def test_state_that_is_elsewhere_at_the_next_step_is_found(how, keys):
    """The address table is kept from step to step; memory that was left is full of NaN."""
    case, ends = Case("elsewhere", shapes=((33, 45),), ranks=(4,)), []
    for change in (False, True):
        module, opt = build(case, "ieee")
        plan = LaunchPlan()
        for step in range(4):
            set_gradients(module, case, step)
            kernel_step(opt, plan)
            for state in opt.state.values() if change and step == 1 else ():
                for key in keys:
                    left, value = state[key].data, state[key].clone()
                    if how == "exchanged":
                        state[key] = value
                    else:
                        state[key].data = value
                    left.fill_(float("nan"))
        ends.append([p.detach().clone() for p in module.parameters()])
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q)


def test_a_measurement_lives_no_longer_than_its_step(monkeypatch):
    """What was measured for a step that another path took is not taken for the next one's."""

    def choose(backend, pairs):
        reason = next(filter(None, map(unsupported, pairs)), "")
        return ("reference", reason) if reason else ("triton", "")

    monkeypatch.setattr(backends, "choose", choose)
    case = Case("turns", shapes=((33, 45),), ranks=(4,))
    module, opt = build(case, "ieee")
    twin = copy.deepcopy(module)
    twin_opt = lk.LoFTAdamW(twin, lr=1e-2, backend=opt.backend, precision="ieee")
    for step, betas in enumerate([(0.9, 0.999)] * 3 + [(0.9, 0.8)] + [(0.9, 0.999)] * 2):
        for net, own in ((module, opt), (twin, twin_opt)):
            own.param_groups[0]["betas"] = betas
            set_gradients(net, case, step)
        twin_opt._gathered = None  # the twin knows nothing of the step before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            opt.step()
            twin_opt.step()
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), step


def test_options_that_change_ask_again_which_backend_serves():
    case = Case("again")
    module, opt = build(case, "default")
    for step in range(3):
        set_gradients(module, case, step)
        opt.step()
    assert opt._gathered.backend is not None
    opt.param_groups[0]["betas"] = (0.9, 0.5)
    set_gradients(module, case, 3)
    assert opt._gathered.refresh(opt)
    assert opt._gathered.backend is None


class Recorder:
    """Stands for a kernel, its compiled form and its runner."""

    arg_names = ("x_ptr", "n", "fixed_ptr", "y_ptr", "BLOCK")

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getitem__(self, grid):
        self.calls.append(grid)
        return self

    def __call__(self, *arguments, **named):
        self.calls.append(arguments or named)
        return self


def test_launcher_fills_what_moves_into_the_kernels_order_of_arguments():
    kernel, launch, fixed = Recorder(), Launcher(), torch.zeros(3)
    described = Launch(kernel, 7, {"num_warps": 4}, {"n": 5, "fixed_ptr": fixed, "BLOCK": 32})
    x, y = torch.zeros(2), torch.ones(2)
    watched = weakref.ref(x)
    launch("name", {"y_ptr": y, "x_ptr": x}, lambda: described)
    first = kernel.calls[1]
    assert kernel.calls[0] == (7,)
    assert (first["num_warps"], first["n"], first["x_ptr"] is x) == (4, 5, True)
    kernel.calls.clear()
    del x, first
    gc.collect()
    assert watched() is None, "workspace of the first launch is kept alive"
    x = torch.zeros(4)
    launch("name", {"x_ptr": x, "y_ptr": y}, lambda: pytest.fail("described again"))
    assert kernel.calls == [(x.data_ptr(), 5, fixed.data_ptr(), y.data_ptr(), 32)]


def test_two_runs_are_bitwise_equal():
    ends = []
    for _ in range(2):
        module, opt = build(CASES[2], "default")
        plan = LaunchPlan()
        for step in range(3):
            set_gradients(module, CASES[2], step)
            kernel_step(opt, plan)
        ends.append([*module.parameters(), *(t for s in opt.state.values() for t in s.values())])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)
