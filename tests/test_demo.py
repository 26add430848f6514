"""The demo runs from its command line and writes what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the demo needs PEFT")
pytest.importorskip("transformers", reason="the demo needs transformers")
pytest.importorskip("matplotlib", reason="the demo draws")

DEMO = Path(__file__).parents[1] / "examples" / "finetune.py"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), "--device", "cpu", *arguments],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_quick_demo_compares_three_methods(tmp_path):
    done = run_demo("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("held-out loss", "optimizer ms/step", "optimizer state", "LoRA, LoFTAdamW"):
        assert words in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "results.json").read_text())
    assert "LoRA, LoFTAdamW" in json.dumps(record)


def test_argument_errors_are_one_line(tmp_path):
    done = run_demo("--dataset", str(tmp_path / "absent.txt"), "--model", str(tmp_path / "no"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
