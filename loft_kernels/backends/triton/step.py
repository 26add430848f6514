"""Launch one LoFT step of all pairs: five launches a bucket, no host synchronisation.

A bucket holds the pairs that one set of launches can serve: one device, parameter dtype, rank and
set of options. Phase, counts, clip coefficient and the skip flag are read and written on the
device only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.basis import _basis_kernel
from loft_kernels.backends.triton.gram import _gram_kernel
from loft_kernels.backends.triton.moments import _moments_kernel
from loft_kernels.backends.triton.solve import _solve_kernel
from loft_kernels.backends.triton.update import _residual_kernel, _update_kernel
from loft_kernels.plan import Pair

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Share of the optimizer state that the workspace of residuals may take.
_RESIDUAL_PARTS = 2


def unsupported(pair: Pair) -> str | None:
    """Say why these kernels cannot serve a pair, or None if they can."""
    options = pair.options
    if options.second_moment != "full" or not options.calibrate:
        return "second_moment='diagonal' and calibrate=False are ablations of the reference path"
    if pair.a.param.shape[0] > configs.MAX_RANK:
        return f"rank {pair.a.param.shape[0]} is above {configs.MAX_RANK}"
    if pair.b.param.dtype not in _DTYPES or pair.a.param.dtype != pair.b.param.dtype:
        return f"parameters are {pair.b.param.dtype} and {pair.a.param.dtype}"
    return None


@dataclass(slots=True)
class Decision:
    """What the device decided, still on the device.

    Attributes:
        values: fp64 (skip, coefficient, norm).
    """

    values: Tensor

    @property
    def skip(self) -> Tensor:
        """1 if the step is skipped whole, fp32 as torch's fused optimizers take it."""
        return self.values[tables.SKIP.value : tables.SKIP.value + 1].float()

    @property
    def coefficient(self) -> Tensor:
        """What every gradient is multiplied by."""
        return self.values[tables.COEFFICIENT.value]


