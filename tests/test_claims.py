"""Verdicts follow fixed rules; claims without their runs are not run; nothing is lost on the way to JSON."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residuum.claims import (
    Claim,
    Figure,
    Obtained,
    Results,
    Study,
    above,
    at_least,
    at_most,
    below,
    between,
    equals,
    every,
    judge,
    together,
)
from residuum.effects import Effect, mean_over
from residuum.models import ResNetConfig
from residuum.runs import DataConfig, Finished, Run

NUMBER = st.floats(-10, 10)
EFFECTS = st.tuples(NUMBER, NUMBER, NUMBER).map(lambda v: Effect(sorted(v)[1], min(v), max(v), 3, "seeds"))
UNKNOWN = [mean_over([1.0]), Effect(math.nan, math.nan, math.nan, 3, "seeds")]


def job(seed: int) -> Run:
    return Run(ResNetConfig(blocks=(1,), widths=(4,), channels=1), DataConfig("digits"), seed=seed)


def claim(test: object, *seeds: int, name: str = "c") -> Claim:
    return Claim(name, "paper, page 1", "it is so", "1", tuple(job(seed) for seed in seeds), test, "small")


@given(EFFECTS, NUMBER)
def test_a_verdict_needs_the_whole_interval_on_one_side(effect: Effect, threshold: float) -> None:
    expected = "pass" if effect.low >= threshold else "fail" if effect.high < threshold else "inconclusive"
    assert at_least(effect, threshold).verdict == expected
    mirrored = Effect(-effect.value, -effect.high, -effect.low, 3, "seeds")
    assert at_most(mirrored, -threshold).verdict == expected
    strict = "pass" if effect.low > threshold else "fail" if effect.high <= threshold else "inconclusive"
    assert above(effect, threshold).verdict == below(mirrored, -threshold).verdict == strict


@given(EFFECTS, NUMBER, NUMBER)
def test_a_range_is_passed_inside_and_failed_outside(effect: Effect, a: float, b: float) -> None:
    low, high = sorted((a, b))
    both = [at_least(effect, low).verdict, at_most(effect, high).verdict]
    expected = "pass" if both == ["pass", "pass"] else "fail" if "fail" in both else "inconclusive"
    assert between(effect, low, high).verdict == expected


@pytest.mark.parametrize("effect", UNKNOWN)
def test_what_is_not_known_is_inconclusive(effect: Effect) -> None:
    found = [rule(effect, 0.0) for rule in (at_least, at_most, above, below)] + [between(effect, -1.0, 1.0)]
    assert {one.verdict for one in found} == {"inconclusive"}


def test_an_end_that_is_near_its_bound_has_as_many_digits_as_tell_them_apart() -> None:
    found = above(Effect(0.9949, 0.98917, 1.00003, 3, "seeds"), 1.0)
    assert (found.verdict, found.value) == (
        "inconclusive",
        "0.9949 [0.98917, 1.00003] (95% over 3 seeds); must be above 1",
    )
    assert above(Effect(2.0, 1.0, 3.0, 3, "seeds"), 1.0).value.startswith("2 [1, 3] (95%")


def test_counts_are_equal_or_not() -> None:
    assert equals(1_742_762, 1_742_762).verdict == "pass"
    assert equals(1_742_763, 1_742_762).verdict == "fail"


def test_all_parts_must_hold() -> None:
    good, bad, open_ = (Obtained(v, v) for v in ("pass", "fail", "inconclusive"))
    assert every([good, good]).verdict == "pass"
    assert every([good, open_]).verdict == "inconclusive"
    assert every([open_, bad, good]).verdict == "fail"
    with pytest.raises(ValueError, match="no parts"):
        every([])


def test_a_claim_without_its_runs_is_not_run(tmp_path: Path) -> None:
    def never(results: Results) -> Obtained:
        raise AssertionError("the test must not be called")

    results = {job(0).key: Finished(job(0), tmp_path)}
    found = judge(claim(never, 0, 1, 2), results)
    assert (found.verdict, found.obtained) == ("not run", "2 of 3 runs missing")
    assert judge(claim(None), results).verdict == "not run"


def test_a_test_that_cannot_be_computed_says_so(tmp_path: Path) -> None:
    def undefined(results: Results) -> Obtained:
        raise ValueError("logarithms need positive numbers:\n  0 | 1")

    found = judge(claim(undefined, 0), {job(0).key: Finished(job(0), tmp_path)})
    assert found.verdict == "inconclusive"
    assert found.obtained == "could not be computed: logarithms need positive numbers: 0 | 1"  # a cell of a table


@pytest.mark.parametrize("fault", [KeyError("train_loss"), TypeError("a list\nof nothing"), ZeroDivisionError("by 0")])
def test_a_bad_run_leaves_the_other_claims_alone(fault: Exception, tmp_path: Path) -> None:
    def broken(results: Results) -> Obtained:
        raise fault

    found = judge(claim(broken, 0, name="p9-a"), {job(0).key: Finished(job(0), tmp_path)})
    assert found.verdict == "inconclusive"
    assert found.obtained.startswith(f"could not be computed: p9-a: {type(fault).__name__}: ")
    assert len(found.obtained.splitlines()) == 1


def test_a_verdict_is_json(tmp_path: Path) -> None:
    results = {job(0).key: Finished(job(0), tmp_path)}
    found = judge(claim(lambda results: at_most(mean_over([2.0]), 1.0), 0), results)
    content = json.loads(json.dumps(found.describe(), allow_nan=False))
    assert content["verdict"] == "inconclusive"
    assert content["effects"][0] == {"value": 2.0, "low": None, "high": None, "n": 1, "over": "seeds", "level": 0.95}


def test_studies_name_things_once_and_run_things_once() -> None:
    first, second = claim(None, 0, 1, name="a"), claim(None, 1, 2, name="b")
    study = Study("p9", "Nobody", "tiny", "", (), (first, second))
    assert [run.seed for run in study.jobs] == [0, 1, 2]
    assert together([second]) == second.jobs
    figure = Figure("a", "", "", (), lambda results: None)
    with pytest.raises(ValueError, match="two figures or claims are called a"):
        Study("p9", "Nobody", "tiny", "", (figure,), (first,))
