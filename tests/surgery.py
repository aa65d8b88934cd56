"""The slow obvious twin of schedules: models whose lists of blocks are rebuilt by hand."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def outcome(model: nn.Module, x: Any) -> Tensor:
    """What the model itself answers: logits, or the first tensor of its output."""
    output = model(**x) if isinstance(x, dict) else model(x)
    if isinstance(output, Tensor):
        return output
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def rebuilt(model: nn.Module, path: str, order: Sequence[int]) -> nn.Module:
    """A copy of the model whose list of blocks at `path` holds the old blocks `order`, repeats included."""
    model = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = list(getattr(owner, name) if not name.isdigit() else owner[int(name)])
    blocks = [old[i] for i in order]
    new = nn.Sequential(*blocks) if isinstance(getattr(owner, name, None), nn.Sequential) else nn.ModuleList(blocks)
    if name.isdigit():
        owner[int(name)] = new
    else:
        setattr(owner, name, new)
    if hasattr(model, "config") and hasattr(model.config, "num_hidden_layers"):
        model.config.num_hidden_layers = len(blocks)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[0]] * len(blocks)
    return model


def without_branch(model: nn.Module, path: str) -> nn.Module:
    """A copy of the model whose shape-changing block at `path` is its skip alone."""
    model = copy.deepcopy(model)
    parent, _, number = path.rpartition(".")
    model.get_submodule(parent)[int(number)] = nn.Sequential(model.get_submodule(path).skip)
    return model
