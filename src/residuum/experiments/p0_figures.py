"""P0's figures, as the project's specification of it lists them: (a) to (e), and two of ours."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from residuum.claims import Drawn, Figure, Results
from residuum.drawing import line, panels
from residuum.effects import Effect, paired
from residuum.experiments.p0_runs import (
    BOUND,
    COUPLED,
    ENDS,
    FREE,
    INDICES,
    LIMITED,
    SCALES,
    SETS,
    Cell,
    cells_of,
    errors_by_blocks,
    guess_error,
    images_of,
    index_of,
    of_cell,
    shuffled_of,
)
from residuum.experiments.p0_verdicts import has_learned
from residuum.experiments.seeds import Seeds, complete, complete_by_data, done, last, runs_in, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Table = Mapping[Cell, Seeds]  # the networks of one data set
KINDS = (
    "sum: with summed gradients; fast: at the rate of their step; all: one recurrent block; unequal: blocks that start "
    "independent, others equal."
)
BARS = "Means over seeds; bars: their standard deviation, where there are several."
ALONG = "coupling strength"
# number of the line's style by what is bounded
LIMITS = {None: (0, "no limit"), 2.0: (1, "limit 2"), 1.0: (2, "limit 1"), 0.5: (3, "limit 0.5"), 5.0: (4, "limit 5")}
CLIPPED = (5, "limit 1, norms clipped")
STRENGTHS = {0.0: 0, 0.25: 5, 0.5: 1, 0.75: 6, 0.9: 2, 0.99: 4, 1.0: 3}  # number of the line's style
GOOD = {"convergence": "1: settled early", "recurrence": "1: interchangeable", "divergence": "0: stable"}


def figures(scale: str) -> tuple[Figure, ...]:
    """The figures of the study."""
    at = SCALES[scale]
    tables = {data: {cell: of_cell(scale, data, cell) for cell in cells_of(scale, data)} for data in SETS}
    ends = {data: {cell: runs for cell, runs in tables[data].items() if cell in ENDS} for data in SETS}
    plain = {data: {cell: runs for cell, runs in tables[data].items() if _plain(cell)} for data in SETS}
    swept = {data: tables[data] for data in at.strengths}
    sizes = {
        data: {
            size: {cell: of_cell(scale, data, cell, size=size) for cell in ends[data] if _sized(scale, cell)}
            for size in at.sizes[data]
        }
        | {images_of(scale, data): {cell: runs for cell, runs in ends[data].items() if _sized(scale, cell)}}
        for data in at.sizes
    }
    clutter = {data: table for data, table in ends.items() if SETS[data].startswith("Digitclutter")}
    shuffled = {data: {0: shuffled_of(scale, data)} for data in SETS}
    controls = (*shuffled.values(), *(table[FREE] for table in ends.values()))
    where = "P0, reconstructed after its abstract and introduction; spec of this project, section 5.7"
    made = (
        (
            "effects",
            "What strength 1 changes against strength 0 in networks of the same seed, by data set, without and with a "
            "limit of 1 (on convolutions). Bars: 95 % over seeds. Undefined indices are left out.",
            _all(ends),
            partial(_effects, tables=ends),
        ),
        (
            "a",
            "Error against the number of blocks left out at a section's end (negative) or of further runs of its last "
            "block (positive), mean over the sections, a curve for each strength; dotted: guessing. Test images that "
            f"were measured. {BARS}",
            _all(plain),
            partial(_errors, tables=plain),
        ),
        (
            "b",
            f"The three indices, means over the sections, against the strength, a line for each limit; {KINDS} {BARS}",
            _all(swept),
            partial(_indices, tables=swept),
        ),
        (
            "c",
            f"Accuracy on all test images against the strength, a line for each limit; {KINDS} {BARS}",
            _all(tables),
            partial(_accuracy, tables=tables),
        ),
        (
            "d",
            f"Accuracy against the number of training images, all trained for the same number of steps. {BARS}",
            runs_in(*(runs for table in sizes.values() for cells in table.values() for runs in cells.values())),
            partial(_sizes, tables=sizes),
        ),
        (
            "e",
            f"Accuracy (all digits right) and indices against the digits of an image; crosses: with debris. {BARS}",
            _all(clutter),
            partial(_clutter, tables=clutter),
        ),
        (
            "controls",
            "The three indices by agreement with the network's own answers: trained, at calibrated initialisation, and "
            f"trained on shuffled labels (one seed). {BARS}",
            runs_in(*controls),
            partial(_controls, tables=ends, shuffled=shuffled),
        ),
    )
    return tuple(Figure(f"p0-{name}", where, caption, jobs, draw) for name, caption, jobs, draw in made)


def _plain(cell: Cell) -> bool:
    """Whether it differs from an end point in its strength at most."""
    return cell in (Cell(cell.strength), Cell(cell.strength, BOUND))


def _sized(scale: str, cell: Cell) -> bool:
    return cell.bound is None or SCALES[scale].limited_sizes


def _all(tables: Mapping[str, Table]) -> tuple:
    return runs_in(*(runs for table in tables.values() for runs in table.values()))


def _draw(axes: "Axes", points: Iterable[tuple[float, Sequence[float]]], label: str, number: int) -> None:
    """Means with bars of their standard deviation over seeds, where there are values."""
    known = [(x, values) for x, values in points if len(values)]
    if known:
        bars = [spread(values) for _, values in known]
        means = [float(np.mean(values)) for _, values in known]
        line(axes, [x for x, _ in known], means, label=label, number=number, spread=bars)


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _common_legend(figure: "Canvas") -> None:
    """One legend of all panels, below them."""
    named = {}
    for axes in figure.axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=6)


def _ticks(axes: "Axes", names: Sequence[str], *, turned: bool = False) -> None:
    words = {"rotation": 35, "ha": "right"} if turned else {"fontsize": "small" if len(names) > 8 else "medium"}
    axes.set_xticks(range(len(names)), names, **words)
    axes.set_xlim(-0.4, len(names) - 0.6)


def _effects(results: Results, *, tables: Mapping[str, Table]) -> Drawn:
    """Strength 1 less strength 0, of accuracy and the indices."""
    having = complete_by_data(results, tables)
    quantities = ("accuracy", *INDICES)
    found: dict[tuple[str, bool], dict[str, Effect]] = {}
    for quantity in quantities:
        for bounded in (False, True):
            by_data = {
                data: _change(results, table, LIMITED if bounded else (FREE, COUPLED), quantity)
                for data, table in having.items()
            }
            found[quantity, bounded] = {data: effect for data, effect in by_data.items() if effect}
    if not any(found.values()):
        return None
    figure, axes = panels("", 1, 4, height=4.2)
    for ax, quantity in zip(axes, quantities, strict=True):
        for bounded in (False, True):
            effects = found[quantity, bounded]
            if effects:
                x = [list(having).index(data) + 0.2 * bounded for data in effects]
                ends = [e.high - e.value if np.isfinite(e.high) else 0.0 for e in effects.values()]
                name = ("no limit", "limit 1")[bounded]
                line(ax, x, [e.value for e in effects.values()], label=name, number=2 * bounded, spread=ends)
                most = max(effect.n for effect in effects.values())
                for place, effect in zip(x, effects.values(), strict=True):
                    few = f"{effect.n} of {most} seeds" * (effect.n < most)  # others guess: it is undefined
                    look = {
                        "xytext": (5, 0),
                        "textcoords": "offset points",
                        "fontsize": 8,
                        "rotation": 90,
                        "va": "center",
                    }
                    ax.annotate(few, (place, effect.value), **look)
        for drawn in ax.get_lines():
            drawn.set_linestyle("none")
        ax.axhline(0, color="0.5", linewidth=1)
        label = "accuracy, points" if quantity == "accuracy" else f"{quantity} index"
        ax.set(ylabel=f"strength 1 less 0: {label}", title=quantity)
        _ticks(ax, [SETS[data] for data in having], turned=True)
        _legend(ax)
    said = found["recurrence", False]
    clear = [sum(e.low > 0 for e in said.values()), len(said)]
    trained = [
        effect
        for data, effect in found["accuracy", False].items()
        if has_learned(results, (having[data][COUPLED], having[data][FREE]))
    ]
    figure.suptitle(
        f"Coupling without a limit: blocks more interchangeable on {clear[0]} of {clear[1]} data sets, networks more "
        f"accurate on {sum(e.low > 0 for e in trained)} of {len(trained)} that they learn (95 % over seeds)"
    )
    return figure


def _change(results: Results, table: Table, cells: Sequence[Cell], quantity: str) -> Effect | None:
    """Strength 1 less strength 0; None where nothing is known."""
    if not all(cell in table for cell in cells):
        return None
    before, after = (_values(results, table[cell], quantity) for cell in cells)
    if not before.keys() & after.keys():
        return None
    return paired(after, before)


def _values(results: Results, runs: Seeds, quantity: str) -> dict[int, float]:
    """Accuracy in percent, or an index where it is defined, by seed."""
    if quantity == "accuracy":
        return {seed: 100 * right for seed, right in last(results, runs, "test_accuracy").items()}
    return index_of(results, runs, quantity, none=True)


def _errors(results: Results, *, tables: Mapping[str, Table]) -> Drawn:
    """Error by blocks left out or added."""
    having = complete_by_data(results, tables)
    if not having:
        return None
    shown = [(data, None) for data in having]
    shown += [(data, BOUND) for data, table in having.items() if any(cell.bound for cell in table)]
    figure, axes = _grid(len(shown))
    for ax, (data, bound) in zip(axes, shown, strict=True):
        cells = sorted((cell for cell in having[data] if cell.bound == bound), key=lambda cell: cell.strength)
        for cell in cells:
            curves = [errors_by_blocks(results, run) for run in having[data][cell].values()]
            points = [(float(k), [100 * curve[k] for curve in curves]) for k in curves[0]]
            _draw(ax, points, f"strength {cell.coupled}", STRENGTHS[cell.strength])
        any_run = next(iter(next(iter(having[data].values())).values()))
        ax.axhline(100 * guess_error(results, any_run), color="0.5", linestyle=":", linewidth=1.2)
        ax.set(title=f"{SETS[data]}, {LIMITS[bound][1]}", ylim=(0, 104))
        ax.set(xlabel="blocks left out (-) or added (+)", ylabel="error, %")
        _legend(ax)
    data = next(iter(having))
    said = [
        f"{np.mean([100 * (curve[-1] - curve[0]) for curve in curves]):.0f} points at strength {cell.coupled}"
        for cell in (FREE, COUPLED)
        if (curves := [errors_by_blocks(results, run) for run in having[data].get(cell, {}).values()])
    ]
    figure.suptitle(f"{SETS[data]}: a section without its last block costs {' and '.join(said)}" if said else "")
    return figure


def _grid(count: int) -> tuple["Canvas", list["Axes"]]:
    """An empty figure of so many panels, four in a row."""
    columns = min(4, count)
    figure, axes = panels("", -(-count // columns), columns)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _strengths(tables: Mapping[str, Table]) -> list[str]:
    """The places on the axis of strengths: those between 0 and 1, then other kinds of coupling."""
    cells = {cell for table in tables.values() for cell in table}
    order = sorted(cells, key=lambda c: (c.alike < 1, c.couple == "all", c.fast, c.reduce == "sum", c.strength))
    return list(dict.fromkeys(cell.coupled for cell in order))


def _lines(table: Table, strengths: Sequence[str]) -> dict[tuple[int, str], dict[Cell, Seeds]]:
    """The networks of each line, along strengths, by the line's style and name."""
    found: dict[tuple[int, str], dict[Cell, Seeds]] = {}
    for cell in sorted(table, key=lambda cell: strengths.index(cell.coupled)):
        name = (6, "group norm") if cell.norm == "group" else CLIPPED if cell.clipped else LIMITS[cell.bound]
        found.setdefault(name, {})[cell] = table[cell]
    return dict(sorted(found.items()))


