"""The panels of changed networks, gradients, settling and iteration: there when measured, true at the extremes."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from folders import HOSTILE, folder
from measured import ESTIMATE, change, edit, estimates, everything, without
from residuum import changed, conclusions, panels, plots, report, titles
from residuum.models import ResNet, ResNetConfig
from residuum.probes import drops, interventions, loss_changes
from residuum.profiles import load, profile
from residuum.readings import Value, settings, with_error
from residuum.results import write_profile
from test_report import charts_of, squeezed, written

PANELS = {
    "pull": "gradient_cosine",
    "steepness": "gradient_norm",
    "expected": "first_order_change",
    "direct": "plugin_gradient_cosine",
    "expected_direct": "plugin_loss_change",
    "without": "drop_a",
    "twice": "repeat_2",
    "ends": "drop_",
    "order": "shuffle",
    "swap": "swap",
    "replace": "replace",
    "unroll": "unroll",
    "unroll_loss": "unroll",
    "stretch": "update_lipschitz",
    "tail": "log_tail",
    "group_accuracy": "accuracy",
    "group_loss": "loss",
    "group_entropy": "entropy",
    "group_steps_accuracy": "unroll_1_accuracy",
    "group_steps_loss": "unroll_1_loss",
    "group_steps_entropy": "unroll_1_entropy",
}
# Panels that need a second quantity: they go with the panel before the colon, too.
DEPENDENT = {"group_loss": {"expected"}, "group_accuracy": {"group_steps_accuracy"}}
CURVES = {"curves_accuracy", "curves_loss", "curves_borderline_accuracy", "curves_correct_accuracy"}
TABLES = {
    "indices",
    "indices_sections",
    "companions",
    "companions_sections",
    "settling",
    "bracket",
}


def titles_of(path: Path) -> dict[str, str]:
    result = report.read(path)
    return {key: panel.title.replace("\u00a0", " ") for key, panel in panels.one_panels(result).items()} | {
        key: table.title.replace("\u00a0", " ") for key, table in panels.tables([result]).items()
    }


def test_every_measure_has_a_panel_with_a_place(tmp_path: Path) -> None:
    path = everything(tmp_path / "a")
    reader, found = written(path), titles_of(path)
    assert set(PANELS) | CURVES | TABLES <= set(found)
    places = {attrs["id"] for tag, attrs in reader.tags if tag == "section" and "id" in attrs}
    assert set(found) == places
    assert all(squeezed(title) in squeezed(reader.text.replace("\u00a0", " ")) for title in found.values())


@pytest.mark.parametrize("key", PANELS)
def test_a_panel_is_there_exactly_when_its_quantity_was_measured(tmp_path: Path, key: str) -> None:
    path = everything(tmp_path / "a", lengths=(2, 3))
    without(path, PANELS[key])
    found = set(titles_of(path))
    assert key not in found
    lost = {k for k, begins in PANELS.items() if begins.startswith(PANELS[key])} | DEPENDENT.get(key, set())
    assert set(PANELS) - lost <= found
    written(path)


def test_a_folder_of_the_usual_probes_has_none_of_them(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    assert not (set(PANELS) | CURVES | TABLES) & set(titles_of(path))
    text = written(path).text
    for heading in ("What a block does to the loss", "What happens without", "Is it settling", "Is it one repeated"):
        assert heading not in text


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2, 1), (24,)])
@pytest.mark.parametrize("labels", [True, False])
def test_networks_of_every_shape(tmp_path: Path, lengths: tuple[int, ...], labels: bool) -> None:
    path = everything(tmp_path / "a", lengths=lengths, labels=labels)
    reader, found = written(path), titles_of(path)
    assert {"without", "twice", "ends", "unroll", "settling", "indices"} <= set(found)
    assert ("swap" in found) == ("order" in found) == ("replace" in found) == (max(lengths) > 1)
    assert ("pull" in found) == ("unroll_loss" in found) == ("group_accuracy" in found) == labels
    what = "right answers" if labels else "unchanged answers"
    assert what in found["ends"]
    assert len(charts_of(reader)) == sum(tag == "figure" for tag, _ in reader.tags)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_undefined_everywhere(tmp_path: Path, value: float) -> None:
    path = everything(tmp_path / "a")
    for name in ("profile", "initial", "groups"):
        frame = pd.read_parquet(path / f"{name}.parquet")
        frame[["mean", "stderr"]] = value
        frame.to_parquet(path / f"{name}.parquet")
    found = titles_of(path)
    assert not set(PANELS) & set(found)
    assert "settling" not in found
    assert "indices" in found
    written(path)


def test_indices_stand_beside_the_networks_at_initialisation_and_on_shuffled_labels(tmp_path: Path) -> None:
    path = everything(tmp_path / "a")
    table = panels.tables([report.read(path)])["indices"]
    assert [row[0].split(":")[0] for row in table.rows] == ["after training", "at initialisation"]
    assert table.rows[0][1] == "0.80 [0.70, 0.90]"
    assert "90.0\u00a0% of its answers are wrong, by guessing 90.0\u00a0%" in table.rows[1][0]
    assert set(table.rows[1][1:]) == {"undefined"}
    edit(path, "indices.json", shuffled_convergence=estimates(3), initial_convergence=estimates(3))
    pd.read_parquet(path / "initial.parquet").to_parquet(path / "shuffled.parquet")
    table = panels.tables([report.read(path)])["indices"]
    assert [row[0] for row in table.rows] == ["after training", "at initialisation", "trained on shuffled labels"]
    assert "trained on shuffled labels 0.80, 0.80, 0.80" in table.title
    drawn = charts_of(written(path))["without"]
    assert [s["name"] for s in drawn["series"]] == ["after training", "at initialisation", "trained on shuffled labels"]


def test_indices_say_why_they_are_missing(tmp_path: Path) -> None:
    path = everything(tmp_path / "a", lengths=(1, 3), initial=False)
    index = {"sections": [None, ESTIMATE], "network": ESTIMATE}
    edit(path, "indices.json", convergence=estimates(2) | {"recurrence": index}, initial_convergence=None)
    found = panels.tables([report.read(path)])
    assert found["indices"].rows[1][0] == (
        "at initialisation: parameter cls_token belongs to no module that can be reset"
    )
    column = found["indices_sections"].columns.index("recurrence (replace)")
    assert found["indices_sections"].rows[0][column] == "undefined: one block only"


def test_indices_near_guessing_are_called_unsure(tmp_path: Path) -> None:
    path = everything(tmp_path / "a")
    chancy = estimates(3, ESTIMATE | {"undefined_draws": 343})
    edit(path, "indices.json", initial_convergence=chancy)
    title = panels.tables([report.read(path)])["indices"].title
    assert title.startswith("Convergence 0.80, recurrence 0.80, divergence 0.80; at initialisation unsure, too near")
    edit(path, "indices.json", convergence=chancy)
    assert panels.tables([report.read(path)])["indices"].title.startswith("The indices of iteration are unsure")
    other = everything(tmp_path / "b", title="b")
    assert "unsure in " in panels.tables([report.read(path), report.read(other)])["indices"].title


@pytest.mark.parametrize(
    ("means", "low", "high"), [((0.98, 0.975), 0.88, 0.98), ((0.9, 0.3), 0.3, 0.9), ((0.02, 0.019), 0.0, 0.1)]
)
def test_shades_do_not_make_much_of_small_differences(means: tuple[float, ...], low: float, high: float) -> None:
    cells = {(0, i): Value(mean, 0.0, 9) for i, mean in enumerate(means)}
    assert plots.heat("k", cells, ["1", "2"], x="x", y="y", label="l")["range"] == pytest.approx([low, high])


@pytest.mark.parametrize(
    ("mean", "stderr", "said"),
    [
        (4.7012, 0.0207, "4.701 \u00b1 0.021"),
        (-1.0, 0.00181, "\u22121.0000 \u00b1 0.0018"),
        (3.0, 0.0, "3 \u00b1 0"),
        (1234.5, 20.0, "1,234 \u00b1 20"),
        (6.4e-9, 1.4e-9, "6.40e\u221209 \u00b1 1.40e\u221209"),
        (2.0, float("inf"), "2 \u00b1 inf"),
    ],
)
def test_a_mean_has_the_digits_that_its_error_leaves(mean: float, stderr: float, said: str) -> None:
    assert with_error(Value(mean, stderr, 9)) == said


def test_settings_are_written_for_people() -> None:
    found = settings(
        {"lr": 0.1, "clip": None, "bias": False, "blocks": [4, 4], "limit": {"rate": "Steps(at=())"}},
        {"Steps(at=())": "constant"},
    )
    assert found == "lr 0.1; bias no; blocks 4, 4; limit (rate constant)"


def test_the_page_says_how_the_network_was_limited(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    assert "bound 0.5" not in written(path).text
    network = json.loads((path / "provenance.json").read_text())["network"]
    edit(path, "provenance.json", network=network | {"settings": {"limit": {"bound": 0.5}, "sharing": None}})
    assert "limit (bound 0.5)" in squeezed(written(path).text)


def test_indices_by_agreement_are_shown_where_accuracy_cannot_tell(tmp_path: Path) -> None:
    path = everything(tmp_path / "a", labels=False)
    edit(path, "indices.json", convergence={}, convergence_by_agreement=estimates(3), initial_convergence=None)
    found = titles_of(path)
    assert "agreement_indices" in found
    assert "indices" not in found
    assert "nearly every example the same answer" in squeezed(written(path).text)


@pytest.mark.parametrize(
    ("quantity", "mean", "key", "said"),
    [
        ("drop_last_accuracy", 0.95, "ends", "leaving out the last blocks costs no right answers, on average"),
        ("drop_first_accuracy", 0.45, "ends", "Leaving out the first blocks costs 50.0 points of right answers"),
        ("drop_last_accuracy", 0.99, "ends", "leaving out the last blocks gains 4.0 points of right answers"),
        ("repeat_2_accuracy", 0.95, "twice", "12 of 12 blocks can run twice at a cost of no more than one point"),
        ("repeat_2_accuracy", 0.05, "twice", "0 of 12 blocks can run twice"),
        ("drop_accuracy", 0.05, "without", "5.0 % of the answers are right; with all blocks 95.0 %"),
        ("shuffle_accuracy", 0.95, "order", "the new order costs no right answers"),
        ("shuffle_accuracy", 0.0, "order", "the new order costs 95.0 points"),
        ("swap_accuracy", 0.05, "swap", "neighbours costs 90.0 points of right answers on average; two blocks 3 apart"),
        ("replace_accuracy", 0.05, "replace", "in a block's place costs 90.0 points"),
        ("replace_accuracy", 0.95, "replace", "in a block's place costs no right answers on average"),
        ("unroll_1_accuracy", 0.95, "unroll", "Run 20 more times, the last block costs no right answers"),
        ("unroll_1_accuracy", 1.0, "unroll", "the last block gains 5.0 points"),
        ("unroll_1_loss", 0.1, "unroll_loss", "Over 20 extra steps the loss falls from 0.2 to 0.1"),
        ("unroll_1_loss", 9.0, "unroll_loss", "Over 20 extra steps the loss rises from 0.2 to 9"),
        ("unroll_1_loss", float("inf"), "unroll_loss", "from 1 extra step on it is infinite for some examples"),
        ("loss_change", 0.3, "expected", "0 of 12 blocks lower the loss; the first order has the right sign for 0"),
        ("loss_change", -0.3, "expected", "12 of 12 blocks lower the loss; the first order has the right sign for 12"),
        ("gradient_ratio", 200.0, "steepness", "is 200 times as long as at the first of the last section"),
        ("gradient_ratio", 1.0, "steepness", "about as long as at the first of the last section"),
        ("log_tail_product", -2.0, "tail", "small changes shrink to 13.5 % or less"),
        ("log_tail_product", 0.0, "tail", "at most to about their own size"),
        ("log_tail_product", 2.0, "tail", "may grow up to 7.39 times"),
        ("log_tail_product", 50.0, "tail", "may grow 10 to the power of 21.7 times"),
        ("update_lipschitz", 0.5, "stretch", "up to 0.5 times; 12 of 12 shrink them, on average"),
        ("update_lipschitz", 3.0, "stretch", "up to 3 times; 0 of 12 shrink them, on average"),
        ("update_lipschitz_bound", 0.9, "stretch", "12 by proof"),
        ("drifts", 1.0, "settling", "drift for 100 %"),
        ("accuracy", 0.11, "accuracy", "Early exits tell little: the whole network is right for 11.0"),
        ("accuracy", 0.2, "accuracy", "the answers are as good as the final ones (20.0"),
        ("accuracy", 0.5, "curves_accuracy", "0 % at its start, 40.0 % at its end; after the first epoch 40.0 %"),
    ],
)
def test_titles_tell_the_truth(tmp_path: Path, quantity: str, mean: float, key: str, said: str) -> None:
    path = everything(tmp_path / "a")
    change(path, quantity, mean)
    if quantity == "drifts":
        change(path, "settles", 0.0)
        change(path, "marginal", 0.0)
        said = "drift for every example"
    assert said in titles_of(path)[key].replace("\u2212", "-")


def test_every_example_is_every_one() -> None:
    shares = {"settles": 0.996, "marginal": 0.0, "drifts": 0.004}
    table = {name: {(0, 0, 1): Value(share, 0.0, 1000)} for name, share in shares.items()}
    assert conclusions.settling(table).endswith("settle for 99.6\u00a0%, drift for 0.40\u00a0% of the examples")


def test_one_section_has_no_ratio_of_gradients(tmp_path: Path) -> None:
    path = everything(tmp_path / "a", lengths=(3,))
    change(path, "gradient_norm", 0.5)
    assert titles_of(path)["steepness"].endswith("is about as long as at the last block")
    change(path, "gradient_norm", 0.0)
    assert titles_of(path)["steepness"] == "The gradient of the loss is zero at the last block"


def test_verdicts_and_brackets_say_what_kind_of_number_they_are(tmp_path: Path) -> None:
    path = everything(tmp_path / "a", lengths=(2, 2))
    found = panels.tables([report.read(path)])
    assert found["settling"].title.startswith("Run on and on, the last block would settle for 20.0")
    assert found["settling"].rows[0][:2] == ("after training", "20.0\u00a0% \u00b1 1.0\u00a0%")
    assert found["bracket"].rows[0][3] == "5"
    without(path, "update_lipschitz_bound", "block_lipschitz_bound")
    found = panels.tables([report.read(path)])
    assert found["bracket"].rows[0][3] == "none known"
    assert "no upper bound is known" in titles_of(path)["stretch"]
    change(path, "step_growth", float("inf"))
    row = panels.tables([report.read(path)])["settling"].rows[0]
    assert "infinite for some examples" in row


def test_borderline_examples(tmp_path: Path) -> None:
    path = everything(tmp_path / "a")
    assert "The last block takes the 500 borderline examples of 500 from" in titles_of(path)["group_accuracy"]
    frame = pd.read_parquet(path / "groups.parquet")
    for count, said in ((9, "9 of 500 examples are borderline, too few"), (1, "1 of 500 examples is borderline")):
        frame.loc[frame["group"] == "borderline", "count"] = count
        frame.to_parquet(path / "groups.parquet")
        assert titles_of(path)["group_accuracy"].startswith(said)
    frame.loc[frame["group"] == "borderline", ["mean", "stderr"]] = float("nan")
    frame.to_parquet(path / "groups.parquet")
    assert titles_of(path)["group_accuracy"].startswith("No example is borderline")
    frame.drop(columns="group").to_parquet(path / "groups.parquet")
    with pytest.raises(ValueError, match=r"groups\.parquet lacks group"):
        report.read(path)


def test_the_last_block_is_that_of_the_last_section_with_blocks() -> None:
    keys, means = ((0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 1)), (0.1, 0.2, 0.9, 0.9)
    right = {key: Value(mean, 0.0, 50) for key, mean in zip(keys, means, strict=True)}
    groups = {"borderline": {"accuracy": right}, "all": {"accuracy": right}}
    assert "from 20.0\u00a0% to 90.0\u00a0% right" in conclusions.borderline(groups, (2, 0))
    left = {"distance_to_last": {(0, i, 1): Value(mean, 0.0, 50) for i, mean in enumerate((1.0, 0.9, 0.0))}}
    assert "half of its way is done: 100\u00a0% in a" in titles.compared("last", [("a", left, (2, 0))])


def test_curves_over_epochs_go_from_light_to_dark(tmp_path: Path) -> None:
    path = everything(tmp_path / "a", lengths=(2, 24))
    chart = charts_of(written(path))["curves_accuracy"]
    assert [s["shade"] for s in chart["series"]] == sorted(s["shade"] for s in chart["series"])
    assert (chart["series"][0]["name"], chart["series"][-1]["name"]) == ("entry", "block 24")
    assert sum(not s["quiet"] for s in chart["series"]) <= 9
    history = json.loads((path / "history.json").read_text())
    for row in history[:-1]:
        del row["curves"]  # trained on with other settings
    history[-1]["curves"]["accuracy"]["section 2"][0] = None
    (path / "history.json").write_text(json.dumps(history))
    assert charts_of(written(path))["curves_accuracy"]["series"][-1]["x"] == [12]


def test_counts_and_pairs() -> None:
    table = {
        "intact_accuracy": {(0, 3, 1): Value(0.9, 0.0, 9)},
        "drop_last_accuracy": {(0, 2, 1): Value(0.8, 0.1, 9), (0, 1, 2): Value(0.5, 0.1, 9)},
        "swap_accuracy": {
            (0, 0, 1): Value(0.2, 0.1, 9),
            (0, 1, 2): Value(0.4, 0.3, 9),
            (0, 0, 2): Value(0.1, 0.1, 9),
        },
    }
    ends, swaps = changed.by_count(table, "drop_last"), changed.by_count(table, "swap")
    assert {key[1]: value.mean for key, value in ends.items()} == {0: 0.9, 1: 0.8, 2: 0.5}
    assert swaps[0, 1, 1] == pytest.approx(Value(0.3, 0.2, 9))
    assert swaps[0, 2, 1].mean == 0.1
    assert conclusions.swapped(table) == (
        "Exchanging two neighbours costs 60.0\u00a0points of right answers on average; "
        "two blocks 2 apart, it costs 80.0\u00a0points"
    )


@pytest.mark.parametrize("where", ["section", "title"])
def test_names_stay_text(tmp_path: Path, where: str) -> None:
    names = [HOSTILE, "b", "c"] if where == "section" else None
    path = everything(tmp_path / "a", names=names, title=HOSTILE if where == "title" else "x", block=HOSTILE)
    reader = written(path)
    assert HOSTILE in reader.text
    assert len(reader.scripts) == 3
    assert not any(tag == "img" for tag, _ in reader.tags)
    assert "<img" not in json.dumps(charts_of(reader)["unroll"]["series"][0]["hover"])


def test_several_networks_are_compared(tmp_path: Path) -> None:
    one, two = everything(tmp_path / "a", title="one"), everything(tmp_path / "b", title="two", lengths=(3, 2, 2))
    reader = written(one, two)
    assert {"without", "twice", "tail", "steepness", "direct", "stretch"} <= set(charts_of(reader))
    tables = panels.tables([report.read(one), report.read(two)])
    assert [row[0] for row in tables["settling"].rows][::2] == ["one", "two"]
    assert len(tables["indices"].rows) == 4
    assert (
        tables["indices"].title
        == "Convergence, recurrence, divergence: 0.80, 0.80, 0.80 in one; 0.80, 0.80, 0.80 in two"
    )
    assert tables["settling"].title.startswith("Examples for which the last block would settle: 20.0\u00a0% in one and")
    bounds = {
        line["name"]: line["hidden"] for line in charts_of(reader)["stretch"]["series"] if "bound" in line["name"]
    }
    assert bounds["one: upper bound"] is bounds["two: upper bound"] is False
    assert bounds["two, at initialisation: upper bound"]
    several = [replace(report.read(one), label=str(i)) for i in range(5)]
    assert panels.tables(several)["indices"].title == "How iterative and convergent the networks are"
    assert panels.tables(several)["settling"].title == "Run on and on, would the last block settle"


def test_no_two_curves_of_a_chart_look_alike(tmp_path: Path) -> None:
    one = report.read(everything(tmp_path / "a", lengths=(3, 3)))
    several = [replace(one, label=str(number)) for number in range(6)]
    found = panels.one_panels(replace(one, shuffled=one.trained))
    for panel in (panels.many_panels(several)["stretch"], found["unroll"], found["stretch"]):
        looks = [(line["style"], line["fresh"]) for line in panel.chart["series"]]
        assert len(set(looks)) == len(looks)


def test_formulas_have_subscripts_and_stay_text() -> None:
    assert report.subscripts("h_{l+1} = b_l(<x>)") == "h<sub>l+1</sub> = b<sub>l</sub>(&lt;x&gt;)"


def test_true_changes_of_the_loss_in_the_table_are_those_of_the_probe(tmp_path: Path) -> None:
    model = ResNet(ResNetConfig(blocks=(2, 1), widths=(4, 8), channels=1)).eval()
    batches = [(torch.randn(6, 1, 8, 8), torch.arange(6))]
    write_profile(tmp_path, "profile", profile(model, batches, [interventions(drops)]))
    expected = profile(model, batches, [loss_changes]).measures["loss_change"]
    found = load(tmp_path / "profile.safetensors").measures["loss_change"]
    assert found.points == expected.points
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)
