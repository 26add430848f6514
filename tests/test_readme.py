"""The README's script for a Trainer, followed to the letter by someone new."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import one_thread  # noqa: F401 - an autouse fixture

import loft_kernels as lk

peft = pytest.importorskip("peft", reason="the script needs it")
transformers = pytest.importorskip("transformers", reason="the script needs it")

from tiny import TinyDataset, tiny_model  # noqa: E402 - needs transformers

ROOT = Path(__file__).parents[1]


def trainer_diff() -> list[str]:
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block.splitlines()


def test_three_changed_lines_turn_a_trainer_script_into_loft(tmp_path, monkeypatch):
    lines = trainer_diff()
    added = [line for line in lines if line.startswith("+")]
    assert len(added) <= 3
    monkeypatch.chdir(tmp_path)
    names = {
        "get_peft_model": peft.get_peft_model,
        "LoraConfig": peft.LoraConfig,
        "TrainingArguments": transformers.TrainingArguments,
        "Trainer": transformers.Trainer,
        "base_model": tiny_model(),
        "dataset": TinyDataset(),
    }
    script = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    exec(compile(script, "README.md", "exec"), names)
    optimizer = names["trainer"].optimizer.optimizer
    assert isinstance(optimizer, lk.LoFTAdamW)
    assert len(optimizer._slots) == 14
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {names["trainer"].state.global_step}
    assert optimizer.max_grad_norm == 1.0


def test_the_script_before_the_change_runs_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "get_peft_model": peft.get_peft_model,
        "LoraConfig": peft.LoraConfig,
        "TrainingArguments": transformers.TrainingArguments,
        "Trainer": transformers.Trainer,
        "base_model": tiny_model(),
        "dataset": TinyDataset(8),
    }
    script = "\n".join(line[1:] for line in trainer_diff() if not line.startswith("+"))
    exec(compile(script, "README.md", "exec"), names)
    assert not isinstance(names["trainer"].optimizer.optimizer, lk.LoFTAdamW)


@pytest.mark.parametrize("page", ["README.md", "docs/frameworks.md", "docs/results.md"])
def test_every_linked_file_exists(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
