"""What a Lipschitz limit costs, and which norm it limits, beside torch's own `spectral_norm`: `make bench`.

One 3x3 convolution on channels-last maps, batches of 128, one thread (see timing.py): a step is forward and backward.
"""

import argparse
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.timing import Side, Work, heading, ratio
from residuum.layers.lipschitz import limit_
from residuum.spectra import operator_norm

SIZES = ((16, 28), (32, 14), (64, 7))
BATCH = 128


def conv(width: int, size: int, kind: str) -> nn.Conv2d:
    torch.manual_seed(0)
    module = nn.Conv2d(width, width, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
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


def step(width: int, size: int) -> Work:
    """A step of the plain convolution."""
    torch.set_grad_enabled(True)
    module = conv(width, size, "plain")
    x = torch.randn(BATCH, width, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    return lambda: module(x).backward(gradient)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    print(heading(pairs))
    print("layer, size          cost / step of the plain layer [0.03]: ours, torch's   true norm where 0.5, 1 is meant")
    for width, size in SIZES:
        costs = []
        for kind in ("ours", "torch"):
            found = ratio(Side(partial(weight, width, size, kind)), Side(partial(step, width, size)), pairs=pairs)
            costs.append(found[0] / 20)
        norms = []
        for kind in ("ours", "torch"):
            module = conv(width, size, kind)
            for _ in range(100):
                _ = module.weight
            plain = conv(width, size, "plain")
            with torch.no_grad():
                plain.weight.copy_(module.eval().weight)
            norms.append(float(operator_norm(plain, (size, size)).value))
        print(
            f"{width} channels, {size:2}        {costs[0]:.3f}, {costs[1]:.3f}   {norms[0]:.3f}, {norms[1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
