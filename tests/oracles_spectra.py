"""Slow, obvious twins of the spectral measures and comparisons: dense Jacobians and matrices, one pair at a time."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from residuum.streams import Stream


def dense(f: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """A linear map of one example as a matrix, column by column."""
    n = math.prod(shape)
    unit = torch.eye(n, dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([f(unit[i].view(1, *shape)).flatten() for i in range(n)], 1)


def conv_matrix(conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """A convolution on maps of a size, without its bias, as a matrix."""
    zero = torch.zeros(1, conv.in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        return dense(lambda v: conv(v) - conv(zero), zero.shape[1:])


def jacobian(f: Callable[[Tensor], Tensor], h: Tensor, example: int, counted: Tensor | None = None) -> Tensor:
    """Jacobian of one example of a batch, row by row with autograd; of its counted tokens only."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        h = h.detach().requires_grad_()
        out = f(h)[example].flatten()
        rows = [torch.autograd.grad(out[i], h, retain_graph=True)[0][example].flatten() for i in range(len(out))]
    full = torch.stack(rows)
    if counted is None:
        return full
    kept = counted[:, None].expand(h.shape[1:]).flatten()
    return full[kept][:, kept]


def lipschitz(stream: Stream, example: int) -> dict[str, list[float]]:
    """Largest singular values of update and block at every block, by SVD of the full Jacobian."""
    found: dict[str, list[float]] = {"update_lipschitz": [], "block_lipschitz": []}
    with torch.no_grad():
        states = stream.run().states
    for section, kept in zip(stream.sections, states, strict=True):
        for block, h in zip(section.blocks, kept, strict=False):
            counted = None if stream.mask is None or h.ndim != 3 else stream.mask[example]
            J = jacobian(block.apply, h, example, counted)
            found["block_lipschitz"].append(float(torch.linalg.svdvals(J)[0]))
            found["update_lipschitz"].append(float(torch.linalg.svdvals(J - torch.eye(len(J)).to(J))[0]))
    return found


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA by features: |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|), Frobenius norms."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al.'s unbiased estimator of HSIC with linear kernels, eq. 5, term by term."""
    n = len(x)
    K, L = x @ x.T, y @ y.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return float((np.trace(K @ L) + middle - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3)))


def dissimilarities(x: np.ndarray, distance: str) -> list[float]:
    """The upper triangle of the dissimilarity matrix, pair by pair."""
    if distance == "euclidean":
        return [float(np.linalg.norm(a - b)) for a, b in combinations(x, 2)]
    return [1 - float(np.corrcoef(a, b)[0, 1]) for a, b in combinations(x, 2)]
