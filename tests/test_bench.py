"""The benchmarks that judge accuracy: what they build is right, and what they judge can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from runs import one_thread  # noqa: F401 - an autouse fixture

import loft_kernels as lk
from loft_kernels import reference as ref

# At the end, so that a copy of the package elsewhere on the path stays in front.
sys.path.append(str(Path(__file__).parents[1]))
import itertools

from bench import accuracy, curves, histories

SMALL = ["--device", "cpu", "--backend", "reference", "--shapes", "40x56,33x20"]


@pytest.mark.parametrize("kind", histories.HISTORIES)
def test_histories_are_what_the_recursions_sum_up_to(kind):
    rng = torch.Generator().manual_seed(1)
    g = histories.gradients(histories.History(kind, 0.1, 45), 5, 3, rng)
    m, p, guard = torch.zeros(5, 3).double(), torch.zeros(5, 6).double(), 0.0
    for k in range(44):
        ref.update_first_moment_(m, g[:, k], None, 0.9)
        ref.update_second_moment_(p, g[:, k], None, 0.999)
        guard = ref.update_guard(guard, 0.9, 0.999)
    for found, expected in zip(histories.moments_before_last(g), (m, p), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert histories.guard_after(44) == guard


def test_hard_histories_are_hard_as_described():
    def means(kind: str) -> list[float]:
        g = histories.gradients(
            histories.History(kind, 0.0, 200), 1, 1, torch.Generator().manual_seed(1)
        )[0, :, 0]
        return (g / g[0]).tolist()

    assert means("steady") == [1.0] * 200
    assert means("shock") == [1.0] * 199 + [1000.0]
    assert means("flip") == [1.0] * 190 + [-1.0] * 10
    growth = means("growth")
    assert all(b / a == pytest.approx(1.05) for a, b in itertools.pairwise(growth))
    turns = [round(x, 9) for x in means("turns")]
    assert turns[:19] == [1.0] * 19
    assert len(set(turns)) == 2
    assert sum(a != b for a, b in itertools.pairwise(turns)) == 10


def test_accuracy_passes_with_the_reference_and_counts_every_cell(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as ended:
        accuracy.main([*SMALL, "--ranks", "1,4,16", "--out", str(out)])
    assert ended.value.code == 0
    rows = [json.loads(line) for line in out.open()]
    # 2 shapes, the first in two more dtypes; 2 phases, 2 precisions; 3 x 4 + 4 + 2 cells.
    assert len(rows) == 3 * 4 * 2 * 2 * 18
    assert all(row["ok"] for row in rows)
    told = capsys.readouterr().out
    assert f"{len(rows)} rows, 0 above a bar" in told
    with pytest.raises(SystemExit) as again:
        accuracy.main(["--table", str(out)])
    assert again.value.code == 0
    assert capsys.readouterr().out == told


def break_factor(end: accuracy.Start) -> None:
    for pair, states in zip(end.pairs, end.states, strict=True):
        for p in pair.parameters():
            p.data += 3e-3 * p.norm() * torch.randn_like(p) / p.numel() ** 0.5
        for side, state in states.items():
            if "master" in state:
                state["master"] = accuracy.rows_of(pair.side(side), side).float()


def break_state(key: str):
    def spoil(end: accuracy.Start) -> None:
        for states in end.states:
            states["A"][key] = states["A"][key] * (1 + 1e-6) + (key == "step")

    return spoil


BREAKS = {
    "factor": break_factor,
    **{k: break_state(k) for k in ("exp_avg", "second_moment", "partner_basis", "guard", "step")},
}


@pytest.mark.parametrize("name", BREAKS)
def test_accuracy_sees_a_wrong_step(name, monkeypatch, capsys):
    right = accuracy.take_step

    def wrong(start, backend, precision, *, exact=False):
        end = right(start, backend, precision, exact=exact)
        if not exact:
            BREAKS[name](end)
        return end

    monkeypatch.setattr(accuracy, "take_step", wrong)
    with pytest.raises(SystemExit) as ended:
        accuracy.main([*SMALL[:-1], "33x20", "--ranks", "4"])
    assert ended.value.code == 1
    assert "0 above a bar" not in capsys.readouterr().out.splitlines()[-1].split(",")[1]


def test_curves_agree_with_themselves_and_part_from_others(monkeypatch, tmp_path):
    monkeypatch.setattr(curves, "BATCH", 2)
    out = tmp_path / "curves.jsonl"
    words = ["--device", "cpu", "--steps", "10", "--pretrain-steps", "10", "--out", str(out)]
    words += ["--backends", "reference,auto"]
    with pytest.raises(SystemExit) as ended:
        curves.main(words)
    assert ended.value.code == 0
    make = lk.LoFTAdamW

    def wrong(model, lr, backend, precision):
        return make(model, lr=lr * (1.5 if backend == "auto" else 1.0), backend=backend)

    monkeypatch.setattr(curves.lk, "LoFTAdamW", wrong)
    with pytest.raises(SystemExit) as ended:
        curves.main(words)
    assert ended.value.code == 1
    rows = [json.loads(line) for line in out.open()]
    assert [row["ok"] for row in rows] == [True, False]
    # "auto" is the C++ backend where it is built: another rounding of the same step.
    assert max(rows[0]["worst_relative_difference"].values()) < 1e-5
