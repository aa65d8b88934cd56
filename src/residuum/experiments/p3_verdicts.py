"""The rules by which P3's claims are judged."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from residuum.claims import Obtained, Results, above, at_least, at_most, below, between, equals, every
from residuum.effects import mean_over, paired
from residuum.experiments.p3_runs import (
    Grid,
    accuracy_under,
    depth_needed,
    final,
    last_in_common,
    logs,
    parameters,
    quantile,
    stable_rate,
)
from residuum.toys.digits import NoisyDigits
from residuum.toys.examples import Example

LIKE = math.log10(3)  # three seeds of the independent implementation differ by a factor of 2.4 among themselves
CHANCE = 0.75  # half way from chance to all right; untrained blocks gave 0.56 to 0.66
WELL = 0.99
LEARNED, LOST = 0.9, 0.65  # right of spirals as they are, and moved half way to each other: 0.56 to 0.58 in the paper
NEARLY = 0.999  # one image of the thousand
TENFOLD = 1.0  # a decimal logarithm


def lower(results: Results, *, of: Example, than: Example, name: str = "validation_loss", by: float = 0.0) -> Obtained:
    """A loss is lower, by so many powers of ten, in pairs of equal seeds."""
    effect = paired(logs(final(results, than, name)), logs(final(results, of, name)))
    return _worded("log10 of the ratio", at_least(effect, by) if by else above(effect, 0.0))


def median_lower(results: Results, *, of: Example, than: Example) -> Obtained:
    """The validation loss is ten times lower in the median of the seeds' ratios, whatever their scatter."""
    one, other = (final(results, example, "validation_loss") for example in (of, than))
    found = float(np.median([other[seed] / one[seed] for seed in one]))
    return Obtained(f"median of the ratios {found:.3g}; must be at least 10", "pass" if found >= 10 else "fail")


def both_lower(results: Results, *, of: Example, than: Example) -> Obtained:
    """Training and validation loss are lower."""
    names = ("train_loss", "validation_loss")
    return every(lower(results, of=of, than=than, name=name) for name in names)


def in_every_seed(results: Results, *, of: Example, than: Example) -> Obtained:
    """Training and validation loss are lower in every seed."""
    count = 0
    for seed in of.seeds:
        count += all(
            final(results, of, n)[seed] < final(results, than, n)[seed] for n in ("train_loss", "validation_loss")
        )
    return equals(f"{count} of {len(of.seeds)} seeds", f"{len(of.seeds)} of {len(of.seeds)} seeds")


def like(results: Results, *, of: Example, losses: Sequence[float]) -> Obtained:
    """The validation loss is within a factor of 3 of the geometric mean of known ones."""
    known = float(np.mean([math.log10(loss) for loss in losses]))
    effect = mean_over([value - known for value in logs(final(results, of, "validation_loss")).values()])
    return _worded("log10 of ours / theirs", between(effect, -LIKE, LIKE))


def perfect(results: Results, *, of: Example) -> Obtained:
    """All validation points are right in every seed."""
    found = final(results, of, "validation_accuracy").values()
    count = sum(value == 1 for value in found)
    return equals(f"{count} of {len(found)} seeds", f"{len(found)} of {len(found)} seeds")


def accurate(results: Results, *, of: Example, least: float) -> Obtained:
    """The accuracy is at least so high."""
    return _worded("accuracy", at_least(mean_over(list(final(results, of, "validation_accuracy").values())), least))


def near_chance(results: Results, *, of: Example) -> Obtained:
    """The accuracy is low."""
    return _worded("accuracy", at_most(mean_over(list(final(results, of, "validation_accuracy").values())), CHANCE))


def more_accurate(results: Results, *, of: Example, than: Example) -> Obtained:
    """The accuracy is higher."""
    name = "validation_accuracy"
    return _worded("difference", above(paired(final(results, of, name), final(results, than, name)), 0.0))


def smaller_gap(results: Results, *, of: Example, than: Example) -> Obtained:
    """The ratio of validation to training loss is lower."""

    def gap(example: Example) -> dict[int, float]:
        high, low = (logs(final(results, example, name)) for name in ("validation_loss", "train_loss"))
        return {seed: high[seed] - low[seed] for seed in high}

    return _worded("difference of log10 (validation / training)", below(paired(gap(of), gap(than)), 0.0))


