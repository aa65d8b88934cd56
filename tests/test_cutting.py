"""Cutting foreign models: what is found equals the model, the model notices nothing, and wrong cuts are refused."""

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MODELS, Loop, converted
from residuum.cutting import cut, cut_all
from residuum.schedules import drop, repeat, replace, shuffle, swap
from residuum.streams import run_all
from surgery import outcome, rebuilt


def close(a: Tensor, b: Tensor, relative: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=relative, atol=relative * float(b.abs().max()))


def test_finds_the_blocks_and_equals_the_model(example: Any) -> None:
    model, x, lengths = example
    stream = cut(model, x)
    with torch.no_grad():
        trace = stream.run()
        assert close(trace.output, outcome(model, x))
    assert stream.lengths == lengths
    assert tuple(len(states) - 1 for states in trace.states) == lengths
    for states in trace.states:
        assert {state.shape for state in states} == {states[0].shape}


def test_parameter_gradients_equal_the_models(example: Any) -> None:
    model, x, _ = example
    gradients = []
    for output in (outcome(model, x), cut(model, x).run(keep=False).output):
        model.zero_grad()
        output.square().sum().backward()
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    theirs, ours = gradients
    for name in theirs:
        assert (theirs[name] is None) == (ours[name] is None), name
        assert theirs[name] is None or close(ours[name], theirs[name], 1e-8), name


def test_goes_on_from_any_state(example: Any) -> None:
    model, x, _ = example
    stream = cut(model, x)
    with torch.no_grad():
        trace = stream.run()
        for s, states in enumerate(trace.states):
            for i, state in enumerate(states):
                assert close(stream.finish(state, (s, i - 1)), trace.output)


def test_walk_gives_the_states_of_a_run(example: Any) -> None:
    model, x, _ = example
    stream = cut(model, x)
    with torch.no_grad():
        trace = stream.run()
        for step in stream.walk():
            assert close(step.before, trace.states[step.section][step.index])
            assert close(step.after, trace.states[step.section][step.index + 1])
            assert close(step.update, step.after - step.before, 1e-8)


SURGERY = {
    "torchvision vit": "encoder.layers",
    "timm vit": "blocks",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen3": "model.layers",
    "bert": "bert.encoder.layer",
    "hf vit": "vit.layers",
    "own": "sections.0",
    "torchvision resnet50": "layer3",
}


@pytest.mark.parametrize("family", SURGERY)
def test_schedules_equal_surgery(family: str) -> None:
    """A schedule gives what the model gives after its list of blocks was rebuilt by hand."""
    model, x = MODELS[family].build()
    model, x = model.double().eval(), converted(x, torch.float64)
    stream = cut(model, x)
    section = next(s for s, part in enumerate(stream.sections) if part.blocks[0].name.startswith(SURGERY[family]))
    first = len(stream.sections[section].passed)  # blocks of the list that change the shape come before
    schedules = [
        stream.full,
        drop(stream.full, section, 1),
        repeat(stream.full, section, 0, times=3),
        swap(stream.full, section, 0, 1),
        replace(stream.full, section, 1, 0),
        shuffle(stream.full, section, tuple(reversed(range(stream.lengths[section])))),
    ]
    with torch.no_grad():
        for schedule, trace in run_all(stream, schedules):
            order = (*range(first), *(first + block for block in schedule[section]))
            assert close(trace.output, outcome(rebuilt(model, SURGERY[family], order), x)), schedule


