"""What the host notices before a kernel may write, and how it launches kernels."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import loft_kernels as lk
from loft_kernels import backends, gather

pytest.importorskip("triton", reason="the Triton backend is optional")
from test_triton import Case, build, set_gradients
from triton import knobs
from triton.compiler import CompiledKernel

from loft_kernels.backends.triton import launch as launching
from loft_kernels.backends.triton.launch import Launch, Launcher, Tiles
from loft_kernels.backends.triton.tables import GRAD, SCALING, AddressTable, workspace

CASE = Case("host", shapes=((33, 45), (20, 33)), ranks=(4,))


@pytest.fixture(params=["in C", "in Python"])
def gathered(request, monkeypatch) -> tuple[Any, lk.LoFTAdamW]:
    """Pairs of a step, compared by torch's guards and versions of dicts or without them."""
    if request.param == "in Python":
        for quick in ("_alike", "_untouched"):
            monkeypatch.setattr(gather, quick, lambda _: lambda *_: False)
    module, opt = build(CASE, "default")
    opt.backend = "reference"
    set_gradients(module, CASE, 0)
    opt.step()
    set_gradients(module, CASE, 1)
    assert opt._gathered.refresh(opt)
    return module, opt


def exchanged(opt: lk.LoFTAdamW, p: Tensor, key: str) -> None:
    opt.state[p][key] = opt.state[p][key].clone()


def other_memory(opt: lk.LoFTAdamW, p: Tensor, key: str) -> None:
    opt.state[p][key].data = opt.state[p][key].clone()


def other_data(value: Tensor, data: Tensor) -> None:
    value.data = data


CHANGES = {
    "another backend": lambda o, p: setattr(o, "backend", "auto"),
    "another precision": lambda o, p: setattr(o, "precision", "ieee"),
    "step exchanged by an equal one": lambda o, p: exchanged(o, p, "step"),
    "moment exchanged by an equal one": lambda o, p: exchanged(o, p, "exp_avg"),
    "state entry renamed": lambda o, p: o.state[p].update(other=o.state[p].pop("guard")),
    "state entry gone": lambda o, p: o.state[p].pop("guard"),
    "state entry new": lambda o, p: o.state[p].update(more=torch.zeros(2)),
    "state dict exchanged": lambda o, p: o.state.update({p: dict(o.state[p])}),
    "state dict gone": lambda o, p: o.state.pop(p),
    "first moment moved": lambda o, p: other_memory(o, p, "exp_avg"),
    "second moment moved": lambda o, p: other_memory(o, p, "second_moment"),
    "basis moved": lambda o, p: other_memory(o, p, "partner_basis"),
    "basis gone": lambda o, p: o.state[p].pop("partner_basis"),
    "basis exchanged by an equal one": lambda o, p: exchanged(o, p, "partner_basis"),
    "parameter moved": lambda o, p: other_data(p, p.detach().clone()),
    "parameter of another dtype in place": lambda o, p: other_data(
        p, p.detach().view(torch.float16)[:, : p.shape[1]]
    ),
    "parameter of another shape in place": lambda o, p: other_data(p, p.detach()[:2]),
    "parameter of other strides in place": lambda o, p: other_data(
        p, p.detach().as_strided(p.shape, (1, p.shape[0]))
    ),
    "gradient of another dtype": lambda o, p: other_data(p.grad, p.grad.double()),
    "gradient of another shape": lambda o, p: other_data(p.grad, p.grad[:2].clone()),
    "gradient missing": lambda o, p: setattr(p, "grad", None),
    "gradient sparse": lambda o, p: setattr(p, "grad", p.grad.to_sparse()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_beside_the_gradients_calls_for_new_checks(gathered, change):
    module, opt = gathered
    change(opt, module[1].lora_B)
    assert not opt._gathered.refresh(opt)


def test_state_that_is_written_back_or_joined_is_looked_at_once(gathered, monkeypatch):
    module, opt = gathered
    known, p = opt._gathered, module[1].lora_B
    opt.state[p]["guard"] = opt.state[p].pop("guard")  # as it was, the last of its entries
    opt.state[torch.zeros(1)]["step"] = torch.zeros(())
    assert known.refresh(opt)
    if known._untouched():  # in C
        monkeypatch.setattr(known, "_same_state", lambda _: pytest.fail("compared again"))
    assert known.refresh(opt)


GLANCES = [name for name in CHANGES if name.startswith(("gradient", "parameter moved", "basis"))]


@pytest.mark.parametrize("name", GLANCES)
def test_nothing_is_read_where_memory_may_be_of_another_size(gathered, name):
    module, opt = gathered
    CHANGES[name](opt, module[1].lora_B)
    assert opt._gathered.glance() is None


def test_strided_gradients_are_served_with_their_strides(gathered):
    module, opt = gathered
    assert opt._gathered.moving[1][2] == (4, 1)
    module[1].lora_B.grad = module[1].lora_B.grad.T.contiguous().T
    assert opt._gathered.refresh(opt)
    assert opt._gathered.moving[1][2] == (1, 20)


def test_a_glance_that_no_step_followed_up_is_not_trusted_later(gathered):
    module, opt = gathered
    known = opt._gathered
    assert known.glance() is not None
    assert known.confirm(opt.param_groups) is not None
    set_gradients(module, CASE, 2)
    known.measure_ahead(opt, None)
    assert known.refresh(opt)
    assert known.moving[0] == [p.grad.data_ptr() for p in known._params]


@pytest.mark.parametrize("changing", ["scaling", "eps", "lr", "alternate", "gradients"])
def test_what_changes_behind_the_first_launch_is_taken_over(changing, monkeypatch):
    """`gram` is launched before scalings and options are read; the rest must not see old ones."""
    monkeypatch.setattr(backends, "choose", lambda backend, pairs: ("triton", ""))
    case = Case("behind", shapes=((33, 45),), ranks=(4,))
    ends = []
    for known in (True, False):
        module, opt = build(case, "ieee")
        for step in range(4):
            set_gradients(module, case, step)
            group = opt.param_groups[0]
            if step == 2 and changing == "scaling":
                module[0].scaling = 2.0
            elif step == 2 and changing == "gradients":
                module[0].lora_A.grad = module[0].lora_A.grad.T.contiguous().T
            elif step == 2:
                group[changing] = {"eps": 1e-3, "lr": 0.1, "alternate": False}[changing]
            if not known:
                opt._gathered = None
            opt.step()
        ends.append([p.detach().clone() for p in module.parameters()])
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q)


def test_table_on_the_device_is_never_written_again():
    table = AddressTable(torch.arange(72).reshape(4, 18), torch.device("cpu"))
    moving = ([1, 2, 3, 4], [(5, 6)] * 4, [1.0, 2.0])
    first = table.enter(moving)
    assert first[:, GRAD.value].tolist() == [1, 2, 3, 4]
    assert first[:2, GRAD.value + 1 : GRAD.value + 3].tolist() == [[5, 6], [6, 5]]
    assert first[:, SCALING.value].view(torch.float64).tolist() == [1.0, 1.0, 2.0, 2.0]
    kept = first.clone()
    assert table.enter(([1, 2, 3, 4], [(5, 6)] * 4, [1.0, 2.0])) is first
    for other in (([9, 2, 3, 4], *moving[1:]), (moving[0], [()] * 4, moving[2]), moving):
        later = table.enter(other)
        assert later is not first
        assert torch.equal(first, kept)
    assert torch.equal(later, first)


class Compiled(CompiledKernel):
    """A compiled kernel that notes how it is run."""

    function, packed_metadata, module = 77, (4, 1, 0), None

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @property
    def run(self):
        return lambda *arguments: self.calls.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append(("runner", grid, *arguments))


class Kernel:
    """A jit function of two arguments that is compiled at once."""

    arg_names = ("x_ptr", "n")

    def __init__(self) -> None:
        self.compiled, self.first = Compiled(), {}

    def __getitem__(self, grid):
        def compile_and_run(**named):
            self.first = named
            return self.compiled

        return compile_and_run


@pytest.fixture
def stream(monkeypatch) -> int:
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda d: 100 + d)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    return 103


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0+git", "9.0.0"])
@pytest.mark.parametrize("hook", [None, "launch_enter_hook", "launch_exit_hook"])
def test_compiled_kernels_are_run_directly_unless_somebody_listens(
    stream, version, hook, monkeypatch
):
    monkeypatch.setattr(launching.triton, "__version__", version)
    kernel, launch, x = Kernel(), Launcher(), torch.zeros(2)
    described = Launch(kernel, 7, {}, {"n": 5})
    launch("name", {"x_ptr": x}, lambda: described)
    if hook is not None:
        chain = knobs.HookChain()
        chain.add(lambda metadata: None)
        monkeypatch.setattr(knobs.runtime, hook, chain)
    launch("name", {"x_ptr": x}, lambda: pytest.fail("described again"))
    direct = (7, 1, 1, stream, 77, (4, 1, 0), None, None, None, x.data_ptr(), 5)
    through_runner = ("runner", (7, 1, 1), x.data_ptr(), 5)
    expected = through_runner if hook or version == "9.0.0" else direct
    assert kernel.compiled.calls == [expected]


