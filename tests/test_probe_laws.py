"""Laws of every probe that the command line knows, on several families: batches, order, precision, a planted block."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MODELS, converted
from residuum.cutting import cut
from residuum.probes import drops, gradients, interventions, loss_changes, pairs, passive, update_angle
from residuum.probing import NAMES, choose
from residuum.profiles import Measure, Profile, profile
from residuum.streams import Block, Map, Section, Stream

FAMILIES = ("own", "own projection", "loop", "torchvision vit", "gpt2")
EVERY = tuple(product(FAMILIES, NAMES))
# Twenty more steps with gradients enlarge roundings without bound; what looks at each step is tested by itself.
STEADY = [each for each in EVERY if each[1] != "unrolled_last"]
EXAMPLES = 4
SPECTRAL = ("lipschitz", "settling")
WHOLE = (tuple(range(EXAMPLES)),)


def chosen(x: Any, rows: list[int]) -> Any:
    """Some examples of a batch."""
    if isinstance(x, dict):
        return {name: value[rows] if isinstance(value, Tensor) else value for name, value in x.items()}
    return x[rows]


@cache
def made(family: str) -> tuple[nn.Module, Any, Tensor]:
    """A model in float64, four examples and their labels; the other two examples are padded elsewhere."""
    torch.manual_seed(0)
    model, x = MODELS[family].build()
    for parameter in model.parameters():
        if not parameter.any():  # heads that begin at zero would hide what is wrong with gradients and answers
            nn.init.normal_(parameter, std=0.1)
    model = model.double().eval()
    x, again = (converted(part, torch.float64) for part in (x, MODELS[family].build()[1]))
    if isinstance(x, dict):
        x = {k: torch.cat([v, again[k].flip(0)]) if isinstance(v, Tensor) else v for k, v in x.items()}
        return model, x, torch.where(x["attention_mask"].bool(), x["input_ids"], -100)
    return model, torch.cat([x, again]), torch.arange(EXAMPLES) % 3


@cache
def measured(
    family: str, name: str, parts: tuple[tuple[int, ...], ...] = WHOLE, dtype: torch.dtype = torch.float64
) -> Profile:
    """What one probe finds on the examples, in these batches."""
    model, x, labels = made(family)
    x = converted(x, dtype)
    try:
        return profile(
            model.to(dtype),
            [(chosen(x, list(rows)), labels[list(rows)]) for rows in parts],
            [*choose((name,)).values()],
        )
    finally:
        model.double()


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Equal up to a part of the largest value, and undefined for the same examples."""
    largest = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * largest, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_the_order_and_the_size_of_batches_do_not_matter(family: str, name: str) -> None:
    whole, parts = measured(family, name), ((3,), (1, 0), (2,))
    split, order = measured(family, name, parts), [example for part in parts for example in part]
    assert whole.measures
    assert whole.measures.keys() == split.measures.keys()
    for quantity, found in whole.measures.items():
        assert found.values.isfinite().any(), quantity
        assert split.measures[quantity].points == found.points
        if quantity.endswith("error"):  # of a converged value nothing but rounding
            continue
        close(split.measures[quantity].values, found.values[order], 1e-5, quantity)


# Precision ------------------------------------------------------------------------------------------------------------


def is_count(name: str) -> bool:
    """Quantities that are 0 or 1 for an example or a token, so that rounding changes them not at all, or by one."""
    return name.endswith(("accuracy", "agreement", "flip", "label_change", "chance"))


@pytest.mark.parametrize(("family", "name"), STEADY)
def test_float32_is_float64_within_its_rounding(family: str, name: str) -> None:
    """Within 2000 roundings of the largest value, which is what a few dozen layers of sums of some hundred terms make.

    Estimates from a fixed number of vector products stop elsewhere when rounded: within 1 %. Their residuals and
    errors say how far from converged they are and are no quantities of the network.
    """
    exact, found = measured(family, name), measured(family, name, WHOLE, torch.float32)
    tolerance = 1e-2 if name in SPECTRAL else 2000 * torch.finfo(torch.float32).eps
    for quantity, expected in exact.measures.items():
        if not quantity.endswith(("residual", "error")):
            close(found.measures[quantity].values, expected.values, tolerance, quantity)


def widened(stream: Stream) -> Stream:
    """The same network on the same bfloat16 states, which are float32 tensors as soon as a probe sees them."""

    def wide(f: Map) -> Map:
        return lambda h: f(h.bfloat16() if isinstance(h, Tensor) and h.is_floating_point() else h).float()

    def block(b: Block) -> Block:
        return Block(b.name, wide(b.apply), b.branch and wide(b.branch))

    sections = tuple(
        replace(s, entry=wide(s.entry), blocks=tuple(map(block, s.blocks)), skip=s.skip and wide(s.skip))
        for s in stream.sections
    )
    return replace(stream, sections=sections, readout=wide(stream.readout))


