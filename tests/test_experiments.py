"""The paper's experiments: each runs, judges what it should, and is drawn from its numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import one_thread  # noqa: F401 - an autouse fixture

import loft_kernels as lk

ROOT = Path(__file__).parents[1]
# At the end, so that a copy of the package elsewhere on the path stays in front.
sys.path.append(str(ROOT))
for library in ("peft", "transformers", "tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(library, reason="the experiments need it")

import finetune  # noqa: E402 - needs those libraries
import tiny  # noqa: E402 - as above

from bench import record as bench_record  # noqa: E402 - as above
from bench.experiments import (  # noqa: E402 - needs those libraries
    calibration,
    command,
    cross_term,
    dynamics,
    factorisation,
    jobs,
    matrix,
    memory,
    plots,
    record,
    same_curves,
    sections,
    study,
    text,
    transition,
)
from bench.experiments.methods import LOFT, METHODS  # noqa: E402 - as above
from bench.record import environment  # noqa: E402 - as above

TINY = ["--size", "tiny", "--workers", "1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Make a file of random digits, so that scikit-learn need not be here."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 17, (200, 8, 8), generator=rng, dtype=torch.uint8)
    classes = torch.arange(200, dtype=torch.uint8) % 10
    dynamics.numpy.savez(path, images=images.numpy(), classes=classes.numpy())
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits) -> Path:
    """Run every experiment at its tiny size, by its command."""
    folder = tmp_path_factory.mktemp("experiments")
    for name in command.EXPERIMENTS:
        command.main([name, *TINY, "--out", str(folder), "--data", str(digits)])
    return folder


def numbers_of(study_found: dict, name: str) -> list[str]:
    digits = 3 if name == "factorisation" else 4
    return [sections.number(row["test"], digits) for row in study_found["summary"]]


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_experiment_leaves_document_figure_and_section(name, measured):
    path = measured / f"{name}-tiny-cpu.json"
    found = json.loads(path.read_text())
    assert found["command"] == f"python -m bench experiments {name} --size tiny --device cpu"
    assert found["environment"]["torch"] == torch.__version__
    assert found["settings"]["backend"] == "auto"
    assert (measured / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = sections.section(found)
    assert found["command"] in written
    for each in found.get("studies", {}).values():
        assert all(number in written for number in numbers_of(each, name))
        assert all(claim in written for claim in each["claims"] or ())
        assert len(each["rows"]) == len(each["summary"]) * len(each["grid"]) * 2
    for row in found.get("summary", ()):
        loss = row["own_loss"] if name == "memory" else row["alternating"]
        assert sections.number(loss, 4 if name == "memory" else 3) in written


def test_recovery_stays_at_rounding_level(measured):
    rows = json.loads((measured / "factorisation-tiny-cpu.json").read_text())["recovery"]
    assert {row["arithmetic"]: row["ok"] for row in rows} == {"fp64": True, "fp32": True}
    curve = factorisation.recover(
        12, 50, 0.01, seed=0, dtype=torch.float64, device="cpu", backend="auto"
    )
    assert max(curve) < 1e-11


def test_recovery_sees_a_step_that_is_not_adamw(monkeypatch):
    wanted = factorisation.SIZES["tiny"]["recovery"]
    right = lk.reference.virtual_adam_projection

    def wrong(*args, **kwargs):
        return right(*args, **kwargs | {"bias_correction2": 1.0})

    monkeypatch.setattr(lk.reference, "virtual_adam_projection", wrong)
    assert [row["ok"] for row in factorisation.recovery(wanted, "cpu")] == [False, False]


def spoil(monkeypatch, share: float) -> None:
    """Let the C++ backend's steps be too long."""
    right = lk.LoFTAdamW.step

    def step(self, closure=None):
        before = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        right(self)
        if self.backend == "cpu":
            for p, old in zip(
                (p for g in self.param_groups for p in g["params"]), before, strict=True
            ):
                p.data += share * (p.data - old)

    monkeypatch.setattr(lk.LoFTAdamW, "step", step)


def test_a_loss_that_is_no_number_parts_curves():
    curves = {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 2.0), (2, math.nan)], "c": [(1, 2.0), (2, 1.0)]}

    def trained(asked):
        return curves[asked["backend"]]

    found = same_curves.compare(trained, {}, ("a", "b", "c"))
    assert (found["ok"], found["at_step"]) == (False, 2)
    assert same_curves.compare(trained, {}, ("a", "c"))["ok"]


def test_same_curves_passes(tmp_path, digits, capsys):
    words = ["same-curves", *TINY, "--backends", "reference,cpu", "--out", str(tmp_path)]
    command.main([*words, "--data", str(digits)])
    rows = json.loads((tmp_path / "same-curves-tiny-cpu.json").read_text())["rows"]
    assert [row["experiment"] for row in rows] == list(same_curves.RATES)
    assert all(row["ok"] and row["largest_relative_difference"] < 1e-5 for row in rows)
    assert all(row["first"] > row["last"] for row in rows)
    assert "limit" in capsys.readouterr().out


