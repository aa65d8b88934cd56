"""P2's claims in worlds whose verdicts are known: where the paper is right, and where training changes nothing."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from residuum import drawing
from residuum.claims import Judged, Study, judge
from residuum.effects import mean_over
from residuum.experiments import PAPERS, SCALES, p2_verdicts, study
from residuum.experiments.costs import network_minutes
from residuum.experiments.p2_figures import CURVES
from residuum.experiments.p2_runs import (
    CROSSING,
    PREDICTED,
    PRINTED,
    SCALED,
    ablation_of,
    crossing,
    ends_of,
    mean_curve,
    run_of,
    steps_of_images,
    sweep_of,
)
from residuum.experiments.p2_verdicts import earlier, ends
from residuum.indices import stopping_depth
from residuum.runs import Run
from worlds import Law, as_the_paper, as_untrained, make


@cache
def planned(scale: str) -> Study:
    return study("p2", scale)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Law], dict[str, Judged]]:
    @cache
    def of(scale: str, law: Law) -> dict[str, Judged]:
        results = make(planned(scale).jobs, tmp_path_factory.mktemp("runs"), law)
        return {claim.id: judge(claim, results) for claim in planned(scale).claims}

    return of


def having(found: dict[str, Judged], verdict: str) -> set[str]:
    return {name for name, one in found.items() if one.verdict == verdict}


ERRATA = {"p2-predictions-printed"}


def test_where_the_paper_is_right_its_claims_pass(judged: Callable[[str, Law], dict[str, Judged]]) -> None:
    found = judged("paper", as_the_paper)
    # Decay does nothing in this world, and its refinement is by longer training.
    decay = {f"p2-{data}-ablation-decay" for data in ("mnist", "cifar10")}
    assert having(found, "not run") == set()
    assert having(found, "fail") == decay | ERRATA
    # This world's steps have the paper's scaled distances, which are equal: by them neither data set needs more blocks.
    assert having(found, "inconclusive") == {"p2-harder-blocks"}


def test_where_training_changes_nothing_what_it_is_said_to_do_fails(
    judged: Callable[[str, Law], dict[str, Judged]],
) -> None:
    found = judged("small", as_untrained)
    assert {f"p2-{data}-null-ratio" for data in ("mnist", "cifar10")} <= having(found, "fail")
    assert {name for name in found if "ablation" in name} & having(found, "pass") == set()
    assert {name for name in found if "null-slope" in name} & having(found, "pass") == set()
    assert {f"p2-{data}-null-theory" for data in ("mnist", "cifar10")} <= having(found, "pass")


def test_small_scale_says_what_it_cannot_tell(judged: Callable[[str, Law], dict[str, Judged]]) -> None:
    found = judged("small", as_the_paper)
    silent = having(found, "not run")
    assert {f"p2-mnist-scaled-{end}" for end in ("1", "2", "3", "total")} <= silent
    assert all("L = " in found[name].claim.limits or "depths" in found[name].claim.limits for name in silent - errors())
    assert having(found, "fail") <= {
        "p2-mnist-ablation-decay",
        "p2-cifar10-ablation-decay",
        *ERRATA,
        *comparisons(found),
    }
    reached = [name for name in found if "crossing" in name]
    assert all("not reached" in found[name].obtained or found[name].verdict == "pass" for name in reached)


def errors() -> set[str]:
    return {"p2-mnist-error", "p2-cifar10-error"}


def comparisons(found: dict[str, Judged]) -> set[str]:
    """What this world leaves open at depths up to 32, where its law is not that of an untrained network."""
    return {name for name in found if "null" in name or "ablation" in name}


def test_predictions_are_the_recomputed_ones() -> None:
    """Spec 3.4: the printed ones are exchanged between the data sets, and 46 is printed as 36."""
    for data, other in (("mnist", "cifar10"), ("cifar10", "mnist")):
        ours = tuple(stopping_depth(d, 0.1) for d in SCALED[data][:3])
        assert ours == PREDICTED[data][:3]
        assert sum(ours) == PREDICTED[data][3]
        wrong = [a for a, b in zip(ours, PRINTED[other], strict=True) if a != b]
        assert wrong == ([46] if data == "mnist" else [])
    closer = [abs(p - c) for d in SCALED for p, c in zip(PREDICTED[d][:3], CROSSING[d][:3], strict=True)]
    printed = [abs(p - c) for d in SCALED for p, c in zip(PRINTED[d], CROSSING[d][:3], strict=True)]
    assert sum(closer) < sum(printed)


def test_crossings_lie_between_depths() -> None:
    assert crossing({10: 0.4, 20: 0.2, 40: 0.1, 80: 0.05}) == pytest.approx(40)
    assert crossing({20: 0.2, 80: 0.05}) == pytest.approx(40)  # 4 / L
    assert crossing({20: 0.2, 40: 0.11}) == math.inf
    assert crossing({20: 0.05, 40: 0.02}) == 20


@pytest.mark.parametrize(
    ("depths", "verdict"), [([20.0, 64.0], "inconclusive"), ([64.0, 64.0, 63.0], "fail"), ([64.0], "inconclusive")]
)
def test_depths_that_no_network_reached_fail_by_their_whole_interval(
    depths: list[float], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2_verdicts, "_observed", lambda *_, **__: (mean_over(depths), 1))
    found = p2_verdicts.crossed({}, sweep={}, section=0, expected=24)  # 18 to 30
    assert found.verdict == verdict
    assert found.value.startswith("above")
    assert found.effects


def network(seed: int, depth: int, data: str = "mnist") -> Run:
    return replace(
        run_of("small", data, 4, seed), model=replace(run_of("small", data, 4, 0).model, blocks=(depth,) * 3)
    )


def test_networks_of_one_seed_are_averaged_first(tmp_path: Path) -> None:
    """Depths differ by far more than seeds, so that an interval over networks would be of the depths."""
    runs = {seed: {depth: network(seed, depth) for depth in (8, 16, 32)} for seed in range(3)}
    jobs = tuple(run for found in runs.values() for run in found.values())
    results = make(jobs, tmp_path, as_the_paper)
    judged = p2_verdicts.shaped(results, jobs=jobs, section=0, of=lambda steps: len(steps) / 100)
    (effect,) = judged.effects
    assert (effect.n, effect.over) == (3, "seeds")
    assert effect.value == pytest.approx(0.56 / 3)
    assert effect.low == effect.high  # all seeds have the same depths
    alone = p2_verdicts.shaped(results, jobs=jobs[:3], section=0, of=earlier)
    assert (alone.effects[0].n, alone.effects[0].over) == (3, "networks")


def test_a_slope_fails_only_where_its_range_is_seen(tmp_path: Path) -> None:
    for depths, verdict in (((16, 32), "inconclusive"), ((16, 64), "fail")):
        sweep = {seed: {depth: network(seed, depth) for depth in depths} for seed in range(3)}
        jobs = tuple(run for runs in sweep.values() for run in runs.values())
        results = make(jobs, tmp_path / verdict, lambda run, _: (run.model.blocks[0] ** (0.9 + 0.01 * run.seed),) * 3)
        reach = {"index": "computational_distance", "section": None, "low": 15, "high": 70}
        found = p2_verdicts.sloped(results, sweep=sweep, bounds=(-9.0, 0.585), **reach)
        assert found.verdict == verdict
        assert ("no depth beyond 32, of a range that ends at 70" in found.value) == (verdict == "inconclusive")


def test_one_seed_has_the_interval_of_the_regression_and_ends_have_three(tmp_path: Path) -> None:
    sweep = {0: {depth: network(0, depth) for depth in (8, 16, 24, 32)}}

    def law(run: Run, section: int) -> tuple[float, float, float]:
        depth = run.model.blocks[0]
        return 1.0, depth**0.5 * (1 + 0.01 * (depth % 16 > 0)), float(depth)

    results = make(sweep[0].values(), tmp_path, law)
    (effect,) = p2_verdicts.faster(results, sweep=sweep, section=0, low=8).effects
    assert (effect.n, effect.over) == (4, "depths")
    assert effect.low < -0.5 < effect.high < 0
    for data in ("mnist", "cifar10"):
        assert sorted(ends_of("paper", data)) == [0, 1, 2]
        assert {depth for runs in ends_of("paper", data).values() for depth in runs} == {2, 100}
        assert all(run_of("small", data, 32, seed) in runs.values() for seed, runs in ends_of("small", data).items())


def test_shapes_of_steps() -> None:
    assert earlier([3.0, 2.0, 1.0]) == pytest.approx(1.0)
    assert earlier([1.0, 1.0, 1.0, 1.0]) == 0
    assert ends([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]) > 0
    assert ends([1.0] * 9) == 0
    assert ends([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]) < 0


def test_means_over_seeds_take_those_that_are_there() -> None:
    assert mean_curve([{2: 1.0, 4: 3.0}, {2: 2.0}]) == {2: 1.5, 4: 3.0}


def test_values_per_image_add_up_to_the_index(tmp_path: Path) -> None:
    run = run_of("small", "mnist", 4, 0)
    results = make([run], tmp_path, as_the_paper)
    steps = steps_of_images(results, {4: run}, 1)
    index = results[run.key].indices["measured"]["mean_scaled_perturbation"]["sections"][1]
    assert steps.shape == (6, 1)
    assert steps.mean() == pytest.approx(index, rel=0.01)  # the images of this world are 0.5 % off on average


@pytest.mark.parametrize("scale", SCALES)
def test_the_plan_keeps_to_the_papers_settings_and_the_budget(scale: str) -> None:
    plan = planned(scale)
    minutes = [plan.minutes(job) for job in plan.jobs]
    assert len(plan.claims) == 91
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)
    if scale == "small":
        assert max(minutes) < 40
        assert sum(minutes) < 2 * 60 * 3  # two cores, three hours
    if scale == "paper":
        assert run_of("paper", "cifar10", 28, 0).training.batch == 256
        assert run_of("paper", "cifar10", 30, 0).training.batch == 128
        assert run_of("paper", "mnist", 62, 0).training.batch == 64
        assert Counter(job.data.name for job in plan.jobs if job.training.weight_decay and job.seed == 0)["mnist"] >= 38


def test_figures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    plan = planned("small")
    nothing = {figure.id: figure.draw({}) for figure in plan.figures}
    assert set(nothing.values()) == {None}
    half = [job for job in plan.jobs if job.data.name == "mnist" and job.model.blocks[0] in (4, 16)]
    results = make(half, tmp_path, as_the_paper)
    with drawing.style():
        for figure in plan.figures:
            drawn = figure.draw(results)
            assert drawn is not None, figure.id
            assert drawn.get_suptitle(), figure.id
            for axes in drawn.axes:
                assert axes.get_xlabel(), figure.id


def drawn(tmp_path: Path, name: str, jobs: list[Run], scale: str = "small") -> str:
    """What a figure says of a few runs."""
    (figure,) = (figure for figure in planned(scale).figures if figure.id == name)
    with drawing.style():
        return figure.draw(make(jobs, tmp_path, as_the_paper)).get_suptitle()


def test_no_growth_is_said_of_one_depth_or_between_seeds(tmp_path: Path) -> None:
    without, with_decay = (ablation_of("small", "mnist")[decay, True] for decay in (False, True))
    shallow = [runs[4] for sweep in (without, with_decay) for runs in sweep.values()]
    assert drawn(tmp_path, "p2-ablation", shallow).endswith("after long training: not yet known")
    mixed = [without[0][4], without[1][16], with_decay[0][4], with_decay[0][16]]
    assert drawn(tmp_path, "p2-ablation", mixed).endswith("after long training: not yet known")
    assert "MNIST \u00d7 2.8 without decay" in drawn(tmp_path, "p2-ablation", [*mixed, without[0][16]])
    sweep = sweep_of("small", "mnist")
    for name, *_, words in CURVES:
        for few in ([sweep[0][2]], [sweep[0][2], sweep[1][32]]):
            assert drawn(tmp_path, name, few).endswith(f"{words[1:]}, MNIST: growth with L not yet known")
    assert drawn(tmp_path, "p2-1", [sweep[0][2]]).endswith("shallowest to deepest: MNIST not yet known")


def test_one_block_and_equal_steps_are_no_first_longer_than_the_last(tmp_path: Path) -> None:
    (one, *_) = (job for job in planned("tiny").jobs if job.model.blocks[0] == 1)
    assert drawn(tmp_path, "p2-2", [one], "tiny").endswith("is longer than the last or not: not yet known")
    # In this world the steps of section 3 are as long at its end as at its start.
    assert drawn(tmp_path, "p2-2", [network(0, 8)]).endswith("is longer than the last in 2 of 3 sections")


def test_the_sentence_about_the_null_model_asks_for_what_its_rule_asks_for() -> None:
    for scale, said, expected in (
        ("small", "makes the scaled distance shorter than that of an untrained network", "below 1;"),
        ("paper", "makes the scaled distance less than half that of an untrained network", "below 0.5;"),
    ):
        for data in ("mnist", "cifar10"):
            (claim,) = (claim for claim in planned(scale).claims if claim.id == f"p2-{data}-null-ratio")
            assert claim.statement.endswith(said)
            assert expected in claim.expected


def test_costs_grow_with_what_is_done() -> None:
    run = run_of("small", "mnist", 8, 0)
    once = network_minutes(run)
    twice = network_minutes(replace(run, training=replace(run.training, epochs=2 * run.training.epochs)))
    deep = network_minutes(run_of("small", "mnist", 16, 0))
    assert 1.9 * once < twice < 2 * once  # it is measured once
    assert deep == pytest.approx(2 * once)
    assert network_minutes(run_of("small", "cifar10", 8, 0)) > once


def test_unknown_papers_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown paper 'p22'; did you mean 'p2'"):
        study("p22", "tiny")
    with pytest.raises(ValueError, match="unknown scale 'smal'; did you mean 'small'"):
        study(PAPERS[0], "smal")
