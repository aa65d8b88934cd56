"""Spectral probes: equal to full Jacobians for networks and transformers, bracketed, one example at a time."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles_spectra as oracles
from conftest import MODELS, converted
from residuum.cutting import cut
from residuum.models import Residual, ResNet, ResNetConfig
from residuum.nulls import calibrate_
from residuum.probes.spectral import lipschitz, settling, update_bound
from residuum.profiles import Point, load, profile
from residuum.spectra import guaranteed_norm
from residuum.streams import Block, Section, Stream

FAMILIES = ["own", "own projection", "loop", "torchvision vit", "gpt2", "llama", "bert"]


@pytest.fixture(autouse=True)
def _without_gradient() -> object:
    with torch.no_grad():
        yield


def stream_of(name: str, dtype: torch.dtype = torch.float64) -> Stream:
    torch.manual_seed(0)
    model, x = MODELS[name].build()
    return cut(model.to(dtype).eval(), converted(x, dtype))


def toy(h0: Tensor, *updates: Callable[[Tensor], Tensor], own: bool = True) -> Stream:
    """One section of blocks with the given branches."""
    blocks = tuple(Block(str(i), lambda h, f=f: h + f(h), f if own else None) for i, f in enumerate(updates))
    return Stream(h0, (Section("only", lambda h: h, blocks),), lambda h: h)


def row(stream: Stream, name: str, probe: Callable = lipschitz) -> list[float]:
    return probe(stream, None)[name].values[0].tolist()


# Local Lipschitz constants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_thirty_products_equal_the_full_jacobian(name: str) -> None:
    exact = stream_of(name)
    truth = [oracles.lipschitz(exact, example) for example in range(2)]
    for dtype in (torch.float64, torch.float32):
        measures = lipschitz(stream_of(name, dtype), None, products=30)
        for example, quantities in enumerate(truth):
            for quantity, expected in quantities.items():
                found = measures[quantity].values[example].double()
                error = found / torch.tensor(expected, dtype=torch.float64) - 1
                assert float(error.abs().max()) <= 1e-3
                assert float(error.max()) <= 2e-6  # from below, but for rounding of the stored float32 values


def test_unlucky_start_vectors_are_rare() -> None:
    """The start is random: some constants are missed by more than 1e-3, but few, and all stay below the truth."""
    stream = stream_of("own projection")
    exact = [oracles.lipschitz(stream, example) for example in range(2)]
    shares = {}
    for quantity in ("update_lipschitz", "block_lipschitz"):
        truth = torch.tensor([found[quantity] for found in exact], dtype=torch.float64)
        found = torch.stack([lipschitz(stream, None, seed=seed)[quantity].values for seed in range(10)])
        error = 1 - found.double() / truth
        assert float(error.min()) >= -1e-6
        assert float(error.max()) <= 2e-2
        shares[quantity] = float((error <= 1e-3).double().mean())
        error_bound = lipschitz(stream, None)[f"{quantity}_error"].values.double()
        assert (1 / (1 - error[0]) <= 1 + error_bound + 1e-6).all()
    assert shares["update_lipschitz"] >= 0.9
    assert shares["block_lipschitz"] >= 0.98  # it starts where the update's vector was found


def test_products_are_counted_at_the_block() -> None:
    """One forward of each block for the walk, one for its Jacobian, none per product."""
    stream = stream_of("own")
    forwards = 0

    def counting(block: Block) -> Block:
        def call(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
            nonlocal forwards
            forwards += 1
            return f(h)

        return Block(block.name, partial(call, block.apply), partial(call, block.branch))

    sections = tuple(Section(s.name, s.entry, tuple(map(counting, s.blocks))) for s in stream.sections)
    lipschitz(Stream(stream.input, sections, stream.readout), None)
    assert forwards == 2 * 5


def test_closed_forms() -> None:
    A = torch.tensor([[0.0, -0.5], [0.5, 0.0]]).double()
    h = torch.randn(3, 2).double()
    for own in (True, False):
        stream = toy(h, lambda h: h @ A.T, lambda h: -h, lambda h: 0 * h + 1, own=own)
        assert row(stream, "update_lipschitz") == pytest.approx([0.5, 1, 0], abs=1e-6)
        assert row(stream, "block_lipschitz") == pytest.approx([math.sqrt(1.25), 0, 1], abs=1e-6)
    measures = lipschitz(toy(h, lambda h: h, lambda h: 2 * h), None)
    assert measures["log_tail_product"].points == (Point(0, 0), Point(0, 1), Point(0, 2))
    assert measures["log_tail_product"].values[0].tolist() == pytest.approx([math.log(6), math.log(3), 0])
    assert measures["block_lipschitz"].at == "block"
    assert measures["log_tail_product"].at == "state"
    assert measures["update_lipschitz"].update == "own branch"
    assert measures["block_lipschitz"].update == ""
    assert "local" in measures["update_lipschitz"].note
    assert "from below" in measures["update_lipschitz"].note
    assert "1 in 1000" in measures["update_lipschitz_error"].note
    assert "not always the largest" in measures["update_lipschitz_residual"].note
    assert "logarithm" in measures["log_tail_product"].note


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(-3, 3), seed=st.integers(0, 1000))
def test_scaling_an_update_scales_its_constant(scale: float, seed: int) -> None:
    A = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double()
    h = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed + 1)).double()

    def f(h: Tensor) -> Tensor:
        return torch.tanh(h @ A.T)

    one = lipschitz(toy(h, f), None)["update_lipschitz"].values
    other = lipschitz(toy(h, lambda h: scale * f(h)), None)["update_lipschitz"].values
    torch.testing.assert_close(other, abs(scale) * one, rtol=1e-5, atol=1e-30)


def test_the_tail_product_bounds_growth_through_later_sections() -> None:
    stream = stream_of("own")
    tail = lipschitz(stream, None)["log_tail_product"]
    assert tail.points == tuple(Point(s, i) for s, n in enumerate((3, 2)) for i in range(n + 1))
    assert tail.values[:, -1].tolist() == [0, 0]

    def rest(h: Tensor) -> Tensor:
        for block in stream.sections[0].blocks[1:]:
            h = block(h)
        h = stream.sections[1].entry(h)
        for block in stream.sections[1].blocks:
            h = block(h)
        return h

    h = stream.run().states[0][1]
    for example in range(2):
        truth = float(torch.linalg.svdvals(oracles.jacobian(rest, h, example))[0])
        assert truth <= math.exp(float(tail.values[example, 1])) * (1 + 1e-3)


@pytest.mark.parametrize("name", ["own", "gpt2"])
def test_examples_do_not_depend_on_their_batch(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name].build()
    model, x = model.double().eval(), converted(x, torch.float64)
    pick = (
        (lambda x, i: {k: v[i] if isinstance(v, Tensor) else v for k, v in x.items()})
        if name == "gpt2"
        else (lambda x, i: x[i])
    )
    for probe in (lipschitz, settling):
        whole = probe(cut(model, x), None)
        turned = probe(cut(model, pick(x, [1, 0])), None)
        single = probe(cut(model, pick(x, [1])), None)
        for quantity, measure in whole.items():
            torch.testing.assert_close(turned[quantity].values.flip(0), measure.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(single[quantity].values, measure.values[1:], rtol=1e-4, atol=1e-5)


def test_masked_tokens_neither_change_nor_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    scale = torch.tensor([1.0, 2.0, 7.0])[:, None]
    stream = toy(torch.randn(3, 3, 4), lambda h: scale * h)
    masked = Stream(stream.input, stream.sections, stream.readout, mask)
    values = lipschitz(masked, None)["update_lipschitz"].values[:, 0]
    assert values[:2].tolist() == pytest.approx([2, 7])
    assert values[2].isnan()
    radius = settling(masked, None)["spectral_radius"].values[:, 0]
    assert radius[:2].tolist() == pytest.approx([3, 8])
    assert radius[2].isnan()


def test_states_that_are_not_finite_are_undefined_for_their_example_only() -> None:
    h = torch.randn(3, 4)
    h[1] = torch.inf
    for probe, quantity in ((lipschitz, "update_lipschitz"), (settling, "spectral_radius")):
        for update in (lambda h: torch.sin(h) * h, torch.relu):  # whose derivative is a number even there
            values = probe(toy(h, update), None)[quantity].values[:, 0]
            assert values.isnan().tolist() == [False, True, False]


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_the_bracket_holds_for_own_blocks_and_there_is_none_for_attention() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(2, 2), widths=(4, 8)))
    images = torch.randn(16, 3, 10, 10)
    calibrate_(model, [(images, None)])
    model.eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    measures = lipschitz(model.cut(images), None)
    for quantity in ("update_lipschitz", "block_lipschitz"):
        bound = measures[f"{quantity}_bound"]
        assert (bound.values >= measures[quantity].values).all()
        assert bound.points == measures[quantity].points
        assert "upper bound" in bound.note
        assert (bound.values == bound.values[:1]).all()
    assert not any(name.endswith("bound") for name in lipschitz(stream_of("torchvision vit"), None))
    block = stream_of("gpt2").sections[0].blocks[0]
    assert update_bound(block, torch.zeros(1, 7, 32)) is None


def test_the_bound_is_the_product_of_the_parts() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(1,), widths=(4,))).eval()
    stream = model.cut(torch.randn(1, 3, 6, 6))
    found = update_bound(stream.sections[0].blocks[0], stream.run().states[0][0])
    block = model.sections[0][0]
    convs = guaranteed_norm(block.conv1, (6, 6)).value * guaranteed_norm(block.conv2, (6, 6)).value
    assert found.kind == "upper bound"
    assert float(found.value) == pytest.approx(float(convs) / (1 + 1e-5))  # two fresh batch norms


def test_a_block_with_another_branch_has_no_bound_of_the_usual_one() -> None:
    class Scaled(Residual):
        def branch(self, h: Tensor) -> Tensor:
            return 4 * super().branch(h)

    torch.manual_seed(0)
    model, x = ResNet(ResNetConfig((2,), (4,), 1)).eval(), torch.randn(2, 1, 6, 6)
    model.sections[0][0].__class__ = Scaled
    given = model.sections[0][1].branch
    model.sections[0][1].branch = lambda h: 4 * given(h)
    measures = lipschitz(model.cut(x), None)
    assert "update_lipschitz_bound" not in measures
    assert measures["update_lipschitz"].update == "own branch"


def test_bounds_follow_the_chain_that_a_block_names() -> None:
    """Also convolutions that change the map's size on the way, and linear modules; None where a norm is unknown."""
    torch.manual_seed(0)
    down, up = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 2, 3, padding=3)
    h = torch.randn(1, 2, 7, 7)
    chain = Block("0", lambda h: h, lambda h: h, (down, nn.ReLU(), up))
    expected = guaranteed_norm(down, (7, 7)).value * guaranteed_norm(up, (4, 4)).value
    assert float(update_bound(chain, h).value) == pytest.approx(float(expected))
    dense = nn.Linear(4, 4)
    flat = Block("0", lambda h: h, lambda h: h, (dense, dense))
    size = float(torch.linalg.matrix_norm(dense.weight.double(), 2))
    assert float(update_bound(flat, torch.randn(1, 4)).value) == pytest.approx(size**2)
    circular = nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")
    training = nn.BatchNorm2d(3)
    for unknown in (nn.LayerNorm(4), training, nn.BatchNorm2d(3, track_running_stats=False).eval(), circular):
        assert update_bound(Block("0", lambda h: h, lambda h: h, (down, unknown)), h) is None
    dense.register_forward_hook(lambda *_: None)
    assert update_bound(flat, torch.randn(1, 4)) is None


