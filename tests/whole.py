"""A paper reproduced at tiny scale, and once more from nothing but what was kept of its runs."""

import json
from pathlib import Path
from typing import Any

from residuum.cli import main


def reproduced(paper: str, folder: Path, *, workers: int = 2) -> list[dict[str, Any]]:
    """Carry out all runs of a paper; what is judged and drawn must be the same from kept runs, to the bit.

    Returns:
        The paper's claims.
    """
    out, again, kept = folder / "out", folder / "again", folder / "kept"
    options = ["reproduce", paper, "--scale", "tiny", "--kept", str(kept)]
    assert main([*options, "--out", str(out), "--workers", str(workers)]) == 0
    assert main([*options, "--out", str(again), "--check"]) == 0
    first, second = out / "tiny", again / "tiny"
    names = {path.relative_to(first) for path in first.rglob("*") if path.suffix in (".json", ".md", ".png")}
    assert len(names) > 3
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    content = json.loads((first / "claims.json").read_text(encoding="utf-8"))
    return [claim for claim in content["claims"] if claim["paper"] == paper]
