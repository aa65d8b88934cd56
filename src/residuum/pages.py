"""The pages of studies: figures that can be zoomed and asked, read off the drawn ones, and the table of claims."""

import math
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from residuum.charts import Chart, literal
from residuum.claims import VERDICTS, Figure, Judged
from residuum.readings import finite, shortened
from residuum.report import fill

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawn
    from matplotlib.lines import Line2D

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross"}
_SYMBOLS |= {"x": "x", "*": "star"}
_NOTHING = ("None", "none", "", " ")


@dataclass(frozen=True)
class Shown:
    """A figure as a page shows it.

    Attributes:
        figure: What it is.
        title: Its conclusion; why there is none where it was not drawn.
        charts: Title and chart of each of its panels that has lines.
        picture: PNG in base 64 of a figure that charts alone cannot show; "" if they can.
    """

    figure: Figure
    title: str
    charts: tuple[tuple[str, Chart], ...] = ()
    picture: str = ""


def shown(figure: Figure, drawn: "Drawn") -> Shown:
    """A drawn figure as charts: the lines of its panels with their names, styles and bars, as they were drawn.

    Panels in three dimensions are seen from the side, without the axis into the depth; they, what has no lines, and
    what has more than lines, such as filled ranges and words at points, are shown as a picture, too.

    Args:
        figure: What it is.
        drawn: The same, drawn.
    """
    charts, label, flat = [], "", True
    for number, axes in enumerate(drawn.axes):
        label = _vertical(axes) or label  # panels of a row share their label
        series = list(_series(axes))
        flat = flat and axes.name == "rectilinear" and bool(series) and not _more_than_lines(axes)
        if series:
            charts.append((flowing(axes.get_title()), _chart(f"{figure.id}-{number}", axes, series, label)))
    return Shown(figure, flowing(drawn.get_suptitle()), tuple(charts), "" if flat else _picture(drawn))


def flowing(title: str) -> str:
    """A title without its line breaks, which a page sets anew; where one was the only mark there comes another.

    Args:
        title: The title of a figure or of a panel.
    """
    return re.sub(r"(?<![:;,.])\n", "; ", title).replace("\n", " ")


def _more_than_lines(axes: "Axes") -> bool:
    """Whether a panel has areas, images or words inside; the collections of lines are bars."""
    from matplotlib.collections import LineCollection

    drawn = [*axes.collections, *axes.images, *axes.patches]
    return any(not isinstance(part, LineCollection) for part in drawn) or any(t.get_text().strip() for t in axes.texts)


def _vertical(axes: "Axes") -> str:
    return axes.get_zlabel() if axes.name == "3d" else axes.get_ylabel()


def _chart(key: str, axes: "Axes", series: list[Chart], label: str) -> Chart:
    flat = axes.name != "3d"
    log = flat and axes.get_yscale() == "log"
    span = None if log or not flat else [float(end) for end in axes.get_ylim()]
    x = {"kind": "plain", "title": literal(axes.get_xlabel()), "log": flat and axes.get_xscale() == "log"}
    x |= _named(axes) if flat else {}
    return {"id": key, "x": x, "y": {"title": label, "percent": False, "range": span, "log": log}, "series": series}


def _named(axes: "Axes") -> Chart:
    """The ticks of a horizontal axis that were given, such as names, with their texts, and how far it reaches."""
    from matplotlib.ticker import FixedLocator

    if not isinstance(axes.xaxis.get_major_locator(), FixedLocator):
        return {}
    places = [float(place) for place in axes.get_xticks()]
    texts = [literal(text) for text in axes.xaxis.get_major_formatter().format_ticks(places)]
    return {"ticks": [list(tick) for tick in zip(places, texts, strict=True)], "range": [*map(float, axes.get_xlim())]}


def _series(axes: "Axes") -> Iterator[Chart]:
    """The lines of a panel, those with bars first as one each."""
    from matplotlib.container import ErrorbarContainer

    parts: set[int] = set()
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            data, caps, bars = container.lines
            parts |= {id(line) for line in (data, *caps)}
            ends = [[float(y) for _, y in segment] for bar in bars for segment in bar.get_segments()]
            yield _line(axes, data, str(container.get_label()), ends)
    for line in axes.get_lines():
        if id(line) not in parts and (axes.name == "3d" or line.get_transform() == axes.transData):
            yield _line(axes, line, str(line.get_label()), [])


