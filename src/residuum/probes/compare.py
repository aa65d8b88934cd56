"""Comparison: how alike the examples lie in states of one network, or of two on their relative depth."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from residuum.probes.passive import ratio, token_mask
from residuum.profiles import Point
from residuum.streams import Stream

Pool = Literal["mean", "flat"]
Method = Literal["cka", "unbiased cka", "pearson", "spearman"]
Distance = Literal["correlation", "euclidean"]

_ROUNDING = 1e-12  # differences of this part of the values tell nothing


@dataclass(frozen=True, eq=False)
class States:
    """The states of a network on many examples, one vector each.

    Attributes:
        values: Per state [example, feature]; the number of features may differ from state to state.
        points: Section and state of each.
        depth: Blocks run before each state by all blocks, in [0, 1].
    """

    values: tuple[Float[Tensor, "example _"], ...]
    points: tuple[Point, ...]
    depth: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Similarity of every state of one network with every state of another.

    Attributes:
        matrix: Similarities; nan where a state does not tell the examples apart.
        rows: Relative depth of the first network's states.
        columns: Relative depth of the second network's states.
        method: What was compared, in words.
    """

    matrix: Float64[Tensor, "row column"]
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    method: str


def collect(streams: Iterable[Stream], *, pool: Pool = "mean") -> States:
    """All states of a network on all batches.

    Args:
        streams: Streams of the batches, as `cut_all` gives them.
        pool: "mean": states [example, channel, row, column] become means over the map, [example, token, feature]
            means over the counted tokens; others are flattened. "flat": all entries; needs equal sizes in all
            batches, no mask, and memory. Use it for maps whose channels come last (Swin).

    Raises:
        ValueError: If there are no batches, pool is another word, or masked tokens are to be flattened.
    """
    if pool not in ("mean", "flat"):
        raise ValueError(f'collect: pool is {pool!r}; allowed are "mean" and "flat"')
    parts: list[list[Tensor]] = []
    stream = None
    with torch.no_grad():
        for stream in streams:
            kept = stream.run().states
            parts.append([_pooled(h, stream.mask, pool) for states in kept for h in states])
    if stream is None:
        raise ValueError("collect: no batches given, so there are no states to compare")
    points = [Point(s, i) for s, length in enumerate(stream.lengths) for i in range(length + 1)]
    before = [sum(stream.lengths[: p.section]) + p.index for p in points]
    depth = tuple(n / max(1, sum(stream.lengths)) for n in before)
    return States(tuple(torch.cat(state) for state in zip(*parts, strict=True)), tuple(points), depth)


def _pooled(h: Float[Tensor, "example ..."], mask: Tensor | None, pool: Pool) -> Float[Tensor, "example _"]:
    h = h.detach().to(torch.promote_types(h.dtype, torch.float32))
    counted = token_mask(h, mask)
    if pool == "flat":
        if counted is not None:
            raise ValueError('collect: masked tokens cannot be flattened; use pool="mean"')
        return h.flatten(1).cpu()
    if h.ndim == 3:
        weight = h.new_ones(h.shape[:2]) if counted is None else counted.to(h)
        h = ratio(h.masked_fill(weight[..., None] == 0, 0).sum(1), weight.sum(1, keepdim=True))
    return (h.mean((2, 3)) if h.ndim == 4 else h.flatten(1)).cpu()


