"""Branches with a controlled spectrum: the disc holds for any weights, and what follows from it for steps."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles_spectra as oracles
from residuum import Controlled, Spectrum, Theta, export
from residuum.layers.controlled import SLOPES
from residuum.layers.steps import Explicit
from residuum.solve import GMRES, NewtonKrylov
from residuum.stability import amplification, spectrum_of

ROUNDING = 1e-9  # of Jacobians in float64, and of solves to 1e-12


def branch(spectrum: Spectrum, activation: nn.Module, gain: float) -> Controlled:
    """Random weights, far above their limits for a large gain, random disc; exported, so that its bounds are strict."""
    made = Controlled([nn.Linear(3, 5), activation, nn.Linear(5, 3)], spectrum).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, gain)
    return export(made.eval())


def ends_of(f: Controlled) -> tuple[float, float]:
    with torch.no_grad():
        a, b = map(float, f.disc())
    return a, b


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ends=st.lists(st.floats(-20, 20), min_size=3, max_size=3, unique=True),
    gain=st.floats(0.1, 10),
    kind=st.sampled_from(list(SLOPES)),
    learned=st.booleans(),
)
def test_all_eigenvalues_lie_in_the_disc(seed: int, ends: list[float], gain: float, kind: type, learned: bool) -> None:
    """Also the norm of J - centre is within the radius, and v^T J v within [a, b]; the disc lies in the largest."""
    torch.manual_seed(seed)
    spectrum = Spectrum(*sorted(ends), learned=learned)
    f = branch(spectrum, kind(), gain)
    a, b = ends_of(f)
    assert spectrum.low <= a <= spectrum.middle <= b <= spectrum.high
    h = gain * torch.randn(1, 3, dtype=torch.float64)
    J = oracles.jacobian(f, h, 0)
    slack = ROUNDING * (1 + abs(a) + abs(b))
    assert (torch.linalg.eigvals(J) - (a + b) / 2).abs().max() <= (b - a) / 2 + slack
    assert torch.linalg.matrix_norm(J - (a + b) / 2 * torch.eye(3, dtype=J.dtype), 2) <= (b - a) / 2 + slack
    parts = torch.linalg.eigvalsh((J + J.T) / 2)
    assert a - slack <= parts[0] <= parts[-1] <= b + slack


def test_the_disc_is_reached() -> None:
    """A bound that could be smaller would be no control: g(h) = -h and h give both ends."""
    for sign, end in ((1.0, 3.0), (-1.0, -1.0)):
        linear = nn.Linear(2, 2)
        with torch.no_grad():
            linear.weight.copy_(5 * sign * torch.eye(2))
        f = Controlled([linear], Spectrum(-1.0, 0.0, 3.0, learned=False)).eval()
        J = oracles.jacobian(f, torch.randn(1, 2), 0)
        assert torch.allclose(J, end * torch.eye(2), atol=0.02)  # limits hold to 0.5 % in eval mode


@pytest.mark.parametrize(("activation", "steepest"), [(nn.GELU(), 2**0.5), (nn.SiLU(), 2.3994), (nn.Sigmoid(), 0.0)])
def test_steep_and_flat_activations_reach_the_disc_and_no_more(activation: nn.Module, steepest: float) -> None:
    """Where their slopes are largest: those of GELU and SiLU exceed 1."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.fill_(steepest)
    f = export(Controlled([linear, activation], Spectrum(0.0, 1.0, 3.0, learned=False)).eval()).double()
    J = oracles.jacobian(f, torch.zeros(1, 2, dtype=torch.float64), 0)
    assert (2.99 * torch.eye(2) <= J).all()
    assert J.max() <= 3.0 + ROUNDING


def test_convolutions_are_controlled_on_maps_of_their_size() -> None:
    f = Controlled(
        [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)],
        Spectrum(-3.0, -2.0, -0.5),
        size=(5, 4),
    ).double()
    with torch.no_grad():
        for p in f.parameters():
            p.normal_(0, 3)
    h = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    for network, slack in ((f.eval(), 0.011), (export(f), ROUNDING)):
        a, b = ends_of(network)
        J = oracles.jacobian(network, h, 0)
        assert torch.linalg.matrix_norm(J - (a + b) / 2 * torch.eye(len(J)), 2) <= (b - a) / 2 * (1 + slack)


def test_slopes_are_the_largest() -> None:
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64, requires_grad=True)
    for kind, slope in SLOPES.items():
        for activation in (kind(), nn.GELU(approximate="tanh")) if kind is nn.GELU else (kind(),):
            (found,) = torch.autograd.grad(activation(x).sum(), x)
            assert 0.98 * slope <= found.abs().max() <= slope, kind


def test_it_trains_and_starts_half_way() -> None:
    f = Controlled([nn.Linear(3, 3), nn.Tanh()], Spectrum(-4.0, -2.0, 2.0))
    assert ends_of(f) == (-3.0, 0.0)
    optimiser = torch.optim.SGD(f.parameters(), 0.3)
    h = torch.randn(16, 3)
    losses = []
    for _ in range(15):
        loss = (f(h) - h).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in (f.ends, f.factor))
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    assert len(list(Controlled([nn.Linear(3, 3)], Spectrum(learned=False)).parameters())) == 2  # weight and bias


STEPS = [Explicit(0.5)] + [
    Theta(theta, 0.5, form=form, solver=NewtonKrylov(1e-12), adjoint=GMRES(1e-12))
    for theta, form in ((0.5, "two_point"), (0.5, "midpoint"), (1.0, "two_point"), (0.25, "midpoint"))
]


