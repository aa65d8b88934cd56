"""Copies of models, also of those whose modules keep a result of a call, which torch does not copy."""

import copy
from collections.abc import Iterable

from torch import Tensor, nn


def copied(model: nn.Module, *, same: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy; results kept on modules (old-style weight norm) are values in it.

    Args:
        model: Any module.
        same: Tensors that the copy shares with the model.
    """
    kept = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)
    return copy.deepcopy(model, {id(v): v.detach().clone() for v in kept} | {id(v): v for v in same})
