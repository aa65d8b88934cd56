"""Gradient probes: equal to one backward per block, first-order exact, nothing left on the user's model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles_probes as twins
from conftest import MODELS, converted
from residuum.cutting import cut
from residuum.models import ResNet, ResNetConfig
from residuum.probes import readouts
from residuum.probes.gradient import gradients, loss_changes
from residuum.probes.readout import Reader
from residuum.profiles import Point, profile
from residuum.streams import Block, Section, Stream

FAMILIES = ("own", "own projection", "loop", "torchvision resnet18", "torchvision vit", "timm swin", "gpt2", "llama")


def labels_for(stream: Stream, output: Tensor) -> Tensor:
    """Labels, of tokens if the outputs have them, one of which does not count."""
    torch.manual_seed(5)
    target = torch.randint(0, output.shape[-1], output.shape[:-1])
    if target.ndim == 2:
        target[0, 1] = -100
        target = target if stream.mask is None else target.masked_fill(~stream.mask, -100)
    return target


def one(x: Any, n: int) -> Any:
    """One example of a batch."""
    if isinstance(x, dict):
        return {k: v[n : n + 1] if isinstance(v, Tensor) else v for k, v in x.items()}
    return x[n : n + 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("grad", "at"), [(g, a) for g in ("backprop", "plugin") for a in ("input", "output")])
def test_gradients_equal_one_backward_per_block(family: str, grad: str, at: str) -> None:
    model, x = MODELS[family].build()
    model, x = model.double().eval(), converted(x, torch.float64)
    for p in model.parameters():
        if not p.any():  # heads that begin with zeros have no gradient
            nn.init.normal_(p.data)
    stream = cut(model, x)
    with torch.no_grad():
        target = labels_for(stream, stream.run().output)
        measures = gradients(grad=grad, at=at)(stream, target)
    prefix, suffix = "plugin_" if grad == "plugin" else "", "_at_output" if at == "output" else ""
    for n in range(2):
        expected = twins.gradients(cut(model, one(x, n)), target[n : n + 1], grad=grad, at=at)
        for name, values in expected.items():
            got = measures[f"{prefix}{name}{suffix}"].values[n].tolist()
            assert got == pytest.approx(values, rel=1e-4, abs=1e-8), name
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_left_alone_and_frozen_parameters_give_the_same() -> None:
    model = ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8))).eval()
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    before = copy.deepcopy(model.state_dict())
    first = profile(model, [(x, labels)], [gradients(), gradients(grad="plugin", at="output")])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.requires_grad_(False)
    second = profile(model, [(x, labels)], [gradients(), gradients(grad="plugin", at="output")])
    for name, measure in first.measures.items():
        assert torch.equal(measure.values, second.measures[name].values)
    for sizes in ([1, 3], [2, 2]):
        parts = zip(x.split(sizes), labels.split(sizes), strict=True)
        split = profile(model, parts, [gradients(), gradients(grad="plugin", at="output")])
        for name, measure in first.measures.items():
            torch.testing.assert_close(measure.values, split.measures[name].values, rtol=1e-4, atol=1e-6)


def test_no_block_runs_twice() -> None:
    ran = []
    block = Block("b", lambda h: h, lambda h: ran.append(1) or torch.sin(h))
    sections = tuple(Section(n, lambda h: h, (block,) * 3) for n in "ab")
    stream = Stream(torch.randn(2, 4), sections, lambda h: h)
    gradients()(stream, torch.tensor([0, 1]))
    assert len(ran) == 6
    gradients(grad="plugin")(stream, torch.tensor([0, 1]))
    assert len(ran) == 12


def descending(eta: float, blocks: int = 3) -> tuple[Stream, Tensor]:
    """Blocks whose update is a step of gradient descent on the loss that a linear readout gives at their state."""
    labels, out = torch.tensor([0, 2, 1, 1]), torch.randn(6, 3)

    def branch(h: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(leaf @ out, labels, reduction="sum"), leaf)
        return -eta * g

    block = Block("descent", lambda h: h + branch(h), branch)
    return Stream(torch.randn(4, 6), (Section("s", lambda h: h, (block,) * blocks),), lambda h: h @ out), labels


def test_a_step_of_descent_has_cosine_minus_one() -> None:
    stream, labels = descending(0.01)
    measures = gradients(grad="plugin")(stream, labels)
    torch.testing.assert_close(measures["plugin_gradient_cosine"].values, torch.full((4, 3), -1.0))
    norms, products = measures["plugin_gradient_norm"].values, measures["plugin_first_order_change"].values
    torch.testing.assert_close(products, -0.01 * norms.square())
    assert (measures["plugin_loss_change"].values < 0).all()


def small(epsilon: float) -> Stream:
    """A network in float64 of two sections whose updates are all scaled by epsilon."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(6, 5, 5, generator=generator, dtype=torch.float64) / 2
    blocks = tuple(
        Block(str(i), lambda h, w=w: h + epsilon * torch.tanh(h @ w), lambda h, w=w: epsilon * torch.tanh(h @ w))
        for i, w in enumerate(weights)
    )
    sections = (Section("a", lambda h: h, blocks[:3]), Section("b", lambda h: 2 * torch.sin(h), blocks[3:]))
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return Stream(x, sections, lambda h: h)


