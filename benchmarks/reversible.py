"""What reversible stacks cost beside ordinary ones and other libraries: memory, time, gradients: `make bench`.

Couplings of convolution, batch norm and ReLU on halves of 16 channels of 16x16, batches of 8, float32; their time also
at 32 images of 28x28, where Python's share is smaller. Memory: the most bytes that live at once in a training step
(`residuum.bytes`), in states per block between depth 8 and 64. Gradient error: of all weights together, against the
same weights in float64, without batch norm, which would hide it. Peers that are not installed are skipped by their
names. One thread, processor time (timing.py).
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.timing import Side, Work, heading, ratio, row
from residuum.bytes import Bytes
from residuum.layers.pairs import Additive, Momentum
from residuum.layers.reversible import DriftError, reversible
from residuum.layers.steps import Theta
from residuum.solve import Anderson

Stack = Callable[[list[nn.Module]], nn.Module]


def branch(*, norm: bool = True, channels: int = 8) -> nn.Module:
    """Convolution, batch norm, ReLU; or two convolutions and tanh, whose gradient does not jump with a rounding."""
    first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    if norm:
        return nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU())
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))


def trapezoid(depth: int) -> list[nn.Module]:
    """Theta steps over a contraction, as performance goals were measured: Lipschitz constant about 0.7."""
    torch.manual_seed(0)
    blocks = []
    for _ in range(depth):
        conv = nn.Conv2d(16, 16, 3, padding=1)
        with torch.no_grad():
            conv.weight.mul_(0.7)
        blocks.append(Theta(0.5, solver=Anderson(1e-5))(nn.Sequential(conv, nn.Tanh())))
    return blocks


def couplings(depth: int, *, norm: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Additive()(branch(norm=norm), branch(norm=norm)) for _ in range(depth)]


def momenta(gamma: float | None, depth: int) -> list[nn.Module]:
    """Momentum blocks; without a gamma that of their authors."""
    torch.manual_seed(0)
    return [Momentum(gamma or 1 - 1 / (50 * depth))(branch(norm=False)) for _ in range(depth)]


def memcnn(blocks: list[nn.Module]) -> nn.Module:
    import memcnn

    return nn.Sequential(
        *[
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(*(copy.deepcopy(b) for b in block.branches)))
            for block in blocks
        ]
    )


def revlib(blocks: list[nn.Module]) -> nn.Module:
    import revlib

    return revlib.ReversibleSequential(*[copy.deepcopy(b) for block in blocks for b in block.branches])


class TheirMomentum(nn.Module):
    """momentumnet's network of the same branches, whose speed begins at 0; half as many channels."""

    def __init__(self, blocks: list[nn.Module], *, store: bool) -> None:
        super().__init__()
        from momentumnet import MomentumNet

        branches = [copy.deepcopy(block.branches[0]) for block in blocks]
        self.net = MomentumNet(branches, gamma=blocks[0].step.gamma, use_backprop=store)

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h[:, :8])


def stores(blocks: list[nn.Module]) -> nn.Module:
    return TheirMomentum(blocks, store=True)


def forgets(blocks: list[nn.Module]) -> nn.Module:
    return TheirMomentum(blocks, store=False)


PEERS: dict[str, Stack] = {"memcnn": memcnn, "revlib": revlib}


def plain(blocks: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*blocks)


def loosely(blocks: list[nn.Module]) -> nn.Module:
    """For solves to 1e-5, whose errors add up between anchors."""
    return reversible(blocks, tolerance=1e-3)


def images(count: int = 8, side: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 16, side, side)


def step(make: Stack, blocks: Callable[[], list[nn.Module]], *, count: int = 8, side: int = 16) -> Work:
    torch.set_grad_enabled(True)
    warnings.simplefilter("ignore")
    model, x = make(blocks()).train(), images(count, side).requires_grad_()

    def work() -> None:
        model(x).square().mean().backward()

    work()  # the first backward of ours measures amplifications
    return work


