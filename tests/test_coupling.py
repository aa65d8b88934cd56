"""Soft gradient coupling: between ordinary training and one recurrent block."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
from residuum.cli import main
from residuum.data import Splits, load_splits
from residuum.layers.coupling import Coupling, achieved_sharing, alike, couple_gradients_, mix_weights_, tied
from residuum.layers.lipschitz import Limit
from residuum.layers.pairs import Verlet
from residuum.layers.sharing import NAIVE, Sharing, fold, share
from residuum.layers.steps import Explicit
from residuum.models import ResNet, ResNetConfig
from residuum.rates import Cosine, Steps
from residuum.training import TrainConfig, train
from trainer import Small

NETWORK = ResNetConfig(blocks=(3, 2), widths=(4, 8), channels=1)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return Splits(*(part.take(96, seed=0) for part in load_splits("digits")))


def network(likeness: float = 1.0, seed: int = 0) -> ResNet:
    """A network whose blocks start alike."""
    model = ResNet(NETWORK, seed=seed)
    for blocks in model.sections:
        mix_weights_(blocks, copy.deepcopy(blocks[0]), likeness, couple="all")
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def layers(count: int, seed: int = 0, width: int = 5) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(count)
    )


@pytest.mark.parametrize("couple", ["weights", "all"])
def test_strength_0_is_ordinary_training_to_the_bit(digits: Splits, couple: str) -> None:
    plain, coupled = network(0.5), network(0.5)
    config = TrainConfig(epochs=1, batch=24)
    train(plain, digits, config)
    train(coupled, digits, replace(config, coupling=Coupling(0.0, couple)))
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(coupled)[name]), name


@pytest.mark.parametrize("couple", ["weights", "all"])
@pytest.mark.parametrize("settings", [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0)], ids=["sgd", "momentum", "adam"])
def test_strength_1_keeps_equal_weights_equal_to_the_bit(
    digits: Splits, couple: str, settings: tuple[str, float]
) -> None:
    model = network()
    before = weights(model)
    config = TrainConfig(epochs=2, batch=24, lr=0.05, optimiser=settings[0], momentum=settings[1], clip=1.0)
    train(model, digits, config, after_backward=Coupling(1.0, couple).after_backward)
    for blocks in model.sections:
        first = blocks[0].state_dict()
        for block in blocks[1:]:
            for name, value in block.state_dict().items():
                if couple == "all" or "conv" in name:
                    assert torch.equal(value, first[name]), name
    assert not torch.equal(before["sections.0.0.conv1.weight"], model.sections[0][0].conv1.weight)
    if couple == "weights":  # batch norm goes its own ways
        assert not torch.equal(model.sections[0][0].norm1.weight, model.sections[0][1].norm1.weight)


def test_the_recurrent_end_has_no_gap_between_dropping_first_and_last(digits: Splits) -> None:
    """Source: spec of P0's indices: the gap is exactly 0 for strength 1 with shared batch norm."""
    model = network()
    train(model, digits, TrainConfig(epochs=1, batch=24), after_backward=Coupling(1.0, "all").after_backward)
    stream = model.cut(torch.randn(5, 1, 8, 8))
    with torch.no_grad():
        assert torch.equal(stream.run(((0, 1), (0, 1))).output, stream.run(((1, 2), (0, 1))).output)
    train(model, digits, TrainConfig(epochs=1, batch=24), after_backward=Coupling(0.5, "all").after_backward)
    with torch.no_grad():
        assert not torch.equal(stream.run(((0, 1), (0, 1))).output, stream.run(((1, 2), (0, 1))).output)


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_strength_1_is_weight_tying(optimiser: str) -> None:
    """Against autograd's sum, 50 steps in float64: rate / T and T times the decay; Adam: eps times T."""
    times, rate, decay, eps = 4, 0.05, 0.02, 1e-4
    blocks = layers(times).double()
    mix_weights_(blocks, copy.deepcopy(blocks[0]), 1.0)
    tied = oracles.Tied(copy.deepcopy(blocks[0]), times)
    x, goal = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    if optimiser == "adam":
        ours = torch.optim.Adam(blocks.parameters(), lr=rate, eps=eps)
        theirs = torch.optim.Adam(tied.parameters(), lr=rate, eps=eps * times)
    else:
        sgd = partial(torch.optim.SGD, momentum=0.9 if optimiser == "momentum" else 0.0)
        ours = sgd(blocks.parameters(), lr=rate, weight_decay=decay)
        theirs = sgd(tied.parameters(), lr=rate / times, weight_decay=decay * times)
    for _ in range(50):
        h = x
        for block in blocks:
            h = h + block(h)
        ours.zero_grad()
        (h - goal).square().mean().backward()
        couple_gradients_(blocks, 1.0)
        ours.step()
        theirs.zero_grad()
        (tied(x) - goal).square().mean().backward()
        theirs.step()
    for a, b in zip(blocks[-1].parameters(), tied.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
    assert not torch.allclose(tied.block[0].weight, layers(1).double()[0][0].weight, atol=1e-3)


def test_the_sum_at_strength_1_is_the_gradient_of_tying() -> None:
    blocks = layers(3).double()
    mix_weights_(blocks, copy.deepcopy(blocks[0]), 1.0)
    tied = oracles.Tied(copy.deepcopy(blocks[0]), 3)
    x = torch.randn(6, 5, dtype=torch.float64)
    h = x
    for block in blocks:
        h = h + block(h)
    h.square().sum().backward()
    tied(x).square().sum().backward()
    couple_gradients_(blocks, 1.0, reduce="sum")
    for a, b in zip(blocks[1].parameters(), tied.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@given(strength=st.floats(0, 1), count=st.integers(2, 5), seed=st.integers(0, 99))
def test_coupling_keeps_the_mean_gradient_and_shrinks_deviations(strength: float, count: int, seed: int) -> None:
    blocks = layers(count, seed).double()
    for p in blocks.parameters():
        p.grad = torch.randn_like(p)
    before = torch.stack([block[0].weight.grad.clone() for block in blocks])
    couple_gradients_(blocks, strength)
    after = torch.stack([block[0].weight.grad for block in blocks])
    assert torch.allclose(after.mean(0), before.mean(0), rtol=0, atol=1e-13)
    assert torch.allclose(after - after.mean(0), (1 - strength) * (before - before.mean(0)), rtol=0, atol=1e-13)


def test_coupled_training_with_accumulation_and_strength_per_section(digits: Splits) -> None:
    """Without batch norm's batches the parts of a step add up; section 2 at strength 0 is not coupled."""
    whole, parts = network(), network()
    for model in (whole, parts):
        model.double().eval()
    coupling = Coupling((1.0, 0.0), "all")
    for model, accumulate in ((whole, 1), (parts, 3)):
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.train = lambda mode=True, norm=norm: norm  # stays in eval mode
            norm.training = False
        settings = TrainConfig(epochs=1, batch=24, accumulate=accumulate)
        train(model, digits, settings, after_backward=coupling.after_backward)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], rtol=0, atol=1e-9), name
    assert torch.equal(whole.sections[0][0].conv1.weight, whole.sections[0][1].conv1.weight)
    assert not torch.equal(whole.sections[1][0].conv1.weight, whole.sections[1][1].conv1.weight)