@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("grad", ["backprop", "plugin"])
def test_the_remainder_of_the_expansion_is_of_second_order(grad: str, at: str) -> None:
    """Metamorphic: halving the updates quarters what the first order leaves of the true change."""
    labels = torch.tensor([0, 1, 2, 3])
    remainders = []
    for epsilon in (0.04, 0.02):
        measures = gradients(grad=grad, at=at)(small(epsilon), labels)
        true = loss_changes(small(epsilon), labels)["loss_change"] if grad == "backprop" else None
        suffix, prefix = "_at_output" if at == "output" else "", "plugin_" if grad == "plugin" else ""
        true = measures[f"plugin_loss_change{suffix}"] if true is None else true
        first = measures[f"{prefix}first_order_change{suffix}"]
        assert first.points == true.points
        remainders.append((true.values.double() - first.values.double()).abs().mean())
    slope = torch.log2(remainders[0] / remainders[1])
    assert 1.9 < slope < 2.1


def test_the_plugin_change_is_that_of_the_readouts() -> None:
    stream, labels = small(0.5), torch.tensor([0, 1, 2, 3])
    losses = readouts(stream, labels)["loss"].values[:, -4:]
    found = gradients(grad="plugin")(stream, labels)["plugin_loss_change"].values
    torch.testing.assert_close(found, losses.diff(dim=1), rtol=1e-4, atol=1e-6)


def test_the_ratio_compares_first_blocks_of_sections() -> None:
    stream, labels = small(0.5), torch.tensor([0, 1, 2, 3])
    measures = gradients()(stream, labels)
    norms = measures["gradient_norm"].values
    assert measures["gradient_ratio"].points == (Point(0, 0),)
    torch.testing.assert_close(measures["gradient_ratio"].values[:, 0], norms[:, 0] / norms[:, 3])
    assert "gradient_ratio" not in gradients()(descending(0.1)[0], descending(0.1)[1])


def test_zero_denominators_are_undefined_and_counted() -> None:
    still = Block("still", lambda h: h, torch.zeros_like)
    moving = Block("moving", lambda h: h + 1, torch.ones_like)
    stream = Stream(torch.randn(3, 4), (Section("s", lambda h: h, (still, moving)),), lambda h: h)
    for at in ("input", "output"):
        measures = gradients(at=at)(stream, torch.arange(3))
        suffix = "_at_output" if at == "output" else ""
        cosines = measures[f"gradient_cosine{suffix}"].values
        assert cosines[:, 0].isnan().all()
        assert cosines[:, 1].isfinite().all()
    constant = Stream(stream.input, stream.sections, lambda h: 0 * h)
    measures = gradients()(constant, torch.arange(3))
    assert measures["gradient_cosine"].values.isnan().all()
    assert (measures["gradient_norm"].values == 0).all()


def test_examples_without_a_counted_token_are_undefined_and_spoil_no_other() -> None:
    h, out = torch.randn(2, 3, 4), torch.randn(4, 5)
    block = Block("b", lambda h: h + torch.sin(h), torch.sin)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    stream = Stream(h, (Section("s", lambda h: h, (block, block)),), lambda h: h @ out, mask)
    target = torch.tensor([[-100, -100, 3], [1, -100, 2]])
    for probe in (gradients(), gradients(grad="plugin")):
        for measure in probe(stream, target).values():
            assert measure.values[0].isnan().all()
            assert measure.values[1].isfinite().all()


