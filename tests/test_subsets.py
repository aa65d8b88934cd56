"""Subsets: nested, balanced, the same for the same seed, for one or several classes per example."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from residuum.data import balanced_subset, load

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)
COLUMNS = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=60).map(
    lambda rows: torch.tensor(rows, dtype=torch.uint8)
)
ANY = LABELS | COLUMNS


def groups(labels: Tensor) -> list[object]:
    """What has to be balanced: the class, or the set of classes."""
    return [tuple(row) if isinstance(row, list) else row for row in labels.tolist()]


@given(labels=ANY, seed=st.integers(0, 99), data=st.data())
def test_small_subsets_lie_in_large_ones(labels: Tensor, seed: int, data: st.DataObject) -> None:
    large = data.draw(st.integers(1, len(labels)))
    small = data.draw(st.integers(1, large))
    inner, outer = (balanced_subset(labels, n, seed=seed) for n in (small, large))
    assert len(inner) == small
    assert set(inner.tolist()) <= set(outer.tolist())
    assert outer.tolist() == sorted(set(outer.tolist()))
    assert torch.equal(inner, balanced_subset(labels, small, seed=seed))


@given(labels=ANY, seed=st.integers(0, 99), data=st.data())
def test_classes_differ_by_at_most_one_until_one_is_used_up(labels: Tensor, seed: int, data: st.DataObject) -> None:
    chosen = balanced_subset(labels, data.draw(st.integers(1, len(labels))), seed=seed).tolist()
    every = groups(labels)
    picked = [every[i] for i in chosen]
    most = max(picked.count(group) for group in set(every))
    for group in set(every):
        assert picked.count(group) >= min(most - 1, every.count(group))


def test_other_seeds_choose_others() -> None:
    labels = torch.arange(1000) % 10
    draws = [set(balanced_subset(labels, 100, seed=seed).tolist()) for seed in range(5)]
    assert len({frozenset(draw) for draw in draws}) == 5
    assert 550 > len(set.union(*draws)) > 300, "about 1000 (1 - 0.9**5) = 410"


def test_every_example_is_chosen_about_equally_often() -> None:
    labels = torch.arange(60) % 3
    counts = torch.stack([balanced_subset(labels, 15, seed=seed) for seed in range(800)]).flatten().bincount()
    assert counts.sum() == 15 * 800
    assert (counts - 200).abs().max() < 5 * (800 * 0.25 * 0.75) ** 0.5


def test_of_a_data_set() -> None:
    data = load("digits", split="train")
    half = data.balanced(500, seed=1)
    assert half.labels.bincount().tolist() == [50] * 10
    assert torch.equal(half.images, data.images[balanced_subset(data.labels, 500, seed=1)])
    assert data.balanced(None, seed=1) is data


@pytest.mark.parametrize("count", [0, -1, 11])
def test_impossible_sizes_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"a subset of {count} of 10 examples: it must be between 1 and 10"):
        balanced_subset(torch.zeros(10, dtype=torch.int64), count, seed=0)
