"""The table of all runs of a folder, one row each, with an index that makes reading it fast and can be rebuilt."""

import json
import math
import operator
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residuum import runfolders
from residuum.files import write_atomically
from residuum.names import unknown

if TYPE_CHECKING:
    import pandas

INDEX = "runs.parquet"
_VERSION = 1  # of the rows; rows of another one are read anew
_LONGEST = 8  # lists of results that are longer are left out: what is wanted has one entry per section
_SEEN = "_seen"  # column: what the folder's files looked like when the row was made
FIRST = ("key", "state", "kind")
LAST = ("seconds", "finished", "version", "error")
RESULTS = ("history.", "indices.", "values.")
_DTYPES = {
    frozenset([bool]): "boolean",
    frozenset([int]): "Int64",
    frozenset([float]): "Float64",
    frozenset([int, float]): "Float64",
}
_CONDITION = re.compile(r"\s*([\w.]+)\s*(!=|<=|>=|==?|<|>)(?![=<>])(.*)", re.DOTALL)
_COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def table(out: Path, *, rebuild: bool = False) -> "pandas.DataFrame":
    """All runs of a folder: settings, how they stand, and the numbers that sum them up.

    One row per run. Columns: key, state (see `runfolders.Standing`), kind; every setting by its dotted name
    ("model.blocks"); "history.", the last epoch's row; "indices.", as indices.json has them; "values." of jobs that are
    no networks; seconds (since the run was last begun), finished, version (of the code that ended or began it), error.
    Of lists among the results those of at most 8 entries are there, each entry in a column (".0": the first section).

    Rows whose files look as they did (names, sizes, times) are taken from OUT/runs.parquet; the others are read, every
    byte of a complete run being checked, and the index is written anew.

    Args:
        out: Folder of runs.
        rebuild: Read all rows anew, so that damage is found that left sizes and times as they were.

    Raises:
        FileNotFoundError: If `out` is no folder of runs.
    """
    out = Path(out)
    seen = {key: _look(out / "runs" / key) for key in runfolders.keys(out)}
    index = None if rebuild else _read(out / INDEX)
    if index is not None and dict(zip(index["key"], index[_SEEN], strict=True)) == seen:
        return index.drop(columns=_SEEN)
    kept = {} if index is None else _columns(index[index[_SEEN] == index["key"].map(seen)])
    known = set(kept.get("key", ()))
    rows = [_row(out / "runs" / key) | {_SEEN: look} for key, look in seen.items() if key not in known]
    frame = _typed(kept, len(known), rows).sort_values("key", ignore_index=True)
    with suppress(OSError):  # somebody else's runs, or a full disk: the index only saves time
        write_atomically(out / INDEX, lambda path: frame.to_parquet(path, index=False))
    return frame.drop(columns=_SEEN)


def where(frame: "pandas.DataFrame", condition: str) -> "pandas.DataFrame":
    """The rows for which a condition holds.

    Args:
        frame: What `table` gives.
        condition: COLUMN=VALUE, or with ==, !=, <, <=, >, >=. A column may be named by its end ("blocks") if that is
            clear.
            Numbers are compared as numbers, anything else as text; "none" is a setting that is not there.

    Raises:
        ValueError: If it is not of this form, no column is of that name, or texts are compared by size.
    """
    found = _CONDITION.fullmatch(condition)
    if not found:
        raise ValueError(f"where {condition!r}: give COLUMN=VALUE, or with != < <= > >=")
    name, sign, wanted = found[1], found[2].replace("==", "="), found[3].strip()
    column = frame[column_named(frame, name)]
    if wanted.lower() == "none":
        if sign not in ("=", "!="):
            raise ValueError(f"where {condition!r}: none is neither small nor large; use = or !=")
        return frame[column.isna() == (sign == "=")]
    number = _number(wanted)
    if number is not None and column.dtype.kind in "iuf":
        return frame[(_COMPARE[sign](column, number) & column.notna()).fillna(False).astype(bool)]
    if sign not in ("=", "!="):
        raise ValueError(f"where {condition!r}: the values of {column.name} or {wanted!r} are no numbers; use = or !=")
    texts = column.map(lambda value: None if _absent(value) else text_of(value).lower().replace(" ", ""))
    return frame[_COMPARE[sign](texts, wanted.lower().replace(" ", ""))]


