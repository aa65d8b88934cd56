"""Shared blocks: weights exist once, gradients add up, loops compute the same bits, all else works on them."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles_sharing
from residuum import cut
from residuum.data import ImageSet, Preparation, Splits
from residuum.files import restore_, stored
from residuum.layers.lipschitz import clip_
from residuum.layers.sharing import (
    NAIVE,
    UBN,
    Affine,
    Loop,
    Sharing,
    batch_norms,
    fold,
    loop,
    share,
    unrolled,
    unshare_statistics,
    with_norms,
)
from residuum.loading import load_model, save_run
from residuum.models import Residual, ResNet, ResNetConfig, count_parameters
from residuum.nulls import calibrate_, null_model, recalibrated
from residuum.probes import gradients, passive, state_norm
from residuum.profiles import profile
from residuum.schedules import drop
from residuum.training import TrainConfig, evaluate, train
from residuum.watching import gradient_ratio, gradient_ratios, recalibration

KINDS = [NAIVE, UBN, replace(UBN, statistics="shared"), replace(UBN, affine="shared"), replace(UBN, gamma=1.0)]
NAMES = ["naive", "ubn", "statistics shared", "affine shared", "gamma 1"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


def network(kind: Sharing | None, *, seed: int = 0, **options: object) -> ResNet:
    """Two sections of 2 free and 3 or 4 shared blocks (one of the free ones is a projection), in float64."""
    sharing = None if kind is None else replace(kind, free=2)
    config = ResNetConfig((5, 5), (4, 6), 1, 3, "projection", bias=True, sharing=sharing, **options)
    return ResNet(config, seed=seed).double()


def images(count: int = 6, size: int = 8, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used(model: ResNet) -> ResNet:
    """With statistics that are not those of a fresh network, in eval mode."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(images(seed=_))
    return model.eval()


class Cell(nn.Module):
    """A user's block, with batch norm inside a Sequential and a parameter of its own."""

    def __init__(self, width: int = 4, *, norm: bool = True) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.5))
        middle = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.inner = nn.Sequential(nn.Linear(width, width), middle, nn.Tanh(), nn.Linear(width, width))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, 0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gain * self.inner(h)


