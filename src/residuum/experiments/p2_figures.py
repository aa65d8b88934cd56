"""P2's figures 1 to 7 beside the calibrated null model, and three of ours."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from residuum.claims import Drawn, Figure, Results
from residuum.drawing import COLOURS, depth_axis, line, panels, plain_ticks, shade
from residuum.experiments.p2_runs import (
    CROSSING,
    EPS,
    PREDICTED,
    SETS,
    Curve,
    Sweep,
    ablation_of,
    crossing,
    curve,
    mean_curve,
    runs_of,
    sweep_of,
    test_errors,
)
from residuum.experiments.seeds import along, complete, complete_by_data, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("section 1", "section 2", "section 3")
DEPTH = "blocks per section, L"
UNKNOWN = "not yet known"
BESIDE = ((4, 3), (4, -11), (-14, 3))  # where the number of a section stands, so that near points keep theirs apart
# name, number in the paper, index, vertical axis, words for the title
CURVES = (
    ("p2-3", "3", "computational_distance", "computational distance d", "distance"),
    ("p2-4", "4", "mean_perturbation", "mean perturbation d / L", "mean perturbation"),
    ("p2-6", "6", "scaled_distance", "scaled distance d_scaled", "scaled distance"),
    ("p2-7", "7", "mean_scaled_perturbation", "mean scaled perturbation d_scaled / L", "mean scaled perturbation"),
)


def figures(scale: str) -> tuple[Figure, ...]:
    """The figures of the study, in the paper's order."""
    sweeps = {data: sweep_of(scale, data) for data in SETS}
    jobs = tuple(run for sweep in sweeps.values() for run in runs_of(sweep))
    ablations = {data: ablation_of(scale, data) for data in SETS}
    ablated = tuple(run for cells in ablations.values() for sweep in cells.values() for run in runs_of(sweep))
    bars = "Mean over seeds; bars: their standard deviation, where there are several."
    printed = [
        Figure("p2-1", "P2, figure 1", f"Test error against L. {bars}", jobs, partial(_errors, sweeps=sweeps)),
        *(
            Figure(
                f"p2-{number}",
                f"P2, figure {number}",
                f"{label} of each block (up) against its position in the section (x) and L (y); first seed.",
                jobs,
                partial(_surfaces, sweeps=sweeps, quantity=quantity, label=label),
            )
            for number, quantity, label in (
                ("2", "perturbation", "Perturbation |f|"),
                ("5", "scaled_perturbation", "Scaled perturbation |f| / |h|"),
            )
        ),
        *(
            Figure(
                name,
                f"P2, figure {number}; the null model is ours",
                f"{label[0].upper()}{label[1:]} against L, per section and of the whole network, trained and "
                f"untrained (calibrated). {bars}",
                jobs,
                partial(_curves, sweeps=sweeps, index=index, label=label, words=words),
            )
            for name, number, index, label, words in CURVES
        ),
    ]
    ours = [
        Figure(
            "p2-partition",
            "P2, eq. 11, normalised; ours",
            "Cumulative scaled perturbation by d_scaled against l / L, deepest networks, first seed: the steps that "
            "the network has learned to take. Straight: equal steps.",
            jobs,
            partial(_partitions, sweeps=sweeps),
        ),
        Figure(
            "p2-crossing",
            "P2, section 3.5.1, numbers recomputed",
            f"Depth at which the mean scaled perturbation reaches {EPS:g}, against the stopping rule's prediction from "
            "the deepest networks; on the line they agree. Stars: the paper. Arrows: not reached in some seed.",
            jobs,
            partial(_rule, sweeps=sweeps),
        ),
        Figure(
            "p2-ablation",
            "ours",
            f"Scaled distance of the whole network against L, with and without weight decay, short and long. {bars}",
            ablated,
            partial(_ablation, ablations=ablations),
        ),
    ]
    return (*sorted(printed, key=lambda figure: figure.id), *ours)


def _draw(axes: "Axes", curves: list[Curve], label: str, number: int, *, fresh: bool = False) -> None:
    """Mean over seeds with bars of their standard deviation."""
    mean = mean_curve(curves)
    bars = [spread([curve[depth] for curve in curves if depth in curve]) for depth in mean]
    line(axes, list(mean), list(mean.values()), label=label, number=number, spread=bars, fresh=fresh)


def _errors(results: Results, *, sweeps: Mapping[str, Sweep]) -> Drawn:
    having = complete_by_data(results, sweeps)
    if not having:
        return None
    said, ends = [], {}
    for data, sweep in having.items():
        found = [test_errors(results, runs) for runs in sweep.values()]
        ends[data], both = mean_curve(found), list(_ends(found).values())
        said.append(f"{SETS[data]} {100 * both[0]:.2f} to {100 * both[1]:.2f} %" if both else f"{SETS[data]} {UNKNOWN}")
    figure, axes = panels(f"Test error, shallowest to deepest: {', '.join(said)}", 1, len(having))
    for ax, (data, sweep) in zip(axes, having.items(), strict=True):
        curves = [{d: 100 * e for d, e in test_errors(results, runs).items()} for runs in sweep.values()]
        _draw(ax, curves, SETS[data], 0)
        ax.set(title=SETS[data], xlabel=DEPTH, ylabel="test error, %")
        ax.set_ylim(bottom=0)
        depth_axis(ax, ends[data])
    return figure


