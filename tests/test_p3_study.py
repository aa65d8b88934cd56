"""P3's study: its claims in worlds with known verdicts, and its examples as runs like all others."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from residuum import worker
from residuum.claims import Claim, Judged, Study, judge
from residuum.engines.pool import Pool
from residuum.experiments import SCALES, p3_exact, study
from residuum.experiments.p3 import DEEP, LONGER, REGRESSION, VARIED
from residuum.experiments.p3_exact import VERDICTS, exact
from residuum.experiments.p3_runs import PAPER, depth_needed, final, last_in_common, minutes, parameters, stable_rate
from residuum.experiments.p3_runs import SCALES as PLANS
from residuum.files import stored, write_json, write_tensors
from residuum.jobs import Job
from residuum.runindex import table
from residuum.runs import Finished, Run, execute, finished
from residuum.stability import SCHEMES
from residuum.sweeps import sweep
from residuum.toys.digits import NOISE as LEVELS
from residuum.toys.digits import NoisyDigits
from residuum.toys.examples import _WEIGHTS, Example
from residuum.toys.measures import NOISE
from residuum.toys.problems import damped_sine
from whole import reproduced

World = Callable[[Example, float, int], tuple[float, float, float]]  # training loss, validation loss, accuracy
GEOMETRIC = {(theta, gradient): float(np.exp(np.log(losses).mean())) for theta, gradient, losses in REGRESSION}
LATER = {theta: float(np.exp(np.log(losses).mean())) for theta, losses in LONGER}


@cache
def planned(scale: str) -> Study:
    return study("p3", scale)


def as_the_paper(example: Example, rate: float, seed: int) -> tuple[float, float, float]:
    """Theta = 1/2 is better wherever the paper says so, by as much."""
    theta, wobble = example.theta, 1 + 0.02 * math.sin(1.7 * seed + 5 * example.theta)
    cut = example.param_grad == "truncated"
    if len(example.rates) > 1:
        loss = {"sine": 4e-3, "spirals": 0.2}[example.problem] / example.depth * (1 if theta else 3)
        unstable = example.rates.index(rate) > (3 if theta else 2)
        loss = 50.0 if unstable else loss
    elif example.problem == "sine" and example.time == 1:
        loss = GEOMETRIC[theta, example.param_grad]
        loss = float(np.exp(np.log(VARIED).mean())) if example.variation else loss
        loss = float(np.exp(np.log(DEEP).mean())) if example.depth == 50 else loss
    elif example.problem == "sine":
        loss = LATER.get(theta, 5e-4)
    elif example.problem == "spirals":
        loss = {(0.0, False): 1e-2, (0.5, False): 1e-4, (1.0, False): 0.1, (0.5, True): 1e-3, (1.0, True): 0.6}[
            theta, cut
        ]
    elif example.problem == "wave":
        loss = 1e-4 * 10 ** (2 * example.divergence)
    else:
        loss = {0.0: 1e-1, 0.5: 1e-2, 1.0: 5e-2}[theta]
    gap = 100 if theta == 0 and example.problem == "spirals" and len(example.rates) == 1 else 1.1
    accuracy = {0.0: 0.995, 0.5: 1.0, 1.0: 0.95}[theta] - 0.4 * (cut and theta == 1)
    return loss * wobble / gap, loss * wobble, accuracy + (wobble - 1) / 10 if theta == 1 else accuracy


def as_exchanged(example: Example, rate: float, seed: int) -> tuple[float, float, float]:
    """The residual network is what the implicit one should be; penalties lower the loss, and levels raise it."""
    if example.problem == "wave":
        return as_the_paper(replace(example, divergence=1 - example.divergence), rate, seed)
    other = {0.0: 0.5, 0.5: 0.0, 1.0: 1.0}[example.theta]
    exact = example.param_grad == "exact"
    train, validation, right = as_the_paper(replace(example, theta=other) if exact else example, rate, seed)
    return (10 * train, 10 * validation, right) if example.levels > 1 else (train, validation, right)


def as_if_nothing_differed(example: Example, rate: float, seed: int) -> tuple[float, float, float]:
    """All networks are alike, but for chance."""
    wobble = 1 + 0.1 * np.random.default_rng((seed, int(example.key, 16) % 2**32)).normal()
    return 0.05 * wobble, 0.05 * wobble, 0.9


def make(out: Path, jobs: tuple[Job, ...], world: World) -> dict[str, Finished]:
    return {job.key: _make(out / job.key, job, world) for job in jobs}


def noisy(job: NoisyDigits, world: World) -> dict[str, list[float]]:
    """Accuracy by noise: that of the paper's table for 0.2 and 0.7, or the other way round, or one for all."""
    much = {"free": 0.253, "unit": 0.323, "stable": 0.426 + 0.08 * job.theta}[job.spectrum]
    little = {"free": 0.995, "unit": 0.977, "stable": 0.973}[job.spectrum]
    wobble = 0.02 * np.random.default_rng((job.seed, int(job.key, 16) % 2**32)).normal()
    found = {}
    for sd in LEVELS:
        right = little if sd == 0.2 else much
        right = {as_the_paper: right, as_exchanged: (1.9 if sd == 0.2 else 0.7) - right}.get(world, 0.4 + wobble)
        found[str(sd)] = [right if sd else 1.0]
    return found


