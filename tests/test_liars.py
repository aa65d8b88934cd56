"""Models with side channels: each must be cut rightly or refused, never accepted and wrong. Review found most."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from residuum.cutting import _close, cut, cut_all
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


class MasksItsAnswers(Net):
    """One answer is never allowed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.tensor([False, False, True]), -1e9)


class HidesASkipBehindAMask(Net):
    """Beside an answer of -1e9 every other is a rounding error."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.cells[0](self.embed(x))
        for cell in self.cells[1:]:
            h = cell(h)
        return self.head(h + 3 * first.detach()).masked_fill(torch.tensor([False, False, True]), -1e9)


class HidesASkipBehindNumbers(Net):
    """Its first output is the class, which says little and has no gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = first = self.cells[0](self.embed(x))
        for cell in self.cells[1:]:
            h = cell(h)
        logits = self.head(h + first)
        return logits.argmax(-1), logits


class AddsTheFirstState(Net):
    """A skip from the first block's input to the head, as in networks for images of higher resolution."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.embed(x)
        for cell in self.cells:
            h = cell(h)
        return self.head(h + 3 * first)


class Turned(torch.autograd.Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class TurnsGradients(Net):
    """Adversarial training: what comes after pulls against what is before."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cells[1](self.cells[0](self.embed(x)))
        return self.head(self.cells[2](Turned.apply(h)))


class Casts(Net):
    """Its blocks, and nothing else, work in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        with torch.autocast("cpu", torch.bfloat16):
            for cell in self.cells:
                h = cell(h)
        return self.head(h)


class StartsFromZero(Net):
    """The first state is 0, so what the first block gives is what it adds."""

    def forward(self, x: Tensor) -> Tensor:
        h = 0 * self.embed(x)
        for cell in self.cells:
            h = cell(h).clamp(-20, 20)
        return self.head(h)


class Swallows(Net):
    """Goes on whatever happens."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            try:
                h = cell(1.0 * h)
            except Exception:
                h = 0 * h
        return self.head(h)


class ChangesItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


