"""The loss curves of the experiments' LoFT runs, which must not depend on the backend."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from bench.experiments import cross_term, dynamics, factorisation, memory, text
from bench.experiments.methods import LOFT, SIMULTANEOUS
from bench.experiments.record import Document, Request, document
from bench.experiments.study import Run
from bench.record import largest

LIMIT = 1e-3  # largest relative difference of two losses at one step
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 10, "every": 5},
    "small": {"steps": 200, "every": 10},
    "full": {"steps": 200, "every": 10},
}
# Moderate: no curve has reached its floor within the steps, where rounding alone decides.
RATES = {
    "factorisation": 0.01,
    "simultaneous": 0.005,
    "memory": 0.01,
    "text": 2e-3,
    "dynamics": 1e-4,
}
FULL_RATES = RATES | {"text": 1e-3, "dynamics": 3e-5}  # larger networks learn in fewer steps

Curve = list[tuple[int, float]]


def on_matrix(
    settings: Mapping[str, Any], method: str, lr: float
) -> Callable[[Mapping[str, Any]], Curve]:
    """Return what trains a matrix experiment's LoFT."""

    def trained(asked: Mapping[str, Any]) -> Curve:
        rank = settings.get("rank") or settings["ranks"][-2]
        points = asked["steps"] // asked["every"]
        done = factorisation.train(
            {**settings, **asked, "rank": rank, "points": points}, Run(method, lr, 0)
        )
        return list(zip(done["steps"], done["curve"], strict=True))

    return trained


def on_model(
    experiment: Any, request: Request, folder: str, lr: float
) -> Callable[[Mapping[str, Any]], Curve]:
    """Return what adapts a network by LoFT; it is pretrained once, for every backend."""
    settings = experiment.SIZES[request.size]
    path = experiment.start(settings, request, folder)

    def trained(asked: Mapping[str, Any]) -> Curve:
        evaluations = asked["steps"] // asked["every"]
        done = experiment.train(
            {**settings, **asked, "evaluations": evaluations}, path, Run(LOFT, lr, 0)
        )
        return list(zip(done["steps"], done["curve"], strict=True))

    return trained


def apart_by(value: float, exact: float) -> float:
    """Return the relative difference of two losses."""
    if exact == 0:
        return 0.0 if value == 0 else math.inf
    return abs(value - exact) / abs(exact)


def compare(
    trained: Callable[[Mapping[str, Any]], Curve],
    asked: Mapping[str, Any],
    backends: tuple[str, ...],
) -> dict[str, Any]:
    """Train with every backend; the first is the measure of the others."""
    curves = {b: trained({**asked, "backend": b}) for b in backends}
    truth = curves[backends[0]]
    apart = {
        step: largest(apart_by(curves[backend][k][1], exact) for backend in backends[1:])
        for k, (step, exact) in enumerate(truth)
    }
    worst = max((difference, step) for step, difference in apart.items())
    return {
        "largest_relative_difference": worst[0],
        "at_step": worst[1],
        "limit": LIMIT,
        "ok": worst[0] <= LIMIT,
        "first": truth[0][1],
        "last": truth[-1][1],
        "steps": [step for step, _ in truth],
        "curves": {backend: [loss for _, loss in curve] for backend, curve in curves.items()},
    }


def measure(request: Request) -> Document:
    """Compare the backends on every experiment."""
    size, backends = request.size, request.backends
    settings = SIZES[size] | {"backends": list(backends)}
    asked = SIZES[size] | {"device": request.device}
    rates = FULL_RATES if size == "full" else RATES
    rows = []

    def add(name: str, trained: Callable[[Mapping[str, Any]], Curve]) -> None:
        rows.append({"experiment": name, "lr": rates[name]} | compare(trained, asked, backends))

    with warnings.catch_warnings():
        # A backend that hands its work to another one must not be praised for it.
        warnings.filterwarnings("error", message="the LoFT step runs on the reference path")
        for name, experiment, method in (
            ("factorisation", factorisation, LOFT),
            ("simultaneous", cross_term, SIMULTANEOUS),
            ("memory", memory, LOFT),
        ):
            add(name, on_matrix(experiment.SIZES[size], method, rates[name]))
        for name, experiment in (("text", text), ("dynamics", dynamics)):
            with tempfile.TemporaryDirectory() as folder:
                add(name, on_model(experiment, request, folder, rates[name]))
    return document("same-curves", request, settings, rows=rows)