def test_the_strength_follows_its_rate() -> None:
    model = network(0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = model.sections[0][0].conv1.weight.grad.clone()
    coupling = Coupling(1.0, rate=Cosine())
    coupling.after_backward(model, 1.0)
    assert torch.equal(model.sections[0][0].conv1.weight.grad, before)
    coupling.after_backward(model, 0.0)
    assert torch.equal(model.sections[0][0].conv1.weight.grad, model.sections[0][1].conv1.weight.grad)


def test_achieved_sharing_is_that_of_the_slow_twin() -> None:
    blocks = layers(4).double()
    found = achieved_sharing(blocks)
    s, effective = oracles.sharing([torch.cat([p.flatten() for p in b.parameters()]).detach().numpy() for b in blocks])
    assert found["sharing"] == pytest.approx(s, rel=1e-12)
    assert found["effective_parameters"] == pytest.approx(effective, rel=1e-12)
    assert found["above_unrelated"] == pytest.approx((s - 0.25) / 0.75, rel=1e-12)
    mean = torch.stack([b[0].weight for b in blocks]).mean(0)
    assert len(found["deviations"]) == 4
    only = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2)).double()
    assert achieved_sharing(only)["deviations"][0] == pytest.approx(
        ((only[0].weight - only[1].weight).norm() / (only[0].weight + only[1].weight).norm()).item(), rel=1e-12
    )
    assert mean.shape == (5, 5)


