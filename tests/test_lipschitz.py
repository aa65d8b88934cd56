"""Lipschitz limits: the true norm of the operator stays within its bound, in training, evaluation and export."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import oracles_spectra as oracles
from residuum.cutting import cut
from residuum.data import Splits, load_splits
from residuum.layers.lipschitz import Limit, _make_plain_, clip_, export, limit_, limits
from residuum.layers.sharing import NAIVE, Sharing
from residuum.loading import load_model
from residuum.models import ResNet, ResNetConfig
from residuum.nulls import calibrate_
from residuum.results import write_run
from residuum.spectra import certificate, chain_bound, guaranteed_norm, linear_part, operator_norm
from residuum.training import TrainConfig, train

KINDS = [
    (partial(nn.Conv2d, 3, 4, 3, padding=1), (6, 7)),
    (partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1, groups=2), (7, 6)),
    (partial(nn.Conv2d, 3, 3, (3, 5), dilation=(2, 1), padding="same", bias=False), (6, 6)),
    (partial(nn.Conv2d, 2, 3, 2, padding="valid"), (5, 5)),
    (partial(nn.Linear, 7, 5), ()),
]


def matrix(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The dense matrix of a module as it works, in float64."""
    if isinstance(module, nn.Linear):
        return module.weight.detach().double()
    return oracles.conv_matrix(copy.deepcopy(module).double(), size)


def true_norm(module: nn.Module, size: tuple[int, ...]) -> float:
    return torch.linalg.matrix_norm(matrix(module, size), 2).item()


def trained(module: nn.Module, size: tuple[int, ...], steps: int = 20, rate: float = 0.02) -> None:
    """Training that makes the output large, as far as the limit allows."""
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=rate)
    width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    for step in range(steps):
        x = torch.randn(4, width, *size, generator=torch.Generator().manual_seed(step)).to(module.weight)
        optimiser.zero_grad()
        (-module(x).square().mean()).backward()
        optimiser.step()


@pytest.mark.parametrize(("make", "size"), KINDS)
@pytest.mark.parametrize("bound", [0.3, 1.0])
def test_in_eval_mode_the_true_norm_is_the_bound(make: partial, size: tuple[int, ...], bound: float) -> None:
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        module.weight.mul_(4)
    limit_(module, bound, size)
    assert true_norm(module.eval(), size) == pytest.approx(bound, rel=0.005)
    trained(module, size)
    assert true_norm(module, size) < 1.3 * bound  # one step of power iteration per training step keeps up
    module.eval()
    assert bound * 0.995 <= true_norm(module, size) <= bound * 1.005
    (found,) = limits(module).values()
    assert found["active"]
    assert found["norm"] == pytest.approx(true_norm(module, size), rel=1e-3)
    assert 0.8 < found["overshoot"] < 1.3


@pytest.mark.parametrize(("make", "size"), KINDS)
def test_weights_within_the_bound_are_left_alone(make: partial, size: tuple[int, ...]) -> None:
    module = make()
    before = module.weight.detach().clone()
    limit_(module, 50.0, size)
    for mode in (True, False):
        module.train(mode)
        assert torch.equal(module.weight, before)
    assert not next(iter(limits(module).values()))["active"]


