"""The command line: what it prints, when it fails, and what the memory figures are."""

from __future__ import annotations

import os

import pytest
import torch
from problems import make_adapter

import loft_kernels as lk
from loft_kernels import backends, cli, selftest
from loft_kernels.shapes import SHAPE_SETS


def test_report_names_every_backend_and_one_choice(capsys):
    assert cli.main(["report"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}: " in text for name in backends.NAMES if name != "auto")
    assert torch.__version__ in text


def test_selftest_fails_on_a_wrong_step_and_names_it(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[1:2])
    assert cli.main(["selftest"]) == 0
    real = lk.LoFTAdamW.step

    def wrong(self):
        real(self)
        if self.backend != "reference" or self.param_groups[0]["params"][0].dtype != torch.float64:
            self.param_groups[0]["params"][0].data.mul_(1 + 1e-4)

    monkeypatch.setattr(lk.LoFTAdamW, "step", wrong)
    assert cli.main(["selftest"]) == 1
    assert "r8, step 1: 0.lora_B has error" in capsys.readouterr().out


def test_cases_of_one_rank_and_dtype_are_checked_together():
    kinds = selftest._that_share_kernels(selftest.CASES)
    assert sorted(c.name for cases in kinds for c in cases) == sorted(
        c.name for c in selftest.CASES
    )
    shared = [{(max(s[2] for s in c.shapes), c.dtype) for c in cases} for cases in kinds]
    assert all(len(kind) == 1 for kind in shared)
    assert len(set.union(*shared)) == len(kinds)


def test_cases_are_checked_in_other_processes(monkeypatch):
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[-2:])
    here = []
    real = selftest._check_all
    monkeypatch.setattr(selftest, "_check_all", _report_process)
    assert os.getpid() not in {int(line) for line in selftest.side_by_side("reference", "cpu")}
    monkeypatch.setattr(selftest, "_check_all", lambda *args: here.append(args) or real(*args))
    monkeypatch.setattr(selftest, "ProcessPoolExecutor", _no_processes)
    with pytest.warns(UserWarning, match="one after the other: no more processes"):
        assert selftest.side_by_side("reference", "cpu") == []
    assert here == [("reference", selftest.CASES, "cpu")]


def _report_process(*_):
    return [str(os.getpid())]


def _no_processes(*_):
    raise OSError("no more processes")


def test_selftest_fails_where_a_required_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "CASES", ())
    monkeypatch.setattr(backends, "cpu_missing", lambda: "a reason")
    assert cli.main(["selftest", "--require", "reference,cpu"]) == 1
    text = capsys.readouterr().out
    assert "cpu: not here, a reason" in text
    assert "required: cpu" in text


def test_without_the_extension_auto_is_the_reference_path_and_cpu_an_error(monkeypatch):
    monkeypatch.setattr(backends, "cpu_missing", lambda: "a reason")
    module = make_adapter(6, 5, 2, 1)
    opt = lk.LoFTAdamW(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    assert opt._choose_backend(opt._gather(allocate=True)[0]) == ("reference", "")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: a reason"):
        lk.LoFTAdamW(module, backend="cpu")


def test_memory_is_what_the_optimizer_allocates(capsys):
    module = make_adapter(40, 30, 4, 1).float()
    opt = lk.LoFTAdamW(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    held = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())
    assert cli.main(["memory", "--shapes", "40x30," * 99 + "40x30", "--rank", "4"]) == 0
    assert f"LoFT state        {100 * held / 2**20:10.1f} MiB" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHAPE_SETS)
def test_memory_knows_every_shape_set(name, capsys):
    assert cli.main(["memory", "--shapes", name, "--rank", "4"]) == 0
    assert f"{len(SHAPE_SETS[name].pairs())} pairs, rank 4:" in capsys.readouterr().out


def test_mistral_has_the_shapes_of_its_configuration():
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig()
    key_value = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    known = SHAPE_SETS["mistral-7b"]
    assert known.layers == config.num_hidden_layers
    assert known.per_layer[1] == (key_value, config.hidden_size)
    assert known.per_layer[-1] == (config.hidden_size, config.intermediate_size)


@pytest.mark.parametrize(
    "words", [["--shapes", "lama", "--rank", "4"], ["--shapes", "gpt2", "--rank", "0"]]
)
def test_memory_refuses_what_it_cannot_count(words, capsys):
    assert cli.main(["memory", *words]) == 2
    assert capsys.readouterr().out