class LaunchPlan:
    """Everything about the launches that only changes when shapes or addresses do.

    Args:
        device: the device of all pairs.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing cached."""
        self.device = device
        self._tiles: dict[tuple, tuple] = {}
        self._uploaded: dict[tuple, tuple[Tensor, Tensor]] = {}

    def step(
        self,
        pairs: Sequence[Pair],
        outside: Tensor,
        skipped: Tensor,
        *,
        max_norm: float | None,
        exact: bool,
    ) -> Decision:
        """Take the step of all pairs.

        Args:
            pairs: checked pairs with allocated state; changed in place.
            outside: fp64 (squared norm of all other gradients, gradient scale, found_inf).
            skipped: int64 counter of skipped steps; changed in place.
            max_norm: largest norm of all projected gradients, or None.
            exact: no product of reduced precision.
        """
        buckets: dict[tuple, list[Pair]] = {}
        for pair in pairs:
            grads = [f.grad.dtype for f in (pair.b, pair.a) if f.grad is not None]
            key = (pair.a.param.shape[0], pair.b.param.dtype, grads[0], pair.options)
            # A tensor learning rate is identified by its address, a number by its value.
            rates = (_rate_key(pair.b.lr), _rate_key(pair.a.lr))
            buckets.setdefault((*key, *rates), []).append(pair)
        numbers = torch.zeros(
            (2 * len(pairs), tables.NUMBERS.value), dtype=torch.float64, device=self.device
        )
        decision = Decision(torch.zeros(3, dtype=torch.float64, device=self.device))
        launches, first = [], 0
        on_device: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.device.type == "cuda":
            on_device = torch.cuda.device(self.device)
        with on_device:
            for key, members in buckets.items():
                launch = _BucketLaunch(self, key, members, max_norm, exact)
                launch.numbers = numbers[first : first + 2 * len(members)]
                first += 2 * len(members)
                launch.measure()
                launches.append(launch)
            for index, launch in enumerate(launches):
                launch.decide(numbers, decision.values, outside, skipped, count_skips=index == 0)
                launch.write(decision.values)
        return decision

    def outside(
        self, plain_grads: Sequence[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """Collect what the decision needs beside the pairs.

        Args:
            plain_grads: gradients of all other parameters.
            grad_scale: GradScaler's scale, or None.
            found_inf: GradScaler's flag, or None.

        Returns:
            fp64 (squared norm of the plain gradients, scale, found_inf).
        """
        nothing = self.upload(("outside",), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
        if not plain_grads and grad_scale is None and found_inf is None:
            return nothing
        outside = nothing.clone()
        if plain_grads:
            norms = torch._foreach_norm(list(plain_grads), 2, torch.float64)
            outside[0] = torch.stack([n.to(self.device) for n in norms]).square().sum()
        for index, value in ((1, grad_scale), (2, found_inf)):
            if value is not None:
                outside[index] = value.reshape(()).to(self.device)
        return outside

    def tiles(self, key: tuple, members: Sequence[Pair]) -> tuple:
        """Return the tile lists of a bucket, built when its shapes change."""
        shapes = tuple((p.b.param.shape[0], p.a.param.shape[1]) for p in members)
        cached = self._tiles.get(key)
        if cached is None or cached[0] != shapes:
            rank = key[0]
            parts = 1 if configs.resident(rank) else _RESIDUAL_PARTS
            block = configs.update_tile(self._capability(), rank).block_m
            size = -(-len(members) // parts)
            update, rows_of, residual_rows = [], [], 0
            for start in range(0, len(members), size):
                part = members[start : start + size]
                offsets = [0]
                for m, n in shapes[start : start + size]:
                    offsets.append(offsets[-1] + max(m, n))
                rows_of += offsets[:-1]
                residual_rows = max(residual_rows, offsets[-1])
                tiles = tables.row_tiles(part, block, heaviest_first=True)
                tiles[:, 0] += 2 * start
                update.append(tiles.to(self.device))
            self._tiles[key] = cached = (
                shapes,
                tables.row_tiles(members, configs.CHUNK_ROWS).to(self.device),
                tables.row_tiles(members, configs.moment_rows(rank)).to(self.device),
                update,
                rows_of,
                residual_rows,
            )
        return cached[1:]

    def upload(self, key: tuple, host: Tensor) -> Tensor:
        """Return a device copy of a host tensor, made anew only when its content changed."""
        cached = self._uploaded.get(key)
        if cached is not None and torch.equal(cached[0], host):
            return cached[1]
        source = host.pin_memory() if self.device.type == "cuda" else host
        copy = source.to(self.device, non_blocking=True)
        self._uploaded[key] = (host, copy)
        return copy

    def _capability(self) -> int:
        """Return the major compute capability, 0 where there is no GPU (the interpreter)."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.get_device_capability(self.device)[0]


class _BucketLaunch:
    """The launches of one bucket at one step."""

    numbers: Tensor

    def __init__(
        self,
        plan: LaunchPlan,
        key: tuple,
        pairs: Sequence[Pair],
        max_norm: float | None,
        exact: bool,
    ) -> None:
        """Prepare tables and workspace."""
        self.rank, self.param_dtype, self.grad_dtype, self.options = key[:4]
        self.width = configs.padded_rank(self.rank)
        self.exact = exact
        self.device = plan.device
        row_tiles, moment_tiles, update_tiles, rows_of, residual_rows = plan.tiles(key, pairs)
        self.row_tiles, self.moment_tiles, self.update_tiles = row_tiles, moment_tiles, update_tiles
        self.residual_rows = residual_rows
        self.tile = configs.update_tile(plan._capability(), self.rank)
        self.sides = 2 * len(pairs)
        table = tables.address_rows(pairs, configs.CHUNK_ROWS, rows_of)
        self.table = plan.upload(("table", key), table)
        self.hyper = self._hyper(plan, key, pairs[0], max_norm)
        square = (self.sides, self.width, self.width)
        empty = torch.empty
        self.partial = empty(
            (len(row_tiles), 3, self.width, self.width), dtype=torch.float64, device=self.device
        )
        self.inverse = empty(square, dtype=torch.float64, device=self.device)
        self.change = empty(square, dtype=torch.float32, device=self.device)
        self.changed = torch.zeros(self.sides, dtype=torch.int32, device=self.device)

    def _hyper(self, plan: LaunchPlan, key: tuple, pair: Pair, max_norm: float | None) -> Tensor:
        """Bring the hyper-parameters to the device; a tensor learning rate never leaves it."""
        options = pair.options
        rates = [0.0 if isinstance(f.lr, Tensor) else _fp32(f.lr) for f in (pair.b, pair.a)]
        limit = math.inf if max_norm is None else max_norm
        sign = -1.0 if options.maximize else 1.0
        values = [*rates, options.beta1, options.beta2, options.eps, options.weight_decay]
        host = torch.tensor([*values, limit, sign, options.damping], dtype=torch.float64)
        hyper = plan.upload(("hyper", key), host)
        for index, factor in enumerate((pair.b, pair.a)):
            if isinstance(factor.lr, Tensor):
                hyper[index].copy_(factor.lr.reshape(()).float())
        return hyper

    def measure(self) -> None:
        """Gram products, then per side the inverse, the transition and the norm."""
        _gram_kernel[(len(self.row_tiles),)](
            table_ptr=self.table,
            tiles_ptr=self.row_tiles,
            partial_ptr=self.partial,
            rank=self.rank,
            CHUNK=configs.CHUNK_ROWS,
            BLOCK_N=32,
            R=self.width,
            PARAM_DTYPE=_DTYPES[self.param_dtype],
            GRAD_DTYPE=_DTYPES[self.grad_dtype],
            num_warps=4,
        )
        _solve_kernel[(self.sides,)](
            table_ptr=self.table,
            partial_ptr=self.partial,
            hyper_ptr=self.hyper,
            inverse_ptr=self.inverse,
            change_ptr=self.change,
            numbers_ptr=self.numbers,
            rank=self.rank,
            R=self.width,
            ALTERNATE=self.options.alternate,
            num_warps=4 if self.width <= 32 else 8,
        )

    def decide(
        self,
        all_numbers: Tensor,
        decision: Tensor,
        outside: Tensor,
        skipped: Tensor,
        *,
        count_skips: bool,
    ) -> None:
        """Take the decision of the step and replace the bases."""
        _basis_kernel[(len(self.row_tiles),)](
            table_ptr=self.table,
            tiles_ptr=self.row_tiles,
            hyper_ptr=self.hyper,
            outside_ptr=outside,
            inverse_ptr=self.inverse,
            numbers_ptr=self.numbers,
            all_numbers_ptr=all_numbers,
            all_sides=len(all_numbers),
            decision_ptr=decision,
            skipped_ptr=skipped,
            changed_ptr=self.changed,
            rank=self.rank,
            CHUNK=configs.CHUNK_ROWS,
            BLOCK_N=32,
            R=self.width,
            SIDES=triton.next_power_of_2(len(all_numbers)),
            COUNT_SKIPS=count_skips,
            PARAM_DTYPE=_DTYPES[self.param_dtype],
            num_warps=4,
        )

    def write(self, decision: Tensor) -> None:
        """Advance the moments and move the factors."""
        _moments_kernel[(len(self.moment_tiles),)](
            table_ptr=self.table,
            tiles_ptr=self.moment_tiles,
            hyper_ptr=self.hyper,
            decision_ptr=decision,
            inverse_ptr=self.inverse,
            change_ptr=self.change,
            changed_ptr=self.changed,
            rank=self.rank,
            BLOCK_M=configs.moment_rows(self.rank),
            R=self.width,
            GRAD_DTYPE=_DTYPES[self.grad_dtype],
            PRECISION="ieee" if self.exact else "tf32x3",
            num_warps=4 if self.width <= 64 else 8,
        )
        blocks = configs.eighths(self.rank)
        resident = configs.resident(self.rank)
        dtype = torch.float32 if self.exact else torch.float16
        slices = 0 if resident else blocks * (blocks + 1) // 2
        residual = torch.empty((slices, self.residual_rows, 64), dtype=dtype, device=self.device)
        centre = torch.empty(
            (0 if resident else self.residual_rows, 2), dtype=torch.float32, device=self.device
        )
        for tiles in self.update_tiles:
            common = {
                "table_ptr": self.table,
                "tiles_ptr": tiles,
                "decision_ptr": decision,
                "numbers_ptr": self.numbers,
                "residual_ptr": residual,
                "centre_ptr": centre,
                "residual_rows": self.residual_rows,
                "rank": self.rank,
                "BLOCK_M": self.tile.block_m,
                "NB": blocks,
                "num_warps": self.tile.warps,
            }
            if not resident:
                _residual_kernel[(len(tiles),)](
                    **common, DTYPE=tl.float32 if self.exact else tl.float16
                )
            _update_kernel[(len(tiles),)](
                **common,
                hyper_ptr=self.hyper,
                inverse_ptr=self.inverse,
                BLOCK_N=self.tile.block_n,
                R=self.width,
                RESIDENT=resident,
                HAS_MASTER=self.param_dtype != torch.float32,
                PARAM_DTYPE=_DTYPES[self.param_dtype],
                EXACT=self.exact,
                ASM=self.device.type == "cuda",
                num_stages=self.tile.stages,
            )


def _rate_key(lr: float | Tensor) -> float | tuple[str, int]:
    """Identify a learning rate among the buckets of one step."""
    return ("tensor", lr.data_ptr()) if isinstance(lr, Tensor) else 0.0


def _fp32(value: float) -> float:
    """Round to fp32, as the reference path does for fp32 state."""
    return torch.tensor(value, dtype=torch.float32).item()
