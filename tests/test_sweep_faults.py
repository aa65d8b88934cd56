"""Faults of sweeps: workers, parents and machines that die, at any moment. Nothing finished is lost or repeated."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fakejobs import EACH, Fake, executions
from residuum import runfolders, worker
from residuum.engines import workers
from residuum.engines.pool import Pool
from residuum.sweeps import Outcome, sweep

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.KINDS, Fake.kind, Fake)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for something that must happen."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(out: Path) -> set[int]:
    """The workers so far."""
    path = out / "executions.txt"
    return {int(line.split()[1]) for line in path.read_text().splitlines()} if path.exists() else set()


def values(job: Fake, out: Path) -> dict[str, int]:
    return json.loads((out / "runs" / job.key / "values.json").read_text())


def parent(out: Path, jobs: list[Fake], count: int = 2) -> subprocess.Popen[str]:
    """A process of its own that sweeps."""
    program = f"""
    import sys
    sys.path.insert(0, {str(TESTS)!r})
    from pathlib import Path
    from fakejobs import EACH, Fake
    from residuum import worker
    from residuum.engines.pool import Pool
    from residuum.sweeps import sweep
    worker.KINDS["fake"] = Fake
    print(sweep({jobs!r}, Path({str(out)!r}), Pool({count}, EACH)).counts)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_worker_costs_one_more_try(tmp_path: Path) -> None:
    jobs = [Fake(0), Fake(1, "kill once"), Fake(2, "kill"), Fake(3)]
    outcome = sweep(jobs, tmp_path, Pool(2, EACH))
    assert outcome.counts == {"complete": 3, "failed": 1}
    assert outcome.reasons == {jobs[2].key: "killed: its worker was ended by SIGKILL"}
    assert Counter(executions(tmp_path)) == {jobs[0].key: 1, jobs[1].key: 2, jobs[2].key: 2, jobs[3].key: 1}
    assert values(jobs[1], tmp_path)["resumed"] == 5  # the second try went on where the first one was
    assert sweep(jobs, tmp_path, Pool(2, EACH)) == Outcome({"complete": 3, "failed": 1}, outcome.reasons, 3)
    again = sweep(jobs, tmp_path, Pool(2, EACH), retry_failed=True)
    assert again.counts == {"complete": 3, "failed": 1}
    assert Counter(executions(tmp_path))[jobs[2].key] == 4


@pytest.mark.slow
def test_runs_that_hang_are_ended_by_their_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.5)
    jobs = [Fake(0), Fake(1, "hang"), Fake(2, "deaf"), Fake(3)]
    outcome = sweep(jobs, tmp_path, Pool(2, replace(EACH, minutes=0.02)))
    assert outcome.counts == {"complete": 2, "failed": 2}
    assert set(outcome.reasons.values()) == {"time limit: it took longer than 0.02 minutes"}
    assert not any(alive(pid) for pid in pids(tmp_path))
    assert runfolders.stand(tmp_path / "runs" / jobs[1].key).state == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_parent_that_ends_takes_its_workers_along(how: signal.Signals, tmp_path: Path) -> None:
    """No worker goes on alone; the next sweep resumes what was begun, and repeats nothing that was finished."""
    jobs = [Fake(0), Fake(1), *(Fake(seed, seconds=8.0) for seed in range(2, 6))]
    sweeping = parent(tmp_path, jobs)
    steps = [tmp_path / "runs" / job.key / "checkpoint" for job in jobs[2:4]]
    until(lambda: all(file.exists() for file in steps))
    done = [job for job in jobs if (tmp_path / "runs" / job.key / "done.json").exists()]
    assert jobs[0] in done
    sweeping.send_signal(how)
    sweeping.communicate()
    until(lambda: not any(alive(pid) for pid in pids(tmp_path)), 30)
    begun = Counter(executions(tmp_path))
    halves = [job for job in jobs if (tmp_path / "runs" / job.key / "checkpoint").exists()]
    assert len(halves) == 2
    assert sweep(jobs, tmp_path, Pool(2, EACH)).counts == {"complete": 6}
    after = Counter(executions(tmp_path)) - begun
    assert set(after) == {job.key for job in jobs if job not in done}
    assert set(after.values()) == {1}
    assert all(values(job, tmp_path)["resumed"] >= 1 for job in halves)