def _surfaces(results: Results, *, sweeps: Mapping[str, Sweep], quantity: str, label: str) -> Drawn:
    """The paper's 3-D figures: one line per network, panels of sections."""
    from matplotlib.figure import Figure as Canvas

    having = complete_by_data(results, sweeps)
    if not having:
        return None
    figure = Canvas(figsize=(13.5, 4.4 * len(having) + 0.6), layout="constrained")
    kind = "steps as part of the state" if quantity.startswith("scaled") else "steps"
    firsts = []
    for row, (data, sweep) in enumerate(having.items()):
        runs = next(iter(sweep.values()))
        for section in range(3):
            ax = figure.add_subplot(len(having), 3, 3 * row + section + 1, projection="3d")
            for i, (depth, run) in enumerate(runs.items()):
                steps = along(results[run.key].profile(), quantity, section)
                places = [(block + 0.5) / depth for block in range(depth)]
                part = i / max(1, len(runs) - 1)
                ax.plot(places, [depth] * depth, steps, color=shade(part), marker=".", label=f"L = {depth}")
                firsts += [steps[0] > steps[-1]] if depth > 1 else []
            ax.set(xlabel="position in the section", ylabel="L", title=f"{SETS[data]}, {NAMES[section]}")
            ax.set_zlabel(label, labelpad=4)
            ax.view_init(elev=24, azim=-58)
            ax.set_box_aspect(None, zoom=0.8)
    known = f"in {sum(firsts)} of {len(firsts)} sections" if firsts else f"or not: {UNKNOWN}"
    figure.suptitle(f"The first of a section's {kind} is longer than the last {known}", fontsize=12)
    return figure


def _curves(results: Results, *, sweeps: Mapping[str, Sweep], index: str, label: str, words: str) -> Drawn:
    """Per section and of the whole network, trained beside untrained."""
    having = complete_by_data(results, sweeps)
    if not having:
        return None
    said = [_growth(results, sweep, index, SETS[data]) for data, sweep in having.items()]
    figure, axes = panels(f"{words[0].upper()}{words[1:]}, {'; '.join(said)}", len(having), 4, width=3.6)
    for row, (data, sweep) in enumerate(having.items()):
        for column, section in enumerate((0, 1, 2, None)):
            ax = axes[4 * row + column]
            for number, network in enumerate(("measured", "initial")):
                found = [curve(results, runs, index, section, network=network) for runs in sweep.values()]
                name = ("trained", "untrained")[number]
                _draw(ax, found, name, number, fresh=bool(number))
            ax.set(title=f"{SETS[data]}, {'whole network' if section is None else NAMES[section]}", xlabel=DEPTH)
            depths = mean_curve(found)
            depth_axis(ax, depths)
            if index.startswith("mean"):
                ax.set_yscale("log")
                plain_ticks(ax)
            else:
                ax.set_ylim(bottom=0)
            if index == "mean_scaled_perturbation":
                ax.plot([min(depths), max(depths)], [EPS, EPS], color="0.5", linewidth=1, label=f"{EPS:g}")
        axes[4 * row].set_ylabel(label)
        axes[4 * row].legend()
    return figure


def _growth(results: Results, sweep: Sweep, index: str, name: str) -> str:
    """By how much the whole network's index changes from the shallowest to the deepest network, trained and not."""
    ours, theirs = (
        _ends([curve(results, runs, index, None, network=network) for runs in sweep.values()])
        for network in ("measured", "initial")
    )
    if not ours:
        return f"{name}: growth with L {UNKNOWN}"
    low, high = ours
    by = [ends[high] / ends[low] for ends in (ours, theirs)]
    return f"{name}: \u00d7 {by[0]:.2g} from L = {low} to {high} (untrained \u00d7 {by[1]:.2g})"


def _ends(curves: list[Curve]) -> Curve:
    """Means at the least and the greatest depth over the seeds that have both; empty where none has."""
    depths = sorted(mean_curve(curves))
    low, high = depths[0], depths[-1]
    return mean_curve([{d: c[d] for d in (low, high)} for c in curves if {low, high} <= c.keys()] if low < high else [])


