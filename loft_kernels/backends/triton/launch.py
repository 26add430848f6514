"""Launch kernels with little host work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Triton's releases whose compiled kernels take the arguments that `_Prepared.launch` gives them.
_KNOWN_RUNNERS = ("3.6.", "3.7.", "3.8.", "3.9.")


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


class Tiles(NamedTuple):
    """A matrix in workspace that a kernel reads through a tensor descriptor.

    Attributes:
        tensor: the matrix; of one shape at every launch of one name.
        block: rows and columns of a tile.
        describe: returns the descriptor.
    """

    tensor: Tensor
    block: tuple[int, int]
    describe: Callable[[Tensor, tuple[int, int]], Any]


class _Address(int):
    """An address that stands for a tensor, in a descriptor that is not to keep the tensor alive."""

    __slots__ = ()

    def data_ptr(self) -> int:
        """Return the address, as a tensor does."""
        return self


class _Prepared:
    """A compiled launch: what runs it, its arguments, and the places of those that change.

    Args:
        compiled: what the first launch returned.
        launch: what stays.
        moving: arguments of the first launch that do not.
    """

    def __init__(self, compiled: Any, launch: Launch, moving: dict[str, Any]) -> None:
        """Keep what stays; workspace of this step must not be kept alive."""
        names = launch.kernel.arg_names
        self._arguments = [_address(launch.fixed.get(name)) for name in names]
        self._places = {name: names.index(name) for name in moving}
        self._descriptors: dict[str, Any] = {}
        for name, value in moving.items():
            if isinstance(value, Tiles):
                descriptor = copy.copy(value.describe(*value[:2]))
                descriptor.base = _Address()
                self._descriptors[name] = descriptor
                self._arguments[self._places[name]] = descriptor
        self._run = compiled[(launch.grid, 1, 1)]
        self._compiled, self._grid = None, launch.grid
        if isinstance(compiled, CompiledKernel) and triton.__version__.startswith(_KNOWN_RUNNERS):
            self._compiled = compiled

    def launch(self, moving: dict[str, Any]) -> None:
        """Launch the kernel with other arguments in the places of those that change."""
        arguments, places = self._arguments.copy(), self._places
        for name, value in moving.items():
            if isinstance(value, Tensor):
                arguments[places[name]] = value.data_ptr()
            elif isinstance(value, Tiles):
                self._descriptors[name].base = _Address(value.tensor.data_ptr())
            else:
                arguments[places[name]] = value
        compiled = self._compiled
        if compiled is None or _hooked():
            self._run(*arguments)
            return
        # What the runner does when nobody listens: it would collect metadata for the hooks, and
        # have the launcher call chains of none.
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        compiled.run(
            *(self._grid, 1, 1, stream, compiled.function, compiled.packed_metadata),
            *(None, None, None),
            *arguments,
        )


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
            prepared.launch(moving)
            return
        launch = describe()
        given = {k: v.describe(*v[:2]) if isinstance(v, Tiles) else v for k, v in moving.items()}
        compiled = launch.kernel[(launch.grid,)](**launch.fixed, **given, **launch.options)
        if compiled is not None:  # The interpreter returns nothing and is asked anew every time.
            self._prepared[name] = _Prepared(compiled, launch, moving)


def _hooked() -> bool:
    """Tell whether somebody, a profiler say, asked to be told of launches."""
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    # A chain without calls is no hook; anything else that is set may be one.
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _address(value: Any) -> Any:
    """Return a tensor's address: the launcher takes a number as it is, and looks a tensor up."""
    return value.data_ptr() if isinstance(value, Tensor) else value