def column_named(frame: "pandas.DataFrame", name: str) -> str:
    """The column of that name, or the only one that ends with it; a setting comes before a result.

    Raises:
        ValueError: If there is none, or several.
    """
    if name in frame.columns:
        return name
    ending = [column for column in frame.columns if column.endswith(f".{name}")]
    ending = [column for column in ending if not column.startswith(RESULTS)] or ending
    if len(ending) > 1:
        raise ValueError(f"column {name!r} can be {', '.join(ending[:5])}; give more of its name")
    if not ending:
        raise unknown("column", name, frame.columns)
    return ending[0]


def row_of(frame: "pandas.DataFrame", key: str) -> "pandas.Series":
    """The row of a run by its key, or by the first digits of it.

    Raises:
        ValueError: If there is none, or several.
    """
    found = frame[frame["key"].str.startswith(key)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of {len(frame)} runs have a key that begins with {key!r}; give more of it")
    return found.iloc[0]


def text_of(value: Any) -> str:
    """A cell as a short text; empty where nothing is."""
    if _absent(value):
        return ""
    if hasattr(value, "item"):
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _look(folder: Path) -> str:
    """What a folder looks like from outside; the log may grow."""
    files: dict[str, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name != runfolders.LOG:
                with suppress(FileNotFoundError):  # a temporary name: somebody works on the run
                    files[entry.name] = entry.stat()
    looks = (f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in sorted(files.items()))
    return " ".join((str(_VERSION), *looks))


def _read(path: Path) -> "pandas.DataFrame | None":
    """The index; None if there is none that can be used."""
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        return None
    return frame if {"key", _SEEN} <= set(frame.columns) else None


def _row(folder: Path) -> dict[str, Any]:
    standing = runfolders.stand(folder)
    run, done = (runfolders.read_object(folder / name) for name in ("run.json", "done.json"))
    row: dict[str, Any] = {"key": folder.name, "state": standing.state}
    row |= _flat(run.get("settings", {}), "")
    row["kind"] = run.get("description", {}).get("kind")
    if standing.state == "complete":
        history = _json(folder / "history.json") or [{}]
        row |= _flat(history[-1], "history.", _LONGEST)
        for name in ("indices", "values"):
            row |= _flat(_json(folder / f"{name}.json") or {}, f"{name}.", _LONGEST)
        row |= {"seconds": done["seconds"], "finished": done["finished"]}
    row["version"] = done.get("versions", run).get("residuum", run.get("version"))
    return row | {"error": standing.reason or None}


def _flat(content: dict[str, Any], before: str, longest: int = 0) -> dict[str, Any]:
    """Dotted names and values; a list is a text, or among results a value per entry if it is not too long."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, list) and longest:
            value = {str(i): part for i, part in enumerate(value)} if len(value) <= longest else {}
        if isinstance(value, dict):
            found |= {before + name: value["kind"]} if before and "kind" in value else {}
            found |= _flat(value, f"{before}{name}.", longest)
        elif name != "kind":
            found[before + name] = json.dumps(value) if isinstance(value, list) else value
    return found


def _columns(frame: "pandas.DataFrame") -> dict[str, list[Any]]:
    """The cells of a table, None where nothing is."""
    return {name: column.astype(object).where(column.notna(), None).tolist() for name, column in frame.items()}


def _typed(kept: dict[str, list[Any]], count: int, rows: list[dict[str, Any]]) -> "pandas.DataFrame":
    """So many kept rows and new ones; each column truth values, whole numbers, numbers or texts, with gaps."""
    import pandas as pd

    names = dict.fromkeys((*FIRST, *LAST, _SEEN, *kept)) | dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in _ordered(names):
        values = [*kept.get(name, [None] * count), *(row.get(name) for row in rows)]
        kinds = {type(value) for value in values if value is not None}
        dtype = _DTYPES.get(frozenset(kinds), "string")
        if dtype == "string":
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        columns[name] = pd.array(values, dtype=dtype)
    return pd.DataFrame(columns)


def _ordered(names: Iterable[str]) -> list[str]:
    """What a run is, its settings, its results, and the rest; names with a common beginning together."""
    first: dict[str, int] = {}

    def place(name: str) -> list[int]:
        parts = name.split(".")
        return [first.setdefault(".".join(parts[: i + 1]), len(first)) for i in range(len(parts))]

    places = {name: place(name) for name in names}
    between = sorted(places.keys() - {*FIRST, *LAST, _SEEN}, key=places.__getitem__)
    results = [name for name in between if name.startswith(RESULTS)]
    return [*FIRST, *(name for name in between if not name.startswith(RESULTS)), *results, *LAST, _SEEN]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _absent(value: Any) -> bool:
    import pandas as pd

    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
