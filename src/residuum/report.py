"""The report: result folders in, one self-contained HTML page out, for a reader who is new to such measurements."""

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from residuum import charts, readings, titles
from residuum.charts import Chart, Curve
from residuum.files import write_atomically
from residuum.readings import Row, Table, Value, cosine, listed, number, percent

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
        own_branch: True if all updates are the blocks' own branches, False if some are differences of states.
    """

    label: str
    about: dict[str, Any]
    trained: Table
    initial: Table | None
    initial_reason: str
    indices: dict[str, Any]
    history: list[dict[str, Any]]
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


class Panel(NamedTuple):
    """A chart under its conclusion."""

    chart: Chart
    title: str


def write(folders: Sequence[Path], out: Path) -> None:
    """Write one page about one result, or one page that compares several.

    Args:
        folders: Folders that `residuum probe`, `train` or `demo` wrote.
        out: The page to write, whole or not at all.

    Raises:
        ValueError: If no folder is given, or one is no complete result; the message says what is wrong with which.
        OSError: If the page cannot be written.
    """
    if not folders:
        raise ValueError("report: no result folder given; make one with: residuum probe MODEL --data D --out DIR")
    page = render(_labelled([read(Path(folder)) for folder in folders], [Path(folder) for folder in folders]))
    write_atomically(Path(out), lambda path: path.write_text(page, encoding="utf-8") and None)


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
    trained, own_branch = _table(folder, "profile.parquet", names)
    has_initial = (folder / "initial.parquet").exists()
    initial = _table(folder, "initial.parquet", names)[0] if has_initial else None
    history = _json(folder, "history.json", list) if (folder / "history.json").exists() else []
    return Result(
        str(about["title"]),
        about,
        trained,
        initial,
        str(indices.get("initial_reason") or "it was not measured"),
        indices,
        history,
        own_branch,
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


def _table(folder: Path, name: str, sections: Sequence[str]) -> tuple[Table, bool]:
    """The values of a table, without those undefined for every example; and whether updates are the blocks' own."""
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
    table: Table = {}
    for quantity, section, point, length, mean, stderr, count in frame[list(COLUMNS)].itertuples(index=False):
        if math.isfinite(mean):
            # One example has no standard error.
            error = float(stderr) if math.isfinite(stderr) else 0.0
            key = (sections.index(section), int(point), int(length))
            table.setdefault(str(quantity), {})[key] = Value(float(mean), error, int(count))
    return table, not (frame.get("update", pd.Series(dtype=str)) == "after - before").any()


def _labelled(results: list[Result], folders: list[Path]) -> list[Result]:
    """The same results under names that differ: the titles, with the folder's name or a number where those repeat."""
    labels = [result.label for result in results]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({folder.resolve().name})" for label, folder in zip(labels, folders, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{number + 1}: {label}" for number, label in enumerate(labels)]
    return [replace(result, label=label) for result, label in zip(results, labels, strict=True)]


def render(results: Sequence[Result]) -> str:
    """The page as HTML.

    Args:
        results: One result to be explained, or several to be compared.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    panels = one_panels(results[0]) if len(results) == 1 else many_panels(results)
    environment = Environment(
        loader=PackageLoader("residuum", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "cosine": cosine, "listed": listed}
    parts = Path(__file__).with_name("templates")
    js, plotly = (parts / "report.js").read_text(encoding="utf-8"), get_plotlyjs()
    return environment.get_template("report.html.j2").render(
        results=results,
        panels=panels,
        data=Markup(script_json({"charts": [panel.chart for panel in panels.values()]})),
        css=Markup((parts / "report.css").read_text(encoding="utf-8")),
        js=Markup(js),
        plotly=Markup(plotly),
        policy=policy((plotly, js)),
        sizes=readings.SIZES,
        comparable=_comparable(results),
    )


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character ends the element or starts a comment in it.

    Raises:
        ValueError: If a number is nan or infinite.
    """
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy(scripts: Sequence[str]) -> str:
    """What the browser lets the page do: run exactly these scripts, and load nothing from anywhere.

    Args:
        scripts: The text of each script of the page.
    """
    hashes = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def one_panels(result: Result) -> dict[str, Panel]:
    """The charts of one result by key; those that were not measured are left out."""
    trained_here = bool(result.about.get("training"))
    curves = [Curve("after training" if trained_here else "this model", result.trained, result.sections, 0)]
    if result.initial is not None:
        curves.append(Curve("at initialisation", result.initial, result.sections, 1, fresh=True))
    made = _along_depth(curves, result.about["loss"])
    made["cuts"] = charts.cheapest_cuts("cuts", "angular_distance", curves[0], label="turn, as part of a half turn")
    quantities = {key: quantity for key, quantity, *_ in DEPTH} | {"cuts": "angular_distance"}
    before = "before training" if trained_here else "at initialisation"
    found = {
        key: Panel(chart, titles.TITLES[key](result.trained, result.initial, result.lengths, before))
        for key, chart in made.items()
        if chart and quantities[key] in result.trained
    }
    found |= _further(curves)
    advice = [row for row in result.advice.get("sections", []) if row["fixed_distance"] > 0]
    if advice:
        eps = result.advice["eps"]
        found["depth"] = Panel(charts.depth_ranges("depth", advice, eps), titles.depth(advice, eps))
    if result.history and "test_accuracy" in result.history[-1]:
        found["training"] = Panel(charts.history("training", result.history), titles.training(result.history))
    return found


