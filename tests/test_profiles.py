"""Profiles: one table per example, whatever the batches; merged, averaged, written and read without loss."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from residuum.models import ResNet, ResNetConfig
from residuum.probes import (
    drops,
    gradients,
    interventions,
    margins,
    pairs,
    passive,
    perturbation,
    readouts,
    repeats,
    state_norm,
    update_angle,
)
from residuum.probes.intervene import Case
from residuum.profiles import Measure, Point, Probe, Profile, load, measure, merge, profile
from residuum.streams import Block, Section, Stream

PROBES = [passive(perturbation, state_norm, update_angle), pairs, readouts]
EXAMPLES = 9


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8), classes=3), seed=1).eval()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(EXAMPLES, 3, 8, 8, generator=generator), torch.randint(0, 3, (EXAMPLES,), generator=generator)


@pytest.fixture(scope="module")
def whole(model: nn.Module, data: tuple[Tensor, Tensor]) -> Profile:
    return profile(model, [data], PROBES)


def batches(data: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(sizes) for part in data), strict=True))


def same(a: Profile, b: Profile, *, exactly: bool = True) -> None:
    assert torch.equal(a.examples, b.examples)
    assert (a.sections, a.lengths, a.about) == (b.sections, b.lengths, b.about)
    assert list(a.measures) == list(b.measures)
    for name, ours in a.measures.items():
        theirs = b.measures[name]
        assert (ours.points, ours.at, ours.update, ours.note) == (theirs.points, theirs.at, theirs.update, theirs.note)
        tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours.values, theirs.values, equal_nan=True, **tolerance)


def table(values: list[list[float]], first: int = 0) -> Profile:
    """A small made-up profile."""
    rows = torch.tensor(values)
    made = Measure(rows, tuple(Point(0, i) for i in range(rows.shape[1])), "block", "own branch")
    return Profile(torch.arange(first, first + len(rows)), {"q": made}, ("s",), (rows.shape[1],), {})


def test_a_profile_says_what_was_measured(whole: Profile) -> None:
    assert whole.examples.tolist() == list(range(EXAMPLES))
    assert whole.sections == ("section 1", "section 2")
    assert whole.lengths == (2, 2)
    assert whole.about == {"loss": "cross-entropy (nats)"}
    assert whole.measures.keys() == {
        "perturbation", "scaled_perturbation", "state_norm", "update_angle",
        "distance_to_last", "cosine_to_last", "block_influence", "angular_distance",
        "loss", "accuracy", "entropy", "agreement", "label_change",
    }  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(1, EXAMPLES - 1)))
def test_splits_of_the_data_do_not_matter(
    model: nn.Module, data: tuple[Tensor, Tensor], whole: Profile, cuts: set[int]
) -> None:
    sizes = [b - a for a, b in pairwise([0, *sorted(cuts), EXAMPLES])]
    same(profile(model, batches(data, sizes), PROBES), whole, exactly=False)


def test_the_order_of_the_examples_does_not_matter(
    model: nn.Module, data: tuple[Tensor, Tensor], whole: Profile
) -> None:
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(4))
    shuffled = profile(model, [tuple(part[order] for part in data)], PROBES)
    for name, shown in shuffled.measures.items():
        expected = whole.measures[name].values[order]
        torch.testing.assert_close(shown.values, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_data_set_measured_in_parts_is_the_whole(
    model: nn.Module, data: tuple[Tensor, Tensor], whole: Profile
) -> None:
    (first, second) = batches(data, [4, 5])
    parts = [profile(model, [second], PROBES, first_example=4), profile(model, [first], PROBES)]
    same(merge(parts), whole, exactly=False)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 4), st.integers(1, 4))
def test_merge_is_associative_and_does_not_care_for_order(order: list[int], i: int, j: int) -> None:
    rows = torch.arange(12.0).reshape(6, 2).tolist()
    parts = [table([rows[k]], first=k) for k in order]
    i, j = sorted((i, i + j))
    left = merge([merge(parts[:i]), *([merge(parts[i:])] if parts[i:] else [])])
    right = merge([*parts[:i], *([merge(parts[i:j])] if parts[i:j] else []), *parts[j:]])
    same(left, right)
    same(left, table(rows))


def test_batches_may_come_from_a_generator_and_report_progress(
    model: nn.Module, data: tuple[Tensor, Tensor], whole: Profile
) -> None:
    seen: list[int] = []
    same(profile(model, iter(batches(data, [4, 4, 1])), PROBES, progress=seen.append), whole, exactly=False)
    assert seen == [4, 8, 9]


def test_foreign_models_and_padded_tokens_are_measured_alike() -> None:
    from conftest import MODELS

    torch.manual_seed(0)
    made, x = MODELS["gpt2"].build()
    labels = torch.where(x["attention_mask"].bool(), x["input_ids"], -100)
    pad = {**x, "input_ids": torch.where(x["attention_mask"].bool(), x["input_ids"], 7)}
    ours = profile(made.eval(), [(x, labels)], PROBES)
    same(ours, profile(made, [(pad, labels)], PROBES), exactly=False)
    assert ours.about["loss"] == "cross-entropy (nats), mean over the counted tokens of an example"
    assert ours.measures["perturbation"].update == "after - before"
    with torch.no_grad():
        logits = made(**x).logits
    loss = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    expected = loss.sum(1) / (labels != -100).sum(1)
    torch.testing.assert_close(ours.measures["loss"].values[:, -1], expected)


def test_measuring_leaves_gradients_off_and_the_random_state_alone(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    state = torch.random.get_rng_state()

    def probe(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        assert not torch.is_grad_enabled()
        return {"zero": measure([torch.zeros(len(stream.input))], [Point(0, 0)], "state")}

    profile(model, [data], [probe])
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.is_grad_enabled()


# Reading ------------------------------------------------------------------------------------------------------------


def test_means_errors_and_counts_leave_nan_out() -> None:
    made = table([[1.0, 2.0, torch.nan], [3.0, torch.nan, torch.nan], [8.0, 4.0, torch.nan]])
    assert made.count("q").tolist() == [3, 2, 0]
    assert made.mean("q")[:2].tolist() == [4, 3]
    assert made.stderr("q")[:2].tolist() == pytest.approx([np.std([1, 3, 8], ddof=1) / 3**0.5, 1])
    assert made.mean("q")[2].isnan()
    assert made.stderr("q")[2].isnan()
    assert table([[1.0]]).stderr("q").isnan().all()


def test_mean_of_ratios_not_ratio_of_means() -> None:
    class Two(nn.Module):
        def cut(self, x: Tensor) -> Stream:
            grow = Block("grow", lambda h: h + 1, lambda h: torch.ones_like(h))
            return Stream(x, (Section("only", lambda h: h, (grow,)),), lambda h: h)

    made = profile(Two().eval(), [(torch.tensor([[1.0], [4.0]]), None)], [passive(perturbation)])
    assert made.mean("scaled_perturbation").item() == (1 / 1 + 1 / 4) / 2


def test_bootstrap_interval_equals_resampling_by_hand() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    rows[3, 1] = np.nan
    low, high = table(rows.tolist()).interval("q", level=0.9, draws=200, seed=5)
    generator = torch.Generator().manual_seed(5)
    draws = [np.nanmean(rows[torch.randint(20, (20,), generator=generator).numpy()], 0) for _ in range(200)]
    expected = np.quantile(np.array(draws, dtype=float), [0.05, 0.95], axis=0)
    np.testing.assert_allclose(torch.stack([low, high]).numpy(), expected, rtol=1e-5)


def test_bootstrap_interval_is_about_two_standard_errors_wide() -> None:
    made = table(np.random.default_rng(1).normal(size=(400, 1)).astype(np.float32).tolist())
    low, high = made.interval("q")
    assert (high - low).item() == pytest.approx(2 * 1.96 * made.stderr("q").item(), rel=0.1)
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        made.interval("q", level=95.0)


def test_bootstrap_intervals_are_infinite_where_draws_are() -> None:
    inf, nan = torch.inf, torch.nan
    low, high = table([[inf, -inf, inf, 1.0, nan]] + 3 * [[inf, 2.0, 2.0, 3.0, nan]]).interval("q", draws=200)
    assert low[:3].tolist() == [inf, -inf, 2]  # a third of the draws is without the first example
    assert high[:3].tolist() == [inf, 2, inf]
    assert low.isnan().tolist() == high.isnan().tolist() == 4 * [False] + [True]


def test_the_order_of_named_inputs_decides_nothing() -> None:
    from conftest import MODELS

    network, x = MODELS["gpt2"].build()
    network.eval().requires_grad_(False)
    order = torch.arange(x["input_ids"].shape[1])
    expected = profile(network, [(x, None)], [passive(perturbation)])
    for places in (order[None], order[None].expand_as(x["input_ids"])):
        found = profile(network, [({"position_ids": places} | x, None)], [passive(perturbation)])
        same(expected, found)
    one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in x.items()}
    single = profile(network, [(one | {"position_ids": order}, None)], [passive(perturbation)])
    torch.testing.assert_close(single.measures["perturbation"].values, expected.measures["perturbation"].values[:1])
    embedded = {name: value for name, value in x.items() if name != "input_ids"}
    embedded = {
        "position_ids": order[None],
        "inputs_embeds": network.transformer.wte(x["input_ids"]).detach(),
    } | embedded
    same(expected, profile(network, [(embedded, None)], [passive(perturbation)]))


def test_rows_for_pandas(whole: Profile) -> None:
    frame = whole.to_pandas()
    assert list(frame.columns) == [
        "quantity", "section", "point", "length", "at", "mean", "stderr", "count", "update",
    ]  # fmt: skip
    assert len(frame) == sum(len(m.points) for m in whole.measures.values())
    row = frame[(frame.quantity == "scaled_perturbation") & (frame.section == "section 2") & (frame.point == 1)].iloc[0]
    assert row["mean"] == whole.mean("scaled_perturbation")[3].item()
    assert (row["at"], row["update"], row["count"], row["length"]) == ("block", "own branch", EXAMPLES, 1)
    assert frame[frame["at"] == "span"].length.max() == 2


def test_unknown_quantity_is_named(whole: Profile) -> None:
    with pytest.raises(ValueError, match=r"no quantity 'norm'; it has \['accuracy'"):
        whole.mean("norm")


# Files --------------------------------------------------------------------------------------------------------------


def test_save_and_load_are_the_identity(whole: Profile, tmp_path: Path) -> None:
    whole.save(tmp_path / "p.safetensors")
    same(load(tmp_path / "p.safetensors"), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), min_size=1, max_size=4), st.text(max_size=9))
def test_save_and_load_keep_every_value(tmp_path_factory: pytest.TempPathFactory, rows: list, name: str) -> None:
    made = table(rows)
    made = Profile(made.examples, {name or "q": made.measures["q"]}, (name,), (2,), {"loss": name})
    path = tmp_path_factory.mktemp("profiles") / "p.safetensors"
    made.save(path)
    same(load(path), made)


def test_other_and_broken_files_are_refused(whole: Profile, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole.save(tmp_path / "p")
    (tmp_path / "cut").write_bytes((tmp_path / "p").read_bytes()[:-9])
    save_file({"w": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="cut is no file of residuum, or is incomplete"):
        load(tmp_path / "cut")
    with pytest.raises(ValueError, match="weights has the format None, expected"):
        load(tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


# Bad input ----------------------------------------------------------------------------------------------------------


def test_nothing_to_measure_is_refused(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="no batches given"):
        profile(model, [], PROBES)
    with pytest.raises(ValueError, match="no probes given"):
        profile(model, [data], [])
    with pytest.raises(ValueError, match=r"batch 0 is a Tensor, no pair; give \(input, target\)"):
        profile(model, iter([torch.randn(2, 3, 8, 8)]), [readouts])
    with pytest.raises(ValueError, match=r"batch 1 has no examples; its input has shape \(0, 3, 8, 8\)"):
        profile(model, [data, (data[0][:0], data[1][:0])], PROBES)
    with pytest.raises(ValueError, match="no profiles given"):
        merge([])


def test_a_passive_probe_given_as_a_probe_is_told_what_to_do(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    def jump(step, previous):
        return {"jump": step.update.flatten(1).amax(1)}

    with pytest.raises(TypeError, match=r"jump asks for 'update', .* a passive probe, measured by passive\(jump\)"):
        profile(model, [data], [jump])
    assert "jump" in profile(model, [data], [passive(jump)]).measures


def test_targets_that_do_not_belong_to_the_batch_are_refused(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"batch 0 has 9 examples, but its target has shape \(3,\)"):
        profile(model, [(data[0], data[1][:3])], PROBES)
    with pytest.raises(ValueError, match=r"its target has shape \(\)"):
        profile(model, [(data[0], torch.tensor(3))], PROBES)
    with pytest.raises(ValueError, match="batch 0 has no tensor in its input, which is a str"):
        profile(model, [("image", None)], PROBES)


def test_two_probes_of_one_quantity_are_refused(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="two probes give the quantity 'distance_to_last'"):
        profile(model, [data], [pairs, pairs])


def test_probes_fail_alone_and_take_their_earlier_batches_with_them(
    model: nn.Module, data: tuple[Tensor, Tensor], whole: Profile
) -> None:
    ran, lost = [], []

    def second(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        ran.append(len(stream.input))
        if len(ran) == 2:
            raise RuntimeError("the second batch is too much")
        return {"second": measure([torch.zeros(len(stream.input))], [Point(0, 0)], "state", note="a remark")}

    def failed(probe: Probe, error: Exception) -> None:
        lost.append((probe, str(error)))

    same(
        profile(model, batches(data, [3, 3, 3]), [PROBES[0], second, *PROBES[1:]], failed=failed), whole, exactly=False
    )
    assert lost == [(second, "the second batch is too much")]
    assert ran == [3, 3]
    ran.clear()
    with pytest.raises(RuntimeError, match="the second batch is too much"):
        profile(model, batches(data, [3, 3, 3]), [second])


def test_missing_targets_and_missing_blocks_cost_only_what_needs_them(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    def elsewhere(lengths: tuple[int, ...]) -> list[Case]:
        return [next(drops(lengths))._replace(schedule=((0, 2), (0,)))]

    lost: dict[Probe, str] = {}
    wrong = interventions(elsewhere)
    slopes = gradients()
    found = profile(
        model,
        [(data[0], None)],
        [slopes, margins, wrong, pairs, readouts],
        failed=lambda probe, error: lost.update({probe: str(error)}),
    )
    assert {"distance_to_last", "entropy"} <= found.measures.keys()
    assert lost == {
        slopes: "gradients: need labels, because they are of the loss; the target is None",
        margins: "margins: need labels, because they are of the right answer; the target is None",
        wrong: 'schedule names block 2 of section "section 1", which has blocks 0..1',
    }
    lost.clear()
    found = profile(
        model,
        [(data[0], torch.full((EXAMPLES,), 7))],
        [slopes, readouts, pairs],
        failed=lambda probe, error: lost.update({probe: str(error)}),
    )
    assert found.measures.keys() == {"distance_to_last", "cosine_to_last", "block_influence", "angular_distance"}
    assert all(text.startswith("labels must be in 0..2, they are in 7..7") for text in lost.values())
    assert lost.keys() == {slopes, readouts}


def test_if_all_probes_fail_nothing_is_measured(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"every probe failed: gradients: need labels, .*; margins: need labels"):
        profile(model, [(data[0], None)], [gradients(), margins], failed=lambda probe, error: None)


def test_a_readout_that_fails_on_early_states_says_where(data: tuple[Tensor, Tensor]) -> None:
    class Late(nn.Module):
        def cut(self, x: Tensor) -> Stream:
            def readout(h: Tensor) -> Tensor:
                if (h == 0).all():
                    raise KeyError("nothing is there yet")
                return h

            one = Block("one", lambda h: h + 1, torch.ones_like)
            return Stream(x, (Section("only", lambda h: 0 * h, (one, one)),), readout)

    lost: list[str] = []
    found = profile(
        Late().eval(),
        [(torch.randn(2, 3), None)],
        [readouts, pairs, interventions(repeats)],
        failed=lambda probe, error: lost.append(str(error)),
    )
    assert lost == [
        "readouts: the network cannot answer from state 0 of only: KeyError: 'nothing is there yet'; "
        "leave the probe out, or name later blocks (blocks=...)"
    ]
    assert {"distance_to_last", "repeat_2_agreement"} <= found.measures.keys()


def test_a_probe_must_give_one_row_per_example(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    def short(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        return {"short": measure([torch.zeros(2)], [Point(0, 0)], "state")}

    with pytest.raises(ValueError, match="'short' has values for 2 examples, the batch has 9"):
        profile(model, [data], [short])
    with pytest.raises(ValueError, match="one column per point"):
        Measure(torch.zeros(2, 3), (Point(0, 0),), "state")


def test_training_mode_and_no_blocks_are_refused(data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"needs model\.eval\(\)"):
        profile(ResNet(ResNetConfig()), [data], PROBES)

    class Empty(nn.Module):
        def cut(self, x: Tensor) -> Stream:
            return Stream(x, (), lambda h: h)

    with pytest.raises(ValueError, match="no blocks to measure"):
        profile(Empty().eval(), [data], PROBES)


def test_merge_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="1 examples stand in several profiles, first number 1"):
        merge([table([[1.0], [2.0]]), table([[3.0]], first=1)])
    with pytest.raises(ValueError, match="differ in their sections"):
        merge([table([[1.0]]), table([[1.0, 2.0]], first=1)])
    ours, theirs = table([[1.0]]), table([[1.0]], first=1)
    with pytest.raises(ValueError, match="differ in their remarks"):
        merge([ours, Profile(theirs.examples, theirs.measures, ("s",), (1,), {"loss": "other"})])
    with pytest.raises(ValueError, match="differ in their quantities"):
        merge([ours, Profile(theirs.examples, {"r": theirs.measures["q"]}, ("s",), (1,), {})])