def _along(ax: "Axes", results: Results, table: Table, quantity: str, strengths: Sequence[str]) -> None:
    """One quantity against the strength, one line for each limit."""
    end = strengths.index(COUPLED.coupled)
    for (number, name), cells in _lines(table, strengths).items():
        points = [
            (float(strengths.index(cell.coupled)), list(_values(results, runs, quantity).values()))
            for cell, runs in cells.items()
        ]
        _draw(ax, [point for point in points if point[0] <= end], name, number)
        for point in points:  # other kinds of coupling are no part of the line
            _draw(ax, [point] * (point[0] > end), "_", number)
    _ticks(ax, [name.replace(", ", "\n") for name in strengths])
    ax.set_xlabel(ALONG)


def _indices(results: Results, *, tables: Mapping[str, Table]) -> Drawn:
    """Three indices against the strength, for each limit."""
    having = complete_by_data(results, tables)
    if not having:
        return None
    figure, axes = panels("", len(having), 3, width=4.6)
    for row, (data, table) in enumerate(having.items()):
        for column, index in enumerate(INDICES):
            ax = axes[3 * row + column]
            _along(ax, results, table, index, _strengths(tables))
            ax.set(title=f"{SETS[data]}, {index}", ylabel=f"{index} index ({GOOD[index]})", ylim=(-0.03, 1.03))
    _common_legend(figure)
    said = [_ends(results, table, "recurrence", SETS[data]) for data, table in having.items()]
    figure.suptitle("; ".join(filter(None, said)))
    return figure


