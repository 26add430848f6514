"""Launch one LoFT step of all pairs: five launches a bucket, no host synchronisation.

A bucket holds the pairs that one set of launches can serve: one device, parameter dtype, rank and
set of options. Phase, counts, clip coefficient and the skip flag are read and written on the
device only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.basis import _basis_kernel
from loft_kernels.backends.triton.gram import _gram_kernel
from loft_kernels.backends.triton.moments import _moments_kernel
from loft_kernels.backends.triton.operands import _operands_kernel
from loft_kernels.backends.triton.packing import packing, pair_table
from loft_kernels.backends.triton.solve import _solve_kernel
from loft_kernels.backends.triton.update import _update_kernel
from loft_kernels.backends.triton.update_hopper import _update_hopper_kernel, hopper_descriptor
from loft_kernels.backends.triton.update_hopper_wide import _update_hopper_wide_kernel
from loft_kernels.plan import Pair

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# The operands of half the pairs are in memory at one time; more parts are more launches.
_PARTS = 2


def unsupported(pair: Pair) -> str | None:
    """Say why these kernels cannot serve a pair, or None if they can."""
    options = pair.options
    if options.second_moment != "full" or not options.calibrate:
        return "second_moment='diagonal' and calibrate=False are ablations of the reference path"
    if pair.a.param.shape[0] > configs.MAX_RANK:
        return f"rank {pair.a.param.shape[0]} is above {configs.MAX_RANK}"
    grads = {f.grad.dtype for f in (pair.b, pair.a) if f.grad is not None}
    kinds = {pair.b.param.dtype, pair.a.param.dtype}
    if len(kinds) > 1 or len(grads) > 1 or not (kinds | grads) <= _DTYPES.keys():
        return f"parameters are {kinds} and gradients {grads}"
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
        return self.values[tables.SKIP.value].float()

    @property
    def coefficient(self) -> Tensor:
        """What every gradient is multiplied by."""
        return self.values[tables.COEFFICIENT.value]


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs whose operands share the workspace at one time.

    Attributes:
        operand_tiles: (side, first row, kind), see ``tables.Workspace``.
        update_tiles: (side, first row).
        partner_rows: rows of the workspace of partners' operands.
        residual_rows: rows of the workspace of residuals.
    """

    operand_tiles: Tensor
    update_tiles: Tensor
    partner_rows: int
    residual_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Tiles and workspace of a bucket.

    Attributes:
        row_tiles: tiles of `gram` and `basis`.
        moment_tiles: tiles of `moments`.
        places: workspace rows of every side.
        parts: what `operands` and `update` serve one after the other.
        tile: tile of the hot loop.
    """

    row_tiles: Tensor
    moment_tiles: Tensor
    places: list[tuple[int, int]]
    parts: list[Part]
    tile: configs.UpdateTile


class LaunchPlan:
    """Everything about the launches that only changes when shapes or addresses do.

    Args:
        device: the device of all pairs.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing cached."""
        self.device = device
        # The major compute capability, 0 where there is no GPU (the interpreter).
        cuda = device.type == "cuda"
        self.capability = torch.cuda.get_device_capability(device)[0] if cuda else 0
        self._pairs: Sequence[Pair] | None = None
        self._turns: list[bool] = []
        self._buckets: dict[tuple, list[Pair]] = {}
        self._tables: dict[tuple, tuple[tuple, Tensor, Tensor]] = {}
        self._layouts: dict[tuple, tuple[tuple, Layout]] = {}
        self._uploaded: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._constants: dict[tuple, Tensor] = {}

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
        # Turning alternation on or off changes which sides may share the workspace.
        turns = [pair.options.alternate for pair in pairs]
        known = pairs is self._pairs and turns == self._turns
        if not known:
            self._pairs, self._turns, self._buckets = pairs, turns, _buckets(pairs)
        numbers = torch.zeros(
            (2 * len(pairs), tables.NUMBERS.value), dtype=torch.float64, device=self.device
        )
        decision = Decision(torch.zeros(3, dtype=torch.float64, device=self.device))
        launches, first = [], 0
        on_device: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.device.type == "cuda":
            on_device = torch.cuda.device(self.device)
        with on_device:
            for key, members in self._buckets.items():
                launch = _BucketLaunch(self, key, members, max_norm, exact, known=known)
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

    def table(self, key: tuple, members: Sequence[Pair], layout: Layout, *, known: bool) -> Tensor:
        """Return the address table of a bucket on the device.

        Args:
            key: the bucket.
            members: its pairs.
            layout: its workspace.
            known: nothing but gradients and scalings can have changed since the last step.
        """
        moving = tables.moving_entries(members)
        cached = self._tables.get(key)
        if known and cached is not None:
            if cached[0] == moving:
                return cached[2]
            host = tables.with_moving_entries(cached[1], moving)
        else:
            host = tables.address_rows(members, configs.CHUNK_ROWS, layout.places)
        table = self._to_device(host)
        self._tables[key] = (moving, host, table)
        return table

    def constant(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that never changes, made and brought to the device once."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]

    def layout(
        self, key: tuple, members: Sequence[Pair], alternate: bool, hopper: bool, *, known: bool
    ) -> Layout:
        """Return the tiles and workspace of a bucket, built anew when its pairs change."""
        key = (*key, hopper)
        if known and key in self._layouts:
            return self._layouts[key][1]
        signature = (
            alternate,
            *(
                (*p.b.param.shape, *p.a.param.shape, p.b.grad is None, p.a.grad is None)
                for p in members
            ),
        )
        cached = self._layouts.get(key)
        if cached is None or cached[0] != signature:
            cached = (signature, self._new_layout(key[0], members, alternate, hopper))
            self._layouts[key] = cached
        return cached[1]

    def _new_layout(
        self, rank: int, members: Sequence[Pair], alternate: bool, hopper: bool
    ) -> Layout:
        """Lay out tiles and workspace; reads the step counts once, the only synchronisation."""
        shapes = [(p.b.param.shape[0], p.a.param.shape[1]) for p in members]
        both = all(p.b.grad is not None and p.a.grad is not None for p in members)
        shared = alternate and both and len(_phases(members)) == 1
        tile = configs.hopper_tile(rank) if hopper else configs.update_tile(self.capability, rank)
        size = -(-len(members) // _PARTS)
        places: list[tuple[int, int]] = []
        parts = []
        for start in range(0, len(members), size):
            part = slice(start, start + size)
            space = tables.workspace(
                shapes[part],
                configs.OPERAND_ROWS,
                configs.PADDED_ROWS,
                shared=shared,
                residuals=not configs.resident(rank),
            )
            places += space.places
            update = tables.row_tiles(members[part], tile.block_m, heaviest_first=True)
            for tiles in (space.tiles, update):
                tiles[:, 0] += 2 * start
            parts.append(
                Part(
                    space.tiles.to(self.device),
                    update.to(self.device),
                    space.partner_rows,
                    space.residual_rows,
                )
            )
        return Layout(
            tables.row_tiles(members, configs.CHUNK_ROWS).to(self.device),
            tables.row_tiles(members, configs.moment_tile(rank).chunk).to(self.device),
            places,
            parts,
            tile,
        )

    def upload(self, key: tuple, host: Tensor) -> Tensor:
        """Return a device copy of a host tensor, made anew only when its content changed."""
        cached = self._uploaded.get(key)
        if cached is not None and torch.equal(cached[0], host):
            return cached[1]
        copy = self._to_device(host)
        self._uploaded[key] = (host, copy)
        return copy

    def _to_device(self, host: Tensor) -> Tensor:
        """Copy to the device without waiting for it."""
        source = host.pin_memory() if self.device.type == "cuda" else host.clone()
        return source.to(self.device, non_blocking=True)


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
        *,
        known: bool,
    ) -> None:
        """Prepare tables and workspace."""
        self.rank, self.param_dtype, self.grad_dtype = key[:3]
        self.options = pairs[0].options
        self.width = configs.padded_rank(self.rank)
        self.exact = exact
        self.device = plan.device
        self.hopper = plan.capability == 9 and not exact
        self.packing = packing(self.rank)
        self.pair_table = plan.constant(("pairs", self.rank), partial(pair_table, self.rank))
        self.layout = plan.layout(key, pairs, self.options.alternate, self.hopper, known=known)
        self.sides = 2 * len(pairs)
        self.table = plan.table(key, pairs, self.layout, known=known)
        self.hyper = self._hyper(plan, key, pairs[0], max_norm)
        square = (self.sides, self.width, self.width)
        empty = torch.empty
        self.partial = empty(
            (len(self.layout.row_tiles), 3, self.width, self.width),
            dtype=torch.float64,
            device=self.device,
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
        _gram_kernel[(len(self.layout.row_tiles),)](
            table_ptr=self.table,
            tiles_ptr=self.layout.row_tiles,
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
        _basis_kernel[(len(self.layout.row_tiles),)](
            table_ptr=self.table,
            tiles_ptr=self.layout.row_tiles,
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
        tile = configs.moment_tile(self.rank)
        _moments_kernel[(len(self.layout.moment_tiles),)](
            table_ptr=self.table,
            tiles_ptr=self.layout.moment_tiles,
            hyper_ptr=self.hyper,
            decision_ptr=decision,
            inverse_ptr=self.inverse,
            change_ptr=self.change,
            changed_ptr=self.changed,
            RANK=self.rank,
            R=self.width,
            CHUNK=tile.chunk,
            BLOCK_M=tile.rows,
            GROUP=tile.group,
            IDLE=tile.idle,
            COLUMNS_P=tile.columns,
            GRAD_DTYPE=_DTYPES[self.grad_dtype],
            EXACT=self.exact,
            num_warps=tile.warps,
            maxnreg=tile.registers if self.device.type == "cuda" else None,
        )
        for part in self.layout.parts:
            self._move(part, decision)

    def _move(self, part: Part, decision: Tensor) -> None:
        """Write the operands of some pairs and move their factors."""
        columns, tile = self.packing, self.layout.tile
        resident = configs.resident(self.rank)
        empty = partial(
            torch.empty,
            dtype=torch.float32 if self.exact else torch.float16,
            device=self.device,
        )
        partner = empty((part.partner_rows, columns.width))
        # A descriptor needs an address even where nothing is behind it.
        residual = empty((max(1, part.residual_rows), columns.products))
        centre = torch.empty((part.residual_rows, 2), dtype=torch.float32, device=self.device)
        common = {
            "table_ptr": self.table,
            "decision_ptr": decision,
            "numbers_ptr": self.numbers,
            "rank": self.rank,
            "R": self.width,
        }
        _operands_kernel[(len(part.operand_tiles),)](
            **common,
            tiles_ptr=part.operand_tiles,
            partner_ptr=partner,
            residual_ptr=residual,
            centre_ptr=centre,
            BLOCK=configs.OPERAND_ROWS,
            PRODUCTS=columns.products,
            WIDTH=columns.width,
            SPLIT=columns.split,
            N=configs.narrow_rank(self.rank),
            DTYPE=tl.float32 if self.exact else tl.float16,
            num_warps=4,
        )
        describe = hopper_descriptor if self.hopper else TensorDescriptor.from_tensor
        columns_of = {"main": columns.main, "tail": columns.tail or 16, "halves": self.width}
        tiles = {k: describe(partner, [tile.block_n, v]) for k, v in columns_of.items()}
        if not resident or not self.hopper:
            for name in ("main", "tail"):
                block = [tile.block_m, columns_of[name]]
                tiles[f"residual_{name}"] = describe(residual, block)
            tiles["centre_ptr"] = centre
        common |= {
            **tiles,
            "tiles_ptr": part.update_tiles,
            "hyper_ptr": self.hyper,
            "inverse_ptr": self.inverse,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "TAIL": columns.tail,
            "HAS_MASTER": self.param_dtype != torch.float32,
            "PARAM_DTYPE": _DTYPES[self.param_dtype],
            "num_warps": tile.warps,
            "maxnreg": tile.registers if self.device.type == "cuda" else None,
        }
        grid = (len(part.update_tiles),)
        if self.hopper and resident:
            _update_hopper_kernel[grid](
                **common,
                pairs_ptr=self.pair_table,
                MAIN=columns.main,
                SPLIT=columns.split,
                STAGES=tile.stages,
            )
        elif self.hopper:
            _update_hopper_wide_kernel[grid](
                **common,
                BLOCKS=columns.blocks,
                STAGES=tile.stages,
                RESIDENT=configs.residual_held(self.rank),
            )
        else:
            _update_kernel[grid](
                **common,
                pairs_ptr=self.pair_table,
                MAIN=columns.main,
                BLOCKS=columns.blocks,
                SPLIT=columns.split,
                RESIDENT=resident,
                EXACT=self.exact,
                ASM=self.device.type == "cuda",
                num_stages=tile.stages,
            )


def _phases(pairs: Sequence[Pair]) -> set[int]:
    """Return the phases that some pairs are in, read from the device."""
    steps = [
        torch.stack([f.state["step"] for f in (p.b, p.a) if "step" in f.state]).max() for p in pairs
    ]
    return {int(step) % 2 for step in torch.stack(steps).tolist()}


def _buckets(pairs: Sequence[Pair]) -> dict[tuple, list[Pair]]:
    """Sort pairs by what one set of launches can serve; options and rates belong to the groups."""
    buckets: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        grads = [f.grad.dtype for f in (pair.b, pair.a) if f.grad is not None]
        key = (pair.a.param.shape[0], pair.b.param.dtype, grads[0], pair.b.group, pair.a.group)
        buckets.setdefault(key, []).append(pair)
    return buckets


def _fp32(value: float) -> float:
    """Round to fp32, as the reference path does for fp32 state."""
    return torch.tensor(value, dtype=torch.float32).item()
