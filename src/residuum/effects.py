"""Effects: a number with the interval in which it lies, over seeds, networks or examples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from residuum.draws import means_of_draws
from residuum.readings import finite

LEVEL = 0.95
_AT_ONCE = 100  # draws whose table is held at once: 8 MB for 10,000 examples


@dataclass(frozen=True)
class Effect:
    """A number and its interval.

    Attributes:
        value: The estimate; nan where it is undefined.
        low: Lower end of the interval; -inf where nothing is known, as for one seed.
        high: Upper end.
        n: Number of seeds, networks or examples that it was estimated from.
        over: What these are; the interval says what others of them would give, and nothing else.
        level: Share of such intervals that hold the truth.
    """

    value: float
    low: float
    high: float
    n: int
    over: str
    level: float = LEVEL

    def __str__(self) -> str:
        return self.words()

    def words(self, beside: Sequence[float] = ()) -> str:
        """The number and its interval in four digits, or in as many as show on which side of some numbers its ends lie.

        Args:
            beside: What the ends are compared with.
        """
        if math.isnan(self.value):
            return "undefined"
        if not math.isfinite(self.high - self.low):
            why = "too few for an interval" if math.isfinite(self.value) else "without an interval"
            return f"{self.value:.4g} ({self.n} {self.over}, {why})"
        ends = self.low, self.high
        digits = next(d for d in (4, 6, 9, 17) if not any(float(f"{e:.{d}g}") == b != e for e in ends for b in beside))
        low, high = (f"{end:.{digits}g}" for end in ends)
        return f"{self.value:.4g} [{low}, {high}] ({self.level:.0%} over {self.n} {self.over})"

    def describe(self) -> dict[str, float | int | str | None]:
        """The effect as JSON values; None for what is infinite or undefined."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: finite(v) for name, v in numbers.items()} | {
            "n": self.n,
            "over": self.over,
            "level": self.level,
        }


def mean_over(values: Sequence[float | int], over: str = "seeds", *, level: float = LEVEL) -> Effect:
    """Mean with Student's interval, `mean +- t s / sqrt(n)`.

    Args:
        values: One per seed (or network); they are taken to be independent and of one normal distribution.
        over: What they are one per.
        level: Of the interval. For a one-sided bound of 95 % take 0.90 and read one end.

    Returns:
        The effect; without an interval (infinite) for one value, undefined (nan) if some value is.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("mean_over: no values given")
    value, n = float(np.mean(values)), len(values)
    if n < 2:
        return Effect(value, -math.inf, math.inf, n, over, level)
    half = _student(level, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Effect(value, value - half, value + half, n, over, level)


def paired(
    after: Mapping[int, float | int], before: Mapping[int, float | int], over: str = "seeds", *, level: float = LEVEL
) -> Effect:
    """Mean of the differences `after - before` of the seeds that both have, with Student's interval.

    Args:
        after: Values by seed.
        before: Those that they are compared with, by the same seeds.
        over: What the keys are.
        level: Of the interval; 0.90 for a one-sided bound of 95 %.

    Raises:
        ValueError: If they have no seed in common.
    """
    common = [key for key in after if key in before]
    if not common:
        raise ValueError(f"paired: nothing in common between {sorted(after)} and {sorted(before)}")
    return mean_over([after[key] - before[key] for key in common], over, level=level)


def slope(depths: Sequence[float | int], values: Sequence[float | int]) -> Effect:
    """Slope of log value against log depth by least squares, with Student's interval of the regression.

    With two points the line fits them, so there is no interval. -1 is a fall like 1 / L; 1 doubles with each doubling.

    Args:
        depths: Positive, at least two different ones.
        values: Positive. The interval takes the points to scatter about a line.

    Raises:
        ValueError: If a number is not positive, all depths are one, or there are more of one than of the other.
    """
    if len(depths) != len(values):
        raise ValueError(f"slope: every depth has one value; given {len(depths)} depths and {len(values)} values")
    x, y = np.asarray(depths, dtype=float), np.asarray(values, dtype=float)
    if not (np.all(x > 0) and np.all(y > 0)):
        raise ValueError(f"slope: logarithms need positive numbers, given {list(values)} at {list(depths)}")
    if len(set(x)) < 2:  # their spread about a rounded mean need not be 0
        raise ValueError(f"slope: needs at least two different depths, given {list(depths)}")
    x, y = np.log(x), np.log(y)
    spread = float(((x - x.mean()) ** 2).sum())
    rise = float((x - x.mean()) @ (y - y.mean())) / spread
    if len(x) == 2:
        return Effect(rise, -math.inf, math.inf, 2, "depths")
    left = float(((y - y.mean() - rise * (x - x.mean())) ** 2).sum())
    half = _student(LEVEL, len(x) - 2) * math.sqrt(left / (len(x) - 2) / spread)
    return Effect(rise, rise - half, rise + half, len(x), "depths")


def over_examples(
    values: Float[np.ndarray, "example column"],
    statistic: Callable[[np.ndarray], float],
    *,
    draws: int = 1000,
) -> Effect:
    """A statistic of column means with its percentile bootstrap interval: whole rows are drawn, so columns stay paired.

    Args:
        values: One row per example, columns of all networks that are compared; nan where undefined.
        statistic: Of the means of the columns, such as the difference of two.
        draws: Number of draws.

    Returns:
        The effect. It says what other examples would give for these networks, and nothing about other seeds. Of one
        example its interval is everything.

    Raises:
        ValueError: If there are no examples.
    """
    if not len(values):
        raise ValueError("over_examples: no examples given; it needs at least one row")
    generator, n = np.random.default_rng(0), len(values)
    table = torch.from_numpy(np.asarray(values, dtype=float))

    def of(times: np.ndarray) -> list[float]:
        with np.errstate(invalid="ignore"):
            return [statistic(means) for means in means_of_draws(table, torch.from_numpy(times)).numpy()]

    def draw(many: int) -> np.ndarray:
        return np.stack([np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(many)])

    found = [value for start in range(0, draws, _AT_ONCE) for value in of(draw(min(_AT_ONCE, draws - start)))]
    # Between infinite draws nothing can be interpolated.
    tail, method = (1 - LEVEL) / 2, "nearest" if np.isinf(found).any() else "linear"
    low, high = np.quantile(found, [tail, 1 - tail], method=method) if n > 1 else (-math.inf, math.inf)
    return Effect(of(np.ones((1, n)))[0], float(low), float(high), n, "examples")


def share(count: int, n: int) -> Effect:
    """A share of n examples with the exact (Clopper-Pearson) interval.

    Raises:
        ValueError: If count is not in 0..n, or n is 0.
    """
    from scipy.stats import beta

    if not 0 <= count <= n or not n:
        raise ValueError(f"share: {count} of {n} is none")
    tail = (1 - LEVEL) / 2
    low = beta.ppf(tail, count, n - count + 1) if count else 0.0
    high = beta.ppf(1 - tail, count + 1, n - count) if count < n else 1.0
    return Effect(count / n, float(low), float(high), n, "examples")


def _student(level: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, freedom))