def _ends(results: Results, table: Table, quantity: str, name: str) -> str:
    """A quantity at strengths 0 and 1 without limit, in words; "" where it is not known."""
    ends = [list(_values(results, table.get(cell, {}), quantity).values()) for cell in (FREE, COUPLED)]
    if not all(ends):
        return ""
    low, high = (float(np.mean(values)) for values in ends)
    unit, digits = ("%", 1) if quantity == "accuracy" else ("", 2)
    return f"{name}: {quantity} {low:.{digits}f}{unit} at strength 0, {high:.{digits}f}{unit} at 1"


def _accuracy(results: Results, *, tables: Mapping[str, Table]) -> Drawn:
    """Accuracy against the strength, one panel for each data set."""
    having = complete_by_data(results, tables)
    if not having:
        return None
    figure, axes = _grid(len(having))
    for ax, (data, table) in zip(axes, having.items(), strict=True):
        _along(ax, results, table, "accuracy", _strengths(tables))
        ax.set(title=SETS[data], ylabel="test accuracy, %")
    _common_legend(figure)
    changes = [
        effect.value for table in having.values() if (effect := _change(results, table, (FREE, COUPLED), "accuracy"))
    ]
    if changes:
        figure.suptitle(
            f"Strength 1 changes accuracy by {_range(changes)} points without a limit "
            f"(means of {len(changes)} data set{'s' * (len(changes) > 1)})"
        )
    return figure


