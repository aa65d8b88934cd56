"""Answers: what a network says about examples, as a loss of their labels and as right or wrong."""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

IGNORED = -100  # the label of tokens that do not count, such as padding; torch's cross-entropy knows it
GUESSING = 0.02  # a network whose error is not further than this below that of guessing has no answer to compare with


def label_loss(model: nn.Module, x: Float[Tensor, "example ..."], y: Tensor) -> Float[Tensor, ""]:
    """Mean over the examples: cross-entropy, or for 0/1 labels the binary cross-entropy averaged over classes."""
    output = model(x)
    return F.cross_entropy(output, y) if y.ndim == 1 else F.binary_cross_entropy_with_logits(output, y.to(output))


def correct(output: Float[Tensor, "example class"], y: Tensor) -> Bool[Tensor, " example"]:
    """Whether the answer is right: the largest output, or for m classes present the m largest (exact match).

    Where no class is present every answer is right.

    Source: exact match with the m largest outputs: Spoerer et al. 2017, "Recurrent Convolutional Neural Networks: A
    Better Model of Biological Object Recognition".
    """
    return output.argmax(1) == y if y.ndim == 1 else (largest(output, y) == y.bool()).all(1)


def found_classes(
    output: Float[Tensor, "example class"], y: Shaped[Tensor, "example class"]
) -> Float[Tensor, " example"]:
    """Share of the m classes present that are among the m largest outputs, in [0, 1]; 0 where none is present.

    For m of ten digits a blind guess finds m / 10 of them, while its chance of an exact match is 1 / (10 choose m).
    """
    return (largest(output, y) & y.bool()).sum(1) / y.sum(1).clamp(min=1)


def largest(
    output: Float[Tensor, "example class"], y: Shaped[Tensor, "example class"]
) -> Bool[Tensor, "example class"]:
    """The outputs that are among the m largest of their example, where y has m ones."""
    ranks = output.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < y.sum(1, keepdim=True)
