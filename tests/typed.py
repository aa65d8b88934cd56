"""Checks of types and shapes by beartype and jaxtyping: at a function's first calls in each test.

At every call they would cost as much as what is tested. A function that had its checks is marked as
`typing.no_type_check` marks one, until the test ends. Functions local to others, made anew at each call, have none.
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from beartype import beartype

CALLS = 5

_calls: Counter[tuple[str, str]] = Counter()
_marked: list[Any] = []


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping asks whether arguments, or a returned value, are of the types of a function's signature."""
    if "<locals>" in function.__qualname__:
        return function
    check, place = beartype(function), (function.__module__, function.__qualname__)

    def counted(*args: Any, **kwargs: Any) -> Any:
        _calls[place] += 1
        if _calls[place] == 2 * CALLS:  # two questions per call
            _rest(*place)
        return check(*args, **kwargs)

    return counted


def begin() -> None:
    """Check all functions again."""
    _calls.clear()
    while _marked:
        del _marked.pop().__no_type_check__


def _rest(module: str, name: str) -> None:
    """Mark a function: below its other decorators, in a property its getter."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    function = getattr(found, "fget", None) or getattr(found, "__func__", found)
    while hasattr(function, "__wrapped__") and hasattr(function.__wrapped__, "__wrapped__"):
        function = function.__wrapped__
    if hasattr(function, "__wrapped__"):
        function.__no_type_check__ = True
        _marked.append(function)