@pytest.mark.parametrize(("family", "name"), [each for each in STEADY if each[1] not in SPECTRAL])
def test_bfloat16_models_are_measured_in_float32(family: str, name: str) -> None:
    """What is found is that of float32 states up to roundings of updates (4), of the backward's gradients and of 20
    further steps with scaled updates (32).

    Spectral probes multiply with Jacobians in bfloat16; how near they come, tests/test_spectral.py says.
    """
    model, x, labels = made(family)
    (probe,) = choose((name,)).values()
    try:
        with torch.no_grad():
            stream = cut(model.bfloat16(), converted(x, torch.bfloat16))
            found, expected = probe(stream, labels), probe(widened(stream), labels)
    finally:
        model.double()
    roundings = 32 if name in ("gradients", "unrolls") else 4
    for quantity, values in found.items():
        if is_count(quantity):
            continue
        close(values.values, expected[quantity].values, roundings * torch.finfo(torch.bfloat16).eps, quantity)
        defined = values.values[values.values.isfinite() & (values.values != 0) & (values.values != 1)]
        short = (defined == defined.bfloat16().float()).float().mean().item()
        assert short < 0.9, f"{quantity} has the digits of bfloat16 only"


# A planted block ------------------------------------------------------------------------------------------------------


def planted(at: int, *, own: bool) -> tuple[Stream, Tensor]:
    """Five blocks that do nothing, but for one that moves every state towards the right answer."""
    labels = torch.arange(6) % 3
    push = 2 * nn.functional.one_hot(labels, 4).float()
    updates = [(lambda h: push.to(h)) if i == at else torch.zeros_like for i in range(5)]
    blocks = tuple(Block(str(i), lambda h, f=f: h + f(h), f if own else None) for i, f in enumerate(updates))
    return Stream(torch.randn(6, 4), (Section("only", lambda h: h, blocks),), lambda h: h), labels


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("at", range(5))
def test_one_useful_block_among_blocks_that_do_nothing_is_found(at: int, own: bool) -> None:
    stream, labels = planted(at, own=own)

    def only_at(values: Tensor) -> Tensor:
        """The values of the planted block; all others are 0."""
        assert torch.equal(values[:, [i for i in range(5) if i != at]], torch.zeros(6, 4))
        return values[:, at]

    with torch.no_grad():
        dropped = interventions(drops)(stream, labels)
        assert (only_at(dropped["drop_loss"].values - dropped["intact_loss"].values) > 0.1).all()
        assert (only_at(loss_changes(stream, labels)["loss_change"].values) < -0.1).all()
        for grad, before in (("backprop", ""), ("plugin", "plugin_")):
            found = gradients(grad=grad)(stream, labels)
            assert (only_at(found[f"{before}first_order_change"].values) < 0).all()
        found = singles(pairs(stream, None)["block_influence"])
        assert (found[:, at] > 0.01).all()
        # cosines of a state with itself, in float64
        assert found[:, [i for i in range(5) if i != at]].abs().max() < 1e-12


def singles(measure: Measure) -> Tensor:
    """The columns of single blocks of a measure of spans."""
    return measure.values[:, [c for c, point in enumerate(measure.points) if point.length == 1]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unit", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_cosines_do_not_depend_on_the_unit_of_the_states(unit: float, masked: bool) -> None:
    """In float32 products of two lengths overflow above 1e19 and underflow below 1e-19. Examples differ in it."""
    torch.manual_seed(0)
    w, still = torch.randn(3, 5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    x, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([[1, 1, 0]] * 4).bool() if masked else None
    x[1] *= unit
    angles = []
    for dtype in (torch.float32, torch.float64):
        maps = (m.to(dtype) for m in (w[0], w[1], still, w[2]))
        blocks = tuple(Block("b", lambda h, m=m: h + h @ m, lambda h, m=m: h @ m) for m in maps)
        given = x.to(dtype)
        stream = Stream(given, (Section("s", lambda h: h, blocks),), lambda h: 1e-20 * h.mean(1), mask)
        found = passive(update_angle)(stream, None) | gradients(at="output")(stream, torch.tensor([0, 1, 2, 3]))
        angles.append([found[name].values for name in ("update_angle", "gradient_cosine_at_output")])
    for ours, exact in zip(*angles, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0, equal_nan=True)
    assert angles[0][0].isnan().sum() == 8  # before and after the block that does nothing
