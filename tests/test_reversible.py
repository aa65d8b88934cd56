"""Reversible stacks: gradients, statistics and random numbers of an ordinary stack, in the memory of a few states."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from residuum import cut, reversible
from residuum.bytes import Bytes
from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.reversible import DriftError
from residuum.layers.steps import Explicit, Theta
from residuum.solve import Anderson, BiCGStab, Neumann, Picard


class Coupling(nn.Module):
    """A user's block: additive coupling of the channel halves."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, h: Tensor) -> Tensor:
        p, q = h.chunk(2, 1)
        p = p + self.f(q)
        return torch.cat([p, q + self.g(p)], 1)

    def inverse(self, h: Tensor) -> Tensor:
        p, q = h.chunk(2, 1)
        q = q - self.g(p)
        return torch.cat([p - self.f(q), q], 1)


class Scaled(nn.Module):
    """A user's block without submodules, whose inverse does not compute what the gradient needs: `h exp(s) + b`."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.b = nn.Parameter(0.1 * torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.s.exp() * (1 + 0.01 * self.calls) + self.b

    def inverse(self, h: Tensor) -> Tensor:
        return (h - self.b) * (-self.s).exp() / (1 + 0.01 * (self.calls + 1))


def dense(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, width))


def normed(*, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 2))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest error of one of the gradients, relative to it, or to a thousandth of all where it nearly vanishes."""
    least = 1e-3 * float(torch.stack([v.norm() for v in b]).norm())
    return max(float((u - v).norm() / v.norm().clamp_min(least)) for u, v in zip(a, b, strict=True))


def loose_theta(form: str) -> nn.Module:
    return Theta(0.5, dt=0.1, form=form, solver=Picard(1e-5), adjoint=Neumann(1e-5))(dense(4))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


TIGHT = {"solver": Anderson(1e-13), "adjoint": BiCGStab(1e-13)}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "a user's coupling": lambda: Coupling(dense(), dense()),
    "a user's block": Scaled,
    "Additive": lambda: Additive()(dense(), dense()),
    "Verlet": lambda: Verlet(0.5)(dense(), dense()),
    "Stoermer-Verlet": lambda: Verlet(0.5, form="stoermer")(dense(), dense()),
    "Leapfrog": lambda: Leapfrog(0.3)(dense()),
    "Midpoint": lambda: Midpoint(0.3)(dense()),
    "Momentum": lambda: Momentum(0.9)(dense()),
    "Theta two-point": lambda: Theta(0.5, dt=0.3, **TIGHT)(dense(4)),
    "Theta midpoint": lambda: Theta(0.5, dt=0.3, form="midpoint", **TIGHT)(dense(4)),
    "Theta 1": lambda: Theta(1.0, dt=0.3, **TIGHT)(dense(4)),
    "Theta linearised": lambda: Theta(0.5, dt=0.3, start="linearised", **TIGHT)(dense(4)),
    "Theta truncated": lambda: Theta(0.5, dt=0.3, param_grad="truncated", **TIGHT)(dense(4)),
    "Explicit": lambda: Invertible(Explicit(0.3)(dense(4))),
}


class Invertible(nn.Module):
    """An explicit block with an inverse by iteration, which calls the branch many times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        return self.block(h)

    def inverse(self, h: Tensor) -> Tensor:
        x = h
        for _ in range(80):
            x = h - (self.block(x) - x)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind: str) -> None:
    blocks = [KINDS[kind]() for _ in range(5)]
    plain, stack = nn.Sequential(*blocks).double(), reversible(copy.deepcopy(blocks)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(2):  # the second backward knows from the first what inverses give
        assert distance(gradients(stack, x), gradients(plain, x)) < 1e-9
        assert torch.equal(stack(x), plain(x))


class Each(nn.Module):
    """A branch for states that are one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.gain * h)