def frozen(results: Results, *, of: Example) -> Obtained:
    """The blocks' weights are after training, bit for bit, as they were drawn."""
    before, after = of.network().blocks.parameters(), of.trained(results[of.key].folder).blocks.parameters()
    moved = sum(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    return equals(f"{moved} tensors of the blocks have moved", "0 tensors of the blocks have moved")


def under_noise(results: Results, *, of: Example, than: Example, sd: float) -> Obtained:
    """The accuracy under noise is higher: one-sided, 95 %."""
    one, other = (accuracy_under(results, example, "noise", sd) for example in (of, than))
    return _worded("difference", above(paired(one, other, level=0.90), 0.0))


def no_fewer_right(results: Results, *, of: Example, than: Example, sds: Sequence[float]) -> Obtained:
    """The mean over seeds of the accuracy under noise is at least as high, at each deviation."""
    gains = {}
    for sd in sds:
        one, other = (accuracy_under(results, example, "noise", sd) for example in (of, than))
        gains[sd] = float(np.mean(list(one.values())) - np.mean(list(other.values())))
    words = ", ".join(f"{gain:+.5f} at {sd:g}" for sd, gain in gains.items())
    return Obtained(f"{words}; must be at least 0", "pass" if min(gains.values()) >= 0 else "fail")


def more_right(
    results: Results, *, of: Sequence[NoisyDigits], than: Sequence[NoisyDigits], sd: float, images: str
) -> Obtained:
    """The accuracy under noise, mean over draws, is higher, in pairs of equal seeds."""
    one, other = (_right(results, jobs, sd, images) for jobs in (of, than))
    means = " against ".join(f"{np.mean(list(values.values())):.1%}" for values in (one, other))
    return _worded(f"{means}, difference", above(paired(one, other), 0.0))


def nearly_all_right(results: Results, *, of: Sequence[NoisyDigits]) -> Obtained:
    """The accuracy on training images without noise."""
    return at_least(mean_over(list(_right(results, of, 0.0, "train").values())), NEARLY)


def _right(results: Results, jobs: Sequence[NoisyDigits], sd: float, images: str) -> dict[int, float]:
    return {job.seed: float(np.mean(results[job.key].values["noise"][images][str(sd)])) for job in jobs}


def stretches_less(results: Results, *, of: Example, than: Example, name: str) -> Obtained:
    """A Jacobian's largest singular value (95 % quantile over points) is smaller."""
    pair = (logs(quantile(results, example, name, 2)) for example in (of, than))
    return _worded("log10 of the ratio", below(paired(*pair), 0.0))


def shrinks_less(results: Results, *, of: Example, than: Example) -> Obtained:
    """The smallest singular value (5 % quantile over points), which bounds gradients from below, is larger."""
    pair = (logs(quantile(results, example, "contraction", 0)) for example in (of, than))
    return _worded("log10 of the ratio", above(paired(*pair), 0.0))


def higher_rate(results: Results, *, grid: Grid) -> Obtained:
    """The largest stable learning rate is higher for theta = 1/2: mean of the logarithms over depths."""
    half, none = ([logs(stable_rate(results, job, grid.nothing)) for job in grid.jobs(theta)] for theta in (0.5, 0.0))
    mean = [{seed: float(np.mean([row[seed] for row in rows])) for seed in rows[0]} for rows in (half, none)]
    return _worded("log10 of the ratio", above(paired(*mean), 0.0))


def fewer(results: Results, *, grid: Grid, of: str) -> Obtained:
    """Fewer blocks (or parameters) are needed for a validation loss; where none reaches it, twice the most counts."""
    half, none = (depth_needed(results, grid, theta) for theta in (0.5, 0.0))
    beyond = 2 * grid.depths[-1]
    if all(value == beyond for value in (*half.values(), *none.values())):
        raise ValueError(f"no network of the grid reaches a validation loss of {grid.level:g}")
    if of == "parameters":
        half, none = ({s: parameters(grid.example, d) for s, d in row.items()} for row in (half, none))
    words = f"{of} {sorted(half.values())} against {sorted(none.values())}, log10 of the ratio"
    return _worded(words, below(paired(logs(half), logs(none)), 0.0))


def no_worse(results: Results, *, of: Example, than: Example) -> Obtained:
    """The validation loss is at most three times as high."""
    effect = paired(logs(final(results, of, "validation_loss")), logs(final(results, than, "validation_loss")))
    return _worded("log10 of the ratio", at_most(effect, LIKE))


def more_steps(results: Results, *, of: Example, than: Example) -> Obtained:
    """The solver takes more steps per block, in the last row of the history in which no training has failed."""
    epoch, one, other = last_in_common(results, of, than, "steps")
    means = " against ".join(f"{np.mean(list(values.values())):.1f}" for values in (one, other))
    return _worded(f"{means} at epoch {epoch}, log10 of the ratio", above(paired(logs(one), logs(other)), 0.0))


def more_right_moved(results: Results, *, of: Example, than: Example, by: float) -> Obtained:
    """More spiral points are right after they have been moved."""
    one, other = (accuracy_under(results, example, "shifted", by) for example in (of, than))
    means = " against ".join(f"{np.mean(list(values.values())):.1%}" for values in (one, other))
    return _worded(f"{means}, difference", above(paired(one, other), 0.0))


def lost(results: Results, *, of: Sequence[Example], by: float) -> Obtained:
    """Of no network are many points right after they have been moved so far; all have learned the spirals."""
    found = []
    for example in of:
        here, there = (list(accuracy_under(results, example, "shifted", size).values()) for size in (0.0, by))
        if np.mean(here) < LEARNED:
            raise ValueError(
                f"only {np.mean(here):.1%} are right where nothing is moved, with a bound of {example.bound:g}"
            )
        found.append(_worded("accuracy", at_most(mean_over(there), LOST)))
    return every(found)


def _worded(words: str, found: Obtained) -> Obtained:
    return Obtained(f"{words} {found.value}", found.verdict, found.effects)
