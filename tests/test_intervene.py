"""Interventions: equal to surgery by hand, evaluated once, right at the edges."""

import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import oracles_probes as twins
from conftest import MODELS
from residuum.cutting import cut
from residuum.models import ResNet, ResNetConfig
from residuum.probes.intervene import (
    SCALES,
    drops,
    drops_first,
    drops_last,
    extra_runs,
    interventions,
    repeats,
    replacements,
    shuffles,
    swaps,
    unrolls,
)
from residuum.profiles import Measure, Point, merge, profile
from residuum.schedules import full, tree_size
from residuum.streams import Block, Section, Stream
from surgery import outcome, rebuilt, without_branch

KINDS = (drops, drops_first, drops_last, partial(repeats, times=(2, 3)), swaps, replacements)


def counted(length: int) -> tuple[Stream, Counter[int]]:
    """One section of random blocks that count how often they run."""
    ran: Counter[int] = Counter()
    weights = torch.randn(length, 6, 6) / 3

    def branch(i: int, h: Tensor) -> Tensor:
        ran[i] += 1
        return torch.tanh(h @ weights[i])

    blocks = tuple(Block(str(i), lambda h, i=i: h + branch(i, h), lambda h, i=i: branch(i, h)) for i in range(length))
    return Stream(torch.randn(5, 6), (Section("only", lambda h: h, blocks),), lambda h: h), ran


@pytest.fixture(autouse=True)
def _without_gradient() -> object:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network() -> tuple[ResNet, Tensor, Tensor]:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(3, 2), widths=(4, 8), classes=5)).eval()
    return model, torch.randn(9, 3, 8, 8), torch.randint(0, 5, (9,))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: getattr(k, "__name__", "repeats"))
def test_interventions_equal_surgery_by_hand(kind: object, network: tuple[ResNet, Tensor, Tensor]) -> None:
    model, x, labels = network
    measures = interventions(kind)(model.cut(x), labels)
    whole = model(x)
    cases = [case for case in kind((3, 2)) if not case.skip]
    assert cases
    for case in cases:
        s = case.point.section
        output = outcome(rebuilt(model, f"sections.{s}", case.schedule[s]), x)
        column = measures[f"{case.name}_loss"].points.index(case.point)

        def value(quantity: str, case: object = case, column: int = column) -> Tensor:
            return measures[f"{case.name}_{quantity}"].values[:, column]

        torch.testing.assert_close(value("loss"), nn.functional.cross_entropy(output, labels, reduction="none"))
        right = (output.argmax(1) == labels).float()
        assert torch.equal(value("accuracy"), right)
        assert torch.equal(value("agreement"), (output.argmax(1) == whole.argmax(1)).float())
        assert torch.equal(value("flip"), right - (whole.argmax(1) == labels).float())
    assert torch.equal(measures["intact_accuracy"].values[:, 0], (whole.argmax(1) == labels).float())
    assert measures["intact_loss"].points == (Point(1, 2),)


@pytest.mark.parametrize(("family", "path"), [("gpt2", "transformer.h"), ("torchvision vit", "encoder.layers")])
def test_interventions_equal_surgery_on_foreign_models(family: str, path: str) -> None:
    model, x = MODELS[family].build()
    model.eval()
    stream = cut(model, x)
    measures = interventions(drops, swaps)(stream, None)
    for kind in (drops, swaps):
        for case in kind(stream.lengths):
            if case.skip:
                continue
            output = outcome(rebuilt(model, path, case.schedule[0]), x)
            column = measures[f"{case.name}_entropy"].points.index(case.point)
            entropies = [twins.mean_entropy(output[n], stream.mask, n) for n in range(2)]
            assert measures[f"{case.name}_entropy"].values[:, column].tolist() == pytest.approx(entropies, rel=1e-4)
    assert not any("loss" in name or "accuracy" in name or "flip" in name for name in measures)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_evaluations_are_the_nodes_of_the_prefix_tree(n: int) -> None:
    formulas = {
        drops: n * (n + 1) // 2,
        swaps: n + (n - 1) * n * (n + 1) // 3,
        replacements: n + (n - 1) * n * (n + 1) // 2,
        drops_last: n,
        drops_first: n + n * (n - 1) // 2,
        extra_runs: 2 * n,
        partial(unrolls, times=4): n + 4,
        partial(unrolls, times=4, scales=(1.0, 0.5)): n + 8,
    }
    for kind, expected in formulas.items():
        stream, ran = counted(n)
        interventions(kind)(stream, None)
        assert ran.total() == expected, kind
    stream, ran = counted(n)
    interventions(repeats, partial(unrolls, times=2))(stream, None)
    assert ran.total() == n + n * (n + 1) // 2 + 1  # the last block twice is a repetition and a first extra step
    stream, ran = counted(n)
    interventions(drops, swaps, replacements)(stream, None)
    together = {full((n,)), *(case.schedule for kind in (drops, swaps, replacements) for case in kind((n,)))}
    assert ran.total() == tree_size(together)
    assert ran.total() < sum(formulas[kind] for kind in (drops, swaps, replacements)) or n == 1


