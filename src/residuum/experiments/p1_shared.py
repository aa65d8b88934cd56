"""P1's figures of networks that share their upper blocks: naively, with unshared batch norm, and with parts of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from residuum.claims import Drawn, Results
from residuum.drawing import line, panels, plain_ticks, whole_axis
from residuum.experiments.p1_runs import NAMES, errors, growths, last_of
from residuum.experiments.seeds import Seeds, along, complete, done
from residuum.profiles import Profile
from residuum.runs import Finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK = "block (lines: changes of shape)"


def _finished(results: Results, tables: Mapping[str, Seeds]) -> dict[str, list[Finished]]:
    return {name: [results[run.key] for run in runs.values()] for name, runs in complete(results, tables).items()}


def changes(ax: "Axes", profile: Profile) -> None:
    """Lines where the shape changes."""
    ends = np.cumsum(profile.lengths)[:-1]
    for end in ends:
        ax.axvline(end + 0.5, color="0.6", linewidth=1)
    ax.set_xlabel(BLOCK)


def _mean(runs: Sequence[Finished], of_run: Callable[[Finished], Sequence[float | None]]) -> list[float]:
    """Mean over seeds of a curve; nan where a value is none."""
    return np.mean(np.array([of_run(run) for run in runs], dtype=float), axis=0).tolist()


def _row(name: str) -> Callable[[Finished], list[float | None]]:
    return lambda run: [row.get(name) for row in run.history]


def _initial(ax: "Axes", having: Mapping[str, Sequence[Finished]], quantity: str, words: str) -> None:
    """A quantity along the blocks at calibrated initialisation, for those networks that have the depth of 110."""
    for number, (name, runs) in enumerate(having.items()):
        if name == "38":
            continue
        values = _mean(runs, lambda run: along(run.profile("initial"), quantity))
        line(ax, range(1, len(values) + 1), values, label=NAMES[name], number=number, fresh=True)
    changes(ax, next(runs[0] for name, runs in having.items() if name != "38").profile("initial"))
    ax.set(ylabel=words, yscale="log", title="at initialisation")
    plain_ticks(ax)


def naive(results: Results, *, tables: Mapping[str, Seeds]) -> Drawn:
    """Losses, gradient ratios, and norms at initialisation, of naive sharing beside others.

    Source: P1 (Jastrzebski et al. 2018), figure 8.
    """
    having = _finished(results, tables)
    if not having:
        return None
    figure, (curves, ratios, norms, gradients) = panels("", 2, 2, width=6.0, height=3.8)
    said = {}
    for number, (name, runs) in enumerate(having.items()):
        color = {"number": number}
        train, test = _mean(runs, _row("train_loss")), _mean(runs, _row("test_loss"))
        epochs = range(1, len(train) + 1)
        line(curves, epochs, train, label=f"{NAMES[name]}, training", **color)
        line(curves, epochs, test, label=f"{NAMES[name]}, test", fresh=True, **color)
        if name == "naive":
            better = _mean(runs, _row("recalibrated_test_loss"))
            line(curves, epochs, better, label="the same, statistics re-estimated", number=6, fresh=True)
        ratio = _mean(runs, _row("train_gradient_ratio"))
        said[name] = 100 * float(np.mean(list(errors(results, done(results, tables[name])).values())))
        if not all(map(math.isnan, ratio)):
            line(ratios, epochs, ratio, label=NAMES[name], **color)
            line(ratios, epochs, _mean(runs, _row("test_gradient_ratio")), label="_", fresh=True, **color)
    curves.set(ylabel="loss, nats", yscale="log")
    ratios.set(ylabel="gradient, first / last section", yscale="log")
    if having.keys() - {"38"}:
        _initial(norms, having, "state_norm", "norm of the state |h|")
        _initial(gradients, having, "gradient_norm", "norm of the gradient |dL/dh|")
    else:
        norms.remove()
        gradients.remove()
    for ax in (curves, ratios):
        whole_axis(ax)
        plain_ticks(ax)
    curves.legend()  # in the other panels colours and marks are the same
    found = ", ".join(f"{NAMES[name]} {value:.1f} %" for name, value in said.items())
    figure.suptitle(f"Test errors: {found}", fontsize=12)
    return figure


def ablation(results: Results, *, tables: Mapping[str, Seeds]) -> Drawn:
    """Accuracies, and norms at initialisation, of UBN and of what is left of it without one part.

    Source: P1 (Jastrzebski et al. 2018), figure 9.
    """
    having = _finished(results, tables)
    if not having:
        return None
    figure, (curves, norms) = panels("", 1, 2, width=6.0, height=4.2)
    for number, (name, runs) in enumerate(having.items()):
        values = [100 * v for v in _mean(runs, _row("test_accuracy"))]
        line(curves, range(1, len(values) + 1), values, label=NAMES[name], number=number)
    curves.set(ylabel="test accuracy, %")
    whole_axis(curves)
    curves.legend()
    _initial(norms, having, "state_norm", "norm of the state |h|")
    grown = {name: float(np.mean([max(growths(run.profile("initial"))) for run in r])) for name, r in having.items()}
    said = ", ".join(f"{NAMES[name]} \u00d7 {value:.2g}" for name, value in grown.items())
    figure.suptitle(f"Largest growth of the state within a section at initialisation:\n{said}", fontsize=11)
    return figure


def shared(results: Results, *, tables: Mapping[str, Seeds]) -> Drawn:
    """Cosine and l2 ratio along the blocks, and accuracy along the last section, of networks that share and do not.

    Source: P1 (Jastrzebski et al. 2018), appendix.
    """
    having = _finished(results, {name: runs for name, runs in tables.items() if name != "38"})
    if not having:
        return None
    figure, axes = panels("", 1, 3, width=5.2, height=4.2)
    cosines, ratios, answers = axes
    said = []
    for number, (name, runs) in enumerate(having.items()):
        look = {"label": NAMES[name], "number": number}
        cosine = _mean(runs, lambda run: along(run.profile(), "gradient_cosine"))
        line(cosines, range(1, len(cosine) + 1), cosine, **look)
        ratio = _mean(runs, lambda run: along(run.profile(), "scaled_perturbation"))
        line(ratios, range(1, len(ratio) + 1), ratio, **look)
        right = _mean(runs, lambda run: along(run.profile(), "accuracy", last_of(run.profile())))
        line(answers, range(len(right)), [100 * value for value in right], **look)
        said.append(f"{NAMES[name]} {sum(value < 0 for value in cosine)} of {len(cosine)}")
    for ax, words in ((cosines, "cosine of update and gradient"), (ratios, "l2 ratio |f| / |h|")):
        changes(ax, next(iter(having.values()))[0].profile())
        ax.set_ylabel(words)
    cosines.axhline(0, color="0.4", linewidth=1)
    cosines.legend()
    ratios.set_ylim(bottom=0)
    whole_axis(answers, "blocks of the last section")
    answers.set(ylabel="test accuracy, %")
    figure.suptitle(f"Blocks that move the state against the gradient: {', '.join(said)}", fontsize=12)
    return figure
