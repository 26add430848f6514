"""What has to be asked for before anything is imported, and what runs where.

Without a GPU the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

from loft_kernels import backends

pytest.register_assert_rewrite("dense_net", "pitfalls", "pitfalls_more")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Libraries import DeepSpeed wherever it is, and for a GPU it may ask for a compiler.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is none; LOFT_REQUIRE_GPU=1 makes a missing GPU an error."""
    if torch.cuda.is_available():
        return
    if os.environ.get("LOFT_REQUIRE_GPU") == "1":
        raise pytest.UsageError("LOFT_REQUIRE_GPU=1, but torch sees no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=["reference", "cpu"])
def host_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let backend="auto" be each of the two backends for tensors on the CPU."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "cpu_missing", lambda: "this test takes the reference path")
    elif backends.cpu_missing() is not None:
        pytest.skip(f"no C++ backend: {backends.cpu_missing()}")
    return request.param