def test_unrolling_with_scales_equals_steps_by_hand(network: tuple[ResNet, Tensor, Tensor]) -> None:
    model, x, labels = network
    stream = model.cut(x)
    measures = interventions(partial(unrolls, times=3, scales=SCALES))(stream, labels)
    for scale in SCALES:
        for s, length in enumerate(stream.lengths):
            h = stream.run().states[s][-1]
            for k in range(1, 4):
                h = h + scale * stream.sections[s].blocks[-1].branch(h)
                output = stream.finish(h, (s, length - 1))
                column = measures[f"unroll_{scale:g}_loss"].points.index(Point(s, length + k))
                expected = nn.functional.cross_entropy(output, labels, reduction="none")
                got = measures[f"unroll_{scale:g}_loss"].values[:, column]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_an_explosion_has_infinite_loss_and_is_not_right() -> None:
    block = Block("0", lambda h: h * 1e30, lambda h: h * (1e30 - 1))
    stream = Stream(torch.tensor([[1.0, -1.0]]), (Section("s", lambda h: h, (block,)),), lambda h: h)
    measures = interventions(partial(unrolls, times=3))(stream, torch.tensor([0]))
    assert measures["unroll_1_loss"].values.tolist() == [[math.inf] * 3]
    assert measures["unroll_1_accuracy"].values.tolist() == [[0.0] * 3]
    assert measures["unroll_1_flip"].values.tolist() == [[-1.0] * 3]


def test_identity_blocks_change_nothing_and_one_useful_block_is_found() -> None:
    still = Block("still", lambda h: h, torch.zeros_like)
    useful = Block("useful", lambda h: h + 5 * torch.eye(4)[:3], lambda h: 5 * torch.eye(4)[:3].expand_as(h))
    stream = Stream(torch.randn(3, 4), (Section("s", lambda h: h, (still, still, useful, still)),), lambda h: h)
    labels = torch.arange(3)
    measures = interventions(drops, swaps)(stream, labels)
    harm = measures["drop_loss"].values - measures["intact_loss"].values
    assert (harm[:, 2] > 0.1).all()
    assert torch.equal(harm[:, [0, 1, 3]], torch.zeros(3, 3))
    assert (measures["swap_agreement"].values == 1).all()


def test_shuffles_move_exactly_k_blocks_and_follow_the_seed() -> None:
    cases = list(shuffles((5, 2, 1), draws=4))
    for case in cases:
        s, _, k = case.point
        assert sum(a != b for a, b in zip(case.schedule[s], full((5, 2, 1))[s], strict=True)) == k
        assert sorted(case.schedule[s]) == list(full((5, 2, 1))[s])
    assert len(cases) == 4 * (4 + 1)
    assert cases == list(shuffles((5, 2, 1), draws=4))
    assert cases != list(shuffles((5, 2, 1), draws=4, seed=1))
    stream, _ = counted(4)
    measures = interventions(partial(shuffles, draws=3))(stream, torch.zeros(5, dtype=torch.int64))
    assert measures["shuffle_loss"].points == (Point(0, 0, 2), Point(0, 0, 3), Point(0, 0, 4))
    outputs = [stream.run(case.schedule).output for case in shuffles((4,), draws=3) if case.point.length == 3]
    losses = [nn.functional.cross_entropy(o, torch.zeros(5, dtype=torch.int64), reduction="none") for o in outputs]
    torch.testing.assert_close(measures["shuffle_loss"].values[:, 1], torch.stack(losses).mean(0))
    assert "3 draws" in measures["shuffle_loss"].note


def test_how_the_data_are_split_does_not_matter(network: tuple[ResNet, Tensor, Tensor]) -> None:
    model, x, labels = network
    probe = interventions(drops, partial(shuffles, draws=2), partial(unrolls, times=2, scales=(1.0, 0.1)))
    whole = profile(model, [(x, labels)], [probe])
    parts = profile(model, [(x[:2], labels[:2]), (x[2:], labels[2:])], [probe])
    for name, measure in whole.measures.items():
        torch.testing.assert_close(measure.values, parts.measures[name].values, rtol=1e-4, atol=1e-5)
    assert merge([whole]).measures.keys() == whole.measures.keys()


