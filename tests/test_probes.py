"""Probes: equal to their formulas for every kind of state, right at the edges, one walk, no evaluation twice."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
from residuum.models import ResNet, ResNetConfig
from residuum.probes import first_not_finite, misfit, pairs, passive, perturbation, readouts, state_norm, update_angle
from residuum.profiles import Measure, Point
from residuum.streams import Block, Section, Step, Stream

everything = passive(perturbation, state_norm, update_angle)


def branch(seed: int, features: int) -> Callable[[Tensor], Tensor]:
    """A random nonlinear map of the last dimension."""
    weight = torch.randn(features, features, generator=torch.Generator().manual_seed(seed)) / features**0.5
    return lambda h: torch.tanh(h @ weight.to(h.dtype))


def toy(h0: Tensor, *, blocks: int = 3, own: bool = True, mask: Tensor | None = None, head: int = 4) -> Stream:
    """One section of random blocks on any state whose last dimension is features; the readout is linear."""
    maps = [branch(seed, h0.shape[-1]) for seed in range(blocks)]
    steps = tuple(Block(f"block {i}", lambda h, f=f: h + f(h), f if own else None) for i, f in enumerate(maps))
    out = torch.randn(h0.shape[-1], head, generator=torch.Generator().manual_seed(99))
    return Stream(h0, (Section("only", lambda h: h, steps),), lambda h: h @ out.to(h.dtype), mask)


def scaled(stream: Stream, factor: float) -> Stream:
    """The stream seen in another unit of the state."""

    def block(b: Block) -> Block:
        return Block(b.name, lambda h: factor * b.apply(h / factor), lambda h: factor * b.branch(h / factor))

    sections = tuple(
        Section(s.name, lambda h, s=s: factor * s.entry(h), tuple(block(b) for b in s.blocks)) for s in stream.sections
    )
    return Stream(stream.input, sections, lambda h: stream.readout(h / factor), stream.mask)


def from_blocks(h0: Tensor, *updates: Callable[[Tensor], Tensor]) -> Stream:
    """One section of blocks with the given branches and an identity readout."""
    blocks = tuple(Block(str(i), lambda h, f=f: h + f(h), f) for i, f in enumerate(updates))
    return Stream(h0, (Section("only", lambda h: h, blocks),), lambda h: h)


def padded() -> Tensor:
    """Right padding, none, left padding, a hole."""
    return torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()


def network(**options: object) -> Stream:
    """An own network of two sections on random images, with channels-last states."""
    torch.manual_seed(3)
    model = ResNet(ResNetConfig(blocks=(3, 2), widths=(4, 8), classes=5, **options)).eval()
    return model.cut(torch.randn(6, 3, 12, 12))


STREAMS: dict[str, Callable[[], Stream]] = {
    "vectors": lambda: toy(torch.randn(4, 6)),
    "after - before": lambda: toy(torch.randn(4, 6), own=False),
    "tokens": lambda: toy(torch.randn(4, 5, 6)),
    "padded tokens": lambda: toy(torch.randn(4, 5, 6), mask=padded()),
    "maps": lambda: toy(torch.randn(4, 3, 2, 6)),
    "one example": lambda: toy(torch.randn(1, 6)),
    "one block": lambda: toy(torch.randn(4, 6), blocks=1),
    "own network": network,
    "own network, projection": lambda: network(transition="projection"),
    "float64": lambda: toy(torch.randn(4, 6).double()),
}


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest) -> Stream:
    torch.manual_seed(1)
    return STREAMS[request.param]()


@pytest.fixture(autouse=True)
def _without_gradient() -> object:
    with torch.no_grad():
        yield


def values(measures: dict[str, Measure], name: str, example: int) -> list[float]:
    return measures[name].values[example].tolist()


# Passive ------------------------------------------------------------------------------------------------------------


def test_passive_measures_equal_their_formulas(stream: Stream) -> None:
    measures = everything(stream, None)
    for example in range(len(stream.input)):
        for name, expected in oracles.perturbations(stream, example).items():
            if expected:
                # float32 values; differences of states in the oracle lose digits that the own branch keeps
                assert values(measures, name, example) == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_points_number_the_blocks_and_say_where_updates_come_from() -> None:
    measures = everything(network(), None)
    blocks = tuple(Point(s, i) for s, n in enumerate((3, 2)) for i in range(n))
    assert measures["perturbation"].points == measures["state_norm"].points == blocks
    assert measures["update_angle"].points == tuple(p for p in blocks if p.index)
    assert {m.at for m in measures.values()} == {"block"}
    assert [measures[k].update for k in ("perturbation", "state_norm")] == ["own branch", ""]
    assert everything(toy(torch.randn(2, 3), own=False), None)["update_angle"].update == "after - before"


def test_masked_tokens_do_not_count() -> None:
    h, mask = torch.randn(4, 5, 6), padded()
    changed = torch.where(mask[..., None], h, torch.full_like(h, torch.inf))
    for probe in (everything, pairs):
        before, after = probe(toy(h, mask=mask), None), probe(toy(changed, mask=mask), None)
        for name in before:
            torch.testing.assert_close(after[name].values, before[name].values, rtol=1e-6, atol=1e-7)


def test_examples_without_a_token_are_undefined() -> None:
    mask = padded()
    mask[1] = False
    measures = everything(toy(torch.randn(4, 5, 6), mask=mask), None) | pairs(
        toy(torch.randn(4, 5, 6), mask=mask), None
    )
    for name in measures.keys() - {"perturbation", "state_norm"}:
        undefined = measures[name].values.isnan().all(1)
        assert undefined.tolist() == [False, True, False, False], name


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_states_that_are_not_finite_are_undefined_and_their_first_block_is_found(wrong: float) -> None:
    def breaks(h: Tensor) -> Tensor:
        return torch.where(torch.tensor([0, 1, 0, 1]).bool()[:, None], wrong, 0.1) * torch.ones_like(h)

    def late(h: Tensor) -> Tensor:
        return torch.where(torch.tensor([0, 1, 1, 0]).bool()[:, None], wrong, 0.1) * torch.ones_like(h)

    start = torch.ones(4, 3)
    start[3, 1] = wrong
    stream = from_blocks(start, torch.ones_like, breaks, late)
    for name, measure in (everything(stream, None) | pairs(stream, None)).items():
        assert not measure.values.isinf().any(), name
    found = everything(stream, None)["perturbation"].values.isnan()
    assert found.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 1, 0]]
    found = everything(stream, None)["state_norm"].values.isnan()
    assert found.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]
    places = {"the entry of only": 1, "block 1 (only)": 1, "block 2 (only)": 1}
    assert first_not_finite([stream]) == places
    assert list(first_not_finite([stream, stream]).items()) == [(place, 2 * n) for place, n in places.items()]
    assert first_not_finite([toy(torch.randn(2, 6))]) == {}


def test_masked_tokens_may_be_anything() -> None:
    h = torch.where(padded()[..., None], torch.randn(4, 5, 6), torch.inf)
    assert first_not_finite([toy(h, mask=padded())]) == {}
    assert first_not_finite([toy(h)]) == {"the entry of only": int((~padded()).any(1).sum())}


def test_zero_denominators_are_nan_without_a_warning() -> None:
    h = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    stream = from_blocks(h, lambda h: torch.tensor([[1.0, 0.0], [0.0, 0.0]]), lambda h: torch.ones_like(h))
    measures = everything(stream, None) | pairs(stream, None)
    assert measures["scaled_perturbation"].values[:, 0].tolist() == [pytest.approx(math.nan, nan_ok=True), 0]
    assert measures["update_angle"].values[:, 0].tolist() == [
        pytest.approx(1 / math.sqrt(2)),
        pytest.approx(math.nan, nan_ok=True),
    ]
    assert measures["cosine_to_last"].values[0, 0].isnan()
    still = pairs(from_blocks(h, lambda h: torch.zeros_like(h)), None)["distance_to_last"].values
    assert still.isnan().all()
    for measure in measures.values():
        assert not measure.values.isinf().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_short_floats_are_summed_in_float32(dtype: torch.dtype) -> None:
    # 65,536 entries of 256: the sum of squares overflows float16 and loses everything in bfloat16.
    h = torch.full((2, 65536), 256.0, dtype=dtype)
    measures = everything(from_blocks(h, lambda h: h / 2, lambda h: -h / 2), None)
    assert measures["state_norm"].values[0].tolist() == pytest.approx([65536.0, 65536 * 1.5])
    assert measures["update_angle"].values[0].tolist() == pytest.approx([-1.0])


def test_all_passive_probes_share_one_walk_and_their_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norms = [], []
    stream = from_blocks(torch.randn(2, 3), *[lambda h: calls.append(1) or torch.sin(h)] * 4)
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: norms.append(1) or norm(*a, **k))
    everything(stream, None)
    assert len(calls) == 4
    assert len(norms) == 2 * 4


def test_a_passive_probe_is_any_function_of_a_step() -> None:
    def largest(step: Step, previous: Step | None) -> dict[str, Tensor]:
        return {"largest": step.update.abs().flatten(1).amax(1)}

    measures = passive(largest)(toy(torch.randn(2, 3)), None)
    assert measures["largest"].values.shape == (2, 3)


def test_passive_refuses_nothing_to_do_and_the_same_quantity_twice() -> None:
    with pytest.raises(ValueError, match="at least one passive probe"):
        passive()
    with pytest.raises(ValueError, match=r"two probes give \['state_norm'\]"):
        passive(state_norm, state_norm)(toy(torch.randn(2, 3)), None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.floats(1e-3, 1e3))
def test_laws_of_passive_measures(seed: int, blocks: int, features: int, factor: float) -> None:
    torch.manual_seed(seed)
    stream = toy(torch.randn(3, features), blocks=blocks)
    one, other = everything(stream, None), everything(scaled(stream, factor), None)
    torch.testing.assert_close(
        other["scaled_perturbation"].values, one["scaled_perturbation"].values, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(other["perturbation"].values, factor * one["perturbation"].values, rtol=1e-4, atol=0)
    if blocks > 1:
        assert one["update_angle"].values.abs().max() <= 1


# Pairs --------------------------------------------------------------------------------------------------------------


def test_pair_measures_equal_their_formulas_to_1e_6(stream: Stream) -> None:
    measures = pairs(stream, None)
    for example in range(len(stream.input)):
        for name, expected in oracles.pairs(stream, example).items():
            assert values(measures, name, example) == pytest.approx(expected, rel=1e-6, abs=1e-6), name


def test_small_angles_keep_their_digits() -> None:
    # arccos of a cosine rounded to float32 would be wrong by up to 1e-4 here.
    h = torch.tensor([[1.0, 0.0]])
    stream = from_blocks(h, lambda h: torch.tensor([[0.0, 1e-4]]))
    assert pairs(stream, None)["angular_distance"].values.item() == pytest.approx(1e-4 / math.pi, rel=1e-5)


def test_every_span_of_every_section_has_a_point() -> None:
    measures = pairs(network(), None)
    spans = [Point(s, i, n) for s, length in enumerate((3, 2)) for i in range(length) for n in range(1, length - i + 1)]
    states = [Point(s, i) for s, length in enumerate((3, 2)) for i in range(length + 1)]
    assert list(measures["block_influence"].points) == list(measures["angular_distance"].points) == spans
    assert list(measures["distance_to_last"].points) == list(measures["cosine_to_last"].points) == states


def test_few_examples_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    stream = toy(torch.randn(4, 5, 6), mask=padded())
    whole = pairs(stream, None)
    monkeypatch.setattr("residuum.probes.pair._ENTRIES_AT_ONCE", 1)
    for name, measure in pairs(stream, None).items():
        torch.testing.assert_close(measure.values, whole[name].values, rtol=0, atol=1e-7, equal_nan=True)


def test_states_of_one_section_may_lie_differently_in_memory() -> None:
    h = torch.randn(2, 3, 4, 5)
    blocks = (Block("0", lambda h: (h + 1).contiguous(memory_format=torch.channels_last)), Block("1", lambda h: 2 * h))
    stream = Stream(h, (Section("only", lambda h: h, blocks),), lambda h: h)
    for example in range(2):
        expected = oracles.pairs(stream, example)["block_influence"]
        assert values(pairs(stream, None), "block_influence", example) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.floats(1e-3, 1e3))
def test_laws_of_pair_measures(seed: int, blocks: int, tokens: int, features: int, factor: float) -> None:
    torch.manual_seed(seed)
    stream = toy(torch.randn(3, tokens, features), blocks=blocks)
    measures, other = pairs(stream, None), pairs(scaled(stream, factor), None)
    assert measures["cosine_to_last"].values.abs().max() <= 1
    assert measures["angular_distance"].values.min() >= 0
    assert measures["angular_distance"].values.max() <= 1
    assert measures["block_influence"].values.min() >= 0
    assert measures["block_influence"].values.max() <= 2
    ends = measures["distance_to_last"].values
    assert ends[:, 0].tolist() == [1] * 3
    assert ends[:, -1].tolist() == [0] * 3
    for name in measures:
        torch.testing.assert_close(other[name].values, measures[name].values, rtol=1e-3, atol=1e-5)


# Readouts -----------------------------------------------------------------------------------------------------------


def test_readouts_of_labels_equal_the_formulas() -> None:
    for stream in (network(), network(transition="projection"), network(head="pool")):
        labels = torch.tensor([0, 1, 2, 3, 4, 0])
        measures, outputs = readouts(stream, labels), oracles.exits(stream)
        final = outputs[-1].argmax(1)
        for k, output in enumerate(outputs):
            for n, label in enumerate(labels.tolist()):
                assert measures["loss"].values[n, k] == pytest.approx(oracles.cross_entropy(output[n], label), rel=1e-5)
                assert measures["entropy"].values[n, k] == pytest.approx(oracles.entropy(output[n]), rel=1e-4, abs=1e-6)
            answer = output.argmax(1)
            assert measures["accuracy"].values[:, k].tolist() == (answer == labels).float().tolist()
            assert measures["agreement"].values[:, k].tolist() == (answer == final).float().tolist()
            if k:
                change = (answer != outputs[k - 1].argmax(1)).float().tolist()
                assert measures["label_change"].values[:, k - 1].tolist() == change


def test_the_last_readout_is_the_network() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8))).eval()
    x, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    measures = readouts(model.cut(x), labels)
    loss = nn.functional.cross_entropy(model(x), labels, reduction="none")
    torch.testing.assert_close(measures["loss"].values[:, -1], loss)
    assert measures["accuracy"].points == tuple(Point(s, i) for s in (0, 1) for i in range(3))
    assert measures["label_change"].points == measures["accuracy"].points[1:]
    assert measures["loss"].note == "cross-entropy (nats)"


def test_no_exit_and_no_block_is_evaluated_twice() -> None:
    read, entered, ran = [], [], []

    def section(name: str, n: int) -> Section:
        block = Block("b", lambda h: h + torch.sin(h), lambda h: ran.append(1) or torch.sin(h))
        return Section(name, lambda h: entered.append(name) or h + 1, (block,) * n)

    stream = Stream(
        torch.randn(2, 3),
        tuple(section(k, n) for k, n in (("a", 3), ("b", 0), ("c", 2))),
        lambda h: read.append(1) or h,
    )
    measures = readouts(stream, None)
    assert len(ran) == 5
    assert len(read) == 4 + 3 - 1  # the last state of a and the first of c share their exit
    assert entered == ["a", *["b", "c"] * 3, "b", "c"]
    for k, output in enumerate(oracles.exits(stream)):
        assert measures["entropy"].values[0, k] == pytest.approx(oracles.entropy(output[0]), rel=1e-5)


def test_nothing_agrees_with_an_answer_that_is_none() -> None:
    """Example 0 is not a number in the end, example 1 at first: early answers of the former are not as in the end."""
    h = torch.tensor([[1.0, 2.0, 0.0], [torch.inf, 0.0, 1.0], [0.0, 1.0, 2.0]])
    last = torch.tensor([[torch.nan, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    stream = Stream(h, (Section("a", lambda h: h, (Block("b", lambda h: last),)),), lambda h: h)
    for target in (None, torch.tensor([1, 0, 2]), torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]).bool()):
        found = readouts(stream, target)
        for name, expected in (
            ("agreement", [[math.nan] * 2, [0, 1], [1, 1]]),
            ("label_change", [[math.nan], [1], [0]]),
        ):
            torch.testing.assert_close(found[name].values.double(), torch.tensor(expected).double(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_readouts_of_several_labels(dtype: torch.dtype) -> None:
    out = torch.tensor([[2.0, 1.0, 0.5, -1.0], [2.0, -3.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    target = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).to(dtype)
    measures = readouts(from_blocks(out, torch.zeros_like), target)
    assert measures["accuracy"].values[:, 1].tolist() == [1, 0, 1]  # exactly the m largest; m = 0 asks for nothing
    z, y = out[0].double(), target[0].double()
    loss = -(y * torch.sigmoid(z).log() + (1 - y) * (1 - torch.sigmoid(z)).log()).mean()
    assert measures["loss"].values[0, 0] == pytest.approx(loss.item(), rel=1e-6)
    assert measures["entropy"].values[2, 0] == pytest.approx(math.log(2))
    assert measures["agreement"].values.tolist() == [[1, 1]] * 3
    assert measures["loss"].note == "binary cross-entropy with logits, mean over the classes (nats)"


def test_readouts_of_tokens_average_over_those_that_count() -> None:
    torch.manual_seed(2)
    mask, labels = padded(), torch.randint(0, 4, (4, 5))
    labels[0, 0] = labels[3, :] = -100
    stream = toy(torch.randn(4, 5, 6), mask=mask)
    measures, outputs = readouts(stream, labels), oracles.exits(stream)
    for k, output in enumerate(outputs):
        for n in range(3):
            counted = [t for t in range(5) if mask[n, t] and labels[n, t] != -100]
            loss = [oracles.cross_entropy(output[n, t], int(labels[n, t])) for t in counted]
            right = [float(output[n, t].argmax() == labels[n, t]) for t in counted]
            same = [float(output[n, t].argmax() == outputs[-1][n, t].argmax()) for t in counted]
            assert measures["loss"].values[n, k] == pytest.approx(sum(loss) / len(loss), rel=1e-5)
            assert measures["accuracy"].values[n, k] == pytest.approx(sum(right) / len(right))
            assert measures["agreement"].values[n, k] == pytest.approx(sum(same) / len(same))
    for measure in measures.values():
        assert measure.values[3].isnan().all()


def test_without_labels_there_is_no_loss() -> None:
    torch.manual_seed(2)
    assert readouts(network(), None).keys() == {"entropy", "agreement", "label_change"}
    stream = toy(torch.randn(4, 5, 6), mask=padded())
    entropies = readouts(stream, None)["entropy"].values
    for n in range(4):
        expected = [oracles.entropy(oracles.exits(stream)[2][n, t]) for t in range(5) if padded()[n, t]]
        assert entropies[n, 2] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_impossible_classes_do_not_spoil_the_entropy() -> None:
    stream = from_blocks(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.zeros_like)
    assert readouts(stream, None)["entropy"].values[0].tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            torch.zeros(6, 2, dtype=torch.int64),
            r"labels int64 \[6\] are needed for outputs \[6, 5\], given int64 \[6, 2\]",
        ),
        (torch.full((6,), 5), r"labels must be in 0\.\.4, they are in 5\.\.5"),
        (torch.full((6,), -100), r"labels must be in 0\.\.4"),
        (torch.zeros(6, 3, dtype=torch.uint8), r"must have the shape of the outputs \[6, 5\], given uint8 \[6, 3\]"),
        (torch.full((6, 5), 0.5), "labels per class must be 0 or 1"),
        (torch.zeros(6, dtype=torch.int32), "labels must be int64, or 0/1 in uint8, bool or float per class"),
        (torch.zeros(6), r"must have the shape of the outputs \[6, 5\], given float32 \[6\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(target: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        readouts(network(), target)


def test_outputs_that_are_not_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outputs must be \[example, class\] or \[example, token, class\]"):
        readouts(from_blocks(torch.randn(2, 3, 4, 4), torch.zeros_like), None)
    assert misfit(torch.randn(2, 3), torch.tensor([0, 2])) == ""


def test_a_mask_of_other_tokens_is_refused() -> None:
    stream = toy(torch.randn(4, 3, 6), mask=padded())
    for probe in (everything, pairs, readouts):
        with pytest.raises(
            ValueError, match=r"mask is for \[4, 5\] examples and tokens, but the states have shape \[4, 3"
        ):
            probe(stream, None)