def peak(make: Stack, blocks: list[nn.Module]) -> float:
    """In states, in the second step; gradients are there before."""
    model, x = make(blocks).train(), images().requires_grad_()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x.grad = torch.zeros_like(x)
    for _ in range(2):
        with Bytes() as counted:
            model(x).square().mean().backward()
    return counted.peak / (x.numel() * x.element_size())


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    model.train()(x.requires_grad_()).square().mean().backward()
    # In an order that does not depend on where a library keeps them.
    ordered = sorted(model.parameters(), key=lambda p: float(p.detach().double().sum()))
    return torch.cat([p.grad.double().flatten() for p in ordered])


def gradient_error(make: Stack, blocks: list[nn.Module], true: Stack = plain) -> str:
    exact = gradients(true(copy.deepcopy(blocks)).double(), images().double())
    try:
        found = gradients(make(blocks), images())
    except DriftError as error:
        return f"refused: {error.drift:.0e}"
    return f"{float((found - exact).norm() / exact.norm()):.0e}"


def updates(make: Stack) -> int:
    """How often batch norm counts one training step."""
    model = make(couplings(4)).train()
    model(images().requires_grad_()).square().mean().backward()
    return max(int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    peers = {name: make for name, make in PEERS.items() if find_spec(name)}
    missing = [name for name in (*PEERS, "momentumnet") if not find_spec(name)]
    sides: dict[str, Stack] = {"plain": plain, "ours": reversible, **peers}
    print("| couplings | states at depth 8, 64 | states per block | batch-norm updates | gradient error 8, 64, 256 |")
    print("| --- | --- | --- | --- | --- |")
    for name, make in sides.items():
        few, many = peak(make, couplings(8)), peak(make, couplings(64))
        errors = ", ".join(gradient_error(make, couplings(depth, norm=False)) for depth in (8, 64, 256))
        print(f"| {name} | {few:.1f}, {many:.1f} | {(many - few) / 56:.2f} | {updates(make)} | {errors} |", flush=True)
    few, many = peak(loosely, trapezoid(8)), peak(loosely, trapezoid(64))
    errors = ", ".join(gradient_error(loosely, trapezoid(depth)) for depth in (8, 64))
    print(
        f"| ours, trapezoidal steps | {few:.1f}, {many:.1f} | {(many - few) / 56:.2f} [0.1] | | {errors} |", flush=True
    )
    for gamma in (None, 0.9, 0.5):
        errors = ", ".join(gradient_error(reversible, momenta(gamma, depth)) for depth in (8, 64, 256))
        print(f"| ours, momentum, gamma {gamma or '1 - 1 / (50 depth)'} | | | | {errors} |", flush=True)
        if find_spec("momentumnet"):
            errors = ", ".join(gradient_error(forgets, momenta(gamma, depth), stores) for depth in (8, 64, 256))
            print(f"| momentumnet, the same | | | | {errors} |", flush=True)
    print(heading(pairs))
    couple = partial(couplings, 64)
    for count, side, limit in ((32, 28, 1.5), (8, 16, None)):
        timed = partial(step, count=count, side=side)
        for name, make in sides.items():
            if name != "plain":
                found, base = ratio(
                    Side(partial(timed, make, couple)), Side(partial(timed, plain, couple)), pairs=pairs
                )
                what = f"couplings at depth 64, {count} images of {side}x{side}, {name} / plain"
                print(row(what, found, base, limit if name == "ours" else None), flush=True)
    momentum = partial(momenta, None, 64)
    for name, make, base_of in (("ours / plain", reversible, plain), ("momentumnet / storing", forgets, stores)):
        if base_of is plain or find_spec("momentumnet"):
            found, base = ratio(
                Side(partial(step, make, momentum)), Side(partial(step, base_of, momentum)), pairs=pairs
            )
            print(row(f"momentum at depth 64, {name}", found, base, None), flush=True)
    theta = partial(trapezoid, 16)
    found, base = ratio(Side(partial(step, loosely, theta)), Side(partial(step, plain, theta)), pairs=pairs)
    print(row("trapezoidal steps at depth 16, reversible / storing", found, base, 1.5))
    if missing:
        print(f"not installed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
