"""Memory layouts: channels last, but where oneDNN corrupts memory."""

import copy

import pytest
import torch
from torch import nn

from residuum import ResNet, ResNetConfig
from residuum.layouts import fast_layout


@pytest.mark.parametrize(
    ("convolution", "overruns"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(12, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(16, 16, 1, stride=2, groups=4), True),
        (nn.Conv2d(8, 4, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_only_what_overruns_is_kept_from_channels_last(
    convolution: nn.Module, overruns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), convolution)
    for capability in ("AVX2", "AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda said=capability: said)
        plain = overruns and capability != "AVX512"
        assert fast_layout(network) == (torch.contiguous_format if plain else torch.channels_last)


def test_on_other_devices_channels_last_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert fast_layout(nn.Conv2d(4, 8, 1, stride=2, device="meta")) == torch.channels_last


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("transition", ["separate", "projection"])
def test_networks_of_both_layouts_give_the_same(
    transition: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = ResNetConfig((1, 1), (4, 8), channels=1, transition=transition)
    model = copy.deepcopy(ResNet(config)).eval().double()  # torch's own convolutions
    plain = capability == "AVX2"
    assert model.layout == (torch.contiguous_format if plain else torch.channels_last)
    assert model.sections[0][0].conv1.weight.is_contiguous() == plain
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    state = model.enter(x)
    assert state.is_contiguous(memory_format=model.layout)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    other = ResNet(config).eval().double()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)
