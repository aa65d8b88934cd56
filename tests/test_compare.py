"""Comparison: equal to the formulas pair by pair, invariant where it must be, two networks on relative depth."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles_spectra as oracles
from conftest import MODELS
from residuum.cutting import cut, cut_all
from residuum.models import ResNet, ResNetConfig
from residuum.probes.compare import States, collect, compare
from residuum.profiles import Point
from residuum.streams import Block, Section, Stream

METHODS = ["cka", "unbiased cka", "pearson", "spearman"]


def states(*values: Tensor) -> States:
    points = tuple(Point(0, i) for i in range(len(values)))
    return States(values, points, tuple(i / max(1, len(values) - 1) for i in range(len(values))))


def similarity(x: Tensor, y: Tensor, method: str, distance: str = "correlation") -> float:
    return float(compare(states(x), states(y), method=method, distance=distance).matrix[0, 0])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_methods_equal_their_formulas() -> None:
    from scipy.stats import pearsonr, spearmanr

    x, y = random(1, 9, 5), random(2, 9, 7)
    y[:, :5] += x
    a, b = x.numpy(), y.numpy()
    assert similarity(x, y, "cka") == pytest.approx(oracles.cka(a, b), rel=1e-10)
    unbiased = oracles.hsic(a, b) / math.sqrt(oracles.hsic(a, a) * oracles.hsic(b, b))
    assert similarity(x, y, "unbiased cka") == pytest.approx(unbiased, rel=1e-10)
    for distance in ("correlation", "euclidean"):
        one, two = (oracles.dissimilarities(z, distance) for z in (a, b))
        assert similarity(x, y, "pearson", distance) == pytest.approx(pearsonr(one, two).statistic, rel=1e-10)
        assert similarity(x, y, "spearman", distance) == pytest.approx(spearmanr(one, two).statistic, rel=1e-10)


def test_ranks_share_ties() -> None:
    from scipy.stats import spearmanr

    x = torch.tensor([[0.0], [1], [2], [4], [4], [8]]).double()
    y = random(0, 6, 3)
    expected = spearmanr(*(oracles.dissimilarities(z.numpy(), "euclidean") for z in (x, y))).statistic
    assert similarity(x, y, "spearman", "euclidean") == pytest.approx(expected, rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100), method=st.sampled_from(METHODS))
def test_laws(seed: int, scale: float, method: str) -> None:
    """1 with itself, symmetric, unchanged by scaling, orthogonal maps, shifts, and the order of the examples."""
    x, y = random(seed, 8, 4), random(seed + 1, 8, 6)
    turn, _ = torch.linalg.qr(random(seed + 2, 6, 6))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    value = similarity(x, y, method, "euclidean")
    assert -1 <= value <= 1
    assert similarity(x, x, method, "euclidean") == pytest.approx(1)
    for changed in (
        similarity(y, x, method, "euclidean"),
        similarity(x, scale * (y @ turn) + 3, method, "euclidean"),
        similarity(x[order], y[order], method, "euclidean"),
    ):
        # ranks may change places where two distances are equal up to rounding; random ones are not
        assert changed == pytest.approx(value, abs=1e-9)
    assert similarity(x, scale * y.flip(1) + 3, method) == pytest.approx(similarity(x, y, method), abs=1e-9)


def test_cka_sees_orthogonal_maps_only() -> None:
    x = random(0, 30, 4)
    stretched = x @ torch.diag(torch.tensor([10.0, 1, 1, 1]).double())
    assert similarity(x, stretched, "cka") < 0.95


def test_the_unbiased_variant_is_zero_on_average_for_unrelated_states() -> None:
    pairs = [(random(seed, 10, 40), random(seed + 500, 10, 40)) for seed in range(100)]
    biased = np.mean([similarity(x, y, "cka") for x, y in pairs])
    unbiased = [similarity(x, y, "unbiased cka") for x, y in pairs]
    assert biased > 0.5
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / 10


@pytest.mark.parametrize("method", METHODS)
def test_states_that_tell_no_examples_apart_are_undefined(method: str) -> None:
    same, x = torch.full((6, 3), 0.1), random(0, 6, 3).float()
    matrix = compare(states(same, x), states(x), method=method).matrix
    assert matrix[0].isnan().all()
    assert float(matrix[1, 0]) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", ["correlation", "euclidean"])
@pytest.mark.parametrize("method", METHODS)
def test_equal_examples_are_undefined_whatever_they_are(method: str, distance: str, dtype: torch.dtype) -> None:
    """Not constant over the features: what correlations and means of equal examples leave is rounding."""
    for seed in range(5):
        same, x = random(seed, 1, 5).to(dtype).expand(7, 5), random(seed + 9, 7, 5)
        matrix = compare(states(same, x), states(x), method=method, distance=distance).matrix
        assert matrix[0].isnan().all()
        assert float(matrix[1, 0]) == pytest.approx(1)


def test_an_example_of_equal_features_has_no_correlation_whatever_their_number() -> None:
    """What their mean leaves in float64 is rounding, which correlates with anything."""
    for features in range(2, 40):
        x = random(0, 6, features)
        x[2], x[4] = 0.1, 0.3
        assert compare(states(x), states(x), method="pearson").matrix.isnan().all()


# Streams --------------------------------------------------------------------------------------------------------------


def test_networks_of_different_depth_meet_on_relative_depth() -> None:
    images = torch.randn(12, 3, 8, 8)
    deep = ResNet(ResNetConfig(blocks=(4, 4), widths=(4, 8))).eval()
    shallow = ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8)), seed=1).eval()
    batches = [images[:5], images[5:]]
    a, b = collect(cut_all(deep, batches)), collect(cut_all(shallow, batches))
    assert a.points == tuple(Point(s, i) for s in range(2) for i in range(5))
    assert a.depth == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.625, 0.75, 0.875, 1])
    assert [tuple(x.shape) for x in b.values] == [(12, 4)] * 3 + [(12, 8)] * 3
    whole = collect([deep.cut(images)])
    for x, y in zip(a.values, whole.values, strict=True):
        torch.testing.assert_close(x, y)
    found = compare(a, b)
    assert found.matrix.shape == (10, 6)
    assert found.rows == a.depth
    assert found.columns == b.depth
    torch.testing.assert_close(compare(b, a).matrix, found.matrix.T)
    own = compare(a, a, method="spearman").matrix
    torch.testing.assert_close(own.diagonal(), torch.ones(10).double())


def test_flat_states_hold_all_entries() -> None:
    stream = ResNet(ResNetConfig(blocks=(1,), widths=(4,))).eval().cut(torch.randn(3, 3, 6, 6))
    flat = collect([stream], pool="flat")
    torch.testing.assert_close(flat.values[1], stream.run().states[0][1].detach().flatten(1))


def test_masked_tokens_do_not_count() -> None:
    torch.manual_seed(0)
    model, x = MODELS["gpt2"].build()
    stream = cut(model.eval(), x)
    found = collect([stream]).values[2]
    h = stream.run().states[0][2].detach()
    torch.testing.assert_close(found, torch.stack([h[0].mean(0), h[1, :5].mean(0)]))
    with pytest.raises(ValueError, match=r'masked tokens cannot be flattened; use pool="mean"'):
        collect([stream], pool="flat")


def test_vectors_stay_as_they_are() -> None:
    h = torch.randn(4, 3)
    stream = Stream(h, (Section("only", lambda h: h, (Block("a", lambda h: 2 * h),)),), lambda h: h)
    torch.testing.assert_close(collect([stream]).values[1], 2 * h)


def test_bad_input_is_refused() -> None:
    x, y = states(torch.randn(5, 2)), states(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"states have \[4, 5\] examples"):
        compare(x, y)
    with pytest.raises(ValueError, match="at least 4"):
        compare(states(torch.randn(3, 2)), states(torch.randn(3, 2)), method="unbiased cka")
    for wrong in ({"method": "cca"}, {"distance": "cosine"}):
        with pytest.raises(Exception, match=r"cca|cosine"):
            compare(x, x, **wrong)
    with pytest.raises(ValueError, match="no batches given"):
        collect([])


def test_ranks_do_not_depend_on_the_unit_and_rounding_is_no_order() -> None:
    x = torch.randn(6, 5).double()
    points, depth = (Point(0, 0),), (0.0,)
    one, two = States((x,), points, depth), States((1e13 * x,), points, depth)
    assert compare(one, two, method="spearman", distance="euclidean").matrix.item() == pytest.approx(1)
    equal = States((torch.eye(6).double() * 0.1 + 1e-17 * x[:, :1],), points, depth)
    for method in ("pearson", "spearman"):
        assert compare(equal, one, method=method, distance="euclidean").matrix.isnan().all()