def steps(example: Example, world: World) -> float:
    """Of the solver, about as the paper has them; or fewer where it has more; or as many everywhere."""
    size = 5 * (1 + 4 * example.divergence * example.theta) if example.theta else 0.0
    return {as_the_paper: size, as_exchanged: 30 - size}.get(world, 7.0)


def shifted(example: Example, world: World) -> dict[str, float]:
    """Accuracy of moved spirals: limits help by a tenth, or harm, or neither."""
    third = 0.85 + {as_the_paper: 0.08, as_exchanged: -0.08}.get(world, 0.0) * (example.bound > 0)
    return {"0.0": 1.0, "0.33": third, "0.5": 0.6 if world is as_the_paper else 0.7}


def _make(folder: Path, example: Job, world: World) -> Finished:
    folder.mkdir(parents=True)
    if isinstance(example, NoisyDigits):
        write_json(folder / "values.json", {"noise": dict.fromkeys(("train", "test"), noisy(example, world))})
        return Finished(example, folder)
    found = [world(example, *member) for member in example.members]
    # Stretching and noise follow the loss: what has the lower one stretches less and is right more often.
    sizes = [1 + 100 * loss for _, loss, _ in found]
    row = dict(
        zip(("train_loss", "validation_loss", "validation_accuracy"), map(list, zip(*found, strict=True)), strict=True)
    )
    spread = [[size / 2, size, 2 * size] for size in sizes]
    shrunk = [[1 / (2 * size), 1 / size, 2 / size] for size in sizes]
    measured = {"jacobian": spread, "expansion": spread, "contraction": shrunk}
    measured["noise"] = {
        str(sd): [right / size for (_, _, right), size in zip(found, sizes, strict=True)] for sd in NOISE
    }
    wobbles = [
        1 + 0.02 * np.random.default_rng((seed, int(example.key, 16) % 2**32)).normal() for _, seed in example.members
    ]
    row["steps"] = [steps(example, world) * wobble for wobble in wobbles]
    measured["shifted"] = {by: [right * wobble for wobble in wobbles] for by, right in shifted(example, world).items()}
    write_json(
        folder / "values.json", {"failed": [None] * len(found), "history": [{"epoch": 1} | row], "measured": measured}
    )
    if example.param_grad == "truncated" and example.problem == "spirals":
        write_tensors(folder / "weights.safetensors", stored(example.network()), {}, format=_WEIGHTS)
    return Finished(example, folder)


def judged(out: Path, world: World) -> dict[str, Judged]:
    results = make(out, planned("small").jobs, world)
    return {claim.id: judge(claim, results) for claim in planned("small").claims}


def having(found: dict[str, Judged], verdict: str) -> set[str]:
    return {name.removeprefix("p3-") for name, one in found.items() if one.verdict == verdict}


