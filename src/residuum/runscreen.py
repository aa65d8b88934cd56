"""What `residuum runs` does: the table of all runs on the screen, two of them side by side, or a file."""

import re
from collections import Counter
from numbers import Real
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from residuum import flags as options
from residuum.files import write_atomically
from residuum.runindex import FIRST, LAST, RESULTS, row_of, table, text_of, where

if TYPE_CHECKING:
    import pandas

SHOWN = ("history.test_accuracy", "history.test_loss", "seconds")  # of every run, before what else there is room for
_SUMMARY = re.compile(r"history\.(?!seconds)\w+|values\.\w+|indices\.measured\.(\w+\.network|\w+)")
_DIGITS = 8  # of a key on the screen


def runs(flags: options.Runs, command: str) -> None:
    """List, compare or export the runs of a folder.

    Args:
        flags: The command's options.
        command: Not used.
    """
    screen = Console(highlight=False, markup=False)
    files = [path for path in (flags.csv, flags.parquet) if path is not None]
    if len({path.resolve() for path in files}) < len(files):
        raise ValueError(f"--csv and --parquet are both {flags.csv}; give two files")
    for path in files:
        if path.exists() and not flags.force:
            raise FileExistsError(f"{path} exists; choose another file, or replace it with --force")
    frame = table(flags.out, rebuild=flags.rebuild)
    chosen = frame
    for condition in flags.where:
        chosen = where(chosen, condition)
    if flags.csv is not None:
        write_atomically(flags.csv, lambda path: chosen.to_csv(path, index=False))
    if flags.parquet is not None:
        write_atomically(flags.parquet, lambda path: chosen.to_parquet(path, index=False))
    if flags.compare is not None:
        _compare(screen, row_of(frame, flags.compare[0]), row_of(frame, flags.compare[1]))
    elif not files:
        _list(screen, frame, chosen)
    for path in files:
        screen.print(f"{len(chosen)} runs, {chosen.shape[1]} columns: {path.resolve()}", soft_wrap=True)


def _list(screen: Console, frame: "pandas.DataFrame", chosen: "pandas.DataFrame") -> None:
    """The chosen runs: key, state, as many of the settings in which they differ as fit, results, and what failed."""
    states = ", ".join(f"{count} {state}" for state, count in Counter(chosen["state"]).most_common())
    number = f"{len(chosen)} of {len(frame)}" if len(chosen) < len(frame) else str(len(frame))
    screen.print(f"{number} runs" + (f": {states}" if states else ""))
    if not len(chosen):
        return
    varying = _varying(chosen)
    others = [name for name in SHOWN if name in chosen and chosen[name].notna().any()]
    others = [*[name for name in chosen if name.startswith("values.") and chosen[name].notna().any()][:3], *others]
    chosen = chosen.sort_values([*varying, "key"], kind="stable")
    cells = {name: _cells(chosen, name) for name in ("key", "state", *varying, *others)}
    names = _short(cells, frame.columns)
    width = {name: max(map(len, (names[name], *texts))) + 2 for name, texts in cells.items()}
    must = ("key", "state", *others[:1])
    room = screen.width - sum(width[name] for name in must)
    shown, left = [*must], []
    for name in (*sorted(varying, key=lambda name: name != "seed"), *others[1:]):
        (shown if width[name] <= room else left).append(name)
        room -= width[name] if width[name] <= room else 0
    columns = [name for name in cells if name in shown]
    grid = Table(box=None, pad_edge=False)
    for name in columns:
        justify = "right" if chosen[name].dtype.kind in "iuf" else "left"
        grid.add_column(names[name], justify=justify, no_wrap=True, overflow="ellipsis")
    for row in zip(*(cells[name] for name in columns), strict=True):
        grid.add_row(*row)
    screen.print(grid)
    if left:
        screen.print(f"no room for {', '.join(left)}: --csv FILE has all", soft_wrap=True)
    for key, state, error in zip(cells["key"], cells["state"], _cells(chosen, "error"), strict=True):
        if error:
            screen.print(f"{key} {state}: {error}", soft_wrap=True)


def _varying(frame: "pandas.DataFrame") -> list[str]:
    """The settings in which runs differ, each difference once: coupled or not is said by the strength alone."""
    settings = [name for name in frame.columns if name not in (*FIRST, *LAST) and not name.startswith(RESULTS)]
    differ = [name for name in settings if frame[name].nunique(dropna=False) > 1]
    more = [n for n in differ if frame[n].nunique() > 1 or n.rpartition(".")[0] not in differ]
    return [name for name in more if not any(other.startswith(f"{name}.") for other in more)]


def _compare(screen: Console, a: "pandas.Series", b: "pandas.Series") -> None:
    """In what two runs differ: settings, the last epoch, and what sums up the whole network after training."""
    grid = Table("", a["key"][:_DIGITS], b["key"][:_DIGITS], "difference", box=None, pad_edge=False)
    same, more = Counter(), 0
    for name in a.index:
        own, other = text_of(a[name]), text_of(b[name])
        if name in ("key", "finished") or not (own or other):
            continue
        if own == other:
            same["results" if name.startswith(RESULTS) else "settings"] += name not in (*FIRST, *LAST)
        elif name.startswith(RESULTS) and not _SUMMARY.fullmatch(name):
            more += 1
        else:
            numbers = all(isinstance(value, Real) and not isinstance(value, bool) for value in (a[name], b[name]))
            grid.add_row(name.removeprefix("indices."), own, other, f"{b[name] - a[name]:+.3g}" if numbers else "")
    screen.print(grid)
    screen.print(f"the same in both: {same['settings']} settings, {same['results']} results")
    if more:
        screen.print(f"{more} more results differ: --csv FILE has all")


def _cells(frame: "pandas.DataFrame", name: str) -> list[str]:
    texts = [text_of(value) for value in frame[name]]
    if name == "key":
        return [text[:_DIGITS] for text in texts]
    return [" ".join(text.split()) for text in texts]


def _short(names: "dict[str, list[str]]", every: "pandas.Index") -> dict[str, str]:
    """Of each name the shortest end that no other column has."""
    found = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        others = [f".{n}" for n in every if n != name and not n.startswith(RESULTS)]
        free = (end for end in ends if end == name or not any(other.endswith(f".{end}") for other in others))
        found[name] = next(free)
    return found
