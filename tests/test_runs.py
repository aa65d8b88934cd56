"""A run's key depends on all that determines its result, and on nothing else; its execution is the plain one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datafiles import write_npz
from residuum import runs
from residuum.data import ClutterConfig, batches, load_splits
from residuum.descriptions import canonical, described, key_of, rebuilt
from residuum.jobs import Settings
from residuum.layers.coupling import Coupling
from residuum.layers.lipschitz import Limit
from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.sharing import NAIVE, UBN, Sharing
from residuum.layers.steps import Explicit, RungeKutta, Theta
from residuum.layers.tableaus import RK4, PartitionedTableau, Tableau
from residuum.linear import GMRES, BiCGStab, Dense, Neumann
from residuum.loading import load_model
from residuum.models import ResNet, ResNetConfig
from residuum.nulls import calibrate_
from residuum.penalties import Penalty
from residuum.probes import readouts
from residuum.probing import CALIBRATION_BATCH
from residuum.profiles import profile
from residuum.rates import Cosine, Steps
from residuum.runs import DataConfig, Run, execute, finished
from residuum.solvers import Anderson, GradientDescent, NewtonKrylov, Picard
from residuum.training import TrainConfig, train

TINY = Run(
    ResNetConfig(blocks=(2, 1), widths=(4, 4), channels=1),
    DataConfig("digits", train=50, test=30),
    TrainConfig(epochs=2, batch=25),
    probes=("readouts",),
    probe_limit=20,
    seed=3,
)
CLUTTER = DataConfig("digitclutter", clutter=ClutterConfig(2), clutter_sizes=(20, 10))

few = settings(max_examples=50, deadline=None)
RATES = (Steps(), Steps(()), Steps(((0.25, 0.1),)), Cosine())
CHOICES = {  # built inside the tests: checking annotations draws from Python's random numbers
    "blocks": [(1, 1), (2, 1), (3, 3)],
    "bias": [False, True],
    "limit": [None, Limit(), Limit(0.5, 8), Limit(norm="allowed")],
    "step": [None, Explicit(0.5), RungeKutta(RK4), Verlet(0.1)],
    "rate": RATES,
    "penalty": [None, Penalty(variation=0.1)],
    "coupling": [None, Coupling(), Coupling(0.5, rate=Cosine()), Coupling((0.5, 1.0))],
    "data": [DataConfig("mnist"), DataConfig("digits", 5, shuffled=True), CLUTTER],
    "probes": [(), ("pairs",), ("pairs", "drops")],
}
choices = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in CHOICES.items()}
    | {"lr": st.floats(1e-4, 1.0), "weight_decay": st.floats(0, 1e-2), "seed": st.integers(0, 3)}
)


def made(chosen: dict[str, Any]) -> Run:
    def of(kind: type) -> dict[str, Any]:
        return {f.name: chosen[f.name] for f in fields(kind) if f.name in chosen and f.name != "seed"}

    network, training = ResNetConfig(**of(ResNetConfig), widths=(4, 8)), TrainConfig(**of(TrainConfig))
    return Run(network, chosen["data"], training, chosen["probes"], seed=chosen["seed"])


@few
@given(choices)
def test_a_run_is_what_it_is_described_as(chosen: dict[str, Any]) -> None:
    run = made(chosen)
    again = Run.from_description(json.loads(json.dumps(run.describe())))
    assert again == run
    assert again.key == run.key
    whole = described(run) | {"kind": "network", "format": 1}
    assert Run.from_description(json.loads(json.dumps(whole))) == run, "with every default written"


@few
@given(choices, choices)
def test_equal_runs_have_equal_keys_and_others_other_ones(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = made(one), made(other)
    assert (a == b) == (a.key == b.key)


@few
@given(choices, st.randoms())
def test_a_key_does_not_depend_on_order_or_on_how_a_number_is_written(chosen: dict[str, Any], chance: Any) -> None:
    run = made(chosen)

    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            pairs = [(key, shuffled(part)) for key, part in value.items()]
            chance.shuffle(pairs)
            return dict(pairs)
        if isinstance(value, list):
            return [shuffled(part) for part in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    assert key_of(shuffled(run.describe())) == key_of(run.describe())


# Of every field of every kind of settings another value; a field that is added must be added here.
FULL = replace(
    TINY,
    model=replace(TINY.model, sharing=UBN, limit=Limit(), blocks=(9, 9)),
    data=replace(CLUTTER, train=5),
    training=replace(TINY.training, coupling=Coupling(0.5), penalty=Penalty(magnitude=0.1)),
)
OTHER = {
    "model.blocks": (9, 8),
    "model.widths": (4, 8),
    "model.channels": 3,
    "model.classes": 7,
    "model.transition": "projection",
    "model.head": "pool",
    "model.bias": True,
    "model.stem": 5,
    "model.cells": 2,
    "model.norm": "none",
    "model.sharing": None,
    "model.sharing.free": 4,
    "model.sharing.statistics": "shared",
    "model.sharing.affine": "shared",
    "model.sharing.gamma": 0.2,
    "model.sharing.everywhere": True,
    "model.alike": 0.5,
    "model.relaxed": 0.5,
    "model.reversible": True,
    "model.limit": None,
    "model.limit.bound": 0.5,
    "model.limit.size": 8,
    "model.limit.norm": "allowed",
    "model.step": Explicit(0.5),
    "data.name": "mnist",
    "data.train": 6,
    "data.test": 5,
    "data.shuffled": True,
    "data.clutter": None,
    "data.clutter.digits": 3,
    "data.clutter.debris": "light",
    "data.clutter.grey": "overflow",
    "data.clutter.seed": 1,
    "data.clutter_sizes": (20, 11),
    "data.sha256": "0" * 64,
    "training.epochs": 3,
    "training.batch": 24,
    "training.lr": 0.2,
    "training.rate": Cosine(),
    "training.rate.at": ((0.5, 0.1),),
    "training.optimiser": "adam",
    "training.momentum": 0.8,
    "training.weight_decay": 0.0,
    "training.clip": 1.0,
    "training.accumulate": 2,
    "training.precision": "bfloat16",
    "training.augment": "crop_flip",
    "training.coupling": None,
    "training.coupling.strength": 0.25,
    "training.coupling.couple": "all",
    "training.coupling.reduce": "sum",
    "training.coupling.rate": Cosine(),
    "training.coupling.rate.at": ((0.5, 0.1),),
    "training.test_every": 2,
    "training.penalty": None,
    "training.penalty.divergence": 0.1,
    "training.penalty.jacobian": 0.1,
    "training.penalty.magnitude": 0.2,
    "training.penalty.variation": 0.1,
    "training.penalty.power": 1.0,
    "training.penalty.squashed": False,
    "training.penalty.probes": 2,
    "training.penalty.draws": "gaussian",
    "probes": ("pairs",),
    "probe_limit": None,
    "watch": ("recalibration",),
    "probe_train": True,
    "seed": 4,
}
WITH = {  # what must change together with a field, or the settings would refuse themselves
    "model.norm": {"model.sharing": NAIVE, "model.limit": None},
    "model.alike": {"model.sharing": None},
    "model.reversible": {"model.sharing": None, "model.limit": None, "model.step": Verlet(0.1)},
    "model.sharing.statistics": {"model.limit": None},
    "model.sharing.affine": {"model.limit": None},
    "data.name": {"data.clutter": None, "data.clutter_sizes": DataConfig.clutter_sizes},
    "data.clutter": {"data.name": "digits", "data.clutter_sizes": DataConfig.clutter_sizes},
    "data.sha256": {"data.name": "x.npz", "data.clutter": None, "data.clutter_sizes": DataConfig.clutter_sizes},
}


def paths(value: Any, before: str = "") -> Iterator[str]:
    for field in fields(value):
        yield before + field.name
        part = getattr(value, field.name)
        if is_dataclass(part):
            yield from paths(part, f"{before}{field.name}.")


def changed(value: Any, changes: dict[str, Any]) -> Any:
    """Settings with other values at some paths, all at once, so that they are checked together only."""
    own: dict[str, Any] = {path: new for path, new in changes.items() if "." not in path}
    for name in {path.partition(".")[0] for path in changes if "." in path}:
        inner = {path.partition(".")[2]: new for path, new in changes.items() if path.startswith(f"{name}.")}
        own[name] = changed(getattr(value, name), inner)
    return replace(value, **own)


def test_no_field_is_forgotten_here() -> None:
    assert set(paths(FULL)) - {"model", "data", "training", "training.seed"} == set(OTHER)


@pytest.mark.parametrize("path", OTHER)
def test_a_key_depends_on_every_field(path: str) -> None:
    base = FULL
    if path == "data.sha256":
        base = changed(FULL, WITH[path] | {path: "1" * 64})
    elif path not in ("data.name", "data.clutter"):
        base = changed(FULL, WITH.get(path, {}))
    other = changed(base, WITH.get(path, {}) | {path: OTHER[path]})
    assert other != base
    assert other.key != base.key


def test_a_key_does_not_depend_on_what_has_no_effect(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    a, b = (write_npz(tmp_path / folder / f"{folder}.npz") for folder in ("a", "b"))
    c = write_npz(tmp_path / "c.npz", classes=np.array(["one", "two", "three"]))
    keys = [replace(TINY, data=DataConfig(str(path))).key for path in (a, b, c)]
    assert keys[0] == keys[1] != keys[2], "the place of a file does not count, its content does"
    bare = replace(TINY, probes=())
    assert replace(bare, probe_limit=7).key == bare.key, "nothing is measured"
    assert key_of(described((np.int64(3), np.float64(0.1), np.bool_(True)))) == key_of([3, 0.1, True])
    assert key_of({"a": 1.0, "b": -0.0}) == key_of({"b": 0, "a": 1}) != key_of({"a": 1})


def test_a_place_is_one_for_every_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "mine.npz")
    monkeypatch.chdir(tmp_path)
    config = DataConfig("mine.npz")
    monkeypatch.chdir("/")
    assert config.load(seed=0, root=None, made=tmp_path).train.sha256 == config.sha256
    write_npz(tmp_path / "mine.npz", classes=np.array(["one", "two", "three"]))
    with pytest.raises(ValueError, match=r"mine.npz has changed: its SHA-256 is .*, it was"):
        config.load(seed=0, root=None, made=tmp_path)


def test_keys_stay_what_they_are() -> None:
    """A run is found again by its key: one that changes loses every run that was made before."""
    assert TINY.key == "7a536515a10be16a"
    assert replace(FULL, training=replace(FULL.training, penalty=None)).key == "a325e47ce17b9ab2"
    assert FULL.key == "b67ab837179ac209"
    assert Run(ResNetConfig(), DataConfig("mnist")).key == "4ad08df057e52ca9"


@pytest.mark.slow
def test_keys_are_those_of_another_process() -> None:
    code = "import test_runs as t; print(t.TINY.key, t.FULL.key)"
    place = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": place}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [TINY.key, FULL.key]


STEPS_RATE = {"kind": "Steps", "at": [[0.5, 0.1], [0.75, 0.01]]}
GMRES_DEFAULTS = {"kind": "GMRES", "tol": 1e-3, "max_steps": 60, "restart": 20}
DEFAULTS = {
    ResNetConfig: {"blocks": [2, 2, 2], "widths": [16, 32, 64], "channels": 3, "classes": 10, "transition": "separate"}
    | {"head": "norm", "bias": False, "stem": None, "cells": 1, "norm": "batch", "sharing": None, "alike": 0.0}
    | {"relaxed": None, "limit": None, "step": None, "reversible": False},
    TrainConfig: {"epochs": 20, "batch": 64, "lr": 0.1, "rate": STEPS_RATE, "optimiser": "sgd", "momentum": 0.9}
    | {"clip": None, "weight_decay": 1e-4, "accumulate": 1, "precision": "float32", "augment": "none"}
    | {"coupling": None, "penalty": None, "test_every": 1, "seed": 0},
    Sharing: {"free": 5, "statistics": "unshared", "affine": "unshared", "gamma": 0.1, "everywhere": False},
    Limit: {"bound": 1.0, "size": 32, "norm": "clipped"},
    Penalty: {"divergence": 0.0, "jacobian": 0.0, "magnitude": 0.0, "variation": 0.0, "power": 0.0, "squashed": True}
    | {"probes": 1, "draws": "signs"},
    Coupling: {"strength": 1.0, "couple": "weights", "reduce": "mean", "rate": {"kind": "Steps", "at": []}},
    ClutterConfig: {"digits": 3, "debris": "none", "grey": "float", "seed": 0},
    Steps: STEPS_RATE,
    Explicit: {"dt": 1.0},
    Theta: {"theta": 0.5, "dt": 1.0, "form": "two_point", "start": "euler", "param_grad": "exact", "adjoint": None}
    | {"solver": {"kind": "Anderson", "tol": 1e-6, "max_steps": 50, "memory": 5}},
    Verlet: {"dt": 1.0, "form": "symplectic"},
    Leapfrog: {"dt": 1.0},
    Midpoint: {"dt": 1.0},
    Momentum: {"gamma": 0.9},
    Picard: {"tol": 1e-6, "max_steps": 100},
    Anderson: {"tol": 1e-6, "max_steps": 50, "memory": 5},
    NewtonKrylov: {"tol": 1e-6, "max_steps": 20, "linear": GMRES_DEFAULTS},
    Neumann: {"tol": 1e-6, "max_steps": 100},
    GMRES: {"tol": 1e-6, "max_steps": 100, "restart": 20},
    BiCGStab: {"tol": 1e-6, "max_steps": 200},
    GradientDescent: {"tol": 1e-6, "max_steps": 200, "rate": 0.25},
    Dense: {"tol": 1e-6, "max_steps": 64},
}
NEED_ALL = {Cosine, Additive, Tableau, PartitionedTableau, RungeKutta, DataConfig, Run}  # tested below, or no defaults


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_stay_what_they_are(kind: type) -> None:
    """Defaults are left out of keys, so a default that changes gives old keys to other runs: raise FORMAT then.

    New fields may come, with a default that is what was done before.
    """
    contains(described(kind()), DEFAULTS[kind])


def contains(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if isinstance(value, dict):
            contains(found[name], value)
        else:
            assert found[name] == value, name


def test_defaults_of_a_run_stay_what_they_are() -> None:
    data = {"train": None, "test": None, "shuffled": False, "clutter": None, "clutter_sizes": [100_000, 10_000]}
    run = {
        "data": data | {"sha256": ""},
        "probes": [],
        "probe_limit": 1000,
        "seed": 0,
        "watch": [],
        "probe_train": False,
    }
    run |= {"probe_train": False, "watch": []}
    contains(described(Run(ResNetConfig(), DataConfig("mnist"))), run | {"training": {"kind": "TrainConfig"}})
    assert set(runs._KINDS) == DEFAULTS.keys() | NEED_ALL, "every kind of settings is pinned"


def test_a_field_that_is_added_with_a_default_changes_no_key() -> None:
    @dataclass(frozen=True)
    class Old:
        a: int = 1

    @dataclass(frozen=True)
    class New:
        a: int = 1
        b: tuple[int, ...] = (2,)

    New.__name__ = "Old"
    for a in (1, 5):
        assert described(New(a), defaults=False) == described(Old(a), defaults=False)
        assert rebuilt(described(Old(a)), [New]) == New(a)
    assert described(New(b=(3,)), defaults=False) != described(Old(), defaults=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig("minst"), "unknown data 'minst'; did you mean 'mnist'"),
        (lambda: DataConfig("mnist", sha256="0"), "sha256 is for a file FILE.npz, not for mnist"),
        (lambda: DataConfig("digitclutter"), "give both or none"),
        (lambda: DataConfig("mnist", clutter=ClutterConfig()), "give both or none"),
        (lambda: DataConfig("mnist", clutter_sizes=(5, 5)), "clutter_sizes is for 'digitclutter'"),
        (lambda: DataConfig("mnist", train=0), "must be at least 1"),
        (lambda: replace(TINY, training=TrainConfig(seed=1)), "training.seed is 1; leave it 0"),
        (lambda: replace(TINY, watch=("readouts",)), "unknown thing to watch .readouts.; did you mean .readout."),
        (lambda: replace(TINY, probes=(), probe_train=True), "probe_train measures training images, too; give probes"),
        (lambda: replace(TINY, seed=-1), r"seed \(-1\) must be 0 or more"),
        (lambda: replace(TINY, probe_limit=0), r"probe_limit \(0\) at least 1"),
        (lambda: replace(TINY, probes=("all",)), "give their names"),
        (lambda: replace(TINY, probes=("pair",)), "unknown probe 'pair'; did you mean 'pairs'"),
        (lambda: replace(TINY, training=TrainConfig(lr=float("inf"))), "lr"),
        (lambda: Settings(threads=0), r"threads \(0\)"),
        (lambda: Run.from_description(TINY.describe() | {"format": 2}), "of format 2; this code reads 'network' of"),
        (lambda: Run.from_description(TINY.describe() | {"kind": "x"}), "a 'x' of format 1"),
        (lambda: Run.from_description(TINY.describe() | {"sed": 1}), "Run has no 'sed'"),
        (lambda: Run.from_description({"kind": "network", "format": 1}), "Run needs 'model', which is not given"),
        (lambda: described(torch.float32), "is a dtype; settings are"),
        (lambda: canonical({"a": float("nan")}), "not JSON compliant"),
    ],
)
def test_what_is_wrong_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*x.npz"):
        DataConfig(str(tmp_path / "x.npz"))


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_is_what_its_steps_by_hand_give(tmp_path: Path) -> None:
    """The slow obvious twin: load, draw, build, train, calibrate, measure."""
    found = execute(TINY, tmp_path / "out")
    data = load_splits("digits")
    data = data._replace(train=data.train.balanced(50, seed=3), test=data.test.take(30, seed=0))
    model = ResNet(TINY.model, seed=3)
    history = train(model, data, replace(TINY.training, seed=3))
    assert without_seconds(found.history) == without_seconds(history)

    def given(images: Any, batch: int) -> Any:
        return batches(images, batch=batch, dtype=torch.float32)

    measured, start = data.test.take(20, seed=0), ResNet(TINY.model, seed=3).eval()
    calibrate_(start, given(data.train.take(50, seed=3), CALIBRATION_BATCH))
    for name, network in (("profile", model), ("initial", start)):
        by_hand = profile(network, given(measured, 64), [readouts])
        assert torch.equal(found.profile(name).examples, by_hand.examples)
        for quantity, measure in by_hand.measures.items():
            assert torch.equal(found.profile(name).measures[quantity].values, measure.values), (name, quantity)
    assert found.indices["measured"]["final_accuracy"] == by_hand_accuracy(model, measured)
    assert found.provenance["examples"] == 20
    assert found.provenance["training"]["images"] == 50


def by_hand_accuracy(model: torch.nn.Module, images: Any) -> float:
    ((x, y),) = batches(images, batch=100, dtype=torch.float32)
    return pytest.approx((model(x).argmax(1) == y).double().mean().item())


def test_a_run_folder_is_a_result_folder(tmp_path: Path) -> None:
    from residuum import report
    from residuum.loading import load_model

    found = execute(TINY, tmp_path / "out")
    loaded = load_model(str(found.folder))
    assert loaded.model.config == TINY.model
    assert loaded.training["history"] == found.history
    report.write([found.folder], tmp_path / "page.html")
    assert TINY.key in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_labels_are_shuffled_with_the_seed_of_the_run(tmp_path: Path) -> None:
    run = replace(TINY, data=replace(TINY.data, shuffled=True), probes=())
    found = execute(run, tmp_path)
    assert found.provenance["training"]["labels"] == "shuffled, seed 3"
    a, b = (run.data.load(seed=seed, root=None, made=tmp_path).train.labels for seed in (3, 3))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match=rf"the run {run.key} has no profile.safetensors; it has config.json"):
        found.profile()
    with pytest.raises(ValueError, match=r"has no values.json"):
        _ = found.values


def test_what_is_watched_and_measured_besides_changes_nothing_else(tmp_path: Path) -> None:
    plain = execute(TINY, tmp_path)
    run = replace(TINY, watch=tuple(runs.WATCHED), probe_train=True)
    found = execute(run, tmp_path)
    assert run.key != TINY.key
    added = {"curves", "watched", "train_gradient_ratio", "test_gradient_ratio"}
    added |= {"recalibrated_test_loss", "recalibrated_test_accuracy"}
    for ours, theirs in zip(found.history, plain.history, strict=True):
        assert ours.keys() - theirs.keys() == added
        assert all(ours[name] == theirs[name] for name in theirs.keys() - {"seconds"})
    assert found.indices == plain.indices
    data = run.data.load(seed=run.seed, root=None, made=tmp_path)
    model = load_model(str(found.folder)).model.eval()
    given = batches(data.train.take(run.probe_limit, seed=0), batch=64, dtype=torch.float32)
    by_hand = profile(model, given, [readouts])
    assert torch.equal(found.profile("train").measures["loss"].values, by_hand.measures["loss"].values)
    with pytest.raises(ValueError, match=r"has no train.safetensors"):
        plain.profile("train")


def test_made_data_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def write(path: Path, *given: Any, **more: Any) -> None:
        calls.append(path)
        original(path, *given, **more)

    original = runs.write_digitclutter
    monkeypatch.setattr(runs, "write_digitclutter", write)
    for seed in (0, 1):
        data = CLUTTER.load(seed=seed, root=None, made=tmp_path / "data")
        assert (len(data.train), len(data.test), data.train.labels.shape[1]) == (20, 10, 10)
    replace(CLUTTER, clutter_sizes=(21, 10)).load(seed=0, root=None, made=tmp_path / "data")
    assert len(calls) == len(set(calls)) == 2
    assert sorted((tmp_path / "data").iterdir()) == sorted(calls), "no lock is left"


def test_finished_runs_are_read_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finished(TINY, tmp_path) is None
    first = execute(TINY, tmp_path)
    monkeypatch.setattr(Run, "execute", lambda *_: pytest.fail("carried out again"))
    assert execute(TINY, tmp_path, Settings(batch=7)) == finished(TINY, tmp_path) == first
