"""The sweep of tile sizes: what it tries, what it writes, and what it refuses to write."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

# At the end, so that a copy of the package elsewhere on the path stays in front.
sys.path.append(str(Path(__file__).parents[1]))
from bench import contenders, tile_table, tiles
from loft_kernels.backends.triton import configs
from loft_kernels.backends.triton.configs import MomentTile, RowTile, UpdateTile

HOPPER = configs.HOPPER
PRESENT = configs.row_tile(HOPPER, 32)
FAST, FASTER = replace(PRESENT, warps=1), replace(PRESENT, chunk=1024)
BROKEN = replace(PRESENT, chunk=256)
WORDS = ["--shapes", "tiny", "--layers", "1", "--ranks", "32", "--stages", "rows", "--write"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A copy of the tables that may be written, on a stand-in for a GPU of capability 9.0."""
    path = Path(shutil.copy(configs.PATH, tmp_path / "tiles.json"))
    monkeypatch.setattr(configs, "PATH", path)
    monkeypatch.setattr(tiles, "DEVICE", "cpu")
    monkeypatch.setattr(tiles, "capability", lambda: HOPPER)
    monkeypatch.setattr(tiles, "tried_out", lambda *_: None)
    monkeypatch.setattr(tiles, "agreement", lambda *_: {"parity_error": 1e-4})
    configs.frozen.cache_clear()
    yield path
    configs.frozen.cache_clear()


def sweep_with(monkeypatch, out: Path, times: dict, words=WORDS) -> list[dict]:
    """Run the command with a stand-in for the clock; a time that is an error is raised."""

    def clock(case, tile, args):
        found = times.get(tile, 9.0)
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tiles, "stage_ms", clock)
    with pytest.raises(SystemExit) as ended:
        tiles.main([*words, "--out", str(out)])
    rows = [json.loads(line) for line in out.open()]
    assert ended.value.code == int("ms" not in rows[0])
    return rows


def chosen(rows: list[dict]) -> list[RowTile]:
    return [RowTile(**row["tile"]) for row in rows if row.get("chosen")]


def test_the_fastest_valid_candidate_is_written(table, monkeypatch, tmp_path, capsys):
    before = json.loads(table.read_text())
    times = {PRESENT: 1.0, FAST: 0.9, FASTER: 0.8, BROKEN: RuntimeError("broken\nx")}
    rows = sweep_with(monkeypatch, tmp_path / "rows.jsonl", times)
    assert chosen(rows) == [FASTER]
    assert configs.row_tile(HOPPER, 32) == configs.row_tile(HOPPER, 17) == FASTER
    # Nothing but this entry, and that with its origin.
    after = json.loads(table.read_text())
    entry = after["9.0"]["rows"].pop("32")
    before["9.0"]["rows"].pop("32")
    assert after == before
    assert {"date", "torch"} <= entry["measured"].keys() <= set(tile_table.MEASURED)
    assert configs.row_tile((8, 0), 32) == PRESENT
    assert rows[0]["present"]
    assert [row["error"] for row in rows if "error" in row] == ["RuntimeError: broken"]
    assert all({"commit", "gpu", "command", "architecture", "ranks"} <= row.keys() for row in rows)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert told[0].startswith("   0.8000  chunk=1024 block=16 warps=2  chosen")
    assert told[-1].startswith("        -  chunk=256")
    assert told[-1].endswith("broken")
    assert len(told) == len(rows)


@pytest.mark.parametrize(
    "times",
    [{FASTER: 0.981}, {FASTER: [0.5, 0.99]}, {}],
    ids=["within-noise", "fast-only-once", "slower"],
)
def test_the_present_entry_stays(table, monkeypatch, tmp_path, times):
    text = table.read_text()
    rows = sweep_with(monkeypatch, tmp_path / "rows.jsonl", {PRESENT: 1.0} | times)
    assert chosen(rows) == []
    assert table.read_text() == text


def test_what_fails_parity_is_not_written(table, monkeypatch, tmp_path):
    def judged(case, tile, shapes):
        return {"parity_error": 1.0, "error": "parity"} if tile == FASTER else {}

    monkeypatch.setattr(tiles, "agreement", judged)
    out, text = tmp_path / "rows.jsonl", table.read_text()
    rows = sweep_with(monkeypatch, out, {PRESENT: 1.0, FASTER: 0.5})
    assert chosen(rows) == []
    assert table.read_text() == text
    out.unlink()
    rows = sweep_with(monkeypatch, out, {PRESENT: 1.0, FASTER: 0.5, FAST: 0.7})
    assert chosen(rows) == [FAST]


