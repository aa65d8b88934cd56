"""A paper reproduced at tiny scale, and once more from nothing but what was kept of its runs."""

import json
from pathlib import Path
from typing import Any

from residuum.cli import main
from residuum.reproduce import choose, gather, keep_runs, stand_ins


def reproduced(paper: str, folder: Path, *, workers: int = 2) -> list[dict[str, Any]]:
    """Carry out all runs of a paper; kept runs must give the same verdicts, and as many figures.

    Returns:
        The paper's claims.
    """
    out, again, kept = folder / "out", folder / "again", folder / "kept"
    options = ["reproduce", paper, "--scale", "tiny"]
    assert main([*options, "--out", str(out), "--workers", str(workers)]) == 0
    choice = choose("tiny", [paper])
    assert keep_runs(choice.studies, gather(stand_ins(choice.jobs, {}), out), kept) == len(choice.jobs)
    assert main([*options, "--out", str(again), "--check", "--kept", str(kept)]) == 0
    assert sorted(p.name for p in out.rglob("*.png")) == sorted(p.name for p in again.rglob("*.png"))
    first, second = (_claims(place, paper) for place in (out, again))
    assert [(c["id"], c["verdict"], c["runs"]) for c in first] == [(c["id"], c["verdict"], c["runs"]) for c in second]
    return first


def _claims(out: Path, paper: str) -> list[dict[str, Any]]:
    content = json.loads((out / "tiny" / "claims.json").read_text(encoding="utf-8"))
    return [claim for claim in content["claims"] if claim["paper"] == paper]
