"""P3's figures 2 to 6 and those of its extended version, from what `Example.execute` left in folders."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from residuum.claims import Figure, Results
from residuum.drawing import line, panels
from residuum.experiments.p3_runs import (
    BOUNDS,
    NETWORKS,
    SCALES,
    THETAS,
    Grid,
    Scale,
    at,
    by_levels,
    depth_needed,
    losses,
    stable_rate,
    with_truncation,
)
from residuum.layers.steps import Theta
from residuum.solve import Anderson, GradientDescent, NewtonKrylov, Picard, Solver
from residuum.stability import amplification, phase_plane
from residuum.toys.examples import Example
from residuum.toys.networks import Chain, Flow
from residuum.toys.problems import STIFF, damped_sine, orbit

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

Drawn = "matplotlib.figure.Figure"
Folders = Mapping[Example, Path]
_COLOURS = {0.0: "C3", 0.25: "C1", 0.5: "C0", 0.75: "C5", 1.0: "C2"}
_FALLBACK = "C4"


def figures(scale: str) -> tuple[Figure, ...]:
    """The figures of the study: the paper's, then those of its extended version and ours."""
    to = SCALES[scale]
    sine, longer = ([*(at(e, theta) for theta in THETAS)] for e in (to.sine, to.longer))
    spirals = [at(to.spirals, 0.0), *with_truncation(to.spirals)]
    prey = [at(to.prey, theta) for theta in THETAS]
    both = "Median and range over seeds."
    made = [
        Figure("p3-2", "P3, figure 2", "Steps of four schemes for a rotation, dt w = 0.5.", (), _plane),
        _figure("p3-3", "P3, figure 3", f"Regression with T = 1: losses over epochs. {both}", sine, convergence),
        _figure("p3-4", "P3, figure 4", f"Regression with T = 5: losses over epochs. {both}", longer, convergence),
        _figure("p3-fit", "P3, figures 3 and 4", "The function and the median networks, T = 5.", longer, fits),
        _figure("p3-5", "P3, figure 5", f"Two spirals: loss and accuracy over epochs. {both}", spirals, convergence),
        _figure("p3-6", "P3, figure 6", "Two spirals: regions of the answers, seed 0.", spirals, regions),
        _figure("p3-robust", "P3, its claim of robustness", "Spirals under noise; stretching.", spirals, robustness),
        _figure("p3-solvers", "P3, section 2.2", "Residuals of a trained block.", [at(to.spirals, 0.5)], _solvers),
    ]
    for every in to.every:
        stiff = [at(replace(to.stiff, every=every), theta) for theta in THETAS]
        words = f"A stiff equation, known after every {every} steps: solution and networks, seed 0."
        made.append(_figure(f"p3-stiff-{every}", "P3, extended version", words, stiff, stiffness))
    made.append(_figure("p3-prey", "P3, extended version", "Prey and predators, seed 0.", prey, phase_plane_of_prey))
    penalised = tuple(to.penalised(theta, d) for theta in to.wave_thetas for d in to.divergences)
    words = (
        "sin x with a penalty on the divergence: steps of the solver and training loss over epochs, median of seeds."
    )
    made.append(_figure("p3-wave", "P3, extended version", words, penalised, penalties, failures=True))
    words = "Spirals whose arms are 1 apart: accuracy over how far the points are moved. Mean and range over seeds."
    made.append(_figure("p3-arms", "P3, extended version", words, [to.bounded(name) for name in BOUNDS], shifts))
    levels = [e for theta in (0.0, 0.5) for e in (at(to.spirals, theta), by_levels(at(to.spirals, theta)))]
    words = f"Two spirals, trained by levels and at full depth: losses over epochs. {both}"
    made.append(_figure("p3-levels", "P3, its code of September 2019", words, levels, convergence))
    digits = tuple(job for name in NETWORKS for job in to.noisy_networks(name))
    words = "MNIST under noise: accuracy over its standard deviation, mean over draws."
    made.append(Figure("p3-noise", "P3, extended version", words, digits, partial(_noise, to=to)))
    for name, grid in to.grids.items():
        jobs = tuple(job for theta in (0.0, 0.5) for job in grid.jobs(theta))
        words = f"{name}: validation loss (median over seeds) over the learning rate, per depth, at equal T."
        made.append(Figure(f"p3-{name}-rates", "ours", words, jobs, partial(_rates, grid=grid)))
        words = (
            f"{name}: validation loss at the best rate over depth, at equal T: median, lowest, highest of the seeds."
        )
        made.append(Figure(f"p3-{name}-depths", "ours", words, jobs, partial(_depths, grid=grid)))
    return tuple(made)


