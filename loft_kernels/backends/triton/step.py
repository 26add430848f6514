"""Launch one LoFT step of all pairs: at most eight launches a bucket, no host synchronisation.

A bucket holds the pairs that one set of launches can serve: one device, parameter dtype, rank and
set of options. Phase, counts, clip coefficient and the skip flag are read and written on the
device only.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.bucket import DTYPES, Bucket, bucket_key
from loft_kernels.backends.triton.layout import Layout, new_layout, signature, step_counts
from loft_kernels.plan import Moving, Pair


def unsupported(pair: Pair) -> str | None:
    """Say why these kernels do not serve a pair, or None if they do."""
    options = pair.options
    if options.second_moment != "full" or not options.calibrate:
        return "second_moment='diagonal' and calibrate=False are ablations of the reference path"
    if options.beta1**2 > options.beta2:
        # m may outlive sqrt(v) without bound, and D the range of fp16.
        return f"betas {options.beta1}, {options.beta2}: beta1^2 is above beta2"
    rank = pair.a.param.shape[0]
    if rank > configs.MAX_RANK:
        return f"rank {rank} is above {configs.MAX_RANK}"
    grads = {f.grad.dtype for f in (pair.b, pair.a) if f.grad is not None}
    kinds = {pair.b.param.dtype, pair.a.param.dtype}
    if len(kinds) > 1 or len(grads) > 1 or not (kinds | grads) <= DTYPES.keys():
        return f"parameters are {kinds} and gradients {grads}"
    return None


@dataclass(slots=True)
class Decision:
    """What the device decided, still on the device.

    Attributes:
        values: fp64 (skip, coefficient, norm).
    """

    values: Tensor

    @property
    def skip(self) -> Tensor:
        """1 if the step is skipped whole, fp32 as torch's fused optimizers take it."""
        return self.values[tables.SKIP.value].float()

    @property
    def coefficient(self) -> Tensor:
        """What every gradient is multiplied by."""
        return self.values[tables.COEFFICIENT.value]


