"""Indices: sums and means of a profile, slopes over depth, the stopping rule and the range of advice."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from residuum.indices import ADVICE, depth_advice, indices, slopes, stopping_depth
from residuum.models import ResNet, ResNetConfig
from residuum.probes import pairs, passive, perturbation, readouts, state_norm, update_angle
from residuum.profiles import Measure, Point, Profile, profile


def made(scaled: list[list[float]], lengths: tuple[int, ...], **others: list[list[float]]) -> Profile:
    """A profile of blocks with the given values per example."""
    points = tuple(Point(s, i) for s, n in enumerate(lengths) for i in range(n))
    values = {"scaled_perturbation": scaled, **others}
    measures = {name: Measure(torch.tensor(rows), points, "block") for name, rows in values.items()}
    names = tuple(f"s{s}" for s in range(len(lengths)))
    return Profile(torch.arange(len(scaled)), measures, names, lengths, {})


def test_distances_are_sums_and_means_are_by_blocks() -> None:
    found = indices(made([[0.5, 0.3, 0.2], [0.7, 0.1, 0.4]], (2, 1), perturbation=[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert found["scaled_distance"]["sections"] == pytest.approx([0.8, 0.3])
    assert found["scaled_distance"]["network"] == pytest.approx(1.1)
    assert found["mean_scaled_perturbation"]["sections"] == pytest.approx([0.4, 0.3])
    assert found["mean_scaled_perturbation"]["network"] == pytest.approx(1.1 / 3)
    assert found["computational_distance"]["sections"] == pytest.approx([4, 2])
    assert found["mean_perturbation"]["network"] == pytest.approx(2)


def test_undefined_examples_are_left_out_and_undefined_indices_are_none() -> None:
    nan = math.nan
    found = indices(made([[0.5, nan, nan], [nan, 0.1, nan]], (2, 1), update_angle=[[nan] * 3] * 2))
    assert found["scaled_distance"]["sections"] == [pytest.approx(0.6), None]
    assert found["mean_update_angle"] == {"sections": [None, None], "network": None}
    json.dumps(found, allow_nan=False)


def test_indices_of_a_network_are_json_with_a_number_per_section() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(2, 3, 1), widths=(4, 4, 4), transition="projection")).eval()
    x, y = torch.randn(5, 3, 8, 8), torch.arange(5)
    measured = profile(model, [(x, y)], [passive(perturbation, state_norm, update_angle), pairs, readouts])
    found = json.loads(json.dumps(indices(measured), allow_nan=False))
    assert found.keys() == {
        "computational_distance", "mean_perturbation", "scaled_distance", "mean_scaled_perturbation", "mean_state_norm",
        "mean_update_angle", "mean_block_influence", "mean_angular_distance", "label_changes",
        "final_loss", "final_accuracy", "final_entropy",
    }  # fmt: skip
    assert {len(v["sections"]) for v in found.values() if isinstance(v, dict)} == {3}
    assert found["scaled_distance"]["sections"][2] == 0  # projection: its only block is the entry
    assert found["mean_scaled_perturbation"]["sections"][2] is None
    assert found["final_accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    spans = measured.measures["block_influence"].points
    single = [v for p, v in zip(spans, measured.mean("block_influence").tolist(), strict=True) if p.length == 1]
    assert found["mean_block_influence"]["network"] == pytest.approx(sum(single) / 4)
    assert [row["section"] for row in depth_advice(measured)["sections"]] == ["section 1", "section 2"]


@given(st.floats(-2, 2), st.floats(0.01, 100))
def test_slopes_of_a_power_law_are_its_power(power: float, factor: float) -> None:
    found = slopes({depth: factor * depth**power for depth in (2, 4, 8, 16, 20, 40, 80, 100)})
    assert found.keys() == {(2, 20), (20, 80), (70, 100)}
    assert list(found.values()) == pytest.approx([power] * 3, abs=1e-9)


def test_slopes_need_two_depths_in_a_range() -> None:
    found = slopes({2: 1.0, 20: 0.5, 30: 0.4})
    assert math.isnan(found[70, 100])
    assert found[20, 80] == pytest.approx(math.log(0.4 / 0.5) / math.log(30 / 20))
    with pytest.raises(ValueError, match=r"positive depths and values, given 0\.0 at depth 4"):
        slopes({2: 1.0, 4: 0.0})


@given(st.integers(1, 10**4), st.integers(1, 100))
def test_whole_quotients_are_not_rounded_up(blocks: int, hundredths: int) -> None:
    eps = hundredths / 100
    assert stopping_depth(blocks * eps, eps) == blocks
    assert stopping_depth((blocks + 0.01) * eps, eps) == blocks + 1


def test_the_guard_of_the_stopping_rule() -> None:
    assert math.ceil(0.07 / 0.01) == 8
    assert stopping_depth(0.07, 0.01) == 7
    assert stopping_depth(0.0, 0.1) == 0


@pytest.mark.parametrize(("distance", "eps"), [(1.0, 0.0), (1.0, -0.1), (-1.0, 0.1), (math.nan, 0.1), (math.inf, 0.1)])
def test_the_stopping_rule_refuses(distance: float, eps: float) -> None:
    with pytest.raises(ValueError, match="needs distance >= 0 and eps > 0"):
        stopping_depth(distance, eps)


def test_advice_is_a_range_with_its_reason() -> None:
    advice = depth_advice(made([[0.25, 0.25, 0.125, 0.0, 0.0625]], (4, 1)))
    assert advice["eps"] == 0.1
    assert advice["sentence"] == ADVICE
    first, second = advice["sections"]
    assert first == {
        "section": "s0", "blocks": 4, "scaled_distance": 0.625, "fixed_distance": 7, "square_root": 10,
    }  # fmt: skip
    assert (second["fixed_distance"], second["square_root"]) == (1, 1)


def test_advice_without_the_measure_has_no_sections() -> None:
    nothing = made([[0.5]], (1,))
    without = Profile(nothing.examples, {}, nothing.sections, nothing.lengths, {})
    assert depth_advice(without)["sections"] == []
    assert depth_advice(made([[math.nan]], (1,)))["sections"] == []


def test_a_network_that_needs_no_more_blocks_keeps_its_depth_by_both_laws() -> None:
    # Mean step exactly eps: both laws say L0.
    row = depth_advice(made([[0.125] * 8], (8,)), eps=0.125)["sections"][0]
    assert (row["fixed_distance"], row["square_root"]) == (8, 8)