def _partitions(results: Results, *, sweeps: Mapping[str, Sweep]) -> Drawn:
    having = complete_by_data(results, sweeps)
    if not having:
        return None
    halves = []
    figure, axes = panels("", len(having), 3, share_y=True)
    for row, (data, sweep) in enumerate(having.items()):
        runs = next(iter(sweep.values()))
        run = runs[max(runs)]
        for section, ax in enumerate(axes[3 * row : 3 * row + 3]):
            for number, network in enumerate(("profile", "initial")):
                steps = along(results[run.key].profile(network), "scaled_perturbation", section)
                parts = [0.0, *(total / sum(steps) for total in accumulate(steps))]
                places = [i / len(steps) for i in range(len(steps) + 1)]
                name = ("trained", "untrained")[number]
                line(ax, places, parts, label=name, number=number, fresh=bool(number))
                if network == "profile":
                    halves.append(float(np.interp(0.5, places, parts)))  # of an odd number of blocks half a block
            ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="equal steps")
            ax.set(title=f"{SETS[data]}, {NAMES[section]}, L = {len(steps)}", xlabel="position in the section, l / L")
        axes[3 * row].set_ylabel("part of the scaled distance")
        axes[3 * row].legend()
    figure.suptitle(
        f"The first half of a section's blocks makes {100 * min(halves):.0f} to {100 * max(halves):.0f} % "
        "of its scaled distance",
        fontsize=12,
    )
    return figure


def _rule(results: Results, *, sweeps: Mapping[str, Sweep]) -> Drawn:
    """Observed crossing against the prediction from the deepest network, with the paper's points."""
    having = complete_by_data(results, sweeps)
    if not having:
        return None
    figure, (ax,) = panels("", 1, 1, width=6.4, height=5.2)
    reached = total = 0
    for number, (data, sweep) in enumerate(having.items()):
        for section in range(3):
            curves = [curve(results, runs, "mean_scaled_perturbation", section) for runs in sweep.values()]
            mean = mean_curve(curves)
            deepest = max(mean)
            predicted, observed = mean[deepest] * deepest / EPS, min(crossing(mean), deepest)
            there = all(crossing(found) <= deepest for found in curves)
            reached, total = reached + there, total + 1
            label = f"{SETS[data]}, L up to {deepest}" if section == 0 else "_"
            line(ax, [predicted], [observed], label=label, number=number)
            note = f" {section + 1}" if there else f" {section + 1} \u2191"
            ax.annotate(note, (predicted, observed), xytext=BESIDE[section], textcoords="offset points")
            ax.annotate(str(section + 1), (PREDICTED[data][section], CROSSING[data][section]), xytext=(5, -3),
                        textcoords="offset points")  # fmt: skip
        ours = {"marker": "*", "linestyle": "none", "markersize": 10, "color": COLOURS[number]}
        ax.plot(PREDICTED[data][:3], CROSSING[data][:3], label=f"{SETS[data]}, the paper (recomputed)", **ours)
    high = 1.1 * max(*ax.get_xlim(), *ax.get_ylim())
    ax.plot([0, high], [0, high], color="0.6", linewidth=1, label="equal")
    ax.set(xlim=(0, high), ylim=(0, high), xlabel="predicted L = d_scaled / 0.1", ylabel="observed L (number: section)")
    ax.legend()
    figure.suptitle(
        f"Every seed reaches a mean step of {EPS:g} within the depths here in {reached} of {total} sections"
    )
    return figure


def _ablation(results: Results, *, ablations: Mapping[str, Mapping[tuple[bool, bool], Sweep]]) -> Drawn:
    having = {
        data: cells for data, cells in ablations.items() if any(complete(results, sweep) for sweep in cells.values())
    }
    if not having:
        return None
    figure, axes = panels("", 1, len(having), width=5.2, height=4.2)
    said = []
    for ax, (data, cells) in zip(axes, having.items(), strict=True):
        by = {}
        for number, ((decay, longer), sweep) in enumerate(cells.items()):
            found = [curve(results, runs, "scaled_distance", None) for runs in sweep.values()]
            if not any(found):
                continue
            name = f"{'with' if decay else 'no'} decay, {'long' if longer else 'short'}"
            _draw(ax, [c for c in found if c], name, number)
            depths = mean_curve(found)
            if ends := _ends(found):
                by[decay, longer] = ends[max(ends)] / ends[min(ends)]
        fresh = [
            curve(results, runs, "scaled_distance", None, network="initial") for runs in cells[False, True].values()
        ]
        if any(fresh):
            _draw(ax, [c for c in fresh if c], "untrained", 6, fresh=True)
        if {(False, True), (True, True)} <= by.keys():
            said.append(f"{SETS[data]} \u00d7 {by[False, True]:.2g} without decay, \u00d7 {by[True, True]:.2g} with")
        ax.set(title=SETS[data], xlabel=DEPTH, ylabel="scaled distance of the whole network")
        ax.set_ylim(bottom=0)
        depth_axis(ax, depths)
        ax.legend()
    figure.suptitle(f"Growth with depth after long training: {'; '.join(said) or UNKNOWN}", fontsize=12)
    return figure
