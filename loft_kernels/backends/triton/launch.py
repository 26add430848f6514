"""Launch kernels with little host work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """What stays the same at every launch of one name.

    Attributes:
        kernel: the jit function.
        grid: number of programs.
        options: of the compiler (num_warps and the like).
        fixed: arguments by name; tensors among them live as long as the bucket.
    """

    kernel: Any
    grid: int
    options: dict[str, Any]
    fixed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A compiled launch: what runs it, its arguments, and the places of those that change."""

    run: Callable[..., Any]
    arguments: list[Any]
    places: dict[str, int]


class Launcher:
    """Launches kernels of a bucket, after the first time in their compiled form.

    Looking a kernel up by the types and alignments of thirty arguments takes longer than launching
    it. While the pairs of a bucket stay the same so do these: addresses come from torch's
    allocator, which aligns them all alike, and numbers are the bucket's own.
    """

    def __init__(self) -> None:
        """Start with nothing compiled."""
        self._prepared: dict[Any, _Prepared] = {}

    def __call__(self, name: Any, moving: dict[str, Any], describe: Callable[[], Launch]) -> None:
        """Launch a kernel.

        Args:
            name: of this launch in the bucket.
            moving: arguments that differ from launch to launch, by name.
            describe: returns the rest; called while the kernel is not compiled yet.
        """
        prepared = self._prepared.get(name)
        if prepared is not None:
            arguments = prepared.arguments.copy()
            for key, value in moving.items():
                arguments[prepared.places[key]] = _address(value)
            prepared.run(*arguments)
            return
        launch = describe()
        grid, names = launch.grid, launch.kernel.arg_names
        compiled = launch.kernel[(grid,)](**launch.fixed, **moving, **launch.options)
        if compiled is not None:  # The interpreter returns nothing and is asked anew every time.
            # Workspace of this step must not be kept alive, so its places stay empty.
            self._prepared[name] = _Prepared(
                compiled[(grid, 1, 1)],
                [_address(launch.fixed.get(a)) for a in names],
                {a: names.index(a) for a in moving},
            )


def _address(value: Any) -> Any:
    """Return a tensor's address: the launcher takes a number as it is, and looks a tensor up."""
    return value.data_ptr() if isinstance(value, Tensor) else value