class LaunchPlan:
    """Everything about the launches that only changes when shapes or addresses do.

    Args:
        device: the device of all pairs.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing cached."""
        self.device = device
        self.capability = configs.capability_of(device)
        self._pairs: Sequence[Pair] | None = None
        self._measured: Sequence[Pair] | None = None
        self._exact = False
        self._buckets: list[Bucket] = []
        # Written by every step, for the launches that come after it on the stream.
        self.decision = Decision(torch.empty(3, dtype=torch.float64, device=device))
        # By bucket and tile: what the layout was made for, the step counts of its pairs, and it.
        self._layouts: dict[tuple, tuple[tuple, list[Tensor], Layout]] = {}
        self._earlier = self._layouts
        self._constants: dict[tuple, Tensor] = {}

    def step(
        self,
        pairs: Sequence[Pair],
        outside: Tensor,
        skipped: Tensor,
        *,
        moving: Moving | None = None,
        max_norm: float | None,
        exact: bool,
    ) -> Decision:
        """Take the step of all pairs.

        Args:
            pairs: checked pairs with allocated state; changed in place. With the same list as at
                the last step only what ``moving`` names may have changed, and rates and options.
            outside: fp64 (squared norm of all other gradients, gradient scale, found_inf).
            skipped: int64 counter of skipped steps; changed in place.
            moving: see ``tables.moving_entries``, if it is known already.
            max_norm: largest norm of all projected gradients, or None.
            exact: no product of reduced precision.
        """
        if self._measured is not pairs:
            if moving is None:
                moving = tables.moving_entries(pairs)
            self.measure(pairs, moving, max_norm=max_norm, exact=exact)
        self._measured = None
        with self._on_device():
            for index, bucket in enumerate(self._buckets):
                bucket.decide(outside, skipped, count_skips=index == 0)
                bucket.write()
        return self.decision

    def measure(
        self,
        pairs: Sequence[Pair],
        moving: Moving,
        *,
        max_norm: float | None,
        exact: bool,
        confirm: Callable[[], Moving | None] | None = None,
    ) -> None:
        """Measure Gram products, inverses and norms into workspace; see :meth:`step`.

        Args:
            pairs: of the step.
            moving: of the step; with ``confirm`` its scalings may be those of the step before.
            max_norm: see :meth:`step`.
            exact: see :meth:`step`.
            confirm: reads the rest while the first launch is on its way, which needs nothing but
                addresses: returns ``moving``, or None to give up. Other pairs than those of the
                last step, or other options, are not measured then.
        """
        if confirm is None and not self._serves(pairs, exact):
            # Their workspace goes before there is new.
            self._pairs, self._buckets = None, []
            self._buckets = self._new_buckets(pairs, exact)
            self._pairs, self._exact = pairs, exact
        if pairs is not self._pairs:
            return
        with self._on_device():
            sums = [bucket.gram(moving) for bucket in self._buckets]
            if confirm is not None:
                confirmed = confirm()
                if confirmed is None or not self._serves(pairs, exact):
                    return
                moving = confirmed
            for bucket, partial_sums in zip(self._buckets, sums, strict=True):
                bucket.solve(moving, partial_sums, max_norm)
        self._measured = pairs

    def _serves(self, pairs: Sequence[Pair], exact: bool) -> bool:
        """Tell whether the plan is laid out for these pairs and options."""
        if pairs is not self._pairs or exact != self._exact:
            return False
        # Alternation decides which sides may share workspace.
        return all(bucket.alternate == bucket.options.alternate for bucket in self._buckets)

    def forget(self) -> None:
        """Drop what was measured for a step that another path took, or that was refused."""
        self._measured = None

    def holds(self, pairs: Sequence[Pair]) -> bool:
        """Tell whether the last launches were laid out for this list of pairs."""
        return pairs is self._pairs

    def forget_layouts(self) -> None:
        """Drop what relies on the phases of pairs, which another path has moved on."""
        self._pairs, self._layouts, self._buckets = None, {}, []

    def _on_device(self) -> contextlib.AbstractContextManager:
        """Make the plan's device the current one."""
        cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device) if cuda else contextlib.nullcontext()

    def _new_buckets(self, pairs: Sequence[Pair], exact: bool) -> list[Bucket]:
        """Sort pairs by what one set of launches can serve."""
        members: dict[tuple, list[int]] = {}
        for k, pair in enumerate(pairs):
            members.setdefault(bucket_key(pair), []).append(k)
        shape = (2 * len(pairs), tables.NUMBERS.value)
        numbers, first = torch.empty(shape, dtype=torch.float64, device=self.device), 0
        buckets: list[Bucket] = []
        # A layout that is not used now goes: its pairs may part from each other meanwhile.
        self._earlier, self._layouts = self._layouts, {}
        for key, places in members.items():
            sides = [side for k in places for side in (2 * k, 2 * k + 1)]
            whole = len(members) == 1
            own = [pairs[k] for k in places]
            new = Bucket(self, key, own, None if whole else sides, exact, numbers, first)
            buckets.append(new)
            first += new.sides
        self._earlier = {}
        return buckets

    def outside(
        self, plain_grads: Sequence[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """Collect what the decision needs beside the pairs.

        Args:
            plain_grads: gradients of all other parameters.
            grad_scale: GradScaler's scale, or None.
            found_inf: GradScaler's flag, or None.

        Returns:
            fp64 (squared norm of the plain gradients, scale, found_inf).
        """
        nothing = self.constant(("outside",), _nothing_outside)
        if not plain_grads and grad_scale is None and found_inf is None:
            return nothing
        outside = nothing.clone()
        if plain_grads:
            norms = torch._foreach_norm(list(plain_grads), 2, torch.float64)
            outside[0] = torch.stack([n.to(self.device) for n in norms]).square().sum()
        for index, value in ((1, grad_scale), (2, found_inf)):
            if value is not None:
                outside[index] = value.reshape(()).to(self.device)
        return outside

    def constant(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that never changes, made and brought to the device once."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]

    def layout(
        self, key: tuple, pairs: Sequence[Pair], tile: configs.UpdateTile, operand_rows: int
    ) -> Layout:
        """Return the tiles and workspace of a bucket, built anew when its pairs change."""
        wanted, steps = signature(pairs), step_counts(pairs)
        cached = self._earlier.get((key, tile))
        # Pairs of the same shapes that are not the same may be in different phases.
        if (
            cached is None
            or cached[0] != wanted
            or len(cached[1]) != len(steps)
            or not all(map(operator.is_, cached[1], steps))
        ):
            new = new_layout(key[0], pairs, self.device, self.capability, tile, operand_rows)
            cached = (wanted, steps, new)
        self._layouts[key, tile] = cached
        return cached[2]


def _nothing_outside() -> Tensor:
    """Return what a step without other parameters and scaler has outside."""
    return torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