class Steady(nn.Module):
    """A branch whose slope does not depend on the state."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(4), requires_grad=learned)

    def forward(self, h: Tensor) -> Tensor:
        return self.slope.expand_as(h)


@pytest.mark.parametrize("form", ["two_point", "midpoint"])
@pytest.mark.parametrize(
    ("branch", "shape"),
    [(Each, (5,)), (partial(Steady, True), (3, 4)), (partial(Steady, False), (3, 4))],
    ids=["one number", "any state", "constant"],
)
def test_theta_steps_of_odd_branches_have_the_gradients_of_autograd(
    branch: Callable, shape: tuple[int, ...], form: str
) -> None:
    blocks = [Theta(0.5, dt=0.3, form=form, **TIGHT)(branch()).double() for _ in range(2)]
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for model in (reversible(blocks), nn.Sequential(*blocks)):
        given = x.clone().requires_grad_()
        learned = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(model(given).square().sum(), [given, *learned]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("depth", [1, 8, 64, 256])
def test_gradients_of_deep_couplings_in_float32(depth: int) -> None:
    blocks = [Coupling(dense(), dense()) for _ in range(depth)]
    for p in nn.ModuleList(blocks).parameters():
        p.data *= 0.3  # so that gradients neither vanish nor explode over 256 blocks
    x = torch.randn(3, 4)
    assert distance(gradients(reversible(blocks), x), gradients(nn.Sequential(*blocks), x)) < 1e-5


def test_statistics_and_random_numbers_are_bitwise_those_of_ordinary_training() -> None:
    plain = nn.Sequential(*[Coupling(normed(dropout=0.3), normed(dropout=0.3)) for _ in range(25)]).double()
    stack = reversible(copy.deepcopy(list(plain)))
    optimiser = torch.optim.SGD(stack.parameters(), 0.01, momentum=0.9)
    for step in range(3):
        x, states = torch.randn(8, 4, dtype=torch.float64), []
        for model in (plain, stack):
            torch.manual_seed(step)
            model.zero_grad()
            model(x).square().mean().backward()
            states.append((torch.get_rng_state(), *model.buffers()))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert int(stack.blocks[0].f[1].num_batches_tracked) == step + 1
        assert distance([p.grad for p in stack.parameters()], [p.grad for p in plain.parameters()]) < 1e-9
        optimiser.step()
        with torch.no_grad():  # the same weights for both: gradients differ by rounding
            for a, b in zip(plain.parameters(), stack.parameters(), strict=True):
                a.copy_(b)


def test_one_branch_called_twice_draws_again_what_it_drew() -> None:
    blocks = [Verlet(0.5, form="stoermer")(normed(dropout=0.4), normed(dropout=0.4)) for _ in range(4)]
    plain, stack = nn.Sequential(*blocks).double(), reversible(copy.deepcopy(blocks)).double()
    found = []
    for model in (plain, stack):
        torch.manual_seed(5)
        found.append(gradients(model, torch.ones(4, 4, dtype=torch.float64).cumsum(0)))
    assert distance(found[1], found[0]) < 1e-9


def test_buffers_that_a_block_computes_with_are_those_of_its_forward() -> None:
    stack = reversible([Scaled() for _ in range(3)]).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    first = stack(x)  # a second forward changes the buffers before the first one's backward
    stack(x)
    plain = nn.Sequential(*copy.deepcopy(list(stack.blocks)))
    for block in plain:
        block.calls.zero_()
    expected = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    assert distance(list(torch.autograd.grad(first.sum(), list(stack.parameters()))), list(expected)) < 1e-12
    assert [float(block.calls) for block in stack.blocks] == [2, 2, 2]


def test_captured_values_and_shared_weights_get_gradients_without_a_list() -> None:
    outside = torch.randn(2, dtype=torch.float64, requires_grad=True)
    shared = dense().double()

    class Shifted(Coupling):
        def forward(self, h: Tensor) -> Tensor:
            return super().forward(h) * outside.square().repeat(2)

        def inverse(self, h: Tensor) -> Tensor:
            return super().inverse(h / outside.square().repeat(2))

    blocks = [Shifted(shared, dense().double()) for _ in range(3)]
    x = torch.randn(4, 4, dtype=torch.float64)
    found = [
        torch.autograd.grad(m(x).sum(), [outside, *shared.parameters()])
        for m in (reversible(blocks), nn.Sequential(*blocks))
    ]
    assert distance(list(found[0]), list(found[1])) < 1e-9


def test_nested_stacks_frozen_parts_and_two_backwards() -> None:
    blocks = [Coupling(normed(dropout=0.2), dense()) for _ in range(4)]
    inside = reversible([Coupling(reversible([Coupling(dense(1), dense(1))]), dense()), *blocks[2:]])
    stack = reversible([*blocks[:2], inside]).double()
    assert len(stack.blocks) == 5
    plain = nn.Sequential(*copy.deepcopy(list(stack.blocks)))
    plain[2].f = nn.Sequential(*plain[2].f.blocks)
    for model in (stack, plain):
        model[0].requires_grad_(False) if model is plain else model.blocks[0].requires_grad_(False)
    x, found = torch.randn(5, 4, dtype=torch.float64), []
    for model in (stack, plain):
        torch.manual_seed(1)
        loss = model(x).square().sum()
        for _ in range(2):  # gradients add up over two backwards of one forward
            loss.backward(retain_graph=True)
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert distance(*found) < 1e-9


def test_autocast_is_as_in_the_forward() -> None:
    blocks = [Coupling(dense(), dense()) for _ in range(4)]
    x, found = torch.randn(8, 4), []
    for model in (reversible(blocks), nn.Sequential(*blocks)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    # A rebuilt state that is off by a float32 rounding may round to the neighbour in bfloat16, 2^-8 away.
    assert distance(*map(list, found)) < 2**-7


def test_states_that_cannot_resolve_the_tolerance_are_refused_before_the_backward() -> None:
    """Under autocast the states of couplings are as the first one is, those of solves are in float32."""
    x = torch.randn(8, 4, dtype=torch.bfloat16)

    def loss(block: nn.Module, tolerance: float = 1e-4) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return reversible([block], tolerance=tolerance)(x).float().square().mean()

    for make in (Coupling, Verlet(0.1)):
        with pytest.raises(ValueError, match=r"after block 0 is in torch.bfloat16, too coarse .* 1.0e-04; use float32"):
            loss(make(dense(), dense()))
    loss(Coupling(dense(), dense()), tolerance=0.1).backward()
    loss(Theta(0.5, 0.1)(nn.Linear(4, 4))).backward()


@pytest.mark.parametrize("kind", ["a user's coupling", "Theta two-point", "Theta midpoint"])
def test_memory_hardly_grows_with_depth(kind: str) -> None:
    make = KINDS[kind] if kind == "a user's coupling" else partial(loose_theta, kind.split()[1].replace("-", "_"))
    peaks = []
    for depth in (8, 64):
        stack = reversible([make() for _ in range(depth)], tolerance=1e-3).double()
        x = torch.randn(50, 4, dtype=torch.float64)
        stack(x).sum().backward()  # the first backward measures amplifications
        for p in stack.parameters():
            p.grad.zero_()
        with Bytes() as bytes_:
            stack(x).sum().backward()
        peaks.append(bytes_.peak / (x.numel() * x.element_size()))
    assert (peaks[1] - peaks[0]) / 56 <= 0.1


def test_second_derivatives_are_refused() -> None:
    stack, x = reversible([Coupling(dense(), dense())]), torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(stack.eval()(x).square().sum(), x, create_graph=True)[0].sum().backward()
    assert x.grad is not None


def test_changed_parameters_inputs_and_outputs_are_refused() -> None:
    stack = reversible([Coupling(dense(), dense()) for _ in range(2)])
    x = torch.randn(3, 4)
    loss = stack(x).sum()
    with torch.no_grad():
        stack.blocks[0].f[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since"):
        loss.backward()
    loss = stack(x).mul_(2).sum()
    with pytest.raises(RuntimeError, match="changed in place after"):
        loss.backward()
    loss = stack(x).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="changed in place after"):
        loss.backward()


def test_what_cannot_be_a_stack_is_refused() -> None:
    with pytest.raises(TypeError, match="block 1, Linear, has no inverse"):
        reversible([Coupling(dense(), dense()), nn.Linear(4, 4)])
    with pytest.raises(ValueError, match="no blocks"):
        reversible([])
    with pytest.raises(ValueError, match="tolerance is 0"):
        reversible([Scaled()], tolerance=0.0)
    with pytest.raises(ValueError, match="spacing is 5"):
        reversible([Scaled()], spacing=5)


def test_an_inverse_that_is_none_is_found_out() -> None:
    class Wrong(Coupling):
        def inverse(self, h: Tensor) -> Tensor:
            return super().inverse(h) * 1.01

    with pytest.raises(DriftError, match="forward and inverse do not agree"):
        gradients(reversible([Wrong(dense(), dense()) for _ in range(2)]), torch.randn(3, 4))


def test_momentum_that_forgets_is_refused_and_one_that_hardly_does_is_not() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(DriftError, match="predicted from the measured amplification") as refused:
        gradients(reversible([Momentum(0.5)(dense()) for _ in range(64)]), x)
    assert refused.value.drift > refused.value.tolerance == 1e-4
    blocks = [Momentum(1 - 1 / (50 * 64))(dense()) for _ in range(64)]
    assert distance(gradients(reversible(blocks), x), gradients(nn.Sequential(*blocks), x)) < 1e-4


def test_the_trapezoidal_rule_near_its_singularity_is_refused() -> None:
    """At h lambda = -2 it maps every state to 0."""
    branch = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        branch.weight.copy_(-1.9 * torch.eye(4))
    blocks = [Theta(0.5, solver=Anderson(1e-6))(branch) for _ in range(8)]
    with pytest.raises((DriftError, RuntimeError), match=r"rebuilt|converge"):
        gradients(reversible(blocks), torch.randn(3, 4))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3.0), st.integers(1, 45))
def test_drift_is_bounded_or_refused(seed: int, gain: float, depth: int) -> None:
    """Whatever the blocks amplify: gradients are right to a small multiple of the tolerance, or there are none."""
    torch.manual_seed(seed)
    blocks = [Coupling(dense(), dense()) for _ in range(depth)]
    for p in nn.ModuleList(blocks).parameters():
        p.data *= gain
    x, exact = torch.randn(4, 4), nn.Sequential(*copy.deepcopy(blocks)).double()
    try:
        found = gradients(reversible(blocks, tolerance=1e-4), x)
    except DriftError:
        return
    true = gradients(exact, x.double())
    own = distance(gradients(nn.Sequential(*blocks), x), true)  # what float32 itself loses
    assert distance(found, true) < 30 * 1e-4 + 10 * own


def test_cut_sees_the_blocks_and_one_training_step_lowers_the_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 4), reversible([Coupling(dense(), dense()) for _ in range(4)]), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    stream = cut(model.eval(), x)
    assert [block.name for block in stream.sections[0].blocks] == [f"1.blocks.{i}" for i in range(4)]
    assert torch.allclose(stream.run().output, model(x))
    optimiser, before = torch.optim.SGD(model.train().parameters(), 0.01), model(x).square().sum().item()
    model(x).square().sum().backward()
    optimiser.step()
    assert model(x).square().sum().item() < before


def test_the_byte_counter_counts_what_is_known() -> None:
    x = torch.randn(1000, requires_grad=True)
    with Bytes() as counted:
        y = x
        for _ in range(10):
            y = y.exp()  # saves its result
        assert counted.live == 10 * 4000
        y.sum().backward()
        assert counted.live == 2 * 4000  # y and the gradient of x
    assert 11 * 4000 <= counted.peak <= 12 * 4000 + 16


def test_the_byte_counter_sees_resized_storages_and_views_once() -> None:
    with Bytes() as counted:
        a = torch.zeros(1000)
        _ = a[10:]
        assert counted.live == 4000
        a.untyped_storage().resize_(0)
        assert counted.live == 0
        a.untyped_storage().resize_(4000)
        a.add_(1)
        assert counted.live == 4000


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_the_byte_counter_counts_values_and_indices_of_sparse_tensors(layout: torch.layout) -> None:
    dense = torch.eye(100)
    with Bytes() as counted:
        sparse = dense.to_sparse(layout=layout)
        more = 0 if layout == torch.sparse_coo else 101  # beside rows and columns, which stay one storage
        assert counted.live == 100 * 4 + (2 * 100 + more) * 8
        assert torch.equal(sparse @ dense, dense)
        del sparse
        assert counted.live == 0
