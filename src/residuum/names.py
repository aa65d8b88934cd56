"""Words for errors: the nearest known name for one that was mistyped; a long text in one line; names of functions."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def nearest(given: str, known: Iterable[str]) -> str:
    """The known names that are near to one that was typed, as a question; empty if none is near."""
    near = get_close_matches(given, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def unknown(what: str, given: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known, with the nearest known names and, if they are few, all of them.

    Args:
        what: What the name stands for, e.g. "probe".
        given: The name that was given.
        known: The names that are allowed.

    Returns:
        An error to raise: `unknown probe 'pair'; did you mean 'pairs'? known: pairs, readouts`.
    """
    known = list(known)
    every = f"known: {', '.join(known)}" if len(known) <= 30 else ""
    advice = " ".join(part for part in (nearest(given, known), every) if part)
    return ValueError(f"unknown {what} {given!r}; {advice or f'none of the {len(known)} known names is near'}")


def missing(path: Path, ending: str, what: str) -> OSError:
    """The error for a file that is not there, with the nearest of its kind in its folder.

    Args:
        path: The file.
        ending: Of files of its kind, such as ".npz".
        what: The kind in words, e.g. "an npz file".
    """
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder, not {what}")
    others = (other.name for other in path.parent.glob(f"*{ending}"))
    return FileNotFoundError(f"no such file: {path}; {nearest(path.name, others)}".rstrip("; "))


def one_line(error: BaseException) -> str:
    """The beginning of an error's text, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, or of an object's class, with that of its module."""
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
