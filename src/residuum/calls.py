"""Calls of modules: where the state stands among a block's arguments and in what it returns; eval mode for a while."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def state_slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a block's state stands among its arguments: the first floating-point tensor."""
    places = (*enumerate(args), *kwargs.items())
    return next((at for at, v in places if isinstance(v, Tensor) and v.is_floating_point()), None)


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str) -> Any:
    """What stands at one place among a block's arguments."""
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def state_of(output: Any) -> Tensor | None:
    """The state that a block returns: its output, or the first floating-point tensor of it, or its first tensor."""
    leaves = tree_flatten(output)[0]
    at = _state_at(leaves)
    return None if at is None else leaves[at]


def with_state(output: Any, h: Tensor) -> Any:
    """A block's output with another state in it."""
    leaves, form = tree_flatten(output)
    at = _state_at(leaves)
    return tree_unflatten([*leaves[:at], h, *leaves[at + 1 :]], form)


def _state_at(leaves: Sequence[Any]) -> int | None:
    tensors = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
    return next((i for i in tensors if leaves[i].is_floating_point()), tensors[0] if tensors else None)


def with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str, h: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another state in them."""
    if isinstance(slot, int):
        return (*args[:slot], h, *args[slot + 1 :]), kwargs
    return args, {**kwargs, slot: h}


def call_model(model: nn.Module, x: Any) -> Any:
    """The model on a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within it; then every module is in the mode in which it was, a batch norm that is frozen too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # a network may do more there than set modes
        for module, mode in modes.items():
            module.training = mode


def counting(x: Any) -> Tensor | None:
    """The tensor of a batch whose dimension 0 counts the examples; None if there is no tensor.

    It is the first one, unless that has one row that stands for all examples, as position_ids [1, token] can before
    input_ids [example, token].
    """
    values = tree_flatten(dict(x) if isinstance(x, Mapping) else x)[0]
    first, *others = [v for v in values if isinstance(v, Tensor) and v.ndim] or [None]
    if first is None or len(first) != 1:
        return first
    alike = (v for v in others if v.shape[1 : first.ndim] == first.shape[1:])
    return next((v for v in alike if len(v) != 1), first)


def output_of(output: Any) -> Tensor:
    """The tensor that a model's output stands for: its logits where it names them, else what `state_of` finds."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    found = logits if isinstance(logits, Tensor) else state_of(output)
    if found is None:
        kind = type(output).__name__
        raise ValueError(
            f"cut: the model returns {kind}, in which no tensor is found; return a tensor, a tuple, a mapping, or an "
            "object with `logits`"
        )
    return found


def detached(value: Any) -> Any:
    """A tensor without its gradient history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def cuda_devices(model: nn.Module) -> list[int]:
    """The graphics cards that a model uses."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