def test_a_present_entry_that_fails_is_replaced_by_what_runs(table, monkeypatch, tmp_path):
    times = {PRESENT: RuntimeError("out of resources"), FAST: 2.0}
    rows = sweep_with(monkeypatch, tmp_path / "rows.jsonl", times)
    assert configs.row_tile(HOPPER, 32) == FAST == chosen(rows)[0]


def test_nothing_is_written_unasked(table, monkeypatch, tmp_path):
    text = table.read_text()
    rows = sweep_with(
        monkeypatch, tmp_path / "rows.jsonl", {PRESENT: 1.0, FASTER: 0.5}, words=WORDS[:-1]
    )
    assert chosen(rows) == [FASTER]
    assert table.read_text() == text


def test_what_does_not_run_elsewhere_is_not_timed(table, monkeypatch, tmp_path):
    monkeypatch.setattr(
        tiles, "tried_out", lambda case, tile, args: "hung" if tile == FASTER else None
    )
    rows = sweep_with(monkeypatch, tmp_path / "rows.jsonl", {PRESENT: 1.0, FASTER: 0.5})
    assert chosen(rows) == []
    assert [row["error"] for row in rows if "ms" not in row] == ["hung"]


def test_the_file_has_one_form():
    text = configs.PATH.read_text()
    document = json.loads(text)
    assert tile_table.formatted(document) == text
    turned = json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(turned) != list(document)
    assert tile_table.formatted(turned) == text


def test_a_new_architecture_is_entered_and_nonsense_is_not(table):
    row = {"gpu": "NVIDIA A100", "commit": None, "ms": 1.0}
    tile_table.write(table, (8, 0), "rows", 32, FAST, row)
    assert configs.row_tile((8, 0), 32) == FAST
    assert configs.row_tile((8, 6), 32) == PRESENT
    text = table.read_text()
    assert json.loads(text)["8.0"]["rows"]["32"]["measured"] == {"gpu": "NVIDIA A100"}
    with pytest.raises(ValueError, match=r"8\.0: rows: 32: .* chunk is a multiple of block"):
        tile_table.write(table, (8, 0), "rows", 32, RowTile(48, 32, 1), row)
    assert table.read_text() == text


@pytest.mark.parametrize("capability", [HOPPER, (8, 0)], ids=["9.0", "8.0"])
def test_candidates_are_valid_neighbours(monkeypatch, capability):
    monkeypatch.setattr(tiles, "capability", lambda: capability)
    cases = tiles.cases_of(list(tiles.KERNELS), [1, 4, 8, 16, 32, 64, 128])
    hot = "hopper" if capability == HOPPER else "update"
    tables = {max(c.ranks): c.table for c in cases if c.stage == "update"}
    assert tables.pop(128) == "update"
    assert set(tables.values()) == {hot}
    # One tile fits the kernel of 9.0 and ranks 33 to 64.
    moments = [max(c.ranks) for c in cases if c.stage == "moments"]
    assert (64 in tables) == (64 in moments) == (capability != HOPPER)
    assert [c.ranks for c in cases if c.table == "rows"] == [(1, 4, 8, 16), (32,), (64,), (128,)]
    for case in cases:
        found = tiles.candidates(case)
        assert found[0] == configs.entry(capability, case.table, case.width)
        assert len(found) == len(set(found)) >= 4
        assert not any(configs.fault(case.table, case.width, tile) for tile in found)


def test_candidates_change_one_thing_and_what_hangs_on_it(monkeypatch):
    monkeypatch.setattr(tiles, "capability", lambda: HOPPER)
    found = tiles.candidates(tiles.Case("update", "hopper", 16, (16,)))
    assert set(found) == {
        UpdateTile(64, 64, 4, 3, 168),
        UpdateTile(128, 64, 8, 3, 168),
        UpdateTile(64, 32, 4, 3, 168),
        UpdateTile(64, 128, 4, 3, 168),
        UpdateTile(64, 64, 4, 2, 168),
        UpdateTile(64, 64, 4, 4, 168),
        UpdateTile(64, 64, 4, 3, None),
        UpdateTile(64, 64, 4, 3, 128),
    }
    moments = tiles.candidates(tiles.Case("moments", "moments", 4, (4,)))
    assert MomentTile(512, 32, 32, 32, 16, 4, 128) in moments


