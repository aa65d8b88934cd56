"""The report without a browser: what the page says, what it refuses, and that a folder's text stays text."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from folders import HOSTILE, folder
from residuum import charts, conclusions, facts, readings, report, titles
from residuum.readings import Value


class Reader(HTMLParser):
    """Collects tags with their attributes, the visible text, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        elif self.tags and self.tags[-1][0] != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.tags.append(("end", {}))


def written(*folders: Path) -> Reader:
    out = folders[0].parent / "page.html"
    report.write(folders, out)
    return Reader(out.read_text(encoding="utf-8"))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def charts_of(reader: Reader) -> dict[str, dict]:
    return {chart["id"]: chart for chart in json.loads(reader.scripts[0])["charts"]}


def test_says_what_the_network_is_and_where_the_numbers_come_from(tmp_path: Path) -> None:
    text = squeezed(written(folder(tmp_path / "a")).text)
    for part in (
        "A small ResNet on digits",
        "12 residual blocks in 3 sections, 175,258 parameters",
        "digits, test split",
        "epochs 12; batch 64; lr 0.1; milestones 0.5, 0.75",
        "residuum demo --out residuum-demo",
        "torch 2.13.0",
        "ab" * 32,
        "one network cannot tell",
        "doi 10.1371/journal.pone.0293440",
        "1710.04773",
        "sections.2.3",
    ):
        assert part in text, part


