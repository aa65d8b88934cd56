"""Charts of profiles as plain data: what to draw and what to say at each point; the page's script draws them."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from residuum.readings import Table, Value, number, percent, place, shortened, whole
from residuum.titles import distance

Chart = dict[str, Any]
TINY = 1e-3  # the least that an axis of percentages spans
Place = tuple[int, int]  # (section, block or state number)


@dataclass(frozen=True)
class Curve:
    """One network's values in one state of training, as they are drawn together.

    Attributes:
        name: The name in the legend.
        table: The values.
        sections: Name and block names of each section.
        style: Number of the colour, dash and marker.
        fresh: True for a network at initialisation.
        hidden: True if the curve is drawn only when its name is pressed.
    """

    name: str
    table: Table
    sections: tuple[tuple[str, tuple[str, ...]], ...]
    style: int
    fresh: bool = False
    hidden: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Blocks per section."""
        return tuple(len(names) for _, names in self.sections)


@dataclass(frozen=True)
class Axis:
    """Where blocks and states lie from left to right.

    Attributes:
        kind: "blocks": every block has its own place (one network). "sections": relative depth within each section,
            sections side by side. "whole": relative depth over the whole network (sections differ in number).
        bands: (from, to, name) of each section, to be shaded.
        ticks: (position, text) of each block and entry ("in"), for "blocks".
    """

    kind: Literal["blocks", "sections", "whole"]
    bands: tuple[tuple[float, float, str], ...]
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, where: Place, lengths: Sequence[int], *, state: bool) -> float:
        """Position of a block or a state; relative depth is (index + 0.5) / L for blocks, index / L for states."""
        section, index = where
        if self.kind == "blocks":  # one place more per section, for the state at its entry
            return float(sum(lengths[:section]) + section + index + (not state))
        if self.kind == "whole":
            return (sum(lengths[:section]) + index + (0 if state else 0.5)) / sum(lengths)
        return section + 0.04 + 0.92 * (index + (0 if state else 0.5)) / max(1, lengths[section])

    def title(self) -> str:
        """What the axis shows."""
        return {
            "blocks": "block, counted within its section" if len(self.bands) > 1 else "block",
            "sections": "relative depth within each section",
            "whole": "relative depth in the whole network",
        }[self.kind]


def axis_of(curves: Sequence[Curve]) -> Axis:
    """The axis on which these curves can be compared."""
    shapes = {curve.sections for curve in curves}
    if len(shapes) == 1:
        sections = curves[0].sections
        starts = list(accumulate((len(names) + 1 for _, names in sections), initial=0))
        bands = tuple(
            (start - 0.5, start + len(names) + 0.5, literal(name, 24))
            for start, (name, names) in zip(starts, sections, strict=False)
        )
        ticks = tuple(
            (float(start + i), str(i) if i else "in")
            for start, length in zip(starts, curves[0].lengths, strict=False)
            for i in range(length + 1)
        )
        return Axis("blocks", bands, ticks)
    counts = {len(curve.sections) for curve in curves}
    if len(counts) > 1:
        return Axis("whole", ())
    names = [name for name, _ in curves[0].sections]
    if any([name for name, _ in curve.sections] != names for curve in curves):
        names = [f"section {s + 1}" for s in range(len(names))]
    return Axis("sections", tuple((float(s), s + 1.0, literal(name, 24)) for s, name in enumerate(names)))


def literal(text: str, longest: int = 60) -> str:
    """Text as the drawing library shows it letter by letter (it reads some HTML, so that is escaped), and shortened."""
    return html.escape(shortened(text, longest), quote=False)


def along_depth(
    key: str,
    quantity: str,
    curves: Sequence[Curve],
    *,
    label: str,
    unit: Literal["%", ""],
    state: bool,
    span: tuple[float, float] | None,
) -> Chart | None:
    """A quantity along depth, one line per curve with a band of two standard errors; None where nobody has it.

    Args:
        key: Name of the chart in the page.
        quantity: Name of the quantity in the profiles.
        curves: The networks.
        label: What the vertical axis shows.
        unit: "%" shows parts of one as percentages.
        state: Whether the points are states (True) or blocks.
        span: (low, high) of the vertical axis, or None to fit it, from zero.
    """
    having = [curve for curve in curves if quantity in curve.table]
    if not having:
        return None
    axis = axis_of(curves)
    series = [_line(curve, curve.table[quantity], axis, unit, state, _head) for curve in having]
    if not state:
        axis = replace(axis, ticks=tuple(tick for tick in axis.ticks if tick[1] != "in"))
    return _chart(key, axis, series, label, unit, span)


