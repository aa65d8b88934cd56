"""The engines of clusters: a real local Ray cluster of two nodes, and submitit with its local executor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakejobs import EACH, Fake, executions
from residuum import worker
from residuum.engines.ray import Ray
from residuum.engines.slurm import Carrier, Slurm
from residuum.runfolders import locked
from residuum.sweeps import sweep

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of Ray are not ours


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.KINDS, Fake.kind, Fake)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a local cluster leaves a token in the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@contextmanager
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A Ray cluster of two nodes with one processor each; the second one."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    def started() -> tuple[Any, Any]:
        cluster = Cluster()
        try:
            return cluster, [cluster.add_node(num_cpus=1) for _ in range(2)][1]
        except BaseException:
            cluster.shutdown()
            raise

    try:
        cluster, second = started()
    except Exception as error:  # Ray gives a node 30 seconds, which a busy machine may need for its imports alone
        if "timed out during startup" not in str(error):
            raise
        cluster, second = started()
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # as users say which cluster they mean
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()


def half_way(folder: Path) -> bool:
    return (folder / "checkpoint").exists() and len((folder / "checkpoint").read_text()) == 5


def test_ray_loses_a_node_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is killed while both are busy: its run goes on elsewhere, from its checkpoint, and no other is touched."""
    good = [Fake(seed, "wait", seconds=0.1) for seed in range(5)]
    bad = [Fake(act="raise"), Fake(act="kill")]
    folders = [tmp_path / "runs" / job.key for job in good]

    def free(folder: Path) -> bool:
        with locked(folder, wait=False) as mine:
            return mine

    with two_nodes(monkeypatch) as (cluster, second):

        def kill() -> None:
            # Each node has one processor, so two waiting runs are one on either. The others go on only when the run on
            # the lost node has ended: else it could still complete before the node is missed.
            while len(waiting := [f for f in folders if half_way(f)]) < 2:
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)
            while not any(free(folder) for folder in waiting):
                time.sleep(0.05)
            (tmp_path / "go").touch()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        outcome = sweep([*good, *bad], tmp_path, Ray(None, EACH))
        killer.join()
    assert outcome.counts == {"complete": 5, "failed": 2}
    assert outcome.reasons[bad[0].key] == "raised: RuntimeError: this run cannot work"
    assert outcome.reasons[bad[1].key] == "killed: its worker was ended by SIGKILL"
    counts = Counter(executions(tmp_path))
    assert sorted(counts[job.key] for job in good) == [1, 1, 1, 1, 2]
    (moved,) = [job for job in good if counts[job.key] == 2]
    assert json.loads((tmp_path / "runs" / moved.key / "values.json").read_text())["resumed"] == 5
    assert counts[bad[0].key] == 1
    assert counts[bad[1].key] == 2


def test_ray_starts_a_cluster_here_if_there_is_none(tmp_path: Path) -> None:
    """In a process of its own, as a cluster belongs to the process that started it."""
    pytest.importorskip("ray")
    jobs = [Fake(seed, seconds=1.0) for seed in range(4)]
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from fakejobs import EACH, Fake
from residuum import worker
from residuum.engines.ray import Ray
from residuum.sweeps import sweep
worker.KINDS["fake"] = Fake
if __name__ == "__main__":
    print(sweep({jobs!r}, Path({str(tmp_path)!r}), Ray(2, EACH)).counts)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{'complete': 4}"
    lines = (tmp_path / "executions.txt").read_text().splitlines()
    assert len(lines) == 4
    assert len({line.split()[1] for line in lines}) <= 2  # a worker stays for further runs


def test_slurm_with_local_jobs(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    jobs = [Fake(0), Fake(1, "raise"), Fake(2, "kill once"), Fake(3, "hang")]
    engine = Slurm(tmp_path / "slurm", each=replace(EACH, minutes=0.05), cluster="local")
    outcome = sweep(jobs, tmp_path, engine)
    assert outcome.counts == {"complete": 2, "failed": 2}
    assert outcome.reasons == {
        jobs[1].key: "raised: RuntimeError: this run cannot work",
        jobs[3].key: "time limit: it took longer than 0.05 minutes",
    }
    assert Counter(executions(tmp_path)) == {jobs[0].key: 1, jobs[1].key: 1, jobs[2].key: 2, jobs[3].key: 1}


def test_a_job_that_slurm_stops_is_queued_again(tmp_path: Path) -> None:
    """What submitit queues again after a time-out or for another's sake is the same call."""
    pytest.importorskip("submitit")
    again = Carrier(EACH).checkpoint("OUT/runs/key")
    assert again.function == Carrier(EACH)
    assert again.args == ("OUT/runs/key",)


def test_a_job_that_is_lost_is_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a job itself is killed, so that nobody can say what became of its run."""
    submitit = pytest.importorskip("submitit")
    job = Fake(0, seconds=60.0)
    engine = Slurm(tmp_path / "slurm", each=replace(EACH, minutes=5.0), cluster="local")

    def kill(self: Any) -> bool:
        if not (tmp_path / "runs" / job.key / "checkpoint").exists():
            return False
        controller = self._process.pid
        children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        for pid in (*map(int, children), controller):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return True

    monkeypatch.setattr(submitit.LocalJob, "done", kill)
    outcome = sweep([job], tmp_path, engine)
    assert outcome.counts == {"failed": 1}
    assert outcome.reasons[job.key].startswith("killed: ")
    (pid,) = [int(line.split()[1]) for line in (tmp_path / "executions.txt").read_text().splitlines()]
    start = time.monotonic()
    while Path(f"/proc/{pid}").exists():  # the run's worker does not go on without its job
        assert time.monotonic() - start < 60
        time.sleep(0.1)