def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path) -> None:
    jobs = [Fake(seed, seconds=1.0) for seed in range(10)]
    both = [parent(tmp_path, jobs), parent(tmp_path, list(reversed(jobs)))]
    ends = [sweeping.communicate(timeout=200) for sweeping in both]
    assert [out.strip() for out, _ in ends] == ["{'complete': 10}"] * 2, ends
    assert Counter(executions(tmp_path)) == {job.key: 1 for job in jobs}
    assert len(pids(tmp_path)) == 4  # of both sweeps


@pytest.mark.slow
def test_one_sweep_takes_over_from_another_that_dies(tmp_path: Path) -> None:
    jobs = [Fake(0, seconds=20.0)]
    first = parent(tmp_path, jobs, 1)
    until(lambda: (tmp_path / "runs" / jobs[0].key / "checkpoint").exists())
    second = parent(tmp_path, jobs, 1)
    (old,) = pids(tmp_path)
    time.sleep(1.0)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    out, _ = second.communicate(timeout=200)
    assert out.strip() == "{'complete': 1}"
    assert len(executions(tmp_path)) == 2
    assert pids(tmp_path) > {old}
    assert values(jobs[0], tmp_path)["resumed"] >= 1


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Writing begins to fail in the middle of the second of three runs, not even failed.json can be written."""
    jobs = [Fake(0), Fake(1, "full for all"), Fake(2)]
    outcome = sweep(jobs, tmp_path, Pool(1, EACH))
    assert outcome.counts == {"complete": 1, "half": 2}
    assert all("File too large" in reason for reason in outcome.reasons.values())
    assert not list(tmp_path.glob("runs/*/failed.json"))
    assert not list(tmp_path.glob("runs/*/.partial-*"))
    assert sweep(jobs, tmp_path, Pool(1, EACH)).counts == {"complete": 3}
    assert Counter(executions(tmp_path)) == {jobs[0].key: 1, jobs[1].key: 2, jobs[2].key: 1}


def test_results_of_another_version(tmp_path: Path) -> None:
    """Another version's result is used if its format is ours; of another format it is set aside and done again."""
    jobs = [Fake(0), Fake(1)]
    sweep(jobs, tmp_path, Pool(1, EACH))
    for job, changes in zip(jobs, ({"versions": {"residuum": "9.9"}}, {"format": 99}), strict=True):
        file = tmp_path / "runs" / job.key / "done.json"
        content = json.loads(file.read_text()) | changes
        content.pop("sha256")
        file.write_text(json.dumps(content | {"sha256": runfolders._sum(content)}))
    outcome = sweep(jobs, tmp_path, Pool(1, EACH))
    assert (outcome.counts, outcome.before) == ({"complete": 2}, 1)
    assert Counter(executions(tmp_path)) == {jobs[0].key: 1, jobs[1].key: 2}
    assert (tmp_path / "runs" / f"{jobs[1].key}.damaged-1").is_dir()


STUDY = """
from residuum import DataConfig, ResNetConfig, Run, TrainConfig, grid
network = ResNetConfig((1, 1), (4, 8), channels=1)
base = Run(network, DataConfig("digits", train=1000, test=200), TrainConfig(epochs=6, batch=20), ("perturbation",))
def study():
    return grid(base, {"seed": range(2)})
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "study.py").write_text(STUDY)
    return [sys.executable, "-m", "residuum.cli", "sweep", f"{tmp_path / 'study.py'}:study", "--out"]


@pytest.mark.slow
def test_networks_resume_with_the_same_bits(command: list[str], tmp_path: Path) -> None:
    """The command as users type it, stopped by Ctrl-C in the middle of a training, and given again."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = subprocess.run([*command, str(whole)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 complete (0 before)" in done.stdout

    running = subprocess.Popen([*command, str(stopped), "--workers", "1"], stderr=subprocess.PIPE, text=True)
    until(lambda: list(stopped.glob("runs/*/checkpoint")))
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command goes on" in said
    assert list(stopped.glob("runs/*/checkpoint"))
    assert not list(stopped.glob("runs/*/failed.json"))

    done = subprocess.run([*command, str(stopped), "--workers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logs = "".join(file.read_text() for file in stopped.glob("runs/*/log.txt"))
    assert "goes on from its checkpoint" in logs
    assert "begins anew" not in logs
    files = [file for name in ("weights", "profile") for file in whole.glob(f"runs/*/{name}.safetensors")]
    assert len(files) == 4
    for file in files:
        there = load_file(stopped / file.relative_to(whole))
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor, there[name], rtol=0, atol=0, equal_nan=True)