def test_same_curves_sees_a_spoilt_optimizer(tmp_path, digits, monkeypatch):
    spoil(monkeypatch, 0.2)
    words = ["same-curves", *TINY, "--out", str(tmp_path), "--data", str(digits)]
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 1
    rows = json.loads((tmp_path / "same-curves-tiny-cpu.json").read_text())["rows"]
    assert not any(row["ok"] for row in rows if row["experiment"] not in ("text", "dynamics"))
    assert all(row["largest_relative_difference"] > 1e-5 for row in rows)


def test_same_curves_refuses_a_backend_that_hands_its_work_on(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(lk.backends, "choose", lambda backend, pairs: ("reference", "no reason"))
    with pytest.raises(UserWarning, match="reference path"):
        command.main(["same-curves", *TINY, "--out", str(tmp_path), "--data", str(digits)])


def test_plots_need_nothing_but_the_documents(measured, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['loft_kernels'] = None\n"
        "from pathlib import Path\n"
        "from bench.experiments import plots\n"
        "plots.draw_all(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    documents = tmp_path / "documents"
    documents.mkdir()
    for path in measured.glob("*.json"):
        (documents / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", program, str(documents), str(tmp_path / "figures")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in command.EXPERIMENTS:
        again = (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert again == (measured / f"{name}.png").read_bytes()
        assert len(again) < 80_000
    assert set(plots.DRAWN) == set(sections.ABOUT) == {*command.EXPERIMENTS, "same-curves"}


def test_full_size_and_gpu_come_first(tmp_path, measured):
    found = json.loads((measured / "memory-tiny-cpu.json").read_text())
    for place in (("small", "cpu"), ("small", "cuda"), ("full", "cpu"), ("full", "cuda")):
        record.write(found | dict(zip(("size", "device"), place, strict=True)), tmp_path)
        chosen = record.preferred(tmp_path)["memory"]
        assert (chosen["size"], chosen["device"]) == place


def test_every_committed_document_has_its_section():
    documents = record.preferred()
    written = sections.sections()
    assert len(written) == len(documents)
    for found in documents.values():
        (words,) = (text for text in written if found["command"] in text)
        assert found["environment"]["commit"] in words


@pytest.mark.parametrize(("rule", "options"), [("exact", {}), ("identity", {"calibrate": False})])
def test_transported_loft_is_loft_where_both_have_the_rule(rule, options):
    problem = matrix.Problem(20, 14, 5, noise=0.5)
    ends = []
    for make in (
        lambda model: transition.TransportedLoFT(model, lr=0.05, transition=rule),
        lambda model: lk.LoFTAdamW(model, lr=0.05, backend="reference", **options),
    ):
        model = problem.model(LOFT, 3, 0, "cpu", zero=True).double()
        opt, target = make(model), problem.target(0, "cpu").double()
        for _ in range(12):
            weight = model()
            weight.backward((weight - target).detach())
            opt.step()
            opt.zero_grad()
        ends.append(model().detach())
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


def test_rules_between_exact_and_identity_are_neither():
    problem = calibration.SIZES["tiny"]["problem"]
    ends = [
        matrix.train(
            matrix.Problem(**problem), m, 0.03, rank=2, steps=12, seed=0, device="cpu"
        ).curve[-1][1]
        for m in calibration.COMPARED
    ]
    assert len(set(ends)) == len(ends) == 4


def made_up(best: dict[str, float], spread: float, methods: tuple[str, ...] = ("a", "b")):
    """Return a training whose loss is least at a known rate of each method."""

    def train(run: study.Run) -> dict:
        loss = abs(math.log(run.lr / best[run.method])) + spread * run.seed
        loss += methods.index(run.method)
        return {"steps": [0, 1], "curve": [9.0, loss], "validation": loss, "test": loss + 1}

    return train


def test_study_widens_the_grid_for_all_methods_until_the_best_rate_is_inside():
    settings = {"grid": [1.0, 2.0], "seeds": 3, "extensions": 4}
    found = study.study(made_up({"a": 8.0, "b": 1.0}, 0.01), ("a", "b"), settings, 1, "")
    assert found["grid"] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert {row["method"]: row["lr"] for row in found["summary"]} == {"a": 8.0, "b": 1.0}
    assert not any(row["at_edge"] for row in found["summary"])
    assert len(found["rows"]) == 6 * 2 * 3
    a, b = found["summary"]
    assert a["test"] == pytest.approx(1.01)
    assert a["std"] == pytest.approx(0.01)
    # Student's t of two degrees of freedom.
    assert a["high"] - a["test"] == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert found["claims"] == ["a ends below b: 1.01 ± 0.025 against 2.01 ± 0.025"]
    assert b["low"] > a["high"]


def test_study_claims_nothing_where_intervals_meet_and_tells_an_edge():
    settings = {"grid": [1.0, 2.0], "seeds": 3, "extensions": 1}
    found = study.study(made_up({"a": 99.0, "b": 99.0}, 0.9), ("a", "b"), settings, 1, "")
    assert found["claims"] == []
    assert found["grid"] == [1.0, 2.0, 4.0]
    assert all(row["at_edge"] for row in found["summary"])
    assert "4*" in sections.study_table(with_state(found))
    assert "intervals are apart" in sections.study_table(with_state(found))


def with_state(found: dict) -> dict:
    return found | {"summary": [row | {"state_bytes": 4} for row in found["summary"]]}


def test_diverged_runs_lose_and_are_written_as_null():
    def train(run: study.Run) -> dict:
        loss = math.nan if run.lr > 1 else 1.0
        return {"steps": [0], "curve": [loss], "validation": loss, "test": loss}

    settings = {"grid": [1.0, 2.0], "seeds": 2, "extensions": 0}
    found = study.study(train, ("a",), settings, 1, "")
    assert found["summary"][0]["lr"] == 1.0
    assert [row["test"] for row in record.rounded(found)["rows"]] == [1.0, 1.0, None, None]


def test_text_adapts_a_given_model_to_a_given_text(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="finetune.py reads texts with it")
    folder, words = tmp_path / "own", tmp_path / "words.txt"
    finetune.byte_model(16, 0, width=16, layers=1, heads=2).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    words.write_text("\n".join(tiny.tiny_texts(200)))
    small = {"block_size": 16, "batch_size": 2, "held_out_blocks": 8, "steps": 16, "rank": 2}
    small |= {"grid": [1e-3, 1e-2], "seeds": 1, "extensions": 0}
    monkeypatch.setattr(text, "HUB", text.HUB | small | {"steps": 4})
    with pytest.raises(SystemExit, match="held out"):
        command.main(["text", *TINY, "--model", str(folder), "--dataset", str(words)])
    monkeypatch.setattr(text, "HUB", text.HUB | small)
    out = ["--out", str(tmp_path / "out")]
    command.main(["text", *TINY, *out, "--model", str(folder), "--dataset", str(words)])
    found = record.read(tmp_path / "out" / "text-own-tiny-cpu.json")
    rows = found["studies"]["text"]["rows"]
    assert {row["method"] for row in rows} == set(text.COMPARED)
    assert (tmp_path / "out" / "text-own.png").exists()
    # One seed has no interval, so nothing can be claimed.
    assert found["studies"]["text"]["claims"] == []
    assert found["settings"]["dataset"] in sections.section(found)


def test_jobs_in_processes_give_what_one_process_gives(tmp_path):
    settings = factorisation.SIZES["tiny"] | {"device": "cpu", "backend": "reference", "steps": 3}
    train = factorisation.partial(factorisation.train, settings)
    runs = [study.Run(LOFT, 0.1, seed) for seed in range(3)]
    assert jobs.run_all(train, runs, 2, "") == jobs.run_all(train, runs, 1, "")


def test_digits_file_is_what_scikit_learn_brings(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="it brings the digits")
    images, classes = dynamics.digits(tmp_path / "digits.npz")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    again = dynamics.digits(tmp_path / "digits.npz")
    assert torch.equal(images, again[0])
    assert torch.equal(classes, again[1])
    assert images.shape == (1797, 1, 8, 8)
    assert images.max() == 1
    tasks = dynamics.halves(images, classes)
    sizes = {name: [len(y) for _, y in parts.values()] for name, parts in tasks.items()}
    assert sizes == {"pretraining": [541, 180, 180], "adaptation": [538, 179, 179]}


def test_digits_without_scikit_learn_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="--data"):
        dynamics.digits(tmp_path / "absent.npz")


def test_what_benchmarks_write_does_not_make_the_tree_dirty(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("bench/results/x.json", "docs/figures/x.png", "code.py")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GIT_DIR", raising=False)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    for path, dirty in zip(files, (False, False, True), strict=True):
        path.write_text("2")
        bench_record._git.cache_clear()
        assert environment()["dirty"] is dirty, path
    bench_record._git.cache_clear()


def test_every_method_is_what_its_experiment_says():
    compared = {*text.COMPARED, *dynamics.COMPARED, *factorisation.COMPARED, *calibration.COMPARED}
    assert compared == set(METHODS)
    assert set(cross_term.STARTS) == {"B = 0", "B drawn"}
    assert memory.SIZES["full"]["ranks"] == [1, 4, 16, 64]


@pytest.mark.parametrize(
    "words", [["text", "--model", "gpt2"], ["memory", "--model", "a", "--dataset", "b"]]
)
def test_argument_errors_are_told(words):
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
