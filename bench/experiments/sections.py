"""The experiments in words and tables, from their JSON documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from statistics import fmean
from typing import Any

from bench.experiments import record

FULL = "full AdamW"
TITLES = {
    "factorisation": "Matrix factorisation (the paper's Figure 2)",
    "text": "Text, and which of LoFT's parts it needs (Figure 7)",
    "dynamics": "Training dynamics of a vision transformer (Figure 5)",
    "cross-term": "The cross term of simultaneous updates",
    "memory": "Memory of the second moment against fidelity",
    "calibration": "Is calibration needed?",
    "same-curves": "Backends give the same loss curves",
}
ABOUT = {
    "factorisation": (
        "A weight is fitted to a matrix T of low rank under the squared loss, from W = 0, every "
        "method at every rate of one grid. At m = n = r LoFT's weight is compared with that of "
        "torch's AdamW after every step, the worst of several seeds."
    ),
    "text": (
        "A pretrained language model is adapted to other text. Each method's learning rate is the "
        "best of one grid by mean validation loss; the loss shown, in nats per token, is that of a "
        "test part. Full AdamW trains every weight, embeddings and norms included; adapters sit on "
        "the linear layers. Seeds change the adapter's start and the order of the batches."
    ),
    "dynamics": (
        "A vision transformer pretrained on the digits 0 to 4 is adapted to 5 to 9, with a new "
        "head. Each method's learning rate is the best of one grid by mean validation loss; loss "
        "and accuracy shown are those of a test part."
    ),
    "cross-term": (
        "LoFT without alternation moves both factors at once, which adds dB dA to the change of "
        "the weight. Its share is relative to the first-order part dB A + B dA; its effect is what "
        "it changes in the loss, in parts of the loss before the step (above zero: it harms). "
        "Simultaneous updates move two factors a step where alternating ones move one."
    ),
    "memory": (
        "A noisy matrix problem of slowly falling spectrum, trained by the full weight, LoRA, and "
        "LoFT with the full and the elementwise second moment (simple). Loss and distance to full "
        "AdamW's weight are taken at full AdamW's best rate (the distance also at every rate of "
        "the grid, on average), and the loss at the method's own best rate; the last column is the "
        "least that a weight of this rank can reach."
    ),
    "calibration": (
        "LoFT with four transitions of its moments between subspaces: the exact C, (C + I) / 2, "
        "the diagonal of C, and the identity, all in the factor's own coordinates. Learning rates "
        "are the best of one grid, on text by mean validation loss, on the noisy matrix by the "
        "loss itself."
    ),
    "same-curves": (
        "The same run of LoFT by several backends, from the same weights and batches; the largest "
        "relative difference of two losses at a logged step."
    ),
}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    """Write a number; a loss that is not finite is written as diverged."""
    return "diverged" if value is None else f"{value:.{digits}g}"


def size(count: float) -> str:
    """Write bytes in MiB."""
    return f"{count / 2**20:.3g} MiB"


def study_table(study: Mapping[str, Any], reported: str = "test loss") -> str:
    """Lay out a study: every method at its best rate, and what can be claimed of it."""
    rates = {row["method"]: row["lr"] for row in study["summary"]}
    shared = rates.get(FULL)
    has_accuracy = "accuracy" in study["summary"][0]
    head = ["method", "best lr", reported, "std", "95 % interval", "optimizer state"]
    head += ["accuracy"] * has_accuracy
    if shared is not None:
        head.append(f"at lr {shared:g}")
    rows = []
    for row in study["summary"]:
        cells = [
            row["method"],
            f"{row['lr']:g}" + ("*" if row["at_edge"] else ""),
            number(row["test"]),
            number(row["std"], 2),
            f"{number(row['low'])} to {number(row['high'])}",
            size(row["state_bytes"]),
        ]
        if has_accuracy:
            cells.append(f"{100 * row['accuracy']:.1f} %")
        if shared is not None:
            cells.append(number(mean_end(study, row["method"], shared)))
        rows.append(cells)
    parts = [table(head, rows)]
    if shared is not None:
        parts.append(f"The last column is every method at full AdamW's best rate, {shared:g}.")
    if any(row["at_edge"] for row in study["summary"]):
        parts.append("\\* the best rate is the first or last of the grid.")
    seeds = study["summary"][0]["seeds"]
    grid = ", ".join(f"{lr:g}" for lr in study["grid"])
    parts.append(f"{seeds} seeds; learning rates {grid}.")
    parts.append(claims(study["claims"]))
    return "\n\n".join(parts)


def claims(found: Sequence[str] | None) -> str:
    """List the pairs that separate, and say that the others do not; None claims nothing."""
    if found is None:
        return "The best rate was chosen by the loss shown, so nothing is claimed."
    if not found:
        return "No two methods' 95 % intervals are apart."
    listed = "\n".join(f"* {claim}" for claim in found)
    return f"Pairs whose 95 % intervals are apart; no other pair's are:\n\n{listed}"


def average(values: Sequence[float | None]) -> float | None:
    """Average over seeds or rates; None where one diverged."""
    return None if None in values else fmean(values)


def mean_end(study: Mapping[str, Any], method: str, lr: float) -> float | None:
    """Average what the seeds end at."""
    return average([r["test"] for r in study["rows"] if r["method"] == method and r["lr"] == lr])


def grid_table(study: Mapping[str, Any]) -> str:
    """Lay out the mean loss at the end at every rate, and how near a curve is to full AdamW's."""
    head = ["loss at the end", *(f"lr {lr:g}" for lr in study["grid"]), "lowest", "apart"]
    rows = []
    for row in study["summary"]:
        ends = [mean_end(study, row["method"], lr) for lr in study["grid"]]
        lowest = min(end for end in ends if end is not None)
        apart = number(apart_from_full(study, row["method"]), 2)
        rows.append([row["method"], *(number(x, 3) for x in (*ends, lowest)), apart])
    return (
        table(head, rows)
        + "\n\nApart: how far a loss curve is from full AdamW's at the same rate and "
        "seed, in powers of ten, on average over steps, rates and seeds."
    )