@pytest.mark.parametrize("step", STEPS, ids=str)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), gain=st.floats(0.3, 5))
def test_a_step_moves_states_together_or_apart_within_its_limits(step: Theta, seed: int, gain: float) -> None:
    """Low >= 0: the factor lies in [low, high] for any two states, however far apart."""
    torch.manual_seed(seed)
    spectrum = spectrum_of(step, 0.2, 0.9, 1.3)
    block = step(branch(spectrum, nn.Tanh(), gain))
    x, y = gain * torch.randn(2, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        factor = (block(x) - block(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert (factor >= 0.2 - 1e-8).all()
    assert (factor <= 1.3 + 1e-8).all()


@settings(max_examples=30, deadline=None)
@given(
    theta=st.floats(0, 1),
    dt=st.floats(0.05, 4),
    limits=st.lists(st.integers(-50, 300).map(lambda n: n / 100), min_size=3, max_size=3, unique=True),
    back=st.booleans(),
)
def test_the_amplification_of_the_disc_is_the_disc_of_the_limits(
    theta: float, dt: float, limits: list[float], back: bool
) -> None:
    """Points of the border are mapped onto the border, unless it was clipped; then into the disc."""
    low, middle, high = sorted(limits)
    if theta and low <= -(1 - theta) / theta + 1e-3:
        return
    step = Theta(theta, -dt if back else dt)
    spectrum = spectrum_of(step, low, middle, high)
    assert -10 / dt * (1 + 1e-12) <= spectrum.low <= spectrum.middle <= spectrum.high <= 10 / dt * (1 + 1e-12)
    angles = np.exp(1j * np.linspace(0, 2 * np.pi, 40))
    border = (spectrum.low + spectrum.high) / 2 + (spectrum.high - spectrum.low) / 2 * angles
    distance = abs(amplification(step.dt * border, theta=theta) - (low + high) / 2)
    assert (distance <= (high - low) / 2 * (1 + 1e-6) + 1e-9).all()
    if max(abs(spectrum.low), abs(spectrum.high)) < 9.9 / dt:
        assert np.allclose(distance, (high - low) / 2, rtol=1e-6, atol=1e-9)


def test_the_published_limits() -> None:
    """Source: spec of the extended version: stability limits [0.2, 1, 1.2] on MNIST."""
    found = spectrum_of(Theta(1.0), 0.2, 1.0, 1.2)
    assert (found.low, found.middle, found.high) == pytest.approx((-4.0, 0.0, 1 / 6))
    found = spectrum_of(Explicit(), 0.2, 1.0, 1.2)
    assert (found.low, found.middle, found.high) == pytest.approx((-0.8, 0.0, 0.2))
    assert spectrum_of(Theta(1.0, 0.5), 1e-9, 0.5, 1.0, learned=False) == Spectrum(-20.0, -2.0, 0.0, learned=False)


def weighted(*layers: nn.Module, size: tuple = ()) -> Tensor:
    return Controlled(list(layers), size=size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spectrum(0.0, -1.0, 1.0), "low is 0.0, middle -1.0, high 1.0; they must be finite, in this order"),
        (lambda: Spectrum(1.0, 1.0, 1.0), "low below high"),
        (lambda: Spectrum(high=float("inf")), "finite"),
        (lambda: weighted(nn.Linear(3, 3), nn.LayerNorm(3)), "layer 1, LayerNorm, has no known bound; use nn.Conv2d"),
        (lambda: weighted(nn.ReLU()), "no layer has weights"),
        (
            lambda: weighted(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(3, 3)),
            r"layer 1, ReLU\(inplace=True\), would overwrite the state, .*; use inplace=False before",
        ),
        (lambda: weighted(nn.Linear(3, 4), nn.ReLU()), "a branch keeps the shape of the state"),
        (lambda: weighted(nn.Conv2d(2, 2, 3), size=(6, 6)), "a branch keeps the shape of the state"),
        (lambda: weighted(nn.Conv2d(2, 2, 3, padding=1)), "rows and columns of the map"),
        (lambda: Controlled([copy.deepcopy(weighted(nn.Linear(2, 2)).layers[0])]), "limited already"),
        (lambda: weighted(*[nn.Linear(3, 3)] * 2), "a layer stands twice among these layers; give a copy"),
        (lambda: spectrum_of(Theta(1.0), 0.0, 1.0, 1.2), "above -0, which no finite spectrum reaches"),
        (lambda: spectrum_of(Theta(0.5), -1.0, 0.0, 1.0), "for theta = 0.5 above -1"),
        (lambda: spectrum_of(Theta(), 0.5, 0.2, 1.0), "must be in this order"),
        (lambda: spectrum_of(replace(Theta(), theta=0.0), 20.0, 25.0, 30.0), "beyond the reach of 10"),
    ],
)
def test_what_is_wrong_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_that_cannot_be_controlled_are_left_as_they_are() -> None:
    limited = weighted(nn.Linear(3, 3)).layers[0].train()
    before = copy.deepcopy(limited.state_dict())
    conv, wide, first = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3), nn.Linear(3, 3)
    for layers, size in (([first, limited], ()), ([first, nn.Linear(3, 4)], ()), ([conv, wide], (6, 6))):
        with pytest.raises(ValueError, match=r"limited already|keeps the shape of the state"):
            Controlled(layers, size=size)
    assert type(first) is nn.Linear
    assert type(conv) is type(wide) is nn.Conv2d
    assert all(torch.equal(value, limited.state_dict()[name]) for name, value in before.items())
    Controlled([first])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_slope_has_the_precision_of_the_state(dtype: torch.dtype) -> None:
    f = Controlled([nn.Linear(3, 3, dtype=dtype), nn.Tanh()])
    assert f(torch.randn(2, 3, dtype=dtype)).dtype == dtype
    assert {p.dtype for p in f.parameters()} == {dtype}
