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

from loft_kernels.backends.triton import configs
from loft_kernels.backends.triton.basis import _basis_kernel
from loft_kernels.backends.triton.gram import _gram_kernel
from loft_kernels.backends.triton.moments import _moments_kernel
from loft_kernels.backends.triton.operands import _operands_kernel
from loft_kernels.backends.triton.solve import _solve_kernel
from loft_kernels.backends.triton.update import _update_kernel

POINTERS = {
    "table_ptr": "*i64",
    "tiles_ptr": "*i32",
    "changed_ptr": "*i32",
    "skipped_ptr": "*i64",
    "change_ptr": "*fp32",
    "centre_ptr": "*fp32",
    "partner_ptr": "*fp16",
    "residual_ptr": "*fp16",
    "rank": "i32",
    "all_sides": "i32",
}


def compile_kernel(kernel, capability: int, constants: dict, warps: int, stages: int) -> None:
    """Compile one kernel and say how much shared memory it needs."""
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants and not isinstance(constants[name], str):
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name in constants and constants[name].startswith("tensordesc"):
            signature[name] = constants[name]
        elif name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        else:
            signature[name] = POINTERS.get(name, "*fp64")
            if name.endswith("_ptr"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    print(kernel.fn.__name__, compiled.metadata.shared)


def main(capability: int, rank: int) -> None:
    """Compile all kernels as the plan would launch them."""
    width, blocks, block = (
        configs.padded_rank(rank),
        configs.blocks(rank),
        configs.block_width(rank),
    )
    tile, moments = configs.update_tile(capability // 10, rank), configs.moment_tile(rank)
    slice_ = block * block
    common = {
        "R": width,
        "NB": blocks,
        "B": block,
        "PARAM_DTYPE": tl.float32,
        "GRAD_DTYPE": tl.float32,
        "CHUNK": configs.CHUNK_ROWS,
        "BLOCK_N": 32,
        "DTYPE": tl.float16,
        "BLOCK": configs.OPERAND_ROWS,
        "SIDES": 512,
        "COUNT_SKIPS": True,
        "ALTERNATE": True,
    }
    compile_kernel(_gram_kernel, capability, common, 4, 3)
    compile_kernel(_solve_kernel, capability, common, 4 if width <= 32 else 8, 3)
    compile_kernel(_basis_kernel, capability, common, 4, 3)
    compile_kernel(_operands_kernel, capability, common, 4, 3)
    rows = common | {
        "RANK": rank,
        "CHUNK": moments.chunk,
        "BLOCK_M": moments.rows,
        "GROUP": moments.group,
        "IDLE": moments.idle,
        "COLUMNS_P": moments.columns,
        "EXACT": False,
    }
    compile_kernel(_moments_kernel, capability, rows, moments.warps, 3)
    hot = common | {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "RESIDENT": configs.resident(rank),
        "HAS_MASTER": False,
        "EXACT": False,
        "ASM": True,
        "products": f"tensordesc<fp16[{tile.block_n}, {slice_}]>",
        "halves": f"tensordesc<fp16[{tile.block_n}, {width}]>",
        "residual": f"tensordesc<fp16[{tile.block_m}, {slice_}]>",
    }
    compile_kernel(_update_kernel, capability, hot, tile.warps, tile.stages)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
