"""Every example runs from its command line, uses LoFT and learns."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from runs import one_thread  # noqa: F401 - an autouse fixture
from torchrun import torchrun

import loft_kernels as lk

for library in ("peft", "transformers"):
    pytest.importorskip(library, reason="the examples need it")

EXAMPLES = Path(__file__).parents[1] / "examples"
IN_PROCESS = {
    "plain_loop.py": ([], None),
    "hf_trainer.py": ([], "accelerate"),
    "trl_sft.py": ([], "trl"),
    "lightning_fit.py": ([], "pytorch_lightning"),
    "accelerate_loop.py": ([], "accelerate"),
    "quantized_base.py --bits 4": (["--bits", "4"], "bitsandbytes"),
    "quantized_base.py --bits 8": (["--bits", "8"], "bitsandbytes"),
}
OTHERS = {"ddp.py", "tiny.py", "finetune.py", "comparison.py", "corpus.py"}  # tested elsewhere


def check_losses(output: str) -> None:
    """The printed losses fall by a third."""
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]
    assert len(losses) >= 4, output
    assert losses[-1] < losses[0] * 2 / 3, losses


@pytest.mark.parametrize("name", IN_PROCESS)
def test_example_learns(name, monkeypatch, capsys, tmp_path):
    arguments, library = IN_PROCESS[name]
    if library:
        pytest.importorskip(library, reason="the example needs it")
    script = name.partition(" ")[0]
    made = []
    original = lk.LoFTAdamW.step

    def step(self, *args, **kwargs):
        made.append(len(self._slots))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(lk.LoFTAdamW, "step", step)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    check_losses(capsys.readouterr().out)
    assert set(made) == {14}, "every step is LoFT's, on every linear layer"
    ours = [str(w.message) for w in caught if "loft_kernels" in w.filename or "LoFT" in str(w)]
    assert ours == []


def test_ddp_example_learns_in_two_processes():
    done = torchrun(EXAMPLES / "ddp.py")
    assert done.returncode == 0, done.stderr[-3000:]
    check_losses(done.stdout)


def test_no_example_is_left_out():
    tested = {name.partition(" ")[0] for name in IN_PROCESS} | OTHERS
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