@pytest.mark.parametrize("family", ["own", "torchvision resnet18", "gpt2", "hf vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(family: str, dtype: torch.dtype) -> None:
    model, x = MODELS[family].build()
    model, x = model.to(dtype).eval(), converted(x, dtype)
    with torch.no_grad():
        assert torch.equal(cut(model, x).run().output, outcome(model, x))


@pytest.mark.parametrize("family", ["own", "torchvision resnet18", "timm vit", "gpt2"])
def test_batch_of_one(family: str) -> None:
    model, x = MODELS[family].build()
    model.eval()
    x = {k: v[:1] if isinstance(v, Tensor) else v for k, v in x.items()} if isinstance(x, dict) else x[:1]
    with torch.no_grad():
        assert torch.equal(cut(model, x).run().output, outcome(model, x))


@pytest.mark.slow
def test_the_real_vit_b_16() -> None:
    import torchvision

    model, x = torchvision.models.vit_b_16().eval(), torch.randn(1, 3, 224, 224)
    stream = cut(model, x)
    assert stream.lengths == (12,)
    with torch.no_grad():
        assert torch.equal(stream.run(keep=False).output, model(x))


@pytest.mark.parametrize("family", ["gpt2", "bert", "hf vit"])
def test_models_that_return_a_tuple(family: str) -> None:
    model, x = MODELS[family].build()
    x = {**x, "return_dict": False}
    with torch.no_grad():
        assert torch.equal(cut(model.eval(), x).run().output, model(**x)[0])


def test_models_that_take_positional_arguments_and_return_a_dict() -> None:
    class Talks(Loop):
        def forward(self, scale: float, x: Tensor) -> dict[str, Tensor]:
            return {"norm": x.norm(), "logits": super().forward(scale * x)}

    model, x = Talks().eval(), (2.0, torch.randn(3, 5))
    with torch.no_grad():
        assert torch.equal(cut(model, x).run().output, model(*x)["logits"])


def test_the_model_notices_nothing(example: Any) -> None:
    model, x, _ = example
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    with torch.no_grad():
        cut(model, x).run()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert parameters == {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_user_hooks_stay_and_are_part_of_the_computation() -> None:
    model = Loop().eval()
    model.cell.register_forward_hook(lambda module, args, output: 0.5 * output)
    model.cell.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(3, 5)
    stream = cut(model, x)
    with torch.no_grad():
        assert torch.equal(stream.run().output, model(x))
    assert len(model.cell._forward_hooks) == len(model.cell._forward_pre_hooks) == 1


def test_new_values_of_parameters_are_seen() -> None:
    model, x = Loop().eval(), torch.randn(3, 5)
    stream = cut(model, x)
    with torch.no_grad():
        model.cell.outer.weight.mul_(2)
        assert torch.equal(stream.run().output, model(x))


def test_many_batches_are_recorded_with_one_proof() -> None:
    model, x = Loop().eval(), torch.randn(6, 5)
    calls: Counter[str] = Counter()
    model.head.register_forward_hook(lambda *_: calls.update(["head"]))
    with torch.no_grad():
        for stream, part in zip(cut_all(model, x.split(2)), x.split(2), strict=True):
            calls["stream"] += 1
            assert torch.equal(stream.run().output, model(part))
    # First batch: observe, record, prove. Later ones: record, prove the output. All: run once, and the model itself.
    assert calls["head"] == 3 + 2 * 2 + 3 * 2


def test_the_states_of_the_proof_are_let_go() -> None:
    model, x = Loop().eval(), torch.randn(2, 5)
    states: list[weakref.ref[Tensor]] = []
    model.cell.register_forward_hook(lambda module, args, output: states.append(weakref.ref(output)))
    streams = cut_all(model, (x, x))
    assert sum(next(streams).lengths) == 4
    assert len(states) > 4
    gc.collect()
    assert not [state for state in states if state() is not None]


def test_blocks_can_be_named() -> None:
    model, x = MODELS["torchvision resnet18"].build()
    model.eval()
    assert cut(model, x, blocks=("layer2.*", "layer3.*")).lengths == (1, 1)
    assert cut(model, x, blocks=("layer1.1", "layer4.1")).lengths == (1, 1)
    with torch.no_grad():
        assert torch.equal(cut(model, x, blocks=("layer4.1",)).run().output, model(x))


def test_outer_modules_that_change_in_place_are_run_again() -> None:
    """`x = stem(x); x += position` must not add the position once more in every replay."""

    class InPlace(Loop):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h += 1
            for _ in range(self.times):
                h = self.cell(h)
            return self.head(h)

    model, x = InPlace().eval(), torch.randn(3, 5)
    stream = cut(model, x)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(stream.run().output, model(x))


def test_works_under_inference_mode() -> None:
    model = Loop().eval()
    with torch.inference_mode():
        x = torch.randn(3, 5)
        assert torch.equal(cut(model, x).run().output, model(x))


# Refusals --------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Blocks, and a `forward` given by the test."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, h: Tensor, extra: Tensor | None = None) -> Tensor:
            return h + torch.tanh(self.inner(h if extra is None else h + extra))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.cells = nn.ModuleList(self.Cell() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(8))


class Branch(nn.Module):
    """A module that returns only what is to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(h))


class SumsOutside(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Branch() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = h + cell(h)
        return self.head(h)


class SumsOutsideAfterNorm(SumsOutside):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = h + cell(torch.nn.functional.layer_norm(h, (8,)))
        return self.head(h)


class ValueOfTheFirstBlock(Chain):
    """Exact when recomposed, yet the later blocks' argument depends on the state."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.cells[0](self.embed(x))
        h = first
        for cell in self.cells[1:]:
            h = cell(h, first)
        return self.head(h)


class RoundedValueOfTheFirstBlock(Chain):
    """The same, by a way that carries no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.cells[0](self.embed(x))
        h = first
        for cell in self.cells[1:]:
            h = cell(h, first.detach().sign())
        return self.head(h)


class LearnedArgument(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h, extra=self.scale * 2)
        return self.head(h)


class LongSkip(Chain):
    """The readout uses an early state as well."""

    def forward(self, x: Tensor) -> Tensor:
        first = h = self.cells[0](self.embed(x))
        for cell in self.cells[1:]:
            h = cell(h)
        return self.head(h + first)


class ChangesInPlace(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h)
            h += 1
        return self.head(h)


class InPlaceCell(Chain.Cell):
    def forward(self, h: Tensor, extra: Tensor | None = None) -> Tensor:
        h += torch.tanh(self.inner(h))
        return h


class ChangesItsInput(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(InPlaceCell() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h)
        return self.head(h)


class SequenceFirst(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(0, 1)
        for cell in self.cells:
            h = cell(h)
        return self.head(h.mean(0))


class Random(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for cell in self.cells:
            h = cell(h, torch.rand(8))
        return self.head(h)


class StateDecidesTheNumber(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cells[0](0 * self.embed(x))
        for cell in self.cells[1:] if h.norm() < 1.8 else self.cells[1:2]:
            h = cell(h)
        return self.head(h)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


REFUSED = [
    (SumsOutside, r'block "cells.0" returns only its branch.*wrap the sum'),
    (SumsOutsideAfterNorm, r'block "cells.2" gets also from what block "cells.0" gave.*return only their branch'),
    (ValueOfTheFirstBlock, r"argument 'extra' of block \"cells.1\" depends on the state of an earlier block"),
    (RoundedValueOfTheFirstBlock, r"after a changed first state the state after block \"cells.2\" differs"),
    (LearnedArgument, r"argument 'extra' of block \"cells.0\" carries gradient.*requires_grad_\(False\)"),
    (LongSkip, r"the output comes also from what block \"cells.0\" gave.*a long skip"),
    (ChangesInPlace, r'the output of block "cells.\d" is changed in place'),
    (ChangesItsInput, r'the input of block "cells.\d" is changed in place'),
    (SequenceFirst, r"4 examples along dimension 0, but the states have shape \(6, 4, 8\)"),
    (Random, r"random in eval mode"),
    (StateDecidesTheNumber, r"the sequence of blocks differs"),
    (Plain, r"no residual block found in Plain.*Candidates:\s+Sequential \(\"body\"\).*Name the blocks yourself"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_refuses(kind: type[nn.Module], message: str) -> None:
    model = kind().eval()
    x = torch.randn(4, 6, 5) if kind is SequenceFirst else torch.randn(4, 5)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cut(model, x)


def test_a_learned_argument_is_allowed_without_parameter_gradients() -> None:
    model, x = LearnedArgument().eval().requires_grad_(False), torch.randn(4, 5)
    assert torch.equal(cut(model, x).run().output, model(x))


def test_refuses_training_mode() -> None:
    model = Loop().eval()
    model.cell.train()
    with pytest.raises(ValueError, match=r"needs model.eval\(\): cell is in training mode"):
        cut(model, torch.randn(2, 5))


def test_refuses_caches_and_says_what_to_do() -> None:
    model, x = MODELS["gpt2"].build()
    with pytest.raises(ValueError, match=r"is a DynamicCache.*use_cache=False"):
        cut(model.eval(), {**x, "use_cache": True})


def test_refuses_a_value_that_block_0_hands_on() -> None:
    """T5 hands a position bias that block 0 computes to all later blocks."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=2)
    with pytest.raises(ValueError, match=r"argument 'position_bias' of block \"encoder.block.1\" depends on the state"):
        cut(T5EncoderModel(config).eval(), {"input_ids": torch.randint(0, 90, (2, 7))})


def test_refuses_unknown_and_useless_names() -> None:
    model, x = MODELS["torchvision resnet18"].build()
    model.eval()
    with pytest.raises(ValueError, match=r"the block 'layer9.\*' is no module of ResNet; near"):
        cut(model, x, blocks=("layer9.*",))
    with pytest.raises(ValueError, match="keeps the shape"):
        cut(model, x, blocks=("layer2.0",))
    with pytest.raises(TypeError, match="sequence of names"):
        cut(model, x, blocks="layer2.0")


def test_refuses_what_cannot_be_copied() -> None:
    model = Loop().eval()
    model.file = open(__file__)  # noqa: SIM115 - an object that deepcopy refuses
    with pytest.raises(ValueError, match="works on a copy of the model, and Loop cannot be copied"):
        cut(model, torch.randn(2, 5))
    model.file.close()


def test_weight_norm_of_the_old_kind_works() -> None:
    model = nn.Sequential(Loop().embed, Loop().cell, Loop().cell)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[1].inner)
    model(torch.randn(2, 5))  # leaves a result that deepcopy refuses
    stream = cut(model.eval(), torch.randn(2, 5))
    stream.run().output.sum().backward()
    assert model[1].inner.weight_g.grad is not None


def test_a_twin_survives_the_model() -> None:
    model, x = Loop().eval(), torch.randn(2, 5)
    with torch.no_grad():
        expected = model(x)
        stream = cut(model, x)
        del model
        assert torch.equal(copy.copy(stream).run().output, expected)
