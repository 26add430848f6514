"""Factors whose place in the model another tensor has taken since the optimizer was made.

The optimizer's own tensors get no gradient then: they would rest for ever, without a word.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from loft_kernels.layers import as_matrix, factors_of
from loft_kernels.plan import Pair
from loft_kernels.state import check_factor


class Held:
    """The factors of a pair as the model held them when they were paired.

    A copy or pickle of the optimizer belongs to no model and checks nothing.

    Args:
        place: the module and the adapter, if they are known.
        lora_B: held there.
        lora_A: held there.
    """

    def __init__(
        self, place: tuple[weakref.ref[nn.Module], str] | None, lora_B: Tensor, lora_A: Tensor
    ) -> None:
        """Remember which they were, and keep none of them alive."""
        self._place = place
        # torch swaps no tensor that a weak reference points to (`Module.to` does, if asked).
        self._identities = id(lora_B), id(lora_A)

    def check(self, pair: Pair) -> None:
        """Notice that the model trains other tensors in place of factors without a gradient.

        Raises:
            NotImplementedError: a wrapper sharded or flattened them.
            RuntimeError: something else exchanged them.
        """
        layer = None if self._place is None else self._place[0]()
        if self._place is None or layer is None:
            return
        held = factors_of(layer, self._place[1])
        for factor, then, now in zip((pair.b, pair.a), self._identities, held, strict=True):
            # Copies that somebody put into the optimizer leave the model as it was.
            if factor.grad is not None or now is None or id(now) == then:
                continue
            check_not_flat(factor.name, now)
            if now.is_leaf and now.grad is not None:
                check_factor(factor.name, as_matrix(factor.name, now))
                raise RuntimeError(
                    f"{factor.name} has no gradient, because the model holds another tensor in its "
                    "place since the optimizer was made (load_state_dict(assign=True)?): make the "
                    "optimizer afterwards"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Drop what neither pickles nor belongs to a copy."""
        return {"_place": None, "_identities": None}


def check_not_flat(name: str, factor: Tensor) -> None:
    """Refuse what FSDP1 leaves in a module: a view of the parameter that it trains."""
    if not isinstance(factor, nn.Parameter) and isinstance(factor._base, nn.Parameter):
        raise NotImplementedError(
            f"{name} is a part of a flat parameter, as FSDP1 makes it with use_orig_params=False: "
            "LoFT needs whole factors. Use DDP, or FSDP2 with the LoRA parameters in "
            "fully_shard(ignored_params=...) and all-reduce their gradients before step()"
        )
