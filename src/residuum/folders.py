"""Result folders, read: what `residuum probe`, `train` and `demo` wrote, checked and ready to be shown."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residuum import readings
from residuum.readings import Row, Table, Value

if TYPE_CHECKING:
    import pandas

COLUMNS = ("quantity", "section", "point", "length", "mean", "stderr", "count")
NEEDED = ("title", "model", "weights", "data", "split", "examples", "loss", "seed", "command", "created", "versions")
NEEDED_OF_NETWORK = ("class", "sections")


@dataclass(frozen=True)
class Result:
    """What one folder holds.

    Attributes:
        label: Short name, different for every result on the page.
        about: provenance.json.
        trained: The values of the model as it was given.
        initial: Those of the network at initialisation, or None.
        initial_reason: Why there is none.
        indices: indices.json.
        history: One dictionary per epoch of training; empty where the model was not trained here.
        shuffled: The values of the same network trained on shuffled labels, or None.
        groups: The values of "borderline", "correct" and "all" examples; empty where no margins were measured.
        infinite: Quantities with the points where their mean is infinite, because some example's is.
        own_branch: True if all updates are the blocks' own branches, False if some are differences of states.
    """

    label: str
    about: dict[str, Any]
    trained: Table
    initial: Table | None
    initial_reason: str
    indices: dict[str, Any]
    history: list[dict[str, Any]]
    shuffled: Table | None
    groups: dict[str, Table]
    infinite: dict[str, set[tuple[int, int, int]]]
    own_branch: bool

    @property
    def sections(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Name and block names of each section."""
        return tuple((part["name"], tuple(part["blocks"])) for part in self.about["network"]["sections"])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Blocks per section."""
        return tuple(len(names) for _, names in self.sections)

    @property
    def advice(self) -> dict[str, Any]:
        """The range of depths; empty where no perturbations were measured."""
        return self.indices.get("advice") or {}

    @property
    def rows(self) -> list[Row]:
        """The table of blocks."""
        return readings.rows(self.trained, self.initial, self.sections)


def read(folder: Path) -> Result:
    """Read a result folder.

    Args:
        folder: A folder with profile.parquet, indices.json and provenance.json, and perhaps initial.parquet and
            history.json.

    Raises:
        ValueError: If a file is missing, cut short, or not what it should be.
    """
    if not folder.is_dir():
        raise ValueError(f"report: {folder} is not a folder; give folders that residuum probe, train or demo wrote")
    about, indices = _json(folder, "provenance.json"), _json(folder, "indices.json")
    missing = [name for name in (*NEEDED, "network") if name not in about]
    missing += [f"network.{name}" for name in NEEDED_OF_NETWORK if name not in about.get("network", {})]
    if missing:
        raise ValueError(f"report: {folder / 'provenance.json'} lacks {', '.join(missing)}; probe the model again")
    names = [part["name"] for part in about["network"]["sections"]]
    frame = _frame(folder, "profile.parquet", names)
    beside = {
        name: _table(_frame(folder, f"{name}.parquet", names), names) if (folder / f"{name}.parquet").exists() else None
        for name in ("initial", "shuffled")
    }
    history = _json(folder, "history.json", list) if (folder / "history.json").exists() else []
    return Result(
        label=str(about["title"]),
        about=about,
        trained=_table(frame, names),
        initial=beside["initial"],
        initial_reason=str(indices.get("initial_reason") or "it was not measured"),
        indices=indices,
        history=history,
        shuffled=beside["shuffled"],
        groups=_groups(folder, names),
        infinite=_infinite(frame, names),
        own_branch=not ("update" in frame and (frame["update"] == "after - before").any()),
    )


def _json(folder: Path, name: str, kind: type = dict) -> Any:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _incomplete(folder, name, "is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _incomplete(folder, name, f"is not readable JSON ({error})") from error
    if not isinstance(content, kind):
        raise _incomplete(folder, name, f"is not a {kind.__name__}")
    return content


def _incomplete(folder: Path, name: str, what: str) -> ValueError:
    return ValueError(
        f"report: {folder} is not a complete result: {name} {what}; "
        "make one with: residuum probe MODEL --data D --out DIR"
    )


def _frame(folder: Path, name: str, sections: Sequence[str]) -> "pandas.DataFrame":
    """The rows of a table; only quantities, sections and points that the page can place."""
    import pandas as pd

    try:
        frame = pd.read_parquet(folder / name)
    except FileNotFoundError:
        raise _incomplete(folder, name, "is missing") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise _incomplete(folder, name, f"is not a readable table ({error})") from error
    lacking = [column for column in COLUMNS if column not in frame]
    if lacking or frame.empty:
        raise _incomplete(folder, name, f"lacks {', '.join(lacking)}" if lacking else "has no rows")
    strange = sorted(set(frame["section"]) - set(sections))
    if strange:
        raise _incomplete(folder, name, f"has a section {strange[0]!r} that provenance.json does not name")
    return frame


def _table(frame: "pandas.DataFrame", sections: Sequence[str]) -> Table:
    """The values of a table, without those undefined for every example and without infinite ones."""
    table: Table = {}
    for quantity, section, point, length, mean, stderr, count in frame[list(COLUMNS)].itertuples(index=False):
        if math.isfinite(mean):
            # One example has no standard error.
            error = float(stderr) if math.isfinite(stderr) else 0.0
            key = (sections.index(section), int(point), int(length))
            table.setdefault(str(quantity), {})[key] = Value(float(mean), error, int(count))
    return table


def _infinite(frame: "pandas.DataFrame", sections: Sequence[str]) -> dict[str, set[tuple[int, int, int]]]:
    """Where a mean is infinite."""
    found: dict[str, set[tuple[int, int, int]]] = {}
    rows = frame.loc[frame["mean"].abs() == math.inf, ["quantity", "section", "point", "length"]]
    for quantity, section, point, length in rows.itertuples(index=False):
        found.setdefault(str(quantity), set()).add((sections.index(section), int(point), int(length)))
    return found


def _groups(folder: Path, sections: Sequence[str]) -> dict[str, Table]:
    """The tables of groups of examples, by name."""
    if not (folder / "groups.parquet").exists():
        return {}
    frame = _frame(folder, "groups.parquet", sections)
    if "group" not in frame:
        raise _incomplete(folder, "groups.parquet", "lacks group")
    return {str(name): _table(rows, sections) for name, rows in frame.groupby("group")}