def counted(
    key: str,
    curves: Sequence[Curve],
    *,
    label: str,
    counts: str,
) -> Chart | None:
    """Good answers against a number of blocks that are changed, section beside section; None where nobody has values.

    Args:
        key: Name of the chart in the page.
        curves: Each with one quantity, "count", whose points number the changed blocks from 0.
        label: What the vertical axis shows.
        counts: What is counted, after a number: "blocks left out".
    """
    having = [curve for curve in curves if curve.table.get("count")]
    if not having:
        return None
    axis = axis_of(having)
    axis = replace(axis, ticks=tuple((at, "0" if text == "in" else text) for at, text in axis.ticks))

    def head(curve: Curve, where: Place, state: bool) -> str:
        return f"{literal(curve.sections[where[0]][0], 30)}: {where[1]} {counts}"

    series = [_line(curve, curve.table["count"], axis, "%", True, head) for curve in having]
    chart = _chart(key, axis, series, label, "%", (-0.02, 1.04))
    return {**chart, "x": {**chart["x"], "title": counts + (" in each section" if len(axis.bands) > 1 else "")}}


def running(curve: Curve) -> Curve:
    """A curve with its scaled perturbations added up from each section's entry: state i has the blocks before i.

    The error of a sum is at most the sum of the errors, which is what it gets.
    """
    steps, sums = curve.table.get("scaled_perturbation", {}), {}
    for section, length in enumerate(curve.lengths):
        total, error, count = 0.0, 0.0, steps.get((section, 0, 1), Value(0.0, 0.0, 0)).count
        for index in range(length + 1):
            if index and (section, index - 1, 1) in steps:
                mean, stderr, count = steps[section, index - 1, 1]
                total, error = total + mean, error + stderr
            sums[section, index, 1] = Value(total, error, count)
    return replace(curve, table={"scaled_perturbation": sums} if steps else {})


def cheapest_cuts(key: str, quantity: str, curve: Curve, *, label: str) -> Chart | None:
    """For each number of consecutive blocks, the place where they turn the state least; one line per section."""
    if quantity not in curve.table:
        return None
    series = []
    for s in range(len(curve.sections)):
        best: dict[int, tuple[int, Value]] = {}
        for (section, start, run), value in curve.table[quantity].items():
            if section == s and (run not in best or value.mean < best[run][1].mean):
                best[run] = (start, value)
        runs = sorted(best)
        hover = [
            f"{_blocks(s, best[n][0], n, curve.lengths)}<br>{amount(best[n][1], percent)}<br>of a half turn"
            for n in runs
        ]
        values = [best[n][1] for n in runs]
        series.append(series_of(curve.sections[s][0], s, list(map(float, runs)), values, hover))
    x = {"kind": "plain", "title": "consecutive blocks taken out", "log": False}
    return {
        "id": key,
        "x": x,
        "y": {"title": label, "percent": True, "range": _least(series), "log": False},
        "series": series,
    }


def depth_ranges(key: str, ranges: Sequence[dict[str, Any]], eps: float) -> Chart:
    """Blocks per section under the two laws, and the blocks that the network has, on a logarithmic axis."""
    rows = [len(ranges) - i for i in range(len(ranges))]
    names = [item["section"] for item in ranges]
    lines: dict[str, list[Any]] = {"x": [], "y": []}
    for row, item in zip(rows, ranges, strict=True):
        lines["x"] += [item["fixed_distance"], item["square_root"], None]
        lines["y"] += [row, row, None]
    series: list[dict[str, Any]] = [{"name": "", "style": 6, "mode": "lines", **lines, "hover": []}]
    for name, style, field in (
        ("blocks it has", 6, "blocks"),
        ("needed if the distance is fixed", 0, "fixed_distance"),
        ("needed under the square-root law", 1, "square_root"),
    ):
        hover = [f"{literal(item['section'], 30)}<br>{name}: {number(item[field])}" for item in ranges]
        values = [float(item[field]) for item in ranges]
        series.append({"name": name, "style": style, "mode": "markers", "x": values, "y": rows, "hover": hover})
    ticks = [[row, literal(name, 18)] for row, name in zip(rows, names, strict=True)]
    x = {
        "kind": "plain",
        "title": f"blocks (for a mean step of {whole(eps)})",
        "log": True,
    }
    y = {"title": "", "percent": False, "range": [0.4, len(rows) + 0.6], "log": False, "ticks": ticks}
    return {"id": key, "x": x, "y": y, "series": series, "height": 150 + 42 * len(rows)}