def test_equal_and_orthogonal_blocks_are_the_ends_of_sharing() -> None:
    equal = layers(3)
    mix_weights_(equal, copy.deepcopy(equal[0]), 1.0)
    size = sum(p.numel() for p in equal[0].parameters())
    found = achieved_sharing(equal)
    assert found["sharing"] == pytest.approx(1)
    assert found["effective_parameters"] == pytest.approx(size)
    assert found["deviations"] == pytest.approx([0, 0, 0], abs=1e-7)
    other = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(3))
    with torch.no_grad():
        for i, layer in enumerate(other):
            layer.weight.copy_(torch.eye(3)[i : i + 1])
    found = achieved_sharing(other)
    assert found["sharing"] == pytest.approx(1 / 3)
    assert found["above_unrelated"] == pytest.approx(0, abs=1e-12)
    assert found["effective_parameters"] == pytest.approx(9)
    with torch.no_grad():
        for layer in other:
            layer.weight.zero_()
    assert achieved_sharing(other)["sharing"] is None


def test_what_is_achieved_stands_in_the_history(digits: Splits) -> None:
    model = network(0.0)
    history = train(model, digits, TrainConfig(epochs=1, batch=24, coupling=Coupling(0.9)))
    found = history[-1]["sharing"]
    assert [len(section["deviations"]) for section in found] == [3, 2]
    whole = sum(p.numel() for p in model.parameters())
    assert history[-1]["effective_parameters"] < whole
    assert history[-1]["effective_parameters"] > 0.9 * whole  # independent weights: nearly all count


def test_tied_weights_are_not_mixed_once_for_each_block_that_has_them() -> None:
    one, common = layers(1)[0], layers(1, seed=1)[0]
    before = one[0].weight.clone()
    for blocks, other in (([one, one], common), ([one, layers(1, seed=2)[0]], one)):
        with pytest.raises(ValueError, match="one and the same or have tied parameters"):
            mix_weights_(blocks, other, 0.5)
    assert torch.equal(one[0].weight, before)


def test_mixed_weights_keep_their_variance() -> None:
    blocks = layers(3, width=200)
    mix_weights_(blocks, layers(1, seed=7, width=200)[0], 0.4)
    original = layers(3, width=200)
    for block, before in zip(blocks, original, strict=True):
        assert block[0].weight.var().item() == pytest.approx(before[0].weight.var().item(), rel=0.03)
    a, b = blocks[0][0].weight.flatten(), blocks[1][0].weight.flatten()
    shared = 0.4**2 / (0.6**2 + 0.4**2)  # the part of the variance that is common
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].item() == pytest.approx(shared, abs=0.02)


@pytest.mark.parametrize("couple", ["weights", "all"])
def test_equal_blocks_are_folded_into_a_loop_that_computes_the_same_bits(digits: Splits, couple: str) -> None:
    config = ResNetConfig(blocks=(3,), widths=(4,), channels=1, alike=1.0)
    model = ResNet(config)
    train(model, digits, TrainConfig(epochs=1, batch=24, coupling=Coupling(1.0, couple)))
    section = nn.Sequential(*model.sections[0])
    folded = fold(tied(section, couple=couple))
    assert len(folded) == 1
    assert folded[0].times == 3
    norms = sum(m.weight.numel() + m.bias.numel() for m in section[0].modules() if isinstance(m, nn.BatchNorm2d))
    size = sum(p.numel() for p in section[0].parameters())
    assert sum(p.numel() for p in folded.parameters()) == size + (2 * norms if couple == "weights" else 0)
    h = torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(folded[0](h), section(h))


def test_blocks_that_differ_are_folded_to_their_mean() -> None:
    blocks = layers(3).double()
    folded = fold(tied(blocks))
    expected = torch.stack([block[0].weight for block in blocks]).mean(0)
    assert torch.allclose(folded[0].block[0].weight, expected, rtol=0, atol=1e-15)
    assert not torch.equal(blocks[0][0].weight, expected)  # the blocks themselves are left as they are


def test_a_network_starts_as_alike_as_it_is_configured() -> None:
    def likeness(alike: float) -> list[float]:
        config = ResNetConfig(blocks=(6, 6), widths=(8, 8), channels=1, alike=alike)
        return [achieved_sharing(blocks)["above_unrelated"] for blocks in ResNet(config, seed=3).sections]

    assert likeness(1.0) == pytest.approx([1, 1])
    assert likeness(0.0) == pytest.approx([0, 0], abs=0.05)
    assert likeness(0.5) == pytest.approx([0.5, 0.5], abs=0.08)  # half of the variance is common
    weights = ResNet(ResNetConfig(blocks=(2,), widths=(64,), alike=0.5)).sections[0][1].conv1.weight
    assert weights.var().item() == pytest.approx(2 / (9 * 64), rel=0.05)
    with pytest.raises(ValueError, match=r"alike is 2.0; it must lie in \[0, 1\]"):
        ResNetConfig(alike=2.0)