@pytest.mark.parametrize(("make", "size"), KINDS)
def test_the_gradient_is_that_of_the_dense_norm(make: partial, size: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    module = make().double()
    with torch.no_grad():
        module.weight.mul_(3)
    original, direction = module.weight.detach().clone(), torch.randn_like(module.weight)
    limit_(module, 0.7, size)
    module.train()
    for _ in range(600):
        _ = module.weight  # power iteration to convergence
    (module.weight * direction).sum().backward()
    plain, eps, values = make().double(), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            change = torch.randn(original.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            plain.weight.copy_(original + sign * eps * change)
            values.append((plain.weight / max(1, true_norm(plain, size) / 0.7) * direction).sum().item())
    expected = (values[0] - values[1]) / (2 * eps)
    assert (module.parametrizations.weight.original.grad * change).sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("make", "size"), KINDS)
def test_what_is_exported_holds_the_bound_strictly_in_stock_layers(make: partial, size: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    module = nn.Sequential(make())
    with torch.no_grad():
        module[0].weight.mul_(10)
    limit_(module[0], 0.9, size)
    module.eval()
    stock = nn.Sequential(make())
    stock.load_state_dict(export(module).state_dict())
    assert 0.6 * 0.9 <= true_norm(stock[0], size) <= 0.9
    assert chain_bound(stock, size).value <= 0.9
    assert not export(module)[0]._forward_pre_hooks
    assert parametrize.is_parametrized(module[0])  # the model is left as it is, and still works
    assert true_norm(module[0], size) == pytest.approx(0.9, rel=0.005)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bound=st.floats(0.1, 3), kernel=st.integers(1, 4), stride=st.integers(1, 3))
def test_no_two_inputs_are_moved_apart_more_than_the_bound(seed: int, bound: float, kernel: int, stride: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 3, kernel, stride, padding=kernel // 2)
    limit_(conv, bound, (6, 5))
    conv.eval()
    x, y = torch.randn(2, 8, 2, 6, 5)
    exported = export(conv)
    with torch.no_grad():
        apart = (x - y).flatten(1).norm(dim=1)
        assert ((conv(x) - conv(y)).flatten(1).norm(dim=1) <= 1.005 * bound * apart).all()
        assert ((exported(x) - exported(y)).flatten(1).norm(dim=1) <= bound * apart * (1 + 1e-5)).all()


def test_torchs_spectral_norm_limits_something_else() -> None:
    """What is normalised to 1 has a norm of 1.4 to 3; source: Sedghi, Gupta & Long (2019); measured in the spec."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    theirs = parametrizations.spectral_norm(copy.deepcopy(conv), n_power_iterations=100).eval()
    low_pass = nn.Conv2d(1, 1, 3, padding=1)
    nn.init.ones_(low_pass.weight)
    wrong = parametrizations.spectral_norm(copy.deepcopy(low_pass), n_power_iterations=100).eval()
    assert true_norm(theirs, (14, 14)) > 1.4
    assert true_norm(wrong, (14, 14)) > 2.8
    for module in (conv, low_pass):
        limit_(module, 0.5, (14, 14))
        assert true_norm(module.eval(), (14, 14)) == pytest.approx(0.5, rel=0.005)


def test_saved_and_loaded_it_goes_on_with_the_same_bits() -> None:
    torch.manual_seed(3)
    module = nn.Conv2d(3, 3, 3, padding=1)
    limit_(module, 0.5, (6, 6))
    trained(module, (6, 6))
    other = nn.Conv2d(3, 3, 3, padding=1)
    limit_(other, 0.5, (6, 6))
    other.load_state_dict(module.state_dict())
    for one in (module, other):
        trained(one, (6, 6), steps=3)
    assert torch.equal(module.train().weight, other.train().weight)
    assert torch.equal(module.eval().weight, other.eval().weight)
    with torch.no_grad():  # new weights in eval mode: converged anew
        module.parametrizations.weight.original.mul_(torch.randn_like(module.parametrizations.weight.original))
    assert true_norm(module, (6, 6)) == pytest.approx(0.5, rel=0.005)


def test_bfloat16_autocast_follows_the_norm_in_float32() -> None:
    torch.manual_seed(0)
    module, other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
    other.load_state_dict(module.state_dict())
    for one in (module, other):
        limit_(one, 0.5, (6, 6))
        one.train()
    _ = other.weight
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 3, 6, 6)).sum().backward()
    assert torch.equal(module.parametrizations.weight[0].sigma, other.parametrizations.weight[0].sigma)


class Branch(nn.Module):
    """Convolution, batch norm, ReLU, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def limited(norm_bound: float = 1.0) -> Net:
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        block.layers[0].running_var.uniform_(0.1, 0.5)
        limit_(block.layers[1], 0.5**0.5, (5, 5))
        limit_(block.layers[3], 0.5**0.5, (5, 5))
        clip_(block.layers[0], norm_bound)
    return model


def test_the_bound_of_a_branch_holds_for_its_jacobian() -> None:
    model = limited().eval()
    h = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    for network in (model, export(model)):
        for block in network.double().blocks:
            J = oracles.jacobian(block.layers, h, 0)
            bound = chain_bound(block.layers, (5, 5)).value.item()
            assert torch.linalg.matrix_norm(J, 2).item() <= bound * 1.001
            assert bound <= 0.5 * 1.01  # exact norms of small maps
    assert chain_bound(export(model).blocks[0].layers, (5, 5)).value <= 0.5
    assert chain_bound([nn.Linear(2, 2), nn.Sigmoid()]) is None


def test_clipped_batch_norm_is_an_affine_map_within_its_bound() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    clip_(norm, 1.0)
    x = torch.zeros(1, 3, 2, 2)
    slope = (norm(x + 1) - norm(x))[0, :, 0, 0]
    assert torch.allclose(slope, torch.tensor([0.5, 1.0, 1.0]), atol=1e-4)  # 0.5, 2 and 1 unclipped
    copied = copy.deepcopy(norm)
    copied.running_var.fill_(100.0)
    assert torch.equal(norm(x), norm(x))
    assert (copied(x + 1) - copied(x))[0, 0, 0, 0].item() == pytest.approx(0.1, rel=1e-4)  # its own variance
    before = norm(x + 1)
    assert torch.allclose(export(nn.Sequential(norm).eval())(x + 1), before)


def test_statistics_of_clipped_networks_fit_the_scales_that_they_clip() -> None:
    """With all weights as they work written down, statistics taken anew in one pass are the same."""
    model, some = limited(), [(0.3 * torch.randn(20, 3, 5, 5), None) for _ in range(3)]
    calibrate_(model, some)
    plain = copy.deepcopy(model.eval())
    for module in plain.modules():
        if parametrize.is_parametrized(module):
            _make_plain_(module)
    norms = [[m for m in network.modules() if isinstance(m, nn.BatchNorm2d)] for network in (model, plain)]
    before = [norm.running_var.clone() for norm in norms[1]]
    assert all(norm.running_var.max() < 1 for norm in norms[0]), "else nothing would be clipped"
    calibrate_(plain, some)
    for ours, theirs, old in zip(*norms, before, strict=True):
        assert torch.equal(ours.running_var, old)
        assert torch.allclose(theirs.running_var, old, rtol=1e-3)
    twice = copy.deepcopy(model)
    calibrate_(twice, some)
    assert torch.allclose(twice(some[0][0]), model(some[0][0]), rtol=1e-3, atol=1e-4)


def test_limited_networks_can_be_cut_and_still_be_trained() -> None:
    model = limited()
    train_mode = model.train()(torch.randn(4, 3, 5, 5))
    train_mode.square().sum().backward()
    x = torch.randn(4, 3, 5, 5)
    model.eval().requires_grad_(False)
    stream = cut(model, x)
    assert stream.lengths == (3,)
    assert torch.equal(stream.run().output, model(x))


def test_what_cannot_be_limited_is_refused() -> None:
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"the bound of a limit is {bound}; it must be above 0"):
            limit_(nn.Linear(2, 2), bound)
        with pytest.raises(ValueError, match="it must be above 0"):
            clip_(nn.BatchNorm2d(2), bound)
    module = nn.Linear(2, 2)
    limit_(module, 1.0)
    with pytest.raises(ValueError, match="this ParametrizedLinear is limited already"):
        limit_(module, 1.0)
    with pytest.raises(ValueError, match="given ReLU"):
        limit_(nn.ReLU(), 1.0)
    conv = nn.Conv2d(2, 2, 5)
    with pytest.raises(ValueError, match="rows and columns of the map"):
        limit_(conv, 1.0)
    with pytest.raises(ValueError, match=r"does not run on maps of size \(3, 3\)"):
        limit_(conv, 1.0, (3, 3))
    limit_(conv, 1.0, (6, 6))
    conv(torch.randn(1, 2, 5, 6))
    conv(input=torch.randn(1, 2, 5, 6))
    for call in (conv, lambda x: conv(input=x)):
        with pytest.raises(ValueError, match=r"limited on maps of size \(6, 6\), given one of \(7, 6\)"):
            call(torch.randn(1, 2, 7, 6))
    with pytest.raises(ValueError, match="padding_mode is 'circular'"):
        limit_(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 1.0, (6, 6))
    with pytest.raises(ValueError, match="uneven; give numbers"):
        limit_(nn.Conv2d(2, 2, 2, padding="same"), 1.0, (6, 6))
    with pytest.raises(ValueError, match="batch norm with scale and running variance"):
        clip_(nn.BatchNorm2d(2, affine=False))
    norm = nn.BatchNorm2d(2)
    clip_(norm)
    normed = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(2), dim=None)
    for module in (norm, normed):
        with pytest.raises(
            ValueError, match="limited already, or its weight is parametrized otherwise; export the network"
        ):
            clip_(module)
    for function in (limits, export):
        with pytest.raises(ValueError, match=r"needs model\.eval\(\)"):
            function(nn.Sequential(conv).train())


