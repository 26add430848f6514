"""The pages say what the rows say, and a page that does not is found out."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

# At the end, so that a copy of the package elsewhere on the path stays in front.
sys.path.append(str(Path(__file__).parents[1]))
from bench import figures, report, rows, tables

ROOT = Path(__file__).parents[1]


def check(root: Path, results: Path = rows.RESULTS) -> tuple[int, list[str]]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        report.main(["--check", "--root", str(root), "--results", str(results)])
    return ended.value.code, said.getvalue().splitlines()


@pytest.fixture
def copied(tmp_path) -> Path:
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_the_pages_say_what_the_rows_say():
    code, said = check(ROOT)
    assert code == 0, "run `python -m bench report`:\n" + "\n".join(said)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_a_changed_number_is_seen(page, copied):
    file = copied / page
    text = file.read_text()
    at = text.index("| Triton backend") + text[text.index("| Triton backend") :].index("4")
    file.write_text(text[:at] + "3" + text[at + 1 :])
    code, said = check(copied)
    assert code == 1
    assert any(line.startswith("-| Triton backend") for line in said)
    assert any(line.startswith("+| Triton backend") for line in said)


def test_a_missing_figure_is_seen(copied):
    (copied / "docs" / "figures" / "accuracy.png").unlink()
    code, said = check(copied)
    assert (code, len(said)) == (1, 1)
    assert said[0].endswith("is missing")


def test_text_outside_the_markers_is_free(copied):
    readme = copied / "README.md"
    readme.write_text(readme.read_text().replace("## Speed", "## Speed and so on"))
    assert check(copied)[0] == 0


def test_the_newest_row_counts(tmp_path, copied):
    """A row with a date beats one without, whatever the names of the files."""
    results = tmp_path / "rows"
    results.mkdir()
    old = [row for row in rows.read()["run"] if row["backend"] == "triton"][:1]
    (results / "z.jsonl").write_text(json.dumps(old[0]) + "\n")
    new = {**old[0], "bench": "run", "layers": None, "date": "2030-01-01T00:00:00+00:00"}
    new |= {"ms": dict.fromkeys(("p20", "p50", "p80", "mean"), 1.25), "command": "new command"}
    (results / "a.jsonl").write_text(json.dumps(new) + "\n")
    block = report.speed_block(rows.read(results))
    assert "| 1.25 (" in block
    assert "`new command`" in block
    assert "z.jsonl" not in block


def fake(backend: str, rank: int, ms: float | None = None, **fields) -> rows.Row:
    row = {"bench": "run", "shapes": "llama-7b", "layers": None, "backend": backend, "rank": rank}
    row |= {"pairs": 160, "needed_bytes": 125e9, "gpu": "GPU X", "threads": 1, "commit": "abc"}
    row |= {"dirty": False, "torch": "2", "file": "f.jsonl", "command": "c", "date": "2030"}
    if ms is not None:
        row["ms"] = dict.fromkeys(("p20", "p50", "p80", "mean"), ms)
    return row | fields


def test_losing_cases_are_shown():
    members = [
        fake("triton", 16, 8.0),
        fake("adamw", 16, 2.0),
        fake("naive", 16, 500.0),
        fake("dense-compiled", 16, error="parity 1.0e+00 > 0.01: not timed"),
        fake("triton", 64, skipped="needs 125.0 GB, the device has 100.0 GB"),
    ]
    (section,) = tables.speed_sections({"run": members})
    assert "by factors of 4 at r=16" in section
    assert "does not fit (125 GB)" in section
    assert "| not timed |" in section
    assert "at r=16: parity 1.0e+00 > 0.01: not timed" in section
    assert "at r=64: needs 125.0 GB" in section
    assert "naive loop over adapters, dense m x n, fp32 | 500 |" in section


def test_a_step_has_its_share_of_the_ceilings_of_its_machine():
    # Of 10 ms an entry of the weights takes a quarter, with a root and half a reciprocal each.
    entries = 32 * (3 * 4096**2 + 2 * 4096 * 11008)
    row = fake("triton", 4, 8.0, layers=None, device_ms={"mean": 10.0})
    tops = {"bytes": 1e15, "flop16": 1e18, "flop64": 1e18, "special": entries * 1.5 * 400}
    roof = {**row, "bench": "roofline", "ceilings": tops}
    (section,) = tables.speed_sections({"run": [row], "roofline": [roof]})
    assert "| share of its ceiling | 25 % special |" in section
    elsewhere = {**roof, "gpu": "GPU Y"}
    (section,) = tables.speed_sections({"run": [row], "roofline": [elsewhere]})
    assert "share of its ceiling" not in section


def test_every_kind_of_row_has_its_section(tmp_path):
    pytest.importorskip("matplotlib", reason="the report draws figures")
    base = fake("triton", 16, 8.0, ceilings={"bytes": 4.2e12, "flop16": 7.5e14, "special": 3e12})
    roof = {**base, "bench": "roofline", "device": "cuda", "step": {"ms": 8.0}, "kernel_ms": 7.0}
    roof["stages"] = {k: {"ms": v} for k, v in (("gram", 1.0), ("update", 6.0), ("other", 0.1))}
    keys = ("forward_backward_ms", "optimizer_ms", "step_ms", "wall_ms")
    times = {key: {"mean": 10.0} for key in keys}
    whole = {**base, "bench": "end-to-end", "hidden": 4096, "layers": 32, "batch": 16}
    whole |= {"length": 256, "optimizer": "loft", "optimizer_share": 0.021, **times}
    kinds = {"run": [base, fake("triton", 4, 4.0)], "roofline": [roof], "end-to-end": [whole]}
    page = report.results_page(kinds)
    # 12 r bytes of 1,753,088 rows, in a millisecond at 4.2 TB/s.
    assert "| `gram` | 1 (8 % bytes) |" in page
    assert "| `other` | 0.1 |" in page
    assert "4.2 TB/s copied, 750 TFLOP/s in fp16, 3 T special functions/s" in page
    assert "| loft (triton) | 10 | 10 | 10 | 10 | 2.1 % |" in page
    drawn = figures.draw(kinds, tmp_path)
    assert [file.name for file in drawn] == ["speed.png", "stages.png"]


def test_sections_on_experiments_are_appended_where_they_exist(monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.experiments", None)
    assert report.experiment_sections() == []
    for name in ("bench.experiments", "bench.experiments.sections"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.sections = lambda: ["## From the paper\n\nA table."]
    assert report.results_page({}).endswith("\n\n## From the paper\n\nA table.\n")


def test_committed_figures_are_small():
    files = list((ROOT / "docs" / "figures").glob("*.png"))
    assert files
    assert max(file.stat().st_size for file in files) < 80_000


def test_micro_benchmarks_run_once():
    """They are no tests of their own: `make test` does not collect them."""
    pytest.importorskip("pytest_benchmark")
    words = ["bench", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--size", "24", "--rank", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "failed" not in done.stdout
