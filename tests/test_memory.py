"""State grows with r^2: by the published formula, and not without a word."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import make_adapter
from runs import give_gradients, one_thread  # noqa: F401 - one_thread is an autouse fixture
from torch import nn
from torch.profiler import ProfilerActivity, profile

import loft_kernels as lk

RANKS = (3, 4, 6, 12, 24, 40, 96)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_bytes_are_the_published_formula(rank, dtype):
    m, n = 20, 31
    layer = make_adapter(m, n, rank, seed=0).to(dtype)
    opt = lk.LoFTAdamW(layer)
    give_gradients(layer.parameters(), 0)
    opt.step()
    half = dtype == torch.bfloat16
    for p, rows, partner_rows in ((layer.lora_B, m, n), (layer.lora_A, n, m)):
        measured = sum(t.numel() * t.itemsize for t in opt.state[p].values())
        assert measured == lk.state_bytes(rows, partner_rows, rank, half=half)
        # README: 4 bytes * (rows * (r + r(r+1)/2) + partner_rows * r), and two scalars.
        entries = rows * (rank + rank * (rank + 1) // 2) + partner_rows * rank
        assert measured == 4 * (entries + (rows * rank if half else 0)) + 16


def test_a_step_makes_no_temporary_of_the_weights_size():
    m, n, rank = 3000, 3400, 3
    layer = make_adapter(m, n, rank, seed=0).float()
    opt = lk.LoFTAdamW(layer)
    give_gradients(layer.parameters(), 0)
    opt.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        opt.step()
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < largest < 4 * m * n / 4


def large(rank: int, width: int = 4096, layers: int = 64) -> nn.Module:
    """Factors of a large model, without their memory."""
    with torch.device("meta"):
        net = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in net:
            layer.lora_B = nn.Parameter(torch.empty(width, rank))
            layer.lora_A = nn.Parameter(torch.empty(rank, width))
    return net


def test_a_rank_that_costs_more_than_full_training_warns():
    message = (
        r"state will take 16\.6 GiB, and AdamW's for the full weights would take 8\.0 GiB.*largest "
        r"rank is 128.*second_moment='diagonal'"
    )
    with pytest.warns(UserWarning, match=message):
        lk.LoFTAdamW(large(128))


@pytest.mark.parametrize(
    ("rank", "options"), [(64, {}), (128, {"second_moment": "diagonal"})], ids=["r64", "diagonal"]
)
def test_what_is_affordable_is_silent(rank, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.LoFTAdamW(large(rank), **options)
