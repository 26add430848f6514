"""Compile every Triton kernel for GPUs that are not here; run by test_triton_compile.py.

    python compile_kernels.py CAPABILITY RANK

Prints one line per kernel: its name and the bytes of shared memory it needs.
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from loft_kernels.backends.triton import configs
from loft_kernels.backends.triton.basis import _basis_kernel
from loft_kernels.backends.triton.gram import _gram_kernel
from loft_kernels.backends.triton.gram_wide import _gram_wide_kernel
from loft_kernels.backends.triton.moments import _moments_kernel
from loft_kernels.backends.triton.moments_hopper import REGISTERS, _moments_hopper_kernel
from loft_kernels.backends.triton.operands import _operands_kernel
from loft_kernels.backends.triton.packing import packing
from loft_kernels.backends.triton.solve import _solve_kernel
from loft_kernels.backends.triton.solve_wide import _solve_wide_kernel
from loft_kernels.backends.triton.update import _update_kernel
from loft_kernels.backends.triton.update_hopper import _update_hopper_kernel
from loft_kernels.backends.triton.update_hopper_broad import DEPTH, _update_hopper_broad_kernel
from loft_kernels.backends.triton.update_hopper_wide import _update_hopper_wide_kernel

POINTERS = {
    "table_ptr": "*i64",
    "tiles_ptr": "*i32",
    "changed_ptr": "*i32",
    "pairs_ptr": "*i32",
    "selection_ptr": "*fp16",
    "weight_ptr": "*fp32",
    "skipped_ptr": "*i64",
    "change_ptr": "*fp32",
    "centre_ptr": "*fp32",
    "partner_ptr": "*fp16",
    "direction_ptr": "*fp16",
    "residual_ptr": "*fp16",
    "scratch_ptr": "*fp32",
    "rank": "i32",
    "all_sides": "i32",
}


def compile_kernel(kernel, capability: int, constants: dict, options: dict) -> None:
    """Compile one kernel and say how much shared memory it needs."""
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = constants.get(name)
        if isinstance(value, str) and value.startswith("tensordesc"):
            signature[name] = value
        elif name in constants:
            signature[name], values[(index,)] = "constexpr", value
        else:
            signature[name] = POINTERS.get(name, "*fp64")
            if name.endswith("_ptr"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    compiled = triton.compile(
        source(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    print(kernel.fn.__name__, compiled.metadata.shared)


def described(rows: int, columns: int, gluon: bool) -> str:
    """Name the type of a tensor descriptor."""
    block = f"fp16[{rows}, {columns}]"
    if not gluon:
        return f"tensordesc<{block}>"
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float16)
    return f"tensordesc<{block},{layout!r}>"


def compile_rows(capability: int, rank: int) -> None:
    """Compile everything but the hot loop."""
    width, columns, architecture = configs.padded_rank(rank), packing(rank), divmod(capability, 10)
    moments = configs.moment_tile(architecture, rank)
    common = {"R": width, "PARAM_DTYPE": tl.float32, "GRAD_DTYPE": tl.float32}
    common |= {"SIDES": 512, "COUNT_SKIPS": True, "ALTERNATE": True}
    tile = configs.row_tile(architecture, rank)
    common |= {"CHUNK": tile.chunk, "BLOCK_N": tile.block}
    common["BLOCK_R"] = min(width, configs.LARGEST_SQUARE)
    common["BLOCK"] = configs.SOLVE_ENTRIES // width
    wide = width > common["BLOCK_R"]
    row_warps = {"num_warps": tile.warps}
    gram = _gram_wide_kernel if configs.apart(rank) else _gram_kernel
    compile_kernel(gram, capability, common, row_warps)
    solve = _solve_wide_kernel if wide else _solve_kernel
    compile_kernel(solve, capability, common, {"num_warps": configs.solve_warps(rank)})
    compile_kernel(_basis_kernel, capability, common, row_warps)
    operands = {
        "BLOCK": configs.operand_rows(rank),
        "N": configs.narrow_rank(rank),
        "R": width,
        "PRODUCTS": columns.products,
        "WIDTH": columns.width,
        "SPLIT": columns.split,
        "DTYPE": tl.float16,
    }
    options = {"num_warps": 4, "maxnreg": configs.operand_registers(rank)}
    compile_kernel(_operands_kernel, capability, operands, options)
    rows = common | {
        "RANK": rank,
        "CHUNK": moments.chunk,
        "BLOCK_M": moments.rows,
        "GROUP": moments.group,
        "IDLE": moments.idle,
        "COLUMNS_P": moments.columns,
        "WIDTH": columns.width,
        "PRODUCTS": columns.products,
        "PREFETCH": configs.prefetches(architecture, rank),
        "EXACT": False,
    }
    if capability == 90 and configs.broad(rank):
        options = {"num_warps": 4, "maxnreg": REGISTERS}
        compile_kernel(_moments_hopper_kernel, capability, rows, options)
    options = {"num_warps": moments.warps}
    if wide:
        options["num_stages"] = 1
    else:
        rows["scratch_ptr"] = None
    compile_kernel(_moments_kernel, capability, rows, options)


def compile_hot_loop(capability: int, rank: int, gluon: bool) -> None:
    """Compile the hot loop: the portable kernel, or that of compute capability 9.0."""
    columns, resident = packing(rank), configs.resident(rank)
    tile = configs.update_tile(divmod(capability, 10), rank)
    tile = configs.hopper_tile(rank) if gluon else tile
    widths = {"main": columns.main, "tail": columns.tail or 16, "halves": columns.half}
    hot = {
        "R": columns.half,
        "RANK": rank,
        "MAIN": columns.main,
        "BLOCKS": columns.blocks,
        "TAIL": columns.tail,
        "SPLIT": columns.split,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.stages,
        "RESIDENT": resident,
        "HAS_MASTER": False,
        "PARAM_DTYPE": tl.float32,
        "EXACT": False,
        "ASM": True,
        **({"residual_ptr": None} if rank <= configs.LARGEST_SQUARE else {}),
        **{name: described(tile.block_n, width, gluon) for name, width in widths.items()},
        **{
            f"residual_{name}": described(tile.block_m, widths[name], gluon)
            for name in ("main", "tail")
        },
    }
    options = {"num_warps": tile.warps}
    if not gluon:
        compile_kernel(_update_kernel, capability, hot, options | {"num_stages": tile.stages})
        return
    kernel = _update_hopper_kernel if resident else _update_hopper_wide_kernel
    if configs.broad(rank):
        kernel = _update_hopper_broad_kernel
        hot |= {"PRODUCTS": columns.products}
        hot |= {
            "main": described(tile.block_n, DEPTH, gluon),
            "residual_main": described(tile.block_m, DEPTH, gluon),
        }
    compile_kernel(kernel, capability, hot, options | {"maxnreg": tile.registers})


def main(capability: int, rank: int) -> None:
    """Compile all kernels as the plan would launch them."""
    compile_rows(capability, rank)
    compile_hot_loop(capability, rank, gluon=False)
    if capability == 90 and rank <= configs.LARGEST_SQUARE:
        compile_hot_loop(capability, rank, gluon=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
