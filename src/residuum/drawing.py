"""Figures of papers in one style: PNG and PDF, in colours that colour-blind readers can tell apart."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from residuum.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (without yellow, too faint on white), each with its own dash and marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
DASHES = ("-", "--", ":", "-.", "-", "--", "-")
MARKERS = ("o", "s", "D", "^", "P", "v", "x")
FORMATS = ("png", "pdf")
_TITLE = 12  # points


def style() -> AbstractContextManager[None]:
    """The style of all figures, while it is open; to be opened around drawing and saving."""
    from matplotlib import rc_context

    return rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.markersize": 5,
            "pdf.fonttype": 42,
        }
    )


def panels(
    title: str, rows: int, columns: int, *, width: float = 4.2, height: float = 3.4, share_y: bool = False
) -> tuple["Figure", list["Axes"]]:
    """An empty figure under its conclusion, and its axes row by row.

    Args:
        title: The conclusion, in a sentence that was read off the numbers.
        rows: Rows of panels.
        columns: Columns of panels.
        width: Inches of one panel.
        height: Likewise.
        share_y: The panels of a row have one vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    figure.suptitle(title, fontsize=_TITLE)
    return figure, list(axes.flat)


def fit_title(figure: "Figure", note: str = "") -> None:
    """Break a figure's conclusion into lines that fit above it.

    Args:
        figure: The figure.
        note: What a reader must know besides, in a line of its own.
    """
    wide = int(figure.get_figwidth() * 72 / (0.55 * _TITLE))  # characters, about 0.55 as wide as high
    lines = [part for line in figure.get_suptitle().splitlines() for part in wrap(line, wide)]
    figure.suptitle("\n".join([*lines, note] if note else lines), fontsize=_TITLE)


def line(
    axes: "Axes",
    x: Sequence[float | int],
    y: Sequence[float | int],
    *,
    label: str,
    number: int,
    spread: Sequence[float | int] | None = None,
    fresh: bool = False,
) -> None:
    """One series in the colour, dash and marker of its number, with bars of its spread.

    Args:
        axes: Where.
        x: Positions.
        y: Values.
        label: In the legend.
        number: Of the style, from 0.
        spread: Half the length of the bar at each point; the caption says what it is.
        fresh: A network at initialisation: a thin line with open markers.
    """
    i = number % len(COLOURS)
    look = {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i], "label": label}
    look |= {"linewidth": 1.0, "markerfacecolor": "white"} if fresh else {"linewidth": 1.8}
    if spread is not None and any(spread):
        axes.errorbar(x, y, yerr=spread, capsize=2, elinewidth=1.0, **look)
    else:
        axes.plot(x, y, **look)


def shade(part: float) -> str:
    """The colour of a place from 0 to 1 in an order of series, from light to dark, so that a grey print keeps it."""
    ends = zip((150, 200, 230), (8, 36, 90), strict=True)
    return "#" + "".join(f"{round(low + (high - low) * part):02x}" for low, high in ends)


def depth_axis(axes: "Axes", depths: Iterable[int]) -> None:
    """A logarithmic horizontal axis of numbers of blocks with the depths as ticks, as many as are legible."""
    known = sorted(set(depths))
    axes.set_xscale("log")
    shown = [d for d in known if len(known) <= 8 or d in (1, 2, 4, 10, 20, 40, 100)]
    axes.set_xticks(shown, [str(d) for d in shown])
    axes.set_xticks([], minor=True)


def plain_ticks(axes: "Axes") -> None:
    """Numbers such as 0.2 instead of powers of ten on a logarithmic vertical axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_axis(axes: "Axes", words: str = "epoch") -> None:
    """A horizontal axis of whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(words)


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF, each complete or not at all.

    Args:
        figure: The figure; the style in which it was drawn should be open.
        folder: Where; it exists.
        name: Of the files, without ending.

    Returns:
        The files.

    Raises:
        OSError: If they cannot be written.
    """
    written = []
    for kind in FORMATS:
        path = folder / f"{name}.{kind}"
        # PDF without its date, so that the same numbers give the same file.
        about = {"CreationDate": None} if kind == "pdf" else None
        write_atomically(
            path, lambda part, kind=kind, about=about: figure.savefig(part, format=kind, dpi=150, metadata=about)
        )
        figure.set_layout_engine("none")  # found once, the places are those of every format
        written.append(path)
    return written
