"""What P0's claims are tested by: from finished runs to effects, and their thresholds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from residuum.claims import Obtained, Results, above, at_least, at_most, below, every
from residuum.effects import Effect, mean_over, over_examples, paired
from residuum.experiments.p0_runs import index_of, right_by_image
from residuum.experiments.seeds import Seeds, last
from residuum.runs import Run

# "Clearly away from the ideal": a tenth of the way to guessing, three times what 500 images leave uncertain.
AWAY = 0.1
NO_GAIN = 0.005  # "does not improve", "does not hurt": half a point of accuracy
ONE_SIDED = 0.90  # level of an interval whose ends are one-sided bounds of 95 %
# "Comparable training", and "has learned anything": one twentieth of the way from nothing learned to everything.
AS_LOW = LEARNED = 0.05
ROOM = 0.02  # above chance, for an accuracy to say anything: where the indices are undefined
FITTED = 0.5  # half of the way, ten times what training losses may differ by: else that would be all there is

Pair = tuple[Seeds, Seeds]  # what is compared with what: after, before


def away(results: Results, *, runs: Seeds, index: str) -> Obtained:
    """An index of networks that are not convergent, or not iterative: its mean over seeds away from the ideal."""
    effect = _index(results, runs, index)
    return at_least(effect, AWAY) if index == "divergence" else at_most(effect, 1 - AWAY)


def _index(results: Results, runs: Seeds, index: str) -> Effect:
    return mean_over(list(index_of(results, runs, index).values()))


def far(results: Results, *, runs: Seeds, indices: Sequence[str]) -> Obtained:
    """Several indices, each away from the ideal."""
    return every(away(results, runs=runs, index=index) for index in indices)


def near(results: Results, *, cells: Sequence[Seeds], indices: Sequence[str]) -> Obtained:
    """Several indices near the ideal, in each cell."""

    def judged(runs: Seeds, index: str) -> Obtained:
        effect = _index(results, runs, index)
        return at_most(effect, AWAY) if index == "divergence" else at_least(effect, 1 - AWAY)

    return every(judged(runs, index) for runs in cells for index in indices)


def index_rises(results: Results, *, pairs: Sequence[Pair], index: str) -> Obtained:
    """An index, of the same seeds, is larger in the first of each pair."""
    return _each(pairs, lambda pair: above(_index_change(results, pair, index), 0.0))


def index_falls(results: Results, *, pairs: Sequence[Pair], index: str) -> Obtained:
    """An index, of the same seeds, is smaller in the first of each pair."""
    return _each(pairs, lambda pair: below(_index_change(results, pair, index), 0.0))


def _each(pairs: Sequence[Pair], test: Callable[[Pair], Obtained]) -> Obtained:
    """All must hold. A pair that says nothing is inconclusive, so it cannot hide that another fails."""
    parts = []
    for pair in pairs:
        try:
            parts.append(test(pair))
        except ValueError as error:
            parts.append(Obtained(f"could not be computed: {error}", "inconclusive"))
    return every(parts)


def _index_change(results: Results, pair: Pair, index: str) -> Effect:
    return paired(*(index_of(results, runs, index) for runs in pair))


def no_gain(results: Results, *, pairs: Sequence[Pair]) -> Obtained:
    """One-sided bound of 95 % on the accuracy that the first of each pair has more."""
    return _each(pairs, lambda pair: _beside(results, pair, at_most(_gain(results, pair, ONE_SIDED), NO_GAIN)))


def gain(results: Results, *, pairs: Sequence[Pair]) -> Obtained:
    """The first of each pair is right more often."""
    return _each(pairs, lambda pair: _beside(results, pair, above(_gain(results, pair), 0.0)))


def _gain(results: Results, pair: Pair, level: float = 0.95) -> Effect:
    """Accuracy of the first less that of the second; where both guess, equal ones would say nothing."""
    if not has_learned(results, pair):
        best, loss = _best(results, pair)
        chance = guess_accuracy(next(iter(pair[0].values())))
        raise ValueError(
            f"neither has learned anything: {best:.1%} right where a guess has {chance:.1%}, training losses of "
            f"{loss:.3f} that of guessing, at best"
        )
    return paired(*(last(results, runs, "test_accuracy") for runs in pair), level=level)


def has_learned(results: Results, pair: Pair) -> bool:
    """Whether one of two networks has learned anything, by accuracy and by training loss, in the mean over seeds."""
    best, loss = _best(results, pair)
    return best >= guess_accuracy(next(iter(pair[0].values()))) + ROOM and loss <= 1 - LEARNED


def _best(results: Results, pair: Pair) -> tuple[float, float]:
    """The better accuracy, and the lower training loss by that of guessing, in the mean over seeds."""
    right = max(_mean(last(results, runs, "test_accuracy")) for runs in pair)
    return right, min(_mean(_share_of_guessing(results, runs)) for runs in pair)


def _mean(by_seed: Mapping[int, float]) -> float:
    return float(np.mean(list(by_seed.values())))


def _share_of_guessing(results: Results, runs: Seeds) -> dict[int, float]:
    """Training loss by that of knowing nothing but how frequent classes are, by seed."""
    return {seed: loss / guess_loss(runs[seed]) for seed, loss in last(results, runs, "train_loss").items()}


def _beside(results: Results, pair: Pair, found: Obtained) -> Obtained:
    """With the interval over test images, of these very networks, beside that over seeds."""
    common = [seed for seed in pair[0] if seed in pair[1]]
    if not all(pair[0][seed].probes for seed in common):
        return found
    columns = [np.mean(right_by_image(results, [runs[seed] for seed in common]), axis=0) for runs in pair]
    images = over_examples(np.stack(columns, 1), lambda means: float(means[0] - means[1]))
    return replace(found, value=f"{found.value}; of these networks {images}", effects=(*found.effects, images))


def rises_along(
    results: Results, *, cells: Sequence[Seeds], of: Callable[[Results, Seeds], dict[int, float]]
) -> Obtained:
    """Kendall's rank correlation of a number with the order of the cells, mean over the seeds that all have."""
    from scipy.stats import kendalltau

    tables = [of(results, runs) for runs in cells]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    found = [float(kendalltau(range(len(tables)), [table[seed] for table in tables]).statistic) for seed in common]
    if any(math.isnan(tau) for tau in found):
        raise ValueError("all values are equal, so there is no order among them")
    # Seeds that agree in every rank leave a student's interval of length 0; it says that they agree, which is all.
    return above(mean_over(found), 0.0)


