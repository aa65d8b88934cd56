"""Draws from a data set: subsets, each contained in every larger one of the same kind and seed; shuffled labels."""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


def balanced_subset(
    labels: Int64[Tensor, " example"] | UInt8[Tensor, "example class"], count: int, *, seed: int
) -> Int64[Tensor, " chosen"]:
    """Examples of which every class has equally many, drawn so that smaller subsets lie in larger ones.

    All examples are shuffled and put in one order: the first of every class, then the second of every class, and so on,
    each round as shuffled (so the first of a frequent class tends to come early). A subset is the beginning of that
    order. So the numbers per class differ by at most 1, until a class has no examples left; from there on the others go
    on without it.

    Several classes per example: examples with exactly the same set of classes are a class of their own. With m of ten
    digits in every image, as in P0's Digitclutter, this balances the digits, too.

    Args:
        labels: Class numbers, or one column of 0 and 1 per class.
        count: Examples to choose.
        seed: Seed of the draw.

    Returns:
        Positions of the chosen examples, ascending.

    Raises:
        ValueError: If `count` is below 1 or above the number of examples.

    Source: P0 (Lippl et al. 2024), sample efficiency: accuracy against the size of the training set.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"a subset of {count} of {len(labels)} examples: it must be between 1 and {len(labels)}")
    shuffled = _shuffled(len(labels), seed)
    group = torch.unique(labels.cpu(), dim=0, return_inverse=True)[1][shuffled]
    by_group = group.argsort(stable=True)
    sizes = group.bincount()
    first = (sizes.cumsum(0) - sizes)[group[by_group]]
    turn = torch.empty_like(group)
    turn[by_group] = torch.arange(len(group)) - first
    return shuffled[turn.argsort(stable=True)[:count]].sort().values


def random_subset(total: int, count: int, *, seed: int) -> Int64[Tensor, " chosen"]:
    """At most `count` of `total` examples, drawn without replacement: their positions, ascending.

    Raises:
        ValueError: If `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"limit is {count}; at least 1 example is needed")
    return _shuffled(total, seed)[:count].sort().values


def shuffled_labels(
    labels: Int64[Tensor, " example"] | UInt8[Tensor, "example class"], *, seed: int
) -> Int64[Tensor, " example"] | UInt8[Tensor, "example class"]:
    """The same labels in another order: every class has as many examples as before, but which ones is chance.

    By that chance some examples keep their label, about one of every `classes` where classes are equally frequent.
    What a network trained on them has in common with one trained on the labels as they were comes from architecture
    and optimisation, not from anything that labels say about images.

    Args:
        labels: Class numbers, or one row of 0 and 1 per example, which stays together.
        seed: Seed of the permutation.

    Source: Zhang et al. 2017, "Understanding deep learning requires rethinking generalization", section 2.1; as a
    comparison beside the indices of P0 (Lippl et al. 2024): ours.
    """
    return labels[_shuffled(len(labels), seed)]


def _shuffled(total: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))
