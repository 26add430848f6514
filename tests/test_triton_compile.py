"""Every kernel compiles for Ampere, Hopper and Blackwell on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend is optional")

KERNELS = {"gram", "solve", "basis", "operands", "moments", "update"}
# Kernels of compute capability 9.0 alone, by rank.
OWN = {
    4: {"update_hopper"},
    16: {"update_hopper"},
    32: {"update_hopper_wide"},
    64: {"update_hopper_broad", "moments_hopper"},
}
# Shared memory of one program: sm_86, sm_89 and sm_120 have 99 KiB, sm_90 and sm_100 227 KiB.
LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("capability", LIMITS, ids="sm_{}".format)
@pytest.mark.parametrize("rank", [4, 16, 32, 64, 128, 256], ids="r{}".format)
def test_kernels_compile_and_fit_shared_memory(capability, rank):
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability), str(rank)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    expected = set(KERNELS)
    if rank <= 64 and capability == 90:
        expected |= OWN[rank]
    wide = {"gram": 32, "solve": 64}
    expected = {f"{k}_wide" if rank > wide.get(k, rank) else k for k in expected}
    assert set(shared) == {f"_{k}_kernel" for k in expected}
    over = {k: v for k, v in shared.items() if int(v) > LIMITS[capability]}
    assert not over, f"kernels over {LIMITS[capability]} bytes of shared memory: {over}"
