"""Pair probes: how far states of one section are from each other. The states of one section and batch are kept."""

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from residuum.probes.passive import ratio, token_mask, unmasked
from residuum.profiles import Measure, Point
from residuum.streams import Step, Stream

_ENTRIES_AT_ONCE = 2**18  # entries in float64 that are compared at once: 2 MiB stay in the cache, twice as fast


def pairs(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
    """Distances and angles between the states of each section, for every pair that has a use.

    With states h_0 .. h_T of a section:

    - "distance_to_last": `|h_t - h_T| / |h_0 - h_T|` at every state, flattened. 1 at h_0, 0 at h_T; falls early if the
      section converges, along a line if it moves evenly. Undefined if h_0 = h_T.
    - "cosine_to_last": `<h_t, h_T> / (|h_t| |h_T|)` at every state, flattened, in [-1, 1].
    - "block_influence" of the n blocks from t on: mean over tokens of `1 - cos(h_t, h_{t+n})`, in [0, 2]. 0: the
      blocks do not turn the state, and can perhaps be left out.
    - "angular_distance" of the same blocks: `arccos(cos(h_t, h_{t+n})) / pi` at the last token, in [0, 1].

    States [example, token, feature] have tokens: masked ones do not count, and the last one is the last that is not
    masked. Every other state counts as one token. Angles are undefined for an example with a token of length 0.
    Sums are in float64, because arccos magnifies errors of cosines near 1.

    Args:
        stream: The stream of one batch.
        target: Not used.

    Returns:
        The four quantities: two at states, two at spans (start, number of blocks).

    Source: block influence: ShortGPT (Men et al. 2024, arXiv 2403.03853), there with n = 1 and one mean over all tokens
    of all examples. Angular distance: Gromov et al. (2024, arXiv 2403.17887), as in PruneMe. Distance and cosine to
    the last state are ours, beside the convergence index of P0 (Lippl et al. 2024).
    """
    tables: dict[str, list[Tensor]] = {}
    states, spans = [], []
    for section, kept in _sections(stream):
        for name, table in _compare(kept, stream.mask).items():
            tables.setdefault(name, []).append(table.float().cpu())
        states += [Point(section, t) for t in range(len(kept))]
        spans += [Point(section, t, n) for t in range(len(kept)) for n in range(1, len(kept) - t)]
    return {
        name: Measure(
            torch.cat(table, 1), *((tuple(states), "state") if name.endswith("last") else (tuple(spans), "span"))
        )
        for name, table in tables.items()
    }


def _sections(stream: Stream) -> Iterator[tuple[int, list[Tensor]]]:
    """All states of one section after the other."""

    def number(step: Step) -> int:
        return step.section

    for section, steps in groupby(stream.walk(), number):
        kept: list[Tensor] = []
        for step in steps:
            kept += [step.after] if kept else [step.before, step.after]
        yield section, kept


def _compare(
    states: list[Float[Tensor, " example *state"]], mask: Bool[Tensor, "example token"] | None
) -> dict[str, Float64[Tensor, "example _"]]:
    """The four quantities for one section, a few examples at a time."""
    size = max(1, _ENTRIES_AT_ONCE // max(1, len(states) * math.prod(states[0].shape[1:])))
    counted = token_mask(states[0], mask)
    states = _tokens([unmasked(h, mask) for h in states])
    if counted is None:
        counted = states[0].new_ones(states[0].shape[:2], dtype=torch.bool)
    parts = [
        _compare_few(torch.stack(few, 2).double(), some)
        for *few, some in zip(*(h.split(size) for h in states), counted.split(size), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tokens(states: list[Float[Tensor, " example *state"]]) -> list[Float[Tensor, "example token feature"]]:
    """States as tokens; those that have none as a single token. Channels-last memory is read in its own order."""
    first = states[0]
    if first.ndim == 3:
        return states
    order = sorted(range(1, first.ndim), key=lambda d: -first.stride(d))
    return [h.permute(0, *order).reshape(len(h), 1, -1) for h in states]


def _compare_few(
    x: Float64[Tensor, "example token state feature"], counted: Bool[Tensor, "example token"]
) -> dict[str, Float64[Tensor, "example _"]]:
    inner = x @ x.mT
    from_last = torch.linalg.vector_norm(x - x[:, :, -1:], dim=(1, 3))
    start, end = torch.triu_indices(x.shape[2], x.shape[2], 1)
    turned = _cosines(inner)[:, :, start, end]
    tokens = counted.sum(1)
    # The last counted token; tokens before padding and after left padding are told by their number, not by the count.
    last = (counted * torch.arange(1, counted.shape[1] + 1, device=counted.device)).argmax(1)
    at_last = turned[torch.arange(len(x), device=x.device), last].masked_fill(tokens[:, None] == 0, torch.nan)
    return {
        "distance_to_last": ratio(from_last, from_last[:, :1]),
        "cosine_to_last": _cosines(inner.sum(1))[:, :, -1],
        "block_influence": ratio((1 - turned).masked_fill(~counted[..., None], 0).sum(1), tokens[:, None].double()),
        "angular_distance": at_last.arccos() / torch.pi,
    }


def _cosines(inner: Float64[Tensor, "*many state state"]) -> Float64[Tensor, "*many state state"]:
    """Cosines from inner products; nan where a state is 0."""
    lengths = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    return ratio(inner, lengths[..., None] * lengths[..., None, :]).clamp(-1, 1)