def test_scaling_the_loss_unit_leaves_the_cosine() -> None:
    """Metamorphic: states in another unit leave cosine and product, and divide the gradient."""
    stream, labels = small(0.5), torch.tensor([0, 1, 2, 3])

    def block(b: Block) -> Block:
        return Block(b.name, lambda h: 8 * b.apply(h / 8), lambda h: 8 * b.branch(h / 8))

    sections = tuple(
        Section(s.name, lambda h, s=s, k=k: 8 * s.entry(h / 8 if k else h), tuple(map(block, s.blocks)))
        for k, s in enumerate(stream.sections)
    )
    other = Stream(stream.input, sections, lambda h: stream.readout(h / 8))
    a, b = gradients()(stream, labels), gradients()(other, labels)
    torch.testing.assert_close(a["gradient_cosine"].values, b["gradient_cosine"].values)
    torch.testing.assert_close(a["first_order_change"].values, b["first_order_change"].values)
    torch.testing.assert_close(a["gradient_norm"].values, 8 * b["gradient_norm"].values)


def test_precision_moves_the_values_within_its_rounding() -> None:
    """Float32 within 2000 of its roundings of float64 (a few dozen layers); bfloat16 is measured in float32."""
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(3, 3), widths=(4, 8))).eval()
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    exact = gradients()(model.double().cut(x.double()), labels)
    for dtype in (torch.float32, torch.bfloat16):
        found = gradients()(model.to(dtype).cut(x.to(dtype)), labels)
        for name in ("gradient_cosine", "gradient_norm"):
            scale = exact[name].values.abs().max().item()
            close = 2000 * torch.finfo(torch.float32).eps if dtype is torch.float32 else 30 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[name].values, exact[name].values, rtol=0, atol=close * scale)
            assert found[name].values.dtype == torch.float32


def test_bad_requests_are_refused() -> None:
    stream, labels = descending(0.1)
    with pytest.raises(ValueError, match=r"grad is 'bakprop'; allowed are \('backprop', 'plugin'\)"):
        gradients(grad="bakprop")
    with pytest.raises(ValueError, match="at is 'middle'"):
        gradients(at="middle")
    for probe in (gradients(), loss_changes):
        with pytest.raises(ValueError, match=r"need.? labels"):
            probe(stream, None)
    for probe in (gradients(), gradients(grad="plugin"), loss_changes):
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.2"):
            probe(stream, labels + 9)
    dead = Stream(stream.input, stream.sections, lambda h: (h @ torch.ones(6, 3)).detach())
    with pytest.raises(ValueError, match="cannot be differentiated"):
        gradients()(dead, labels)


class Cells(nn.Module):
    """Three blocks, one of which can cut the gradient, and a readout that can."""

    class Cell(nn.Module):
        def __init__(self, cut: str) -> None:
            super().__init__()
            self.inner, self.cut = nn.Linear(4, 4), cut

        def forward(self, h: Tensor) -> Tensor:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut != "no_grad"):
                return torch.tanh(self.inner(h.detach() if self.cut == "detach" else h))

    def __init__(self, **cuts: str) -> None:
        super().__init__()
        self.cells = nn.ModuleList(self.Cell(cuts.get(name, "")) for name in ("first", "second", "third"))
        self.head = self.Cell(cuts.get("head", ""))

    def cut(self, x: Tensor) -> Stream:
        blocks = tuple(Block(f"cells.{i}", cell) for i, cell in enumerate(self.cells))
        return Stream(x, (Section("s", lambda h: h, blocks),), self.head)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["no_grad", "detach"])
def test_a_place_that_cuts_the_gradient_is_refused_by_its_name(kind: str, frozen: bool) -> None:
    """The blocks after it do have a gradient, which a backward to the first state would not compute."""
    x, labels = torch.randn(3, 4), torch.arange(3)
    for number, name in enumerate(("first", "second", "third")):
        stream = Cells(**{name: kind}).requires_grad_(not frozen).cut(x)
        for at in ("input", "output"):
            with pytest.raises(
                ValueError, match=rf'gradients: block "cells.{number}" cuts the gradient .*take that out'
            ):
                gradients(at=at)(stream, labels)
        assert gradients(grad="plugin")(stream, labels)["plugin_gradient_cosine"].values.isfinite().all()
    stream = Cells(head=kind).requires_grad_(not frozen).cut(x)
    for probe in (gradients(), gradients(grad="plugin")):
        with pytest.raises(ValueError, match=r"the loss cannot be differentiated .* in the readout"):
            probe(stream, labels)
    stream = Cells().requires_grad_(not frozen).cut(x)
    second = Section("t", torch.Tensor.detach, stream.sections[0].blocks)
    with pytest.raises(ValueError, match="gradients: the entry of t cuts the gradient"):
        gradients()(Stream(x, (*stream.sections, second), stream.readout), labels)


