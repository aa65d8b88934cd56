"""Null models: batch norm set by one cumulative pass, fresh weights for any model that can be reset, and the theory."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import oracles
from conftest import MODELS
from residuum.indices import indices
from residuum.models import ResNet, ResNetConfig, count_parameters
from residuum.nulls import NoNullModel, calibrate_, null_model, null_theory, recalibrated
from residuum.probes import passive, perturbation
from residuum.profiles import profile


class Net(nn.Module):
    """Conv, batch norm, dropout, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)
        self.second, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.drop(self.norm(self.conv(x))))).mean((2, 3)))


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(2 + 3 * torch.randn(size, 3, 8, 8, generator=generator), torch.zeros(size)) for _ in range(count)]


def test_statistics_are_means_over_batches_of_their_own_statistics() -> None:
    torch.manual_seed(0)
    model = Net()
    seen = {name: oracles.batch_norm_inputs(copy.deepcopy(model).apply(_no_dropout), name, [x for x, _ in batches()])
            for name in ("norm", "second")}  # fmt: skip
    assert calibrate_(model, batches()) == 3
    for name, inputs in seen.items():
        norm = getattr(model, name)
        torch.testing.assert_close(norm.running_mean, torch.stack([h.mean((0, 2, 3)) for h in inputs]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([h.var((0, 2, 3)) for h in inputs]).mean(0))


def _no_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def test_calibrating_changes_statistics_only() -> None:
    model = Net().eval()
    model.drop.train()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    calibrate_(model, batches())
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{n}.{b}" for n in ("norm", "second") for b in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [m.training for m in model.modules()] == modes
    assert (model.norm.momentum, model.second.momentum) == (0.3, 0.1)
    assert torch.equal(torch.random.get_rng_state(), state)  # no dropout was drawn
    assert all(p.grad is None for p in model.parameters())


def test_calibrating_forgets_earlier_statistics_and_can_be_repeated() -> None:
    model = Net()
    model.norm.running_mean.fill_(99)
    calibrate_(model, batches())
    once = model.norm.running_mean.clone()
    calibrate_(model, batches())
    assert torch.equal(model.norm.running_mean, once)


def test_modes_and_momenta_come_back_when_the_data_fail() -> None:
    model = Net()
    with pytest.raises(RuntimeError):
        calibrate_(model, [(torch.zeros(2, 5, 8, 8), None)])
    assert all(m.training for m in model.modules())
    assert model.norm.momentum == 0.3


@pytest.mark.parametrize(
    ("batches", "error"),
    [([(torch.randn(4, 3), None), (torch.randn(1, 3), None)], "more than 1 value"), ([], "no batches given")],
)
def test_statistics_are_as_they_were_when_calibrating_fails(batches: list, error: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model(torch.randn(8, 3))
    was = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        calibrate_(model, batches)
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())


def test_networks_without_batch_norm_need_no_data() -> None:
    assert calibrate_(nn.Linear(2, 2), []) == 0
    with pytest.raises(ValueError, match="no batches given"):
        calibrate_(Net(), [])


def test_own_networks_make_their_null_model_themselves() -> None:
    config = ResNetConfig(blocks=(1, 2), widths=(4, 8), classes=2)
    trained = ResNet(config, seed=0).double()
    before = copy.deepcopy(trained.state_dict())
    null = null_model(trained, [(x.double(), y) for x, y in batches()], seed=5)
    assert not any(m.training for m in null.modules())
    assert null.config == config
    assert null.dense.weight.dtype == torch.float64
    assert torch.equal(null.stem.weight, ResNet(config, seed=5).double().stem.weight)
    assert not torch.equal(null.sections[0][0].norm1.running_var, torch.ones(4, dtype=torch.float64))
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())


@pytest.mark.parametrize("name", ["loop", "torchvision resnet18", "timm resnet", "gpt2", "llama", "bert", "hf vit"])
def test_null_models_of_foreign_networks(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name].build()
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.25
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    null, again = (null_model(model, [(x, None)], seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    ours, theirs = null.state_dict(), again.state_dict()
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(v.isfinite().all() for v in ours.values())
    assert not any(m.training for m in null.modules())
    assert not any(p.requires_grad for p in null.parameters())
    changed = [name for name, _ in model.named_parameters() if not torch.equal(ours[name], before[name])]
    assert changed == [name for name, _ in model.named_parameters()]
    other = null_model(model, [(x, None)], seed=4).state_dict()
    assert any(not torch.equal(ours[k], other[k]) for k in ours)


def test_parameters_that_nobody_resets_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    model = Scaled()
    with pytest.raises(
        NoNullModel, match=r"no null model: 1 parameters of Scaled .* without reset_parameters, among them gain"
    ):
        null_model(model, [], seed=0)
    assert torch.equal(model.gain, torch.ones(2))
    with pytest.raises(NoNullModel, match="among them class_token"):
        null_model(MODELS["torchvision vit"].build()[0], [], seed=0)


def test_a_network_with_other_layers_than_it_was_made_with_has_no_null_model() -> None:
    """The one that it would make gives 10 outputs for its 3."""
    own = ResNet(ResNetConfig(blocks=(1,), widths=(4,), channels=1, classes=10)).eval()
    own.dense = nn.Linear(4, 3)
    foreign = MODELS["hf vit"].build()[0]
    head = next(
        name for name, module in foreign.named_modules() if isinstance(module, nn.Linear) and name[:4] != "vit."
    )
    setattr(foreign, head, nn.Linear(foreign.get_submodule(head).in_features, 77))
    for model in (own, foreign):
        with pytest.raises(NoNullModel, match="or given other layers since it was made"):
            null_model(model, [], seed=0)


class Numbered(nn.Module):
    """With a parameter of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.ids = nn.Linear(2, 2), nn.Parameter(torch.arange(3), requires_grad=False)


def of_another_argument() -> nn.Module:
    """A Hugging Face network whose class is not made from its configuration alone."""
    model = MODELS["gpt2"].build()[0]

    class Other(type(model)):
        def __init__(self, config: object, tokens: int) -> None:
            super().__init__(config)

    return Other(model.config, 3)


def normed() -> nn.Module:
    """Old-style weight norm keeps the weight of its last forward, which torch does not copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Numbered, "parameters that are whole numbers have no fresh values: ids"),
        (of_another_argument, r"Other\(config\) fails: TypeError: .*'tokens'"),
        (normed, "parameters of Sequential belong to modules without reset_parameters, among them 0.weight_g"),
        (lambda: nn.Sequential(nn.Linear(2, 2), Uncopied()), "a copy of Sequential fails: TypeError: not copied"),
    ],
)
def test_whatever_fails_is_why_there_is_no_null_model(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NoNullModel, match=message):
        null_model(model, [], seed=0)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


