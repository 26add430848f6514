"""Tables of speed: whole steps, the share of the ceilings, training steps, CPU backends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.cases import SHAPE_SETS
from bench.contenders import CONTENDERS
from bench.rows import Row, grouped, machine, newest, provenance
from bench.work import STAGES, Work, share, work_of

UNITS = {"bytes": ("TB/s", 1e12), "special": ("T special functions/s", 1e12)}


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table; the first column is text, the others are numbers."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def number(value: float) -> str:
    """Write a number with three digits that count."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.1e}"


def size(count: float) -> str:
    """Write a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{number(count / factor)} {unit}"
    return f"{count:.0f} B"


def run_rows(kinds: dict[str, list[Row]]) -> dict[tuple[str, str], list[Row]]:
    """Group the newest row of every optimizer and rank by machine and shapes, whole models only."""
    rows = newest(
        (row for row in kinds.get("run", []) if not row.get("layers")),
        lambda row: (machine(row), row["shapes"], row["backend"], row["rank"]),
    )
    return grouped(rows, lambda row: (machine(row), row["shapes"]))


def label(row: Row) -> str:
    """Name an optimizer; what an older row timed of it only in part says so."""
    contender = CONTENDERS.get(row["backend"])
    name = contender.about if contender else str(row["backend"])
    if row.get("part"):
        name = f"dense m x n, tf32, torch.compile, {row['part']}, not checked"
    return name


def cell(row: Row | None, key: str) -> str:
    """Write one time of a row in milliseconds, or why there is none."""
    if row is None or (key not in row and not row.keys() & {"skipped", "error"}):
        return ""
    if "skipped" in row:
        return f"does not fit ({size(row['needed_bytes'])})"
    if "error" in row:
        return "not timed"
    value = row[key]
    return number(value["mean"] if isinstance(value, dict) else value)


def by_rank(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Sort rows of one machine and shape set by optimizer, in the order of the contenders."""
    order = list(CONTENDERS)
    backends = sorted(
        {row["backend"] for row in rows}, key=lambda b: order.index(b) if b in order else 99
    )
    return {b: {row["rank"]: row for row in rows if row["backend"] == b} for b in backends}


def step_table(rows: list[Row]) -> str:
    """Tabulate wall times of whole steps: optimizers by rank."""
    ranks = sorted({row["rank"] for row in rows})
    lines = [
        [label(next(iter(found.values()))), *(cell(found.get(r), "ms") for r in ranks)]
        for found in by_rank(rows).values()
    ]
    return table(["ms, host work included", *(f"r={r}" for r in ranks)], lines)


