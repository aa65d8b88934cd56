"""P1's figures of blocks and Table 1, beside untrained networks where that means something; the list of all."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from residuum.claims import Drawn, Figure, Results
from residuum.drawing import COLOURS, MARKERS, line, panels, plain_ticks, shade, whole_axis
from residuum.experiments.p1_runs import (
    ABLATED,
    GRID,
    KINDS,
    LAST,
    NAMES,
    PRINTED,
    SCALES,
    SETS,
    TABLE,
    chosen_scale,
    errors,
    last_of,
    looked,
    of,
    shuffled_of,
    unrolled,
)
from residuum.experiments.p1_shared import ablation, changes, naive, shared
from residuum.experiments.seeds import Seeds, along, complete, complete_by_data, runs_in, spread
from residuum.probes import groups
from residuum.profiles import Profile
from residuum.runs import Finished, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROJECTIONS = "Blocks that change the shape are left out."
GROUPS = ("borderline", "correct", "all")
ANSWERS = ("accuracy", "loss", "entropy")
WORDS = {"accuracy": "accuracy, %", "loss": "cross-entropy, nats", "entropy": "entropy, nats"}


def figures(scale: str) -> tuple[Figure, ...]:
    """The figures of the study, in the poster's order."""
    kinds = {name: looked(scale, name) for name in KINDS}
    shuffled = {name: shuffled_of(scale, name) for name in KINDS}
    networks = runs_in(*kinds.values())
    sharing = {name: of(scale, name) for name in ("naive", "38", "110", "ubn")}
    ablated = {name: of(scale, name) for name in ("ubn", *ABLATED, "naive", "110")}
    shown = {data: (*TABLE, "naive") if data == "cifar10" else TABLE for data in SCALES[scale].data}
    table = {data: {name: of(scale, name, data=data) for name in rows} for data, rows in shown.items()}
    seed = "First seed."
    wide = "The wide network has 4, 5 and 5 blocks per section, as its count of parameters says, not 4."
    return (
        Figure(
            "p1-3",
            "P1, poster figure 3, paper figure 4",
            "Cosine of each block's update and the loss gradient at its input (back-propagated; the poster's eq. 1 "
            f"misprints the argument of the last block), for four networks. {seed} {PROJECTIONS} {wide}",
            (*networks, *shuffled.values()),
            partial(_cosines, kinds=kinds, shuffled=shuffled),
        ),
        Figure(
            "p1-4",
            "P1, poster figure 4, paper figure 3",
            f"Test accuracy without each block, not trained again. {seed} {PROJECTIONS} {wide}",
            networks,
            partial(_drops, kinds=kinds),
        ),
        Figure(
            "p1-5",
            "P1, poster figure 5, paper figure 2",
            f"l2 ratio |f| / |h| of each block. {seed} {PROJECTIONS} {wide}",
            networks,
            partial(_ratios, kinds=kinds),
        ),
        Figure(
            "p1-6",
            "P1, poster figure 6, paper figure 5",
            "Test accuracy of the final classifier on each state of the last section, over the epochs; light: before "
            f"its first block, dark: after its last. {seed}",
            networks,
            partial(_answers, kinds=kinds),
        ),
        Figure(
            "p1-borderline",
            "P1, paper figure 6",
            "Original network: accuracy, loss and entropy after each of the last five blocks, of borderline images "
            f"(top probabilities less than 10 points apart at the end), of those that end right, and of all. {seed}",
            runs_in(kinds["110"]),
            partial(_borderline, runs=kinds["110"]),
        ),
        Figure(
            "p1-7",
            "P1, poster figure 7, paper figure 7",
            "Original network, last block run 20 more times with its update scaled: groups at the scale that has the "
            f"lowest training loss (the paper's is not printed), and all scales. {seed}",
            runs_in(kinds["110"]),
            partial(_unrolling, runs=kinds["110"]),
        ),
        Figure(
            "p1-8",
            "P1, poster figure 8, paper figure 8",
            "Naively shared network beside ResNet-38, which has equally many parameters (the submission says 32): "
            "loss, gradient ratio between the first and the last section, and norms at calibrated initialisation. Mean "
            "over seeds.",
            runs_in(*sharing.values()),
            partial(naive, tables=sharing),
        ),
        Figure(
            "p1-shared",
            "P1, appendix",
            "Networks that share: cosine and l2 ratio of each block, test accuracy of the final classifier on each "
            f"state of the last section. Mean over seeds. {PROJECTIONS}",
            runs_in(*(runs for name, runs in sharing.items() if name != "38")),
            partial(shared, tables=sharing),
        ),
        Figure(
            "p1-ablation",
            "P1, paper figure 9",
            "UBN and what is left of it without one part: test accuracy over the epochs, and norm of the state at "
            "calibrated initialisation. Mean over seeds.",
            runs_in(*ablated.values()),
            partial(ablation, tables=ablated),
        ),
        Figure(
            "p1-table1",
            "P1, table 1",
            "Errors on training and test images; bars: standard deviation over seeds; stars: the paper, after 300 "
            "epochs at full width (its last rates, printed 1e-5 and 1.1e-5, are read as 1e-4 and 1e-5).",
            runs_in(*(runs for row in table.values() for runs in row.values())),
            partial(_table, tables=table),
        ),
    )