# Settling -------------------------------------------------------------------------------------------------------------


def turn(angle: float) -> Callable[[Tensor], Tensor]:
    A = torch.tensor([[math.cos(angle) - 1, -math.sin(angle)], [math.sin(angle), math.cos(angle) - 1]]).double()
    return lambda h: h @ A.T


TOYS: dict[str, tuple[Callable[[Tensor], Tensor], float, float, str]] = {
    "contraction": (lambda h: -0.5 * h, 0.5, 0.5, "settles"),
    "overshooting contraction": (lambda h: -1.5 * h, 0.5, 0.5, "settles"),
    "expansion": (lambda h: 0.5 * h, 1.5, 1.5, "drifts"),
    "constant": (lambda h: 0 * h + 1, 1, 1, "drifts"),
    "identity": (lambda h: 0 * h, 1, math.nan, "marginal"),
    "rotation": (turn(math.pi / 2), 1, 1, "marginal"),
    "flip": (lambda h: -2 * h, 1, 1, "marginal"),
    "explosion": (lambda h: 100 * h**5, math.nan, math.inf, "drifts"),
}


@pytest.mark.parametrize("name", TOYS)
def test_verdicts_of_toys(name: str) -> None:
    update, radius, growth, verdict = TOYS[name]
    h = torch.tensor([[3.0, 4.0], [1.0, -2.0]]).double()
    measures = settling(toy(h, lambda h: 0 * h, update), None)
    assert {m.points for m in measures.values()} == {(Point(0, 1),)}
    if not math.isnan(radius):
        assert measures["spectral_radius"].values.flatten().tolist() == pytest.approx([radius] * 2)
    assert measures["step_growth"].values.flatten().tolist() == pytest.approx([growth] * 2, nan_ok=True)
    shares = {name: measures[name].values.flatten().tolist() for name in ("settles", "drifts", "marginal")}
    assert shares == {name: [float(name == verdict)] * 2 for name in shares}


