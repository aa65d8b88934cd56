"""Sweeps: each run once, whatever it does; bad input refused before anything starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fakejobs import EACH, Fake, executions
from residuum import worker
from residuum.engines.pool import Pool
from residuum.sweeps import sweep


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.KINDS, Fake.kind, Fake)


def test_pool(tmp_path: Path) -> None:
    jobs = [Fake(seed) for seed in range(6)]
    outcome = sweep(jobs, tmp_path / "out", Pool(2, EACH))
    assert outcome.counts == {"complete": 6}
    assert sorted(executions(tmp_path / "out")) == sorted(job.key for job in jobs)