def one_block(results: Results, *, cells: Sequence[Seeds]) -> Obtained:
    """Recurrence 1 and gap 0, both exactly: a section of equal blocks with one set of statistics is one block."""
    recurrence, gap = (
        [value for runs in cells for value in index_of(results, runs, name).values()]
        for name in ("recurrence", "drop_gap")
    )
    least, largest = min(recurrence), max(gap)
    found = f"least recurrence {least:.17g}, largest gap {largest:.17g}; must be {ONE_BLOCK}"
    return Obtained(found, "pass" if least == 1 and largest == 0 else "fail")


ONE_BLOCK = "least recurrence 1, largest gap 0"


def as_low(results: Results, *, pair: Pair) -> Obtained:
    """Training loss of the first less that of the second, by that of knowing nothing but how frequent classes are."""
    after, before = (_share_of_guessing(results, runs) for runs in pair)
    if _mean(before) > FITTED:
        raise ValueError(
            f"what it is compared with has not fitted its images: training loss {_mean(before):.3f} that of guessing"
        )
    return at_most(paired(after, before, level=ONE_SIDED), AS_LOW)


def guess_accuracy(run: Run) -> float:
    """Accuracy of a blind guess: of one class, or of all digits of an image.

    Args:
        run: Its network tells the number of classes, its data the number of digits in an image.
    """
    return 1 / (run.model.classes if run.data.clutter is None else math.comb(10, run.data.clutter.digits))


def guess_loss(run: Run) -> float:
    """Loss of an answer that gives every class its frequency; classes are equally frequent.

    Args:
        run: Its network tells the number of classes, its data the number of digits in an image.
    """
    if run.data.clutter is None:
        return math.log(run.model.classes)
    p = run.data.clutter.digits / 10
    return -p * math.log(p) - (1 - p) * math.log(1 - p)
