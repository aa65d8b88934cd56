"""Borderline examples: margins and groups by their definition, unrolled steps equal steps by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import oracles
from residuum.models import ResNet, ResNetConfig
from residuum.probes import SCALES, passive, perturbation, readouts, state_norm
from residuum.probes.borderline import groups, margins, unrolled, unrolled_last
from residuum.probes.gradient import gradients
from residuum.profiles import Point, Profile, profile
from residuum.streams import Block, Section, Stream


def answering(logits: Tensor) -> Stream:
    """A network of one identity block that answers these logits."""
    return Stream(logits, (Section("s", lambda h: h, (Block("0", lambda h: h, torch.zeros_like),)),), lambda h: h)


@pytest.fixture(scope="module")
def data() -> tuple[ResNet, Tensor, Tensor]:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(2, 3), widths=(4, 8), classes=4)).eval()
    with torch.no_grad():
        model.dense.weight.mul_(0.2)
    return model, torch.randn(30, 3, 8, 8), torch.randint(0, 4, (30,))


@pytest.fixture(scope="module")
def whole(data: tuple[ResNet, Tensor, Tensor]) -> Profile:
    model, x, labels = data
    return profile(model, [(x, labels)], [margins, readouts, unrolled(readouts, times=4, scale=0.5)])


def test_margins_equal_the_formula() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    found = margins(answering(logits), labels)["margin"]
    assert found.points == (Point(0, 1),)
    for n in range(8):
        p = logits[n].double().softmax(0)
        others = [float(p[k]) for k in range(5) if k != labels[n]]
        assert found.values[n, 0] == pytest.approx(float(p[labels[n]]) - max(others), abs=1e-6)


def test_margins_of_several_labels_change_sign_where_the_exact_match_does() -> None:
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(200, 5), torch.zeros(200, 5, dtype=torch.uint8)
    labels.scatter_(1, (logits + torch.randn(200, 5)).topk(2, dim=1).indices, 1)
    found = margins(answering(logits), labels)["margin"].values[:, 0]
    right = readouts(answering(logits), labels)["accuracy"].values[:, -1]
    assert torch.equal((found > 0).float(), right)
    assert 0 < right.mean() < 1
    none = margins(answering(logits[:1]), torch.zeros(1, 5, dtype=torch.uint8))["margin"].values
    assert none.isnan().all()


def test_margins_of_several_certain_labels_have_the_sign_of_the_answer() -> None:
    logits = torch.tensor([[30.0, 20, -5], [20, 30, -5], [-30, -20, -40], [3, -3, -5]])
    labels = torch.tensor([[1, 0, 0]] * 4, dtype=torch.uint8)
    found = margins(answering(logits), labels)["margin"].values[:, 0]
    chances = logits.double().sigmoid()
    torch.testing.assert_close(found.double(), chances[:, 0] - chances[:, 1], rtol=1e-5, atol=0)
    assert found.sign().tolist() == [1, -1, -1, 1]
    assert torch.equal(found > 0, readouts(answering(logits), labels)["accuracy"].values[:, -1].bool())


def test_outputs_that_are_no_answer_have_no_margin() -> None:
    """With an infinite output nothing is answered, so the example is neither right nor borderline."""
    logits = torch.tensor([[1.0, 0.0, -1.0]] * 4)
    logits[0, 0], logits[1, 0], logits[2] = torch.inf, torch.nan, -torch.inf
    several = torch.tensor([[1, 0, 0]] * 4, dtype=torch.uint8)
    for labels in (several, torch.zeros(4, dtype=torch.int64)):
        assert margins(answering(logits), labels)["margin"].values[:, 0].isnan().tolist() == [True, True, True, False]


def test_margins_of_tokens_are_means_over_those_that_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6))
    labels[0, :2], labels[3] = -100, -100
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    stream = replace(answering(logits), mask=mask)
    found = margins(stream, labels)["margin"]
    for n in range(4):
        counted = [t for t in range(6) if mask[n, t] and labels[n, t] >= 0]
        single = [
            margins(answering(logits[n, t : t + 1]), labels[n, t : t + 1])["margin"].values[0, 0] for t in counted
        ]
        expected = float(torch.stack(single).mean()) if counted else float("nan")
        assert found.values[n, 0] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert found.note == "mean over the counted tokens of an example"


def test_an_empty_group_has_undefined_means_and_intervals(whole: Profile) -> None:
    margin = whole.measures["margin"]
    away = replace(whole, measures=whole.measures | {"margin": replace(margin, values=torch.ones_like(margin.values))})
    empty = groups(away)["borderline"]
    assert len(empty.examples) == 0
    low, high = empty.interval("loss")
    assert low.shape == high.shape == empty.mean("loss").shape == (7,)
    assert low.isnan().all()
    assert high.isnan().all()
    assert empty.mean("loss").isnan().all()
    assert empty.stderr("loss").isnan().all()
    assert empty.count("loss").tolist() == [0] * 7


def test_groups_hold_the_examples_of_their_definition(whole: Profile) -> None:
    margin = whole.measures["margin"].values[:, 0]
    for kind, limit in (("full", 0.1), ("half", 0.2)):
        parts = groups(whole, margin_kind=kind)
        assert parts["borderline"].examples.tolist() == torch.nonzero(margin.abs() < limit).flatten().tolist()
        assert 0 < len(parts["borderline"].examples) < 30
        assert parts["all"] is whole
        right = whole.measures["accuracy"].values[:, -1] == 1
        assert torch.equal(parts["correct"].examples, whole.examples[right])
        assert parts["correct"].mean("accuracy")[-1] == 1
        curve = torch.stack([whole.measures["entropy"].values[n] for n in parts["borderline"].examples.tolist()])
        torch.testing.assert_close(parts["borderline"].mean("entropy"), curve.double().mean(0))
    assert len(groups(whole, width=2.0)["borderline"].examples) == 30
    empty = groups(whole, width=1e-9)["borderline"]
    assert empty.count("loss").tolist() == [0] * len(empty.measures["loss"].points)
    assert empty.mean("loss").isnan().all()


def test_unrolled_steps_equal_steps_by_hand(data: tuple[ResNet, Tensor, Tensor], whole: Profile) -> None:
    model, x, labels = data
    stream = model.cut(x)
    with torch.no_grad():
        h, block = stream.run().states[1][-1], stream.sections[1].blocks[-1]
        for k in range(5):
            output = stream.readout(h)
            loss = nn.functional.cross_entropy(output, labels, reduction="none")
            torch.testing.assert_close(whole.measures["unrolled_0.5_loss"].values[:, k], loss, rtol=1e-4, atol=1e-5)
            right = (output.argmax(1) == labels).float()
            assert torch.equal(whole.measures["unrolled_0.5_accuracy"].values[:, k], right)
            h = h + 0.5 * block.branch(h)
    assert whole.measures["unrolled_0.5_loss"].points == tuple(Point(1, 3 + k) for k in range(5))


def test_any_probe_looks_at_the_extra_steps(data: tuple[ResNet, Tensor, Tensor]) -> None:
    model, x, labels = data
    probes = [unrolled(passive(perturbation), times=2), unrolled(gradients(grad="plugin"), times=2)]
    found = profile(model, [(x, labels)], probes)
    steps = (Point(1, 3), Point(1, 4))
    assert found.measures["unrolled_1_perturbation"].points == steps
    assert found.measures["unrolled_1_plugin_gradient_cosine"].points == steps
    assert found.measures["unrolled_1_perturbation"].update == "own branch"
    with torch.no_grad():
        stream = model.cut(x)
        h, block = stream.run().states[1][-1], stream.sections[1].blocks[-1]
        update = block.branch(h)
    leaf = h.detach().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(stream.readout(leaf), labels, reduction="sum"), leaf)
    cosines = [oracles.cosine(oracles.flat(update, None, n), oracles.flat(g, None, n)) for n in range(30)]
    first = found.measures["unrolled_1_plugin_gradient_cosine"].values[:, 0].tolist()
    assert first == pytest.approx(cosines, rel=1e-3, abs=1e-5)


def test_whose_update_it_is_stays_true_for_blocks_without_a_branch() -> None:
    stream = Stream(torch.randn(2, 3), (Section("s", lambda h: h, (Block("0", torch.tanh),)),), lambda h: h)
    found = unrolled(passive(perturbation), times=2, scale=0.5)(stream, None)
    assert found["unrolled_0.5_perturbation"].update == "after - before"


def test_bad_requests_are_refused(whole: Profile) -> None:
    logits = torch.randn(3, 4)
    with pytest.raises(ValueError, match="margins: need labels, because they are of the right answer"):
        margins(answering(logits), None)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
        margins(answering(logits), torch.tensor([0, 1, 9]))
    with pytest.raises(ValueError, match='no "margin"'):
        groups(Profile(whole.examples, {}, whole.sections, whole.lengths, {}))
    with pytest.raises(ValueError, match="margin_kind must be 'full' or 'half'"):
        groups(whole, margin_kind="double")
    with pytest.raises(ValueError, match="times is 0"):
        unrolled(readouts, times=0)


def test_a_grid_of_scales_is_each_scale_by_itself(data: tuple[ResNet, Tensor, Tensor]) -> None:
    model, x, labels = data
    found = profile(model, [(x, labels)], [unrolled_last])
    probes = (readouts, passive(perturbation, state_norm), gradients(grad="plugin"))
    for scale in SCALES:
        alone = profile(model, [(x, labels)], [unrolled(probe, scale=scale) for probe in probes])
        for name, measure in alone.measures.items():
            assert name.startswith(f"unrolled_{scale:g}_")
            assert torch.equal(found.measures[name].values.nan_to_num(), measure.values.nan_to_num())
    assert len(found.measures["unrolled_0.2_loss"].points) == 21
