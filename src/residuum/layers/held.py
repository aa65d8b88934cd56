"""What holds still: parametrized weights, which each look in training mode may change, and blocks to be inverted."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import nn
from torch.nn.utils import parametrize

_REPLAYED: ContextVar[bool] = ContextVar("_REPLAYED", default=False)


class Weights:
    """The parametrized weights of a module, looked at once, with their gradients.

    Args:
        module: The module; within `parametrize.cached()` what has been looked at already is taken.
    """

    def __init__(self, module: nn.Module) -> None:
        parametrized = part_copies_(module)
        with parametrize.cached():
            self.values = {
                (id(part), name): getattr(part, name) for part in parametrized for name in part.parametrizations
            }

    @contextmanager
    def used(self) -> Iterator[None]:
        """Whoever looks at them within gets these values, also later, when a look would give others."""
        with parametrize.cached():
            before = {key: parametrize._cache[key] for key in self.values if key in parametrize._cache}
            parametrize._cache.update(self.values)
            try:
                yield
            finally:
                for key in self.values:
                    parametrize._cache.pop(key)
                parametrize._cache.update(before)


def held(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the parametrized weights of a module are computed once, however often it runs."""
    return Weights(module).used()


def part_copies_(module: nn.Module) -> list[nn.Module]:
    """Make `parametrize.cached()` right for parametrized modules that are deep copies of each other.

    torch gives a parametrized module a class of its own, which its deep copies share, and whose properties keep what is
    cached under the identity of the first module: within `cached()` all copies would have the weight of whichever was
    looked at first, and its parameters would get their gradients. Here each gets a class of its own. Nothing else
    changes.

    Returns:
        The parametrized modules.
    """
    found = [part for part in parts(module) if "parametrizations" in part._modules]  # asking torch takes far longer
    for part in found:
        if vars(type(part)).get("_of") != id(part):
            part.__class__ = type(part).__bases__[0]
            parametrize._inject_new_class(part)
            for name in part.parametrizations:
                parametrize._inject_property(part, name)
            type(part)._of = id(part)  # which stays its own: the properties keep the module alive
    return found


def parts(module: nn.Module) -> list[nn.Module]:
    """All modules in one, and itself. `module.modules()` makes up their names as well: three times as long."""
    found = {module: None}
    todo = [module]
    while todo:
        for child in todo.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                todo.append(child)
    return list(found)


@contextmanager
def replayed() -> Iterator[None]:
    """Within it whoever inverts a block sees to random numbers, statistics and weights himself."""
    token = _REPLAYED.set(True)
    try:
        yield
    finally:
        _REPLAYED.reset(token)


def draws(module: nn.Module) -> bool:
    """Whether a module of torch's draws random numbers as it is: dropout, also of attention, and random slopes."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.training and module.dropout > 0
    return module.training and isinstance(module, nn.RReLU)


def check_still(module: nn.Module) -> None:
    """Refuse to invert what is no longer what ran forwards.

    Raises:
        ValueError: If a parametrized weight keeps a state that each look changes: it has buffers, is in training mode,
            and no `cached()` holds it still; if dropout in training mode would draw other numbers; or if a norm in
            training mode would count the batch again.
    """
    if _REPLAYED.get():
        return
    for part in parts(module):
        if draws(part):
            raise ValueError(
                f"inverse: {type(part).__name__} in training mode draws other numbers than in the forward, which had "
                "another function; use eval(), or reversible(), which draws them again"
            )
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.track_running_stats:
            raise ValueError(
                f"inverse: {type(part).__name__} in training mode would update its statistics a second time; use "
                "eval(), or reversible(), which counts each batch once"
            )
        for weight, chain in part._modules.get("parametrizations", {}).items():
            if not parametrize._cache_enabled and chain.training and next(chain.buffers(), None) is not None:
                name = next(name for name, one in module.named_modules() if one is part)
                raise ValueError(
                    f"inverse: {'.'.join(filter(None, (name, weight)))} changes each time it is used in training mode, "
                    "as limits do, so the forward had another one; use eval(), reversible(), or run forward and "
                    "inverse within one torch.nn.utils.parametrize.cached()"
                )
