"""The launches of a bucket: pairs of one device, parameter dtype, rank and set of options."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.basis import _basis_kernel
from loft_kernels.backends.triton.gram import _gram_kernel
from loft_kernels.backends.triton.gram_wide import _gram_wide_kernel
from loft_kernels.backends.triton.launch import Launch, Launcher, Tiles
from loft_kernels.backends.triton.layout import Part
from loft_kernels.backends.triton.moments import _moments_kernel
from loft_kernels.backends.triton.moments_hopper import (
    REGISTERS,
    ROWS_OF_TILE,
    _moments_hopper_kernel,
)
from loft_kernels.backends.triton.operands import _operands_kernel
from loft_kernels.backends.triton.packing import packing, pair_table, selection, weights
from loft_kernels.backends.triton.solve import _solve_kernel
from loft_kernels.backends.triton.solve_wide import SQUARES, _solve_wide_kernel
from loft_kernels.backends.triton.update import _update_kernel
from loft_kernels.backends.triton.update_hopper import _update_hopper_kernel, hopper_descriptor
from loft_kernels.backends.triton.update_hopper_broad import (
    DEPTH,
    _update_hopper_broad_kernel,
)
from loft_kernels.backends.triton.update_hopper_wide import _update_hopper_wide_kernel
from loft_kernels.plan import Moving, Pair, StepOptions

if TYPE_CHECKING:
    from loft_kernels.backends.triton.device import DevicePlan

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def bucket_key(pair: Pair) -> tuple[Any, ...]:
    """Name the bucket of a pair; options and rates belong to the groups."""
    grads = [f.grad.dtype for f in (pair.b, pair.a) if f.grad is not None]
    return (pair.a.param.shape[0], pair.b.param.dtype, grads[0], pair.b.group, pair.a.group)


class Bucket:
    """Some pairs and everything about their launches that stays while the pairs do.

    Args:
        plan: of the pairs' device.
        key: of the bucket.
        pairs: its pairs, with their gradients.
        sides: places of the pairs' factors among all factors of the step; None for all.
        exact: no product of reduced precision.
        all_numbers: the per-side numbers of all buckets.
        first: of these, the first that is the bucket's own.
    """

    def __init__(
        self,
        plan: DevicePlan,
        key: tuple,
        pairs: Sequence[Pair],
        sides: list[int] | None,
        exact: bool,
        all_numbers: Tensor,
        first: int,
    ) -> None:
        """Lay the bucket out."""
        self.pairs, self.exact, self.device = pairs, exact, plan.device
        self.rank, self.param_dtype, self.grad_dtype = key[:3]
        self._capability, self._places = plan.capability, sides
        self.cuda = plan.device.type == "cuda"
        self.width = configs.padded_rank(self.rank)
        # Above, a square is cut into blocks.
        self.block = min(self.width, configs.LARGEST_SQUARE)
        self.blocks = self.width // self.block
        self.wide, self.apart = self.blocks > 1, configs.apart(self.rank)
        self.hopper = plan.capability[0] == 9 and not exact and not self.wide
        self.packing = packing(self.rank)
        self.pair_table = plan.constant(("pairs", self.rank), partial(pair_table, self.rank))
        self._selection: dict[str, Tensor] = {}
        if self.hopper and configs.resident(self.rank):
            self._selection = {
                name: plan.constant((name, self.rank), partial(make, self.rank))
                for name, make in (("selection_ptr", selection), ("weight_ptr", weights))
            }
        if exact:
            tile = configs.exact_tile(self.rank)
        elif self.hopper:
            tile = configs.hopper_tile(self.rank)
        else:
            tile = configs.update_tile(plan.capability, self.rank)
        self._row_tile = configs.row_tile(plan.capability, self.rank)
        self.broad = self.hopper and configs.broad(self.rank)
        operand_rows = ROWS_OF_TILE if self.broad else configs.operand_rows(self.rank)
        self.layout = plan.layout(key, pairs, tile, operand_rows)
        self.sides = 2 * len(pairs)
        self.alternate = self.options.alternate
        rows = tables.address_rows(pairs, self._row_tile.chunk, self.layout.places)
        self._table = tables.AddressTable(rows, plan.device)
        self._values: list[float] = []
        self._launch = Launcher()
        # Written anew by every step, and read by the launches that come after on its stream.
        self.decision, self.all_numbers = plan.decision.values, all_numbers
        self.numbers = all_numbers[first : first + self.sides]
        square = (self.sides, self.width, self.width)
        self.inverse = torch.empty(square, dtype=torch.float64, device=self.device)
        self.change = torch.empty(square, dtype=torch.float32, device=self.device)
        self.changed = torch.empty(self.sides, dtype=torch.int32, device=self.device)
        self._operand_dtype = torch.float32 if exact else torch.float16
        self._no_residuals = None if self.layout.residual_rows else self._residual_space()

    @property
    def options(self) -> StepOptions:
        """The options of all pairs as they are now: they are those of the pairs' groups."""
        return self.pairs[0].options

    def _enter(self, moving: Moving) -> None:
        """Bring gradients and scalings to the device: the bucket's own of all of the step."""
        own = moving
        if self._places is not None:
            addresses, strides, scalings = moving
            own = (
                [addresses[k] for k in self._places],
                [strides[k] for k in self._places],
                [scalings[k // 2] for k in self._places[::2]],
            )
        self.table = self._table.enter(own)

    def _bring_hyper(self, max_norm: float | None) -> None:
        """Bring the hyper-parameters to the device; a tensor learning rate never leaves it."""
        pair = self.pairs[0]
        options, rates = self.options, (pair.b.lr, pair.a.lr)
        values = [
            # No rate of a float, so that one in place of a tensor is seen.
            *(-1.0 if isinstance(rate, Tensor) else _fp32(rate) for rate in rates),
            options.beta1,
            options.beta2,
            options.eps,
            options.weight_decay,
            math.inf if max_norm is None else max_norm,
            -1.0 if options.maximize else 1.0,
            options.damping,
        ]
        if values != self._values:
            self.hyper = tables.to_device(torch.tensor(values, dtype=torch.float64), self.device)
            self._values = values
        for index, rate in enumerate(rates):
            if isinstance(rate, Tensor):
                self.hyper[index].copy_(rate.reshape(()).float())

    def gram(self, moving: Moving) -> Tensor:
        """Add up Gram products.

        Args:
            moving: of the step; its scalings are not read yet.

        Returns:
            Sums by tile, which live until `solve` is launched.
        """
        self._enter(moving)
        tiles, tile = self.layout.row_tiles, self._row_tile
        partial_sums = torch.empty(
            (len(tiles), 3, self.width, self.width), dtype=torch.float64, device=self.device
        )
        self._launch(
            "gram",
            {"table_ptr": self.table, "partial_ptr": partial_sums},
            lambda: Launch(
                _gram_wide_kernel if self.apart else _gram_kernel,
                len(tiles) * (3 * self.blocks**2 if self.apart else 1),
                {"num_warps": tile.warps},
                {
                    "tiles_ptr": tiles,
                    "rank": self.rank,
                    "CHUNK": tile.chunk,
                    "BLOCK_N": tile.block,
                    **({"BLOCK_R": self.block} if self.apart else {}),
                    "R": self.width,
                    "PARAM_DTYPE": DTYPES[self.param_dtype],
                    "GRAD_DTYPE": DTYPES[self.grad_dtype],
                },
            ),
        )
        return partial_sums

    def solve(self, moving: Moving, partial_sums: Tensor, max_norm: float | None) -> None:
        """Find per side the inverse, the transition and the norm.

        Args:
            moving: of the step.
            partial_sums: see :meth:`gram`.
            max_norm: largest norm of all projected gradients, or None.
        """
        self._enter(moving)
        self._bring_hyper(max_norm)
        launched = {
            "table_ptr": self.table,
            "partial_ptr": partial_sums,
            "hyper_ptr": self.hyper,
        }
        if self.wide:
            shape = (self.sides, SQUARES.value, self.width, self.width)
            launched["squares_ptr"] = torch.empty(shape, dtype=torch.float64, device=self.device)
        self._launch(
            "solve",
            launched,
            lambda: Launch(
                _solve_wide_kernel if self.wide else _solve_kernel,
                self.sides,
                {"num_warps": configs.solve_warps(self.rank)},
                {
                    "inverse_ptr": self.inverse,
                    "change_ptr": self.change,
                    "changed_ptr": self.changed,
                    "numbers_ptr": self.numbers,
                    "rank": self.rank,
                    **({"BLOCK": configs.SOLVE_ENTRIES // self.width} if self.wide else {}),
                    "R": self.width,
                    "ALTERNATE": self.alternate,
                },
            ),
        )

    def decide(self, outside: Tensor, skipped: Tensor | None) -> None:
        """Take the decision of the step and replace the bases.

        Args:
            outside: fp64 (squared norm of all other gradients, gradient scale, found_inf).
            skipped: counter of skipped steps, or None if another bucket counts.
        """
        tile = self._row_tile
        moving = {
            "table_ptr": self.table,
            "hyper_ptr": self.hyper,
            "outside_ptr": outside,
            "skipped_ptr": skipped,
        }
        self._launch(
            "basis",
            moving,
            lambda: Launch(
                _basis_kernel,
                len(self.layout.row_tiles) * self.blocks,
                {"num_warps": tile.warps},
                {
                    "tiles_ptr": self.layout.row_tiles,
                    "inverse_ptr": self.inverse,
                    "numbers_ptr": self.numbers,
                    "all_numbers_ptr": self.all_numbers,
                    "decision_ptr": self.decision,
                    "changed_ptr": self.changed,
                    "all_sides": len(self.all_numbers),
                    "rank": self.rank,
                    "CHUNK": tile.chunk,
                    "BLOCK_N": tile.block,
                    "BLOCK_R": self.block,
                    "R": self.width,
                    "SIDES": triton.next_power_of_2(len(self.all_numbers)),
                    "COUNT_SKIPS": skipped is not None,
                    "PARAM_DTYPE": DTYPES[self.param_dtype],
                },
            ),
        )

    def write(self) -> None:
        """Advance the moments and move the factors."""
        moving = {"table_ptr": self.table, "hyper_ptr": self.hyper}
        if not self.broad:
            self._advance(moving)
        shape = (self.layout.partner_rows, self.packing.width)
        partner = torch.empty(shape, dtype=self._operand_dtype, device=self.device)
        workspace = {"partner_ptr": partner, **(self._no_residuals or self._residual_space())}
        written, read = {**moving, **workspace}, {**moving, **self._read(workspace)}
        stem, describe = "operands", self._operands
        if self.broad:
            stem, describe = "moments", self._moments_and_operands
        for index, part in enumerate(self.layout.parts):
            self._launch((stem, index), written, partial(describe, part))
            self._launch(("update", index), read, partial(self._update, part))

    def _advance(self, moving: dict[str, Tensor]) -> None:
        """Advance the moments; their scratch memory is gone when operands are written."""
        if self.wide:
            shape = (len(self.layout.moment_tiles), self.width, self.width)
            scratch = torch.empty(shape, dtype=torch.float32, device=self.device)
            moving = {**moving, "scratch_ptr": scratch}
        self._launch("moments", moving, self._moments)

    def _residual_space(self) -> dict[str, Tensor]:
        """Allocate the workspace of residuals."""
        columns, rows = self.packing, self.layout.residual_rows
        empty = partial(torch.empty, dtype=self._operand_dtype, device=self.device)
        return {
            # A descriptor needs an address even where nothing is behind it.
            "residual_ptr": empty((max(1, rows), columns.products)),
            "centre_ptr": empty((rows, 4), dtype=torch.float32),
            "direction_ptr": empty((rows, columns.half)),
        }

    def _read(self, workspace: dict[str, Tensor]) -> dict[str, Tensor | Tiles]:
        """Name what the hot loop reads of the workspace of operands."""
        columns, tile, describe = self.packing, self.layout.tile, self._descriptor
        partner, residual = workspace["partner_ptr"], workspace["residual_ptr"]
        widths = {"main": columns.main, "tail": columns.tail or 16, "halves": self.width}
        read: dict[str, Tensor | Tiles] = {
            k: describe(partner, (tile.block_n, v)) for k, v in widths.items()
        }
        if self.hopper and configs.resident(self.rank):
            return {**read, "partner_ptr": partner}
        read |= {k: workspace[k] for k in ("centre_ptr", "direction_ptr")}
        if self.wide:
            read["residual_ptr"] = residual
        if self.broad:
            read |= {
                "main": describe(partner, (tile.block_n, DEPTH)),
                "residual_main": describe(residual, (tile.block_m, DEPTH)),
            }
            del read["tail"]
        else:
            for key in ("main", "tail"):
                read[f"residual_{key}"] = describe(residual, (tile.block_m, widths[key]))
        return read

    def _moments(self) -> Launch:
        """Describe the launch that advances the moments."""
        tile = configs.moment_tile(self._capability, self.rank)
        options = self._options(tile.warps, tile.registers)
        if self.wide:
            options["num_stages"] = 1  # copies ahead would take twice the shared memory
        return Launch(
            _moments_kernel,
            len(self.layout.moment_tiles),
            options,
            {
                **({} if self.wide else {"scratch_ptr": None}),
                "decision_ptr": self.decision,
                "inverse_ptr": self.inverse,
                "change_ptr": self.change,
                "changed_ptr": self.changed,
                "tiles_ptr": self.layout.moment_tiles,
                "RANK": self.rank,
                "R": self.width,
                "CHUNK": tile.chunk,
                "BLOCK_M": tile.rows,
                "GROUP": tile.group,
                "IDLE": tile.idle,
                "COLUMNS_P": tile.columns,
                "GRAD_DTYPE": DTYPES[self.grad_dtype],
                "EXACT": self.exact,
                "PREFETCH": configs.prefetches(self._capability, self.rank),
            },
        )

    def _options(self, warps: int, registers: int | None) -> dict[str, Any]:
        """Return compiler options; the interpreter knows no registers."""
        return {"num_warps": warps, "maxnreg": registers if self.cuda else None}

    def _operands(self, part: Part) -> Launch:
        """Describe the launch that writes the operands of the hot loop."""
        columns = self.packing
        return Launch(
            _operands_kernel,
            len(part.operand_tiles),
            self._options(4, configs.operand_registers(self.rank)),
            {
                "decision_ptr": self.decision,
                "numbers_ptr": self.numbers,
                "tiles_ptr": part.operand_tiles,
                "pairs_ptr": self.pair_table,
                "rank": self.rank,
                "BLOCK": configs.operand_rows(self.rank),
                "N": configs.narrow_rank(self.rank),
                "R": self.width,
                "PRODUCTS": columns.products,
                "WIDTH": columns.width,
                "SPLIT": columns.split,
                "DTYPE": tl.float32 if self.exact else tl.float16,
            },
        )

    def _moments_and_operands(self, part: Part) -> Launch:
        """Describe the launch that advances the moments and writes all operands."""
        return Launch(
            _moments_hopper_kernel,
            len(part.operand_tiles),
            self._options(4, REGISTERS),
            {
                "decision_ptr": self.decision,
                "numbers_ptr": self.numbers,
                "inverse_ptr": self.inverse,
                "change_ptr": self.change,
                "changed_ptr": self.changed,
                "tiles_ptr": part.operand_tiles,
                "RANK": self.rank,
                "PRODUCTS": self.packing.products,
                "WIDTH": self.packing.width,
                "GRAD_DTYPE": DTYPES[self.grad_dtype],
            },
        )

    def _descriptor(self, tensor: Tensor, block: tuple[int, int]) -> Tiles:
        """Describe tiles of a matrix to the tensor memory accelerator."""
        return Tiles(tensor, block, hopper_descriptor if self.hopper else _plain_descriptor)

    def _update(self, part: Part) -> Launch:
        """Describe the hot loop's launch for this device, rank and precision."""
        columns, tile = self.packing, self.layout.tile
        resident = configs.resident(self.rank)
        options = self._options(tile.warps, tile.registers)
        fixed = {
            "tiles_ptr": part.update_tiles,
            "decision_ptr": self.decision,
            "numbers_ptr": self.numbers,
            "inverse_ptr": self.inverse,
            "rank": self.rank,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "R": self.width,
            "TAIL": columns.tail,
            "HAS_MASTER": self.param_dtype != torch.float32,
            "PARAM_DTYPE": DTYPES[self.param_dtype],
        }
        if self.broad:
            for key in ("BLOCK_M", "BLOCK_N", "R", "TAIL"):
                del fixed[key]
            fixed |= {"PRODUCTS": columns.products, "STAGES": tile.stages}
            kernel = _update_hopper_broad_kernel
        elif self.hopper:
            fixed["STAGES"] = tile.stages
            if resident:
                kernel = _update_hopper_kernel
                fixed |= {"pairs_ptr": self.pair_table, "MAIN": columns.main}
                fixed |= self._selection
                fixed |= {"SPLIT": columns.split, "RANK": fixed.pop("rank")}
            else:
                kernel = _update_hopper_wide_kernel
                fixed["BLOCKS"] = columns.blocks
        else:
            kernel = _update_kernel
            options["num_stages"] = tile.stages
            fixed |= {
                "pairs_ptr": self.pair_table,
                "MAIN": columns.main,
                "BLOCKS": columns.blocks,
                "SPLIT": columns.split,
                "RESIDENT": resident,
                "EXACT": self.exact,
                "ASM": self.cuda,
                **({} if self.wide else {"residual_ptr": None}),
            }
        return Launch(kernel, len(part.update_tiles), options, fixed)


def _plain_descriptor(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Describe tiles of a matrix to kernels that leave their layout to the compiler."""
    return TensorDescriptor.from_tensor(tensor, list(block))


def _fp32(value: float) -> float:
    """Round to fp32, as the reference path does for fp32 state."""
    return ctypes.c_float(value).value