def test_a_fixed_point_that_attracts_settles_and_one_that_repels_is_marginal() -> None:
    h = torch.zeros(1, 3)
    assert row(toy(h, lambda h: -0.3 * h), "settles", settling) == [1]
    assert row(toy(h, lambda h: 0.3 * h), "marginal", settling) == [1]


@pytest.mark.parametrize("name", ["loop", "own", "gpt2"])
def test_the_radius_is_an_eigenvalue_within_its_residual(name: str) -> None:
    stream = stream_of(name)
    h = stream.run().states[-1][-1]
    n = h[0].numel()
    measures = settling(stream, None, products=n)
    for example in range(2):
        kept = None if stream.mask is None else stream.mask[example]
        J = oracles.jacobian(stream.sections[-1].blocks[-1].apply, h, example, kept)
        # after as many products as the state has entries nothing is left but rounding
        truth = float(torch.linalg.eigvals(J).abs().max())
        assert float(measures["spectral_radius"].values[example]) == pytest.approx(truth, rel=1e-5)


def test_settling_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="at least 1 further step, given 0"):
        settling(stream_of("loop"), None, steps=0)


# In a profile ---------------------------------------------------------------------------------------------------------


def test_profiles_hold_them_whatever_the_batches(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, images = ResNet(ResNetConfig(blocks=(2, 1), widths=(4, 8))).double().eval(), torch.randn(5, 3, 8, 8).double()
    probes = [partial(lipschitz, products=10), settling]
    whole = profile(model, [(images, None)], probes)
    parts = profile(model, [(images[:2], None), (images[2:], None)], probes)
    for name, measure in whole.measures.items():
        torch.testing.assert_close(parts.measures[name].values, measure.values, rtol=1e-4, atol=1e-6, equal_nan=True)
    whole.save(tmp_path / "profile.safetensors")
    assert load(tmp_path / "profile.safetensors").about == whole.about
    assert "upper bound" in whole.about["update_lipschitz_bound"]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_frozen_and_low_precision_models_are_measured() -> None:
    torch.manual_seed(0)
    model, x = MODELS["torchvision vit"].build()
    model = model.eval()
    expected = lipschitz(cut(model, x), None)["block_lipschitz"].values
    model.requires_grad_(False)  # attention's fast path, which cannot be differentiated, must not be taken
    torch.testing.assert_close(lipschitz(cut(model, x), None)["block_lipschitz"].values, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["own", "torchvision vit", "gpt2", "llama", "bert"])
def test_bfloat16_models_are_measured_in_float32(name: str) -> None:
    """As the same weights in float32 at the same state."""
    torch.manual_seed(0)
    model, x = MODELS[name].build()
    model, low = model.eval().bfloat16(), converted(x, torch.bfloat16)
    stream = cut(model, low)
    h = stream.run().states[0][0]
    measures = lipschitz(stream, None)
    wide = cut(model.float(), converted(x, torch.float32))
    section = Section("only", lambda h: h, wide.sections[0].blocks[:1])
    expected = lipschitz(Stream(h.float(), (section,), lambda h: h, wide.mask), None)
    for quantity in ("update_lipschitz", "block_lipschitz"):
        found = measures[quantity].values[:, :1]
        torch.testing.assert_close(found, expected[quantity].values, rtol=1e-4, atol=0)


def test_steps_of_bfloat16_models_go_on_in_float32() -> None:
    """In bfloat16 a state near its limit does not move any more, and the steps would stop getting shorter."""
    A = torch.tensor([0.5, 0.4]).bfloat16()
    h = torch.tensor([[3.0, 4.0]]).bfloat16()
    measures = settling(toy(h, lambda h: A * (1 - h)), None, steps=20)
    assert measures["settles"].values.tolist() == [[1]]
    assert float(measures["spectral_radius"].values) == pytest.approx(0.6, rel=1e-2)
    assert 0.5 <= float(measures["step_growth"].values) <= 0.6