def _line(axes: "Axes", line: "Line2D", title: str, ends: list[list[float]]) -> Chart:
    if axes.name == "3d":
        x, _, y = line.get_data_3d()
    else:
        x, y = line.get_xdata(), line.get_ydata()
    x, y = [float(v) for v in x], [float(v) for v in y]
    name = "" if title.startswith("_") else shortened(title, 60)  # the legend sets it as text
    names = {} if axes.name == "3d" else {place: text for place, text in _named(axes).get("ticks", ()) if _word(text)}
    head, label, hover = literal(name) or "&nbsp;", literal(axes.get_xlabel()), []
    for a, b in zip(x, y, strict=True):
        near = min(names, key=lambda place: abs(place - a), default=math.inf)
        where = names[near] if abs(near - a) < 0.5 else f"{a:.4g}"  # lines beside each other stand beside their name
        hover.append("<br>".join((head, f"{label}: {where}" if label else where, f"<b>{b:.4g}</b>")))
    # A bar that is not finite is not drawn.
    bars = [end or [v, v] for end, v in zip(ends, y, strict=True)] if len(ends) == len(y) else []
    look = _look(line)
    marked, joined = line.get_marker() not in _NOTHING, line.get_linestyle() not in _NOTHING
    return {
        "name": name,
        "x": [finite(v) for v in x],
        "y": [finite(v) for v in y],
        "low": [finite(low) for low, _ in bars],
        "high": [finite(high) for _, high in bars],
        "hover": hover,
        "mode": "lines+markers" if marked and joined else "markers" if marked else "lines",
        "fresh": look["symbol"].endswith("-open"),
        "drawn": look,
    }


def _word(text: str) -> bool:
    """Whether a tick is a name and no number."""
    return any(c.isalpha() for c in text)


def _look(line: "Line2D") -> dict[str, str]:
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (round(255 * part) for part in to_rgb(line.get_color()))
    symbol = _SYMBOLS.get(str(line.get_marker()), "circle")
    opened = to_hex(line.get_markerfacecolor()) == "#ffffff" and symbol != "x"
    return {
        "color": to_hex(line.get_color()),
        "fill": f"rgba({red},{green},{blue},.2)",
        "dash": _DASHES.get(line.get_linestyle(), "solid"),
        "symbol": symbol + ("-open" if opened else ""),
    }


def _picture(drawn: "Drawn") -> str:
    content = BytesIO()
    drawn.savefig(content, format="png", dpi=110)
    return b64encode(content.getvalue()).decode()


def page(
    title: str, notes: Sequence[str], figures: Sequence[Shown], judged: Sequence[tuple[str, Sequence[Judged]]]
) -> str:
    """A page as HTML that needs nothing else.

    Args:
        title: Its heading.
        notes: What a reader must know first.
        figures: In order.
        judged: Claims under the heading of their paper.
    """
    content: dict[str, Any] = {
        "title": title,
        "notes": list(notes),
        "figures": list(figures),
        "tables": [(heading, claims, counts(claims)) for heading, claims in judged],
    }
    return fill("study.html.j2", content, [chart for figure in figures for _, chart in figure.charts])


def counts(judged: Sequence[Judged]) -> str:
    """How many claims have which verdict, in words."""
    found = [one.verdict for one in judged]
    return ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in found) or "no claims"


def markdown(title: str, notes: Sequence[str], judged: Sequence[tuple[str, Sequence[Judged]]]) -> str:
    """The table of claims for a reader of text.

    Args:
        title: Its heading.
        notes: What a reader must know first.
        judged: Claims under the heading of their paper.
    """
    lines = [f"# {title}", "", *(part for note in notes for part in (note, ""))]
    for heading, claims in judged:
        lines += [f"## {heading}", "", f"{counts(claims)}.", ""]
        lines += ["| verdict | claim | expected | obtained | limits |", "| --- | --- | --- | --- | --- |"]
        for one in claims:
            claim = f"{one.claim.statement} ({one.claim.source}) `{one.claim.id}`"
            cells = (f"**{one.verdict}**", claim, one.claim.expected, one.obtained, one.claim.limits)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)
