"""Settings as JSON and back, and the key of what they describe: one form for all frozen dataclasses."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from residuum.names import unknown

_KEY = 16  # hexadecimal digits: two of a million runs share a key with a chance of 3e-8


def described(value: Any, *, defaults: bool = True) -> Any:
    """Settings as JSON values: of a dataclass its kind and its fields.

    Args:
        value: A frozen dataclass, a tuple, a number, a text, a truth value or None; likewise all within it.
        defaults: False leaves out fields that have their default value, so that a field that is added later, with the
            old behaviour as its default, changes no description that was written before.

    Raises:
        ValueError: If there is anything else in it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        given = [(f.name, getattr(value, f.name)) for f in fields(value) if defaults or not _has_default(value, f)]
        return {"kind": type(value).__name__} | {name: described(part, defaults=defaults) for name, part in given}
    if isinstance(value, tuple | list):
        return [described(part, defaults=defaults) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r} is a {type(value).__name__}; settings are dataclasses, tuples, numbers and texts")


def rebuilt(written: Any, kinds: Iterable[type]) -> Any:
    """What `described` wrote, checked anew as it is built; a field that is not written has its default.

    Args:
        written: JSON values.
        kinds: The dataclasses that may be in it.

    Raises:
        ValueError: If it names a kind that is not among them, or has a field that the kind has not, or lacks one.
    """
    return _rebuilt(written, {kind.__name__: kind for kind in kinds})


def canonical(description: Any) -> str:
    """The one text of a description, whatever the order of its fields; 1 and 1.0 are one number.

    Raises:
        ValueError: If it holds nan or infinity.
    """
    return json.dumps(_plain(description), sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(description: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical text of a description."""
    return sha256(canonical(description).encode()).hexdigest()[:_KEY]


def _has_default(value: Any, field: Field) -> bool:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    return made is not MISSING and getattr(value, field.name) == made


def _rebuilt(written: Any, kinds: dict[str, type]) -> Any:
    if isinstance(written, list):
        return tuple(_rebuilt(part, kinds) for part in written)
    if not isinstance(written, dict):
        return written
    given = {name: _rebuilt(value, kinds) for name, value in written.items()}
    name = given.pop("kind", None)
    if name not in kinds:
        raise unknown("kind of settings", str(name), kinds)
    known = {f.name: f for f in fields(kinds[name])}
    strange = sorted(given.keys() - known)
    if strange:
        raise ValueError(f"{name} has no {strange[0]!r}; it has {list(known)}")
    lacking = [key for key, f in known.items() if key not in given and f.default is f.default_factory is MISSING]
    if lacking:
        raise ValueError(f"{name} needs {lacking[0]!r}, which is not given")
    return kinds[name](**given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
