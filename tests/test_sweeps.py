"""Sweeps: which runs there are, what is refused before anything starts, each run once whatever it does."""

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from datafiles import write_npz
from fakejobs import EACH, Fake, executions
from residuum import runfolders, sweeps, worker
from residuum.cli import main
from residuum.engines import orders, pool, workers
from residuum.engines.pool import Pool
from residuum.engines.ray import Ray
from residuum.engines.slurm import Slurm
from residuum.engines.workers import Doing, Each, Ended, Tell, Worker
from residuum.jobs import Settings
from residuum.layers.coupling import Coupling
from residuum.loading import returned
from residuum.models import ResNetConfig
from residuum.runs import DataConfig, Run
from residuum.sweeps import Outcome, checked, grid, labels, sweep
from residuum.training import TrainConfig

RUN = Run(ResNetConfig((1, 1), (4, 8), channels=1), DataConfig("digits"), TrainConfig(epochs=1))


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.KINDS, Fake.kind, Fake)


# Which runs


def test_a_grid_is_every_combination_in_order() -> None:
    runs = grid(RUN, {"training.coupling": [None, Coupling(0.9)], "training.lr": (0.1, 0.2), "seed": range(3)})
    assert len({run.key for run in runs}) == len(runs) == 12
    assert [run.seed for run in runs[:4]] == [0, 1, 2, 0]
    assert runs[-1] == replace(RUN, training=replace(RUN.training, coupling=Coupling(0.9), lr=0.2), seed=2)
    assert grid(RUN, {}) == [RUN]
    # settings that are checked together are changed together
    (wider,) = grid(RUN, {"model.blocks": [(1, 1, 1)], "model.widths": [(4, 8, 8)]})
    assert (wider.model.blocks, wider.model.widths) == ((1, 1, 1), (4, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.lrr": [1]}, r"unknown setting 'training.lrr'; did you mean 'training.lr'"),
        ({"sed": [1]}, "unknown setting 'sed'; did you mean 'seed'"),
        ({"seed": []}, "seed has no values"),
        ({"training.coupling.strength": [1]}, "training.coupling is None and has no settings; give it as a whole"),
        ({"training": [TrainConfig()], "training.lr": [1]}, "training is given as a whole and in part"),
        ({"training.lr": [-1.0]}, "lr"),
    ],
)
def test_grids_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(RUN, changes)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([], "there are no runs"),
        (RUN, "is not a list of runs"),
        (None, "None is not a list of runs"),
        ([RUN, Run], "number 1 of the runs is <class 'residuum.runs.Run'>; a run is one of network"),
        ([SimpleNamespace(kind=["network"])], r"number 0 of the runs is namespace\(kind=.*; a run is one of network"),
        ([RUN, "mnist"], "number 1 of the runs is 'mnist'; a run is one of network"),
        ([RUN, replace(RUN, seed=1), replace(RUN)], r"the runs 0 and 2 are equal \(counted from 0\): Run"),
    ],
)
def test_what_is_not_a_list_of_runs_is_refused(jobs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(jobs)


def test_a_run_that_would_come_out_of_its_file_as_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "describe", lambda self: {"kind": "fake", "format": 1, "act": self.act})  # without seed
    assert checked([Fake(0)])
    monkeypatch.setattr(Fake, "from_description", classmethod(lambda cls, given: cls(act="hang")))
    with pytest.raises(ValueError, match="does not survive being written"):
        checked([Fake(0)])


def test_the_example_is_six_runs() -> None:
    runs = checked(returned(f"{Path(__file__).parents[1] / 'examples' / 'sweep.py'}:depths"))
    assert len(runs) == 6
    assert list(labels(runs).values())[3] == "blocks=4,4,4 seed=1"


def test_labels_say_what_differs() -> None:
    runs = grid(RUN, {"training.lr": [0.1, 0.2], "seed": [0, 1]})
    assert list(labels(runs).values()) == ["lr=0.1 seed=0", "lr=0.1 seed=1", "lr=0.2 seed=0", "lr=0.2 seed=1"]
    assert labels([RUN]) == {RUN.key: RUN.key}
    assert list(labels(grid(RUN, {"model.blocks": [(1, 1), (2, 2)]})).values()) == ["blocks=1,1", "blocks=2,2"]


