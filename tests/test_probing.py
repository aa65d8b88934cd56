"""What probing says beside its numbers: why there is no null model, what it keeps, and what rounding does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from residuum.data import Splits, load_splits, load_text
from residuum.loading import LoadedModel, Reads
from residuum.probing import Findings, ProbeConfig, probe


class Cell(nn.Module):
    """A block with a norm of the given kind."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm()

    def forward(self, h: Tensor) -> Tensor:
        return h + self.norm(self.conv(h))


class Net(nn.Module):
    """Two blocks for images of one channel."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)
        self.blocks = nn.Sequential(Cell(norm), Cell(norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Gained(nn.Module):
    """Can be reset only by somebody who says how."""

    def reset_parameters(self, gain: float) -> None:
        raise AssertionError

    def forward(self, h: Tensor) -> Tensor:
        return h


class Frozen(nn.Module):
    """Frozen batch norm, as detection models have it: buffers only."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.rand(4))
        self.register_buffer("computed", torch.arange(4.0), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return (h - self.running_mean.view(-1, 1, 1)) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def probed(model: nn.Module, *names: str, **settings: object) -> Findings:
    data = Splits(*(part.take(8, seed=0) for part in load_splits("digits")))
    config = ProbeConfig(probes=names, **settings)
    return probe(LoadedModel(model.eval(), "net", "made here", Reads()), data, config)


def test_what_was_measured_is_kept_where_a_reset_fails() -> None:
    found = probed(Net(Gained), "state_norm")
    assert found.initial is None
    assert found.initial_reason.startswith(
        "there is no null model: reset_parameters() of blocks.1.norm (Gained) fails: TypeError: "
    )
    assert "missing 1 required positional argument: 'gain'" in found.initial_reason
    assert "state_norm" in found.profile.measures


def test_what_was_measured_is_kept_where_parameters_are_whole_numbers() -> None:
    model = Net(nn.Identity)
    model.ids = nn.Parameter(torch.arange(3), requires_grad=False)
    found = probed(model, "state_norm")
    assert found.initial_reason.endswith("parameters that are whole numbers have no fresh values: ids")
    assert "state_norm" in found.profile.measures


def test_a_fresh_of_the_network_that_fails_is_a_reason_too() -> None:
    class Own(Net):
        def fresh(self) -> nn.Module:
            raise AssertionError

    found = probed(Own(Frozen), "state_norm")
    assert "there is no null model: Own.fresh(0) fails: TypeError" in found.initial_reason


def test_values_that_the_null_model_keeps_are_named() -> None:
    *_, note = probed(Net(Frozen), "state_norm").notes
    assert note.endswith(
        "; buffers that these leave alone have the values of the network as given: blocks.0.norm.weight, "
        "blocks.0.norm.bias, blocks.0.norm.running_mean and 3 others"
    )
    *_, note = probed(Net(nn.Identity), "state_norm").notes
    assert note.endswith("from what the network's authors start from")


@pytest.mark.parametrize(("family", "masked"), [("gpt2", False), ("bert", False), ("bert", True)])
def test_only_networks_that_do_not_see_the_next_token_are_asked_for_it(
    family: str, masked: bool, tmp_path: Path
) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256}
    config = AutoConfig.for_model(family, **size, bos_token_id=0, eos_token_id=1)
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    (tmp_path / "x.txt").write_bytes(b"to be or not to be " * 20)
    data, settings = load_text(tmp_path / "x.txt", window=8), ProbeConfig(probes=("readouts",), initial=False)
    model = kind.from_config(config).eval()
    if masked:  # a token that is never said: beside its output all others are as small as rounding
        with torch.no_grad():
            model.get_output_embeddings().bias[3] = -1e9
    found = probe(LoadedModel(model, family, "", Reads()), data, settings)
    assert ("loss" in found.profile.measures) == (family == "gpt2")
    assert any("no guesses of the next one: measures with labels are skipped" in note for note in found.notes) == (
        family == "bert"
    )


def test_gradients_that_float16_has_no_numbers_for_are_counted() -> None:
    torch.manual_seed(0)
    model = Net(nn.Identity)
    with torch.no_grad():
        model.head.bias[0] = 40.0  # a certain answer
    found = probed(model, "gradients", "plugin_gradients", dtype=torch.float16)
    assert found.profile.count("gradient_cosine").tolist() == [8, 8]  # its loss goes backwards times a power of 2
    assert not any("6e-08" in note for note in found.notes)
    with torch.no_grad():
        model.head.weight.mul_(1e-7)
    found = probed(model, "gradients", "plugin_gradients", dtype=torch.float16)
    (note,) = [note for note in found.notes if "6e-08" in note]
    assert note.startswith("in float16 the gradients of 8 of 8 examples are 0 at some block: ")
    assert found.profile.count("gradient_cosine").tolist() == [0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        assert not any("6e-08" in note for note in probed(model, "gradients", dtype=dtype).notes)