def distance_by_depth(key: str, networks: Sequence[tuple[str, Table, Sequence[int]]]) -> Chart:
    """Scaled distance of each section against its number of blocks, one line per section, both axes logarithmic."""
    series = []
    for s in range(len(networks[0][2])):
        found = sorted((lengths[s], distance(table, s), name) for name, table, lengths in networks)
        found = [point for point in found if point[1] > 0]  # not of sections without blocks, or whose blocks do nothing
        hover = [f"{literal(name, 30)}<br>section {s + 1}: {n} blocks<br>distance {number(d)}" for n, d, name in found]
        values = [Value(d, 0.0, 0) for _, d, _ in found]
        series += [series_of(f"section {s + 1}", s, [n for n, _, _ in found], values, hover)] if found else []
    x = {"kind": "plain", "title": "blocks in the section, logarithmic", "log": True}
    y = {"title": "scaled distance, logarithmic", "percent": False, "range": None, "log": True}
    return {"id": key, "x": x, "y": y, "series": series}


def _chart(key: str, axis: Axis, series: list[Chart], label: str, unit: str, span: Any) -> Chart:
    log = span is None and spread(series)
    x = {
        "kind": axis.kind,
        "title": axis.title(),
        "bands": axis.bands,
        "ticks": axis.ticks,
        "log": False,
    }
    title = label + (", logarithmic" if log else "")
    span = span or (_least(series) if unit and not log else None)
    return {
        "id": key,
        "x": x,
        "y": {"title": title, "percent": unit == "%", "range": span, "log": log},
        "series": series,
    }


def _least(series: list[Chart]) -> tuple[float, float] | None:
    """The range of an axis of percentages whose values are all so near to 0 that its ticks would be; else None."""
    values = [y for line in series for part in ("y", "low", "high") for y in line[part] if y is not None]
    return (-TINY / 50, TINY) if all(0 <= y < TINY for y in values) else None


def spread(series: list[Chart]) -> bool:
    """Whether values need a logarithmic axis: steps of a few percent look flat beside one that doubles the state."""
    values = [y for line in series for y in line["y"] if y is not None]
    return min(values) > 0 and max(values) > 30 * sorted(values)[len(values) // 2]


def _line(
    curve: Curve,
    values: dict[tuple[int, int, int], Value],
    axis: Axis,
    unit: str,
    state: bool,
    head: Callable[[Curve, Place, bool], str],
) -> Chart:
    """One curve: sections are separate strokes, so that no line crosses an entry."""
    x: list[float | None] = []
    found: list[Value | None] = []
    hover: list[str] = []
    for section in range(len(curve.sections)):
        for key in sorted(key for key in values if key[0] == section and key[2] == 1):
            x.append(axis.at(key[:2], curve.lengths, state=state))
            found.append(values[key])
            hover.append(head(curve, key[:2], state) + _hover(curve, values[key], unit))
        x.append(None)
        found.append(None)
        hover.append("")
    return series_of(curve.name, curve.style, x, found, hover, fresh=curve.fresh, hidden=curve.hidden)


def _head(curve: Curve, where: Place, state: bool) -> str:
    """What a point is: a block, the state after it, or an entry."""
    section, index = where
    name = curve.sections[section][1]
    block = index - 1 if state else index
    if block < 0:
        return "entry of " + literal(curve.sections[section][0], 30)
    return f"{'after ' if state else ''}block {place(section, block, curve.lengths)} ({literal(name[block], 34)})"


def _hover(curve: Curve, value: Value, unit: str) -> str:
    show = percent if unit == "%" else number
    over = f", {value.count} examples" if value.count else ""  # what is so by definition is over none
    return f"<br>{amount(value, show)}<br>{literal(curve.name, 34)}{over}"


def amount(value: Value, show: Callable[[float], str]) -> str:
    """A mean with its standard error, if it has one: one example has none, nor has a bound."""
    error = f" \u00b1 {show(value.stderr)} standard error" if value.stderr else ""
    return f"<b>{show(value.mean)}</b>{error}"


def series_of(
    name: str,
    style: int,
    x: Sequence[Any],
    values: Sequence[Value | None],
    hover: list[str],
    *,
    fresh: bool = False,
    hidden: bool = False,
) -> Chart:
    """One curve as the page's script draws it; a value that is None breaks its line."""
    banded = any(value is not None and value.stderr > 0 for value in values)
    return {
        "name": name,
        "style": style,
        "fresh": fresh,
        "hidden": hidden,
        "x": list(x),
        "y": [None if value is None else value.mean for value in values],
        "low": [None if value is None else value.low for value in values] if banded else [],
        "high": [None if value is None else value.high for value in values] if banded else [],
        "hover": hover,
    }


def _blocks(section: int, start: int, run: int, lengths: Sequence[int]) -> str:
    first, last = place(section, start, lengths), place(section, start + run - 1, lengths)
    return f"block {first}" if run == 1 else f"blocks {first} to {last}"
