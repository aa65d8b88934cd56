"""The figures of P3's examples, from what `Example.execute` left in folders."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from residuum.experiments.p3 import Example
from residuum.experiments.p3_networks import Chain, Flow
from residuum.experiments.p3_problems import STIFF, damped_sine, orbit
from residuum.layers.steps import Theta
from residuum.solve import Anderson, GradientDescent, NewtonKrylov, Picard, Solver
from residuum.stability import amplification

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Folders = Mapping[Example, Path]
_COLOURS = {0.0: "C3", 0.5: "C0", 1.0: "C2"}
_FALLBACK = "C4"


def values(folder: Path) -> dict[str, Any]:
    """What an example's training and measures gave."""
    return json.loads((folder / "values.json").read_text(encoding="utf-8"))


def final(found: dict[str, Any], name: str) -> list[float]:
    """The last values of the history of the members that have not failed."""
    return [value for value in found["history"][-1][name] if value is not None]


def label(example: Example) -> str:
    """What tells an example from its neighbours in a figure."""
    what = f"theta = {example.theta:g}" + (" (residual network)" if example.theta == 0 else "")
    return what + (", truncated gradient" if example.param_grad == "truncated" else "")


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
    style = "--" if example.param_grad == "truncated" else "-"
    return {"color": _COLOURS.get(example.theta, _FALLBACK), "ls": style}


def convergence(folders: Folders) -> "Figure":
    """Validation loss over epochs: the median member and the range of all; accuracy, too, for spirals.

    Source: P3 (Reshniak & Webster), figures 3 to 5.
    """
    spirals = next(iter(folders)).problem == "spirals"
    figure, (panels,) = _panels(1, 2 if spirals else 1, 4.6)
    shown = [("validation_loss", "validation loss"), ("validation_accuracy", "validation accuracy")]
    for axes, (name, words) in zip(panels, shown, strict=False):
        for example, folder in folders.items():
            history = values(folder)["history"]
            rows = [(row["epoch"], [v for v in row[name] if v is not None]) for row in history]
            epochs, found = zip(*[row for row in rows if row[1]], strict=True)
            axes.plot(epochs, [median(v) for v in found], label=label(example), **_line(example))
            axes.fill_between(epochs, [min(v) for v in found], [max(v) for v in found], alpha=0.12, **_line(example))
        axes.set(xlabel="epoch", ylabel=words)
        if name == "validation_loss":
            axes.set_yscale("log")
    panels[0].legend(fontsize=8)
    found = {example: values(folder) for example, folder in folders.items()}
    lasts = [(median(final(v, "validation_loss")), _short(e), v["history"][-1]["epoch"]) for e, v in found.items()]
    _title(figure, "Median validation loss", [f"{loss:.2g} at {name}, epoch {epoch}" for loss, name, epoch in lasts])
    return figure