class Counts(Net):
    """Counts in a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
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
    HidesASkipBehindAMask: "after a changed first state the output differs",
    HidesASkipBehindNumbers: 'the output comes also from what block "cells.0" gave',
    AddsTheFirstState: "the output comes also from the first state",
    ChangesItsInput: "changes its input in place",
    Counts: '"calls" was changed by a forward of a copy of the model: a parameter that counts',
    ZeroGatedSkip: 'the output comes also from what block "cells.0" gave',
    AddsOutside: "comes also from the first state",
    ChangesDataInBlocks: "differs",
    DetachesBetween: 'what block "cells.1" gets from the one before it is detached',
    HooksBetween: 'what block "cells.1" gets .* has a gradient hook',
    Checkpoints: "switches gradients off around block",
    InferenceOnly: "torch.inference_mode",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refuses(kind: type[nn.Module], frozen: bool) -> None:
    model, x = kind().eval().requires_grad_(not frozen), torch.randn(5, 4)
    given = x.clone()
    with pytest.raises(ValueError, match=REFUSED[kind]):
        cut(model, x, ("f",) if kind is AddsOutside else None)
    assert torch.equal(x, given)


CUT = [Net, ClampsBetween, MixesTheFirstState, MasksItsAnswers, TurnsGradients, Casts, StartsFromZero, Swallows]


@pytest.mark.parametrize("kind", CUT, ids=lambda kind: kind.__name__)
def test_cuts_rightly(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(5, 4)
    stream = cut(model, x)
    honest(model, stream, x)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(cut(model, x).run().output, model(x))


def test_what_holds_blocks_must_have_no_hook_on_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Cell(), Cell()), nn.Linear(6, 3)).eval()
    handle = model[1].register_full_backward_hook(lambda module, given, got: tuple(0.1 * g for g in given))
    with pytest.raises(ValueError, match='"1", which holds blocks, has a backward hook'):
        cut(model, torch.randn(5, 4))
    handle.remove()
    assert cut(model, torch.randn(5, 4)).lengths == (2,)


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


def test_the_output_of_later_batches_is_checked_by_value() -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = first = self.cells[0](self.embed(x))
            for cell in self.cells[1:]:
                h = cell(h)
            return self.head(h + first.detach() if x.max() > 50 else h)

    streams = cut_all(Late().eval(), [torch.randn(5, 4), 100 + torch.randn(5, 4)])
    next(streams)
    with pytest.raises(ValueError, match="the stream is not the model: on a later batch the output differs"):
        next(streams)


def test_what_later_batches_change_in_place_is_run_again() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            aside, h = self.side(x), self.embed(x)
            for cell in self.cells:
                h = cell(h)
            if x.max() > 50:
                aside += 1
            return self.head(h + aside)

    model = Late().eval().requires_grad_(False)
    inputs = [torch.randn(5, 4), 100 + torch.randn(5, 4)]
    for stream, x in zip(cut_all(model, inputs), inputs, strict=True):
        for _ in range(2):
            assert torch.equal(stream.run().output, model(x))


def test_streams_can_be_used_by_turns_where_blocks_keep_what_is_of_a_batch() -> None:
    class Reads(Cell):
        def forward(self, h: Tensor) -> Tensor:
            return h + torch.tanh(self.inner(h) + self.side)

    class Writes(Net):
        kind = Reads

        def forward(self, x: Tensor) -> Tensor:
            for cell in self.cells:
                cell.side = x.mean(1, keepdim=True)
            return super().forward(x)

    model, inputs = Writes().eval(), [torch.randn(5, 4), torch.randn(3, 4)]
    streams = list(cut_all(model, inputs))
    with torch.no_grad():
        for _ in range(2):
            for stream, x in zip(streams, inputs, strict=True):
                assert torch.equal(stream.run().output, model(x))
                states = stream.run().states[0]
                assert torch.equal(stream.sections[0].blocks[1](states[1]), states[2])


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
        whole = True

        def cut(self, layers):
            self.whole = False
            return layers + "no tensor"

    model = Cutter().eval()
    assert cut(model, torch.randn(5, 4)).lengths == (3,)
    assert model.whole


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


def test_what_a_model_keeps_and_its_classes_are_not_touched() -> None:
    class Watched(nn.Module):
        seen: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, tag: str) -> None:
            cls.seen.append(tag)

    class Tagged(Watched, tag="mine"):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, h: Tensor) -> Tensor:
            return h + torch.tanh(self.inner(h))

    class Prototypes(Net):
        kind = Tagged

        def forward(self, x: Tensor) -> Tensor:
            self.prototypes.mul_(0.5)
            return super().forward(x)

    model, x = Prototypes().eval(), torch.randn(5, 4)
    model.prototypes = 2 * model.head.weight
    kept = model.prototypes.clone()
    assert cut(model, x).lengths == (3,)
    assert torch.equal(model.prototypes, kept)
    assert Watched.seen == ["mine"]


class Named(type):
    def hello(cls) -> float:
        return 0.5


def test_blocks_with_slots_or_a_class_of_their_own_kind_are_cut() -> None:
    class Slots(Cell):
        __slots__ = ("unused",)

    class Kind(Cell, metaclass=Named):
        def forward(self, h: Tensor) -> Tensor:
            return h + type(self).hello() * torch.tanh(self.inner(h))

    for cell in (Slots, Kind):
        model, x = Net(), torch.randn(5, 4)
        model.cells = nn.ModuleList(cell() for _ in range(3))
        with torch.inference_mode():  # a buffer that has no version
            model.register_buffer("kept", torch.zeros(3))
        stream = cut(model.eval(), x)
        with torch.no_grad():
            assert torch.equal(stream.run().output, model(x))


def test_a_refusal_leaves_a_state_of_the_users_as_it_was() -> None:
    held = torch.randn(5, 6)

    class Starts(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = held
            for cell in self.cells:
                h = cell(h)
            return self.head(h + held)

    with pytest.raises(ValueError, match="the output comes also from the first state"):
        cut(Starts().eval(), torch.randn(5, 4))
    assert not held.requires_grad


def test_what_a_later_batch_raises_is_said_as_it_is() -> None:
    class Fails(nn.Linear):
        calls = 0

        def forward(self, h: Tensor) -> Tensor:
            Fails.calls += 1
            if Fails.calls > 4:
                raise torch.OutOfMemoryError("no memory is left")
            return super().forward(h)

    model = Net()
    model.head = Fails(6, 3)
    streams = cut_all(model.eval(), [torch.randn(5, 4)] * 3)
    next(streams)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        next(streams)


def test_rounding_of_one_small_number_is_no_difference() -> None:
    theirs = torch.tensor([[1.0, -1e9], [0.002, -1e9]])
    ours = theirs + torch.tensor([[0.0, 0.0], [6e-8, 0.0]])
    assert _close(ours, theirs)
    assert not _close(theirs + torch.tensor([[0.1, 0.0], [0.0, 0.0]]), theirs)
    assert not _close(theirs[:1] + torch.tensor([[0.1, 0.0]]), theirs[:1])


def test_a_forward_that_holds_the_model_itself_is_refused_where_it_changes_it() -> None:
    class Counting(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, h: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(h)

    class Counted(Net):
        kind = Counting

    model, x = Counted().eval(), torch.randn(5, 4)
    assert cut(model, x).lengths == (3,)  # the copy counts
    old = model.cells[1].forward
    model.cells[1].forward = lambda h: 0.5 * old(h)
    with pytest.raises(ValueError, match=r'"cells\.1\.calls" was changed by a forward of a copy .*make it a method'):
        cut(model, x)


def test_a_module_at_several_places_can_be_named_at_each() -> None:
    model, x = Net(), torch.randn(5, 4)
    model.cells = nn.ModuleList([model.cells[0]] * 3)
    model.eval()
    for names in (("cells.*",), ("cells.0", "cells.1")):
        assert cut(model, x, names).lengths == (3,)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_that_a_transformer_cuts_off_is_refused_in_words() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

    class Text(nn.Module):
        def __init__(self, *, nested: bool) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding).mean(1)

    batch = (torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]]))
    model = Text(nested=True).eval().requires_grad_(False)
    with pytest.raises(ValueError, match=r"gets a nested tensor, .* enable_nested_tensor=False"):
        cut(model, batch, ("encoder.layers.*",))
    assert cut(Text(nested=False).eval(), batch, ("encoder.layers.*",)).lengths == (2,)


def test_examples_must_lie_along_dimension_0_in_every_section() -> None:
    class Turns(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.cells[1](self.cells[0](self.embed(x)))
            return self.head(self.cells[2](h.transpose(0, 1)))

    with pytest.raises(ValueError, match=r"has 5 examples along dimension 0, but the states have shape \(7, 5"):
        cut(Turns().eval(), torch.randn(5, 7, 4))


def test_an_output_without_a_tensor_is_refused_in_words() -> None:
    class Words(Net):
        def forward(self, x: Tensor) -> str:
            super().forward(x)
            return "three"

    with pytest.raises(ValueError, match="the model returns str, in which no tensor is found; return a tensor, a"):
        cut(Words().eval(), torch.randn(5, 4))
