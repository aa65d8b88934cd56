"""P3's figures 2 to 6 and ours, from what `Example.execute` left in folders; the list of all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import fill

import numpy as np
import torch

from residuum.claims import Drawn, Figure, Results
from residuum.drawing import COLOURS, line, panels, plain_ticks
from residuum.experiments.p3_extended import noise, penalties, phase_plane_of_prey, shifts, stiffness
from residuum.experiments.p3_panels import (
    Folders,
    colour_of,
    failed_of,
    final,
    label,
    line_of,
    one,
    short,
    titled,
    values,
)
from residuum.experiments.p3_runs import (
    BOUNDS,
    NETWORKS,
    SCALES,
    THETAS,
    Grid,
    at,
    by_levels,
    depth_needed,
    losses,
    stable_rate,
    with_truncation,
)
from residuum.layers.steps import Theta
from residuum.solve import Anderson, GradientDescent, NewtonKrylov, Picard, Solver
from residuum.stability import phase_plane
from residuum.toys.examples import Example
from residuum.toys.problems import damped_sine


def figures(scale: str) -> tuple[Figure, ...]:
    """The figures of the study: the paper's, then those of its extended version and ours."""
    to = SCALES[scale]
    sine, longer = ([*(at(e, theta) for theta in THETAS)] for e in (to.sine, to.longer))
    deep = [replace(sine[0], depth=to.deep), *sine]
    spirals = [at(to.spirals, 0.0), *with_truncation(to.spirals)]
    prey = [at(to.prey, theta) for theta in THETAS]
    both = "Median and range over seeds."
    made = [
        Figure("p3-2", "P3, figure 2", "Steps of four schemes for a rotation, dt w = 0.5.", (), _plane),
        _figure("p3-3", "P3, figures 3 and 4", f"Regression with T = 1: losses over epochs. {both}", deep, convergence),
        _figure("p3-4", "ours", f"Regression with T = 5: losses over epochs. {both}", longer, convergence),
        _figure("p3-fit", "ours", "The function and the median networks, T = 5.", longer, fits),
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
    made.append(Figure("p3-noise", "P3, extended version", words, digits, partial(noise, to=to)))
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

    def drawn(results: Results) -> Drawn:
        there = {job: results[job.key].folder for job in jobs if job.key in results}
        alive = {job: folder for job, folder in there.items() if failures or None in values(folder)["failed"]}
        return draw(alive) if alive else None

    return Figure(name, source, caption, tuple(jobs), drawn)


def _plane(results: Results) -> Drawn:
    return phase_plane(0.5)


def _solvers(folders: Folders) -> Drawn:
    ((example, folder),) = folders.items()
    return solvers(example, folder, block=example.depth // 2)


def _there(results: Results, grid: Grid) -> bool:
    return all(job.key in results for theta in (0.0, 0.5) for job in grid.jobs(theta))


def _rates(results: Results, *, grid: Grid) -> Drawn:
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


def _depths(results: Results, *, grid: Grid) -> Drawn:
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
            ax.plot([d, d], ends, color=COLOURS[number], linewidth=0.8, alpha=0.6)
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


def convergence(folders: Folders) -> Drawn:
    """Validation loss over epochs: the median member and the range of all; beside it training loss or accuracy.

    Members that failed have no values from there on; how many have failed at the end stands in legend and title.

    Source: P3 (Reshniak & Webster), figures 3 to 5.
    """
    spirals = next(iter(folders)).problem == "spirals"
    depths = {example.depth for example in folders}
    figure, row = panels("", 1, 2, width=4.6, height=4.9)
    other = ("validation_accuracy", "validation accuracy") if spirals else ("train_loss", "training loss")
    for axes, (name, words) in zip(row, [("validation_loss", "validation loss"), other], strict=True):
        for example, folder in folders.items():
            history = values(folder)["history"]
            rows = [(row["epoch"], [v for v in row[name] if v is not None]) for row in history]
            epochs, found = zip(*[row for row in rows if row[1]], strict=True)
            deeper = len(depths) > 1 and example.depth == max(depths)
            look = line_of(example) | ({"ls": ":"} if deeper else {})
            name_of = label(example) + f", {example.depth} blocks" * deeper + failed_of(history)
            axes.plot(epochs, [median(v) for v in found], label=name_of, **look)
            axes.fill_between(epochs, [min(v) for v in found], [max(v) for v in found], alpha=0.12, color=look["color"])
        axes.set(xlabel="epoch", ylabel=words)
        if name != "validation_accuracy":
            axes.set_yscale("log")
    row[0].legend(fontsize=8)
    found = {example: values(folder) for example, folder in folders.items()}
    lasts = [
        (
            median(final(v, "validation_loss")),
            short(e) + f", {e.depth} blocks" * (len(depths) > 1),
            f"{v['history'][-1]['epoch']}{failed_of(v['history'])}",
        )
        for e, v in found.items()
    ]
    titled(figure, "Median validation loss", [f"{loss:.2g} at {name}, epoch {epoch}" for loss, name, epoch in lasts])
    return figure


def regions(folders: Folders) -> Drawn:
    """Where the networks of the first member answer 0 and 1, on [-1.5, 1.5]^2, with the two spirals.

    Source: P3 (Reshniak & Webster), figure 6.
    """
    columns = 2 if len(folders) in (2, 4) else min(3, len(folders))
    figure, every = panels("", -(-len(folders) // columns), columns, width=3.7, height=3.7)
    side = np.linspace(-1.5, 1.5, 150)
    grid = torch.tensor(np.stack(np.meshgrid(side, side), 2).reshape(-1, 2))
    for axes, (example, folder) in zip(every, folders.items(), strict=False):
        accuracy = values(folder)["history"][-1]["validation_accuracy"][0]
        if accuracy is not None:  # a network that failed has no answers
            output = one(example, folder, 0)(grid).output.view(len(side), len(side))
            axes.contourf(side, side, (output > 0).double(), levels=[-1, 0.5, 2], colors=["#9ecae1", "#fdae6b"])
        x, y = (part[0] for part in example.data().validation)
        for kind in (0, 1):
            axes.plot(*x[y[:, 0] == kind].T, ".", ms=2, color=COLOURS[kind])
        said = "failed" if accuracy is None else f"{accuracy:.1%} right"
        axes.set(aspect="equal", xlabel="x1", ylabel="x2", title=f"{label(example)}\n{said}")
        axes.title.set_fontsize(9)
    for axes in every[len(folders) :]:
        axes.remove()
    figure.suptitle(f"Answers of the network with seed {next(iter(folders)).members[0].seed}", fontsize=12)
    return figure


def fits(folders: Folders) -> Drawn:
    """The damped sine and what the median member of each example makes of it.

    Source: P3 (Reshniak & Webster), figures 3 and 4.
    """
    figure, (axes,) = panels("", 1, 1, width=7.5, height=4.7)
    x = np.linspace(-1, 1, 1000)
    axes.plot(x, damped_sine(x), color="0.6", lw=4, label="target")
    errors = []
    for example, folder in folders.items():
        losses = values(folder)["history"][-1]["validation_loss"]
        fine = [loss for loss in losses if loss is not None]
        middle = losses.index(sorted(fine)[(len(fine) - 1) // 2])
        output = one(example, folder, middle)(torch.tensor(x)[:, None]).output[:, 0]
        axes.plot(x, output, label=label(example), **line_of(example))
        errors.append(f"{losses[middle]:.2g} at {short(example)}")
    axes.set(xlabel="x", ylabel="sin(2 pi x) exp(-x^2 / 2)")
    axes.legend(fontsize=8)
    titled(figure, "Mean squared error of the median network", errors)
    return figure


def robustness(folders: Folders) -> Drawn:
    """Accuracy of the spirals under noise, and how far the networks stretch small changes of the input.

    Source: P3 (Reshniak & Webster), the claim of robustness.
    """
    figure, (left, right) = panels("", 1, 2, width=4.5, height=4.7)
    lasts = []
    for place, (example, folder) in enumerate(folders.items()):
        found = values(folder)
        fine, measured = [why is None for why in found["failed"]], found["measured"]
        levels = sorted(measured["noise"], key=float)
        rows = np.array([measured["noise"][level] for level in levels])[:, fine]
        failed = failed_of(found["history"])
        sds = [float(level) for level in levels]
        left.plot(sds, rows.mean(1), label=label(example) + failed, **line_of(example) | {"markevery": 1})
        left.fill_between(sds, rows.min(1), rows.max(1), alpha=0.12, color=colour_of(example))
        largest = [row[2] for row, ok in zip(measured["jacobian"], fine, strict=True) if ok]
        right.plot([place] * len(largest), largest, "o", color=colour_of(example))
        lasts.append(f"{rows[-1].mean():.1%} at {short(example)}{failed}")
    right.set(yscale="log", ylabel="largest stretching of an input's change\n(95 % quantile over validation points)")
    plain_ticks(right)
    right.set_xticks(range(len(folders)), [fill(label(e), 11) for e in folders])
    right.tick_params(axis="x", labelsize=7)
    right.margins(x=0.2)
    left.set(xlabel="standard deviation of the noise", ylabel="accuracy on validation points")
    left.legend(fontsize=8)
    titled(figure, f"Mean accuracy with noise of standard deviation {levels[-1]}", lasts)
    return figure


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
    figure, (axes,) = panels("", 1, 1, width=7.5, height=4.7)
    for number, (name, solver) in enumerate(kinds.items()):
        found = [_residual(replace(solver, max_steps=k), example.step, branch, known, h) for k in range(1, steps)]
        evaluations, residuals = zip(*found, strict=True)
        line(axes, evaluations, residuals, label=name, number=number)
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
