"""What solvers took while a network was trained, as the report shows it: over the epochs, and in the last one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from residuum import plots
from residuum.charts import Chart
from residuum.facts import Facts
from residuum.folders import Result
from residuum.readings import Value, number, percent, place


class Shown(NamedTuple):
    """What a chart of solves shows.

    Attributes:
        direction: "forward" or "backward".
        field: What of `residuum.solving.summary`.
        label: Of the vertical axis.
        unit: "%" for parts of one.
        beginning: How its title begins.
        worst: What the block with the largest value is called there.
    """

    direction: str
    field: str
    label: str
    unit: str
    beginning: str
    worst: str


PRODUCTS, FALL = "products with the Jacobian per batch", "residual after a step of the solver"
SHOWN = {
    "solves": Shown("forward", "evaluations", "evaluations of f per batch", "", "A solve takes {} evaluations", "most"),
    "solves_backward": Shown("backward", "evaluations", PRODUCTS, "", "Backwards a solve takes {} products", "most"),
    "solves_contraction": Shown("forward", "contraction", FALL, "%", "A step lowers the residual to {}", "slowest"),
    "solves_contraction_backward": Shown(
        "backward", "contraction", FALL, "%", "Backwards a step lowers the residual to {}", "slowest"
    ),
}
COLUMNS = ("block", "pass", "evaluations per batch", "steps", "largest residual", "residual after a step", "not solved")


def charts(result: Result) -> dict[str, tuple[Chart, str]]:
    """Charts over the epochs with their titles, one line per block; none where nothing was solved."""
    names = _names(result)
    found = {}
    for key, shown in SHOWN.items():
        values = {name: points for block, name in names.items() if (points := _over_epochs(result, block, shown))}
        lines = plots.ordered({f"block {name}": points for name, points in values.items()})
        chart = plots.plain(key, lines, x="epoch", label=shown.label, unit=shown.unit, say="epoch {}".format)
        if chart:
            found[key] = chart, _title(shown, values)
    return found


def table(result: Result) -> Facts:
    """The last epoch, block by block and pass by pass."""
    names = _names(result)
    last = result.history[-1]["solves"] if names else {}
    rows, parts = [], []
    for block in (block for block in names if block in last):
        for direction, part in last[block].items():
            parts.append(part)
            residual = "not finite" if part["residual"] is None else number(part["residual"])
            factor = "no step" if part["contraction"] is None else percent(part["contraction"])
            cells = (direction, number(part["evaluations"]), number(part["steps"]), residual, factor)
            rows.append((f"block {names[block]}", *cells, f"{part['failures']:,} of {part['examples']:,}"))
    failures = sum(part["failures"] for part in parts)
    if failures:
        title = f"In the last epoch {failures:,} equations were not solved"
    else:
        worst = number(max((part["residual"] or 0.0 for part in parts), default=0.0))
        title = f"In the last epoch every equation was solved, to a residual of {worst} or less"
    return Facts(title, COLUMNS, rows)


def _names(result: Result) -> dict[str, str]:
    """The blocks whose solves the history tells, and what the page calls them; in the order of the network."""
    places = {
        name: place(s, i, result.lengths)
        for s, (_, blocks) in enumerate(result.sections)
        for i, name in enumerate(blocks)
    }
    solving = {block for row in result.history for block in row.get("solves", {})}
    return {name: where for name, where in places.items() if name in solving} | {
        block: block for block in sorted(solving - places.keys())
    }


def _over_epochs(result: Result, block: str, shown: Shown) -> dict[int, Value]:
    points = {}
    for row in result.history:
        part: Mapping[str, Any] = row.get("solves", {}).get(block, {}).get(shown.direction, {})
        if part.get(shown.field) is not None:
            points[int(row["epoch"])] = Value(float(part[shown.field]), 0.0, part["examples"])
    return points


def _title(shown: Shown, values: dict[str, dict[int, Value]]) -> str:
    show = percent if shown.unit == "%" else number
    first, last = (pick(epoch for points in values.values() for epoch in points) for pick in (min, max))

    def mean(epoch: int) -> str:
        here = [points[epoch].mean for points in values.values() if epoch in points]
        return show(sum(here) / len(here))

    text = f"{shown.beginning.format(mean(last))} in the last epoch"
    text += f", {mean(first)} in the first" if first < last else ""
    at_end = {block: points[last].mean for block, points in values.items() if last in points}
    worst = max(at_end, key=at_end.__getitem__)
    return f"{text}; {shown.worst} in block {worst} ({show(at_end[worst])})" if len(at_end) > 1 else text
