"""The benchmarks of speed: what they time is LoFT, what is not LoFT is not timed."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import one_thread  # noqa: F401 - an autouse fixture
from torch import Tensor

import loft_kernels as lk
from loft_kernels import reference as ref

# At the end, so that a copy of the package elsewhere on the path stays in front.
sys.path.append(str(Path(__file__).parents[1]))
from bench import contenders, end_to_end, naive, record, roofline, run, work
from bench.problem import Adapters

SHAPES = [(7, 10), (12, 5)]
QUANTILES = {"p20", "p50", "p80", "mean"}


def naive_over(model: Adapters, **options) -> naive.NaiveLoFT:
    pairs = [naive.NaivePair(x.lora_B, x.lora_A, x.scaling) for x in model.layers]
    return naive.NaiveLoFT(pairs, **options)


def assert_states_agree(opt: naive.NaiveLoFT, truth: dict[str, Tensor], rank: int) -> None:
    """Compare one factor's state after carrying it into the partner's orthonormal basis."""
    q, partner = truth["partner_basis"], opt["partner"]
    # Y = Q L^T: coordinates of the factor become those in Q by a product with L.
    chol = partner.mT @ q
    torch.testing.assert_close(q @ chol.mT, partner, rtol=1e-9, atol=1e-9)
    m = opt["exp_avg"] @ chol
    p = ref.pack_symmetric(chol.mT @ opt["second_moment"] @ chol)
    torch.testing.assert_close(m, truth["exp_avg"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p, truth["second_moment"], rtol=1e-9, atol=1e-12)
    assert p.shape[1] == ref.packed_length(rank)


@pytest.mark.parametrize("max_norm", [None, 1e-3], ids=["free", "clipped"])
def test_naive_step_is_the_reference_step(max_norm):
    rank, lr = 3, 1e-2
    model = Adapters(SHAPES, rank, "cpu", dtype=torch.float64)
    exact = Adapters(SHAPES, rank, "cpu", dtype=torch.float64)
    mine = naive_over(model, lr=lr, max_grad_norm=max_norm)
    truth = lk.LoFTAdamW(exact, lr=lr, backend="reference", max_grad_norm=max_norm)
    for _ in range(6):
        model.new_gradients()
        exact.new_gradients()
        mine.step()
        truth.step()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
            assert_states_agree(mine.state[p], truth.state[q], rank)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_step_is_the_naive_step():
    model, other = (Adapters(SHAPES[:1], 2, "cpu") for _ in range(2))
    eager, compiled = naive_over(model), naive_over(other, compiled=True)
    for _ in range(2):
        for which, opt in ((model, eager), (other, compiled)):
            which.new_gradients()
            opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cpu", "reference", "reference-diagonal", "naive", "adamw"])
def test_gate_passes_what_is_right(name):
    contender = contenders.CONTENDERS[name]
    assert contenders.parity(contender, SHAPES, 2, "cpu") < contender.limit / 10


def spoilt_transport(observe):
    """Carry the second moment by C P C^T, as the equations do not."""

    def wrong(grad, partner, partner_prev, exp_avg, second_moment, **options):
        inverse, m, _ = observe(grad, partner, partner_prev, exp_avg, second_moment, **options)
        change = (partner_prev.T @ partner) @ inverse
        scaled = grad @ inverse / options["scaling"]
        beta2 = options["betas"][1]
        outer = scaled[:, :, None] * scaled[:, None, :]
        return inverse, m, beta2 * (change @ second_moment @ change.T) + (1 - beta2) * outer

    return wrong


def spoilt_update(move):
    """Forget one bias correction."""

    def wrong(*tensors, **options):
        *others, numbers = tensors
        return move(*others, numbers * torch.tensor([1.0, 1.0, 0.9]), **options)

    return wrong


@pytest.mark.parametrize(
    ("part", "spoil"), [("observe", spoilt_transport), ("move", spoilt_update)]
)
def test_a_spoilt_baseline_is_not_timed(part, spoil, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(naive, part, spoil(getattr(naive, part)))
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as ended:
        run.main(["--device", "cpu", "--ranks", "4", "--backends", "naive", "--out", str(out)])
    assert ended.value.code == 1
    (row,) = rows_of(out)
    assert row["parity_error"] > row["parity_limit"]
    assert "not timed" in row["error"]
    assert "ms" not in row


@pytest.mark.parametrize("moved", ["B", "A"])
def test_the_gate_looks_at_both_phases(moved):
    """A step that spoils the move of one factor only, in its phase, is seen."""
    right = contenders.CONTENDERS["reference"]

    def make(model):
        opt = right.make(model)
        step, count = opt.step, iter(range(9))

        def spoilt():
            step()
            if next(count) == "BA".index(moved):
                for layer in model.layers:
                    factor = getattr(layer, f"lora_{moved}")
                    factor.data += 0.1 * torch.randn_like(factor)

        opt.step = spoilt
        return opt

    assert contenders.parity(right, SHAPES, 2, "cpu") < 1e-5
    assert contenders.parity(replace(right, make=make), SHAPES, 2, "cpu") > right.limit


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def test_run_writes_rows_with_every_field(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOFT_COMMIT", "abc1234")
    record._git.cache_clear()
    out = tmp_path / "rows.jsonl"
    names = "cpu,reference,reference-diagonal,naive,adamw"
    words = ["--device", "cpu", "--ranks", "2", "--backends", names, "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        run.main([*words, "--steps", "2", "--baseline-steps", "2", "--warmup", "1"])
    assert ended.value.code == 0
    rows = rows_of(out)
    assert [row["backend"] for row in rows] == names.split(",")
    for row in rows:
        assert row["ms"].keys() == QUANTILES
        assert row["parity_error"] <= row["parity_limit"]
        assert 0 < row["state_bytes"] < row["needed_bytes"] + 64 * row["pairs"]
        assert row["commit"] == "abc1234"  # told, whatever the tree says
        assert row["dirty"] is None
        assert {"driver", "gpu", "seed", "torch", "triton", "cuda"} <= row.keys()
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    assert "needs 0.0 GB" in run.too_large(1001, "cuda")
    assert run.too_large(1000, "cuda") is None
    out = tmp_path / "rows.jsonl"

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    words = ["--ranks", "4", "--backends", "adamw", "--out", str(out)]
    monkeypatch.setattr(run, "parity", out_of_memory)
    with pytest.raises(SystemExit) as ended:
        run.main([*words, "--device", "cpu"])
    assert ended.value.code == 0
    monkeypatch.setattr(run, "too_large", lambda *_: "needs 9 GB, the device has 1 GB")
    with pytest.raises(SystemExit):
        run.main([*words, "--device", "cpu"])
    rows = rows_of(out)
    assert rows[0]["skipped"] == "out of memory: CUDA out of memory."
    assert rows[1]["skipped"] == "needs 9 GB, the device has 1 GB"
    assert all(row["needed_bytes"] > 0 and "ms" not in row for row in rows)


def test_a_failure_is_a_row_and_the_others_follow(tmp_path, monkeypatch, capsys):
    def broken(contender, *_):
        if contender is contenders.CONTENDERS["naive"]:
            raise RuntimeError("a reason\nand more")
        return 0.0

    monkeypatch.setattr(run, "parity", broken)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as ended:
        run.main(["--device", "cpu", "--backends", "naive,adamw", "--out", str(out)])
    assert ended.value.code == 1
    failed, timed = rows_of(out)
    assert failed["error"] == "RuntimeError: a reason"
    assert "ms" in timed
    assert "and more" in capsys.readouterr().err


def test_70b_at_rank_64_is_counted_before_it_is_tried():
    shapes = run.SHAPE_SETS["llama-3-70b"].pairs()
    needed = contenders.bytes_needed(contenders.CONTENDERS["triton"], shapes, 64)
    assert 120e9 < needed < 130e9
    assert len(shapes) == 560


def test_roofline_measures_ceilings_and_shares(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["--shapes", "tiny", "--device", "cpu", "--ranks", "4", "--steps", "2"]
    roofline.main([*words, "--gemm", "64", "--repeats", "1", "--out", str(out)])
    machine, row = rows_of(out)
    assert machine["ceilings"].keys() == {"bytes", "flop32", "flop64"}
    assert row["step"]["shares"].keys() == {"bytes", "flop32", "flop64"}
    assert 0 < row["step"]["share"] == row["step"]["shares"][row["step"]["bound"]]
    assert row["ms"].keys() == QUANTILES


def test_work_is_what_the_formulas_say():
    stages = work.work_of([(3, 5)], 2, gpu=True)
    assert stages.keys() == set(work.STAGES)
    assert stages["gram"] == work.Work(bytes=12 * 2 * 8, flop64=6 * 4 * 8)
    assert stages["update"].flop == (4 + 10) * 15
    assert stages["update"].special == 1.5 * 15
    assert stages["moments"].bytes == (12 * 2 + 8 * 3) * 8
    wide = work.work_of([(3, 5)], 32, gpu=True)
    assert wide["operands"].bytes == 4 * (4 * 32 + 2 * (528 + 64)) + 4 * (4 * 560 + 2 * 528)
    apart = work.work_of([(3, 5)], 64, gpu=True, merged=False)
    merged = work.work_of([(3, 5)], 64, gpu=True)
    assert merged["operands"] == work.Work()
    # One kernel does both and reads P and m of the side that moves, half the rows, once.
    once = work.Work(bytes=-4 * 4 * (2080 + 64))
    assert merged["moments"] == apart["moments"] + apart["operands"] + once
    on_cpu = work.work_of([(3, 5)], 64, gpu=False)
    assert on_cpu["moments"] == apart["moments"]


def test_stages_share_the_time_of_their_kernels(monkeypatch):
    """Two steps of one launch a stage: times are per step, foreign kernels are named."""
    names = [f"_{stage}_kernel" for stage in work.STAGES] + ["fill"]
    names[5] = "_update_hopper_wide_kernel"
    kernels = Counter(dict.fromkeys(names, 2)), dict.fromkeys(names, 4.0)
    monkeypatch.setattr(roofline.timing, "kernels", lambda *_: kernels)
    tops = {"bytes": 1e6, "flop16": 1e12, "flop64": 1e9, "special": 1e3}
    model = Adapters([(3, 5)], 2, "cpu")
    row = roofline.stages(model, lk.LoFTAdamW(model), argparse.Namespace(steps=2), tops)
    assert row["kernel_ms"] == 14.0
    assert row["other_kernels"] == {"fill": 2}
    assert row["stages"]["other"] == {"ms": 2.0}
    gram, update = row["stages"]["gram"], row["stages"]["update"]
    assert gram["share"] == pytest.approx(12 * 2 * 8 / 1e6 / 2e-3)
    assert gram["bound"] == "bytes"
    assert update["share"] == pytest.approx(1.5 * 15 / 1e3 / 2e-3)
    assert update["bound"] == "special"


@pytest.mark.parametrize("command", [run, roofline, end_to_end])
def test_an_odd_number_of_steps_is_refused(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "cpu", "--steps", "3"])
    assert ended.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("_gram_kernel", "gram"),
        ("_update_hopper_wide_kernel", "update"),
        ("_operands_kernel", "operands"),
        ("void at::native::fill", "other"),
    ],
)
def test_kernels_belong_to_stages(kernel, stage):
    assert roofline.stage_of(kernel) == stage


def test_end_to_end_takes_every_optimizer_through_a_model(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    out = tmp_path / "rows.jsonl"
    words = ["--layers", "1", "--hidden", "16", "--vocab", "32", "--rank", "2", "--batch", "2"]
    words += ["--length", "8", "--steps", "2", "--warmup", "1", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        end_to_end.main([*words, "--out", str(out)])
    assert ended.value.code == 0
    rows = rows_of(out)
    assert [row["optimizer"] for row in rows] == ["adamw", "loft", "naive"]
    for row in rows:
        assert row["pairs"] == 5
        assert row["adapter_dtype"] == "float32"
        for key in ("forward_backward_ms", "optimizer_ms", "step_ms", "wall_ms"):
            assert row[key].keys() == QUANTILES
        assert 0 < row["optimizer_share"] < 1
        assert row["loss"] == pytest.approx(3.47, abs=0.5)
