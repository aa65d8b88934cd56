"""Soft gradient coupling: blocks that learn together, from ordinary training to one recurrent block."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residuum.layers.sharing import as_list, norms_of, weights_of, with_norms
from residuum.names import unknown
from residuum.rates import RATES, Rate

Blocks = Sequence[nn.Module] | nn.ModuleList | nn.Sequential
_COUPLES = ("weights", "all")


@dataclass(frozen=True)
class Coupling:
    """How the blocks of each section of a network are coupled while it is trained.

    Attributes:
        strength: lambda in [0, 1]: 0 is ordinary training, 1 gives all blocks the same gradient. One number, or one
            per section.
        couple: "weights": all but normalisation, which stays with each block. "all": normalisation too, with one set
            of statistics; from equal weights at strength 1 this is the recurrent network.
        reduce: Whether the pooled gradient is the mean over blocks, or the sum that weight tying has.
        rate: Factor on the strength over the training.

    Source: P0 (Lippl et al. 2024), soft gradient coupling; its formula is reconstructed.
    """

    strength: float | tuple[float, ...] = 1.0
    couple: str = "weights"
    reduce: str = "mean"
    rate: Rate = RATES["constant"]

    def __post_init__(self) -> None:
        strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        for strength in strengths:
            _check(strength, self.couple, self.reduce)
        highest = max(self.rate(share / 1000) for share in range(1001)) * max(strengths, default=0)
        if highest > 1:
            raise ValueError(f"coupling: strength times rate reaches {highest:g}; it must stay in [0, 1]")

    def check(self, model: nn.Module) -> None:
        """Refuse a network that cannot be coupled so.

        Raises:
            ValueError: If it has no `sections`, the strengths are not one per section, no section has two blocks, or
                the blocks of a section cannot be coupled.
        """
        if not hasattr(model, "sections"):
            raise ValueError(f"{type(model).__name__} has no sections to couple; call couple_gradients_ on its blocks")
        self._strengths(model)
        several = [blocks for blocks in model.sections if len(blocks) > 1]
        if not several:
            raise ValueError(
                f"coupling: no section of this {type(model).__name__} has 2 blocks or more to couple (a loop is one)"
            )
        for blocks in several:
            alike(blocks, self.couple)
            if self.couple == "all":
                _rows([_statistics(block) for block in blocks])

    def _strengths(self, model: nn.Module) -> tuple[float, ...]:
        count = len(model.sections)
        strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,) * count
        if len(strengths) != count:
            raise ValueError(f"coupling has {len(strengths)} strengths, the network {count} sections")
        return strengths

    def after_backward(self, model: nn.Module, share: float) -> None:
        """Couple the gradients of every section: an `after_backward` of `train`.

        Args:
            model: A network with `sections`, lists of blocks.
            share: Share of the training that is done.

        Raises:
            ValueError: If the strengths are not one per section, or the blocks of a section cannot be coupled.
        """
        for blocks, strength in zip(model.sections, self._strengths(model), strict=True):
            if len(blocks) > 1:
                couple_gradients_(blocks, strength * self.rate(share), couple=self.couple, reduce=self.reduce)

    def after_epoch(self, model: nn.Module) -> dict[str, Any]:
        """What the coupling has achieved in every section: an `after_epoch` of `train`.

        Args:
            model: A network with `sections`, lists of blocks.

        Returns:
            "sharing": per section what `achieved_sharing` says, None for sections of one block; and
            "effective_parameters" of the network, those outside the sections included.
        """
        found = [achieved_sharing(blocks, couple=self.couple) if len(blocks) > 1 else None for blocks in model.sections]
        coupled = {
            id(p) for blocks in model.sections if len(blocks) > 1 for row in alike(blocks, self.couple) for p in row
        }
        rest = sum(p.numel() for p in model.parameters() if id(p) not in coupled)
        effective = sum(section["effective_parameters"] for section in found if section)
        return {"sharing": found, "effective_parameters": effective + rest}


def couple_gradients_(
    blocks: Blocks,
    strength: float,
    *,
    couple: str = "weights",
    reduce: str = "mean",
) -> None:
    """Mix the gradient of each block with that of all: `g_t <- (1 - lambda) g_t + lambda mean_t g_t`.

    To be called after `backward`, when gradients are complete (all-reduced, unscaled, accumulated), and before they are
    clipped. The mean weight of the blocks then follows ordinary training, deviations from it learn by a rate smaller by
    1 - lambda. With lambda = 1 deviations are frozen: blocks that start equal stay equal, bit for bit, under every
    elementwise optimiser. Weight tying is the sum: strength 1 with the mean is tying with the rate divided by the
    number of blocks T and the weight decay times T, without clipping; for Adam with eps times T instead.

    Args:
        blocks: Blocks of one shape.
        strength: lambda in [0, 1]; 0 changes nothing.
        couple: "weights": all parameters but those of normalisation. "all": those too, and the blocks' running
            statistics become their mean, one set. Each block is still trained with the statistics of its own batches,
            so evaluation differs from training; without normalisation, or with group norm, it does not.
        reduce: "mean", or "sum" over blocks in place of the mean.

    Raises:
        ValueError: If the blocks are fewer than two, differ in a parameter's name or shape, are tied already, have no
            parameters to couple, or some but not all have a gradient; if the strength is not in [0, 1]. Nothing has
            changed then.

    Source: P0 (Lippl et al. 2024), soft gradient coupling; a convex combination with the mean is our reconstruction.
    """
    _check(strength, couple, reduce)
    rows = [[p.grad for p in row if p.grad is not None] for row in alike(blocks, couple)]
    if strength == 0:
        return
    for gradients in rows:  # all before the first is mixed: whoever tries again would mix it twice
        if 0 < len(gradients) < len(blocks):
            raise ValueError(f"{len(gradients)} of {len(blocks)} blocks have a gradient; couple blocks that all ran")
    if couple == "all":
        _one_statistics_(blocks)
    for gradients in filter(None, rows):
        pooled = gradients[0].clone()
        for gradient in gradients[1:]:
            pooled += gradient
        if reduce == "mean":
            pooled /= len(blocks)
        for gradient in gradients:
            gradient.lerp_(pooled, strength)  # at 1 this is `pooled` to the bit


def mix_weights_(blocks: Blocks, common: nn.Module, strength: float, *, couple: str = "weights") -> None:
    """Bring the initial weights of blocks together: `W_t <- ((1 - a) W_t + a U) / sqrt((1 - a)^2 + a^2)`.

    For independent draws W_t and U of one variance the variance is kept. a = 0 leaves the blocks as they are, a = 1
    makes them equal. Vectors (biases, scales) are not random: they are mixed without the root.

    Args:
        blocks: Blocks of one shape.
        common: A block of that shape with weights of its own, U.
        strength: a in [0, 1].
        couple: As in `couple_gradients_`.

    Raises:
        ValueError: As `couple_gradients_`.

    Source: P0 (Lippl et al. 2024) does not say how coupled networks start; ours.
    """
    _check(strength, couple, "mean")
    if strength == 0:
        return
    root = ((1 - strength) ** 2 + strength**2) ** 0.5
    with torch.no_grad():
        for goal, *row in alike((common, *blocks), couple):
            for p in row:
                p.lerp_(goal, strength)
                if p.ndim > 1:
                    p /= root


def tied(blocks: Blocks, *, couple: str = "weights") -> nn.ModuleList:
    """Copies of blocks that use one set of weights, the mean of theirs: what coupling led to, as a loop.

    Args:
        blocks: Blocks of one shape; they are not changed.
        couple: "weights": each keeps its own normalisation. "all": the blocks become one, its statistics their mean.

    Returns:
        A list of as many blocks, for `fold`; it computes what the blocks do as far as their weights were equal.

    Raises:
        ValueError: As `achieved_sharing`.
    """
    blocks = copy.deepcopy(list(blocks))
    with torch.no_grad():
        for row in alike(blocks, couple, tied=True):
            row[0].copy_(_mean(row))
    if couple == "all":
        _one_statistics_(blocks)
        return as_list(blocks[:1] * len(blocks))
    return as_list(with_norms(blocks[0], norms_of(block)) for block in blocks)


def achieved_sharing(blocks: Blocks, *, couple: str = "weights") -> dict[str, Any]:
    """How alike the weights of T blocks are. With W_t all coupled parameters of block t as one vector of length P:

    - "sharing": `s = 1 - sum_t |W_t - mean W|^2 / sum_t |W_t|^2`; 1: equal; 1/T: unrelated.
    - "above_unrelated": `(s - 1/T) / (1 - 1/T)`; 1: equal; 0: unrelated.
    - "effective_parameters": `P (sum sigma_i^2)^2 / sum sigma_i^4`, sigma the singular values of the T x P matrix;
      P for equal blocks, T P for orthogonal ones of one norm.
    - "deviations": `|W_t - mean W| / |mean W|`, one per block.

    Args:
        blocks: Blocks of one shape.
        couple: As in `couple_gradients_`.

    Returns:
        Numbers ready for JSON; None where all weights, or their mean, are zero.

    Raises:
        ValueError: If the blocks are fewer than two, differ in a parameter's name or shape, or have none to couple.

    Source: ours; P0 (Lippl et al. 2024), earlier abstract, compares models at equal effective numbers of parameters.
    """
    rows = alike(blocks, couple, tied=True)
    matrix = torch.stack([torch.cat([row[t].detach().flatten() for row in rows]) for t in range(len(blocks))]).double()
    gram, mean = matrix @ matrix.T, matrix.mean(0)
    total, deviations = gram.trace(), (matrix - mean).norm(dim=1)
    if not total:
        return {"sharing": None, "above_unrelated": None, "effective_parameters": 0.0, "deviations": None}
    s, least = 1 - (deviations.square().sum() / total).item(), 1 / len(blocks)
    return {
        "sharing": s,
        "above_unrelated": (s - least) / (1 - least),
        "effective_parameters": (matrix.shape[1] * total**2 / gram.square().sum()).item(),
        "deviations": (deviations / mean.norm()).tolist() if mean.any() else None,
    }


def alike(blocks: Blocks, couple: str = "weights", *, tied: bool = False) -> list[tuple[Tensor, ...]]:
    """The parameters of blocks that correspond to each other, one row per name, one column per block.

    Args:
        blocks: Blocks of one shape.
        couple: As in `couple_gradients_`.
        tied: Whether blocks may have a parameter in common.

    Raises:
        ValueError: If the blocks are fewer than two, differ in a parameter's name or shape, or have none to couple;
            without `tied` also if two are tied.
    """
    if len(blocks) < 2:
        raise ValueError(f"coupling needs at least 2 blocks; there are {len(blocks)}")
    rows = _rows([_parameters(block, couple) for block in blocks])
    if not rows:
        raise ValueError(
            f"coupling: these blocks of {type(blocks[0]).__name__} have no parameters to couple with {couple!r}; "
            "'weights' are all but those of norms, 'all' are those too"
        )
    if not tied and any(len({id(p) for p in row}) < len(row) for row in rows):
        raise ValueError(
            "some of these blocks are one and the same or have tied parameters; there is nothing to couple"
        )
    return rows


def _rows(tables: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, ...]]:
    """The tensors of blocks that correspond to each other by name; the order of making may differ."""
    first = {name: tuple(p.shape) for name, p in tables[0].items()}
    for number, table in enumerate(tables[1:], 1):
        given = {name: tuple(p.shape) for name, p in table.items()}
        if given != first:
            name = next(name for name in {**first, **given} if first.get(name) != given.get(name))
            raise ValueError(
                f"blocks 0 and {number} cannot be coupled: {name!r} has shape {first.get(name)} in the first and "
                f"{given.get(name)} in the other; couple blocks of one shape"
            )
    return [tuple(table[name] for table in tables) for name in first]


def _parameters(block: nn.Module, couple: str) -> dict[str, Tensor]:
    """The parameters of a block that are coupled, by name."""
    if couple not in _COUPLES:
        raise unknown("couple", couple, _COUPLES)
    return dict(block.named_parameters()) if couple == "all" else weights_of(block)


def _one_statistics_(blocks: Blocks) -> None:
    """Give all blocks the mean of their running statistics.

    A running statistic is linear in the batches, so it does not matter whether this happens after each step.
    """
    for row in _rows([_statistics(block) for block in blocks]):
        mean = _mean(row)
        for buffer in row:
            buffer.copy_(mean)


def _statistics(block: nn.Module) -> dict[str, Tensor]:
    """The running statistics of a block's norms, by name."""
    ends = ("running_mean", "running_var")
    return {name: buffer for name, buffer in block.named_buffers() if name.rpartition(".")[2] in ends}


def _mean(row: Sequence[Tensor]) -> Tensor:
    """The mean of tensors; of equal ones it is the same bits."""
    return row[0] + (torch.stack(list(row)) - row[0]).mean(0)


def _check(strength: float, couple: str, reduce: str) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"coupling strength is {strength}; it must lie in [0, 1]")
    for name, given, known in (("couple", couple, _COUPLES), ("reduce", reduce, ("mean", "sum"))):
        if given not in known:
            raise unknown(name, given, known)