@pytest.mark.parametrize("grad", ["backprop", "plugin"])
def test_gradients_under_inference_mode_are_the_same(grad: str) -> None:
    model = ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8))).eval()
    loop, x = MODELS["loop"].build()
    for network, images in ((model, torch.randn(4, 3, 8, 8)), (loop.eval(), x)):
        outputs = network(images)
        for target in (outputs.argmin(1), outputs > outputs.median(1, keepdim=True).values):
            expected = profile(network, [(images, target)], [gradients(grad=grad)])
            with torch.inference_mode():
                given = (images.clone(), target.clone())
                found = profile(network, [given], [gradients(grad=grad)])
                own = gradients(grad=grad)(cut(network, given[0]), given[1])
            for name, values in expected.measures.items():
                torch.testing.assert_close(found.measures[name].values, values.values)
                torch.testing.assert_close(own[name].values, values.values)


@pytest.mark.parametrize("margin", [1.0, 12.0, 17.0, 40.0, 80.0])
def test_the_gradient_of_a_certain_answer_keeps_its_direction(margin: float) -> None:
    """In float32 `p - 1` has no digits left there, and above 17 nats it is 0."""
    target = torch.tensor([0])
    several = torch.tensor([[1.0, 0.0, 0.0]])
    for labels in (target, several):
        found = []
        for dtype in (torch.float32, torch.float64):
            z = torch.tensor([[margin, 0.0, -1.0]], dtype=dtype, requires_grad=True)
            loss = Reader.of(z, labels, None)(z)[1]["loss"]
            found.append(torch.autograd.grad(loss.sum(), z)[0].double())
        ours, exact = (g / g.norm() for g in found)
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_cross_entropy() -> None:
    z, target = 5 * torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 2, 1])
    z[5, 1] = -torch.inf  # an impossible class that is the answer
    z[0, 1:3] = -torch.inf
    loss = Reader.of(z, target, None)(z)[1]["loss"]
    expected = nn.functional.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(loss[:5], expected[:5])
    assert loss[5] == torch.inf
    ones = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[3.0, -torch.inf], [1.0, -2.0]])  # impossible and rightly so
    several = Reader.of(z, ones, None)(z)[1]["loss"]
    torch.testing.assert_close(several[0], nn.functional.softplus(torch.tensor(-3.0)) / 2)


def test_cosines_of_tiny_gradients_are_as_in_float64() -> None:
    """Squares of what is left of the gradient of an answer that is certain by 60 nats are 0 in float32."""
    model, x = ResNet(ResNetConfig((2,), (4,), 1), seed=1).eval(), torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        target = model(x).argmax(1)
        model.dense.weight *= 60 / (model(x).topk(2).values @ torch.tensor([1.0, -1.0])).min()
    found = [
        gradients()(cut(copy.deepcopy(model).to(dtype), x.to(dtype)), target)["gradient_cosine"].values.double()
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*found, atol=1e-3, rtol=0)


@pytest.mark.parametrize("at", ["input", "output"])
@pytest.mark.parametrize("grad", ["backprop", "plugin"])
@pytest.mark.parametrize("margin", [4.0, 12.0, 20.0])
def test_gradients_of_certain_answers_are_not_lost_in_float16(margin: float, grad: str, at: str) -> None:
    """Which has no numbers below 6e-8: they came as 0, or with the direction of their few largest entries."""
    torch.manual_seed(0)
    x, weights, out = torch.randn(8, 32).half(), (torch.randn(3, 32, 32) / 20).half(), torch.randn(32, 5).half()
    out = out * (margin / (x @ out).float().topk(2).values @ torch.tensor([1.0, -1.0])).median().half()
    labels, probe = (x @ out).argmax(1), gradients(grad=grad, at=at)

    def measured(dtype: torch.dtype) -> dict[str, Tensor]:
        def block(w: Tensor) -> Block:
            return Block("b", lambda h: h + torch.tanh(h @ w), lambda h: torch.tanh(h @ w))

        section = Section("s", lambda h: h, tuple(map(block, weights.to(dtype))))
        found = probe(Stream(x.to(dtype), (section,), lambda h: h @ out.to(dtype)), labels)
        return {name.removeprefix("plugin_").removesuffix("_at_output"): m.values for name, m in found.items()}

    ours, exact = measured(torch.float16), measured(torch.float64)
    torch.testing.assert_close(ours["gradient_cosine"], exact["gradient_cosine"], atol=2e-3, rtol=0)
    for name in ("gradient_norm", "first_order_change"):  # logits are rounded, and how certain they are hangs on that
        torch.testing.assert_close(ours[name], exact[name], atol=0, rtol=0.1)
