"""Our networks: those of P1 with its counts, other norms and changes of shape, and the options that cannot be."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residuum.layers.sharing import NAIVE, UBN
from residuum.models import (
    NETWORKS,
    ResNet,
    ResNetConfig,
    avgpool,
    count_parameters,
    network_of,
    resnet,
    resnet110,
    scaled,
    single,
    wide,
)

# P1 (Jastrzebski et al. 2018), section 4: parameters and statistics of the four networks; wide with 4, 5, 5 blocks.
TOTALS = {"resnet110": 1_742_762, "single": 1_829_210, "avgpool": 12_201_310, "wide": 45_732_842}
# P1, table 1: trained parameters for 10 and 100 classes (there in thousands; the exact counts are derived).
TRAINED = {
    (32, None): (467_946, 473_796),
    (38, None): (565_386, 571_236),
    (56, None): (857_706, 863_556),
    (110, None): (1_734_666, 1_740_516),
    (110, UBN): (570_762, 576_612),
    (146, UBN): (573_450, 579_300),
    (182, UBN): (576_138, 581_988),
    (110, NAIVE): (565_386, 571_236),  # as ResNet-38: P1, figure 8
}


@pytest.mark.parametrize("name", TOTALS)
def test_p1_networks_have_the_printed_counts(name: str) -> None:
    config = {"resnet110": resnet110, "single": single, "avgpool": avgpool, "wide": wide}[name]()
    assert config == network_of(name)
    assert count_parameters(ResNet(config)) == TOTALS[name]


def test_p1_wide_network_read_literally_has_another_count() -> None:
    assert count_parameters(ResNet(wide(blocks=(4, 4, 4)))) == 36_507_242


@pytest.mark.parametrize(("depth", "sharing"), TRAINED, ids=lambda v: getattr(v, "affine", str(v)))
def test_p1_family_has_the_counts_of_table_1(depth: int, sharing) -> None:
    for classes, count in zip((10, 100), TRAINED[depth, sharing], strict=True):
        assert count_parameters(ResNet(resnet(depth, classes=classes, sharing=sharing)), statistics=False) == count


def test_p1_networks_read_cifar() -> None:
    x = torch.randn(2, 3, 32, 32)
    shapes = {
        "resnet110": [(18, 4, 32), (17, 8, 16), (17, 16, 8)],
        "single": [(10, 25, 32)],
        "avgpool": [(10, 38, 32), (10, 38, 16), (10, 38, 8)],
        "wide": [(3, 40, 32), (4, 80, 16), (4, 160, 8)],
    }
    for name, expected in shapes.items():
        model = ResNet(scaled(network_of(name), 0.25)).eval()
        stream = model.cut(x)
        trace = stream.run()
        found = [(len(states) - 1, *states[0].shape[1:3]) for states in trace.states]
        assert found == expected, name
        assert torch.equal(model(x), trace.output)
    assert [section.passed for section in stream.sections] == [("widen",), ("transitions.0",), ("transitions.1",)]


def test_the_single_representation_is_averaged_over_cells_of_8_pixels() -> None:
    model = ResNet(scaled(single(), 0.04)).eval()
    h = torch.randn(2, 4, 32, 32)
    by_hand = F.avg_pool2d(F.relu(model.norm(h)), 8).flatten(1)
    torch.testing.assert_close(model.readout(h), model.dense(by_hand))


def test_the_wide_network_begins_with_a_projection_of_stride_1() -> None:
    model = ResNet(scaled(wide(), 0.05)).eval()
    x = torch.randn(2, 3, 8, 8)
    stem = model.stem(x)
    assert model.widen.skip.stride == (1, 1)
    torch.testing.assert_close(model.enter(x), model.widen.skip(stem) + model.widen.branch(stem))
    separate = ResNet(ResNetConfig((2,), (8,), stem=4))
    assert isinstance(separate.widen, nn.Conv2d)
    assert separate(x).shape == (2, 10)


def test_count_is_of_numbers_once() -> None:
    block = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model = nn.Sequential(block, block, nn.BatchNorm1d(3, track_running_stats=False))
    assert count_parameters(model) == 9 + 12 + 6
    assert count_parameters(model, statistics=False) == 9 + 6 + 6


def by_hand(model: ResNet, x: Tensor) -> Tensor:
    """A network without norms, operation by operation."""
    h = model.stem(x)
    for s, section in enumerate(model.sections):
        h = model.transitions[s - 1](h) if s else h
        for block in section:
            h = h + block.conv2(torch.relu(block.conv1(torch.relu(h))))
    return model.dense(torch.relu(h).mean((2, 3)))


def test_networks_without_norms_leave_the_state_as_it_is() -> None:
    """ReLU works in place on what a norm gives; without norm that would be the state itself."""
    model = ResNet(ResNetConfig((2, 2), (4, 8), norm="none")).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), by_hand(model, x))
    assert count_parameters(model) == count_parameters(model, statistics=False)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_group_norm_does_not_see_other_images() -> None:
    model = ResNet(ResNetConfig((2, 2), (4, 6), norm="group")).double().train()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    assert [model.sections[s][0].norm1.num_groups for s in (0, 1)] == [4, 2]
    shared = ResNet(ResNetConfig((4,), (4,), norm="group", sharing=replace(NAIVE, free=1)))
    assert shared.sections[0][1] is shared.sections[0][3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resnet(33), "no ResNet of depth 33: depths are 6n"),
        (lambda: resnet(2), "no ResNet of depth 2"),
        (lambda: network_of("resnet33"), "no ResNet of depth 33"),
        (lambda: network_of("singel"), r"unknown network 'singel'; did you mean 'single'\? known: resnet32"),
        (lambda: scaled(single(), 0.0), "the factor on all widths is 0.0"),
        (lambda: scaled(single(), float("nan")), "the factor on all widths is nan"),
        (
            lambda: ResNetConfig(transition="pool"),
            r"'pool' changes no width, but stem and widths are 16, \(16, 32, 64\)",
        ),
        (lambda: ResNetConfig((2,), (4,), stem=8, transition="pool"), r"stem and widths are 8, \(4,\)"),
        (lambda: ResNetConfig(stem=0), "stem, channels, classes and cells must be at least 1"),
        (lambda: ResNetConfig(cells=0), "cells must be at least 1"),
        (lambda: ResNetConfig(norm="layer"), "norm is 'layer'; allowed are"),
    ],
)
def test_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_named_network_exists() -> None:
    assert {name: network_of(name).classes for name in NETWORKS} == dict.fromkeys(NETWORKS, 10)
