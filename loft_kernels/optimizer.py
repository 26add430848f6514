"""LoFTAdamW: the optimizer that users see."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loft_kernels import backends, checkpoint, functional
from loft_kernels.adapters import (
    LoRAPair,
    NamedScaling,
    OnUnsupported,
    loft_param_groups,
    pairs_from_names,
)
from loft_kernels.clipping import check_max_norm, decide
from loft_kernels.exchanged import Held
from loft_kernels.gather import (
    Gathered,
    PairSlot,
    Place,
    check_options,
    release_gradients,
    step_options,
)
from loft_kernels.layers import as_matrix
from loft_kernels.measured import HostPath
from loft_kernels.notices import warn_idle, warn_memory, warn_outer_clipping
from loft_kernels.plain_adamw import adamw_step_, check_plain, start_plain_state_
from loft_kernels.plan import Factor, Outside, Pair, SecondMoment, StepOptions
from loft_kernels.state import FORMAT, check_pair, check_state, ready_state


class LoFTAdamW(Optimizer):
    r"""AdamW on the virtual full weights of LoRA adapters (LoFT, arXiv 2505.21289).

    For each pair ``W = W0 + s B A`` the step is the projection of AdamW's step on W onto what the
    moving factor can express: gradients scaled by (Y^T Y)^-1, both moments transported between
    subspaces, the update taken entry by entry in the virtual m x n weight. B and A move in turns
    (B first). Tensors that are not LoRA pairs take ``torch.optim.AdamW``'s own step.

    Args:
        params: a module (its LoRA pairs are found and its other trainable parameters included),
            the groups of :func:`loft_param_groups`, named parameters with a group key
            ``scaling``, or any parameters: without names they carry no pairing and take plain
            AdamW, with a warning.
        lr: learning rate of the virtual weight; a float or a 0-d tensor.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment, in units of the gradient of W.
        weight_decay: decoupled, multiplied by lr as in ``torch.optim.AdamW``.
        max_grad_norm: clip inside ``step`` by the global norm of the projected gradients.
        alternate: move B and A in turns; False moves both from one snapshot.
        calibrate: transport the moments between subspaces (False: ablation).
        second_moment: "full", r(r+1)/2 numbers per row, or "diagonal" ("LoFT simple").
        damping: ridge relative to the mean of the partner's squared singular values.
        maximize: maximise the objective.
        backend: see :func:`report`.
        precision: "default", or "ieee" for no reduced-precision product anywhere.
        on_unsupported: LoRA factors that LoFT cannot serve: "error", or "adamw".

    Raises:
        ValueError: invalid hyper-parameters, no trainable pair in a module, unpaired factors.
        NotImplementedError: sharded, quantized or mixture-of-experts factors.
    """

    def __init__(  # noqa: D107 - the arguments stand in the class's docstring
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        alternate: bool = True,
        calibrate: bool = True,
        second_moment: SecondMoment = "full",
        damping: float = 0.0,
        maximize: bool = False,
        backend: str = "auto",
        precision: str = "default",
        on_unsupported: OnUnsupported = "error",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "damping": damping,
            "alternate": alternate,
            "calibrate": calibrate,
            "second_moment": second_moment,
            "format": FORMAT,
        }
        check_max_norm(max_grad_norm)
        for name, value, known in (
            ("precision", precision, ("default", "ieee")),
            ("on_unsupported", on_unsupported, ("error", "adamw")),
        ):
            if value not in known:
                raise ValueError(f"Invalid {name}: {value!r}: known are {', '.join(known)}")
        backends.check_name(backend)
        self.backend = backend
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.nonfinite_steps = torch.zeros((), dtype=torch.int64)
        self._slots: list[PairSlot] = []
        self._sizes: list[int] = []
        self._warned_one_sided = False
        self._warned_fallback = False
        self._said: set[str] = set()
        self._plan: Any = None
        self._gathered: Gathered | None = None
        # Pairs and named tensors of new groups wait here until all groups are there: the factors
        # of a pair may stand in two groups with different learning rates.
        self._found: list[LoRAPair] = []
        self._named: list[tuple[str, Tensor, NamedScaling]] = []
        self._building = True
        if isinstance(params, nn.Module):
            params = loft_param_groups(params, on_unsupported=on_unsupported)
        super().__init__(params, defaults)
        self._building = False
        self._pair_up()
        if second_moment == "full":
            warn_memory([self._size(slot) for slot in self._slots])
        if not self._slots:
            warnings.warn(
                "LoFTAdamW was given parameters without LoRA pairs, so it is plain AdamW. A list "
                "of tensors carries no pairing: pass the model itself, or loft_param_groups(model)",
                UserWarning,
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; LoRA pairs are taken from ``lora_pairs`` or from names.

        Args:
            param_group: a dict with ``params`` and group options; with LoRA names but without
                ``lora_pairs`` it needs ``scaling``, a number or a dict from layer name to number.

        Raises:
            ValueError: invalid options, a factor without partner, names without scaling.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        param_group = dict(param_group)
        found: list[LoRAPair] | None = param_group.pop("lora_pairs", None)
        scaling: NamedScaling = param_group.pop("scaling", None)
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._sizes.append(len(group["params"]))
        if found is not None:
            self._found += found
        elif "param_names" in group:
            named = zip(group["param_names"], group["params"], strict=True)
            self._named += [(name, p, scaling) for name, p in named]
        if self._building:
            return
        try:
            self._pair_up()
        except ValueError:
            # A refused group must not stay: its factors would train as plain parameters.
            self.param_groups.pop()
            self._sizes.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``p.grad`` is never changed.

        A non-finite gradient anywhere (or a scaler's ``found_inf``) skips the whole step: no
        parameter, state or count changes and ``nonfinite_steps`` grows by one.

        Args:
            closure: re-evaluates the model under enabled gradients and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError, TypeError, ValueError, NotImplementedError: a parameter or gradient that
                the step cannot serve, by name; nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fresh = not self.state
        if self._gathered is not None:
            self._check_structure()
            self._gathered.measure_ahead(self, self._plan)
        pairs, plain = self._gather(allocate=True)
        members = [p for group in plain.values() for p in group]
        if self._slots and not pairs and self._first_time("idle"):
            warn_idle(len(self._slots))
        if not pairs and not members:
            return loss
        if fresh and checkpoint.is_rehearsal(self):
            for p in members:
                start_plain_state_(p, self.state[p])
            return loss
        if pairs and self._first_time("clipping"):
            warn_outer_clipping(self.max_grad_norm)
        backend, reason = self._choose_backend(pairs)
        kind = pairs[0].b.param.device.type if pairs else ""
        if backend == "triton" and any(p.device.type != kind for p in members):
            backend, reason = "reference", "some parameters are on a GPU, others not"
        if reason and not self._warned_fallback:
            self._warned_fallback = True
            warnings.warn(
                f"the LoFT step runs on the reference path ({reason})", UserWarning, stacklevel=2
            )
        if backend == "triton":
            self._step_triton(pairs, plain, members)
        else:
            if self._gathered is not None:
                self._gathered.bind()
            if self._plan is not None:
                self._plan.forget_layouts()
            self._step_on_host(backend, pairs, plain, members)
        if self._gathered is not None:
            self._gathered.release_gradients()
        else:
            release_gradients(pairs)
        return loss

    def _first_time(self, notice: str) -> bool:
        """Tell whether a notice is still to be given, and count it as given."""
        new = notice not in self._said
        self._said.add(notice)
        return new

    def _choose_backend(self, pairs: list[Pair]) -> tuple[str, str]:
        """Choose the backend of a step; the answer stands while the pairs do."""
        known = self._gathered
        if known is None or known.pairs is not pairs:
            return backends.choose(self.backend, pairs)
        if known.backend is None:
            known.backend = backends.choose(self.backend, pairs)
        return known.backend

    def _host_path(self, pairs: list[Pair]) -> HostPath:
        """Return what measures these pairs outside a step."""
        return _host_path(backends.choose(self.backend, pairs)[0])

    def _step_on_host(
        self, backend: str, pairs: list[Pair], plain: dict[int, list[Tensor]], members: list[Tensor]
    ) -> None:
        """Take one step in plain PyTorch or C++; decisions are taken on the host."""
        path = _host_path(backend)
        kinds = {p.device.type for p in members} | {p.b.param.device.type for p in pairs}
        with functional.exact_arithmetic(kinds):
            decision = decide(
                pairs,
                [p.grad for p in members if p.grad is not None],
                max_norm=self.max_grad_norm,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                path=path,
            )
            if not decision.finite:
                self.nonfinite_steps += 1
                return
            path.apply_(decision.prepared, decision.coefficient)
            for index, group in plain.items():
                states = [self.state[p] for p in group]
                adamw_step_(group, states, self.param_groups[index], decision.coefficient)

    def _step_triton(
        self, pairs: list[Pair], plain: dict[int, list[Tensor]], members: list[Tensor]
    ) -> None:
        """Take one step with fused kernels; decisions are taken on the device."""
        if self._plan is None:
            from loft_kernels.backends.triton.step import LaunchPlan

            self._plan = LaunchPlan()
        outside = Outside(
            [p.grad for p in members if p.grad is not None],
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        device = pairs[0].b.param.device
        if self.nonfinite_steps.device != device:
            self.nonfinite_steps = self.nonfinite_steps.to(device)
        if self._gathered is not None and not self._plan.holds(pairs):
            self._gathered.bind()  # whoever lays out anew looks at the gradients
        self._plan.step(
            pairs,
            outside,
            self.nonfinite_steps,
            moving=None if self._gathered is None else self._gathered.moving,
            max_norm=self.max_grad_norm,
            exact=self.precision == "ieee",
        )
        scaled = self.max_grad_norm is not None or outside.grad_scale is not None
        for index, group in plain.items():
            for place in dict.fromkeys(p.device for p in group):
                params = [p for p in group if p.device == place]
                decision = self._plan.decision(place)
                adamw_step_(
                    params,
                    [self.state[p] for p in params],
                    self.param_groups[index],
                    decision.coefficient if scaled else 1.0,
                    found_inf=decision.skip,
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of any backend; it is validated whole before anything changes.

        Moments keep their fp32 bits under half-precision parameters, a differently ordered
        checkpoint is matched by ``param_names``, and nothing is shared with ``state_dict``.

        Args:
            state_dict: from :meth:`state_dict`; not changed.

        Raises:
            ValueError: another format, count, shape or set of keys or names.
        """
        # Registered last, so that it sees what the users' own pre-hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(checkpoint.prepare_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the pairing and the options with copies and pickles, which torch would drop."""
        kept = {k: v for k, v in self.__dict__.items() if k in _KEPT_ATTRIBUTES}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in options that an older checkpoint or pickle lacks."""
        # What was cached belongs to other tensors.
        self._plan, self._gathered = None, None
        super().__setstate__({**state, "state": checkpoint.unbox(state["state"])})
        for group in self.param_groups:
            for key, value in _OLDER_DEFAULTS.items():
                group.setdefault(key, value)

    def _pair_up(self) -> None:
        """Resolve newly found pairs to (group, position) places, and check them."""
        places = {
            id(p): (g, i)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        }
        found, named = self._found, self._named
        self._found, self._named = [], []
        pairs = found + pairs_from_names(named)
        self._gathered = None
        slots: list[PairSlot] = []
        taken = {place for slot in self._slots for place in (slot.b, slot.a)}
        for pair in pairs:
            for name, tensor in ((pair.name_B, pair.lora_B), (pair.name_A, pair.lora_A)):
                if id(tensor) not in places:
                    raise ValueError(f"{name} of pair {pair.name} is in no parameter group")
                if places[id(tensor)] in taken:
                    raise ValueError(
                        f"{name} is part of two LoRA pairs (tied adapters): untie them, or train "
                        "it with on_unsupported='adamw'"
                    )
                taken.add(places[id(tensor)])
            b, a = places[id(pair.lora_B)], places[id(pair.lora_A)]
            held = Held(pair.scaling.place, pair.lora_B, pair.lora_A)
            slots.append(PairSlot(pair.name, b, a, pair.scaling, held))
            self._shared_options(slots[-1])
        self._slots += slots

    def _shared_options(self, slot: PairSlot) -> StepOptions:
        """Read the options of a pair, which both factors' groups must agree on."""
        b, a = (step_options(self.param_groups[g]) for g, _ in (slot.b, slot.a))
        if b != a:
            raise ValueError(
                f"the factors of {slot.name} are in groups with different options ({b} and {a}): "
                "only lr may differ between lora_A and lora_B"
            )
        return b

    def _gather(self, *, allocate: bool) -> tuple[list[Pair], dict[int, list[Tensor]]]:
        """Collect this step's pairs and plain parameters; raises before anything is written.

        Args:
            allocate: create missing state, after every check has passed.

        Returns:
            Pairs with a gradient, and per group index the plain parameters with a gradient.
        """
        self._check_structure()
        if allocate and self._gathered is not None and self._gathered.refresh(self):
            return self._gathered.pairs, self._plain_of(self._gathered.plain)
        pairs = []
        for slot in self._slots:
            pair = self._pair(slot)
            check_pair(pair)
            for factor, partner in pair.sides:
                check_state(factor, partner, pair.options)
            if pair.b.param.numel() == 0 or pair.a.param.numel() == 0:
                continue
            if pair.b.grad is None or pair.a.grad is None:
                slot.held.check(pair)
            if pair.b.grad is not None or pair.a.grad is not None:
                pairs.append(pair)
        plain = self._plain_parameters()
        for pair in pairs if allocate else ():
            self._warn_one_sided(pair)
            for factor, partner in pair.sides:
                if factor.grad is not None:
                    factor.state = self.state[factor.stored]
                    ready_state(factor, partner, pair.options)
        if allocate:
            whole = bool(pairs) and len(pairs) == len(self._slots)
            # What is kept finds gradients and state by the factor itself, not by a view of it.
            whole = whole and all(f.param is f.stored for p in pairs for f in (p.b, p.a))
            self._gathered = Gathered(self, pairs) if whole else None
        return pairs, plain

    def _pair(self, slot: PairSlot) -> Pair:
        """Look up one pair's tensors, options and scaling as they are now."""
        b, a = self._factor(slot, slot.b), self._factor(slot, slot.a)
        return Pair(slot.name, b, a, slot.scaling.read(), self._shared_options(slot))

    def _size(self, slot: PairSlot) -> tuple[int, int, int]:
        """Return m, r and n of a pair."""
        b, a = (self.param_groups[g]["params"][i] for g, i in (slot.b, slot.a))
        return b.shape[0], a.shape[0], a.shape[1:].numel()

    def _factor(self, slot: PairSlot, place: Place) -> Factor:
        """Look up one factor of a pair as it is now."""
        group, transposed = self.param_groups[place[0]], place == slot.a
        stored: Tensor = group["params"][place[1]]
        names = group.get("param_names")
        name = names[place[1]] if names else f"{slot.name}.lora_{'A' if transposed else 'B'}"
        param, grad = as_matrix(name, stored), stored.grad
        if grad is not None and param.dim() < grad.dim() and not grad.is_sparse:
            grad = grad.flatten(1)
        state = self.state.get(stored, {})
        return Factor(name, param, grad, transposed, group["lr"], place[0], state, stored)

    def _plain_parameters(self) -> dict[int, list[Tensor]]:
        """Collect the parameters with a gradient that are not in a pair, by group index."""
        paired = {place for slot in self._slots for place in (slot.b, slot.a)}
        return self._plain_of(
            (g, i, param)
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
            if (g, i) not in paired
        )

    def _plain_of(self, places: Iterable[tuple[int, int, Tensor]]) -> dict[int, list[Tensor]]:
        """Check parameters that are in no pair and sort those with a gradient by group index."""
        plain: dict[int, list[Tensor]] = {}
        for g, i, param in places:
            if param.grad is None:
                continue
            names = self.param_groups[g].get("param_names")
            name = names[i] if names else f"parameter {i} of group {g}"
            check_plain(name, param, self.state.get(param, {}))
            plain.setdefault(g, []).append(param)
        return plain

    def _check_structure(self) -> None:
        """Notice wrappers that replaced the parameter lists, which would break the pairing."""
        sizes = [len(group["params"]) for group in self.param_groups]
        if self._slots and sizes != self._sizes:
            names = [slot.name for slot in self._slots]
            lost = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if names[2:] else "")
            raise RuntimeError(
                f"the parameter groups now hold {sizes} tensors instead of {self._sizes}: a "
                "wrapper (DeepSpeed ZeRO, FSDP) flattened them, or left frozen ones out, and the "
                f"LoRA pairing is lost ({lost}). LoFT needs whole factors: use DDP or ZeRO stage "
                "0, and both factors trainable with DeepSpeed's bf16"
            )

    def _warn_one_sided(self, pair: Pair) -> None:
        """Say once that only one of its factors is being trained."""
        if self._warned_one_sided or (pair.b.grad is None) == (pair.a.grad is None):
            return
        idle = pair.b.name if pair.b.grad is None else pair.a.name
        self._warned_one_sided = True
        warnings.warn(
            f"{idle} has no gradient, so the other factor of its pair moves at every step "
            "(one-sided mode); further pairs like this are not reported",
            UserWarning,
            stacklevel=4,
        )