EXACT = {claim.id.removeprefix("p3-") for claim in exact(PLANS["small"])}
# Theta = 1/2 against the residual network.
COMPARED = {
    *(f"spirals-{name}" for name in ("loss", "training", "gap", "jacobian", "expansion", "backward")),
    *(f"spirals-noise-{sd:g}" for sd in NOISE[1:]),
    *(f"sine-{name}" for name in ("ahead", "mean", "longer")),
    *(f"{name}-{what}" for name in ("sine", "spirals") for what in ("rate", "depth", "parameters")),
    *(f"stiff-{every}-half" for every in (2, 5, 10)),
    "prey-explicit",
    *(f"mnist-noise{name}" for name in ("", "-limited", "-stable", "-beyond", "-implicit", "-small", "-test")),
    "spirals-accuracy",
}
# Not about theta = 1/2 against 0.
OTHERS = {*(f"wave-{name}" for name in ("divergence", "half-divergence", "theta", "theta-middle", "fit", "fit-one"))}
OTHERS |= {"arms-1lip", "arms-2lip"}
NOT_BUILT = {"arms-2lip-5-1lip-5", "arms-10-0", "arms-5-5"}


def test_where_the_paper_is_right_its_claims_pass(tmp_path: Path) -> None:
    found = judged(tmp_path, as_the_paper)
    assert having(found, "not run") == NOT_BUILT
    assert having(found, "pass") == {name.removeprefix("p3-") for name in found} - NOT_BUILT


def test_where_the_residual_network_is_better_comparisons_fail(tmp_path: Path) -> None:
    failed = having(judged(tmp_path, as_exchanged), "fail")
    assert failed >= COMPARED | OTHERS | {
        "spirals-perfect",
        "prey-backward",
        "arms-middle",
        "levels-half",
        "levels-none",
    }
    assert not failed & EXACT


def test_where_nothing_differs_no_comparison_passes(tmp_path: Path) -> None:
    found = judged(tmp_path, as_if_nothing_differed)
    passed = having(found, "pass")
    assert passed >= EXACT
    assert not passed & (
        COMPARED | OTHERS | {"spirals-perfect", "spirals-one-trains", "spirals-one-truncated", "sine-deep"}
    )
    assert found["p3-sine-rate"].verdict == "fail"  # the largest stable rates are equal in every seed


def test_the_median_of_the_ratios_stands_beside_the_stricter_rule(tmp_path: Path) -> None:
    """A median above 10, which our specification asks for, passes where seeds scatter; the mean's interval does not."""
    ratios = (2.0, 30.0, 34.0, 40.0, 50.0)

    def world(example: Example, rate: float, seed: int) -> tuple[float, float, float]:
        return 1e-4, 1e-4 * (1 if example.theta else ratios[seed]), 1.0

    strict, median = (named("small", f"spirals-{name}") for name in ("loss", "loss-median"))
    results = make(tmp_path, strict.jobs, world)
    assert judge(strict, results).verdict == "inconclusive"
    assert judge(median, results).verdict == "pass"
    assert judge(median, results).obtained == "median of the ratios 34; must be at least 10"


def named(scale: str, name: str) -> Claim:
    return next(claim for claim in planned(scale).claims if claim.id == f"p3-{name}")


def test_means_under_noise_may_be_equal_but_not_less(tmp_path: Path) -> None:
    claim = named("small", "spirals-noise-mean")
    equal = make(tmp_path / "equal", claim.jobs, lambda *_: (0.1, 0.1, 0.9))
    assert judge(claim, equal).verdict == "pass"
    less = make(tmp_path / "less", claim.jobs, lambda example, *_: (0.1, 0.1, 0.9 - 0.01 * (example.theta > 0)))
    assert judge(claim, less).verdict == "fail"


def test_equally_many_right_under_noise_are_not_more(tmp_path: Path) -> None:
    claim = named("small", "spirals-noise-0.04")
    equal = make(tmp_path, claim.jobs, lambda *_: (0.1, 0.1, 0.9))
    assert judge(claim, equal).verdict == "fail"


