"""Slow, obvious twins of the solvers: one example at a time with its dense Jacobian, and unrolled iterations."""

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def newton(f: Map, x: Tensor, steps: int = 30) -> Tensor:
    """The fixed point of each example by Newton's method with its dense Jacobian."""
    found = []
    for example in x.split(1):
        n = example.numel()
        for _ in range(steps):
            J = torch.autograd.functional.jacobian(f, example).reshape(n, n)
            step = torch.linalg.solve(torch.eye(n, dtype=x.dtype) - J, (f(example) - example).reshape(n))
            example = example + step.view_as(example)
        found.append(example.detach())
    return torch.cat(found)


def linear(matrices: Tensor, b: Tensor) -> Tensor:
    """v = b + A v, one matrix per example."""
    return torch.stack(
        [torch.linalg.solve(torch.eye(len(A), dtype=b.dtype) - A, r) for A, r in zip(matrices, b, strict=True)]
    )


def unrolled(f: Map, x: Tensor, steps: int = 400) -> Tensor:
    """Plain iteration with autograd through every step."""
    for _ in range(steps):
        x = f(x)
    return x