def test_clipped_norms_are_norms_still() -> None:
    model = ResNet(ResNetConfig(blocks=(2,), widths=(4,), limit=Limit(1.0, 8)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    couple_gradients_(model.sections[0], 1.0)
    first, second = model.sections[0]
    assert torch.equal(
        first.conv1.parametrizations.weight.original.grad, second.conv1.parametrizations.weight.original.grad
    )
    gammas = [block.norm1.parametrizations.weight.original.grad for block in (first, second)]
    assert not torch.equal(*gammas)


def test_networks_that_cannot_be_coupled_are_refused_before_the_first_step(digits: Splits) -> None:
    with pytest.raises(ValueError, match="Small has no sections to couple"):
        train(Small(norm=True), digits, TrainConfig(coupling=Coupling()))
    shared = ResNet(ResNetConfig(blocks=(3,), widths=(4,), channels=1, sharing=Sharing(free=1)))
    with pytest.raises(ValueError, match="one and the same or have tied parameters"):
        train(shared, digits, TrainConfig(coupling=Coupling()))
    for model in (ResNet(ResNetConfig((1, 1), (4, 4), 1)), fold(shared_by_all())):
        with pytest.raises(ValueError, match="no section of this ResNet has 2 blocks or more to couple"):
            train(model, digits, TrainConfig(coupling=Coupling()))
    with pytest.raises(ValueError, match=r"strength times rate reaches 1\.8; it must stay in"):
        Coupling(0.9, rate=Steps(((0.5, 2.0),)))
    assert Coupling(0.5, rate=Steps(((0.5, 2.0),))).strength == 0.5


def shared_by_all() -> ResNet:
    return ResNet(ResNetConfig(blocks=(3,), widths=(4,), channels=1, sharing=replace(NAIVE, free=0)))


def test_statistics_of_other_names_cannot_be_one_set() -> None:
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), nn.Sequential(nn.Linear(3, 3))]
    model = nn.Module()
    model.sections = [blocks]
    Coupling(couple="weights").check(model)
    with pytest.raises(ValueError, match=r"blocks 0 and 1 cannot be coupled: '1.running_mean' has shape \(3,\).*None"):
        Coupling(couple="all").check(model)


def test_instance_norms_are_norms() -> None:
    blocks = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2, affine=True)) for _ in range(2)]
    assert len(alike(blocks)) == 2
    assert len(alike(blocks, "all")) == 4


@pytest.mark.parametrize("step", [Explicit(0.5), Verlet(0.5)])
def test_blocks_of_steps_start_alike_and_stay_so(digits: Splits, step: Explicit | Verlet) -> None:
    config = ResNetConfig((3,), (4,), 1, norm="group", step=step, alike=1.0)
    model = ResNet(config)
    assert achieved_sharing(ResNet(replace(config, alike=0.5)).sections[0])["above_unrelated"] < 0.9
    train(model, digits, TrainConfig(epochs=1, batch=48, coupling=Coupling(1.0, "all")))
    for row in alike(model.sections[0], "all"):
        assert all(torch.equal(p, row[0]) for p in row)


def test_blocks_with_shared_statistics_keep_their_own_scales() -> None:
    blocks = share([nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))], [0, 0, 0], affine="unshared")
    for scale, block in enumerate(blocks, start=1):
        nn.init.constant_(block[1][1].weight, scale)
    again = tied(blocks)
    assert [block[1][1].weight.tolist() for block in again] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert len({id(block[0].weight) for block in again}) == len({id(block[1][0]) for block in again}) == 1
    assert len(alike(blocks, tied=True)) == 2  # of the convolution
    assert torch.equal(again.eval()[2](x := torch.randn(2, 2, 3, 3)), blocks.eval()[2](x))