def test_checks_without_runs_fail_where_equations_are_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p3_exact, "TOL", 1e-2)
    for name in ("gradient", "adjoint", "picard", "reversible", "conserves"):
        assert judge(named("small", name), {}).verdict == "fail", name


def test_counts_and_halves_fail_where_they_are_others() -> None:
    spirals = PLANS["small"].spirals
    assert p3_exact.parameters({}, example=spirals, expected=1074).verdict == "fail"
    assert p3_exact.halves({}, example=PLANS["small"].sine).verdict == "fail"


def test_failed_trainings_are_said_and_give_no_verdict(tmp_path: Path) -> None:
    plan = PLANS["small"]
    results = make(tmp_path, planned("small").jobs, as_the_paper)
    example = replace(plan.spirals, theta=0.0)
    path = tmp_path / example.key / "values.json"
    values = json.loads(path.read_text())
    values["failed"][1] = "not finite in epoch 2, step 1"
    write_json(path, values)
    with pytest.raises(ValueError, match="1 of 5 trainings failed at theta = 0: not finite in epoch 2, step 1"):
        final(results, example, "validation_loss")
    (claim,) = (claim for claim in planned("small").claims if claim.id == "p3-spirals-loss")
    assert judge(claim, results).verdict == "inconclusive"


def test_networks_that_have_not_learned_the_spirals_cannot_lose_them(tmp_path: Path) -> None:
    claim = next(claim for claim in planned("small").claims if claim.id == "p3-arms-middle")
    results = make(tmp_path, claim.jobs, as_the_paper)
    assert judge(claim, results).verdict == "pass"
    path = tmp_path / claim.jobs[1].key / "values.json"
    values = json.loads(path.read_text())
    values["measured"]["shifted"]["0.0"] = [0.8] * 5
    write_json(path, values)
    judged = judge(claim, results)
    assert judged.verdict == "inconclusive"
    assert "only 80.0% are right where nothing is moved, with a bound of 1" in judged.obtained


def test_steps_are_compared_where_no_training_has_failed_yet(tmp_path: Path) -> None:
    claim = next(claim for claim in planned("small").claims if claim.id == "p3-wave-theta")
    results = make(tmp_path, claim.jobs, as_the_paper)
    for number, job in enumerate(claim.jobs):
        path = tmp_path / job.key / "values.json"
        values = json.loads(path.read_text())
        rows = [[4.0 + seed + number for seed in range(5)], [9.0] * 5, [9.0, None, 9.0, 9.0, 9.0]]
        values["history"] = [{"epoch": 10 * (n + 1), "steps": row} for n, row in enumerate(rows)]
        values["history"][1]["steps"] = [9.0, 9.0, 9.0, 9.0, None if number else 9.0]
        write_json(path, values)
    epoch, one, other = last_in_common(results, *claim.jobs, "steps")
    assert (epoch, one[2], other[2]) == (10, 6.0, 7.0)
    assert judge(claim, results).verdict == "fail"
    assert "6.0 against 7.0 at epoch 10" in judge(claim, results).obtained
    values["history"][0]["steps"][0] = None
    write_json(path, values)
    with pytest.raises(ValueError, match="a training failed before epoch 10"):
        last_in_common(results, *claim.jobs, "steps")


def test_a_learning_rate_is_stable_if_all_lower_ones_are(tmp_path: Path) -> None:
    grid = PLANS["small"].grids["sine"]
    (job, *_) = grid.jobs(0.0)
    ends = {
        0: (0.1, 0.1, 0.1, None, 0.1),
        1: (0.4, 0.1, 0.1, 0.1, 0.1),
        2: (0.1,) * 5,
        3: (None,) * 5,
        4: (0.1, *(9.0,) * 4),
    }

    def world(example: Example, rate: float, seed: int) -> tuple[float, float, float]:
        loss = ends[seed][example.rates.index(rate)]
        return loss, loss, 0.0  # None where it failed

    folder = tmp_path / job.key
    folder.mkdir()
    rows = [world(job, *member)[0] for member in job.members]
    write_json(folder / "values.json", {"history": [{"train_loss": rows, "validation_loss": rows}]})
    found = stable_rate({job.key: Finished(job, folder)}, job, grid.nothing)
    assert found == {0: 0.1, 1: 0.005, 2: 0.4, 3: 0.005, 4: 0.01}


