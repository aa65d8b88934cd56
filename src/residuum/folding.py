"""Folding: the blocks of each section as one, and what that costs."""

from dataclasses import dataclass, replace

from residuum.copies import copied
from residuum.data import Preparation, Splits
from residuum.layers.coupling import achieved_sharing, tied
from residuum.layers.sharing import NAIVE, UBN
from residuum.models import ResNet, count_parameters
from residuum.training import evaluate


@dataclass(frozen=True)
class Folded:
    """A network of which every section is one block, and what became of it.

    Attributes:
        model: The tied network: each weight once, every section's blocks alike; it can be saved as a run.
        sharing: How alike the weights of each section were, 1 for equal (`achieved_sharing`); None for one block.
        parameters: Numbers of parameters before and after.
        loss: Mean loss on the test split before and after.
        accuracy: Accuracy on the test split before and after.
    """

    model: ResNet
    sharing: tuple[float | None, ...]
    parameters: tuple[int, int]
    loss: tuple[float, float]
    accuracy: tuple[float, float]


def fold_coupled(
    model: ResNet,
    data: Splits,
    *,
    couple: str = "weights",
    preparation: Preparation | None = None,
) -> Folded:
    """Turn every section of a coupled network into a loop of its mean block, and measure what that costs.

    Args:
        model: A network whose blocks have weights of their own, in eval mode; it is not changed.
        data: The test split is evaluated.
        couple: "weights": every application keeps its normalisation, which must be batch norm or none. "all": one block
            with one set of statistics.
        preparation: The network's own preparation of pixels; None is that of the training split.

    Raises:
        ValueError: If the model is in training mode, shares weights already, or has no section of two blocks; if it has
            group norm, of which there is one for all places of a block only; if `couple` is unknown.

    Source: P0 (Lippl et al. 2024): a coupled network as a recurrent one; the mean and its cost are ours.
    """
    if model.training:
        raise ValueError("fold_coupled needs model.eval()")
    if model.config.sharing is not None or max(map(len, model.sections)) < 2:
        raise ValueError("fold_coupled needs sections of at least 2 blocks with weights of their own")
    norm = model.config.norm
    if norm == "group" and couple == "weights":
        raise ValueError(
            "fold_coupled: with couple 'weights' every place of a block keeps its own norm, which only batch norm can; "
            "this network has group norm: give couple='all' (--norms)"
        )
    couple = "all" if (norm, couple) == ("none", "weights") else couple  # the same, where there is no norm
    sharing = replace(NAIVE if couple == "all" else replace(UBN, gamma=1.0), free=0)
    new = copied(model)
    alike = []
    for s, blocks in enumerate(model.sections):
        alike.append(achieved_sharing(blocks, couple=couple)["sharing"] if len(blocks) > 1 else None)
        if len(blocks) > 1:
            new.sections[s] = tied(blocks, couple=couple)
    new.config = replace(model.config, sharing=sharing, alike=0.0)
    reads = preparation or data.train.preparation
    before, after = (evaluate(network, data.test, preparation=reads) for network in (model, new))
    counts = tuple(count_parameters(network, statistics=False) for network in (model, new))
    both = {name: (before[name], after[name]) for name in ("loss", "accuracy")}
    return Folded(new, tuple(alike), counts, both["loss"], both["accuracy"])
