"""Charts over plain numbers, such as steps and epochs, and tables as colours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from residuum.charts import Chart, amount, literal, series_of, spread
from residuum.readings import Value, number, percent


class Line(NamedTuple):
    """One line of a plain chart.

    Attributes:
        name: The name in the legend; "" is not named there.
        style: Number of the colour, dash and marker.
        points: Values by position.
        fresh: True for a network at initialisation.
        hidden: True if it is drawn only when its name is pressed.
        shade: Place from 0 to 1 in an order of lines, shown as a colour from light to dark; None has none.
        quiet: True if the legend leaves it out, because its neighbours tell.
    """

    name: str
    style: int
    points: dict[int, Value]
    fresh: bool = False
    hidden: bool = False
    shade: float | None = None
    quiet: bool = False


def ordered(lines: Mapping[str, dict[int, Value]]) -> list[Line]:
    """Lines that stand in an order, from light to dark; of more than nine the legend names every few and the last.

    Args:
        lines: Points by name.
    """
    last = len(lines) - 1
    every = 1 if last < 9 else -(-len(lines) // 6)
    return [
        Line(name, 0, points, shade=i / max(1, last), quiet=i % every != 0 and i < last)
        for i, (name, points) in enumerate(lines.items())
    ]


def plain(
    key: str,
    lines: Sequence[Line],
    *,
    x: str,
    label: str,
    unit: Literal["%", ""] = "",
    span: tuple[float, float] | None = None,
    say: Callable[[int], str],
) -> Chart | None:
    """Lines over whole numbers, such as epochs or steps; None where no line has points.

    Args:
        key: Name of the chart in the page.
        lines: The lines.
        x: What the horizontal axis shows.
        label: What the vertical axis shows.
        unit: "%" shows parts of one as percentages.
        span: (low, high) of the vertical axis, or None to fit it.
        say: What a position is, in words.
    """
    show = percent if unit == "%" else number
    series = []
    for line in lines:
        hover = [
            f"{say(at)}<br>{amount(v, show)}<br>{literal(line.name, 40)}" + (f", {v.count} examples" if v.count else "")
            for at, v in line.points.items()
        ]
        values = list(line.points.values())
        drawn = series_of(line.name, line.style, list(line.points), values, hover, fresh=line.fresh, hidden=line.hidden)
        series += [{**drawn, "shade": line.shade, "quiet": line.quiet}] if values else []
    if not series:
        return None
    axis = {"kind": "plain", "title": x, "log": False}
    log = span is None and spread(series)
    y = {"title": label + (", logarithmic" if log else ""), "percent": unit == "%", "range": span, "log": log}
    return {"id": key, "x": axis, "y": y, "series": series}


def heat(
    key: str, cells: dict[tuple[int, int], Value], names: Sequence[str], *, x: str, y: str, label: str
) -> Chart | None:
    """A table of parts of one as colours, dark where they are small; None where there are none.

    Args:
        key: Name of the chart in the page.
        cells: Values by (row, column).
        names: What rows and columns are called, for both.
        x: What the columns are.
        y: What the rows are.
        label: What the colours show.
    """
    if not cells:
        return None
    rows = range(len(names))
    return {
        "id": key,
        "heat": [[cells[r, c].mean if (r, c) in cells else None for c in rows] for r in rows],
        "hover": [
            [
                f"{y} {names[r]}<br>{x} {names[c]}<br>" + amount(v, percent) if (v := cells.get((r, c))) else ""
                for c in rows
            ]
            for r in rows
        ],
        "names": list(names),
        "range": _shades([value.mean for value in cells.values()]),
        "x": {"title": x},
        "y": {"title": y},
        "label": label,
        "series": [],
    }


def _shades(values: Sequence[float]) -> list[float]:
    """The values of the darkest and of the lightest colour, ten points apart or more: small differences stay light."""
    most = max(*values, 0.1)
    return [min(*values, most - 0.1), most]