def _figure(
    name: str,
    source: str,
    caption: str,
    jobs: Sequence[Example],
    draw: Callable[[Folders], Drawn],
    *,
    failures: bool = False,
) -> Figure:
    """A figure of those examples that are complete, and have a member that did not fail unless it shows failures."""

    def drawn(results: Results) -> "matplotlib.figure.Figure | None":
        there = {job: results[job.key].folder for job in jobs if job.key in results}
        alive = {job: folder for job, folder in there.items() if failures or None in values(folder)["failed"]}
        return draw(alive) if alive else None

    return Figure(name, source, caption, tuple(jobs), drawn)


def _plane(results: Results) -> Drawn:
    return phase_plane(0.5)


def _solvers(folders: Folders) -> Drawn:
    ((example, folder),) = folders.items()
    return solvers(example, folder, block=example.depth // 2)


def _noise(results: Results, *, to: Scale) -> "matplotlib.figure.Figure | None":
    """A line per network, of the seeds that all have in common; shaded: the range over all seeds of a network.

    On the images that it was trained on (as the paper has it) and on others.
    """
    found = {
        name: {job.seed: results[job.key].values["noise"] for job in to.noisy_networks(name) if job.key in results}
        for name in NETWORKS
    }
    there = {name: runs for name, runs in found.items() if runs}
    common = sorted(set.intersection(*(set(runs) for runs in there.values()))) if there else []
    if not common:
        return None
    figure, (row,) = _panels(1, 2, 4.4)
    for axes, (images, words) in zip(row, (("train", "training"), ("test", "test")), strict=True):
        for name, runs in there.items():
            means = {seed: [np.mean(draws) for draws in run[images].values()] for seed, run in runs.items()}
            sds = [float(sd) for sd in runs[common[0]][images]]
            color = {"plain": "black", "1Lip": "0.55"}.get(name) or f"C{list(NETWORKS).index(name) - 2}"
            style = {"color": color, "ls": "-" if "=" in name else "--"}
            axes.plot(sds, np.mean([means[seed] for seed in common], 0), marker="o", ms=3, label=name, **style)
            everything = np.array(list(means.values()))
            axes.fill_between(sds, everything.min(0), everything.max(0), color=color, alpha=0.12)
        axes.set(xlabel="standard deviation of the noise (pixels from 0 to 1)", ylabel=f"accuracy on {words} images")
        axes.set_ylim(0, 1.02)
    row[0].legend(fontsize=8)
    right = {name: np.mean([np.mean(runs[seed]["train"]["0.7"]) for seed in common]) for name, runs in there.items()}
    seeds = ", ".join(map(str, common))
    what = f"Right under noise of 0.7 on training images, lines: seed {seeds}, shaded: all seeds"
    _title(figure, what, [f"{share:.1%} {name}" for name, share in right.items()])
    return figure


def _there(results: Results, grid: Grid) -> bool:
    return all(job.key in results for theta in (0.0, 0.5) for job in grid.jobs(theta))


def _rates(results: Results, *, grid: Grid) -> "matplotlib.figure.Figure | None":
    """One panel per depth; failed members count as above all others."""
    if not _there(results, grid):
        return None
    figure, axes = panels("", 1, len(grid.depths), width=3.0, height=3.9, share_y=True)
    said, seen = [], [grid.nothing]
    for number, theta in enumerate((0.0, 0.5)):
        for ax, job in zip(axes, grid.jobs(theta), strict=True):
            middles = [median(column) for column in zip(*losses(results, job, "validation_loss").values(), strict=True)]
            known = [(rate, loss) for rate, loss in zip(grid.rates, middles, strict=True) if math.isfinite(loss)]
            if known:
                line(ax, *zip(*known, strict=True), label=f"theta = {theta:g}", number=number)
                seen += [loss for _, loss in known]
            ax.axhline(grid.nothing, color="0.6", linewidth=1)
            ax.set(xscale="log", yscale="log", xlabel="learning rate", title=f"depth {job.depth}")
        stable = [median(stable_rate(results, job, grid.nothing).values()) for job in grid.jobs(theta)]
        said.append(f"{', '.join(f'{r:g}' if r >= grid.rates[0] else 'none' for r in stable)} at theta = {theta:g}")
    axes[0].set_ylim(min(seen) / 2, 2 * min(max(seen), 30 * grid.nothing))
    axes[0].set_ylabel("validation loss (grey: of no answer)")
    axes[0].legend()
    figure.suptitle("Largest stable learning rate, by depth:\n" + "\n".join(said), fontsize=12)
    return figure


def _depths(results: Results, *, grid: Grid) -> "matplotlib.figure.Figure | None":
    if not _there(results, grid):
        return None
    figure, (ax,) = panels("", 1, 1, width=7.4, height=4.4)
    said = []
    for number, theta in enumerate((0.0, 0.5)):
        rows = [[min(row) for row in losses(results, j, "validation_loss").values()] for j in grid.jobs(theta)]
        known = [(d, row) for d, row in zip(grid.depths, rows, strict=True) if math.isfinite(median(row))]
        if known:
            line(ax, [d for d, _ in known], [median(r) for _, r in known], label=f"theta = {theta:g}", number=number)
        for d, row in known:
            ends = [min(row), max(v for v in row if math.isfinite(v))]
            ax.plot([d, d], ends, color=f"C{number}", linewidth=0.8, alpha=0.6)
        needed = median(depth_needed(results, grid, theta).values())
        words = f"more than {grid.depths[-1]}" if needed > grid.depths[-1] else f"{needed:g}"
        said.append(f"{words} blocks at theta = {theta:g}")
    ax.axhline(grid.level, color="0.6", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="blocks (equal T)", ylabel="validation loss at the best learning rate")
    ax.set_xticks(grid.depths, [str(d) for d in grid.depths])
    ax.set_xticks([], minor=True)
    ax.legend()
    figure.suptitle(f"A loss of {grid.level:g} (grey) takes\n{', '.join(said)} (median)", fontsize=12)
    return figure


def values(folder: Path) -> dict[str, Any]:
    """What an example's training and measures gave."""
    return json.loads((folder / "values.json").read_text(encoding="utf-8"))


def final(found: dict[str, Any], name: str) -> list[float]:
    """The last values of the history of the members that have not failed."""
    return [value for value in found["history"][-1][name] if value is not None]


def label(example: Example) -> str:
    """What tells an example from its neighbours in a figure."""
    what = f"theta = {example.theta:g}" + (" (residual network)" if example.theta == 0 else "")
    what += ", truncated gradient" if example.param_grad == "truncated" else ""
    return what + (f", from {example.stages[0].depth} blocks" if example.levels > 1 else "")


def _short(example: Example) -> str:
    return label(example).replace(" (residual network)", "")


def one(example: Example, folder: Path, member: int) -> Chain | Flow:
    """The trained network of one member alone."""
    rate, seed = example.members[member]
    network = replace(example, rates=(rate,), seeds=(seed,)).network().requires_grad_(False)
    for p, trained in zip(network.parameters(), example.trained(folder).parameters(), strict=True):
        p.copy_(trained[member : member + 1])
    return network


def _line(example: Example) -> dict[str, Any]:
    style = "--" if example.param_grad == "truncated" or example.levels > 1 else "-"
    return {"color": _COLOURS.get(example.theta, _FALLBACK), "ls": style}


def convergence(folders: Folders) -> Drawn:
    """Validation loss over epochs: the median member and the range of all; beside it training loss or accuracy.

    Members that failed have no values from there on; how many have failed at the end stands in legend and title.

    Source: P3 (Reshniak & Webster), figures 3 to 5.
    """
    spirals = next(iter(folders)).problem == "spirals"
    figure, (row,) = _panels(1, 2, 4.6)
    other = ("validation_accuracy", "validation accuracy") if spirals else ("train_loss", "training loss")
    for axes, (name, words) in zip(row, [("validation_loss", "validation loss"), other], strict=True):
        for example, folder in folders.items():
            history = values(folder)["history"]
            rows = [(row["epoch"], [v for v in row[name] if v is not None]) for row in history]
            epochs, found = zip(*[row for row in rows if row[1]], strict=True)
            axes.plot(epochs, [median(v) for v in found], label=label(example) + _failed(history), **_line(example))
            axes.fill_between(epochs, [min(v) for v in found], [max(v) for v in found], alpha=0.12, **_line(example))
        axes.set(xlabel="epoch", ylabel=words)
        if name != "validation_accuracy":
            axes.set_yscale("log")
    row[0].legend(fontsize=8)
    found = {example: values(folder) for example, folder in folders.items()}
    lasts = [
        (median(final(v, "validation_loss")), _short(e), f"{v['history'][-1]['epoch']}{_failed(v['history'])}")
        for e, v in found.items()
    ]
    _title(figure, "Median validation loss", [f"{loss:.2g} at {name}, epoch {epoch}" for loss, name, epoch in lasts])
    return figure


def _failed(history: list[dict[str, Any]]) -> str:
    """How many members have failed, in words; "" if none has."""
    last = history[-1]["validation_loss"]
    lost = sum(value is None for value in last)
    return f" ({lost} of {len(last)} failed, left out)" if lost else ""


def regions(folders: Folders, *, member: int = 0) -> Drawn:
    """Where the networks of one member answer 0 and 1, on [-1.5, 1.5]^2, with the two spirals.

    Source: P3 (Reshniak & Webster), figure 6.
    """
    columns = 2 if len(folders) in (2, 4) else min(3, len(folders))
    figure, rows = _panels(-(-len(folders) // columns), columns, 3.6)
    every = [axes for row in rows for axes in row]
    side = np.linspace(-1.5, 1.5, 150)
    grid = torch.tensor(np.stack(np.meshgrid(side, side), 2).reshape(-1, 2))
    for axes, (example, folder) in zip(every, folders.items(), strict=False):
        accuracy = values(folder)["history"][-1]["validation_accuracy"][member]
        if accuracy is not None:  # a network that failed has no answers
            output = one(example, folder, member)(grid).output.view(len(side), len(side))
            axes.contourf(side, side, (output > 0).double(), levels=[-1, 0.5, 2], colors=["#9ecae1", "#fdae6b"])
        x, y = (part[member] for part in example.data().validation)
        for kind, colour in ((0, "C0"), (1, "C1")):
            axes.plot(*x[y[:, 0] == kind].T, ".", ms=2, color=colour)
        said = "failed" if accuracy is None else f"{accuracy:.1%} right"
        axes.set(aspect="equal", xlabel="x1", ylabel="x2", title=f"{label(example)}\n{said}")
        axes.title.set_fontsize(9)
    for axes in every[len(folders) :]:
        axes.remove()
    figure.suptitle(f"Answers of the network with seed {next(iter(folders)).members[member].seed}", fontsize=12)
    return figure


def fits(folders: Folders) -> Drawn:
    """The damped sine and what the median member of each example makes of it.

    Source: P3 (Reshniak & Webster), figures 3 and 4.
    """
    figure, ((axes,),) = _panels(1, 1, 4.4)
    x = np.linspace(-1, 1, 1000)
    axes.plot(x, damped_sine(x), color="0.6", lw=4, label="target")
    errors = []
    for example, folder in folders.items():
        losses = values(folder)["history"][-1]["validation_loss"]
        fine = [loss for loss in losses if loss is not None]
        middle = losses.index(sorted(fine)[(len(fine) - 1) // 2])
        output = one(example, folder, middle)(torch.tensor(x)[:, None]).output[:, 0]
        axes.plot(x, output, label=label(example), **_line(example))
        errors.append(f"{losses[middle]:.2g} at {_short(example)}")
    axes.set(xlabel="x", ylabel="sin(2 pi x) exp(-x^2 / 2)")
    axes.legend(fontsize=8)
    _title(figure, "Mean squared error of the median network", errors)
    return figure


def robustness(folders: Folders) -> Drawn:
    """Accuracy of the spirals under noise, and how far the networks stretch small changes of the input.

    Source: P3 (Reshniak & Webster), the claim of robustness.
    """
    figure, ((left, right),) = _panels(1, 2, 4.4)
    lasts = []
    for place, (example, folder) in enumerate(folders.items()):
        found = values(folder)
        fine, measured = [why is None for why in found["failed"]], found["measured"]
        levels = sorted(measured["noise"], key=float)
        rows = np.array([measured["noise"][level] for level in levels])[:, fine]
        failed = _failed(found["history"])
        sds = [float(level) for level in levels]
        left.plot(sds, rows.mean(1), marker="o", label=label(example) + failed, **_line(example))
        left.fill_between(sds, rows.min(1), rows.max(1), alpha=0.12, **_line(example))
        largest = [row[2] for row, ok in zip(measured["jacobian"], fine, strict=True) if ok]
        right.plot([place] * len(largest), largest, "o", color=_line(example)["color"])
        lasts.append(f"{rows[-1].mean():.1%} at {_short(example)}{failed}")
    right.set(yscale="log", ylabel="largest stretching of an input's change\n(95 % quantile over validation points)")
    right.set_xticks(range(len(folders)), [fill(label(e), 11) for e in folders])
    right.tick_params(axis="x", labelsize=7)
    right.margins(x=0.2)
    left.set(xlabel="standard deviation of the noise", ylabel="accuracy on validation points")
    left.legend(fontsize=8)
    _title(figure, f"Mean accuracy with noise of standard deviation {levels[-1]}", lasts)
    return figure


def penalties(folders: Folders) -> Drawn:
    """What a penalty on the divergence of the right-hand side costs: the solver's steps, and the loss, over epochs.

    The median of the members whose equations have all been solved so far; a cross where the last of them ends.

    Source: P3 (Reshniak & Webster), extended version, the logs of its regression.
    """
    figure, (row,) = _panels(1, 2, 4.6)
    weights, lost = sorted({example.divergence for example in folders}), []
    for axes, (name, words) in zip(
        row, (("steps", "solver's steps per block"), ("train_loss", "training loss")), strict=True
    ):
        for example, folder in folders.items():
            history = values(folder)["history"]
            rows = [(r["epoch"], [v for v in r[name] if v is not None]) for r in history]
            epochs, found = zip(*[(epoch, median(alive)) for epoch, alive in rows if alive], strict=True)
            style = {"color": _COLOURS.get(example.theta, _FALLBACK)}
            style["ls"] = ("-", "--", ":", "-.", (0, (1, 3)))[weights.index(example.divergence) % 5]
            axes.plot(epochs, found, label=f"theta = {example.theta:g}, penalty {example.divergence:g}", **style)
            if len(found) < len(rows):
                axes.plot(epochs[-1:], found[-1:], "x", color=style["color"])
            failed = sum(value is None for value in history[-1][name])
            if name == "steps" and failed:
                what = f"theta = {example.theta:g}, penalty {example.divergence:g}"
                lost.append(f"{failed} of {len(example.members)} at {what}")
        axes.set(xlabel="epoch", ylabel=words)
    row[1].set_yscale("log")
    row[0].legend(fontsize=8)
    _title(figure, "Trainings that end with an equation that is not solved", lost or ["none"])
    return figure


def shifts(folders: Folders) -> Drawn:
    """Accuracy of the spirals whose arms are 1 apart, by how far their points are moved.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, ((axes,),) = _panels(1, 1, 4.4)
    said = []
    for number, (example, folder) in enumerate(folders.items()):
        found = values(folder)
        fine = [why is None for why in found["failed"]]
        rows = {
            float(by): [v for v, ok in zip(r, fine, strict=True) if ok]
            for by, r in found["measured"]["shifted"].items()
        }
        name = next(name for name, bound in BOUNDS.items() if bound == example.bound)
        line(axes, list(rows), [np.mean(row) for row in rows.values()], label=name, number=number)
        axes.fill_between(list(rows), *([pick(row) for row in rows.values()] for pick in (min, max)), alpha=0.12)
        said.append(f"{np.mean(rows[0.33]):.1%} {name}")
    axes.axvline(0.5, color="0.6", lw=1)
    axes.set(xlabel="shift along the radius, outwards and inwards (grey: middle between the arms)", ylabel="accuracy")
    axes.legend(fontsize=8)
    _title(figure, "Right after a shift of 0.33", said)
    return figure


def phase_plane_of_prey(folders: Folders, *, member: int = 0) -> Drawn:
    """Orbits of prey and predators that the networks have not been trained on, beside the exact ones.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, (row,) = _panels(1, len(folders), 3.9)
    for axes, (example, folder) in zip(row, folders.items(), strict=True):
        x = example.data().validation.x[member]
        output = one(example, folder, member)(x).output
        for number in range(0, len(x), 3):
            exact = orbit(x[number].numpy(), np.linspace(0, example.time, 400)[1:])
            axes.plot(*exact.T, color="0.75", lw=3, label=_once("exact", number))
            path = torch.cat([x[number : number + 1], output[number]])
            axes.plot(*path.T, ".-", ms=3, lw=0.8, color=_line(example)["color"], label=_once("network", number))
        loss = values(folder)["history"][-1]["validation_loss"][member]
        axes.set(xlabel="prey", ylabel="predators", title=f"{label(example)}\n{_error(loss)}")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    figure.suptitle(f"{next(iter(folders)).depth} steps on orbits between those of the training", fontsize=12)
    return figure


def stiffness(folders: Folders, *, member: int = 0) -> Drawn:
    """The stiff equation: a solution that was not trained on, and the networks' after every step.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, (row,) = _panels(1, len(folders), 3.9)
    for axes, (example, folder) in zip(row, folders.items(), strict=True):
        x, y = (part[member] for part in example.data().validation)
        times, output = np.linspace(0, example.time, example.depth + 1), one(example, folder, member)(x).output[..., 0]
        for number in range(0, len(x), 3):
            start = x[number, :1]
            axes.plot(times, torch.cat([start, y[number, :, 0]]), color="0.75", lw=3, label=_once("exact", number))
            path = torch.cat([start, output[number]])
            axes.plot(times, path, ".-", color=_line(example)["color"], label=_once("network", number))
        loss = values(folder)["history"][-1]["validation_loss"][member]
        shrink = abs(amplification(np.array([STIFF * example.step.dt]), theta=example.theta)[0])
        axes.set(xlabel="t", ylabel="y", title=f"{label(example)}, |R| = {shrink:.2f}\n{_error(loss)}")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    every = next(iter(folders)).every
    figure.suptitle(
        f"y' = -20 (y - cos t), fitted after every {every} steps\nR is what a step multiplies errors by", fontsize=12
    )
    return figure


def _error(loss: float | None) -> str:
    return "failed" if loss is None else f"validation error {loss:.1e}"


def _once(words: str, number: int) -> str:
    return "" if number else words


def solvers(example: Example, folder: Path, *, block: int = 12, steps: int = 30) -> Drawn:
    """How fast solvers lower the residual of one trained block: the median over validation points.

    Source: P3 (Reshniak & Webster), section 2.2, whose solver is gradient descent.
    """
    network, x = one(example, folder, 0), example.data().validation.x[0]
    h, branch = network(x).states[block], network.blocks[block].branch
    known = torch.add(h, branch(h), alpha=(1 - example.theta) * example.step.dt)
    kinds: dict[str, Solver] = {
        "gradient descent, rate 1e-5 (the paper's code)": GradientDescent(1e-14, 1, rate=1e-5),
        "gradient descent, rate 1/4": GradientDescent(1e-14, 1),
        "fixed-point iteration": Picard(1e-14, 1),
        "Anderson": Anderson(1e-14, 1),
        "Newton-Krylov": NewtonKrylov(1e-14, 1),
    }
    figure, ((axes,),) = _panels(1, 1, 4.4)
    for name, solver in kinds.items():
        found = [_residual(replace(solver, max_steps=k), example.step, branch, known, h) for k in range(1, steps)]
        evaluations, residuals = zip(*found, strict=True)
        axes.plot(evaluations, residuals, ".-", ms=4, label=name)
    axes.set(
        yscale="log", xlim=(0, 60), ylim=(1e-15, 1), xlabel="evaluations of the branch and products with its Jacobian"
    )
    axes.set(ylabel="residual, median over points")
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.95))
    figure.suptitle(f"The paper's solver does not move; block {block + 1} of {example.depth}, trained", fontsize=12)
    return figure


def _residual(
    solver: Solver, step: Theta, branch: torch.nn.Module, known: torch.Tensor, h: torch.Tensor
) -> tuple[int, float]:
    record = solver.solve(lambda y: torch.add(known, branch(y), alpha=step.theta * step.dt), h)[1]
    return record.evaluations, float(record.residual.median())


def _panels(rows: int, columns: int, size: float) -> tuple["matplotlib.figure.Figure", list[list["Axes"]]]:
    from matplotlib.figure import Figure as Empty

    wide = size * 1.5 if columns == 1 else size * columns
    figure = Empty(figsize=(max(wide, 7.5), size * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _title(figure: "matplotlib.figure.Figure", what: str, numbers: Sequence[str]) -> None:
    lines = ["; ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    figure.suptitle("\n".join([f"{what}:", *lines]), fontsize=11)