def _firsts(results: Results, kinds: Mapping[str, Seeds]) -> dict[str, Finished]:
    """The first complete run of each network that has one."""
    return {name: results[next(iter(runs.values())).key] for name, runs in complete(results, kinds).items()}


def _grid(title: str, kinds: Mapping[str, Finished]) -> tuple[object, list["Axes"]]:
    """A panel per network, with its name."""
    figure, axes = panels(title, (len(kinds) + 1) // 2, min(2, len(kinds)), width=5.6)
    for ax, name in zip(axes, kinds, strict=False):
        ax.set_title(KINDS[name])
    for ax in axes[len(kinds) :]:
        ax.remove()
    return figure, axes


def _blocks(ax: "Axes", profile: Profile, quantity: str, *, label: str, number: int, fresh: bool = False) -> None:
    """A quantity along all blocks of a network."""
    values = along(profile, quantity)
    line(ax, range(1, len(values) + 1), values, label=label, number=number, fresh=fresh)


def _cosines(results: Results, *, kinds: Mapping[str, Seeds], shuffled: Mapping[str, Run]) -> Drawn:
    having = _firsts(results, kinds)
    if not having:
        return None
    said = []
    for name, run in having.items():
        values = along(run.profile(), "gradient_cosine")
        said.append(f"{KINDS[name]} {sum(v < 0 for v in values)} of {len(values)}")
    figure, axes = _grid(f"Blocks that move the state against the gradient:\n{', '.join(said)}", having)
    for ax, (name, run) in zip(axes, having.items(), strict=False):
        for number, (split, label) in enumerate((("profile", "test"), ("train", "training"))):
            _blocks(ax, run.profile(split), "gradient_cosine", label=label, number=number)
        _blocks(ax, run.profile("initial"), "gradient_cosine", label="untrained, test", number=6, fresh=True)
        other = shuffled[name]
        if other.key in results:
            found = results[other.key].profile()
            _blocks(ax, found, "gradient_cosine", label="shuffled labels, test", number=3, fresh=True)
        ax.axhline(0, color="0.4", linewidth=1)
        changes(ax, run.profile())
        ax.set_ylabel("cosine of update and gradient")
    axes[0].legend()
    return figure


def _drops(results: Results, *, kinds: Mapping[str, Seeds]) -> Drawn:
    having = _firsts(results, kinds)
    if not having:
        return None
    said = []
    for name, run in having.items():
        values, all_of_it = along(run.profile(), "drop_accuracy"), along(run.profile(), "intact_accuracy")[-1]
        worst = min(range(len(values)), key=values.__getitem__)
        said.append(f"{KINDS[name]} {100 * (all_of_it - values[worst]):.0f} (block {worst + 1})")
    figure, axes = _grid(f"Points of accuracy lost without the most needed block:\n{', '.join(said)}", having)
    for ax, (_, run) in zip(axes, having.items(), strict=False):
        profile = run.profile()
        values = [100 * v for v in along(profile, "drop_accuracy")]
        line(ax, range(1, len(values) + 1), values, label="without the block", number=0)
        ax.axhline(100 * along(profile, "intact_accuracy")[-1], color="0.3", linewidth=1, label="all blocks")
        ax.axhline(100 * along(profile, "chance")[-1], color="0.6", linewidth=1, linestyle=":", label="chance")
        changes(ax, profile)
        ax.set_ylabel("test accuracy, %")
        ax.set_ylim(bottom=0)
    axes[0].legend()
    return figure


def _ratios(results: Results, *, kinds: Mapping[str, Seeds]) -> Drawn:
    having = _firsts(results, kinds)
    if not having:
        return None
    firsts = {name: along(run.profile(), "scaled_perturbation")[0] for name, run in having.items()}
    said = ", ".join(f"{KINDS[name]} {value:.2g}" for name, value in firsts.items())
    figure, axes = _grid(f"l2 ratio of the first block: {said}", having)
    for ax, (_, run) in zip(axes, having.items(), strict=False):
        for number, (split, label) in enumerate((("profile", "test"), ("train", "training"))):
            _blocks(ax, run.profile(split), "scaled_perturbation", label=label, number=number)
        _blocks(ax, run.profile("initial"), "scaled_perturbation", label="untrained, test", number=6, fresh=True)
        changes(ax, run.profile())
        ax.set_ylabel("l2 ratio |f| / |h|")
        ax.set_ylim(bottom=0)
    axes[0].legend()
    return figure


def _answers(results: Results, *, kinds: Mapping[str, Seeds]) -> Drawn:
    having = _firsts(results, kinds)
    if not having:
        return None
    said, series = [], {}
    for name, run in having.items():
        rows = [list(row["curves"]["accuracy"].values())[-1] for row in run.history]
        series[name] = np.array(rows, dtype=float)  # epoch, state
        said.append(f"{KINDS[name]} {100 * rows[-1][0]:.0f} to {100 * rows[-1][-1]:.0f} %")
    figure, axes = _grid(f"Accuracy along the last section after training:\n{', '.join(said)}", having)
    for ax, rows in zip(axes, series.values(), strict=False):
        states = rows.shape[1]
        for state in range(states):
            ends = {0: "before its blocks", states - 1: f"after all {states - 1}"}
            color = shade(state / (states - 1))
            epochs = range(1, len(rows) + 1)
            ax.plot(epochs, 100 * rows[:, state], color=color, marker=".", label=ends.get(state, "_"))
        ax.set_ylabel("test accuracy, %")
        whole_axis(ax)
        ax.legend()
    return figure


def _borderline(results: Results, *, runs: Seeds) -> Drawn:
    having = _firsts(results, {"110": runs})
    if not having:
        return None
    run = having["110"]
    figure, axes = panels("", 2, 3, width=4.6)
    said = ""
    for row, (split, words) in enumerate((("profile", "test"), ("train", "training"))):
        profile = run.profile(split)
        parts = {name: part for name, part in groups(profile).items() if len(part.examples)}
        for column, quantity in enumerate(ANSWERS):
            ax = axes[3 * row + column]
            for number, name in enumerate(name for name in GROUPS if name in parts):
                values = along(parts[name], quantity, last_of(profile))[-LAST - 1 :]
                values = [100 * v for v in values] if quantity == "accuracy" else values
                label = f"{name}, {len(parts[name].examples)} images"
                line(ax, range(1 - len(values), 1), values, label=label, number=number)
                if (row, column, name) == (0, 0, "borderline"):
                    said = f"Borderline test images: {values[0]:.0f} to {values[-1]:.0f} % right over the last blocks"
            ax.set(xlabel="blocks before the end", ylabel=WORDS[quantity], title=words)
        axes[3 * row].legend()
    figure.suptitle(said or "There are no borderline test images", fontsize=12)
    return figure


def _unrolling(results: Results, *, runs: Seeds) -> Drawn:
    having = _firsts(results, {"110": runs})
    if not having:
        return None
    run = having["110"]
    scale = chosen_scale(run)
    figure, axes = panels("", 3, 3, width=4.6)
    for row, (split, words) in enumerate((("profile", "test"), ("train", "training"))):
        parts = {name: part for name, part in groups(run.profile(split)).items() if len(part.examples)}
        for column, quantity in enumerate(ANSWERS):
            ax = axes[3 * row + column]
            for number, name in enumerate(name for name in GROUPS if name in parts):
                values = along(parts[name], unrolled(scale, quantity))
                values = [100 * v for v in values] if quantity == "accuracy" else values
                line(ax, range(len(values)), values, label=f"{name}, {len(parts[name].examples)}", number=number)
            ax.set(xlabel="extra runs", ylabel=WORDS[quantity], title=f"{words}, scale {scale:g}")
        axes[3 * row].legend()
    last = (("plugin_gradient_cosine", "cosine"), ("scaled_perturbation", "l2 ratio"), ("loss", WORDS["loss"]))
    for ax, (quantity, words) in zip(axes[6:], last, strict=True):
        for number, other in enumerate(GRID):
            values = along(run.profile(), unrolled(other, quantity))
            start = 0 if quantity == "loss" else 1
            line(ax, range(start, start + len(values)), values, label=f"scale {other:g}", number=number)
        ax.set(xlabel="extra runs", ylabel=words, title="all test images")
        if quantity != "plugin_gradient_cosine":
            ax.set_yscale("log")
            plain_ticks(ax)
    axes[6].legend()
    losses = [along(run.profile(split), unrolled(scale, "loss")) for split in ("train", "profile")]
    said = ", ".join(f"{n} loss {v[0]:.3g} to {v[-1]:.3g}" for n, v in zip(("training", "test"), losses, strict=True))
    figure.suptitle(f"20 more runs of the last block at scale {scale:g}: {said}", fontsize=12)
    return figure


def _table(results: Results, *, tables: Mapping[str, Mapping[str, Seeds]]) -> Drawn:
    rows = complete_by_data(results, tables)
    if not rows:
        return None
    figure, axes = panels("", 1, len(rows), width=6.4, height=4.4)
    said = []
    for ax, (data, row) in zip(axes, rows.items(), strict=True):
        for number, split in enumerate(("train", "test")):
            values = [[100 * e for e in errors(results, runs, split=split).values()] for runs in row.values()]
            means = [float(np.mean(v)) for v in values]
            places = [i + 0.12 * number for i in range(len(row))]
            label = {"train": "training", "test": "test"}[split]
            look = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "none", "capsize": 2}
            ax.errorbar(places, means, yerr=[spread(v) for v in values], label=label, **look)
            known = [(i, PRINTED[data][name][number]) for i, name in enumerate(row) if name in PRINTED[data]]
            stars = {"marker": "*", "linestyle": "none", "markersize": 9, "color": "0.35", "alpha": 0.9 - 0.4 * number}
            ax.plot(*zip(*known, strict=True), label=f"the paper, {label}", **stars) if known else None
            if split == "test":
                best = min(range(len(row)), key=means.__getitem__)
                said.append(f"{SETS[data]} {NAMES[list(row)[best]]} with {means[best]:.1f} %")
        ax.set_xticks(range(len(row)), [NAMES[name] for name in row], rotation=25, ha="right")
        ax.set(ylabel="error, %", xlabel="network", title=SETS[data])
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.suptitle(f"Fewest test errors: {', '.join(said)}", fontsize=12)
    return figure
