"""Cut models whose parameters change afterwards, or that are compiled: the stream is the model as it is now."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from residuum.cutting import cut
from residuum.models import ResNet, ResNetConfig


class Sides(nn.Module):
    """What `embed` gives goes to every block beside the state, and by a norm to the readout."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, h: Tensor, side: Tensor) -> Tensor:
            return h + torch.tanh(self.inner(h + side))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.cells = nn.ModuleList(self.Cell() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, side = x, self.embed(x)
        late = self.norm(side)
        for cell in self.cells:
            h = cell(h, side)
        return self.head(h + late)


def test_frozen_parameters_are_seen_in_arguments_of_blocks_and_in_what_is_kept() -> None:
    model, x = Sides().eval().requires_grad_(False), torch.randn(4, 5)
    calls: Counter[str] = Counter()
    model.embed.register_forward_hook(lambda *_: calls.update(["embed"]))
    stream = cut(model, x)
    for name in ("embed.weight", "norm.weight", "head.bias", "cells.1.inner.weight"):
        model.get_parameter(name).mul_(3.0).add_(1)
        before = calls["embed"]
        with torch.inference_mode():  # the batch is recorded outside of it
            assert torch.equal(stream.run().output, model(x))
            assert calls["embed"] == before + 3  # once more on the batch, from the start, and in the model itself
            state = stream.run().states[0][2]
            assert torch.equal(stream.finish(state, (0, 1)), model(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_computed_without_gradient_is_seen(frozen: bool) -> None:
    class Detached(Sides):
        def forward(self, x: Tensor) -> Tensor:
            h, side = x, self.embed(x).detach()
            for cell in self.cells:
                h = cell(h, side)
            return self.head(h)

    model, x = Detached().eval().requires_grad_(not frozen), torch.randn(4, 5)
    stream = cut(model, x)
    with torch.no_grad():
        model.embed.weight.mul_(3.0)
    assert torch.equal(stream.run().output, model(x))


def test_values_that_change_the_path_are_refused() -> None:
    class Gated(Sides):
        def forward(self, x: Tensor) -> Tensor:
            h, side = x, self.embed(x)
            for cell in self.cells if self.norm.bias[0] == 0 else self.cells[1:]:
                h = cell(h, side)
            return self.head(h)

    model = Gated().eval().requires_grad_(False)
    stream = cut(model, torch.randn(4, 5))
    model.norm.bias.add_(1)
    with pytest.raises(ValueError, match="with the parameters as they are now other blocks run; cut the model once"):
        stream.run()


def test_numbers_that_come_from_parameters_are_seen() -> None:
    class Stepped(Sides):
        class Cell(Sides.Cell):
            def forward(self, h: Tensor, dt: float) -> Tensor:
                return h + dt * torch.tanh(self.inner(h))

        def __init__(self) -> None:
            super().__init__()
            self.dt = nn.Parameter(torch.tensor(0.5), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            for cell in self.cells:
                x = cell(x, self.dt.item())
            return self.head(x)

    model, x = Stepped().eval(), torch.randn(4, 5)
    stream = cut(model, x)
    with torch.no_grad():
        model.dt.mul_(3.0)
        assert torch.equal(stream.run().output, model(x))


def test_other_memory_of_parameters_is_seen_and_that_they_thaw() -> None:
    model, x = Sides().eval().requires_grad_(False), torch.randn(4, 5)
    stream = cut(model, x)
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    assert torch.equal(stream.run().output, model(x))
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="carries gradient of parameters that are used outside the blocks"):
        stream.run()


def test_of_compiled_models_and_parts_the_stream_is_what_they_were_compiled_from() -> None:
    model, x = Sides().eval(), torch.randn(4, 5)
    own = ResNet(ResNetConfig(blocks=(2,), widths=(4,))).eval()
    parts = copy.deepcopy(model)
    for owner, name in ((parts, "embed"), (parts.cells, "1")):
        setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    with torch.no_grad():
        for compiled in (torch.compile(model, backend="eager"), parts, in_place):
            stream = cut(compiled.requires_grad_(False), x)
            assert [block.name for block in stream.sections[0].blocks] == [f"cells.{i}" for i in range(3)]
            assert torch.equal(stream.run().output, model(x))
        images = torch.randn(2, 3, 8, 8)
        stream = cut(torch.compile(own, backend="eager"), images)
        assert torch.equal(stream.run().output, own(images))
    assert type(parts.embed).__name__ == "OptimizedModule"


def test_a_model_made_in_inference_mode_is_refused_in_words() -> None:
    with torch.inference_mode():
        model = Sides().eval().requires_grad_(False)
    with pytest.raises(ValueError, match=r'parameter "embed\.weight" was made under torch\.inference_mode'):
        cut(model, torch.randn(4, 5))