def test_networks_are_limited_by_their_configuration(tmp_path: Path) -> None:
    """Every branch within its bound after training; saved, loaded and drawn anew it is limited alike."""
    data = Splits(*(part.take(96, seed=0) for part in load_splits("digits")))
    config = ResNetConfig(blocks=(2, 1), widths=(4, 8), channels=1, limit=Limit(0.5, 8))
    model = ResNet(config)
    history = train(model, data, TrainConfig(epochs=2, batch=24))
    assert 0.9 < history[-1]["overshoot"] < 1.3
    assert history[-1]["overshoot"] == max(found["overshoot"] for found in limits(model).values())
    for section, size in zip(model.sections, (8, 4), strict=True):
        for block in section:
            layers = [block.norm1, nn.ReLU(), block.conv1, block.norm2, nn.ReLU(), block.conv2]
            assert all(0.995 * 0.5**0.5 <= v["norm"] <= 1.005 * 0.5**0.5 for v in limits(block).values() if v["active"])
            h = torch.randn(1, block.conv1.in_channels, size, size, dtype=torch.float64)
            J = oracles.jacobian(copy.deepcopy(block).double().branch, h, 0)
            assert torch.linalg.matrix_norm(J, 2) <= 0.5 * 1.01
            assert chain_bound(layers, (size, size)).value <= 0.5 * 1.01  # exact norms of such small maps
    write_run(tmp_path, model, data, TrainConfig(epochs=2, batch=24), history)
    again = load_model(str(tmp_path)).model
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.config == config
    assert limits(model.fresh(1).eval()).keys() == limits(model).keys()
    with pytest.raises(ValueError, match="group norm has no Lipschitz constant"):
        ResNetConfig(norm="group", limit=Limit())
    with pytest.raises(ValueError, match="did you mean 'clipped'"):
        Limit(norm="clip")


