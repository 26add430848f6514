"""Replicas of a data-parallel run stay bitwise equal: gloo on two CPU processes, NCCL on GPUs.

    LOFT_REQUIRE_GPU=1 python -m pytest tests/test_ddp.py -n 0 -k nccl

runs the second half. Where there is one GPU, two processes share it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchrun import torchrun

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(*arguments: str, worker: Path = WORKER) -> dict:
    done = torchrun(worker, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def check(seen: dict, pairs: int) -> None:
    """20 comparisons of all tensors, with one step that every rank skipped."""
    assert (seen["steps"], seen["checks"]) == (200, 20)
    assert seen["skipped"] == 1
    assert seen["moved"] == 199
    assert seen["finite"]
    assert seen["first"] == "module.layers.0.lora_B"
    # Per factor: itself and at least step, two moments, basis and guard; the norm: 2 x (1 + 3).
    assert seen["tensors"] >= 2 * pairs * 6 + 8 + 1


def test_gloo_replicas_are_bitwise_equal_for_200_steps():
    seen = run("--device", "cpu", "--bucket-views")
    check(seen, pairs=2)
    assert seen["backend"] == "reference"


def test_a_single_differing_bit_is_noticed():
    done = torchrun(WORKER, "--steps", "20", "--drift-at", "20")
    assert done.returncode != 0
    assert "after step 20 the replicas differ in" in done.stderr


def test_trainer_in_two_processes():
    for library in ("transformers", "accelerate", "peft"):
        pytest.importorskip(library, reason="a Trainer run")
    seen = run(worker=WORKER.with_name("trainer_worker.py"))
    assert (seen["world"], seen["pairs"]) == (2, 2)
    assert seen["wrapper"] == "DistributedDataParallel"
    assert seen["tensors"] == 4 * 6 + 1


def test_whole_adapters_over_a_base_sharded_by_fsdp2():
    """What the refusal of sharded factors tells the user to do."""
    seen = run("--fsdp", "--steps", "40")
    assert (seen["checks"], seen["skipped"], seen["moved"]) == (4, 1, 39)
    assert seen["base"] == "DTensor"
    assert seen["first"] == "layers.0.lora_B"


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["two GPUs", "one GPU"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nccl_replicas_are_bitwise_equal_for_200_steps(dtype, place):
    """On one GPU NCCL takes the two processes for two hosts and goes by sockets."""
    if place == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    shared = ["--share-gpu"] if place == "one GPU" else []
    seen = run("--device", "cuda", "--dtype", dtype, "--bucket-views", *shared)
    check(seen, pairs=3)
    assert (seen["backend"], seen["communication"]) == ("triton", "nccl")
    assert seen["gpus"] == (1 if shared else 2)