class Uncopied(nn.Module):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        raise TypeError("not copied")


def test_weights_that_the_last_forward_left_are_recalibrated_as_copies() -> None:
    model, x = normed(), torch.randn(8, 3)
    kept = model[0].weight
    found = recalibrated(model, [(x, None)])
    assert model[0].weight is kept
    torch.testing.assert_close(found[1].running_mean, model[0](x).mean(0))


def test_attention_is_reset_although_its_method_has_an_underscore() -> None:
    null = null_model(nn.MultiheadAttention(4, 2), [], seed=0)
    assert all(p.isfinite().all() for p in null.parameters())


def test_theory_of_the_first_section_and_its_recursion() -> None:
    # The formula's values, P2's null model.
    for length, distance in ((2, 1.17), (10, 4.1), (40, 10.1), (100, 17.4)):
        assert null_theory((length,))[0].scaled_distance == pytest.approx(distance, abs=0.07)
    sections = null_theory((100, 100, 100))
    assert [s.variance for s in sections] == [2, 2 * 102, 2 * (2 * 102 + 100)]
    assert [s.scaled_distance for s in sections] == pytest.approx([17.37, 6.30, 3.91], abs=0.01)
    for section in sections:  # the sum is the integral but for its discretisation
        assert sum(section.scaled_perturbation) == pytest.approx(section.scaled_distance, rel=0.03)


@pytest.mark.parametrize("length", [8, 16])
def test_measured_null_models_agree_with_theory(length: int) -> None:
    # +-25 %: zero padding lowers the variance of the branches, the first blocks see few entries to average over.
    config = ResNetConfig(blocks=(length,) * 3, widths=(8, 16, 32), channels=1, head="pool")
    images = torch.randn(1024, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    null = null_model(ResNet(config), [(x, None) for x in images.split(128)], seed=1)
    measured = indices(profile(null, [(images[:64], None)], [passive(perturbation)]))
    expected = null_theory(config.blocks)
    assert measured["scaled_distance"]["sections"] == pytest.approx([s.scaled_distance for s in expected], rel=0.25)
    steps = [q for s in expected for q in s.scaled_perturbation]
    assert measured["mean_scaled_perturbation"]["network"] == pytest.approx(sum(steps) / len(steps), rel=0.25)


def test_without_calibration_the_states_explode() -> None:
    # Why there is calibrate_: in eval mode with statistics 0 and 1 every block about doubles the variance.
    config = ResNetConfig(blocks=(8,), widths=(8,), channels=1, head="pool")
    images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    raw = indices(profile(ResNet(config).eval(), [(images, None)], [passive(perturbation)]))
    assert raw["mean_scaled_perturbation"]["network"] > 1.5 * null_theory((8,))[0].scaled_distance / 8


def test_a_parent_has_the_last_word_on_its_parts() -> None:
    """`nn.MultiheadAttention` sets its projection's bias to 0, which the projection itself would draw."""

    class Zeroed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.attention = nn.MultiheadAttention(4, 2)
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.linear.weight)

    null = null_model(nn.Sequential(Zeroed()), [], seed=0)[0]
    assert not null.linear.weight.any()
    assert not null.attention.out_proj.bias.any()


def test_dropout_inside_of_a_norm_stays_off_and_instance_norms_are_refused() -> None:
    class Dropping(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.drop = nn.Dropout(0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(super().forward(x))

    model, x = nn.Sequential(Dropping(), nn.BatchNorm1d(4)).eval(), torch.randn(200, 4)
    calibrate_(model, [(x, None)])
    torch.testing.assert_close(model[1].running_var, torch.ones(4), rtol=0.05, atol=0.05)
    with pytest.raises(NoNullModel, match="InstanceNorm"):
        calibrate_(nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True)), [(x, None)])


def test_batch_norms_that_others_derive_are_calibrated() -> None:
    class Own(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, x: torch.Tensor) -> None:
            pass

    model, x = nn.Sequential(nn.Linear(4, 4), Own(4)).eval(), 3 + torch.randn(50, 4)
    null = null_model(model, [(x, None)], seed=0)
    torch.testing.assert_close(null(x).mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    assert count_parameters(null) == count_parameters(null, statistics=False) + 8