def test_a_convolution_that_starts_at_zero_is_limited_once_it_grows() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    nn.init.zeros_(conv.weight)
    limit_(conv, 0.5, (6, 6))
    conv.train()
    _ = conv.weight
    with torch.no_grad():
        conv.parametrizations.weight.original.normal_(generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        _ = conv.weight
    assert true_norm(conv, (6, 6)) < 0.52


@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_change_in_eval_mode_are_seen(fused: bool) -> None:
    """torch's fused optimisers and writes to `.data` leave a tensor's version as it is."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    limit_(conv, 0.5, (6, 6))
    conv.eval()
    optimiser = torch.optim.SGD(conv.parameters(), lr=10.0, fused=fused)
    (-conv(torch.randn(4, 3, 6, 6)).square().sum()).backward()
    optimiser.step()
    assert true_norm(conv, (6, 6)) == pytest.approx(0.5, rel=0.005)
    conv.parametrizations.weight.original.data.mul_(4)
    assert true_norm(conv, (6, 6)) == pytest.approx(0.5, rel=0.005)
    conv.parametrizations.weight.original.data.abs_()  # keeps the Euclidean norm
    assert true_norm(conv, (6, 6)) == pytest.approx(0.5, rel=0.005)
    weight = conv.parametrizations.weight.original.data
    weight.copy_(weight.flatten().sort().values.view_as(weight))
    assert true_norm(conv, (6, 6)) == pytest.approx(0.5, rel=0.005)


def test_memory_layout_and_inference_mode_change_nothing() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(2, 3, 6, 6)
    limit_(conv, 0.5, (6, 6))
    trained(conv, (6, 6), steps=5)
    with torch.inference_mode():
        conv.eval()(x)
    over, sigma = (conv.parametrizations.weight[0].get_buffer(name).clone() for name in ("overshoot", "sigma"))
    conv(x).sum().backward()  # no inference tensor was kept
    conv.to(memory_format=torch.channels_last)(x)
    assert torch.equal(conv.parametrizations.weight[0].overshoot, over)
    assert torch.equal(conv.parametrizations.weight[0].sigma, sigma)


def test_a_shared_block_takes_one_step_in_training() -> None:
    """However often it is applied; source: spec of P0's limit, one iteration per training step."""
    data = Splits(*(part.take(24, seed=0) for part in load_splits("digits")))
    model = ResNet(ResNetConfig((4,), (4,), 1, sharing=replace(NAIVE, free=0), limit=Limit(0.5, 8)))
    limit, steps = model.sections[0][0].conv1.parametrizations.weight[0], []
    limit.register_forward_hook(lambda module, args, output: steps.append(module.training))
    train(model, data, TrainConfig(epochs=1, batch=12))
    assert sum(steps) == 2  # two steps of the optimiser


def test_a_relaxed_block_with_a_limit_is_a_contraction() -> None:
    """Lip(h + beta (G(h) - h)) <= 1 - beta + beta c."""
    model = ResNet(ResNetConfig((2,), (4,), 1, relaxed=0.4, limit=Limit(0.5, 6))).eval().double()
    h = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    for block in model.sections[0]:
        J = oracles.jacobian(block, h, 0)
        assert torch.linalg.matrix_norm(J, 2) <= 1 - 0.4 + 0.4 * 0.5 * 1.01
    assert model.cut(torch.randn(1, 1, 6, 6).double()).sections[0].blocks[0].layers == ()
    with pytest.raises(ValueError, match=r"relaxed is 0.0; it must lie in \(0, 1\]"):
        ResNetConfig(relaxed=0.0)
    with pytest.raises(ValueError, match="cannot be clipped"):
        ResNetConfig((7,), (4,), sharing=Sharing(statistics="shared"), limit=Limit())


def test_exported_networks_are_saved_as_what_they_are(tmp_path: Path) -> None:
    data = Splits(*(part.take(24, seed=0) for part in load_splits("digits")))
    model = ResNet(ResNetConfig((1,), (4,), 1, limit=Limit(0.5, 8))).eval()
    plain = export(model)
    with pytest.raises(ValueError, match="no longer those of its configuration"):
        write_run(tmp_path, plain, data, TrainConfig(), [])
    plain.config = replace(plain.config, limit=None)
    write_run(tmp_path, plain, data, TrainConfig(), [])
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path)).model(x), plain(x))


