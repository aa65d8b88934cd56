"""Effects: intervals against scipy's own, their coverage, and what happens with too little."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from residuum.draws import means_of_draws
from residuum.effects import Effect, mean_over, over_examples, paired, share, slope

NUMBERS = st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=2, max_size=8)


@settings(max_examples=30, deadline=None)
@given(NUMBERS.filter(lambda v: np.std(v) > 1e-2))
def test_means_have_students_interval(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    effect = mean_over(values, level=0.9)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    assert effect.value == pytest.approx(np.mean(values), abs=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(2.0, 0.7, size=(1000, 3))
    held = sum(effect.low <= 2.0 <= effect.high for effect in map(mean_over, draws.tolist()))
    assert abs(held - 950) < 3 * math.sqrt(1000 * 0.95 * 0.05)  # three standard deviations of the count


def test_one_seed_says_nothing_about_others() -> None:
    effect = mean_over([0.3])
    assert (effect.value, effect.low, effect.high) == (0.3, -math.inf, math.inf)
    assert "too few" in str(effect)
    assert effect.describe()["low"] is None
    with pytest.raises(ValueError, match="no values"):
        mean_over([])


def test_pairs_are_matched_by_seed_and_unpaired_ones_left_out() -> None:
    after, before = {0: 1.0, 1: 5.0, 7: 99.0}, {1: 4.5, 0: 0.5, 3: 0.0}
    effect = paired(after, before)
    assert (effect.value, effect.n) == (0.5, 2)
    assert effect.low == pytest.approx(0.5)  # the spread between seeds is not that of the difference
    with pytest.raises(ValueError, match="nothing in common"):
        paired({0: 1.0}, {1: 1.0})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=6).filter(lambda v: max(v) - min(v) > 0.01))
def test_slopes_are_those_of_a_regression(values: list[float]) -> None:
    depths = [2.0 ** (i + 1) for i in range(len(values))]
    expected = stats.linregress(np.log(depths), np.log(values))
    half = stats.t.ppf(0.975, len(values) - 2) * expected.stderr
    effect = slope(depths, values)
    assert effect.value == pytest.approx(expected.slope, abs=1e-9)
    assert effect.high - effect.value == pytest.approx(half, abs=1e-6)


def test_two_depths_give_a_slope_without_an_interval() -> None:
    effect = slope([4, 16], [1.0, 2.0])
    assert effect.value == pytest.approx(0.5)
    assert effect.high == math.inf
    wrong = (([4, 4], [1.0, 2.0]), ([6] * 3, [1.0, 2.0, 3.0]), ([4, 8], [1.0, 0.0]), ([2, 4, 8], [1.0, 2.0]), ([], []))
    for depths, values in wrong:
        with pytest.raises(ValueError, match=r"two different depths|positive numbers|3 depths and 2 values"):
            slope(depths, values)


def test_examples_are_drawn_as_whole_rows() -> None:
    """The difference of two columns that move together is known far better than either."""
    common = np.random.default_rng(1).normal(size=(400, 1))
    table = np.concatenate([common, common + 0.1], axis=1)
    apart = over_examples(table, lambda means: means[0])
    together = over_examples(table, lambda means: means[1] - means[0])
    assert together.value == pytest.approx(0.1)
    assert together.high - together.low < 1e-12
    error = common.std(ddof=1) / math.sqrt(400)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * error, rel=0.1)  # 1000 draws: 4 % sd of a quantile


def test_undefined_examples_are_left_out_of_their_column() -> None:
    table = np.array([[1.0, np.nan], [3.0, 5.0], [2.0, 7.0]])
    assert over_examples(table, lambda means: means[1], draws=20).value == 6.0
    assert over_examples(table, lambda means: means[0], draws=20).value == 2.0


def test_one_example_says_nothing_about_others() -> None:
    effect = over_examples(np.array([[0.7]]), lambda means: means[0], draws=20)
    assert (effect.value, effect.low, effect.high) == (0.7, -math.inf, math.inf)
    with pytest.raises(ValueError, match="over_examples: no examples given; it needs at least one row"):
        over_examples(np.zeros((0, 2)), lambda means: means[0])


@pytest.mark.parametrize(("count", "n"), [(0, 20), (3, 20), (20, 20), (87, 10_000)])
def test_shares_have_the_exact_interval(count: int, n: int) -> None:
    expected = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    effect = share(count, n)
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    with pytest.raises(ValueError, match="is none"):
        share(n + 1, n)


def test_effects_say_over_what() -> None:
    assert str(Effect(1.0, 0.5, 1.5, 3, "seeds")) == "1 [0.5, 1.5] (95% over 3 seeds)"
    assert str(Effect(math.nan, 0.0, 1.0, 3, "seeds")) == "undefined"


def test_infinite_values_are_infinite_means() -> None:
    """They would be the largest number, whose differences are 0 or finite."""
    rows = np.array([[np.inf, np.inf], [1.0, 5.0], [1.0, 6.0], [1.0, 7.0]])
    assert math.isnan(over_examples(rows, lambda m: m[0] - m[1]).value)
    ends = over_examples(rows[:, :1], lambda m: m[0])
    assert (ends.value, ends.low, ends.high) == (math.inf, 1.0, math.inf)
    assert "without an interval" in str(over_examples(rows[:, :1], lambda m: m[0]))
    table = torch.tensor([[1.0, np.inf, -np.inf, np.nan], [3.0, 1.0, np.inf, np.nan]])
    means = means_of_draws(table, torch.tensor([[1, 1], [0, 2]]))
    expected = torch.tensor([[2.0, np.inf, np.nan, np.nan], [3.0, 1.0, np.inf, np.nan]], dtype=torch.float64)
    torch.testing.assert_close(means, expected, equal_nan=True)
