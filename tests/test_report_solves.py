"""The panels and the table of what solvers took: there when a history tells it, true at the extremes."""

import json
from pathlib import Path
from typing import Any

import pytest

from folders import HOSTILE, folder
from residuum import panels, report
from test_report import squeezed, written

CHARTS = {"solves", "solves_backward", "solves_contraction", "solves_contraction_backward"}


def passed(evaluations: float, **changes: Any) -> dict[str, Any]:
    """What a history says of one block in one pass."""
    usual = {"solves": 10, "examples": 3000, "steps": 5.25, "residual": 9.5e-7, "contraction": 0.1, "failures": 0}
    return usual | {"evaluations": evaluations} | changes


def solved(path: Path, epochs: list[dict[str, dict[str, Any]]], **settings: Any) -> Path:
    """A folder whose history has so many epochs, with these solves."""
    folder(path, **settings)
    rows = json.loads((path / "history.json").read_text())[: len(epochs)]
    rows = [row | ({"solves": solves} if solves else {}) for row, solves in zip(rows, epochs, strict=True)]
    (path / "history.json").write_text(json.dumps(rows))
    return path


def both(forward: float, backward: float, **changes: Any) -> dict[str, Any]:
    return {"forward": passed(forward, **changes), "backward": passed(backward)}


TWO = [
    {"sections.0.0": both(5, 6), "sections.1.1": both(7, 8)},
    {"sections.0.0": both(6, 9), "sections.1.1": both(10, 4, contraction=0.3)},
]


def test_solves_are_drawn_block_by_block_over_the_epochs(tmp_path: Path) -> None:
    path = solved(tmp_path / "a", TWO, lengths=(1, 2))
    result, reader = report.read(path), written(path)
    found = panels.one_panels(result)
    assert set(found) >= CHARTS
    assert {key: found[key].title.replace("\u00a0", " ") for key in CHARTS} == {
        "solves": "A solve takes 8 evaluations in the last epoch, 6 in the first; most in block 2.2 (10)",
        "solves_backward": "Backwards a solve takes 6.5 products in the last epoch, 7 in the first; "
        "most in block 1.1 (9)",
        "solves_contraction": "A step lowers the residual to 20.0 % in the last epoch, 10.0 % in the first; "
        "slowest in block 2.2 (30.0 %)",
        "solves_contraction_backward": "Backwards a step lowers the residual to 10.0 % in the last epoch, "
        "10.0 % in the first; slowest in block 1.1 (10.0 %)",
    }
    series = found["solves"].chart["series"]
    assert [(s["name"], s["x"], s["y"]) for s in series] == [
        ("block 1.1", [1, 2], [5.0, 6.0]),
        ("block 2.2", [1, 2], [7.0, 10.0]),
    ]
    assert squeezed(found["solves"].title) in squeezed(reader.text)
    assert "What the solvers took" in reader.text


def test_the_table_is_of_the_last_epoch(tmp_path: Path) -> None:
    table = panels.tables([report.read(solved(tmp_path / "a", TWO, lengths=(1, 2)))])["solved"]
    assert table.title == "In the last epoch every equation was solved, to a residual of 9.50e\u221207 or less"
    assert table.rows[2] == (
        "block 2.2",
        "forward",
        "10",
        "5.25",
        "9.50e\u221207",
        "30.0\u00a0%",
        "0 of 3,000",
    )
    assert [row[:2] for row in table.rows] == [
        (f"block {block}", direction) for block in ("1.1", "2.2") for direction in ("forward", "backward")
    ]


def test_what_was_not_solved_is_said(tmp_path: Path) -> None:
    lost = {"user.block": {"forward": passed(2, residual=None, contraction=None, failures=1200)}}
    path = solved(tmp_path / "a", [lost])
    result = report.read(path)
    table = panels.tables([result])["solved"]
    assert table.title == "In the last epoch 1,200 equations were not solved"
    assert table.rows == [
        ("block user.block", "forward", "2", "5.25", "not finite", "no step", "1,200 of 3,000"),
    ]
    found = panels.one_panels(result)
    assert found["solves"].title == "A solve takes 2 evaluations in the last epoch"
    assert CHARTS & set(found) == {"solves"}
    written(path)


@pytest.mark.parametrize("epochs", [[{}], [{}, {}]])
def test_without_solves_there_is_nothing(tmp_path: Path, epochs: list[dict]) -> None:
    path = solved(tmp_path / "a", epochs)
    result = report.read(path)
    assert not CHARTS & set(panels.one_panels(result))
    assert "solved" not in panels.tables([result])
    assert "What the solvers took" not in written(path).text


def test_names_of_blocks_stay_text(tmp_path: Path) -> None:
    reader = written(solved(tmp_path / "a", [{HOSTILE: both(5, 6)}]))
    assert not any(tag == "img" for tag, _ in reader.tags)


def test_a_deep_network_names_some_of_its_lines(tmp_path: Path) -> None:
    epochs = [{f"sections.0.{i}": both(5 + i, 6) for i in range(24)}]
    series = panels.one_panels(report.read(solved(tmp_path / "a", epochs, lengths=(24,))))["solves"].chart["series"]
    assert len(series) == 24
    assert 5 <= sum(not line["quiet"] for line in series) <= 9
    assert [line["shade"] for line in series] == sorted(line["shade"] for line in series)