def compare(a: States, b: States, *, method: Method = "cka", distance: Distance = "correlation") -> Comparison:
    """Similarity of every state of one network with every state of another, or of the same, on the same examples.

    A state X [example, feature] is described by how its examples lie to each other, and two states are compared by
    the cosine between these descriptions:

    - "cka": the Gram matrix `X X^T`, rows and columns centred. Linear CKA,
      `|Y^T X|^2 / (|X^T X| |Y^T Y|)` with centred columns, in [0, 1]. Too high for fewer examples than features.
    - "unbiased cka": the same with U-centred matrices and no diagonal, which is the unbiased estimator of HSIC; 0 on
      average for unrelated states, at most 1, sometimes negative. Needs 4 examples.
    - "pearson", "spearman": the dissimilarities of all pairs of examples (RDM), centred; "spearman": their ranks. In
      [-1, 1]. Needs 3 examples.

    All are 1 for equal states and do not change when a state is scaled. CKA, and the RDM of Euclidean distances, do
    not change under orthogonal maps and shifts of a state either.

    Args:
        a: States of the first network.
        b: States of the second network, on the same examples in the same order.
        method: What to compare.
        distance: Dissimilarity of two examples for RDMs: "correlation", `1 - r` over the features, or "euclidean".

    Returns:
        The similarities, in float64; exact for these examples, estimates for others.

    Raises:
        ValueError: If the numbers of examples differ or are too small, or a word is not allowed.

    Source: Kornblith et al. (2019), eq. 3 and table 1 (CKA); Nguyen et al. (2021), eq. 3, and Song et al. (2012), eq. 5
    (unbiased); Kriegeskorte, Mur & Bandettini (2008) (RDM).
    """
    least = {"cka": 2, "unbiased cka": 4, "pearson": 3, "spearman": 3}
    if method not in least or distance not in ("correlation", "euclidean"):
        raise ValueError(
            f'compare: method is {method!r} and distance {distance!r}; allowed are {sorted(least)}, and "correlation" '
            'or "euclidean"'
        )
    counts = {len(x) for x in (*a.values, *b.values)}
    if len(counts) != 1 or min(counts) < least[method]:
        raise ValueError(
            f"compare: states have {sorted(counts)} examples; {method} needs the same examples for both networks, "
            f"and at least {least[method]}"
        )
    one, two = (torch.stack([_description(x.double(), method, distance) for x in s.values]) for s in (a, b))
    words = method if "cka" in method else f"{method} correlation of RDMs, {distance} distance"
    return Comparison((one @ two.T).clamp(-1, 1), a.depth, b.depth, words)


def _description(
    x: Float64[Tensor, "example feature"], method: Method, distance: Distance
) -> Float64[Tensor, " entries"]:
    """How the examples lie to each other, as a vector of length 1; nan if they all lie alike."""
    if "cka" in method:
        whole, x = x, x - x.mean(0)
        vector = (_u_centred(x @ x.T) if method == "unbiased cka" else x @ x.T).flatten()
        # Of examples that are all equal the mean leaves rounding, which is squared here.
        scale = torch.maximum(x.square().sum(), _ROUNDING * whole.square().sum())
    else:
        above = torch.triu_indices(len(x), len(x), 1)
        vector = _dissimilarities(x, distance)[above[0], above[1]]
        # One minus a correlation is rounded as 1 is, however small.
        scale = vector.abs().max() if distance == "euclidean" else vector.new_ones(())
        centred = vector - vector.mean()
        alike = torch.linalg.vector_norm(centred) <= _ROUNDING * scale
        ranks = _ranks(vector) if method == "spearman" else None
        vector = (centred if ranks is None else ranks - ranks.mean()).masked_fill(alike, 0)
    length = torch.linalg.vector_norm(vector)
    return ratio(vector, length.masked_fill(length <= _ROUNDING * scale if "cka" in method else length == 0, 0))


def _u_centred(gram: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Off-diagonal entries centred so that inner products of two such matrices estimate HSIC without bias."""
    n = len(gram)
    gram = gram - gram.diagonal().diag()
    row = gram.sum(1) / (n - 2)
    gram = gram - row[:, None] - row + row.sum() / (n - 1)
    return gram - gram.diagonal().diag()


def _dissimilarities(x: Float64[Tensor, "example feature"], distance: Distance) -> Float64[Tensor, "n n"]:
    if distance == "euclidean":
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    centred = x - x.mean(1, keepdim=True)
    whole, length = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (x, centred))
    unit = ratio(centred, length.masked_fill(length <= _ROUNDING * whole, 0))  # of equal features the mean leaves that
    return 1 - unit @ unit.T


def _ranks(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Ranks from 1; equal values share their mean rank; nan for all if one is nan."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2).double()[place]
    return ranks if values.isfinite().all() else torch.full_like(values, torch.nan)
