"""Result folders, read: what `residuum probe` and `demo` wrote, checked and ready to be shown."""

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
TEXTS = ("title", "model", "weights", "data", "split", "loss", "command", "created")
ABOUT = dict.fromkeys(TEXTS, str) | {"examples": int, "seed": int, "versions": dict, "network": dict, "notes": list}
NETWORK = {"class": str, "sections": list}
SECTION = {"name": str, "blocks": list, "passed": list}
ADVICE = {"eps": float, "sentence": str, "sections": list}


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
        broken: How many examples have an output that is not finite. If it is so for all, nothing is here that says
            something of answers, nor any quantity that is not finite somewhere; for some, no loss.
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
    broken: int

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
        folder: A folder with profile.parquet, indices.json and provenance.json, and perhaps initial.parquet,
            shuffled.parquet, groups.parquet and history.json.

    Raises:
        ValueError: If a file is missing, cut short, or not what it should be.
    """
    if not folder.is_dir():
        raise ValueError(f"report: {folder} is not a folder; give folders that residuum probe or demo wrote")
    about, indices = _json(folder, "provenance.json"), _json(folder, "indices.json")
    lengths = _checked(folder, about, indices)
    names = list(lengths)
    frame = _frame(folder, "profile.parquet", lengths)
    beside = {
        name: _table(_frame(folder, f"{name}.parquet", lengths), names)
        if (folder / f"{name}.parquet").exists()
        else None
        for name in ("initial", "shuffled")
    }
    history = _json(folder, "history.json", list) if (folder / "history.json").exists() else []
    if not all(isinstance(row, dict) for row in history):
        raise _incomplete(folder, "history.json", "is not a list of epochs")
    broken = _broken(frame, names, about["examples"])
    lost = broken == about["examples"]
    return Result(
        label=about["title"],
        about=about,
        trained=_telling(_table(frame, names), frame, broken, lost=lost),
        initial=beside["initial"],
        initial_reason=str(indices.get("initial_reason") or "it was not measured"),
        indices={key: value for key, value in indices.items() if not (lost and "convergence" in key)},
        history=history,
        shuffled=beside["shuffled"],
        groups={} if lost else _groups(folder, lengths),
        infinite=_infinite(frame, names),
        own_branch=not ("update" in frame and (frame["update"] == "after - before").any()),
        broken=broken,
    )


def _checked(folder: Path, about: dict[str, Any], indices: dict[str, Any]) -> dict[str, int]:
    """Blocks by section, of a folder whose JSON files hold what the page reads."""
    path = folder / "provenance.json"
    _typed(path, about, ABOUT)
    _typed(path, about["network"], NETWORK, "network.")
    lengths = {}
    for number, section in enumerate(about["network"]["sections"]):
        _typed(path, {f"sections[{number}]": section}, {f"sections[{number}]": dict}, "network.")
        _typed(path, section, SECTION, f"network.sections[{number}].")
        lengths[section["name"]] = len(section["blocks"])
    _typed(folder / "indices.json", indices, {"measured": dict})
    if indices.get("advice"):
        _typed(folder / "indices.json", indices, {"advice": dict})
        _typed(folder / "indices.json", indices["advice"], ADVICE, "advice.")
    return lengths


def _typed(path: Path, content: dict[str, Any], kinds: dict[str, type], place: str = "") -> None:
    missing = [place + name for name in kinds if name not in content]
    if missing:
        raise ValueError(f"report: {path} lacks {', '.join(missing)}; probe the model again")
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            what = f"{place}{name} must be a {kind.__name__}, is {type(content[name]).__name__}"
            raise ValueError(f"report: {path}: {what}; probe the model again")


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


def _frame(folder: Path, name: str, lengths: dict[str, int]) -> "pandas.DataFrame":
    """The rows of a table; only quantities, sections and points that the page can place."""
    import pandas as pd

    try:
        frame = pd.read_parquet(folder / name)
    except FileNotFoundError:
        raise _incomplete(folder, name, "is missing") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise _incomplete(folder, name, f"is not a readable table ({error})") from error
    lacking = [column for column in COLUMNS if column not in frame]
    if lacking:
        raise _incomplete(folder, name, f"lacks {', '.join(lacking)}")
    strange = sorted(set(frame["section"]) - set(lengths))
    if strange:
        raise _incomplete(folder, name, f"has a section {strange[0]!r} that provenance.json does not name")
    further = frame["quantity"].str.startswith("unroll")  # steps after the last block
    beyond = frame.loc[~further & (frame["point"] > frame["section"].map(lengths))]
    if not beyond.empty:
        raise _incomplete(
            folder, name, f"has blocks of {beyond['section'].iloc[0]!r} that provenance.json does not name"
        )
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


def _broken(frame: "pandas.DataFrame", sections: Sequence[str], examples: int) -> int:
    """How many examples have no entropy at the end, because their output is not finite; 0 where it was not measured."""
    counts = frame.loc[frame["quantity"] == "entropy", ["section", "point", "count"]].itertuples(index=False)
    ends = [(sections.index(section), point, count) for section, point, count in counts]
    return examples - int(max(ends)[2]) if ends else 0


def _telling(table: Table, frame: "pandas.DataFrame", broken: int, *, lost: bool) -> Table:
    """The values that still say something where outputs are not finite."""
    if not lost:
        return {quantity: values for quantity, values in table.items() if not (broken and quantity == "loss")}
    finite = frame["mean"].abs() < math.inf
    without = set(frame.loc[~finite, "quantity"])
    return {q: values for q, values in table.items() if q not in without and not q.endswith(("accuracy", "chance"))}


def _groups(folder: Path, lengths: dict[str, int]) -> dict[str, Table]:
    """The tables of groups of examples, by name."""
    if not (folder / "groups.parquet").exists():
        return {}
    frame = _frame(folder, "groups.parquet", lengths)
    if "group" not in frame:
        raise _incomplete(folder, "groups.parquet", "lacks group")
    return {str(name): _table(rows, list(lengths)) for name, rows in frame.groupby("group")}
