"""The ways to train that the experiments compare: what is trained, and by which optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import loft_kernels as lk
from bench.experiments.transition import TransportedLoFT

FULL, LORA, DORA, LOFT = "full AdamW", "LoRA", "DoRA", "LoFT"
SIMPLE, SIMULTANEOUS, UNCALIBRATED = "LoFT simple", "LoFT, no alternation", "LoFT, no calibration"


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        adapter: None where every weight is trained, else "lora" or "dora".
        loft: options of LoFTAdamW; None where AdamW steps.
        transition: name of a rule of :mod:`transition`, which takes LoFTAdamW's place.
    """

    adapter: str | None
    loft: Mapping[str, Any] | None = None
    transition: str | None = None


METHODS = {
    FULL: Method(None),
    LORA: Method("lora"),
    DORA: Method("dora"),
    LOFT: Method("lora", {}),
    SIMPLE: Method("lora", {"second_moment": "diagonal"}),
    SIMULTANEOUS: Method("lora", {"alternate": False}),
    UNCALIBRATED: Method("lora", {"calibrate": False}),
    "exact C": Method("lora", transition="exact"),
    "averaged C": Method("lora", transition="averaged"),
    "diagonal of C": Method("lora", transition="diagonal"),
    "identity": Method("lora", transition="identity"),
}

ABLATIONS = {"calibrate", "second_moment"}  # options that the reference path alone serves


def make_optimizer(
    name: str, model: nn.Module, lr: float, backend: str = "auto"
) -> torch.optim.Optimizer:
    """Build a method's optimizer over a model that is adapted already; no weight decay anywhere.

    Args:
        name: a key of METHODS.
        model: its parameters that want a gradient are trained.
        lr: learning rate.
        backend: of LoFTAdamW; ablations that it does not serve take the reference path.
    """
    method = METHODS[name]
    if method.transition is not None:
        return TransportedLoFT(model, lr=lr, transition=method.transition)
    if method.loft is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    if method.loft.keys() & ABLATIONS:
        # Known and of no consequence to the losses; from any other method it would be news.
        warnings.filterwarnings("ignore", message="the LoFT step runs on the reference path")
    return lk.LoFTAdamW(model, lr=lr, backend=backend, **method.loft)