def test_the_clock_takes_the_stage_and_runs_with_the_tile(table, monkeypatch):
    """Two steps at each of two ranks; times are per step and of the stage's kernels only."""
    seen = []

    def kernels(step, fresh, steps):
        fresh()
        step()
        seen.append(configs.row_tile(HOPPER, 32))
        times = dict.fromkeys(("_gram_kernel", "_solve_kernel", "_basis_kernel", "fill"), 2.0)
        return Counter(times), times

    reference = contenders.CONTENDERS["reference"]
    monkeypatch.setitem(contenders.CONTENDERS, "triton", reference)
    monkeypatch.setattr(tiles.timing, "kernels", kernels)
    args = tiles.options().parse_args([*WORDS, "--steps", "2"])
    case = tiles.Case("rows", "rows", 32, (20, 32))
    assert tiles.stage_ms(case, FAST, args) == 2 * 3 * 2.0 / 2
    assert seen == [FAST, FAST]
    assert configs.row_tile(HOPPER, 32) == PRESENT
    with pytest.raises(RuntimeError, match="no kernel of moments"):
        tiles.stage_ms(replace(case, stage="moments"), FAST, args)


def test_the_gate_looks_at_both_ends_and_both_precisions(monkeypatch):
    seen = []

    def parity(contender, shapes, rank, device):
        seen.append((rank, configs.row_tile((0, 0), rank)))
        return 1e-4 if len(seen) < 4 else float("nan")

    monkeypatch.setattr(tiles, "DEVICE", "cpu")
    monkeypatch.setattr(tiles, "parity", parity)
    ran = []
    monkeypatch.setattr(tiles, "steps", lambda shapes, rank, count, dtype: ran.append(dtype))
    case = tiles.Case("rows", "rows", 32, (32,))
    row = tiles.agreement(case, FAST, [(3, 5)])
    assert seen == [(17, FAST)] * 2 + [(32, FAST)] * 2
    assert ran == [torch.bfloat16] * 2
    # NaN in the last of them fails, too.
    assert "parity" in row["error"]
    seen.clear()
    monkeypatch.setattr(tiles, "parity", lambda *_: 1e-4)
    assert tiles.agreement(case, FAST, [(3, 5)]) == {"parity_error": 1e-4, "parity_limit": 5e-3}


def test_another_process_tries_a_candidate_out(monkeypatch):
    """Without a GPU it fails there, and its last word comes back."""
    case, args = tiles.Case("rows", "rows", 32, (20,)), tiles.options().parse_args(WORDS)
    called = []
    run = subprocess.run

    def listening(words, **options):
        called.append(words)
        return run(words, **options)

    monkeypatch.setattr(tiles.subprocess, "run", listening)
    if not torch.cuda.is_available():
        # What torch says differs between its builds.
        with pytest.raises((AssertionError, RuntimeError)) as refused:
            torch.cuda.init()
        assert str(refused.value).splitlines()[-1] in tiles.tried_out(case, FAST, args)
    monkeypatch.setattr(tiles.subprocess, "run", lambda *_, **__: called.append(1) or Ended(-11))
    assert tiles.tried_out(case, FAST, args) == "exit status -11"
    monkeypatch.setattr(tiles.subprocess, "run", lambda *_, **__: Ended(0))
    assert tiles.tried_out(case, FAST, args) is None

    def hangs(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(tiles.subprocess, "run", hangs)
    assert tiles.tried_out(case, FAST, args) == "no end after 300 s"


class Ended:
    """A process that has ended without a word."""

    stderr = ""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode


def test_what_is_tried_out_is_what_was_asked_for(monkeypatch):
    seen = []

    def steps(shapes, rank, count):
        seen.append((len(shapes), rank, count, configs.row_tile((0, 0), rank)))

    monkeypatch.setattr(tiles, "DEVICE", "cpu")
    monkeypatch.setattr(tiles, "steps", steps)
    case = tiles.Case("rows", "rows", 32, (20, 32))
    tiles.main(
        ["--shapes", "tiny", "--try-out", json.dumps({**asdict(case), "tile": asdict(FAST)})]
    )
    assert seen == [(2, 20, 2, FAST), (2, 32, 2, FAST)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "257"], "--ranks: the tables serve 1 to 256"),
        (["--stages", "solve"], "--stages: solve unknown"),
        (["--steps", "3"], "--steps"),
    ],
)
def test_nonsense_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        tiles.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="none is here"):
        tiles.main([])
