"""The twelve ways in which an optimizer of this class fails silently, each held by a check.

A check that cannot fail proves nothing: every one also runs against a seeded version of its bug,
where it has to fail.
"""

from __future__ import annotations

import pitfalls_more  # noqa: F401 - registers its pitfalls
import pytest
from pitfalls import PITFALLS
from runs import one_thread  # noqa: F401 - an autouse fixture

from loft_kernels import backends


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PITFALLS)
def test_pitfall_is_avoided(name, host_backend):
    check, _ = PITFALLS[name]
    check()


SEEDED = [
    pytest.param(n, bug, id=f"{n}-{bug}") for n, (_, bugs) in PITFALLS.items() for bug in bugs
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "bug"), SEEDED)
def test_seeded_bug_is_noticed(name, bug, monkeypatch):
    # Bugs are seeded in Python: the check runs on the path that they are in.
    monkeypatch.setattr(backends, "cpu_missing", lambda: "seeded bugs are in the reference path")
    check, bugs = PITFALLS[name]
    bugs[bug](monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()