def _sizes(results: Results, *, tables: Mapping[str, Mapping[int, Table]]) -> Drawn:
    """Accuracy against the number of training images."""
    having = {
        data: {size: cells for size, table in sizes.items() if (cells := complete(results, table))}
        for data, sizes in tables.items()
    }
    having = {data: sizes for data, sizes in having.items() if len(sizes) > 1}
    if not having:
        return None
    figure, axes = panels("", 1, len(having), width=5.2, height=4.2)
    gains = []
    for ax, (data, sizes) in zip(axes, having.items(), strict=True):
        for number, cell in enumerate(ENDS):
            points = [
                (float(n), list(_values(results, t[cell], "accuracy").values())) for n, t in sizes.items() if cell in t
            ]
            _draw(ax, points, f"strength {cell.coupled}{', limit 1' if cell.bound else ''}", number)
        changes = (_change(results, table, (FREE, COUPLED), "accuracy") for table in sizes.values())
        gains += [effect.value for effect in changes if effect]
        ax.set_xscale("log")
        ax.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
        ax.set_xticks([], minor=True)
        ax.set(title=SETS[data], xlabel="training images", ylabel="test accuracy, %")
        _legend(ax)
    if gains:
        figure.suptitle(f"With all or fewer images strength 1 changes accuracy by {_range(gains)} points")
    return figure


