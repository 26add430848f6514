"""Launch kernels with little host work."""

from __future__ import annotations

from typing import Any


class Launcher:
    """Launches kernels of a bucket, after the first time in their compiled form.

    Looking a kernel up by the types and alignments of thirty arguments takes longer than launching
    it. While the pairs of a bucket stay the same so do these: addresses come from torch's
    allocator, which aligns them all alike, and numbers are the bucket's own.
    """

    def __init__(self) -> None:
        """Start with nothing compiled."""
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, kernel: Any, name: Any, grid: int, options: dict[str, Any], **arguments: Any
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: the jit function.
            name: of this launch in the bucket.
            grid: number of programs; the same at every launch of this name.
            options: of the compiler (num_warps and the like).
            **arguments: of the kernel.
        """
        compiled = self._compiled.get(name)
        if compiled is not None:
            compiled[(grid, 1, 1)](*[arguments[a] for a in kernel.arg_names])
            return
        # The interpreter returns nothing and is asked anew every time.
        self._compiled[name] = kernel[(grid,)](**arguments, **options)
