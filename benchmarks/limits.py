"""What a Lipschitz limit costs, and which norm it limits, beside torch's own `spectral_norm`: `make bench`.

One 3x3 convolution on channels-last maps, batches of 128, one thread (see timing.py): a step is forward and backward.
Twice: forming the limited weight and its gradient again and again, when all of it is in the caches, and what a step of
the limited layer takes more than one of the plain layer, when none is. "By hand" is the least that we could write: the
same products in one autograd function, without module, parametrization, checks or saved state.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.timing import Side, Work, heading, ratios
from residuum.layers.lipschitz import limit_
from residuum.spectra import operator_norm

SIZES = ((16, 28), (32, 14), (64, 7))
BATCH = 128
KINDS = ("ours", "by hand", "torch")
SETTINGS = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # of the convolution, for its derivatives


class Least(torch.autograd.Function):
    """Half a step of power iteration and `W / max(1, sigma / 0.5)` for a 3x3 convolution with padding 1."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, state: dict[str, Any]) -> Tensor:
        u, v = state["u"], state["v"]
        if state["renewed"] == "v":
            found = torch.ops.aten.convolution_backward(u, v, weight, *SETTINGS, (True, False, False))[0]
        else:
            found = torch.conv2d(v, weight, None, 1, 1)
        sigma = torch.linalg.vector_norm(found)
        state[state["renewed"]] = found.div_(sigma)
        state["renewed"] = "u" if state["renewed"] == "v" else "v"
        ctx.u, ctx.v, ctx.weight, ctx.scale = state["u"], state["v"], weight, max(float(sigma) / 0.5, 1)
        return weight / ctx.scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        u = ctx.u * ((gradient * ctx.weight).sum() / (-0.5 * ctx.scale**2))
        of_sigma = torch.ops.aten.convolution_backward(u, ctx.v, ctx.weight, *SETTINGS, (False, True, False))[1]
        return of_sigma.add_(gradient, alpha=1 / ctx.scale), None


class ByHand(nn.Module):
    """A limited convolution without everything that makes it safe and general."""

    def __init__(self, plain: nn.Conv2d, size: int) -> None:
        super().__init__()
        self.original = plain.weight
        u = torch.randn(1, plain.out_channels, size, size).contiguous(memory_format=torch.channels_last)
        self.state = {"u": u / u.norm(), "v": u / u.norm(), "renewed": "v"}

    @property
    def weight(self) -> Tensor:
        """As limited."""
        return Least.apply(self.original, self.state)

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, None, 1, 1)


def conv(width: int, size: int, kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Conv2d(width, width, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    if kind == "by hand":
        return ByHand(module, size)
    if kind == "ours":
        limit_(module, 0.5, (size, size))
    elif kind == "torch":
        parametrizations.spectral_norm(module)
    return module.train()


def weight(width: int, size: int, kind: str) -> Work:
    """Forming the weight and its gradient, many times."""
    torch.set_grad_enabled(True)
    module = conv(width, size, kind)
    gradient = torch.randn(width, width, 3, 3).contiguous(memory_format=torch.channels_last)  # as convolutions give it

    def work() -> None:
        for _ in range(20):
            module.weight.backward(gradient)

    return work


def step(width: int, size: int, kind: str = "plain") -> Work:
    """A step of the layer."""
    torch.set_grad_enabled(True)
    module = conv(width, size, kind)
    x = torch.randn(BATCH, width, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    return lambda: module(x).backward(gradient)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    print(heading(pairs))
    print("cost / step of the plain layer: ours, by hand, torch's")
    print("layer, size          in the caches [0.03]  in a step           true norm where 0.5, 1 is meant")
    for width, size in SIZES:
        plain = Side(partial(step, width, size))
        again = [Side(partial(weight, width, size, kind)) for kind in KINDS]
        steps = [Side(partial(step, width, size, kind)) for kind in KINDS]
        found, _ = ratios([*again, *steps], plain, pairs=pairs)
        costs = [*(cost / 20 for cost in found[:3]), *(cost - 1 for cost in found[3:])]
        norms = []
        for kind in ("ours", "torch"):
            module = conv(width, size, kind)
            for _ in range(100):
                _ = module.weight
            stock = conv(width, size, "plain")
            with torch.no_grad():
                stock.weight.copy_(module.eval().weight)
            norms.append(float(operator_norm(stock, (size, size)).value))
        first, then = (", ".join(f"{cost:.3f}" for cost in part) for part in (costs[:3], costs[3:]))
        print(f"{width} channels, {size:2}      {first}   {then}   {norms[0]:.3f}, {norms[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
