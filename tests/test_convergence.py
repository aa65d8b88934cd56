"""The three indices of P0: toy stages with closed forms, the slow twin on a network, intervals, undefined cases."""

import json
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import oracles_probes as twins
from residuum.convergence import _oriented, best_scale, companions, convergence_indices
from residuum.models import ResNet, ResNetConfig
from residuum.probes import pairs, passive, perturbation, readouts, update_angle
from residuum.probes.intervene import (
    SCALES,
    drops,
    drops_first,
    drops_last,
    extra_runs,
    interventions,
    replacements,
    shuffles,
    unrolls,
)
from residuum.profiles import Profile, profile
from residuum.streams import Block, Section, Stream
from surgery import rebuilt

PROBES = (
    interventions(drops_last, drops_first, replacements, partial(shuffles, draws=3), partial(unrolls, times=8)),
    pairs,
    passive(perturbation, update_angle),
    readouts,
)


class Toy(nn.Module):
    """A section of equal blocks with a linear readout, as a network of its own."""

    def __init__(self, branch: Callable[[Tensor], Tensor], readout: Callable[[Tensor], Tensor], blocks: int) -> None:
        super().__init__()
        self.branch, self.readout, self.blocks = branch, readout, blocks

    def cut(self, x: Tensor) -> Stream:
        block = Block("step", lambda h: h + self.branch(h), self.branch)
        return Stream(x, (Section("only", lambda h: h, (block,) * self.blocks),), self.readout)

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x).run(keep=False).output


def measured(model: nn.Module, x: Tensor, labels: Tensor | None) -> Profile:
    return profile(model.eval(), [(x, labels)], PROBES)


def test_extra_runs_are_all_that_the_divergence_index_reads() -> None:
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    toy = Toy(lambda h: h @ turn - h, lambda h: h, blocks=3)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    many, few, both = (
        profile(toy.eval(), [(x, toy(x).argmax(1))], [interventions(*kinds)])
        for kinds in ((unrolls,), (extra_runs,), (extra_runs, unrolls))
    )
    losses = [
        dict(zip(each.measures["unroll_1_loss"].points, each.mean("unroll_1_loss").tolist(), strict=True))
        for each in (many, few, both)
    ]
    assert len(losses[1]) == 3
    assert losses[2] == losses[0]
    assert losses[1].items() <= losses[0].items()
    found = [convergence_indices(each)["divergence"] for each in (many, few, both)]
    assert found[0] == found[1] == found[2]
    assert found[0]["network"]["value"] > 0


