"""The frozen tile tables: what every GPU gets, and that a broken file is told by its entry."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from loft_kernels.backends.triton import configs
from loft_kernels.backends.triton.configs import MomentTile, RowTile, UpdateTile

ROOT = Path(__file__).parents[1]

# By largest rank served. Every GPU takes the same tiles of rows and moments, but for what
# capability 9.0 measured where it has kernels or fetches of its own.
ROWS = {16: RowTile(512, 16, 1), 64: RowTile(512, 16, 2), 256: RowTile(512, 32, 4)}
MOMENTS = {
    4: MomentTile(512, 64, 64, 64, 16, 4, 128),
    8: MomentTile(512, 64, 16, 32, 64, 2, None),
    16: MomentTile(128, 32, 8, 32, 128, 4, 128),
    32: MomentTile(64, 32, 2, 16, 128, 2, None),
    64: MomentTile(16, 16, 1, 16, 256, 4, None),
    128: MomentTile(64, 16, 1, 16, 256, 4, None),
    256: MomentTile(64, 16, 1, 16, 256, 8, None),
}
OWN_MOMENTS = {
    (9, 0): {
        **MOMENTS,
        16: MomentTile(128, 64, 8, 32, 128, 4, 128),
        64: MomentTile(64, 64, 1, 16, 256, 4, None),
    }
}
UPDATE = {
    (9, 0): {
        16: UpdateTile(64, 64, 4, 3, None),
        32: UpdateTile(64, 128, 4, 4, None),
        64: UpdateTile(128, 128, 8, 4, None),
        128: UpdateTile(128, 128, 8, 3, None),
        256: UpdateTile(64, 128, 8, 3, None),
    }
}
SAFE = {64: UpdateTile(64, 64, 4, 2, None), 256: UpdateTile(64, 64, 8, 2, None)}
HOPPER = {
    4: UpdateTile(64, 64, 4, 4, 128),
    8: UpdateTile(64, 64, 4, 4, 168),
    16: UpdateTile(64, 64, 4, 3, 168),
}
# Of ranks 17 to 32: as many stages as fit beside the rest of each.
WIDE_STAGES = "4444444444444434"


def serving(table: dict, rank: int):
    return table[min(limit for limit in table if limit >= rank)]


@pytest.mark.parametrize("rank", [*range(1, 65), 65, 128, 129, 256])
@pytest.mark.parametrize(
    "capability",
    [(0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)],
    ids=lambda c: f"{c[0]}.{c[1]}",
)
def test_every_gpu_gets_the_tiles_that_were_measured_or_the_defaults(capability, rank):
    assert configs.row_tile(capability, rank) == serving(ROWS, rank)
    assert configs.moment_tile(capability, rank) == serving(
        OWN_MOMENTS.get(capability, MOMENTS), rank
    )
    assert configs.update_tile(capability, rank) == serving(UPDATE.get(capability, SAFE), rank)


@pytest.mark.parametrize("rank", range(1, 65))
def test_kernels_of_9_0_get_the_stages_that_fit(rank):
    if rank <= 16:
        expected = serving(HOPPER, rank)
    elif rank > 32:
        expected = UpdateTile(128, 256, 8, 4, None)
    else:
        expected = UpdateTile(128, 128, 8, int(WIDE_STAGES[rank - 17]), None)
    assert configs.hopper_tile(rank) == expected


def test_entries_serve_the_ranks_that_find_them():
    for table, (_, widths) in configs.TABLES.items():
        served = {r: w for w in widths for r in configs.served_ranks(table, w)}
        assert served == {r: configs.entry_rank(table, r) for r in range(1, widths[-1] + 1)}
        assert widths[-1] == (32 if table == "hopper" else configs.MAX_RANK)


def test_measured_entries_say_on_what():
    document = json.loads(configs.PATH.read_text())
    # Above rank 64 nothing has been swept yet.
    entries = [e for t in document["9.0"].values() for w, e in t.items() if int(w) <= 64]
    assert len(entries) == 16
    assert all({"gpu", "torch", "triton"} <= entry["measured"].keys() for entry in entries)


def test_an_entry_of_another_gpu_is_its_own():
    document = json.loads(configs.PATH.read_text())
    entry = {"tile": {"chunk": 64, "block": 64, "warps": 2}}
    tables = configs.parse(document | {"8.6": {"rows": {"32": entry}}})
    assert tables[(8, 6), "rows", 32] == RowTile(64, 64, 2)
    assert tables.keys() - configs.frozen().keys() == {((8, 6), "rows", 32)}


def test_the_step_takes_the_capability_of_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert configs.capability_of(torch.device("cuda")) == (8, 6)
    assert configs.capability_of(torch.device("cpu")) == (0, 0)


MOMENT = ("9.0", "moments", "8", "tile")
BROKEN = {
    "no power of two": ((*MOMENT, "warps"), 3, "9.0: moments: 8: warps is 3, not a power"),
    "no number": ((*MOMENT, "rows"), "64", "9.0: moments: 8: rows is '64', not a positive"),
    "a flag": ((*MOMENT, "warps"), True, "9.0: moments: 8: warps is True"),
    "zero": ((*MOMENT, "chunk"), 0, "9.0: moments: 8: chunk is 0"),
    "chunk": ((*MOMENT, "chunk"), 96, "9.0: moments: 8: .* chunk is a multiple of rows"),
    "group": ((*MOMENT, "group"), 128, "9.0: moments: 8: .* at most rows"),
    "narrow group": ((*MOMENT, "group"), 8, "9.0: moments: 8: .* group is at least 16"),
    "packed row": ((*MOMENT, "columns"), 32, "9.0: moments: 8: .* holds a packed row"),
    "registers": ((*MOMENT, "registers"), 256, "9.0: moments: 8: .* registers is null or"),
    "block": (("default", "rows", "16", "tile", "block"), 8, "default: rows: 16: .* at least 16"),
    "rows": (("default", "rows", "16", "tile", "chunk"), 24, "default: rows: 16: .* multiple"),
    "padding": (
        ("default", "update", "8", "tile", "block_n"),
        256,
        "default: update: 8: .* block_n is 16 to 128",
    ),
    "warp groups": (
        ("9.0", "hopper", "32", "tile", "warps"),
        4,
        "9.0: hopper: 32: .* block_m / 16",
    ),
    "one stage": (("9.0", "hopper", "8", "tile", "stages"), 1, "9.0: hopper: 8: .* two stages"),
    "unknown field": ((*MOMENT, "colums"), 64, "9.0: moments: 8: tile: colums missing or unknown"),
    "unknown part": (("9.0", "rows", "16", "tiles"), {}, "9.0: rows: 16: an entry is"),
    "no tile": (("9.0", "rows", "16"), {"measured": {}}, "9.0: rows: 16: an entry is"),
    "no object": (("9.0", "rows", "16"), [512, 16, 1], "9.0: rows: 16 is no JSON object"),
    "rank": (
        ("9.0", "rows", "24"),
        {},
        r"9.0: rows: 24: the padded ranks .*\(16, 32, 64, 128, 256\)",
    ),
    "table": (("9.0", "row"), {}, "9.0: row is no table"),
    "hopper elsewhere": (("8.0",), {"hopper": {}}, "8.0: hopper is no table"),
    "capability": (("9",), {}, "9 is neither 'default' nor a compute capability"),
    "missing": (("default", "rows"), {}, "default: rows: 16 is missing"),
    "missing hopper": (("9.0", "hopper"), {}, "9.0: hopper: 4 is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_named(name):
    path, value, message = BROKEN[name]
    document = copy.deepcopy(json.loads(configs.PATH.read_text()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=f"^tiles.json: {message}"):
        configs.parse(document)


def test_a_broken_file_stops_the_first_step(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text("{}")
    monkeypatch.setattr(configs, "PATH", path)
    configs.frozen.cache_clear()
    with pytest.raises(ValueError, match=r"default: update: 8 is missing"):
        configs.row_tile((9, 0), 8)
    monkeypatch.undo()
    assert configs.row_tile((9, 0), 8) == RowTile(512, 16, 1)


def test_sdist_and_wheel_carry_the_file(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "loft_kernels",
        source / "loft_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # No sources of the extension, so that nothing is compiled.
    (source / "csrc").mkdir()
    words = [
        "setup.py",
        "-q",
        "sdist",
        "-d",
        str(tmp_path),
        "build_py",
        "-d",
        str(tmp_path / "built"),
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    place = Path("loft_kernels/backends/triton/tiles.json")
    assert (tmp_path / "built" / place).is_file()
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        assert any(name.endswith(str(place)) for name in packed.getnames())
