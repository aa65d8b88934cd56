"""A paper reproduced at tiny scale, and once more from nothing but what was kept of its runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from residuum import drawing
from residuum.claims import judge
from residuum.cli import main
from residuum.reproduce import choose, gather, keep_runs, kept_runs, stand_ins


def reproduced(
    paper: str, folder: Path, *, workers: int = 2, formats: tuple[str, ...] = ("png",)
) -> list[dict[str, Any]]:
    """Carry out all runs of a paper; kept runs must give the same verdicts, and as many figures.

    Args:
        paper: Its name.
        folder: Where.
        workers: Runs at a time.
        formats: Of its figures. PDF takes as long as all the rest of some.

    Returns:
        The paper's claims.
    """
    out, kept = folder / "out", folder / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "FORMATS", formats)
        assert main(["reproduce", paper, "--scale", "tiny", "--out", str(out), "--workers", str(workers)]) == 0
    choice = choose("tiny", [paper])
    jobs = stand_ins(choice.jobs, {})
    assert keep_runs(choice.studies, gather(jobs, out), kept) == len(choice.jobs)
    results = kept_runs(choice.studies, jobs, kept, folder / "again")
    study = next(study for study in choice.studies if study.paper == paper)
    drawn = {figure.id for figure in study.figures if figure.draw(results) is not None}
    assert {path.stem for path in (out / "tiny" / paper).glob("*.png")} == drawn
    claims = _claims(out, paper)
    assert {c["id"]: c["verdict"] for c in claims} == {c.id: judge(c, results).verdict for c in study.claims}
    return claims


def _claims(out: Path, paper: str) -> list[dict[str, Any]]:
    content = json.loads((out / "tiny" / "claims.json").read_text(encoding="utf-8"))
    return [claim for claim in content["claims"] if claim["paper"] == paper]