def test_descriptors_are_kept_without_what_they_describe(stream):
    def describe(tensor, block):
        return SimpleNamespace(base=tensor, shape=tensor.shape, block=block)

    kernel, launch, x = Kernel(), Launcher(), torch.zeros(2, 3)
    described, watched = Launch(kernel, 7, {}, {"n": 5}), weakref.ref(x)
    launch("name", {"x_ptr": Tiles(x, (1, 2), describe)}, lambda: described)
    assert kernel.first["x_ptr"].base is x
    kernel.first.clear()
    del x
    gc.collect()
    assert watched() is None, "workspace of the first launch is kept alive"
    seen = []
    for _ in range(2):
        y = torch.zeros(2, 3)
        launch("name", {"x_ptr": Tiles(y, (1, 2), pytest.fail)}, lambda: described)
        descriptor = kernel.compiled.calls[-1][-2]
        assert (descriptor.base.data_ptr(), descriptor.base) == (y.data_ptr(), y.data_ptr())
        assert (descriptor.shape, descriptor.block) == ((2, 3), (1, 2))
        seen.append(weakref.ref(y))
    del y
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_tiles_of_both_sides_take_turns_and_are_all_there():
    """`moments_hopper` took 23.7 ms a step with those of one side first, and takes 21.0."""
    shapes = [(300, 100), (500, 1000)]
    tiles = workspace(shapes, 64, 128, shared=True, residuals=True).tiles
    padded = [(384, 128), (512, 1024)]
    assert sorted(map(tuple, tiles.tolist())) == sorted(
        (2 * k + side, start, kind)
        for k, sizes in enumerate(padded)
        for side in (0, 1)
        for kind, rows in ((0, sizes[side]), (1, sizes[1 - side]))
        for start in range(0, rows, 64)
    )
    side = tiles[:, 0] % 2
    for some in (8, 16, 32):
        assert abs(side[:some].float().mean() - side.float().mean()) <= 1 / some