def _host_path(backend: str) -> HostPath:
    """Return the host path of a backend; kernels that decide on the device have none."""
    if backend == "cpu":
        from loft_kernels.backends.cpu import CpuStep

        return CpuStep()
    return functional.ReferenceStep()


_OLDER_DEFAULTS = {
    "maximize": False,
    "damping": 0.0,
    "alternate": True,
    "calibrate": True,
    "second_moment": "full",
    "format": FORMAT,
}

_KEPT_ATTRIBUTES = frozenset(
    {
        "backend",
        "precision",
        "max_grad_norm",
        "nonfinite_steps",
        "_slots",
        "_found",
        "_sizes",
        "_named",
        "_warned_one_sided",
        "_warned_fallback",
        "_said",
        "_building",
    }
)


def create_loft_optimizer(model: nn.Module, *, lr: float | Tensor, **options: Any) -> LoFTAdamW:
    """Create a :class:`LoFTAdamW` for a model with LoRA adapters, in the style of PEFT.

    Args:
        model: the PEFT model, or any module with LoRA pairs.
        lr: learning rate of the virtual weights.
        **options: the other arguments of :class:`LoFTAdamW`.

    Raises:
        TypeError: ``model`` is not a module, or an option is unknown.
        ValueError: the model has no trainable LoRA pair.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"create_loft_optimizer needs a module, got {type(model).__name__}")
    return LoFTAdamW(model, lr, **options)
