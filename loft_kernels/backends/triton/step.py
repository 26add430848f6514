"""Launch one LoFT step of all pairs: at most eight launches a bucket, no host synchronisation.

Pairs may stand on several devices. Each measures its own, learns what the others measured, takes
the same decision from the same numbers, and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loft_kernels.backends.triton import configs, tables
from loft_kernels.backends.triton.bucket import DTYPES, Bucket
from loft_kernels.backends.triton.device import Decision, DevicePlan
from loft_kernels.plan import Moving, Outside, Pair


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


class LaunchPlan:
    """The launches of a step, and what only changes when shapes or addresses do."""

    def __init__(self) -> None:
        """Start with nothing cached."""
        self._pairs: Sequence[Pair] | None = None
        self._measured: Sequence[Pair] | None = None
        self._exact = False
        self._devices: list[DevicePlan] = []

    def step(
        self,
        pairs: Sequence[Pair],
        outside: Outside,
        skipped: Tensor,
        *,
        moving: Moving | None = None,
        max_norm: float | None,
        exact: bool,
    ) -> None:
        """Take the step of all pairs; :meth:`decision` tells what was decided.

        Args:
            pairs: checked pairs with allocated state; changed in place. With the same list as at
                the last step only what ``moving`` names may have changed, and rates and options.
            outside: what else the decision needs.
            skipped: int64 counter of skipped steps, on the first pair's device; changed in place.
            moving: see ``tables.moving_entries``, if it is known already.
            max_norm: largest norm of all projected gradients, or None.
            exact: no product of reduced precision.
        """
        if self._measured is not pairs:
            if moving is None:
                moving = tables.moving_entries(pairs)
            self.measure(pairs, moving, max_norm=max_norm, exact=exact)
        self._measured = None
        self._exchange()
        counter: Tensor | None = skipped
        for plan, own in zip(self._devices, self._bring(outside), strict=True):
            with plan.current():
                for bucket in plan.buckets:
                    bucket.decide(own, counter)
                    counter = None  # counted once
                    bucket.write()

    def decision(self, device: torch.device) -> Decision:
        """Return the decision of the last step, on a device."""
        for plan in self._devices:
            if plan.device == device:
                return plan.decision
        return Decision(self._devices[0].decision.values.to(device, non_blocking=True))

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
            self._lay_out(pairs, exact)
        if pairs is not self._pairs:
            return
        sums: list[list[Tensor]] = []
        for plan in self._devices:
            with plan.current():
                sums.append([bucket.gram(moving) for bucket in plan.buckets])
        if confirm is not None:
            confirmed = confirm()
            if confirmed is None or not self._serves(pairs, exact):
                return
            moving = confirmed
        for plan, partial_sums in zip(self._devices, sums, strict=True):
            with plan.current():
                for bucket, own in zip(plan.buckets, partial_sums, strict=True):
                    bucket.solve(moving, own, max_norm)
        self._measured = pairs

    def _serves(self, pairs: Sequence[Pair], exact: bool) -> bool:
        """Tell whether the plan is laid out for these pairs and options."""
        if pairs is not self._pairs or exact != self._exact:
            return False
        # Alternation decides which sides may share workspace.
        return all(bucket.alternate == bucket.options.alternate for bucket in self.buckets())

    def buckets(self) -> list[Bucket]:
        """List the buckets of all devices."""
        return [bucket for plan in self._devices for bucket in plan.buckets]

    def forget(self) -> None:
        """Drop what was measured for a step that another path took, or that was refused."""
        self._measured = None

    def holds(self, pairs: Sequence[Pair]) -> bool:
        """Tell whether the last launches were laid out for this list of pairs."""
        return pairs is self._pairs

    def forget_layouts(self) -> None:
        """Drop what relies on the phases of pairs, which another path has moved on."""
        self._pairs = None
        for plan in self._devices:
            plan.forget_layouts()

    def _lay_out(self, pairs: Sequence[Pair], exact: bool) -> None:
        """Give every pair to its device; the first device is the first pair's."""
        members: dict[torch.device, list[int]] = {}
        for k, pair in enumerate(pairs):
            members.setdefault(device_of(pair), []).append(k)
        known = {plan.device: plan for plan in self._devices}
        self._devices = [known.get(device) or DevicePlan(device) for device in members]
        # Their workspace goes before there is new.
        self._pairs = None
        for plan in self._devices:
            plan.buckets = []
        first = 0
        for plan, own in zip(self._devices, members.values(), strict=True):
            plan.lay_out(pairs, own, exact, first)
            first = plan.own.stop
        self._pairs, self._exact = pairs, exact

    def _exchange(self) -> None:
        """Bring what every device measured to all others."""
        home, *others = self._devices
        # torch makes the current streams of both devices wait for each other.
        for plan in others:
            home.numbers[plan.own].copy_(plan.numbers[plan.own], non_blocking=True)
        for plan in others:
            plan.numbers.copy_(home.numbers, non_blocking=True)

    def _bring(self, outside: Outside) -> list[Tensor]:
        """Return fp64 (squared norm of the plain gradients, scale, found_inf) on every device."""
        nothing = [plan.constant(("outside",), _nothing_outside) for plan in self._devices]
        flags = ((1, outside.grad_scale), (2, outside.found_inf))
        if not outside.plain_grads and all(flag is None for _, flag in flags):
            return nothing
        home, values = self._devices[0].device, nothing[0].clone()
        if outside.plain_grads:
            norms = torch._foreach_norm(list(outside.plain_grads), 2, torch.float64)
            values[0] = torch.stack([n.to(home) for n in norms]).square().sum()
        for index, flag in flags:
            if flag is not None:
                values[index] = flag.reshape(()).to(home)
        return [values.to(plan.device, non_blocking=True) for plan in self._devices]


def device_of(pair: Pair) -> torch.device:
    """Return the device of a checked pair."""
    return pair.b.param.device


def _nothing_outside() -> Tensor:
    """Return what a step without other parameters and scaler has outside."""
    return torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
