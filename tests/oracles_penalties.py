"""Slow, obvious twins of penalties: dense Jacobians, one example and one point at a time, with their graphs."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def jacobian(f: Map, example: Tensor) -> Tensor:
    """The dense Jacobian at one example `[*state]`, with its graph, row by row."""
    x = example if example.requires_grad else example.detach().requires_grad_()
    out = f(x[None])[0].flatten()
    return torch.stack([torch.autograd.grad(v, x, create_graph=True, retain_graph=True)[0].flatten() for v in out])


def trace(f: Map, h: Tensor) -> Tensor:
    """The exact trace of each example's Jacobian."""
    return torch.stack([jacobian(f, example).trace() for example in h])


def frobenius(f: Map, h: Tensor) -> Tensor:
    """The exact squared Frobenius norm of each example's Jacobian."""
    return torch.stack([jacobian(f, example).square().sum() for example in h])


def all_signs(h: Tensor) -> Tensor:
    """All 2^n vectors of signs of an example of n entries, the same for every example: `[probe, example, *state]`."""
    vectors = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=h[0].numel())), dtype=h.dtype)
    return vectors.view(-1, 1, *h.shape[1:]).expand(-1, *h.shape)


def path(sides: Sequence[Map], dts: Sequence[float], states: Sequence[Tensor], power: float = 0.0) -> dict[str, Tensor]:
    """Integrals of divergence (before the sigmoid), Jacobian and magnitude over time, divided by the whole time.

    The trapezoidal rule, step by step: half a step times the values at its two ends. The side at a point is that of the
    block that starts there, at the last point that of the last block.
    """
    points = [*sides, sides[-1]]
    found = dict.fromkeys(("divergence", "jacobian", "magnitude"), torch.zeros((), dtype=states[0].dtype))
    for t, dt in enumerate(dts):
        for at in (t, t + 1):
            f, h, d, half = points[at], states[at], states[at][0].numel(), dt / 2 / math.fsum(dts)
            growth = ((at + 1) / len(points)) ** power
            found["divergence"] = found["divergence"] + half * growth * trace(f, h).mean() / d
            found["jacobian"] = found["jacobian"] + half * frobenius(f, h).mean() / d**2
            found["magnitude"] = found["magnitude"] + half * sum(f(e[None]).square().sum() for e in h) / len(h) / d
    return found


def variation(blocks: Sequence[torch.nn.Module]) -> Tensor:
    """Squared distances of neighbours' parameters, over the number of blocks."""
    vectors = [torch.cat([p.flatten() for p in block.parameters()]) for block in blocks]
    return sum(((b - a) ** 2).sum() for a, b in itertools.pairwise(vectors)) / len(blocks)