class Net(nn.Module):
    """A user's network over a list of blocks."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(3, 4), blocks, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


# What is tied --------------------------------------------------------------------------------------------------------


@kinds
def test_what_is_shared_is_one_object_and_what_is_not_is_two(kind: Sharing) -> None:
    for section, free in zip(network(kind).sections, (2, 1), strict=True):
        assert len(section) == 5 - (free == 1)
        a, b = section[free], section[-1]
        assert (a is b) == kind.naive
        assert a.conv1 is b.conv1
        assert a.conv2 is b.conv2
        for one, other in ((a.norm1, b.norm1), (a.norm2, b.norm2)):
            first, second = _parts(one), _parts(other)
            assert (first["mean"] is second["mean"]) == (kind.statistics == "shared")
            assert (first["gamma"] is second["gamma"]) == (kind.affine == "shared")
            assert (first["beta"] is second["beta"]) == (kind.affine == "shared")
            assert first["gamma"].float().eq(kind.gamma).all()
        assert section[0].conv1 is not a.conv1
        assert section[0].norm1.weight.eq(1).all()


def _parts(norm: nn.Module) -> dict[str, Tensor]:
    statistics, affine = norm if isinstance(norm, nn.Sequential) else (norm, norm)
    return {"mean": statistics.running_mean, "gamma": affine.weight, "beta": affine.bias}


def test_gamma_everywhere_is_in_all_blocks_but_not_in_the_head() -> None:
    model = network(replace(UBN, everywhere=True))
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    assert len(blocks) == 10
    assert all(
        block.norm1.weight.float().eq(0.1).all() and block.norm2.weight.float().eq(0.1).all() for block in blocks
    )
    assert model.norm.weight.eq(1).all()


@kinds
def test_sharing_with_one_application_is_no_sharing(kind: Sharing) -> None:
    config = ResNetConfig((3, 3), (4, 6), 1, 3)
    plain, shared = ResNet(config), ResNet(replace(config, sharing=replace(kind, free=2)))
    assert plain.state_dict().keys() == shared.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), shared.parameters(), strict=True))
    assert torch.equal(plain(images().float()), shared(images().float()))


@kinds
def test_a_shared_section_computes_what_untied_copies_of_its_blocks_compute(kind: Sharing) -> None:
    """Not for shared statistics in training mode, whose running values depend on all applications."""
    section = used(network(kind)).sections[0]
    twin, h = oracles_sharing.untied(section), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert torch.equal(oracles_sharing.run(section, h), oracles_sharing.run(twin, h))


@kinds
def test_gradients_of_a_shared_weight_are_the_sum_over_its_applications(kind: Sharing) -> None:
    section = network(kind).sections[0].train()
    shared = section[2:]
    twin = oracles_sharing.untied(shared)
    h = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    for blocks in (shared, twin):
        oracles_sharing.run(blocks, h).square().sum().backward()
    for name in ("conv1.weight", "conv2.weight", "conv1.bias", "conv2.bias"):
        tied = dict(shared[0].named_parameters())[name].grad
        torch.testing.assert_close(tied, oracles_sharing.summed_gradients(twin, name), rtol=1e-9, atol=1e-11)
    name = next(n for n, p in shared[0].named_parameters() if p is _parts(shared[0].norm1)["gamma"])
    gammas = {id(p): p.grad for p in (_parts(block.norm1)["gamma"] for block in shared)}
    assert len(gammas) == (1 if kind.affine == "shared" else 3)
    total = oracles_sharing.summed_gradients(twin, name)
    torch.testing.assert_close(torch.stack(list(gammas.values())).sum(0), total, rtol=1e-9, atol=1e-11)


def test_statistics_and_affine_apart_are_batch_norm() -> None:
    (split, _) = share([Cell().double()], (0, 0), statistics="shared", affine="unshared")
    norm, scale = split.inner[1]
    assert isinstance(scale, Affine)
    with torch.no_grad():
        scale.weight.uniform_(-1, 1)
        scale.bias.uniform_(-1, 1)
    whole = nn.BatchNorm1d(4).double()
    whole.load_state_dict({"weight": scale.weight, "bias": scale.bias}, strict=False)
    h = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(split.inner[1](h), whole(h))
    torch.testing.assert_close(norm.running_var, whole.running_var)
    images = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    gamma, beta = torch.tensor([2.0, -3.0]).double(), torch.tensor([0.5, 1.0]).double()
    made = Affine(2).double()
    made.load_state_dict({"weight": gamma, "bias": beta})
    ours = made(nn.BatchNorm2d(2, affine=False).double()(images))
    torch.testing.assert_close(ours, oracles_sharing.batch_normalised(images, gamma, beta, 1e-5))


# Anybody's blocks ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.tuples(*[st.sampled_from(["shared", "unshared"])] * 2))
def test_weights_of_any_list_exist_once(pattern: list[int], kind: tuple[str, str]) -> None:
    numbers = {number: place for place, number in enumerate(dict.fromkeys(pattern))}
    pattern = [numbers[number] for number in pattern]
    blocks = [Cell() for _ in numbers]
    own = [sum(p.numel() for p in blocks[0].inner[i].parameters()) for i in (0, 3)]
    listed = share(blocks, pattern, statistics=kind[0], affine=kind[1])
    assert len(listed) == len(pattern)
    for place, number in enumerate(pattern):
        assert listed[place].inner[0] is blocks[number].inner[0]
        assert listed[place].gain is blocks[number].gain
    times = Counter(pattern)
    affine = sum(8 * (times[n] if kind[1] == "unshared" else 1) for n in times)
    assert sum(p.numel() for p in listed.parameters()) == len(blocks) * (sum(own) + 1) + affine
    assert all((times[n] == 1) <= (listed[pattern.index(n)] is blocks[n]) for n in times)


def test_a_users_network_is_cut_trained_folded_and_reset() -> None:
    torch.manual_seed(1)
    blocks = share([Cell(), Cell(), Cell()], (0, 1, 2, 2, 2, 2), statistics="unshared", affine="unshared", gamma=0.1)
    model, x = Net(blocks), torch.randn(9, 3)
    assert [block.inner[1].weight[0].item() for block in blocks] == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1])
    model(x)
    model.eval()
    for each in (model, fold(model)):
        stream = cut(each, x)
        assert stream.lengths == (6,)
        assert torch.equal(stream.run().output, model(x))
    null = null_model(model, [(x, None)], seed=4)
    assert null.blocks[2].inner[0] is null.blocks[5].inner[0]
    assert not torch.equal(null.blocks[2].inner[0].weight, model.blocks[2].inner[0].weight)


def test_blocks_without_norms_are_one_module() -> None:
    cell = Cell(norm=False)
    listed = share([cell], (0,) * 3)
    assert all(block is cell for block in listed)
    assert cut(Net(listed).eval(), torch.randn(2, 3)).lengths == (3,)


def test_with_norms_changes_nothing_else_and_leaves_the_block_alone() -> None:
    cell, norm = Cell(), nn.BatchNorm1d(4)
    before = dict(cell.named_modules())
    other = with_norms(cell, {"inner.1": norm})
    assert other.inner[1] is norm
    assert other.inner[0] is cell.inner[0]
    assert other.gain is cell.gain
    assert dict(cell.named_modules()) == before
    assert with_norms(cell, {}) is cell


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: share([Cell()], (0, 1)), r"pattern \(0, 1\) must name each of the 1 blocks"),
        (lambda: share([Cell(), Cell()], (0, 0)), "must name each of the 2 blocks"),
        (lambda: share([Cell(norm=False)], (0, 0), affine="unshared"), "Cell has no batch norm to unshare"),
        (lambda: share([Cell()], (0, 0), statistics="both"), "unknown statistics 'both'; .*known: shared, unshared"),
        (lambda: loop([]), "a loop needs at least 1"),
        (lambda: loop([Cell(), Cell()]), "blocks 0 and 1 do not share their weights"),
        (lambda: Loop(Cell(), 0), "times is 0; it must be 1 or more"),
        (lambda: Loop(Cell(), 3, others=[Cell()]), r"1 more than others \(1\)"),
        (lambda: fold(Net(nn.ModuleList([Cell(), Cell()]))), "Net has no neighbours that share their weights"),
        (lambda: Sharing(free=-1), "free is -1"),
        (lambda: Sharing(gamma=float("nan")), "gamma is nan"),
        (lambda: Sharing(affine="none"), "unknown affine 'none'"),
        (lambda: ResNetConfig((3, 3), (4, 6), sharing=Sharing()), r"with blocks \(3, 3\) nothing is shared"),
        (lambda: ResNetConfig((7,), (4,), norm="group", sharing=UBN), "no batch norm to unshare with norm 'group'"),
        (lambda: gradient_ratio(ResNet(ResNetConfig((2,), (4,), 1)), images().float(), torch.zeros(6)), "has only one"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_blocks_that_cannot_be_shared_are_left_as_they_are() -> None:
    blocks = [Cell(), Cell(norm=False)]
    with pytest.raises(ValueError, match="Cell has no batch norm to unshare"):
        share(blocks, (0, 0, 1, 1), statistics="unshared", gamma=0.1)
    assert blocks[0].inner[1].weight.tolist() == [1.0] * 4


def test_clipped_norms_share_both_or_none() -> None:
    block = Cell()
    clip_(block.inner[1])
    with pytest.raises(ValueError, match="shares one of statistics and affine cannot be clipped; share both or none"):
        share([block], (0, 0), affine="unshared")
    assert share([block], (0, 0), affine="unshared", statistics="unshared")[1] is not block


# Loops ---------------------------------------------------------------------------------------------------------------


@kinds
def test_a_folded_network_is_the_same_network(kind: Sharing) -> None:
    model, x = used(network(kind)), images()
    before = model.state_dict()
    folded = fold(model)
    assert torch.equal(folded(x), model(x))
    assert folded.cut(x).lengths == model.cut(x).lengths == (5, 4)
    names = [[block.name for block in section.blocks] for section in folded.cut(x).sections]
    assert names == [[block.name for block in section.blocks] for section in model.cut(x).sections]
    assert [type(block) for block in folded.sections[0]] == [Residual, Residual, Loop]
    assert (folded.sections[0][2].times, folded.sections[1][1].times) == (3, 3)
    assert (len(folded.sections[0][2].others) == 0) == kind.naive
    assert count_parameters(folded) == count_parameters(model)
    assert model.state_dict().keys() == before.keys()
    assert folded.sections[0][2].block.conv1 is not model.sections[0][2].conv1  # a copy
    assert all(
        torch.equal(a, b) for a, b in zip(folded.cut(x).run().states[1], model.cut(x).run().states[1], strict=True)
    )
    assert torch.equal(fold(folded)(x), folded(x))


@kinds
def test_a_folded_network_trains_as_the_unfolded(kind: Sharing) -> None:
    model = network(kind)
    folded = fold(model)
    for each in (model, folded):
        each.train()
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimiser.zero_grad()
            each(images(seed=step)).square().mean().backward()
            optimiser.step()
        each.eval()
    assert torch.equal(folded(images()), model(images()))


@kinds
def test_the_cut_of_a_shared_network_sees_every_application(kind: Sharing) -> None:
    """Also the cut that knows nothing of our networks."""

    class Foreign(nn.Module):
        def __init__(self, inner: ResNet) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = inner.stem, inner.sections[0], inner.dense

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            return h.mean((2, 3))

    model, x = used(network(kind)), images()
    assert torch.equal(cut(model, x).run().output, model(x))
    for each in (Foreign(model), Foreign(fold(model))):
        stream = cut(each.eval(), x)
        assert stream.lengths == (5,)
        assert torch.equal(stream.run().output, each(x))
        twin = oracles_sharing.untied(model.sections[0])
        del twin[3]
        without = oracles_sharing.run(twin, model.stem(x)).mean((2, 3))
        torch.testing.assert_close(stream.run(drop(stream.full, 0, 3)).output, without)


@kinds
def test_dropping_a_shared_block_drops_one_application(kind: Sharing) -> None:
    """Spec, pitfall 9: not the module."""
    model, x = used(network(kind)), images()
    stream = model.cut(x)
    for place in range(5):
        twin = oracles_sharing.untied(model.sections[0])
        del twin[place]
        h = oracles_sharing.run(model.sections[1], model.transitions[0](oracles_sharing.run(twin, model.stem(x))))
        torch.testing.assert_close(stream.run(drop(stream.full, 0, place)).output, model.readout(h))


def test_blocks_that_only_look_alike_are_not_folded() -> None:
    tanh = nn.Tanh()
    with pytest.raises(ValueError, match="no neighbours"):
        fold(nn.Sequential(tanh, tanh))
    cell = Cell()
    folded = fold(nn.ModuleList([cell, Cell(), cell, cell]))
    assert [type(block) for block in folded] == [Cell, Cell, Loop]
    assert len(unrolled(folded)) == 4
    assert torch.equal(Loop(cell.eval(), 3)(torch.ones(2, 4)), cell(cell(cell(torch.ones(2, 4)))))


# Files ---------------------------------------------------------------------------------------------------------------


@kinds
def test_a_saved_network_comes_back_identical_and_tied(kind: Sharing, tmp_path: Path) -> None:
    from safetensors import safe_open

    model = used(network(kind)).float()
    save_run(tmp_path, model, preparation=Preparation(1, (0.0,), (1.0,)), classes=("a", "b", "c"), training={})
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        names = list(file.keys())
        numbers = sum(file.get_tensor(n).numel() for n in names if not n.endswith("num_batches_tracked"))
    assert numbers == count_parameters(model)  # every number once
    loaded = load_model(str(tmp_path)).model
    assert loaded.config == model.config
    x = images().float()
    assert torch.equal(loaded(x), model(x))
    assert loaded.sections[0][2].conv1 is loaded.sections[0][4].conv1
    again = load_model(str(tmp_path), weights=str(tmp_path / "weights.safetensors")).model
    assert torch.equal(again(x), model(x))


def test_runs_of_before_sharing_are_still_read(tmp_path: Path) -> None:
    import json

    model = ResNet(ResNetConfig((2,), (4,), 1, 3)).eval()
    save_run(tmp_path, model, preparation=Preparation(1, (0.0,), (1.0,)), classes=("a", "b", "c"), training={})
    content = json.loads((tmp_path / "config.json").read_text())
    for new in ("stem", "cells", "norm", "sharing"):
        del content["network"][new]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_model(str(tmp_path)).model.config == model.config


@kinds
def test_the_stored_state_is_restored(kind: Sharing) -> None:
    model, other = used(network(kind)), network(kind, seed=9)
    state = stored(model)
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    restore_(other, state)
    assert torch.equal(other.eval()(images()), model(images()))
    with pytest.raises(RuntimeError, match="Missing key"):
        restore_(other, {name: value for name, value in state.items() if name != "sections.0.2.conv1.weight"})


# Training, null models, diagnostics ----------------------------------------------------------------------------------


def data(train_images: int = 96) -> Splits:
    generator = torch.Generator().manual_seed(0)
    preparation = Preparation(255, (0.5,), (0.3,))

    def split(name: str, count: int) -> ImageSet:
        labels = torch.randint(3, (count,), generator=generator)
        pixels = torch.randint(0, 120, (count, 1, 8, 8), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
        return ImageSet("shades", name, pixels.to(torch.uint8), labels, ("a", "b", "c"), preparation, "")

    return Splits(split("train", train_images), split("test", 48))


@kinds
def test_shared_networks_learn_stop_and_go_on_with_the_same_bits(kind: Sharing, tmp_path: Path) -> None:
    config, checkpoint = TrainConfig(epochs=4, batch=24, lr=0.05), tmp_path / "run.checkpoint"
    straight, stopped = (network(kind).float() for _ in range(2))
    history = train(straight, data(), config)
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    steps = itertools.count()

    def stop(model: nn.Module, share: float) -> None:
        if next(steps) == 9:
            raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power"):
        train(stopped, data(), config, after_backward=stop, checkpoint=checkpoint)
    resumed = network(kind, seed=5).float()
    train(resumed, data(), config, checkpoint=checkpoint)
    assert resumed.state_dict().keys() == straight.state_dict().keys()
    assert all(torch.equal(p, straight.state_dict()[name]) for name, p in resumed.state_dict().items())
    assert straight.sections[0][2].conv1 is straight.sections[0][4].conv1


@kinds
def test_null_models_are_shared_alike(kind: Sharing) -> None:
    model = used(network(kind))
    null = null_model(model, [(images(40), None)], seed=2)
    assert null.config == model.config
    assert null.sections[0][2].conv1 is null.sections[0][4].conv1
    assert _parts(null.sections[0][3].norm1)["gamma"].float().eq(kind.gamma).all()
    assert not torch.equal(null.sections[0][2].conv1.weight, model.sections[0][2].conv1.weight)
    folded = null_model(fold(model), [(images(40), None)], seed=2)
    assert torch.equal(folded(images()), null(images()))


def grown(kind: Sharing | None, seed: int) -> float:
    """Growth of the state norm over the 13 shared blocks of a section at calibrated initialisation, in mean."""
    sharing = None if kind is None else replace(kind, free=3)
    model = ResNet(ResNetConfig((17,), (8,), 1, 3, sharing=sharing), seed=seed).eval()
    x, y = images(64).float(), torch.zeros(64, dtype=torch.long)
    calibrate_(model, [(x, y)])
    norms = profile(model, [(x, y)], [passive(state_norm)]).mean("state_norm")
    return float(norms[-1] / norms[3])


def test_ubn_removes_the_growth_at_initialisation() -> None:
    """P1, section 4.5. Updates of one shared block point the same way, so states grow in proportion to their number.

    Untied updates are nearly orthogonal: their states grow like its root. Before training all batch norms are alike, so
    of UBN's ingredients only gamma 0.1 acts.
    """
    for seed in range(3):
        unshared = grown(None, seed)
        naive, ubn, statistics, affine, gamma_1 = (grown(kind, seed) for kind in KINDS)
        assert max(ubn, statistics, affine) < min(unshared, 1.3)
        assert min(naive, gamma_1) > 1.5 * unshared


def test_recalibration_gives_every_application_its_statistics() -> None:
    model = used(network(NAIVE))
    before = copy.deepcopy(model.state_dict())
    found = recalibrated(model, [(images(40), None)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    shared = found.sections[0][2:]
    assert len({id(block.norm1) for block in shared}) == 3
    assert all(block.norm1.weight is shared[0].norm1.weight for block in shared)
    assert all(block.conv1 is shared[0].conv1 for block in shared)
    # Each application now normalises as a network in training mode does, up to n / (n - 1) in the variances.
    with torch.no_grad():
        batch = copy.deepcopy(model).train()(images(40))
    torch.testing.assert_close(found(images(40)), batch, rtol=0.01, atol=0.01)
    assert (model(images(40)) - batch).abs().max() > 0.1
    mixed = recalibrated(model, [(images(40), None)], per_application=False)
    assert mixed.sections[0][2] is mixed.sections[0][4]
    assert not torch.equal(mixed(images()), found(images()))


@pytest.mark.parametrize("kind", [NAIVE, UBN, replace(UBN, statistics="shared")], ids=["naive", "ubn", "statistics"])
@pytest.mark.parametrize("folded", [False, True])
def test_unsharing_statistics_changes_nothing_by_itself(kind: Sharing, folded: bool) -> None:
    model = used(network(kind))
    given = fold(model) if folded else model
    unshared = unshare_statistics(given)
    assert torch.equal(unshared(images()), model(images()))
    blocks = unrolled(unshared.sections[0])[2:]
    assert len({id(norm) for block in blocks for norm in batch_norms(block).values()}) == 6
    alone = unshare_statistics(Loop(Cell(), 3))
    assert len({id(block.inner[1]) for block in alone.applications()}) == 3


@pytest.mark.parametrize(
    "around",
    [
        lambda loop: nn.Sequential(loop, loop),
        lambda loop: nn.ModuleDict({"a": loop, "b": loop}),
        lambda loop: nn.ModuleDict({"a": nn.Sequential(loop), "b": nn.ModuleDict({"c": loop})}),
        lambda loop: nn.Sequential(*[nn.Sequential(loop)] * 2),
        lambda loop: Loop(nn.Sequential(loop), 2),
    ],
    ids=["list", "names", "depths", "twice", "loop of loops"],
)
def test_every_place_of_a_module_has_its_statistics(around: Callable) -> None:
    model = around(Loop(Cell(), 2))
    unshared = unshare_statistics(model)
    norms = [m for m in unshared.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == len({id(norm.running_mean) for norm in norms}) == 4
    assert len({id(norm.weight) for norm in norms}) == 1
    assert len(list(unshared.parameters())) == len(list(model.parameters()))
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]) == 1


def test_applications_that_only_a_forward_knows_are_not_recalibrated_one_by_one() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, h: Tensor) -> Tensor:
            return self.cell(self.cell(h))

    model, data = Again().eval(), [(torch.randn(8, 4), None)]
    with pytest.raises(
        ValueError, match=r"runs cell\.inner\.1 several times from one place, .* or give per_application"
    ):
        recalibrated(model, data)
    found = recalibrated(model, data * 2, per_application=False)
    assert not found.cell.inner[1]._forward_pre_hooks
    assert recalibrated(nn.Sequential(model.cell, model.cell), data * 2)[1].inner[1] is not found.cell.inner[1]


def test_both_numbers_of_a_recalibration_are_in_the_history() -> None:
    model = network(NAIVE).float()
    (row,) = train(model, data(), TrainConfig(epochs=1, batch=24, lr=0.05), after_epoch=recalibration(data()))
    x, y = data().train.preparation(data().train.images), data().train.labels
    again = evaluate(recalibrated(model, [(x, y)]), data().test, preparation=data().train.preparation)
    assert row["recalibrated_test_loss"] == pytest.approx(again["loss"], rel=1e-4)
    assert row["recalibrated_test_accuracy"] == pytest.approx(again["accuracy"])
    assert row["recalibrated_test_loss"] != pytest.approx(row["test_loss"], rel=1e-3)


@pytest.mark.parametrize(("transition", "stem"), [("separate", None), ("separate", 2), ("projection", None)])
def test_the_gradient_ratio_is_that_of_the_probes(transition: str, stem: int | None) -> None:
    """Twin: `gradients` at the input of the last section's first block, or at the output of the block before."""
    model = ResNet(ResNetConfig((3, 3), (4, 6), 1, 3, transition, stem=stem)).double().requires_grad_(False).eval()
    x, y = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    ours = gradient_ratio(model, x, y)
    norms = gradients()(model.cut(x), y)["gradient_norm"].values
    last = norms[:, 3]
    if transition == "projection":
        last = gradients(at="output")(model.cut(x), y)["gradient_norm_at_output"].values[:, 2]
    torch.testing.assert_close(ours, (norms[:, 0] / last).to(ours.dtype))