def test_the_interval_of_a_gap_near_0_holds_its_estimate() -> None:
    """The absolute values of draws around 0 would all lie above an estimate of 0."""
    generator = torch.Generator().manual_seed(0)
    difference = torch.cat([torch.tensor([[0.0, -0.01]]), 0.1 * torch.randn(500, 2, generator=generator)]).double()
    turned = _oriented(difference)
    assert turned[0].tolist() == pytest.approx([0, 0.01])
    low, high = turned[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    assert (low < turned[0]).all()
    assert (high > turned[0]).all()


def only(found: dict[str, object], name: str) -> float:
    """The value of an index of a network of one section."""
    assert found[name]["sections"] == [found[name]["network"]]
    return found[name]["network"]["value"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("by", ["accuracy", "agreement"])
def test_identity_blocks_have_no_area(by: str) -> None:
    x = torch.randn(50, 3)
    found = convergence_indices(measured(Toy(torch.zeros_like, lambda h: h, 4), x, x.argmax(1)), by=by)
    assert only(found, "divergence") == only(found, "drop_gap") == 0
    assert all(only(found, name) == 1 for name in found if name.startswith(("convergence", "recurrence")))
    assert found["intact_error"] == 0
    assert found["chance_error"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("speed", [0.01, 0.05, 0.2, 0.5])
def test_a_constant_drift(speed: float) -> None:
    """The label is the sign of x; each step moves by v; the readout knows where T steps lead: e(k) = k v / 2."""
    blocks, n = 6, 4000
    x = ((torch.arange(n) + 0.5) / n * 2 - 1)[:, None]
    labels = (x[:, 0] > 0).long()
    model = Toy(lambda h: torch.full_like(h, speed), lambda h: torch.cat([0 * h, h - blocks * speed], 1), blocks)
    found = convergence_indices(measured(model, x, labels))
    area = mean([min(1.0, k * speed) for k in range(1, blocks + 1)])
    assert only(found, "divergence") == pytest.approx(area, abs=2e-3)
    assert only(found, "convergence") == pytest.approx(1 - area, abs=2e-3)
    assert only(found, "recurrence_drop_first") == only(found, "convergence")
    assert only(found, "drop_gap") == 0
    assert only(found, "recurrence") == only(found, "recurrence_shuffle") == 1
    beside = companions(measured(model, x, labels))
    assert only(beside, "remaining_distance") == pytest.approx((blocks - 1) / (2 * blocks), rel=1e-4)
    assert only(beside, "last_step") == pytest.approx(1)
    assert only(beside, "turning") == pytest.approx(1)
    inside = found["divergence"]["network"]
    assert inside["low"] <= inside["value"] <= inside["high"]


def test_a_rotation_is_iterative_and_not_convergent() -> None:
    """Points on a circle, told apart by a line; a step turns by pi / T: e(k) = k / T, chance is 1 / 2."""
    blocks, n = 6, 3000
    angle = (torch.arange(n, dtype=torch.float64) + 0.3) / n * 2 * math.pi
    x, turn = torch.stack([angle.cos(), angle.sin()], 1), math.pi / blocks
    one = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    back = torch.linalg.matrix_power(one, -blocks)
    model = Toy(lambda h: h @ one - h, lambda h: torch.cat([(h @ back)[:, :1], 0 * h[:, :1]], 1), blocks)
    found = convergence_indices(measured(model, x, (x[:, 0] < 0).long()))
    area = mean([min(1.0, 2 * k / blocks) for k in range(1, blocks + 1)])
    assert only(found, "recurrence") == only(found, "recurrence_shuffle") == 1
    assert only(found, "convergence") == pytest.approx(1 - area, abs=2e-3)  # 0.17: low
    assert only(found, "divergence") == pytest.approx(area, abs=2e-3)  # 0.83: high
    assert only(found, "recurrence_drop_first") == pytest.approx(1 - area, abs=2e-3)
    beside = companions(measured(model, x, None))
    assert only(beside, "last_step") == pytest.approx(1)
    assert only(beside, "turning") == pytest.approx(math.cos(turn), rel=1e-5)


def test_a_contraction_converges_the_faster_the_stronger_it_is() -> None:
    """State (z, goal): z goes to the goal by `z <- z - a (z - goal)` from a wrong class of strength m."""
    blocks, n, classes, values = 6, 400, 4, []
    labels = torch.arange(n) % classes
    goal = nn.functional.one_hot(labels, classes).float()
    strength = torch.linspace(0.03, 2, n)
    x = torch.cat([goal.roll(1, 1) * strength[:, None], goal], 1)
    for a in (0.1, 0.3, 0.5, 0.9, 1.0):

        def branch(h: Tensor, a: float = a) -> Tensor:
            return torch.cat([a * (h[:, classes:] - h[:, :classes]), 0 * h[:, classes:]], 1)

        whole = measured(Toy(branch, lambda h: h[:, :classes], blocks), x, labels)
        found = convergence_indices(whole)
        rest = [(1 - a) ** t for t in range(blocks + 1)]
        errors = [((1 - r) <= strength.double() * r).double().mean().item() for r in rest]
        after = twins.normalised_errors(errors[:blocks], errors[blocks], 1 - 1 / classes)
        assert only(found, "convergence") == pytest.approx(1 - mean(after), abs=5e-3)
        assert only(found, "divergence") == 0
        assert only(found, "recurrence") == 1
        values.append(only(found, "convergence"))
        beside = companions(whole)
        evenly = mean([(r - rest[-1]) / (1 - rest[-1]) for r in rest[1:]])
        assert only(beside, "remaining_distance") == pytest.approx(evenly, rel=1e-3, abs=1e-6)
        if a < 1:
            assert only(beside, "last_step") == pytest.approx((1 - a) ** (blocks - 1), rel=1e-2)
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.3


def test_the_slow_twin_on_a_network() -> None:
    """Every changed network is built by hand, its errors are counted, the indices follow by their definition."""
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(3, 2), widths=(4, 8), classes=4)).eval()
    x = torch.randn(40, 3, 8, 8)
    with torch.no_grad():
        labels = model(x).argmax(1)
        labels[::5] = (labels[::5] + 1) % 4
        whole = measured(model, x, labels)

        def error(section: int, order: list[int]) -> float:
            return (rebuilt(model, f"sections.{section}", order)(x).argmax(1) != labels).double().mean().item()

        intact, networks = error(0, [0, 1, 2]), []
        for s, n in enumerate((3, 2)):
            row = list(range(n))

            def area(orders: list[list[int]], s: int = s) -> float:
                errors = [error(s, order) for order in orders]
                return mean(twins.normalised_errors(errors, intact, 0.75))

            last = area([row[: n - k] for k in range(1, n + 1)])
            first = area([row[k:] for k in range(1, n + 1)])
            pair = area([[j if k == i else k for k in row] for i in row for j in row if i != j])
            more = area([row + [n - 1] * k for k in range(1, n + 1)])
            networks.append(
                {
                    "convergence": 1 - last,
                    "recurrence": 1 - pair,
                    "recurrence_drop_first": 1 - first,
                    "drop_gap": abs(first - last),
                    "divergence": more,
                }
            )
    found = convergence_indices(whole, draws=50)
    for name in networks[0]:
        for s in (0, 1):
            assert found[name]["sections"][s]["value"] == pytest.approx(networks[s][name], abs=1e-6), (name, s)
        assert found[name]["network"]["value"] == pytest.approx((networks[0][name] + networks[1][name]) / 2, abs=1e-6)
    assert found["intact_error"] == pytest.approx(0.2)
    json.dumps(found, allow_nan=False)
    json.dumps(companions(whole), allow_nan=False)


def test_a_network_no_better_than_guessing_is_undefined() -> None:
    x = torch.randn(60, 3)
    whole = measured(Toy(torch.zeros_like, lambda h: h, 2), x, (x.argmax(1) + 1) % 3)
    found = convergence_indices(whole)
    assert found["convergence"] == {"sections": [None], "network": None}
    assert found["intact_error"] == 1
    labels = torch.where(torch.arange(60) < 39, x.argmin(1), x.argmax(1))  # error 0.65 of 0.667
    barely = convergence_indices(measured(Toy(torch.zeros_like, lambda h: h, 2), x, labels), draws=20)
    assert barely["convergence"]["network"] is None
    labels = x.argmax(1)
    labels[:37] = (labels[:37] + 1) % 3  # error 0.617 of 0.667: many draws come too near
    near = convergence_indices(measured(Toy(torch.zeros_like, lambda h: h, 2), x, labels))
    assert 0 < near["convergence"]["network"]["undefined_draws"] < 1000


def test_sections_of_one_block_have_no_replacement_and_are_left_out_of_the_mean() -> None:
    model = ResNet(ResNetConfig(blocks=(2, 1), widths=(4, 8), classes=3)).eval()
    x = torch.randn(12, 3, 8, 8)
    with torch.no_grad():
        found = convergence_indices(measured(model, x, model(x).argmax(1)))
    assert found["recurrence"]["sections"][1] is None
    assert found["recurrence"]["network"] == found["recurrence"]["sections"][0]
    assert found["convergence"]["sections"][1] is not None


def test_several_labels_have_the_chance_of_an_exact_match() -> None:
    x = torch.rand(80, 10)
    labels = torch.zeros(80, 10, dtype=torch.uint8).scatter_(1, x.topk(3, dim=1).indices, 1)
    found = convergence_indices(measured(Toy(lambda h: -h.roll(1, 1), lambda h: h, 2), x, labels))
    assert found["chance_error"] == pytest.approx(1 - 1 / 120)


def test_examples_without_a_counted_token_do_not_count() -> None:
    x = torch.randn(20, 4, 3)
    model = Toy(lambda h: 0.5 * h.roll(1, -1), lambda h: h, 3)
    labels = model(x).argmax(-1)
    found = convergence_indices(measured(model, x[:15], labels[:15]), draws=2)
    labels[15:] = -100
    more = convergence_indices(measured(model, x, labels), draws=2)
    for name in ("convergence", "divergence", "recurrence"):
        assert only(more, name) == pytest.approx(only(found, name))
    assert more["intact_error"] == pytest.approx(0)


def test_without_labels_agreement_takes_their_place() -> None:
    x = torch.randn(30, 3)
    whole = measured(Toy(lambda h: 0.3 * h.roll(1, 1), lambda h: h, 3), x, None)
    with pytest.raises(ValueError, match="no interventions with labels"):
        convergence_indices(whole)
    found = convergence_indices(whole, by="agreement")
    changed = 1 - whole.mean("drop_last_agreement")
    assert only(found, "convergence") == pytest.approx(1 - (changed / (2 / 3)).clamp(0, 1).mean().item())
    assert found["intact_error"] == 0


def test_draws_are_paired_and_follow_the_seed() -> None:
    x = torch.randn(100, 3)
    model = Toy(lambda h: 0.4 * h.roll(1, 1), lambda h: h, 3)
    one = measured(model, x, model(x).argmax(1))
    a, b = convergence_indices(one, draws=100), convergence_indices(one, draws=100)
    assert a == b
    assert a != convergence_indices(one, draws=100, seed=1)
    # The gap is that of the same draws: for equal blocks it is 0 in each of them.
    assert a["drop_gap"]["network"] == {"value": 0, "low": 0, "high": 0, "undefined_draws": 0}
    narrow = convergence_indices(one, draws=100, level=0.5)["divergence"]["network"]
    assert a["divergence"]["network"]["low"] <= narrow["low"] <= narrow["high"] <= a["divergence"]["network"]["high"]


def test_intervals_have_the_width_of_a_binomial() -> None:
    n = 1000
    x = ((torch.arange(n) + 0.5) / n * 2 - 1)[:, None]
    model = Toy(lambda h: torch.full_like(h, 0.3), lambda h: torch.cat([0 * h, h - 0.3], 1), 1)
    found = convergence_indices(measured(model, x, (x[:, 0] > 0).long()), draws=4000)["convergence"]["network"]
    deviation = math.sqrt(0.15 * 0.85 / n) / 0.5  # e(1) = 0.15, e(0) = 0, chance 0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_only_what_was_measured_is_there() -> None:
    x = torch.randn(10, 3)
    model = Toy(lambda h: 0.1 * h, lambda h: h, 2).eval()
    some = profile(model, [(x, x.argmax(1))], [interventions(drops_last)])
    assert convergence_indices(some).keys() == {"convergence", "intact_error", "chance_error"}
    assert companions(some) == {}
    with pytest.raises(ValueError, match="no interventions; measure it with"):
        convergence_indices(profile(model, [(x, None)], [readouts]))
    with pytest.raises(ValueError, match="by is 'loss'"):
        convergence_indices(some, by="loss")
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        convergence_indices(some, level=1.0)


def test_the_best_scale_has_the_least_loss_after_the_last_step() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    x = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    huge = Toy(lambda h: -h + torch.tensor([3.0, 0.0]), lambda h: h, 1).eval()
    probe = interventions(partial(unrolls, times=5, scales=SCALES), drops)
    assert best_scale(profile(huge, [(x, labels)], [probe]))["scale"] in SCALES
    exploding = Toy(lambda h: h * 1e20 * torch.tensor([-1.0, 1.0]), lambda h: h, 1).eval()
    found = best_scale(profile(exploding, [(x + 1, labels)], [probe]))
    assert found["exploded"]["1"] == 1
    assert set(found["loss"].values()) == {found["scale"]} == {None}  # of five that explode none is the best
    with pytest.raises(ValueError, match="no loss after extra steps"):
        best_scale(profile(huge, [(x, None)], [probe]))