# The command refuses before anything starts

FILE = """
from residuum import Run, DataConfig, ResNetConfig
run = Run(ResNetConfig((1, 1), (4, 8), channels=1), DataConfig("digits"))
def study(): return [run]
def none(): return []
def twice(): return [run, run]
def network(): return ResNetConfig((1, 1), (4, 8))
def one(): return run
def mistyped():
    return [Run(run.model, run.data, probes=("readout",))]
def broken(): return 1 / 0
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["FILE:none"], "there are no runs"),
        (["FILE:twice"], "the runs 0 and 1 are equal"),
        (["FILE:network"], "is not a list of runs"),
        (["FILE:one"], r"^residuum: .{100,210} \.\.\. is not a list of runs; return runs"),
        (["FILE:mistyped"], "unknown probe 'readout'; did you mean 'readouts'"),
        (["FILE:broken"], "failed with ZeroDivisionError"),
        (["FILE:studdy"], "unknown function 'studdy'; did you mean 'study'"),
        (["FILE"], "names no function; write path/to/file.py:function"),
        (["missing.py:study"], "no such file: missing.py"),
        (["FILE:study", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["FILE:study", "--engine", "slurm", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["FILE:study", "--time-limit", "0"], "the time limit is 0.0 minutes; it must be above 0"),
        (["FILE:study", "--memory", "-1"], "the memory of a run is -1.0 GB"),
        (["FILE:study", "--gpu", "1.5"], "the share of a GPU is 1.5"),
        (["FILE:study", "--gpu", "0.5", "--workers", "3"], "3 workers with 0.5 GPUs each need 2; torch sees 0 here"),
        (["FILE:study", "--engine", "ray"], r"needs Ray, which is not installed: pip install 'residuum\[cluster\]'"),
        (["FILE:study", "--engine", "slurm"], r"needs submitit, which is not installed: pip install"),
        (["FILE:study", "--out", "FOREIGN"], r"holds other files \(thesis.tex\)"),
        (["FILE:study", "--out", "FOREIGN/thesis.tex/out"], "thesis.tex is a file"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "study.py").write_text(FILE)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".partial-x").touch()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for module in ("ray", "slurm"):
        monkeypatch.setattr(f"residuum.engines.{module}.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    places = {"FILE": str(tmp_path / "study.py"), "FOREIGN": str(tmp_path / "foreign")}
    words = [re.sub("FILE|FOREIGN", lambda found: places[found[0]], word) for word in given]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(["sweep", *words, *out]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()
    assert {path.name for path in (tmp_path / "foreign").iterdir()} == {".partial-x", "thesis.tex"}


def test_slurm_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residuum.engines.slurm.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="needs sbatch and srun, which are not on this machine; use a login node"):
        Slurm(tmp_path, each=Each(minutes=1.0)).check()
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(ValueError, match="must know how long a run may take; give a time limit"):
        Slurm(tmp_path).check()
    with pytest.raises(ValueError, match=r"Slurm gives whole GPUs, not 0.5"):
        Slurm(tmp_path, each=Each(minutes=1.0, gpu=0.5)).check()
    with pytest.raises(ValueError, match="workers is 0"):
        Slurm(tmp_path, workers=0)
    Slurm(tmp_path, each=Each(minutes=1.0, gpu=2.0)).check()


def test_ray_refuses_what_would_wait_for_ever() -> None:
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1, or None"):
        Ray(0)
    with pytest.raises(ValueError, match="a run needs 1 GPU, the Ray cluster has 0"):
        Ray(each=Each(gpu=1.0))._check_room({"CPU": 8.0})
    with pytest.raises(ValueError, match=r"a run needs 2.14748e\+09 memory, the Ray cluster has 1e\+09"):
        Ray(each=Each(memory=2.0))._check_room({"CPU": 8.0, "memory": 1e9})


# What comes next


def test_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "BUSY", 0.05)
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        folder.mkdir()
    told: list[Any] = []
    some = orders.Orders([a, b, c], lambda *news: told.append(news))
    assert some.some(2) == [a, b]
    some.heard(a, Doing(1, 2))
    some.heard(a, Ended("busy"))  # another sweep has it: later again, after those that are due
    some.heard(b, Ended("failed", "killed", "SIGKILL"))  # once more, after the others
    assert some.some(5) == [c]
    assert some.some(5) == []
    assert some.left == 3
    start = monotonic()
    while not (due := some.some(5)):
        assert monotonic() - start < 10
    assert due == [a, b] or due == [a]
    some.heard(a, Ended("complete"))
    some.heard(b, Ended("failed", "killed", "SIGKILL"))
    some.heard(c, Ended("failed", "time limit", "too long"))
    assert some.left == 0
    assert [(folder.name, getattr(news, "state", "")) for folder, news in told] == [
        ("a", ""),
        ("a", "complete"),
        ("b", "failed"),
        ("c", "failed"),
    ]
    assert runfolders.stand(b) == runfolders.Standing("failed", "killed: SIGKILL")
    assert runfolders.stand(c) == runfolders.Standing("failed", "time limit: too long")


class Memory(Worker):
    """A worker as the memory of a pool sees it."""

    def __init__(self, peak: int, resident: int, running: bool) -> None:
        self.peak, self._resident, self.folder = peak, resident, Path("run") if running else None

    def resident(self) -> int:
        return self._resident


@pytest.mark.parametrize(
    ("free", "first", "least", "room"),
    [
        (10, (0, 0, True), 0, True),  # nothing is known yet
        (5, (4, 4, True), 0, True),  # the run that goes on has all it needs, ours fits
        (3, (4, 4, True), 0, False),
        (6, (4, 1, True), 0, False),  # it will take 3 more, and 4 of 3 are not left
        (7, (4, 1, True), 0, True),
        (0, (4, 4, False), 0, True),  # alone, a run always starts: waiting would not help
        (3, (0, 0, True), 4, False),  # what it is said to need
        (None, (9, 9, True), 9, True),  # the system does not tell
    ],
)
def test_a_run_waits_for_memory(
    free: int | None, first: tuple[int, int, bool], least: int, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = 2**30
    monkeypatch.setattr(pool, "available", lambda: None if free is None else free * unit)
    other, mine = Memory(first[0] * unit, first[1] * unit, first[2]), Memory(0, 0, False)
    assert Pool(2, Each(memory=float(least)))._has_room(mine, [other, mine]) is room


def test_what_a_worker_holds_is_its_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "available", lambda: 2)
    other, mine = Memory(4, 4, True), Memory(4, 2, False)
    assert Pool()._has_room(mine, [other, mine])


def test_workers_share_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = [card["CUDA_VISIBLE_DEVICES"] for card in Pool(4, Each(gpu=0.5))._cards()]
    assert cards == ["0", "0", "1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [card["CUDA_VISIBLE_DEVICES"] for card in Pool(2, Each(gpu=1.0))._cards()] == ["5", "7"]
    assert Pool(1, Each(gpu=2.0))._cards() == [{"CUDA_VISIBLE_DEVICES": "5,7"}]
    # a share that does not divide a card leaves the rest of it unused: nobody has parts of two cards
    assert [card["CUDA_VISIBLE_DEVICES"] for card in Pool(4, Each(gpu=0.4))._cards()] == ["5", "5", "7", "7"]
    with pytest.raises(ValueError, match=r"5 workers with 0.5 GPUs each need 3; torch sees 2 here"):
        Pool(5, Each(gpu=0.5)).check()


# One worker: programs that speak its protocol without importing torch

SPEAK = "import sys, json, os, time\nsay = lambda **said: print(json.dumps(said), flush=True)\n"


def _worker(tmp_path: Path, program: str, minutes: float | None = None) -> Worker:
    file = tmp_path / "program.py"
    file.write_text(SPEAK + program)
    return Worker(Each(minutes, program=(str(file),)))


def _until_end(worker: Worker) -> tuple[list[Doing], Ended]:
    heard: list[Doing] = []
    start = monotonic()
    while not isinstance(news := worker.poll(0.1), Ended):
        assert monotonic() - start < 60
        heard += [news] if news else []
    return heard, news


def test_a_worker_serves_many_runs_with_one_thread(tmp_path: Path) -> None:
    program = "for line in sys.stdin: say(); say(done=1, total=2, text=os.environ['OMP_NUM_THREADS']); "
    worker = _worker(tmp_path, program + "say(state='failed', kind='raised', message=f'{os.getpid()} {line.strip()}')")
    try:
        ends = []
        for run in ("a", "b"):
            worker.order(tmp_path / run)
            assert worker.folder == tmp_path / run
            ends.append(_until_end(worker)[1])
            assert worker.folder is None
        pids = {end.message.split()[0] for end in ends}
        assert [Path(end.message.split()[1]).name for end in ends] == ["a", "b"]
        assert len(pids) == 1
        assert worker.peak > 2**20
        os.kill(int(*pids), 9)  # between two runs: nothing is lost, the next one has a new process
        os.waitid(os.P_PID, int(*pids), os.WEXITED | os.WNOWAIT)
        worker.order(tmp_path / "c")
        assert _until_end(worker)[1].message.split()[0] not in pids
    finally:
        worker.stop()
    assert worker.resident() == 0


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("input(); say(); os.kill(os.getpid(), 9)", "killed", "its worker was ended by SIGKILL"),
        ("input(); say(); os._exit(3)", "killed", "its worker ended with exit code 3"),
        ("input(); say(); time.sleep(99)", "time limit", "it took longer than 0.01 minutes"),
    ],
)
def test_how_a_worker_can_end(program: str, kind: str, message: str, tmp_path: Path) -> None:
    worker = _worker(tmp_path, program, 0.01)
    try:
        worker.order(tmp_path / "a")
        assert _until_end(worker)[1] == Ended("failed", kind, message)
    finally:
        worker.stop()


def test_a_worker_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.3)
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); input(); say(); time.sleep(9999)"
    worker = _worker(tmp_path, program, 0.01)
    worker.order(tmp_path / "a")
    assert _until_end(worker)[1].kind == "time limit"


def test_workers_that_cannot_start(tmp_path: Path) -> None:
    worker = _worker(tmp_path, "raise ImportError('no torch here')")
    worker.order(tmp_path / "a")
    with pytest.raises(OSError, match=r"workers cannot start: .* exit code 1: ImportError: no torch here"):
        _until_end(worker)
    worker.stop()


@pytest.mark.parametrize("values", [{"minutes": 0.0}, {"minutes": math.inf}, {"memory": -1.0}, {"gpu": -0.5}])
def test_settings_of_engines_check_themselves(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|time limit is"):
        Each(**values)


# What a worker does with one folder, in this process


def _begun(job: Fake, out: Path) -> Path:
    folder = runfolders.prepare(out) / job.key
    sweeps._begin(job, folder, Settings(data_root=Path("data")))
    return folder


def test_a_worker_leaves_alone_what_another_process_does(tmp_path: Path) -> None:
    folder = _begun(Fake(), tmp_path / "out")
    with runfolders.locked(folder):
        assert worker.carry_out(folder, lambda said: None) == {"state": "busy"}
    said: list[dict[str, Any]] = []
    assert worker.carry_out(folder, said.append) == {"state": "complete"}
    assert said[:2] == [{}, {"done": 1, "total": 10, "text": "step 1"}]
    assert str(Path("data").absolute()) in (tmp_path / "out" / "executions.txt").read_text()
    assert worker.carry_out(folder, said.append) == {"state": "complete"}
    assert len(executions(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("act", "kind", "message", "state"),
    [
        ("raise", "raised", "RuntimeError: this run cannot work", "failed"),
        ("nan", "not finite", "FloatingPointError: the loss is nan", "failed"),
        ("exit", "raised", "SystemExit: the library gave up", "failed"),
        ("full", "place", "No space left on device", "half"),
    ],
)
def test_a_worker_says_why_a_run_failed(act: str, kind: str, message: str, state: str, tmp_path: Path) -> None:
    folder = _begun(Fake(act=act), tmp_path / "out")
    end = worker.carry_out(folder, lambda said: None)
    assert (end["state"], end["kind"]) == ("failed", kind)
    assert message in end["message"]
    assert runfolders.stand(folder).state == state
    assert "Traceback" in (folder / "log.txt").read_text()


def test_a_run_that_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    folder = _begun(Fake(), tmp_path / "out")
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"description": {"kind": "other"}}))
    end = worker.carry_out(folder, lambda said: None)
    assert (end["state"], end["kind"]) == ("failed", "raised")
    assert "other" in end["message"]
    assert runfolders.stand(folder).state == "failed"


# All together


def test_a_sweep_carries_out_each_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, engine = tmp_path / "out", Pool(2, EACH)
    good = [Fake(seed) for seed in range(6)]
    bad = [Fake(act=act) for act in ("raise", "nan", "full")]
    outcome = sweep([*good[:3], *bad, *good[3:]], out, engine, settings=Settings(data_root=tmp_path))
    assert outcome.counts == {"complete": 6, "failed": 2, "half": 1}
    assert outcome.before == 0
    assert outcome.reasons[bad[0].key] == "raised: RuntimeError: this run cannot work"
    assert outcome.reasons[bad[1].key] == "not finite: FloatingPointError: the loss is nan"
    assert "No space left" in outcome.reasons[bad[2].key]
    assert sorted(executions(out)) == sorted(job.key for job in [*good, *bad])
    lines = [line.split() for line in (out / "executions.txt").read_text().splitlines()]
    assert 1 <= len({pid for _, pid, _, _ in lines}) <= 2  # imports are paid once per worker
    assert {(threads, root) for _, _, threads, root in lines} == {("1", str(tmp_path))}

    damaged = out / "runs" / good[0].key / "values.json"
    damaged.write_text(damaged.read_text().replace("0", "1"))
    again = sweep([*good, *bad, Fake(7)], out, engine)  # what is new, half or damaged, and nothing else
    assert again.counts == {"complete": 8, "failed": 2}
    assert again.before == 5
    assert sorted(executions(out)[9:]) == sorted([good[0].key, bad[2].key, Fake(7).key])
    assert (out / "runs" / f"{good[0].key}.damaged-1").is_dir()
    assert json.loads((out / "runs" / bad[2].key / "values.json").read_text())["resumed"] == 5
    assert sweep(good, out, engine).counts == {"complete": 6}
    assert len(executions(out)) == 12


# In this process


class Here:
    """An engine of one worker that is this process."""

    def check(self) -> None:
        pass

    def run(self, folders: Sequence[Path], tell: Tell) -> None:
        for folder in folders:
            tell(folder, Ended(**worker.carry_out(folder, lambda said: None)))


def test_a_run_goes_on_where_its_file_is_now(tmp_path: Path) -> None:
    """The key is of the content; the worker reads the place from run.json."""

    def run(path: Path) -> Run:
        data, config = DataConfig(str(path)), TrainConfig(epochs=1, batch=6)
        return Run(ResNetConfig((1,), (4,), channels=3, classes=3), data, config)

    before = run(write_npz(tmp_path / "before.npz"))
    after = run((tmp_path / "before.npz").rename(tmp_path / "after.npz"))
    assert before.key == after.key
    assert sweep([before], tmp_path / "out", Here()).counts == {"half": 1}
    assert sweep([after], tmp_path / "out", Here()).counts == {"complete": 1}
    written = runfolders.read_object(tmp_path / "out" / "runs" / after.key / "run.json")
    assert written["description"]["data"]["name"] == written["settings"]["data"]["name"] == str(tmp_path / "after.npz")


def test_a_run_that_failed_in_one_sweep_is_not_repeated_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have it on their lists; the second comes to it when it has failed. Only --retry-failed tries it again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bad, found = Fake(act="raise"), []

    class Behind(Here):
        """Begins when another sweep has carried out the same runs."""

        def run(self, folders: Sequence[Path], tell: Tell) -> None:
            found.append(sweep([bad], tmp_path, Here()))
            super().run(folders, tell)

    found.append(sweep([bad], tmp_path, Behind()))
    assert found[0] == found[1] == Outcome({"failed": 1}, {bad.key: "raised: RuntimeError: this run cannot work"}, 0)
    assert executions(tmp_path) == [bad.key]
    assert sweep([bad], tmp_path, Here(), retry_failed=True) == found[0]
    assert executions(tmp_path) == [bad.key] * 2


def test_a_run_that_is_complete_when_tried_again_has_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = Fake(act="raise")
    failed = sweep([job], tmp_path, Here())
    assert sweep([job], tmp_path, Here()) == failed
    monkeypatch.setattr(Fake, "_act", lambda self, folder: None)
    assert sweep([job], tmp_path, Here(), retry_failed=True) == Outcome({"complete": 1}, {}, 0)
