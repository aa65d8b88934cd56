"""What P1's claims are tested by: from finished runs to effects, and their thresholds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from residuum.claims import Obtained, Results, above, at_least, at_most, below, between, equals, every
from residuum.effects import Effect, mean_over, over_examples, paired
from residuum.experiments.p1_runs import (
    GRID,
    LAST,
    chosen_scale,
    columns,
    errors,
    growths,
    last_of,
    unrolled,
)
from residuum.experiments.seeds import Seeds, along, last
from residuum.models import ResNet, ResNetConfig, count_parameters
from residuum.probes import groups
from residuum.profiles import Profile
from residuum.runs import Finished, Run

ALMOST_ALL = 0.9  # "(almost) every block": nine of ten
LAST_COSINE = (-0.2, -0.05)  # "about -0.1": half to twice
STRONG = 1.0  # an update as long as the state; the paper's is "up to twice the norm"
MUCH_MILDER = 0.5
MONOTONE = 0.8  # rank correlation: one pair of ten in the wrong order
CATASTROPHIC = 0.5  # of the accuracy above chance less than half is left
MILD = 0.9  # of it more than nine tenths are left
GRADUAL = 0.5  # no block brings more than half of what all bring
FEW = 10  # a group of fewer images has no interval worth the name
EXPLODES, NO_MORE = 2.0, 1.1  # twice the unshared network's; no more than that, to a tenth
TENFOLD = 10.0  # "activations explode" within 20 steps
MUCH_LARGER = 2.0
RECOVERED = 0.5
SAME = 0.01  # one point of accuracy
TOLERANCE = {"cifar10": 0.5, "cifar100": 1.0}  # points of error, about what four runs differ by
FACTOR_TWO = (0.5, 2.0)
POINTS = 0.1  # of 51 images one and a half standard deviations
GAIN = (0.0, 0.8)  # "about 0.3 %" in points: above 0, less than what two tables of four runs may differ by

Statistic = Callable[[np.ndarray], float]
Table = Callable[[Finished], Tensor]  # a row per image


def has_parameters(results: Results, *, network: ResNetConfig, statistics: bool, expected: int) -> Obtained:
    """The number of parameters; with batch-norm statistics as P1's totals, or only those that are trained."""
    return equals(_count(network, statistics), expected)


@cache
def _count(network: ResNetConfig, statistics: bool) -> int:
    return count_parameters(ResNet(network), statistics=statistics)


def _effect(results: Results, runs: Seeds, table: Table, statistic: Statistic) -> Effect:
    """A statistic of means over images: its mean over seeds; of one seed with the interval over images."""
    tables = [table(results[run.key]).numpy() for run in runs.values()]
    if len(tables) == 1:
        return over_examples(tables[0], statistic)
    return mean_over([statistic(np.nanmean(values, axis=0)) for values in tables])


def _of(quantity: str, section: int | None = None) -> Table:
    return lambda run: columns(run.profile(), quantity, section)


def _per_image(run: Finished, network: str = "profile") -> Tensor:
    """Cosine of each image, mean over blocks, as one column."""
    return columns(run.profile(network), "gradient_cosine").nanmean(1, keepdim=True)


def cosine_negative(results: Results, *, runs: Seeds) -> Obtained:
    """Share of the blocks whose mean cosine is negative."""
    return at_least(_effect(results, runs, _of("gradient_cosine"), lambda means: float((means < 0).mean())), ALMOST_ALL)


