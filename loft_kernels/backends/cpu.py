"""The step in C++ on the CPU: one operator call before the decision and one after, for all pairs.

The sources are in ``csrc/cpu``; each sum and product stands there under the same step title as in
``reference.py``. The extension is found beside this package and loaded when the backend is first
asked for; nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loft_kernels.measured import HostNumbers, PreparedPair, read_numbers
from loft_kernels.plan import Factor, Pair
from loft_kernels.state import HALF_DTYPES

_FOLDER = Path(__file__).parent.parent
_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
_NOTHING = torch.empty(0)


@cache
def missing() -> str | None:
    """Say why this backend cannot run here, or None if it can; loads the extension."""
    found = sorted(_FOLDER.glob("_native*.so")) + sorted(_FOLDER.glob("_native*.pyd"))
    if not found:
        return "the package was built without its C++ extension (README, Install)"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        # dlopen's message stands in the first line; the rest repeats it.
        return f"{found[0].name} does not load into torch {torch.__version__}: {error}".split("\n")[
            0
        ]
    for name in ("prepare_", "apply_"):
        torch.library.register_fake(f"loft_kernels::{name}", partial(_fake, name))
    return None


def _fake(operator: str, *arguments: Any) -> None:
    """Stand in for an operator without data: both return nothing and allocate nothing.

    Raises:
        RuntimeError: only some of the tensors are without data; names the first.
    """
    schema = getattr(torch.ops.loft_kernels, operator).default._schema
    names = [argument.name for argument in schema.arguments]
    tensors = {}
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Sequence):
            tensors |= {f"{name}[{i}]": t for i, t in enumerate(value)}
    absent = [name for name, t in tensors.items() if t.is_meta]
    if absent and len(absent) < len(tensors):
        raise RuntimeError(f"loft_kernels: {absent[0]} must be on the CPU, but is on meta")


def about() -> str:
    """Describe what was loaded."""
    capability = torch.ops.loft_kernels.cpu_capability()
    return f"C++ for fp64, fp32, bf16 and fp16 factors on the CPU, {capability} instructions"


def unsupported(pair: Pair) -> str | None:
    """Say what about a pair the kernels do not serve, or None."""
    for factor in (pair.b, pair.a):
        if factor.param.device.type != "cpu":
            return f"{factor.name} is on {factor.param.device}"
        if factor.param.dtype not in _DTYPES:
            return f"{factor.name} is {factor.param.dtype}"
    if pair.options.second_moment != "full":
        return "the diagonal second moment"
    if not pair.options.calibrate:
        return "calibrate=False"
    return None


@dataclass(slots=True)
class CpuSide:
    """One factor of a pair between the two calls.

    Attributes:
        factor: the factor and its state.
        host: numbers that the host decides on.
    """

    factor: Factor
    host: HostNumbers = field(default_factory=HostNumbers)


class CpuStep:
    """One step of all pairs; the counterpart of ``functional.prepare`` and ``apply_``.

    Attributes:
        transforms: per factor three r x r matrices in fp64, which :meth:`prepare` fills.
    """

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._factors: list[Factor] = []
        self._grads: list[Tensor] = []
        self._settings: list[list[float]] = []
        self.transforms = _NOTHING

    def prepare(
        self, pairs: Sequence[Pair], extra: Sequence[Tensor]
    ) -> tuple[list[PreparedPair[CpuSide]], list[float]]:
        """Measure all pairs; see :func:`loft_kernels.functional.prepare`."""
        self._factors = [f for pair in pairs for f in (pair.b, pair.a)]
        self._grads = [_NOTHING if f.grad is None else f.grad for f in self._factors]
        self._settings = [_settings(pair, f) for pair in pairs for f in (pair.b, pair.a)]
        size = sum(6 * pair.a.param.shape[0] ** 2 for pair in pairs)
        self.transforms = torch.empty(size, dtype=torch.float64)
        numbers = torch.empty(len(self._factors), 2, dtype=torch.float64)
        torch.ops.loft_kernels.prepare_(
            [f.param for f in self._factors],
            self._grads,
            self._entries("step", _ZERO),
            torch.tensor(self._settings, dtype=torch.float64).reshape(-1, _COLUMNS),
            self.transforms,
            numbers,
        )
        measured = iter(numbers.tolist())
        prepared = [
            PreparedPair(pair, [_side(f, next(measured)) for f in (pair.b, pair.a)])
            for pair in pairs
        ]
        for entry in prepared:
            entry.sides = [side for side in entry.sides if side.factor.grad is not None]
        return prepared, read_numbers(extra)

    def apply_(self, prepared: Sequence[PreparedPair[CpuSide]], coefficient: float) -> None:
        """Advance the state of all pairs and move their factors, in place."""
        moving = {
            id(side.factor)
            for entry in prepared
            for side, moves in zip(entry.sides, entry.moves(), strict=True)
            if moves
        }
        for row, factor in zip(self._settings, self._factors, strict=True):
            row[-1] = float(id(factor) in moving)
        params = [f.param for f in self._factors]
        torch.ops.loft_kernels.apply_(
            params,
            self._grads,
            self._entries("step"),
            self._entries("guard"),
            self._entries("exp_avg"),
            self._entries("second_moment"),
            self._entries("partner_basis"),
            [
                f.state["master"]
                if f.grad is not None and f.param.dtype in HALF_DTYPES
                else _NOTHING
                for f in self._factors
            ],
            torch.tensor(self._settings, dtype=torch.float64).reshape(-1, _COLUMNS),
            self.transforms,
            coefficient,
        )
        torch.autograd.graph.increment_version(params)

    def _entries(self, key: str, default: Tensor = _NOTHING) -> list[Tensor]:
        """Collect one state entry of every factor; those without a gradient have no part."""
        return [default if f.grad is None else f.state.get(key, default) for f in self._factors]


# Without state no step has been taken.
_ZERO = torch.zeros((), dtype=torch.int64)
_COLUMNS = 9


def _settings(pair: Pair, factor: Factor) -> list[float]:
    """List a factor's numbers in the order of ``Setting`` in ``csrc/cpu/ops.cpp``."""
    options = pair.options
    return [
        pair.scaling,
        options.damping,
        float(factor.lr),
        options.weight_decay,
        options.beta1,
        options.beta2,
        options.eps,
        -1.0 if options.maximize else 1.0,
        0.0,  # whether it moves, which is not known before the decision
    ]


def _side(factor: Factor, numbers: list[float]) -> CpuSide:
    """Wrap what was measured of one factor; its guard stays with the kernels."""
    count, norm_sq = numbers
    return CpuSide(factor, HostNumbers(int(count), norm_sq=norm_sq, stored_sq=norm_sq))
