"""Graphs of autograd that are needed whatever mode the caller is in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def recorded() -> Iterator[None]:
    """A graph is recorded here, under `torch.no_grad` and `torch.inference_mode` as well.

    In inference mode `torch.enable_grad` does nothing: what then has no graph would pass for what has no derivative.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def leaf(x: Tensor) -> Tensor:
    """A leaf of a graph with these values, which are copied where they were made in inference mode."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def applied(f: Callable[[Tensor], Any], x: Tensor) -> Any:
    """f(x), where x is needed afterwards. In inference mode changes leave no trace, so f gets a copy.

    Raises:
        ValueError: If f changes x in place.
    """
    if x.is_inference():
        return f(x.clone())
    version = x._version
    out = f(x)
    if x._version != version:
        kind = type(f).__name__ if isinstance(f, nn.Module) else getattr(f, "__qualname__", type(f).__name__)
        raise ValueError(
            f"{kind} changes the state that it gets in place, as a ReLU(inplace=True) in front of a branch does; the "
            "state is needed afterwards: use the operation that gives a new tensor"
        )
    return out
