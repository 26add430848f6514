"""The way in where a trainer makes the optimizer itself, from a class and keyword arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loft_kernels.optimizer import LoFTAdamW, create_loft_optimizer


class LoFTFactory:
    """Make a :class:`LoFTAdamW` from the model that a trainer has finished preparing.

    For ``transformers.Trainer`` and what derives from it, also where the adapters are made inside
    the trainer (TRL's ``peft_config``)::

        Trainer(..., optimizer_cls_and_kwargs=(LoFTFactory, {"lr": 1e-4, "max_grad_norm": 1.0}))

    The learning rate has to stand there: a trainer does not hand its own to a factory.
    """

    def __call__(self, model: nn.Module, *, lr: float | Tensor, **options: Any) -> LoFTAdamW:
        """Make the optimizer.

        Args:
            model: the model with its adapters.
            lr: learning rate of the virtual weights.
            **options: the other arguments of :class:`LoFTAdamW`.
        """
        return create_loft_optimizer(model, lr=lr, **options)
