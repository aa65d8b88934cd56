"""Models with side channels: each must be cut rightly or refused, never accepted and wrong. Review found most."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from residuum.cutting import cut, cut_all
from residuum.models import Residual, ResNet, ResNetConfig
from residuum.schedules import drop
from residuum.streams import Block, Section, Stream
from surgery import outcome


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.inner(h))


class Net(nn.Module):
    """Three cells between an embedding and a head; what happens between is for the liars to say."""

    kind: type[nn.Module] = Cell

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.cells = nn.ModuleList(self.kind() for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(()))
        self.keep = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h)
        return self.head(h)


class KeepsOnItself(Cell):
    def forward(self, h: Tensor) -> Tensor:
        self.skip = torch.sin(self.inner(h))
        return h + self.skip


class ReadsTheBlocksAttribute(Net):
    kind = KeepsOnItself

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._run(x) + 3 * self.cells[0].skip)

    def _run(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h)
        return h


class TakesContext(Cell):
    def forward(self, h: Tensor, context: dict[str, Any]) -> Tensor:
        if "value" not in context:
            context["value"] = torch.sin(h)
        return h + torch.tanh(self.inner(h + context["value"]))


class SharesADict(Net):
    kind = TakesContext

    def forward(self, x: Tensor) -> Tensor:
        h, context = self.embed(x), {}
        for cell in self.cells:
            h = cell(h, context)
        return self.head(h)


GLOBAL: dict[str, Tensor] = {}


class WritesAGlobal(Cell):
    def forward(self, h: Tensor) -> Tensor:
        added = torch.tanh(self.inner(h + GLOBAL.get("value", torch.zeros(()))))
        GLOBAL["value"] = added
        return h + added


class SharesAGlobal(Net):
    kind = WritesAGlobal

    def forward(self, x: Tensor) -> Tensor:
        GLOBAL.clear()
        return super().forward(x)


class SharesAList(Net):
    """A U-Net whose long skips go through a list that hooks fill."""

    def forward(self, x: Tensor) -> Tensor:
        h, seen = self.embed(x), []
        for cell in self.cells:
            h = cell(h)
            seen.append(h)
        return self.head(h + seen[0])


class Pushes(Cell):
    stack: ClassVar[list[Tensor]] = []

    def forward(self, h: Tensor) -> Tensor:
        self.stack.append(h)
        return super().forward(h)


class PopsAList(Net):
    """A U-Net whose blocks leave their states in a list, without gradient."""

    kind = Pushes

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h)
        return self.head(h + sum(Pushes.stack.pop().detach() for _ in self.cells))


class ZeroGatedSkip(Net):
    """ReZero: the skip does nothing yet, but its gate has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.cells[0](self.embed(x))
        for cell in self.cells[1:]:
            h = cell(h)
        return self.head(h + self.gate * first)


class MixesTheFirstState(Net):
    """nanochat: each block gets a mixture with the embedding, whose weight starts at 0."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.embed(x)
        for cell in self.cells:
            h = cell(self.keep * h + self.gate * first)
        return self.head(h)


class ClampsBetween(Net):
    """Does nothing on small states."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h).clamp(-20, 20)
        return self.head(h)


class AddsOutside(Net):
    kind = nn.Linear

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed, self.head, self.f = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + self.f(h))


class ChangesData(Cell):
    def forward(self, h: Tensor) -> Tensor:
        h.data.add_(torch.tanh(self.inner(h)))
        return h + 1


class ChangesDataInBlocks(Net):
    kind = ChangesData


