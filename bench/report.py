"""Write docs/results.md, its figures and the README's table of speed from the measured rows.

python -m bench report          # after rows were added to bench/results
python -m bench report --check  # fails where a page does not say what the rows say
"""

from __future__ import annotations

import argparse
import difflib
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bench import figures
from bench.quality import accuracy_sections, curve_section
from bench.rows import RESULTS, Row, machine, provenance, read
from bench.tables import (
    by_rank,
    cell,
    end_to_end_rows,
    end_to_end_sections,
    host_rows,
    host_section,
    label,
    number,
    roofline_sections,
    run_rows,
    size,
    speed_sections,
    table,
)

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
SHAPES = "llama-7b"  # what the README shows

INTRODUCTION = """# Results

Made by `python -m bench report` from the rows in `bench/results`, and checked against them by the
tests: change the rows, not this page. Every number is of the newest row of its kind. What is slower
than something else, misses a bar or does not fit stands here like everything else.

| command | what it measures |
| --- | --- |
| `python -m bench run` | whole optimizer steps on a model's shapes, gated by fp64 |
| `python -m bench roofline` | ceilings of the machine and each stage's share of them |
| `python -m bench end-to-end` | training steps of LLaMA-7B with PEFT: pass, optimizer and share |
| `python -m bench accuracy` | one step against fp64 by shape, rank, dtype and history |
| `python -m bench curves` | loss curves of two backends from the same start |
| `python -m bench host` | the CPU's backends side by side |
| `python -m bench experiments NAME` | the paper's experiments, small on a CPU or full on a GPU |
| `pytest bench/ --benchmark-only` | stems of a step one by one, the naive form beside each |

Times are means over steps of both phases with fresh gradients, L2 cache turned over, unless they
say otherwise; kernels alone and stages are timed right after the gradients were made. Wall time
runs from an idle device to an idle device. Rows that were made before a field was measured leave
its place empty."""

HEADINGS = {
    "Speed of a step": (
        "The naive loop is LoFT as its equations read: one adapter after the other, dense m x n "
        "temporaries, r x r blocks. AdamW is not LoFT: it is the floor for touching the adapters. "
        "A share is that of the device time of these steps in the ceiling that it is nearest to. "
        "What bounds each kernel, which goals are missed and what was tried: "
        "[kernels.md](kernels.md)."
    ),
    "Share of the ceilings": (
        "Bytes, operations and special functions of each stage are counted from shapes and rank "
        "(`bench/work.py`) and divided by its time; a cell names the ceiling it is nearest to."
    ),
    "A whole training step": (
        "A randomly drawn model in bf16 with fp32 adapters on q, k, v, up and down; gradients are "
        "clipped, and clipping counts as the optimizer's."
    ),
    "On a CPU": "Backends take turns step by step on one pair; medians.",
    "Accuracy": (
        "The move of a factor, seen in W, from the same state in mid-training; relative to fp64. "
        '"Plain fp32" evaluates the formulas as they stand.'
    ),
    "Loss curves": "Two backends adapt one small model to real text from the same start.",
}
FIGURES = {
    "Speed of a step": "speed.png",
    "Share of the ceilings": "stages.png",
    "Accuracy": "accuracy.png",
    "Loss curves": "curves.png",
}


def experiment_sections() -> list[str]:
    """Collect the sections on the paper's experiments, where that part of the tree is here."""
    name = "bench.experiments.sections"
    if find_spec("bench.experiments") is None or find_spec(name) is None:
        return []
    return list(import_module(name).sections())


def results_page(kinds: dict[str, list[Row]]) -> str:
    """Write docs/results.md."""
    written = {
        "Speed of a step": speed_sections(kinds),
        "Share of the ceilings": roofline_sections(kinds),
        "A whole training step": end_to_end_sections(kinds),
        "On a CPU": host_section(kinds),
        "Accuracy": accuracy_sections(kinds),
        "Loss curves": curve_section(kinds),
    }
    drawn = figures.available(kinds)
    parts = [INTRODUCTION]
    for heading, sections in written.items():
        if not sections:
            continue
        parts += [f"## {heading}", HEADINGS[heading]]
        figure = FIGURES.get(heading)
        if figure in drawn:
            parts.append(f"![{figures.CAPTIONS[figure]}](figures/{figure})")
        parts += sections
    parts += experiment_sections()
    return "\n\n".join(parts) + "\n"


# How the README names the optimizers of a training step.
TRAINED = {
    "loft": "LoFT takes",
    "naive": "the naive loop",
    "adamw": "fused AdamW on the same adapters (not LoFT)",
}


def with_kernels(row: Row | None) -> str:
    """Write a step's wall time and, in brackets, the time that its kernels take alone."""
    whole = cell(row, "ms")
    return f"{whole} ({number(row['kernel_ms'])})" if row and "kernel_ms" in row else whole