@pytest.mark.parametrize("bound", [0.1, 50.0])
def test_a_limit_keeps_the_layout_of_one_channel(bound: float) -> None:
    """Else derivatives of such a convolution take ten times as long."""
    conv = nn.Conv2d(1, 1, 3, padding=1).to(memory_format=torch.channels_last)
    strides = conv.weight.stride()
    limit_(conv, bound, (6, 6))
    assert strides == (9, 1, 3, 1)
    assert conv.train().weight.stride() == conv.eval().weight.stride() == strides


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.std(), bias)


def test_classes_that_do_something_else_with_their_weight_have_no_bound() -> None:
    conv = Standardised(2, 2, 3, padding=1)
    for function in (partial(limit_, bound=1.0), operator_norm, guaranteed_norm):
        with pytest.raises(ValueError, match="Twice has another, so the norm of its weight says nothing about it"):
            function(Twice(3, 3))
        with pytest.raises(ValueError, match="Standardised has another"):
            function(conv, size=(4, 4))
    with pytest.raises(ValueError, match="Standardised has another"):
        certificate(conv, (4, 4))
    assert chain_bound([conv], (4, 4)) is None
    plain = nn.Linear(3, 3)
    plain.forward = lambda x: 2 * x
    assert chain_bound([plain]) is None
    assert chain_bound([nn.Conv2d(2, 2, 3, padding_mode="circular")], (4, 4)) is None