def test_every_panel_has_a_place_and_every_chart_a_conclusion(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    reader, panels = written(path), report.one_panels(report.read(path))
    places = [attrs["id"] for tag, attrs in reader.tags if tag == "figure"]
    assert sorted(places) == sorted(f"chart-{key}" for key in panels)
    assert sorted(charts_of(reader)) == sorted(panels)
    text = squeezed(reader.text)
    assert all(squeezed(panel.title) in text for panel in panels.values())


def test_is_self_contained(tmp_path: Path) -> None:
    reader = written(folder(tmp_path / "a"))
    for tag, attrs in reader.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attrs.get(name) or ""
            assert not value or value.startswith("#") or value == "data:,", (tag, attrs)
    policy = next(a["content"] for t, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert report.policy(reader.scripts[1:]) == policy  # the scripts that may run are the ones in the page
    assert "unsafe" not in policy.split("style-src")[0]


@pytest.mark.parametrize(
    "where",
    ["title", "model", "weights", "data", "command", "loss", "note", "class", "section", "block", "passed", "version"],
)
def test_text_from_a_folder_stays_text(tmp_path: Path, where: str) -> None:
    path = folder(tmp_path / "a", names=[HOSTILE, "b", "c"] if where == "section" else None)
    about = json.loads((path / "provenance.json").read_text())
    match where:
        case "note":
            about["notes"] = [HOSTILE]
        case "class":
            about["network"]["class"] = HOSTILE
        case "block" | "passed":
            about["network"]["sections"][0][f"{where}s".replace("passeds", "passed")][:1] = [HOSTILE]
        case "version":
            about["versions"][HOSTILE] = HOSTILE
        case "section":
            pass
        case _:
            about[where] = HOSTILE
    (path / "provenance.json").write_text(json.dumps(about))
    one, two = written(path), written(path, folder(tmp_path / "b", lengths=(2, 3)))
    for reader in (one, two):
        assert HOSTILE in reader.text  # every letter of it is seen
        assert len(reader.scripts) == 3
        assert not any(tag == "img" or "onerror" in attrs for tag, attrs in reader.tags)
        assert "<script>alert" not in "".join(reader.scripts)


def test_charts_show_hostile_text_letter_by_letter() -> None:
    assert charts.literal("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"
    assert charts.literal("a\n b") == "a b"
    assert len(charts.literal("x" * 100, 10)) == 10


def test_json_cannot_end_its_script_and_has_no_nan(tmp_path: Path) -> None:
    assert json.loads(report.script_json({"a": "</script><!--&"})) == {"a": "</script><!--&"}
    assert not re.search("[<>&]", report.script_json({"a": "</script><!--&"}))
    with pytest.raises(ValueError, match="JSON compliant"):
        report.script_json({"a": float("nan")})


def test_undefined_values_are_left_out(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    frame = pd.read_parquet(path / "profile.parquet")
    first = (frame["quantity"] == "scaled_perturbation") & (frame["section"] == "section 1") & (frame["point"] == 0)
    frame.loc[first, ["mean", "stderr"]] = np.nan
    frame.loc[frame["quantity"] == "distance_to_last", ["mean", "stderr"]] = np.nan
    frame.loc[frame["quantity"] == "loss", "stderr"] = np.nan  # one example has no standard error
    frame.to_parquet(path / "profile.parquet")
    reader = written(path)
    assert "last" not in charts_of(reader)
    assert len(charts_of(reader)["step"]["series"][0]["y"]) == 11 + 3  # 11 blocks, and a gap after each section


def test_without_labels_and_without_initialisation(tmp_path: Path) -> None:
    reader = written(folder(tmp_path / "a", labels=False, initial=False, lengths=(12,), names=["encoder"]))
    drawn, text = charts_of(reader), squeezed(reader.text)
    assert "accuracy" not in drawn
    assert "loss" not in drawn
    assert "agreement" in drawn
    assert [series["name"] for series in drawn["step"]["series"]] == ["after training"]
    assert "labels do not match the 1000 classes" in text
    assert "no curve at initialisation: parameter cls_token belongs to no module that can be reset" in text
    assert "step at initialisation" not in text


def test_only_some_probes(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    for name in ("profile", "initial"):
        frame = pd.read_parquet(path / f"{name}.parquet")
        frame[frame["quantity"] == "state_norm"].to_parquet(path / f"{name}.parquet")
    indices = json.loads((path / "indices.json").read_text())
    indices["advice"]["sections"] = []
    (path / "indices.json").write_text(json.dumps(indices))
    for reader in (written(path), written(path, path)):
        assert set(charts_of(reader)) <= {"norm", "training"}


@pytest.mark.parametrize(("lengths", "kind"), [((4, 4, 4), "blocks"), ((8, 2, 1), "sections"), ((5,), "whole")])
def test_compares_on_one_axis(tmp_path: Path, lengths: tuple[int, ...], kind: str) -> None:
    reader = written(folder(tmp_path / "a", title="one"), folder(tmp_path / "b", title="two", lengths=lengths))
    step = charts_of(reader)["step"]
    assert step["x"]["kind"] == kind
    assert [s["name"] for s in step["series"]] == ["one", "two", "one, at initialisation", "two, at initialisation"]
    assert [s["hidden"] for s in step["series"]] == [False, False, True, True]
    assert ("law" in charts_of(reader)) == (kind == "sections")


def test_relative_depth() -> None:
    whole = charts.Axis("whole", ())
    assert whole.at((1, 0), (2, 2), state=False) == 2.5 / 4
    assert whole.at((1, 2), (2, 2), state=True) == 1
    sections = charts.Axis("sections", ())
    assert sections.at((1, 1), (2, 2), state=False) == pytest.approx(1 + 0.04 + 0.92 * 0.75)


def test_same_title_twice_gets_different_names(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    names = [s["name"] for s in charts_of(written(a, b))["step"]["series"]]
    assert names[:2] == ["A small ResNet on digits (a)", "A small ResNet on digits (b)"]
    assert len({s["name"] for s in charts_of(written(a, a))["step"]["series"]}) == 4


def test_warns_where_profiles_are_not_comparable(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    assert "may be compared" not in written(a, b).text
    about = json.loads((b / "provenance.json").read_text()) | {"data": "mnist", "loss": "binary cross-entropy"}
    (b / "provenance.json").write_text(json.dumps(about))
    assert "differ in data set (digits; mnist) and loss (binary cross-entropy; cross-entropy)" in squeezed(
        written(a, b).text
    )


def _remove(path: Path) -> None:
    (path / "profile.parquet").unlink()


def _cut(path: Path) -> None:
    content = (path / "profile.parquet").read_bytes()
    (path / "profile.parquet").write_bytes(content[: len(content) // 2])


def _broken(path: Path) -> None:
    (path / "indices.json").write_text('{"measured": ')


def _lacking(path: Path) -> None:
    (path / "provenance.json").write_text('{"title": "x"}')


def _list(path: Path) -> None:
    (path / "provenance.json").write_text("[1]")


def _columns(path: Path) -> None:
    pd.DataFrame({"quantity": ["x"]}).to_parquet(path / "profile.parquet")


def _section(path: Path) -> None:
    frame = pd.read_parquet(path / "profile.parquet")
    frame.assign(section="elsewhere").to_parquet(path / "profile.parquet")


def _changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes the content of a JSON file."""

    def spoil(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(change(content) or content))

    return spoil


def _provenance(**values: Any) -> Callable[[Path], None]:
    return _changed("provenance.json", lambda content: content.update(values))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_changed("history.json", lambda _: [1, 2]), "history.json is not a list of epochs"),
        (_provenance(network=None), "provenance.json: network must be a dict, is NoneType"),
        (_provenance(versions=[]), "provenance.json: versions must be a dict, is list"),
        (_provenance(examples="many"), "provenance.json: examples must be a int, is str"),
        (_provenance(data=5), "provenance.json: data must be a str, is int"),
        (
            _changed("provenance.json", lambda c: c["network"].update(sections={"a": 1})),
            "network.sections must be a list, is dict",
        ),
        (
            _changed("provenance.json", lambda c: c["network"].update(sections=["a"])),
            "sections[0] must be a dict, is str",
        ),
        (
            _changed("provenance.json", lambda c: c["network"]["sections"][0].update(blocks=[])),
            "has blocks of 'section 1' that provenance.json does not name",
        ),
        (_changed("indices.json", lambda c: c.update(advice=[1])), "indices.json: advice must be a dict, is list"),
        (_changed("indices.json", lambda c: c.pop("measured") and None), "indices.json lacks measured"),
        (_remove, "profile.parquet is missing"),
        (_cut, "profile.parquet is not a readable table"),
        (_broken, "indices.json is not readable JSON"),
        (_lacking, "provenance.json lacks model, weights"),
        (_list, "provenance.json is not a dict"),
        (_columns, "profile.parquet lacks section"),
        (_section, "'elsewhere' that provenance.json does not name"),
    ],
)
def test_refuses_what_is_no_result_and_keeps_the_old_page(tmp_path: Path, spoil, said: str) -> None:
    path, out = folder(tmp_path / "a"), tmp_path / "page.html"
    out.write_text("the old page")
    spoil(path)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        report.write([path], out)
    assert "\n" not in str(caught.value)
    assert out.read_text() == "the old page"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "page.html"]


def test_outputs_that_are_not_finite_come_first_and_are_no_findings(tmp_path: Path) -> None:
    """All examples: nothing about answers. Some: no loss, whose mean is infinite."""
    path = folder(tmp_path / "a")
    frame = pd.read_parquet(path / "profile.parquet")
    last = (frame.section == "section 3") & (frame.point == 4)
    for count, left in ((0, set()), (300, {"accuracy", "agreement"})):
        changed = frame.copy()
        changed.loc[last & (frame.quantity == "entropy"), ["mean", "count"]] = (0.1 if count else np.nan, count)
        changed.loc[last & (frame.quantity == "loss"), "mean"] = np.inf
        if not count:
            changed.loc[frame.quantity == "agreement", "mean"] = np.nan
            changed.loc[last & (frame.quantity == "distance_to_last"), "mean"] = np.nan
        changed.to_parquet(path / "profile.parquet")
        result = report.read(path)
        assert result.broken == 500 - count
        panels = report.one_panels(result)
        assert panels.keys() & {"accuracy", "agreement", "loss"} == left
        assert {"step", "cuts"} <= panels.keys()
        short = squeezed(written(path).text).partition("In short")[2]
        assert short.startswith(f" The outputs of {500 - count} of 500 examples are not finite (nan or infinite), so")
        assert not titles.TITLES.keys() & {panel.title for panel in panels.values()}


def test_a_comparison_says_of_a_network_what_its_own_page_says(tmp_path: Path) -> None:
    """Not how often one is right whose outputs are all nan, and not how many parameters where that is not known."""
    results = [report.read(folder(tmp_path / name, title=name)) for name in "ab"]
    del results[1].about["parameters"]
    lost = replace(results[0], broken=results[0].about["examples"])
    for given, shown in ((results, 2), ([lost, results[1]], 1)):
        page = report.render(given)
        cells = re.findall(r'data-is="right at the end" class="n">(.*?)</td>', page)
        assert [cell != "\u2013" for cell in cells] == [shown == 2, True]
        assert 'data-is="parameters" class="n">\u2013</td>' in page


def test_an_axis_of_percentages_has_room() -> None:
    table = {"angular_distance": {(0, i, 1): Value(1e-9, 0.0, 5) for i in range(3)}}
    curve = charts.Curve("a", table, (("s", ("x", "y", "z")),), 0)
    chart = charts.cheapest_cuts("cuts", "angular_distance", curve, label="turn")
    assert chart["y"]["range"][1] == charts.TINY
    assert titles.cuts(table, (3,)) == "Block 1 turns the state least, by less than 0.01\u00a0% of a half turn"


def test_no_error_is_said_of_a_turn_of_one_example() -> None:
    for error, said in ((0.0, ""), (0.02, " \u00b1 2.0\u00a0% standard error")):
        table = {"angular_distance": {(0, 0, 1): Value(0.25, error, 1)}}
        chart = charts.cheapest_cuts(
            "cuts", "angular_distance", charts.Curve("a", table, (("s", ("x",)),), 0), label=""
        )
        assert chart["series"][0]["hover"] == [f"block 1<br><b>25.0\u00a0%</b>{said}<br>of a half turn"]


def test_steps_are_added_up_over_the_examples_that_took_them() -> None:
    table = {"scaled_perturbation": {(0, i, 1): Value(0.5, 0.1, 50) for i in range(2)}}
    sums = charts.running(charts.Curve("a", table, (("s", ("x", "y")), ("t", ())), 0)).table["scaled_perturbation"]
    assert [sums[0, i, 1] for i in range(3)] == [Value(0.0, 0.0, 50), Value(0.5, 0.1, 50), Value(1.0, 0.2, 50)]
    assert sums[1, 0, 1] == Value(0.0, 0.0, 0)


def test_of_the_network_beside_itself_no_number_of_examples_is_said() -> None:
    count = {(0, 0, 1): Value(1.0, 0.0, 0), (0, 1, 1): Value(0.8, 0.0, 50)}
    curve = charts.Curve("a", {"count": count}, (("s", ("x",)),), 0)
    chart = charts.counted("ends", [curve], label="same answers", counts="blocks left out")
    ends = [said.split("<br>")[-1] for said in chart["series"][0]["hover"]]
    assert ends == ["a", "a, 50 examples", ""]


def test_a_logarithmic_axis_of_tiny_percentages_has_no_range_from_below_zero() -> None:
    table = {"step": {(0, i, 1): Value(mean, 0.0, 5) for i, mean in enumerate((4e-4, 1e-5, 1e-5))}}
    curve = charts.Curve("a", table, (("s", ("x", "y", "z")),), 0)
    chart = charts.along_depth("step", "step", [curve], label="step", unit="%", state=False, span=None)
    assert chart["y"] == {"title": "step, logarithmic", "percent": True, "range": None, "log": True}


def test_what_is_rounded_away_is_not_said() -> None:
    table = {"loss": {(0, i, 1): Value(1.12 - 1e-5 * i, 0.0, 5) for i in range(3)}}
    assert titles.loss(table, (2,)).endswith("which hardly changes from the first (1.12) to the last")
    table = {"agreement": {(0, i, 1): Value(1.0, 0.0, 5) for i in range(3)}}
    assert "at least 99\u00a0% of the answers are" in titles.agreement(table, (2,))


def test_blocks_that_did_nothing_at_initialisation_do_more_now() -> None:
    tables = [{"scaled_perturbation": {(0, 0, 1): Value(mean, 0.0, 5)}} for mean in (0.12, 0.0)]
    assert titles.step(*tables, "before").endswith("12.0\u00a0% of its length on average, more than before (0\u00a0%)")
    assert titles.step(tables[1], tables[1], "before").endswith("about as much as before (0\u00a0%)")


def test_distances_of_nothing_have_no_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    results = [report.read(folder(tmp_path / str(n), lengths=(n,), title=str(n))) for n in (2, 3, 4)]
    nothing = {key: Value(0.0, 0.0, 5) for key in results[0].trained["scaled_perturbation"]}
    results[0] = replace(results[0], trained=results[0].trained | {"scaled_perturbation": nothing})
    found = report.many_panels(results)["law"]
    assert found.title.startswith("From 3 to 4 blocks")
    assert found.chart["series"][0]["x"] == [3, 4]
    assert "law" not in report.many_panels(results[:2])
    table = {"scaled_perturbation": {(0, 0, 1): Value(0.5, 0.0, 5)}}
    networks = [("a", table, (1, 0)), ("b", table, (2, 0))]
    assert [line["name"] for line in charts.distance_by_depth("law", networks)["series"]] == ["section 1"]


def test_networks_of_one_depth_count_in_the_mean() -> None:
    def network(step: float, blocks: int) -> tuple[str, titles.Table, tuple[int, ...]]:
        return "a", {"scaled_perturbation": {(0, i, 1): Value(step, 0.0, 5) for i in range(blocks)}}, (blocks,)

    networks = [network(0.3, 2), network(0.1, 2), network(0.2, 8), network(0.4, 8)]
    assert "From 2 to 8 blocks the scaled distance is multiplied by 6 (" in titles.law(networks)


def test_refuses_no_folder_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no result folder given"):
        report.write([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="is not a folder; give folders that residuum probe or demo wrote"):
        report.write([tmp_path / "nothing"], tmp_path / "page.html")


def row(**values: Value) -> readings.Row:
    names = ("step", "initial", "angle", "accuracy", "accuracy_before", "agreement", "label_change")
    return readings.Row("1.1", "block", *(values.get(name) for name in names))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"step": Value(0.02, 0, 9)}, "2.0 % of its length: hardly a change."),
        ({"step": Value(0.3, 0, 9), "initial": Value(0.31, 0, 9)}, "a clear step, about as at initialisation."),
        ({"step": Value(1.5, 0, 9), "initial": Value(0.5, 0, 9)}, "longer than the state itself, 3.0 times that at"),
        ({"step": Value(0.3, 0, 9), "initial": Value(0.0, 0, 9)}, "30.0 % of its length: a clear step."),
        ({"angle": Value(0.05, 0, 9)}, "nearly at right angles"),
        ({"angle": Value(-0.3, 0.2, 9)}, "nearly at right angles"),
        ({"angle": Value(-0.3, 0.01, 9)}, "undoes a part of it"),
        ({"angle": Value(0.9, 0.01, 9)}, "Goes on in much the same direction"),
        ({"accuracy": Value(0.5, 0.01, 9), "accuracy_before": Value(0.4, 0.01, 9)}, "right for 50.0 % (+10.0 points)."),
        (
            {"accuracy": Value(0.5, 0.1, 9), "accuracy_before": Value(0.6, 0.1, 9)},
            "(\u221210.0 points, within the error).",
        ),
        ({"agreement": Value(0.5, 0.1, 9)}, "Stopping here gives the final answer for 50.0 %"),
        ({"label_change": Value(0.2, 0.1, 9)}, "changes the answer of 20.0 %"),
        ({}, ""),
    ],
)
def test_plain_language(values: dict[str, Value], said: str) -> None:
    assert said in row(**values).reading.replace("\u00a0", " ")


def test_numbers_as_people_write_them() -> None:
    shown = [readings.percent(v).replace("\u00a0", " ") for v in (0.1234, 1.5, 0.004, 0, -0.02)]
    assert shown == ["12.3 %", "150 %", "0.40 %", "0 %", "\u22122.0 %"]
    assert [readings.number(v) for v in (0, 1.23456, 12345.6, 1e-9, -0.5)] == [
        "0",
        "1.23",
        "12,346",
        "1.00e\u221209",
        "\u22120.5",
    ]


def test_what_is_rounded_to_nothing_has_no_sign() -> None:
    assert [readings.percent(-1e-6), readings.cosine(-0.001), readings.points(-1e-5), readings.number(-0.0)] == [
        "0.00\u00a0%",
        "0.00",
        "0.0\u00a0points",
        "0",
    ]
    assert [readings.number(v) for v in (-math.inf, -1e-9)] == ["\u2212inf", "\u22121.00e\u221209"]
    assert [readings.cosine(v) for v in (0.05, -0.05)] == ["+0.05", "\u22120.05"]
    found = {name: {"network": {"value": -0.002, "low": -0.02, "high": 0.004}} for name in ("turning", "last_step")}
    assert facts._index(found, "turning", None, (2,)) == "0.00 [\u22120.02, 0.00]"
    assert facts._index(found, "last_step", None, (2,)) == "\u22120.002 [\u22120.02, 0.004]"
    assert conclusions.companions({"last_step": {"network": {"value": 0.002}}}).endswith("its first: 0.002 times")


def test_settled_is_the_first_state_that_stays_good() -> None:
    values = [0.1, 0.97, 0.5, 0.965, 0.97]
    table = {"accuracy": {(0, i, 1): Value(v, 0.0, 9) for i, v in enumerate(values)}}
    assert titles.settled(table) == (0, 3)
    title = titles.accuracy(table, (4,))
    assert title.startswith("After block 3, with 3 of 4 blocks run, the answers are as good as the final ones (97.0")
    late = {"accuracy": {(0, i, 1): Value(float(i), 0.0, 9) for i in range(5)}}
    assert "No early exit is as good" in titles.accuracy(late, (4,))


def test_one_example_has_no_standard_error(tmp_path: Path) -> None:
    curve = charts.Curve("a", {"state_norm": {(0, 0, 1): Value(3.0, 0.0, 1)}}, (("s", ("x",)),), 0)
    chart = charts.along_depth("norm", "state_norm", [curve], label="", unit="", state=False, span=None)
    assert chart["series"][0]["hover"][0].endswith("<br><b>3</b><br>a, 1 examples")
    path = folder(tmp_path / "a")
    pd.read_parquet(path / "profile.parquet").assign(stderr=np.nan, count=1).to_parquet(path / "profile.parquet")
    assert "\u00b1 0" not in written(path).text


def test_running_sum_adds_within_sections_only(tmp_path: Path) -> None:
    result = report.read(folder(tmp_path / "a", lengths=(2, 3)))
    curve = charts.running(charts.Curve("x", result.trained, result.sections, 0))
    sums, steps = curve.table["scaled_perturbation"], result.trained["scaled_perturbation"]
    assert sums[1, 0, 1].mean == 0
    assert sums[1, 3, 1].mean == pytest.approx(sum(steps[1, i, 1].mean for i in range(3)))
    assert sums[1, 3, 1].stderr == pytest.approx(sum(steps[1, i, 1].stderr for i in range(3)))


def test_a_section_without_blocks(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", lengths=(2, 3))
    about = json.loads((path / "provenance.json").read_text())
    about["network"]["sections"].append({"name": "section 3", "blocks": [], "passed": ["transitions.1"]})
    (path / "provenance.json").write_text(json.dumps(about))
    assert "entry runs transitions.1" in squeezed(written(path).text)
    assert charts_of(written(path, folder(tmp_path / "b", lengths=(3, 3, 3))))["step"]["x"]["kind"] == "sections"


def test_escaped_title_in_the_page(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", title=HOSTILE)
    report.write([path], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert escape(HOSTILE, quote=False).replace('"', "&#34;") in page


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2, 1, 1), (48,), (3, 4, 6, 3)])
def test_networks_of_every_shape(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    drawn = charts_of(written(folder(tmp_path / "a", lengths=lengths)))
    steps = [y for y in drawn["step"]["series"][0]["y"] if y is not None]
    assert len(steps) == sum(lengths)
    assert ("angle" in drawn) == (max(lengths) > 1)