def test_a_projection_block_keeps_its_projection() -> None:
    config = ResNetConfig(blocks=(2, 2, 3), widths=(4, 8, 6), classes=5, transition="projection")
    model, x, labels = ResNet(config).eval(), torch.randn(9, 3, 8, 8), torch.randint(0, 5, (9,))
    measures = interventions(drops, partial(unrolls, times=2, scales=(0.5,)))(model.cut(x), labels)
    assert measures["drop_entry_loss"].points == (Point(1, 0), Point(2, 0))
    assert measures["drop_entry_loss"].at == "state"
    assert measures["drop_loss"].points == (Point(0, 0), Point(0, 1), Point(1, 0), Point(2, 0), Point(2, 1))
    whole = model(x)
    for column in range(2):
        output = without_branch(model, f"transitions.{column}")(x)
        assert not torch.allclose(output, whole)
        losses = nn.functional.cross_entropy(output, labels, reduction="none")
        torch.testing.assert_close(measures["drop_entry_loss"].values[:, column], losses)
        agrees = (output.argmax(1) == whole.argmax(1)).float()
        assert torch.equal(measures["drop_entry_agreement"].values[:, column], agrees)


def test_the_projection_before_the_first_section_is_kept_too() -> None:
    config = ResNetConfig(blocks=(3, 2), widths=(4, 8), classes=5, transition="projection", stem=3)
    model, x, labels = ResNet(config).eval(), torch.randn(9, 3, 8, 8), torch.randint(0, 5, (9,))
    measures = interventions(drops)(model.cut(x), labels)
    assert measures["drop_entry_loss"].points == (Point(0, 0), Point(1, 0))
    twin = copy.deepcopy(model)
    twin.widen = nn.Sequential(model.widen.skip)
    losses = nn.functional.cross_entropy(twin(x), labels, reduction="none")
    assert not torch.allclose(twin(x), model(x))
    torch.testing.assert_close(measures["drop_entry_loss"].values[:, 0], losses)


def test_the_skip_of_a_hooked_projection_block_is_not_known() -> None:
    model = ResNet(ResNetConfig(blocks=(1, 2), widths=(4, 8), transition="projection")).eval()
    assert model.cut(torch.randn(2, 3, 8, 8)).sections[1].skip is model.transitions[0].skip
    model.transitions[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert model.cut(torch.randn(2, 3, 8, 8)).sections[1].skip is None


def test_blocks_inside_entries_are_named() -> None:
    model = ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8), transition="projection")).eval()
    stream = model.cut(torch.randn(2, 3, 8, 8))
    assert interventions(drops)(stream, None)["drop_agreement"].note == (
        "blocks inside entries run, except for drop_entry: transitions.0"
    )
    always = "blocks inside entries always run: "
    assert interventions(drops_last)(stream, None)["drop_last_agreement"].note == f"{always}transitions.0"
    foreign, x = MODELS["torchvision resnet18"].build()
    measures = interventions(drops)(cut(foreign.eval(), x), None)
    assert measures["drop_agreement"].note == f"{always}layer2.0, layer3.0, layer4.0"
    assert "drop_entry_agreement" not in measures


def test_chance_of_labels_several_labels_and_tokens() -> None:
    def chance(out: Tensor, target: Tensor | None) -> Measure:
        stream = Stream(out, (Section("s", lambda h: h, (Block("0", lambda h: h, torch.zeros_like),)),), lambda h: h)
        return interventions(drops)(stream, target)["chance"].values.flatten().tolist()

    assert chance(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)) == pytest.approx([0.2] * 3)
    assert chance(torch.randn(3, 5), None) == pytest.approx([0.2] * 3)
    several = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.uint8)
    assert chance(torch.randn(3, 5), several) == pytest.approx([1 / 10, 1 / 5, 1 / 10])
    assert chance(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)) == pytest.approx([0.25] * 2)


def test_bad_requests_are_refused(network: tuple[ResNet, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="needs at least one"):
        interventions()
    model, x, _ = network
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.4"):
        interventions(drops)(model.cut(x), torch.full((9,), 7))
    with pytest.raises(ValueError, match="schedule names block 9"):
        interventions(lambda lengths: [next(drops(lengths))._replace(schedule=((9,), ()))])(model.cut(x), None)