def ceilings_of(kinds: dict[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Return the newest ceilings of every machine."""
    return {machine(row): row["ceilings"] for row in kinds.get("roofline", [])}


def step_share(row: Row, tops: dict[str, float]) -> str:
    """Write what share of the nearest ceiling a whole step reaches in its time on the GPU."""
    shapes = SHAPE_SETS[row["shapes"]].pairs(row["layers"])
    work = sum(work_of(shapes, row["rank"], gpu=True).values(), Work())
    found = share(work, row["device_ms"]["mean"], tops, "flop16")
    return f"{100 * found['share']:.0f} % {found['bound']}"


def detail_table(found: dict[int, Row], tops: dict[str, float]) -> str:
    """Tabulate everything that is known of one backend's steps: quantities by rank."""

    def spread(row: Row, key: str) -> str:
        return " / ".join(number(row[key][q]) for q in ("p20", "p50", "p80"))

    quantities = {
        "wall time, ms, p20 / p50 / p80": lambda row: spread(row, "ms"),
        "device time, ms, p20 / p50 / p80": lambda row: spread(row, "device_ms"),
        "kernels alone, ms": lambda row: number(row["kernel_ms"]),
        "host work, ms": lambda row: number(row["host_ms"]),
        "launches": lambda row: str(row["launches"]),
        "optimizer state": lambda row: size(row["state_bytes"]),
        "extra peak memory of a step": lambda row: size(row["peak_extra_bytes"]),
        "share of its ceiling": lambda row: step_share(row, tops) if "flop16" in tops else "",
        "parity error": lambda row: f"{row['parity_error']:.1e}",
    }
    ranks = sorted(found)
    lines = []
    for name, write in quantities.items():
        cells = []
        for rank in ranks:
            try:
                cells.append(write(found[rank]))
            except KeyError:  # an older row, or one that was not timed
                cells.append("")
        if any(cells):
            lines.append([name, *cells])
    return table(["", *(f"r={r}" for r in ranks)], lines)


def speed_sections(kinds: dict[str, list[Row]]) -> list[str]:
    """Write the section of every machine and shape set."""
    sections, tops = [], ceilings_of(kinds)
    for (where, shapes), rows in run_rows(kinds).items():
        pairs = max(row["pairs"] for row in rows)
        known = SHAPE_SETS.get(shapes)
        parts = [
            f"### {known.about if known else shapes}; {pairs} pairs, on {where}",
            step_table(rows),
            *losses(rows),
        ]
        for name, found in by_rank(rows).items():
            if name in ("triton", "cpu"):
                table_of = detail_table(found, tops.get(where, {}))
                parts += [f"The {CONTENDERS[name].about} in detail:", table_of]
        sections.append("\n\n".join([*parts, provenance(rows)]))
    return sections


def losses(rows: list[Row]) -> list[str]:
    """Say where the library's own backend is not the fastest, and what was not timed."""
    sorted_rows = by_rank(rows)
    own = sorted_rows.get("triton") or sorted_rows.get("cpu") or {}
    said = []
    for found in sorted_rows.values():
        ratios = {
            rank: own[rank]["ms"]["mean"] / row["ms"]["mean"]
            for rank, row in found.items()
            if row is not own.get(rank) and "ms" in row and "ms" in own.get(rank, {})
        }
        slower = {rank: ratio for rank, ratio in ratios.items() if ratio > 1}
        if slower:
            times = ", ".join(f"{number(v)} at r={rank}" for rank, v in sorted(slower.items()))
            rival = label(next(iter(found.values())))
            said.append(f"Faster than LoFT's step: {rival}, by factors of {times}.")
    for row in rows:
        if reason := row.get("skipped") or row.get("error"):
            # An allocator's message goes on about its settings.
            said.append(f"Not timed: {label(row)} at r={row['rank']}: {reason.split('. ')[0]}.")
    return ["\n".join(f"* {line}" for line in said)] if said else []


def ceiling_line(tops: dict[str, float]) -> str:
    """Write what a machine was measured to do at most."""
    parts = []
    for name, value in tops.items():
        unit, factor = UNITS.get(name, (f"TFLOP/s in fp{name.removeprefix('flop')}", 1e12))
        parts.append(f"{number(value / factor)} {unit}{' copied' if name == 'bytes' else ''}")
    return ", ".join(parts)


def roofline_sections(kinds: dict[str, list[Row]]) -> list[str]:
    """Write each stage's time and its share of the ceiling that it is nearest to."""
    rows = newest(
        (row for row in kinds.get("roofline", []) if "step" in row and not row["layers"]),
        lambda row: (machine(row), row["shapes"], row["rank"]),
    )
    sections = []
    for (where, shapes), members in grouped(rows, lambda r: (machine(r), r["shapes"])).items():
        members.sort(key=lambda row: row["rank"])
        lines = []
        shared = [_stage_shares(row) for row in members]
        for stage in (*STAGES, "other", "step"):
            cells = [cells.get(stage, "") for cells in shared]
            if any(cells):
                lines.append(["whole step" if stage == "step" else f"`{stage}`", *cells])
        head = ["ms (share of its ceiling)", *(f"r={row['rank']}" for row in members)]
        parts = [
            f"### {shapes} on {where}",
            f"Ceilings of this machine: {ceiling_line(members[-1]['ceilings'])}.",
            table(head, lines),
            provenance(members),
        ]
        sections.append("\n\n".join(parts))
    return sections


def _stage_shares(row: Row) -> dict[str, str]:
    """Write the time of every stage and of the step, and its share of the ceiling nearest to it.

    Shares are counted anew: a row keeps those of when it was measured.
    """
    gpu, spent = row["device"] == "cuda", {k: v["ms"] for k, v in row.get("stages", {}).items()}
    shapes, rank = SHAPE_SETS[row["shapes"]].pairs(row["layers"]), row["rank"]
    counted = work_of(shapes, rank, gpu=gpu, merged="operands" not in spent if spent else None)
    counted["step"] = sum(counted.values(), Work())
    cells = {}
    for stage, ms in (spent | {"step": row["step"]["ms"]}).items():
        cells[stage] = number(ms)
        if stage in counted:
            matrix = "flop16" if gpu else "flop32"
            found = share(counted[stage], ms, row["ceilings"], matrix)
            cells[stage] += f" ({100 * found['share']:.0f} % {found['bound']})"
    return cells


def end_to_end_rows(kinds: dict[str, list[Row]]) -> dict[tuple, list[Row]]:
    """Return the newest training steps by (machine, layers, hidden, rank, batch, length)."""

    def setting(row: Row) -> tuple:
        keys = ("layers", "hidden", "rank", "batch", "length")
        return (machine(row), *(row[key] for key in keys))

    rows = newest(kinds.get("end-to-end", []), lambda row: (*setting(row), row["optimizer"]))
    return grouped(rows, setting)


def end_to_end_sections(kinds: dict[str, list[Row]]) -> list[str]:
    """Write what a whole training step takes with each optimizer."""
    sections = []
    for (where, layers, hidden, rank, batch, length), members in end_to_end_rows(kinds).items():
        lines = []
        for row in members:
            if "step_ms" not in row:
                lines.append([row["optimizer"], row.get("skipped") or row["error"], *[""] * 5])
                continue
            lines.append(
                [
                    f"{row['optimizer']} ({row['backend']})",
                    *(number(row[k]["mean"]) for k in ("forward_backward_ms", "optimizer_ms")),
                    *(number(row[k]["mean"]) for k in ("step_ms", "wall_ms")),
                    f"{100 * row['optimizer_share']:.1f} %",
                    size(row["peak_bytes"]) if "peak_bytes" in row else "",
                ]
            )
        head = ["ms", "forward + backward", "optimizer", "step", "wall", "optimizer's share"]
        parts = [
            f"### Llama, hidden {hidden}, {layers} layers, r={rank}, {batch} x {length} tokens, "
            f"on {where}",
            table([*head, "peak memory"], lines),
            provenance(members),
        ]
        sections.append("\n\n".join(parts))
    return sections


def host_section(kinds: dict[str, list[Row]]) -> list[str]:
    """Write the comparison of the CPU's backends."""
    rows = host_rows(kinds)
    if not rows:
        return []
    lines = [
        [
            f"{row['size']} x {row['size']}, r={row['rank']}",
            *(number(row["median_ms"][b]) for b in ("cpu", "reference")),
            f"{number(row['speedup'])} x",
            *(size(row["first_step_peak_extra_bytes"][b]) for b in ("cpu", "reference")),
        ]
        for row in rows
    ]
    head = ["one pair, fp32", "C++, ms", "reference, ms", "faster by"]
    head += ["first step's memory, C++", "reference"]
    return ["\n\n".join([table(head, lines), provenance(rows)])]


def host_rows(kinds: dict[str, list[Row]]) -> list[Row]:
    """Return the newest row of every size and rank of the CPU's backends."""
    return newest(kinds.get("host", []), lambda row: (row["size"], row["rank"]))