class DetachesBetween(Net):
    """Trains its blocks one by one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h.detach())
        return self.head(h)


class HooksBetween(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h)
            if h.requires_grad:
                h.register_hook(lambda g: 0 * g)
        return self.head(h)


class Checkpoints(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = checkpoint(cell, h, use_reentrant=True)
        return self.head(h)


class InferenceOnly(Net):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def honest(model: nn.Module, stream: Stream, x: Tensor) -> None:
    """The stream from a changed first state, without its second block, and its gradients are those of the model."""
    cells = model.cells
    with torch.no_grad():
        start = stream.sections[0].entry(x)
        for d in (0.3 * torch.randn_like(start), 19 * start):
            handle = cells[0].register_forward_pre_hook(lambda module, args, d=d: (args[0] + d, *args[1:]))
            expected = outcome(model, x)
            handle.remove()
            assert torch.allclose(stream.finish(start + d, (0, -1)), expected, atol=1e-5)
        if len(stream.sections) == 1:
            handle = cells[1].register_forward_hook(lambda module, args, output: args[0])
            assert torch.allclose(stream.run(drop(stream.full, 0, 1)).output, outcome(model, x), atol=1e-5)
            handle.remove()
    gradients = []
    for output in (stream.run().output, outcome(model, x)):
        model.zero_grad()
        output.square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-4)


REFUSED = {
    ReadsTheBlocksAttribute: "after a changed first state the output differs",
    SharesADict: "after a changed first state",
    SharesAGlobal: "after a changed first state",
    SharesAList: 'the output comes also from what block "cells.0" gave',
    ZeroGatedSkip: 'the output comes also from what block "cells.0" gave',
    AddsOutside: "comes also from the first state",
    ChangesDataInBlocks: "differs",
    DetachesBetween: 'what block "cells.1" gets from the one before it is detached',
    HooksBetween: 'what block "cells.1" gets .* has a gradient hook',
    Checkpoints: "switches gradients off around block",
    InferenceOnly: "torch.inference_mode",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refuses(kind: type[nn.Module]) -> None:
    model = kind().eval()
    with pytest.raises(ValueError, match=REFUSED[kind]):
        cut(model, torch.randn(5, 4), ("f",) if kind is AddsOutside else None)


@pytest.mark.parametrize("kind", [Net, ClampsBetween, MixesTheFirstState], ids=lambda kind: kind.__name__)
def test_cuts_rightly(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(5, 4)
    honest(model, cut(model, x), x)


def test_later_batches_are_checked_too() -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = first = self.cells[0](self.embed(x))
            for cell in self.cells[1:]:
                h = cell(h)
            return self.head(h + first if x.max() > 50 else h)

    streams = cut_all(Late().eval(), [torch.randn(5, 4), 100 + torch.randn(5, 4)])
    next(streams)
    with pytest.raises(ValueError, match="the output comes also from what block"):
        next(streams)


def test_modules_outside_follow_their_parameters_and_inputs() -> None:
    class Aside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.aside(x)

    model, x = Aside().eval(), torch.randn(5, 4)
    stream = cut(model, x)
    with torch.no_grad():
        model.aside.weight.mul_(3)
        assert torch.equal(stream.run().output, model(x))
    model.requires_grad_(False)
    x = x.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f().sum(), x)[0] for f in (lambda: cut(model, x).run().output, lambda: model(x))
    )
    assert torch.allclose(ours, theirs)


def test_masks_given_by_position_are_seen() -> None:
    class Masked(Net):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long)
    assert cut(Masked().eval(), (x, mask)).mask.shape == (2, 5)
    mask[1, 3:] = 0
    added = torch.where(mask > 0, 0.0, -1e9)  # to scores
    for given in (mask, mask.float(), added):
        assert torch.equal(cut(Masked().eval(), (x, given)).mask, mask.bool())


def test_a_class_with_another_cut_is_cut_from_outside() -> None:
    class Cutter(Net):
        def cut(self, x: Tensor) -> Tensor:
            return x[:, :1]

    assert cut(Cutter().eval(), torch.randn(5, 4)).lengths == (3,)


def test_a_stream_of_its_own_is_checked() -> None:
    from residuum.models import ResNet, ResNetConfig

    class Changed(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    config, x = ResNetConfig(blocks=(2,), widths=(4,), channels=1), torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"Changed.cut makes is not what its forward does"):
        cut(Changed(config).eval(), x)
    with pytest.raises(ValueError, match="leave blocks out"):
        cut(ResNet(config).eval(), x, blocks=("sections.0.*",))
    model = ResNet(config).eval()
    model.sections[0][0].register_forward_hook(lambda module, args, output: 2 * output)
    stream = cut(model, x)
    with torch.no_grad():
        states = stream.run().states[0]
        for step in stream.walk():
            assert torch.allclose(step.after, states[step.index + 1])


def test_scripted_models_and_empty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no examples; its input has shape \(0, 4\)"):
        cut(Net().eval(), torch.randn(0, 4))
    with pytest.warns(DeprecationWarning, match="jit"):
        traced = torch.jit.trace(Net().eval(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="scripted or traced"):
        cut(traced.eval(), torch.randn(2, 4))


def test_a_parametrized_block_is_found() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6) / 6)
            nn.utils.parametrize.register_parametrization(self, "weight", Twice())

        def forward(self, h: Tensor) -> Tensor:
            return h + torch.tanh(h @ self.weight)

    class Parametrized(Net):
        kind = Weighted

    model, x = Parametrized().eval(), torch.randn(5, 4)
    honest(model, cut(model, x), x)


def test_a_norm_that_mixes_the_examples_of_a_batch_is_refused() -> None:
    class Mixing(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6, track_running_stats=False)

        def forward(self, h: Tensor) -> Tensor:
            return h + torch.tanh(self.inner(self.norm(h)))

    class Batch(Net):
        kind = Mixing

    with pytest.raises(ValueError, match="without running statistics"):
        cut(Batch().eval(), torch.randn(8, 4))


def test_a_block_of_ours_that_is_not_h_plus_its_branch_is_measured_as_it_runs() -> None:
    class Scaled(Residual):
        def forward(self, h: Tensor) -> Tensor:
            return self.skip(h) + 0.1 * self.branch(h)

    model, x = ResNet(ResNetConfig((2,), (4,), 1)).eval(), torch.randn(3, 1, 8, 8)
    model.sections[0][1].__class__ = Scaled
    stream = cut(model, x)
    for step in stream.walk():
        block = stream.sections[0].blocks[step.index]
        torch.testing.assert_close(step.after, block(step.before))
        assert step.own_branch == (step.index == 0)


def test_a_users_branch_must_be_what_the_block_adds() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = Cell(), nn.Linear(6, 3)

        def cut(self, x: Tensor) -> Stream:
            block = Block("cell", self.cell, lambda h: 2 * (self.cell(h) - h))
            return Stream(x, (Section("cells", lambda x: x, (block,)),), self.head)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x))

    with pytest.raises(ValueError, match=r'block "cell" is not h \+ its branch'):
        cut(Wrong().eval(), torch.randn(2, 6))


def test_sections_of_a_user_need_names_of_their_own() -> None:
    """Else the report would show the numbers of the last as those of all."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def cut(self, x: Tensor) -> Stream:
            section = Section("cells", lambda x: x, (Block("cell", self.cell),))
            return Stream(x, (section, section), lambda h: h)

    with pytest.raises(ValueError, match=r"Twice.cut names its sections \['cells', 'cells'\]; give each a name of"):
        cut(Twice().eval(), torch.randn(2, 6))