def test_the_gradient_ratio_leaves_no_hook_when_it_fails() -> None:
    model = ResNet(ResNetConfig((2, 2), (4, 6), 1, 3, "projection", stem=2)).double()
    with pytest.raises(RuntimeError, match="to have 1 channels"):
        gradient_ratio(model, images().expand(-1, 5, -1, -1), torch.zeros(6))
    single = ResNet(ResNetConfig((2,), (4,), 1, 3, "projection", stem=2)).double()
    with pytest.raises(ValueError, match="has only one"):
        gradient_ratio(single, images(), torch.zeros(6))
    assert not model.widen._forward_pre_hooks
    assert not single.widen._forward_pre_hooks


def test_gradient_ratios_are_followed_over_training() -> None:
    follow = gradient_ratios(data(), images=30, batch=16)
    history = train(network(UBN).float(), data(), TrainConfig(epochs=2, batch=24, lr=0.05), after_epoch=follow)
    assert all(row["train_gradient_ratio"] > 0 and row["test_gradient_ratio"] > 0 for row in history)
    broken = network(UBN).float().eval()
    with torch.no_grad():
        broken.dense.weight.zero_()
    assert follow(broken) == {"train_gradient_ratio": None, "test_gradient_ratio": None}


def test_clipped_scales_are_set_before_they_are_clipped() -> None:
    block = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    clip_(block[1])
    first, second = share([block], (0, 0), gamma=0.1)
    assert first is second
    assert torch.equal(first[1].weight.detach(), torch.full((2,), 0.1))