def _range(values: Sequence[float]) -> str:
    """The least and the largest value, with signs; of one value itself."""
    ends = [f"{end:+.1f}" for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def _clutter(results: Results, *, tables: Mapping[str, Table]) -> Drawn:
    """Accuracy and indices against the number of digits."""
    having = complete_by_data(results, tables)
    if not having:
        return None
    figure, axes = panels("", 1, 4, height=4.0)
    quantities = ("accuracy", *INDICES)
    for ax, quantity in zip(axes, quantities, strict=True):
        for number, cell in enumerate(ENDS):
            name = f"strength {cell.coupled}{', limit 1' if cell.bound else ''}"
            values = {d: list(_values(results, table.get(cell, {}), quantity).values()) for d, table in having.items()}
            points = [(float(data[-1]), values[data]) for data in sorted(having) if data != "debris"]
            _draw(ax, points, name, number)
            debris = values.get("debris")
            if debris:
                colour = ax.get_lines()[-1].get_color() if ax.get_lines() else "0.3"
                ax.plot(
                    [3.1 + 0.1 * number],
                    [np.mean(debris)],
                    marker="x",
                    linestyle="none",
                    color=colour,
                    label=f"{name}, debris",
                )
        label = (
            "all digits right, % of test images" if quantity == "accuracy" else f"{quantity} index ({GOOD[quantity]})"
        )
        ax.set(title=quantity, xlabel="digits in an image", ylabel=label, xticks=(2, 3, 4, 5))
        if quantity != "accuracy":
            ax.set_ylim(-0.03, 1.03)
    _common_legend(figure)
    said = [_ends(results, table, "accuracy", SETS[data]) for data, table in having.items() if data == "clutter3"]
    figure.suptitle("".join(said))
    return figure


def _controls(results: Results, *, tables: Mapping[str, Table], shuffled: Mapping[str, Seeds]) -> Drawn:
    """Indices by agreement: trained, at initialisation, on shuffled labels."""
    having = {data: there for data, table in tables.items() if (there := done(results, table[FREE]))}
    if not having:
        return None
    figure, axes = panels("", 1, 3, width=4.8, height=4.2)
    means: dict[tuple[str, str], float] = {}
    for ax, index in zip(axes, INDICES, strict=True):
        for number, name in enumerate(("trained", "at initialisation", "shuffled labels")):
            points = []
            for place, (data, runs) in enumerate(having.items()):
                asked = done(results, shuffled[data]) if number == 2 else runs
                network = "initial" if number == 1 else ""
                values = list(index_of(results, asked, index, network=network, by="agreement", none=True).values())
                points.append((place + 0.15 * (number - 1), values))
            _draw(ax, points, name, number)
            means[index, name] = float(np.mean([v for _, values in points for v in values] or [np.nan]))
        for drawn in ax.get_lines():
            drawn.set_linestyle("none")
        ax.set(title=f"{index} ({GOOD[index]})", ylabel=f"{index} index by agreement", ylim=(-0.03, 1.03))
        _ticks(ax, [SETS[data] for data in having], turned=True)
    _common_legend(figure)
    figure.suptitle(
        f"Ordinary networks: recurrence by agreement {means['recurrence', 'at initialisation']:.2f} at initialisation "
        f"(equal weights), {means['recurrence', 'trained']:.2f} after training"
    )
    return figure
