"""Is calibration needed: the exact transition C against cheaper ones."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.experiments import factorisation, text
from bench.experiments.methods import FULL
from bench.experiments.record import Document, Request, document
from bench.experiments.study import study

COMPARED = ("exact C", "averaged C", "diagonal of C", "identity")
NOISY = {"decay": 1.0, "noise": 0.5}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "problem": {"rows": 24, "columns": 16, "target_rank": 8, **NOISY},
        "rank": 2,
        "steps": 20,
        "grid": [0.01, 0.03],
        "seeds": 2,
        "extensions": 0,
        "text": text.SIZES["tiny"],
    },
    "small": {
        "problem": {"rows": 256, "columns": 192, "target_rank": 128, **NOISY},
        "rank": 8,
        "steps": 150,
        "grid": [0.01, 0.02, 0.04, 0.08],
        "seeds": 3,
        "extensions": 3,
        "text": text.SIZES["small"],
    },
    "full": {
        "problem": {"rows": 1024, "columns": 768, "target_rank": 512, **NOISY},
        "rank": 8,
        "steps": 400,
        "grid": [0.0025, 0.005, 0.01, 0.02, 0.04],
        "seeds": 5,
        "extensions": 3,
        "text": text.SIZES["full"],
    },
}


def measure(request: Request) -> Document:
    """Compare the rules on a noisy matrix and on text."""
    settings = SIZES[request.size]
    asked = settings | {"device": request.device, "backend": request.backend}
    train = partial(factorisation.train, asked)
    # What calibration is for: to stay with the full weight's AdamW, which is cheap here.
    methods = (FULL, *COMPARED)
    on_matrix = study(train, methods, settings, request.workers, "calibration: matrix")
    # Without other data to look at, the best rate and its loss are one number: no contest.
    on_matrix["claims"] = None
    on_text = text.compare(COMPARED, request, settings["text"], "calibration: text")
    studies = {"matrix": on_matrix, "text": on_text}
    return document("calibration", request, settings, studies=studies)