def regions(folders: Folders, *, member: int = 0) -> "Figure":
    """Where the networks of one member answer 0 and 1, on [-1.5, 1.5]^2, with the two spirals.

    Source: P3 (Reshniak & Webster), figure 6.
    """
    columns = 2 if len(folders) in (2, 4) else min(3, len(folders))
    figure, rows = _panels(-(-len(folders) // columns), columns, 3.6)
    every = [axes for row in rows for axes in row]
    side = np.linspace(-1.5, 1.5, 150)
    grid = torch.tensor(np.stack(np.meshgrid(side, side), 2).reshape(-1, 2))
    for axes, (example, folder) in zip(every, folders.items(), strict=False):
        output = one(example, folder, member)(grid).output.view(len(side), len(side))
        axes.contourf(side, side, (output > 0).double(), levels=[-1, 0.5, 2], colors=["#9ecae1", "#fdae6b"])
        x, y = (part[member] for part in example.data().validation)
        for kind, colour in ((0, "C0"), (1, "C1")):
            axes.plot(*x[y[:, 0] == kind].T, ".", ms=2, color=colour)
        accuracy = values(folder)["history"][-1]["validation_accuracy"][member]
        said = "failed" if accuracy is None else f"{accuracy:.1%} right"
        axes.set(aspect="equal", xlabel="x1", ylabel="x2", title=f"{label(example)}\n{said}")
        axes.title.set_fontsize(9)
    for axes in every[len(folders) :]:
        axes.remove()
    figure.suptitle(f"Answers of the network with seed {next(iter(folders)).members[member].seed}", fontsize=12)
    return figure


def fits(folders: Folders) -> "Figure":
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


def robustness(folders: Folders) -> "Figure":
    """Accuracy of the spirals under noise, and how far the networks stretch small changes of the input.

    Source: P3 (Reshniak & Webster), the claim of robustness.
    """
    figure, ((left, right),) = _panels(1, 2, 4.4)
    for example, folder in folders.items():
        found = values(folder)["measured"]
        levels = sorted(found["noise"], key=float)
        rows = np.array([found["noise"][level] for level in levels])
        sds = [float(level) for level in levels]
        left.plot(sds, rows.mean(1), marker="o", label=label(example), **_line(example))
        left.fill_between(sds, rows.min(1), rows.max(1), alpha=0.12, **_line(example))
    for place, (example, folder) in enumerate(folders.items()):
        largest = [row[2] for row in values(folder)["measured"]["jacobian"]]
        right.plot([place] * len(largest), largest, "o", color=_line(example)["color"])
    right.set(yscale="log", ylabel="largest stretching of an input's change\n(95 % quantile over validation points)")
    right.set_xticks(range(len(folders)), [label(e).replace(" (", "\n(").replace(", ", "\n") for e in folders])
    right.tick_params(axis="x", labelsize=8)
    right.margins(x=0.2)
    left.set(xlabel="standard deviation of the noise", ylabel="accuracy on validation points")
    left.legend(fontsize=8)
    noisy = [np.mean(values(folder)["measured"]["noise"][levels[-1]]) for folder in folders.values()]
    lasts = [f"{accuracy:.1%} at {_short(example)}" for example, accuracy in zip(folders, noisy, strict=True)]
    _title(figure, f"Mean accuracy with noise of standard deviation {levels[-1]}", lasts)
    return figure


def phase_plane(folders: Folders, *, member: int = 0) -> "Figure":
    """Orbits of prey and predators that the networks have not been trained on, beside the exact ones.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, (panels,) = _panels(1, len(folders), 3.9)
    for axes, (example, folder) in zip(panels, folders.items(), strict=True):
        x = example.data().validation.x[member]
        output = one(example, folder, member)(x).output
        for number in range(0, len(x), 3):
            exact = orbit(x[number].numpy(), np.linspace(0, example.time, 400)[1:])
            axes.plot(*exact.T, color="0.75", lw=3, label=_once("exact", number))
            path = torch.cat([x[number : number + 1], output[number]])
            axes.plot(*path.T, ".-", ms=3, lw=0.8, color=_line(example)["color"], label=_once("network", number))
        loss = values(folder)["history"][-1]["validation_loss"][member]
        axes.set(xlabel="prey", ylabel="predators", title=f"{label(example)}\nvalidation error {loss:.1e}")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    figure.suptitle(f"{next(iter(folders)).depth} steps on orbits between those of the training", fontsize=12)
    return figure


def stiffness(folders: Folders, *, member: int = 0) -> "Figure":
    """The stiff equation: a solution that was not trained on, and the networks' after every step.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, (panels,) = _panels(1, len(folders), 3.9)
    for axes, (example, folder) in zip(panels, folders.items(), strict=True):
        x, y = (part[member] for part in example.data().validation)
        times, output = np.linspace(0, example.time, example.depth + 1), one(example, folder, member)(x).output[..., 0]
        for number in range(0, len(x), 3):
            start = x[number, :1]
            axes.plot(times, torch.cat([start, y[number, :, 0]]), color="0.75", lw=3, label=_once("exact", number))
            path = torch.cat([start, output[number]])
            axes.plot(times, path, ".-", color=_line(example)["color"], label=_once("network", number))
        loss = values(folder)["history"][-1]["validation_loss"][member]
        shrink = abs(amplification(np.array([STIFF * example.step.dt]), theta=example.theta)[0])
        axes.set(xlabel="t", ylabel="y", title=f"{label(example)}, |R| = {shrink:.2f}\nvalidation error {loss:.1e}")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    every = next(iter(folders)).every
    figure.suptitle(
        f"y' = -20 (y - cos t), fitted after every {every} steps\nR is what a step multiplies errors by", fontsize=12
    )
    return figure


def _once(words: str, number: int) -> str:
    return "" if number else words


def solvers(example: Example, folder: Path, *, block: int = 12, steps: int = 30) -> "Figure":
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


def _panels(rows: int, columns: int, size: float) -> tuple["Figure", list[list["Axes"]]]:
    from matplotlib.figure import Figure

    wide = size * 1.5 if columns == 1 else size * columns
    figure = Figure(figsize=(max(wide, 7.5), size * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _title(figure: "Figure", what: str, numbers: Sequence[str]) -> None:
    lines = ["; ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    figure.suptitle("\n".join([f"{what}:", *lines]), fontsize=11)