def cosine_higher(results: Results, *, runs: Seeds) -> Obtained:
    """Mean cosine of the last third of all blocks less that of the first third."""

    def difference(means: np.ndarray) -> float:
        third = max(1, len(means) // 3)
        return float(means[-third:].mean() - means[:third].mean())

    return below(_effect(results, runs, _of("gradient_cosine"), difference), 0.0)


def cosine_last(results: Results, *, runs: Seeds) -> Obtained:
    """Mean cosine of the last block."""
    return between(_effect(results, runs, _of("gradient_cosine"), lambda means: float(means[-1])), *LAST_COSINE)


def cosine_beside_initial(results: Results, *, runs: Seeds) -> Obtained:
    """Mean cosine of all blocks after training less that at calibrated initialisation, of the same images."""

    def both(run: Finished) -> Tensor:
        return torch.cat([_per_image(run), _per_image(run, "initial")], 1)

    return below(_effect(results, runs, both, lambda means: float(means[0] - means[1])), 0.0)


def cosine_beside(results: Results, *, pairs: Sequence[tuple[Run, Run]]) -> Obtained:
    """Mean cosine of all blocks of the first network less that of the second, on the same images, for each pair."""
    parts = []
    for pair in pairs:
        both = torch.cat([_per_image(results[run.key]) for run in pair], 1)
        parts.append(below(over_examples(both.numpy(), lambda means: float(means[0] - means[1])), 0.0))
    return every(parts)


def first_strong(results: Results, *, runs: Seeds) -> Obtained:
    """l2 ratio of the first block."""
    return at_least(_effect(results, runs, _of("scaled_perturbation"), lambda means: float(means[0])), STRONG)


def ratio_falls(results: Results, *, runs: Seeds) -> Obtained:
    """Kendall's rank correlation of the l2 ratio with the block, in the first section."""
    return at_most(_effect(results, runs, _of("scaled_perturbation", section=0), _rank), -MONOTONE)


def first_milder(results: Results, *, pairs: Sequence[tuple[Run, Run]]) -> Obtained:
    """l2 ratio of the first block of the first network by that of the second, for each pair."""
    parts = []
    for pair in pairs:
        both = torch.cat([columns(results[run.key].profile(), "scaled_perturbation")[:, :1] for run in pair], 1)
        parts.append(at_most(over_examples(both.numpy(), lambda means: float(means[0] / means[1])), MUCH_MILDER))
    return every(parts)


def _rank(means: np.ndarray) -> float:
    """Kendall's rank correlation with the place: pairs that rise less pairs that fall, by all pairs."""
    i, j = np.triu_indices(len(means), 1)
    return float(np.sign(means[j] - means[i]).mean())


def _kept(results: Results, runs: Seeds, pick: Callable[[np.ndarray], float]) -> Effect:
    """A number read off the parts of the accuracy above chance that are left without each block."""
    chance = along(results[next(iter(runs.values())).key].profile(), "chance")[-1]

    def table(run: Finished) -> Tensor:
        profile = run.profile()
        return torch.cat([columns(profile, "drop_accuracy"), columns(profile, "intact_accuracy")], 1)

    def of(means: np.ndarray) -> float:
        over = float(means[-1]) - chance
        return pick((means[:-1] - chance) / over) if over > 0 else math.nan

    return _effect(results, runs, table, of)


def first_needed(results: Results, *, runs: Seeds) -> Obtained:
    """What is left of the accuracy above chance without the first block."""
    return at_most(_kept(results, runs, lambda kept: float(kept[0])), CATASTROPHIC)


def others_mild(results: Results, *, runs: Seeds) -> Obtained:
    """What is left of it without a typical (median) block after the first."""
    return at_least(_kept(results, runs, lambda kept: float(np.median(kept[1:]))), MILD)


def each_mild(results: Results, *, runs: Seeds, first: int) -> Obtained:
    """What is left of it without the block that is missed most, from so many blocks after the start on."""
    return at_least(_kept(results, runs, lambda kept: float(kept[first:].min())), MILD)


def none_needed(results: Results, *, runs: Seeds) -> Obtained:
    """What is left of it without the block that is missed most."""
    return at_least(_kept(results, runs, lambda kept: float(kept.min())), CATASTROPHIC)


def _last_section(quantity: str, *, split: str = "profile") -> Table:
    return lambda run: columns(run.profile(split), quantity, last_of(run.profile(split)))


def answers_rise(results: Results, *, runs: Seeds) -> Obtained:
    """Kendall's rank correlation of the accuracy with the state, in the last section."""
    return at_least(_effect(results, runs, _last_section("accuracy"), _rank), MONOTONE)


def answers_gradual(results: Results, *, runs: Seeds) -> Obtained:
    """The largest gain of one block of the last section by that of all its blocks."""

    def largest(means: np.ndarray) -> float:
        total = float(means[-1] - means[0])
        return float(np.diff(means).max()) / total if total > 0 else 1.0

    return at_most(_effect(results, runs, _last_section("accuracy"), largest), GRADUAL)


def _in_group(profile: Profile, group: str) -> Profile:
    found = groups(profile)[group]
    if len(found.examples) < FEW:
        raise ValueError(f"only {len(found.examples)} {group} images")
    return found


def _over_last(results: Results, runs: Seeds, quantity: str, group: str) -> Effect:
    """Change of a quantity of a group of test images over the last blocks."""

    def table(run: Finished) -> Tensor:
        found = _in_group(run.profile(), group)
        return columns(found, quantity, last_of(found))[:, -LAST - 1 :]

    return _effect(results, runs, table, lambda means: float(means[-1] - means[0]))


def borderline_corrected(results: Results, *, runs: Seeds) -> Obtained:
    """Gain of accuracy of borderline test images over the last blocks."""
    return above(_over_last(results, runs, "accuracy", "borderline"), 0.0)


def correct_worsen(results: Results, *, runs: Seeds) -> Obtained:
    """Rise of the loss of correct test images over the last blocks."""
    return above(_over_last(results, runs, "loss", "correct"), 0.0)


def entropy_falls(results: Results, *, runs: Seeds) -> Obtained:
    """Change of the entropy of each group over the last blocks."""
    return every(below(_over_last(results, runs, "entropy", group), 0.0) for group in ("borderline", "correct", "all"))


def loss_falls_each(results: Results, *, runs: Seeds) -> Obtained:
    """Change of the training loss by that of the last blocks which lowers it least."""
    table = _last_section("loss", split="train")
    return below(_effect(results, runs, table, lambda means: float(np.diff(means[-LAST - 1 :]).max())), 0.0)


def loss_rises_last(results: Results, *, runs: Seeds) -> Obtained:
    """Change of the test loss by the last block."""
    return above(_effect(results, runs, _last_section("loss"), lambda means: float(means[-1] - means[-2])), 0.0)


def borderline_count(results: Results, *, runs: Seeds, expected: int) -> Obtained:
    """How many test images are borderline, within a factor of two."""
    counts = [len(groups(results[run.key].profile())["borderline"].examples) for run in runs.values()]
    return between(mean_over(counts), *(factor * expected for factor in FACTOR_TWO))


def borderline_right(results: Results, *, runs: Seeds, step: int, expected: float) -> Obtained:
    """Share of borderline test images that are right before (0) or after (-1) the extra runs at the chosen scale."""

    def table(run: Finished) -> Tensor:
        found = _in_group(run.profile(), "borderline")
        return columns(found, unrolled(chosen_scale(run), "accuracy"))[:, [step]]

    effect = _effect(results, runs, table, lambda means: float(means[0]))
    return between(effect, expected - POINTS, expected + POINTS)


def train_loss_is(results: Results, *, runs: Seeds, step: int, expected: float) -> Obtained:
    """Training loss before (0) or after (-1) the extra runs of the last block at the chosen scale, to a factor of 2."""
    values = [
        along(results[run.key].profile("train"), unrolled(chosen_scale(results[run.key]), "loss"))[step]
        for run in runs.values()
    ]
    return between(mean_over(values), *(factor * expected for factor in FACTOR_TWO))


def _unrolled_change(results: Results, runs: Seeds, quantity: str, *, split: str, group: str = "all") -> Effect:
    """Change of a quantity over all extra runs of the last block at the scale that suits the training images."""

    def table(run: Finished) -> Tensor:
        profile = run.profile(split)
        found = profile if group == "all" else _in_group(profile, group)
        return columns(found, unrolled(chosen_scale(run), quantity))[:, [0, -1]]

    return _effect(results, runs, table, lambda means: float(means[1] - means[0]))


def unrolled_falls(results: Results, *, runs: Seeds) -> Obtained:
    """Training loss."""
    return below(_unrolled_change(results, runs, "loss", split="train"), 0.0)


def unrolled_rises(results: Results, *, runs: Seeds) -> Obtained:
    """Test loss."""
    return above(_unrolled_change(results, runs, "loss", split="profile"), 0.0)


def unrolled_gains(results: Results, *, runs: Seeds, group: str) -> Obtained:
    """Accuracy of a group of test images."""
    return above(_unrolled_change(results, runs, "accuracy", split="profile", group=group), 0.0)


def unrolled_descends(results: Results, *, runs: Seeds, naive: bool) -> Obtained:
    """Largest cosine of the extra runs: of the first two without scaling, of all at the chosen scale."""

    def table(run: Finished) -> Tensor:
        return columns(run.profile(), unrolled(GRID[0] if naive else chosen_scale(run), "plugin_gradient_cosine"))

    return below(_effect(results, runs, table, lambda means: float(means[: 2 if naive else None].max())), 0.0)


def explodes(results: Results, *, runs: Seeds) -> Obtained:
    """Norm of the state after 19 naive extra runs by that before the first; what is not finite counts as a million."""

    def table(run: Finished) -> Tensor:
        norms = columns(run.profile(), unrolled(GRID[0], "state_norm"))
        return (norms[:, -1:] / norms[:, :1]).nan_to_num(1e6, 1e6)

    return at_least(_effect(results, runs, table, lambda means: float(means[0])), TENFOLD)


def worse(results: Results, *, after: Seeds, before: Seeds, split: str = "test") -> Obtained:
    """Error of the first more than of the second, of the same seeds."""
    return above(paired(errors(results, after, split=split), errors(results, before, split=split)), 0.0)


def better(results: Results, *, after: Seeds, before: Seeds) -> Obtained:
    """Test error of the first less that of the second, of the same seeds."""
    return below(paired(errors(results, after), errors(results, before)), 0.0)


def gains(results: Results, *, after: Seeds, before: Seeds) -> Obtained:
    """Points of test error that the second has more than the first, of the same seeds."""
    more, less = ({seed: 100 * e for seed, e in errors(results, runs).items()} for runs in (before, after))
    return between(paired(more, less), *GAIN)


def grows_more(results: Results, *, after: Seeds, before: Seeds) -> Obtained:
    """Growth of the state at calibrated initialisation, of the first by that of the second."""
    return above(_beside_unshared(results, after, before, _growth), 1.0)


def most_needed(results: Results, *, without: Seeds, others: Sequence[Seeds]) -> Obtained:
    """Test error without one ingredient more than without each other."""
    return every(worse(results, after=without, before=other) for other in others)


def fits_worse(results: Results, *, after: Seeds, before: Seeds) -> Obtained:
    """Training loss in training mode, mean over the last epoch, of the first more than of the second."""
    return above(paired(last(results, after, "train_loss"), last(results, before, "train_loss")), 0.0)


def wider_gap(results: Results, *, after: Seeds, before: Seeds, recalibrated: bool) -> Obtained:
    """Test loss less training loss (in training mode), of the first more than of the second."""
    name = "recalibrated_test_loss" if recalibrated else "test_loss"
    gaps = []
    for runs in (after, before):
        tests, trains = (last(results, runs, n) for n in (name, "train_loss"))
        gaps.append({seed: tests[seed] - trains[seed] for seed in runs})
    return above(paired(*gaps), 0.0)


def recovers(results: Results, *, runs: Seeds, unshared: Seeds) -> Obtained:
    """Part of the test accuracy that sharing has cost which re-estimated statistics win back, mean over seeds."""
    wrong, right, best = errors(results, runs), errors(results, runs, recalibrated=True), errors(results, unshared)
    common = [seed for seed in runs if seed in best]
    if any(wrong[seed] <= best[seed] for seed in common):
        raise ValueError("for some seed sharing has cost nothing")
    parts = [(wrong[seed] - right[seed]) / (wrong[seed] - best[seed]) for seed in common]
    return at_least(mean_over(parts), RECOVERED)


def needs_no_repair(results: Results, *, runs: Seeds) -> Obtained:
    """What re-estimated statistics change in the test error."""
    return between(paired(errors(results, runs, recalibrated=True), errors(results, runs)), -SAME, SAME)


def _beside_unshared(results: Results, runs: Seeds, unshared: Seeds, of: Callable[[Finished], float]) -> Effect:
    """Mean over seeds of a number of the first by that of the second."""
    common = [seed for seed in runs if seed in unshared]
    return mean_over([of(results[runs[seed].key]) / of(results[unshared[seed].key]) for seed in common])


def _growth(run: Finished) -> float:
    return max(growths(run.profile("initial")))


def _gradients(run: Finished) -> float:
    return along(run.profile("initial"), "gradient_ratio")[0]


INITIAL = {"activations": _growth, "gradients": _gradients}


def initial_explodes(results: Results, *, runs: Seeds, unshared: Seeds, what: str) -> Obtained:
    """Growth at calibrated initialisation by that of the unshared network of the same depth."""
    return at_least(_beside_unshared(results, runs, unshared, INITIAL[what]), EXPLODES)


def initial_calm(results: Results, *, runs: Seeds, naive: Seeds, unshared: Seeds, what: str) -> Obtained:
    """The same; no more than in the unshared network, where naive sharing explodes: else nothing is removed."""
    explosion = initial_explodes(results, runs=naive, unshared=unshared, what=what)
    if explosion.verdict != "pass":
        raise ValueError(f"naive sharing, which is to be remedied, is not shown to explode: {explosion.value}")
    found = at_most(_beside_unshared(results, runs, unshared, INITIAL[what]), NO_MORE)
    return replace(found, value=f"{found.value}; naive {explosion.value}")


def ratio_larger(results: Results, *, runs: Seeds, before: Seeds, split: str = "train") -> Obtained:
    """Gradient ratio on training (or test) images, mean over epochs, by that of the other network."""

    def mean(run: Finished) -> float:
        values = [row[f"{split}_gradient_ratio"] for row in run.history]
        if None in values:
            raise ValueError(f"the gradient ratio of seed {run.job.seed} is not finite in some epoch")
        return sum(values) / len(values)

    return at_least(_beside_unshared(results, runs, before, mean), MUCH_LARGER)


def table_entry(results: Results, *, runs: Seeds, data: str, split: str, expected: float) -> Obtained:
    """Per cent of errors, within the tolerance."""
    effect = mean_over([100 * error for error in errors(results, runs, split=split).values()])
    return between(effect, expected - TOLERANCE[data], expected + TOLERANCE[data])