def apart_from_full(study: Mapping[str, Any], method: str) -> float:
    """Average ``|log10(loss / full AdamW's loss)|`` over the curves of equal rates and seeds."""
    curves = {(r["method"], r["lr"], r["seed"]): r["curve"] for r in study["rows"]}
    return fmean(
        abs(log10(a / b))
        for (name, lr, seed), curve in curves.items()
        if name == method
        for a, b in zip(curve, curves[FULL, lr, seed], strict=True)
        if a and b
    )


def recovery_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the recovery of AdamW at full rank."""
    head = ["m = n = r", "largest distance", "at the last step", "limit", "within"]
    cells = [
        [
            row["arithmetic"],
            number(row["largest"], 2),
            number(row["last"], 2),
            "none" if row["limit"] is None else f"{row['limit']:g}",
            "yes" if row["ok"] else "**no**",
        ]
        for row in rows
    ]
    return table(head, cells)


def cross_term_table(found: record.Document) -> str:
    """Lay out the cross term, one row per rate."""
    head = ["start", "lr", "share, median step", "largest", "effect a step"]
    head += ["loss, simultaneous", "loss, alternating"]
    keys = "share", "largest_share", "effect", "simultaneous", "alternating"
    rows = [
        [row["start"], f"{row['lr']:g}", *(number(row[key], 3) for key in keys)]
        for row in found["summary"]
    ]
    return table(head, rows) + f"\n\nMeans over {found['settings']['seeds']} seeds."


def memory_table(found: record.Document) -> str:
    """Lay out memory against fidelity, one row per method and rank."""
    lr = found["summary"][0]["lr_of_full"]
    distances: dict[tuple[str, int], list[float]] = {}
    for row in found["rows"]:
        distances.setdefault((row["method"], row["rank"]), []).append(row["distance"])
    head = ["method", "r", "optimizer state", f"loss at lr {lr:g}", "distance to full AdamW"]
    head += ["at every rate", "own best lr", "loss there", "least of this rank"]
    rows = [
        [
            row["method"],
            row["rank"] or "",
            size(row["state_bytes"]),
            number(row["loss"]),
            number(row["distance"], 3),
            number(average(distances[row["method"], row["rank"]]), 3),
            f"{row['own_lr']:g}" + ("*" if row["at_edge"] else ""),
            number(row["own_loss"]),
            number(row["least_loss"]),
        ]
        for row in found["summary"]
    ]
    note = f"\n\nMeans over {found['settings']['seeds']} seeds."
    if any(row["at_edge"] for row in found["summary"]):
        note += " \\* the first or last rate of the grid."
    return table(head, rows) + note


def same_curves_table(found: record.Document) -> str:
    """Lay out how far the backends' curves part."""
    backends = " and ".join(found["settings"]["backends"])
    head = [f"{backends}, {found['settings']['steps']} steps", "lr", "loss", "largest difference"]
    rows = [
        [
            row["experiment"],
            f"{row['lr']:g}",
            f"{number(row['first'])} to {number(row['last'])}",
            f"{number(row['largest_relative_difference'], 2)} at step {row['at_step']}"
            + ("" if row["ok"] else " **above the limit**"),
        ]
        for row in found["rows"]
    ]
    return table(head, rows) + f"\n\nThe limit is {found['rows'][0]['limit']:g}."


def numbers(found: record.Document) -> str:
    """Lay out every table of a document."""
    kind = record.kind(found)
    own = {"cross-term": cross_term_table, "memory": memory_table, "same-curves": same_curves_table}
    if kind in own:
        return own[kind](found)
    if kind == "factorisation":
        study = found["studies"]["matrix"]
        seeds = f"{study['summary'][0]['seeds']} seeds."
        return "\n\n".join([grid_table(study), seeds, recovery_table(found["recovery"])])
    several = len(found["studies"]) > 1
    parts = []
    for name, study in found["studies"].items():
        reported = "loss at the end" if name == "matrix" else "test loss"
        parts += [f"On {name}:"] * several + [study_table(study, reported)]
        if name == "matrix":
            parts.append(grid_table(study))
    return "\n\n".join(parts)


def measured_on(found: record.Document) -> str:
    """Say by which command, on what and at which commit a document was measured."""
    where = found["environment"]
    machine = where["gpu"] if found["device"] == "cuda" else "a CPU"
    commit = f"{where['commit']}{' with changes' if where['dirty'] else ''}"
    return f"`{found['command']}`, on {machine}, torch {where['torch']}, commit {commit}."


def section(found: record.Document) -> str:
    """Write the section of one document."""
    kind = record.kind(found)
    title = TITLES[kind]
    if "model" in found["settings"]:
        title += f": {found['settings']['model']} on {found['settings']['dataset']}"
    parts = [f"## {title}", ABOUT[kind], measured_on(found), numbers(found)]
    if (record.FIGURES / f"{found['name']}.png").exists():
        parts.append(f"![{title}](figures/{found['name']}.png)")
    return "\n\n".join(parts)


def sections() -> list[str]:
    """Write a Markdown section per experiment, from the largest document of each."""
    order = list(TITLES)
    documents = record.preferred().values()
    return [section(x) for x in sorted(documents, key=lambda x: order.index(record.kind(x)))]