def speed_block(kinds: dict[str, list[Row]]) -> str:
    """Write what stands between the README's markers."""
    groups = {k: v for k, v in run_rows(kinds).items() if k[1] == SHAPES and v[0].get("gpu")}
    parts = []
    for (where, _), rows in groups.items():
        parts += [_speed_of(where, rows), *_triton_sentences(rows), provenance(rows)]
    parts += _training_sentences(kinds)
    host = host_rows(kinds)
    if host:
        parts.append(_host_sentence(host))
    return "\n\n".join(parts)


def _speed_of(where: str, rows: list[Row]) -> str:
    """Write the README's table of one machine."""
    ranks = sorted({row["rank"] for row in rows})
    lines = [
        [f"{label(next(iter(found.values())))}, ms", *(with_kernels(found.get(r)) for r in ranks)]
        for found in by_rank(rows).values()
    ]
    own = by_rank(rows).get("triton", {})
    memory = [size(own[r]["peak_extra_bytes"]) if "ms" in own.get(r, {}) else "" for r in ranks]
    if any(memory):
        lines.append(["extra peak memory of a step, Triton", *memory])
    pairs = max(row["pairs"] for row in rows)
    head = (
        f"Whole `opt.step()` on {where}, LLaMA-7B shapes (32 layers; q, k, v, up, down; {pairs} "
        "pairs, fp32\nadapters, fresh gradients every step, mean of both phases, host work "
        "included; in brackets the\nkernels alone):"
    )
    return f"{head}\n\n{table(['', *(f'r={r}' for r in ranks)], lines)}"


def _triton_sentences(rows: list[Row]) -> list[str]:
    """Say what else was measured of the Triton backend."""
    own = [row for row in rows if row["backend"] == "triton" and "host_ms" in row]
    if not own:
        return []
    launches = sorted({row["launches"] for row in own})
    host = sorted(row["host_ms"] for row in own)
    counts = " or ".join(str(count) for count in launches)
    return [
        f"A step of the Triton backend is {counts} launches, whatever the number of pairs, and "
        f"{number(host[0])} to {number(host[-1])} ms\nof host work, part of it hidden behind the "
        "device."
    ]


def _training_sentences(kinds: dict[str, list[Row]]) -> list[str]:
    """Say what the optimizer's share of a whole training step is."""
    said = []
    for (where, layers, hidden, rank, batch, length), rows in end_to_end_rows(kinds).items():
        timed = {row["optimizer"]: row for row in rows if "step_ms" in row}
        shares = ", ".join(
            f"{about} {number(timed[name]['optimizer_ms']['mean'])} ms "
            f"({100 * timed[name]['optimizer_share']:.1f} % of the step)"
            for name, about in TRAINED.items()
            if name in timed
        )
        said.append(
            f"In a training step of a Llama with PEFT on {where} ({layers} layers, hidden "
            f"{hidden}, r={rank}, {batch} x {length} tokens, bf16 base), with clipping: {shares}. "
            f"{provenance(rows)}"
        )
    return said


def _host_sentence(rows: list[Row]) -> str:
    """Say how the CPU's backends compare."""
    first = rows[0]
    times = ", ".join(
        f"r={row['rank']} {number(row['median_ms']['cpu'])} ms in C++ and "
        f"{number(row['median_ms']['reference'])} ms on the reference path"
        for row in rows
    )
    memory = max(row["first_step_peak_extra_bytes"]["cpu"] for row in rows)
    return (
        f"On {machine(first)}, one {first['size']} x {first['size']} pair, fp32, median of "
        f"{first['steps']} steps that take turns: {times}. A first step in C++ added up "
        f"to {size(memory)} to the process, its state included. {provenance(rows)}"
    )


def with_block(readme: str, block: str) -> str:
    """Replace what stands between the markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def pages(root: Path, kinds: dict[str, list[Row]]) -> dict[Path, str]:
    """Return what every page should say."""
    readme = root / "README.md"
    return {
        root / "docs" / "results.md": results_page(kinds),
        readme: with_block(readme.read_text(), speed_block(kinds)),
    }


def differences(root: Path, kinds: dict[str, list[Row]]) -> list[str]:
    """List the lines that a page says and the rows do not, or the other way round."""
    found = []
    for page, wanted in pages(root, kinds).items():
        says = page.read_text() if page.exists() else ""
        name = page.relative_to(root).as_posix()
        found += difflib.unified_diff(
            says.splitlines(), wanted.splitlines(), name, f"{name} from the rows", lineterm="", n=0
        )
    folder = root / "docs" / "figures"
    found += [
        f"docs/figures/{name} is missing"
        for name in figures.available(kinds)
        if not (folder / name).exists()
    ]
    return found


def main(argv: list[str] | None = None) -> None:
    """Write the pages, or compare them with the rows and exit with 1 where they differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail on differences")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the tree with the pages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args(argv)
    kinds = read(args.results)
    if args.check:
        found = differences(args.root, kinds)
        print("\n".join(found) or "the pages say what the rows say")
        sys.exit(int(bool(found)))
    for page, text in pages(args.root, kinds).items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
    for file in figures.draw(kinds, args.root / "docs" / "figures"):
        print(f"{file.relative_to(args.root)}: {file.stat().st_size / 1000:.0f} kB")
