"""P3's figures of its extended version: equations, penalties, moved spirals, digits under noise."""

from statistics import median

import numpy as np
import torch

from residuum.claims import Drawn, Results
from residuum.drawing import COLOURS, line, panels
from residuum.experiments.p3_panels import Folders, colour_of, label, one, titled, values
from residuum.experiments.p3_runs import BOUNDS, NETWORKS, Scale
from residuum.stability import amplification
from residuum.toys.problems import STIFF, orbit

# Weights of a penalty; a page has no other dashes than these.
LINES = ({"ls": "-"}, {"ls": "--"}, {"ls": ":"}, {"ls": "-."}, {"ls": "-", "marker": "."})


def penalties(folders: Folders) -> Drawn:
    """What a penalty on the divergence of the right-hand side costs: the solver's steps, and the loss, over epochs.

    The median of the members whose equations have all been solved so far; a cross where the last of them ends.

    Source: P3 (Reshniak & Webster), extended version, the logs of its regression.
    """
    figure, row = panels("", 1, 2, width=4.6, height=4.9)
    weights, lost = sorted({example.divergence for example in folders}), []
    for axes, (name, words) in zip(
        row, (("steps", "solver's steps per block"), ("train_loss", "training loss")), strict=True
    ):
        for example, folder in folders.items():
            history = values(folder)["history"]
            rows = [(r["epoch"], [v for v in r[name] if v is not None]) for r in history]
            epochs, found = zip(*[(epoch, median(alive)) for epoch, alive in rows if alive], strict=True)
            style = {"color": colour_of(example), **LINES[weights.index(example.divergence) % len(LINES)]}
            axes.plot(epochs, found, label=f"theta = {example.theta:g}, penalty {example.divergence:g}", **style)
            if len(found) < len(rows):
                axes.plot(epochs[-1:], found[-1:], "x", color=style["color"])
            failed = sum(value is None for value in history[-1][name])
            if name == "steps" and failed:
                what = f"theta = {example.theta:g}, penalty {example.divergence:g}"
                lost.append(f"{failed} of {len(example.members)} at {what}")
        axes.set(xlabel="epoch", ylabel=words)
    row[1].set_yscale("log")
    row[1].legend(fontsize=7, loc="lower left")
    titled(figure, "Trainings that end with an equation that is not solved", lost or ["none"])
    return figure


def shifts(folders: Folders) -> Drawn:
    """Accuracy of the spirals whose arms are 1 apart, by how far their points are moved.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, (axes,) = panels("", 1, 1, width=7.5, height=4.7)
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
        axes.fill_between(
            list(rows),
            *([pick(row) for row in rows.values()] for pick in (min, max)),
            color=COLOURS[number],
            alpha=0.12,
        )
        said.append(f"{np.mean(rows[0.33]):.1%} {name}")
    axes.axvline(0.5, color="0.6", lw=1)
    axes.set(xlabel="shift along the radius, outwards and inwards (grey: middle between the arms)", ylabel="accuracy")
    axes.legend(fontsize=8)
    titled(figure, "Right after a shift of 0.33", said)
    return figure


def phase_plane_of_prey(folders: Folders) -> Drawn:
    """Orbits of prey and predators that the networks have not been trained on, beside the exact ones.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, row = panels("", 1, len(folders), width=3.9, height=4.2)
    for axes, (example, folder) in zip(row, folders.items(), strict=True):
        x = example.data().validation.x[0]
        output = one(example, folder, 0)(x).output
        for number in range(0, len(x), 3):
            exact = orbit(x[number].numpy(), np.linspace(0, example.time, 400)[1:])
            axes.plot(*exact.T, color="0.75", lw=3, label=_once("exact", number))
            path = torch.cat([x[number : number + 1], output[number]])
            axes.plot(*path.T, ".-", ms=3, lw=0.8, color=colour_of(example), label=_once("network", number))
        loss = values(folder)["history"][-1]["validation_loss"][0]
        axes.set(xlabel="prey", ylabel="predators", title=f"{label(example)}\n{_error(loss)}")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=8)
    figure.suptitle(f"{next(iter(folders)).depth} steps on orbits between those of the training", fontsize=12)
    return figure


def stiffness(folders: Folders) -> Drawn:
    """The stiff equation: a solution that was not trained on, and the networks' after every step.

    Source: P3 (Reshniak & Webster), extended version.
    """
    figure, row = panels("", 1, len(folders), width=3.9, height=4.2)
    for axes, (example, folder) in zip(row, folders.items(), strict=True):
        x, y = (part[0] for part in example.data().validation)
        times, output = np.linspace(0, example.time, example.depth + 1), one(example, folder, 0)(x).output[..., 0]
        for number in range(0, len(x), 3):
            start = x[number, :1]
            axes.plot(times, torch.cat([start, y[number, :, 0]]), color="0.75", lw=3, label=_once("exact", number))
            path = torch.cat([start, output[number]])
            axes.plot(times, path, ".-", color=colour_of(example), label=_once("network", number))
        loss = values(folder)["history"][-1]["validation_loss"][0]
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


def noise(results: Results, *, to: Scale) -> Drawn:
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
    figure, row = panels("", 1, 2, width=4.5, height=4.7)
    for axes, (images, words) in zip(row, (("train", "training"), ("test", "test")), strict=True):
        for name, runs in there.items():
            means = {seed: [np.mean(draws) for draws in run[images].values()] for seed, run in runs.items()}
            sds = [float(sd) for sd in runs[common[0]][images]]
            color = {"plain": "black", "1Lip": "0.55"}.get(name) or COLOURS[list(NETWORKS).index(name) - 2]
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
    titled(figure, what, [f"{share:.1%} {name}" for name, share in right.items()])
    return figure
