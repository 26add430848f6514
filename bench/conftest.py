"""Options of the micro-benchmarks: `pytest bench/ --benchmark-only --size 4096 --rank 16`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the command line choose the pair."""
    parser.addoption("--size", type=int, default=1024, help="m = n of the pair")
    parser.addoption("--rank", type=int, default=16, help="r")
