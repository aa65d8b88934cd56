"""Slow, obvious twins of shared blocks: every application by itself, with numbers that are equal, not tied."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def untied(blocks: Sequence[nn.Module]) -> nn.ModuleList:
    """Blocks of equal numbers in which nothing is tied to anything."""
    return nn.ModuleList(copy.deepcopy(block) for block in blocks)


def summed_gradients(blocks: Sequence[nn.Module], name: str) -> Tensor:
    """The gradients of one parameter of every block, added up."""
    return torch.stack([dict(block.named_parameters())[name].grad for block in blocks]).sum(0)


def run(blocks: Sequence[nn.Module], h: Tensor) -> Tensor:
    """One block after the other."""
    for block in blocks:
        h = block(h)
    return h


def batch_normalised(h: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Batch norm in training mode, by its formula."""
    mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
    return gamma[:, None, None] * (h - mean) / torch.sqrt(variance + eps) + beta[:, None, None]