def test_a_new_largest_vector_is_found_from_the_old_one() -> None:
    """The old one is a singular vector still, so the residual is small at once and tells nothing."""
    linear = nn.Linear(500, 500, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.linspace(0, 0.7, 500).index_fill(0, torch.tensor(0), 1.0)))
    limit_(linear, 0.5)
    assert true_norm(linear.eval(), ()) == pytest.approx(0.5, rel=1e-3)
    with torch.no_grad():
        linear.parametrizations.weight.original[7, 7] = 1.02
    assert true_norm(linear, ()) <= 0.5 * 1.005


def test_what_comes_after_a_limit_is_told() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(3, 3)).eval()
    limit_(model[0], 0.1)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    for function in (limits, export):
        with pytest.raises(ValueError, match="a limit is followed by Doubled on the same weight"):
            function(model)


@pytest.mark.parametrize("make", [partial(nn.Linear, 30, 30), partial(nn.Conv2d, 2, 2, 3)], ids=["linear", "conv"])
def test_to_look_at_a_limited_part_in_training_mode_is_refused_and_does_not_move_it(make: partial) -> None:
    model = nn.Sequential(make())
    size = (6, 6) if isinstance(model[0], nn.Conv2d) else ()
    limit_(model[0], 0.5, size)
    model.eval()
    model[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for function in (limits, export):
        with pytest.raises(ValueError, match=r"needs model\.eval\(\): 0 is in training mode"):
            function(model)
    for function in (operator_norm, guaranteed_norm, linear_part):
        with pytest.raises(ValueError, match="each look at a limited weight in training mode changes it; use eval"):
            function(model[0], size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))  # which no look changes
    assert float(operator_norm(norm).value) == pytest.approx(true_norm(norm, ()), rel=1e-6)


def test_what_is_parametrized_beside_a_limit_is_exported_as_it_works() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    limit_(model[0], 0.1)
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    plain, x = export(model), torch.randn(4, 3)
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), model(x), rtol=0.01, atol=0.01)
    torch.testing.assert_close(plain[0].bias, model[0].bias)
    nn.Linear(3, 3).load_state_dict(plain[0].state_dict())


def test_frozen_weights_are_exported_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    for layer in model:
        limit_(layer, 0.1)
    model[0].requires_grad_(False)
    assert [layer.weight.requires_grad for layer in export(model)] == [False, True]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_network_that_keeps_a_weight_of_an_earlier_call_is_exported() -> None:
    plain = nn.utils.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(plain, nn.Linear(3, 3))
    limit_(model[1], 0.5)
    x = torch.randn(2, 3)
    model(x)  # whose gradient the kept weight carries, so that torch does not copy it
    model.eval()
    torch.testing.assert_close(export(model)(x), model(x), rtol=0.02, atol=1e-3)