def test_parameters_correspond_by_name_and_not_by_the_order_of_making() -> None:
    class Block(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            for name in order:
                setattr(self, name, nn.Linear(3, 3))
                setattr(self, f"{name}_norm", nn.BatchNorm1d(3))

        def forward(self, h: Tensor) -> Tensor:
            return h + self.b_norm(self.b(torch.relu(self.a_norm(self.a(h)))))

    blocks = [Block("ab"), Block("ba")]
    for block in blocks:
        for name, p in block.named_parameters():
            p.grad = torch.full_like(p, 1.0 if name.startswith("a") else 3.0)
    couple_gradients_(blocks, 1.0)
    for block in blocks:
        assert all((p.grad == (1.0 if name.startswith("a") else 3.0)).all() for name, p in block.named_parameters())
    blocks[0](torch.randn(8, 3))
    blocks[1].load_state_dict(blocks[0].state_dict())
    assert achieved_sharing(blocks)["sharing"] == 1
    x = torch.randn(4, 3)
    for couple in ("weights", "all"):
        assert torch.equal(tied(blocks, couple=couple)[1].eval()(x), blocks[1].eval()(x))


def test_what_cannot_be_coupled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"coupling strength is 1\.5; it must lie in \[0, 1\]"):
        Coupling(1.5)
    with pytest.raises(ValueError, match=r"coupling strength is -0\.1"):
        couple_gradients_(layers(2), -0.1)
    with pytest.raises(ValueError, match="did you mean 'weights'"):
        Coupling(couple="weight")
    with pytest.raises(ValueError, match="needs at least 2 blocks; there are 1"):
        couple_gradients_(layers(1), 0.5)
    with pytest.raises(ValueError, match="needs at least 2 blocks; there are 0"):
        tied([])
    unequal = [nn.Linear(3, 3), nn.Linear(3, 4)]
    with pytest.raises(ValueError, match=r"blocks 0 and 1 cannot be coupled: 'weight' has shape \(3, 3\).*\(4, 3\)"):
        couple_gradients_(unequal, 0.5)
    block = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="one and the same or have tied parameters"):
        couple_gradients_([block, block], 0.5)
    norms = [nn.Sequential(nn.BatchNorm1d(3)) for _ in range(2)]
    for function in (achieved_sharing, partial(couple_gradients_, strength=0.5)):
        with pytest.raises(ValueError, match="blocks of Sequential have no parameters to couple with 'weights'"):
            function(norms)
    for function in (achieved_sharing, tied, partial(couple_gradients_, strength=0.5)):
        with pytest.raises(ValueError, match="unknown couple 'alll'; did you mean 'all'"):
            function(layers(2), couple="alll")
    with pytest.raises(ValueError, match="coupling has 3 strengths, the network 2 sections"):
        Coupling((0.1, 0.2, 0.3)).after_backward(network(), 0.0)


def test_gradients_that_cannot_be_coupled_are_left_as_they_are() -> None:
    """All of them, so that whoever mends the last and tries again does not mix the first twice."""
    blocks, lacking = layers(2), [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    for number, block in enumerate((*blocks, *lacking)):
        for p in block.parameters():
            p.grad = torch.full_like(p, number)
    blocks[1][-1].bias.grad = None
    lacking[1][1].running_mean = None
    before = [copy.deepcopy([p.grad for p in block.parameters()]) for block in (*blocks, *lacking)]
    with pytest.raises(ValueError, match="1 of 2 blocks have a gradient; couple blocks that all ran"):
        couple_gradients_(blocks, 0.5)
    with pytest.raises(ValueError, match=r"'1\.running_mean' has shape"):
        couple_gradients_(lacking, 0.5, couple="all")
    after = [[p.grad for p in block.parameters()] for block in (*blocks, *lacking)]
    assert all(
        a is b is None or torch.equal(a, b)
        for ours, theirs in zip(before, after, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_the_command_couples_blocks_of_steps_from_equal_weights(tmp_path: Path) -> None:
    made = ["--blocks", "2", "--widths", "4", "--norm", "group", "--epochs", "1", "--limit", "40", "--device", "cpu"]
    coupled = ["--couple", "1", "--couple-norms", "--step", "explicit"]
    assert main(["train", "--out", str(tmp_path / "a"), *made, *coupled]) == 0
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    assert content["network"]["alike"] == 1
    assert content["training"]["history"][-1]["sharing"][0]["deviations"] == [0, 0]


def test_a_section_whose_only_block_changes_the_shape_has_none_to_start_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = ResNetConfig(widths=(4, 8), blocks=(2, 1), transition="projection", alike=1.0)
    first, second = ResNet(config).sections
    assert torch.equal(first[0].conv1.weight, first[1].conv1.weight)
    assert not len(second)
    options = ["--couple", "1", "--epochs", "1", "--limit", "40", "--device", "cpu", "--out", str(tmp_path / "a")]
    assert main(["train", "--network", "resnet8", *options]) == 2
    assert "coupling: no section of this ResNet has 2 blocks or more to couple" in capsys.readouterr().err