def test_the_fewest_blocks_are_those_of_the_best_rate(tmp_path: Path) -> None:
    grid = PLANS["small"].grids["sine"]

    def world(example: Example, rate: float, seed: int) -> tuple[float, float, float]:
        reached = seed < 4 and rate == 0.1 and example.depth >= 5 * (seed + 1)
        return 0.1, grid.level if reached else 0.1, 0.0

    results = make(tmp_path, tuple(grid.jobs(0.5)), world)
    assert depth_needed(results, grid, 0.5) == {0: 5, 1: 10, 2: 20, 3: 20, 4: 40}


def test_constants_are_what_they_say() -> None:
    x = np.linspace(-1, 1, 100_001)
    assert np.var(damped_sine(x)) == pytest.approx(PLANS["small"].grids["sine"].nothing, abs=1e-3)
    for name in ("sine", "spirals"):
        example = replace(PAPER[name], depth=3)
        assert sum(p.numel() for p in example.network().parameters()) == parameters(example, 3)
    assert set(VERDICTS) == set(SCHEMES)


@pytest.mark.parametrize("scale", SCALES)
def test_the_cost_of_every_job_is_known(scale: str) -> None:
    jobs = planned(scale).jobs
    assert all(isinstance(job, Example | NoisyDigits) and minutes(job) > 0 for job in jobs)
    assert minutes(study("p2", "tiny").jobs[0]) is None
    total = sum(map(minutes, jobs))
    assert total < {"tiny": 1, "small": 225, "paper": 1500}[scale]


def test_an_example_is_a_job_like_others(tmp_path: Path) -> None:
    example = replace(PAPER["sine"], depth=2, epochs=2, batch=50, seeds=(0, 1))
    assert isinstance(example, Job)
    assert {"network": Run, "example": Example, "digits under noise": NoisyDigits} == worker.KINDS
    done = execute(example, tmp_path / "alone")
    assert done.values["members"] == [{"rate": 0.01, "seed": 0}, {"rate": 0.01, "seed": 1}]
    assert done.values["parameters"] == parameters(example, 2)
    other = replace(example, theta=0.0)
    outcome = sweep([example, other], tmp_path / "pool", Pool(workers=1))
    assert outcome.counts == {"complete": 2}
    pooled = finished(example, tmp_path / "pool")
    same = [{k: v for k, v in one.values.items() if k != "seconds"} for one in (done, pooled)]
    assert same[0] == same[1]
    pairs = zip(*(example.trained(one.folder).parameters() for one in (done, pooled)), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    frame = table(tmp_path / "pool")
    assert sorted(frame["theta"]) == [0.0, 0.5]
    assert set(frame["kind"]) == {"example"}


def test_a_checkpoint_of_another_place_is_begun_anew(tmp_path: Path) -> None:
    example = replace(PAPER["sine"], depth=1, epochs=1, batch=50)
    folder = tmp_path / "runs" / example.key
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_bytes(b"nothing")
    (tmp_path / "residuum.json").write_text('{"kind": "runs", "format": 1}')
    assert execute(example, tmp_path).values["failed"] == [None]
    assert "begins anew" in (folder / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)  # 57 runs; minutes where other work is going on
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_tiny_reproduction_runs_end_to_end(tmp_path: Path) -> None:
    mine = {claim["id"].removeprefix("p3-"): claim["verdict"] for claim in reproduced("p3", tmp_path, workers=1)}
    assert {name for name, verdict in mine.items() if verdict == "not run"} == NOT_BUILT
    drawn = {path.stem for path in (tmp_path / "out" / "tiny" / "p3").glob("*.png")}
    assert drawn == {figure.id for figure in planned("tiny").figures}