def many_panels(results: Sequence[Result]) -> dict[str, Panel]:
    """The charts that compare several results; the networks at initialisation are there, hidden at first."""
    curves = [Curve(result.label, result.trained, result.sections, i) for i, result in enumerate(results)]
    fresh = [
        Curve(f"{result.label}, at initialisation", result.initial, result.sections, i, fresh=True, hidden=True)
        for i, result in enumerate(results)
        if result.initial is not None
    ]
    losses = {result.about["loss"] for result in results}
    made = _along_depth([*curves, *fresh], losses.pop() if len(losses) == 1 else "different losses")
    networks = [(curve.name, curve.table, curve.lengths) for curve in curves]
    found = {}
    for key, quantity, *_ in DEPTH:
        having = [network for network in networks if quantity in network[1]]
        if made[key] and having:
            found[key] = Panel(made[key], titles.compared(key, having))
    found |= _further([*curves, *fresh])
    having = [network for network in networks if "scaled_perturbation" in network[1]]
    same_sections = len({len(lengths) for _, _, lengths in having}) == 1
    if same_sections and len({sum(lengths) for _, _, lengths in having}) > 1:
        found["law"] = Panel(charts.distance_by_depth("law", having), titles.law(having))
    return found


# key, quantity, label of the vertical axis, unit, whether its points are states, range of the axis
DEPTH = (
    ("step", "scaled_perturbation", "step, as part of the state's length", "%", False, None),
    ("distance", "scaled_perturbation", "steps added up, in lengths of the state", "", True, None),
    ("accuracy", "accuracy", "right answers", "%", True, (-0.02, 1.04)),
    ("loss", "loss", "loss", "", True, None),
    ("agreement", "agreement", "same answer as at the end", "%", True, (-0.02, 1.04)),
    ("angle", "update_angle", "cosine with the update before", "", False, (-1.05, 1.05)),
    ("last", "distance_to_last", "distance left, as part of the way", "%", True, None),
    ("pull", "gradient_cosine", "cosine of update and loss gradient", "", False, None),
    ("without", "drop_accuracy", "right answers without the block", "%", False, (-0.02, 1.04)),
    ("stretch", "update_lipschitz", "largest stretching by the update", "", False, None),
)
FURTHER = (
    ("perturbation", "perturbation", "Absolute perturbation: length of the update", "", False, None),
    ("norm", "state_norm", "Length of the state before the block", "", False, None),
    ("cosine", "cosine_to_last", "Cosine with the section's last state", "", True, None),
    ("influence", "block_influence", "Block influence (ShortGPT) of single blocks", "", False, None),
    ("entropy", "entropy", "Entropy of an early exit's answer, in nats", "", True, None),
    ("change", "label_change", "Examples whose answer the block changes", "%", True, None),
)


def _along_depth(curves: Sequence[Curve], loss: str) -> dict[str, Chart | None]:
    """The main charts along depth; None where no curve has the quantity."""
    made: dict[str, Chart | None] = {}
    for key, quantity, label, unit, state, span in DEPTH:
        tables = [charts.running(curve) for curve in curves] if key == "distance" else curves
        text = f"loss: {loss}" if key == "loss" else label
        made[key] = charts.along_depth(key, quantity, tables, label=text, unit=unit, state=state, span=span)
    return made


def _further(curves: Sequence[Curve]) -> dict[str, Panel]:
    """The charts of the quantities that the page only shows."""
    found = {}
    for key, quantity, label, unit, state, span in FURTHER:
        chart = charts.along_depth(key, quantity, curves, label="", unit=unit, state=state, span=span)
        if chart:
            found[key] = Panel({**chart, "height": 260}, label)
    return found


def _comparable(results: Sequence[Result]) -> list[str]:
    """What differs between results that are compared, so that their numbers are not taken for more than they are."""
    found = []
    for key, what in (("data", "data set"), ("split", "split"), ("loss", "loss"), ("examples", "number of examples")):
        values = sorted({str(result.about[key]) for result in results})
        if len(values) > 1:
            found.append(f"{what} ({'; '.join(values)})")
    if len({str(result.about.get("data_sha256")) for result in results}) > 1 and not found:
        found.append("data (their checksums differ)")
    return found
