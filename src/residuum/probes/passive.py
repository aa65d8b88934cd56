"""Passive probes: what each block does to the state, read off while one forward passes by."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from residuum.profiles import Measure, Point, Probe, measure
from residuum.streams import Step, Stream

PassiveProbe = Callable[[Step, Step | None], dict[str, Tensor]]

# Quantities that do not look at the update, so that it does not matter where the update came from.
_OF_STATES = frozenset({"state_norm"})


def passive(*probes: PassiveProbe) -> Probe:
    """One probe of many passive ones, which share a single forward with a constant number of states alive.

    Args:
        probes: Functions of (step, previous step of the same section or None) -> values per example by name. A
            quantity that is left out at a step (as by `update_angle` at a section's first) has no point there.

    Raises:
        ValueError: If no probes are given, or, when it measures, if two give the same quantity.
    """
    if not probes:
        raise ValueError("passive() needs at least one passive probe, such as passive(perturbation)")

    def probe(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        columns: dict[str, list[Tensor]] = {}
        points: dict[str, list[Point]] = {}
        own: set[bool] = set()
        previous = None
        for step in stream.walk():
            if previous is not None and previous.section != step.section:
                previous = None
            for name, values in _look(probes, step, previous).items():
                columns.setdefault(name, []).append(values)
                points.setdefault(name, []).append(Point(step.section, step.index))
            own.add(step.own_branch)
            previous = step
        update = origin(own)
        return {
            name: measure(columns[name], points[name], "block", update="" if name in _OF_STATES else update)
            for name in columns
        }

    return probe


def _look(probes: tuple[PassiveProbe, ...], step: Step, previous: Step | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for probe in probes:
        new = probe(step, previous)
        if found.keys() & new.keys():
            raise ValueError(f"passive: two probes give {sorted(found.keys() & new.keys())}; leave one of them out")
        found |= new
    return found


def origin(own: set[bool]) -> str:
    """Whose updates were measured, from the values of `Step.own_branch` that were met."""
    names = {True: "own branch", False: "after - before"}
    return " or ".join(names[kind] for kind in sorted(own, reverse=True))


def perturbation(step: Step, previous: Step | None) -> dict[str, Float[Tensor, " example"]]:
    """How far a block moves the state, absolutely and relative to the state.

    `p_l = |f_l|` and `q_l = |f_l| / |h_l|` with the update f_l = h_{l+1} - h_l and the Euclidean norm over all entries
    of one example (unmasked tokens only). Means over examples are means of ratios, not ratios of means. q = 0: the
    block does nothing; q << 1: a perturbation from identity; q > 1: it replaces the state.

    Args:
        step: The block at work.
        previous: Not used.

    Returns:
        "perturbation" in the unit of the state, and "scaled_perturbation", dimensionless, undefined for h_l = 0.

    Source: P2 (Hauser 2019), eq. 3 (absolute, figure 2) and eq. 2 (scaled, figure 5). The second is the l2 ratio of P1
    (Jastrzebski et al. 2018), figure 2.
    """
    moved = _norm_of(step, "update")
    return {"perturbation": moved, "scaled_perturbation": ratio(moved, _norm_of(step, "before"))}


def state_norm(step: Step, previous: Step | None) -> dict[str, Float[Tensor, " example"]]:
    """Size of the state that a block gets: `|h_l|`, Euclidean over all entries of one example (unmasked tokens only).

    Args:
        step: The block at work.
        previous: Not used.

    Returns:
        "state_norm" in the unit of the state.

    Source: P2 (Hauser 2019), eq. 2, the denominator; P1 (Jastrzebski et al. 2018) follows it at initialisation.
    """
    return {"state_norm": _norm_of(step, "before")}


def update_angle(step: Step, previous: Step | None) -> dict[str, Float[Tensor, " example"]]:
    """Cosine between successive updates of the state.

    `<f_{l-1}, f_l> / (|f_{l-1}| |f_l|)`, per example, flattened over the state (unmasked tokens only). +1: blocks
    repeat the same motion; 0: unrelated; -1: a block undoes its predecessor.

    Args:
        step: The block at work.
        previous: The step before it in the same section, or None.

    Returns:
        "update_angle" in [-1, 1], undefined where an update is 0; nothing for the first block of a section.

    Source: ours; for a network that solves an equation step by step it tells whether the steps go on in one direction.
    """
    if previous is None:
        return {}
    a, b = previous.update, step.update
    lengths = (_norm_of(previous, "update"), _norm_of(step, "update"))
    return {"update_angle": cosine(a, b, step.mask, product=dot(a, b, step.mask), lengths=lengths)}


def first_not_finite(streams: Iterable[Stream]) -> dict[str, int]:
    """Where states stop being finite: for each place the number of examples whose first such state is made there.

    A state is finite if all entries of the example are (unmasked tokens only); nan and infinity spread, so only the
    first place of each example tells what went wrong.

    Args:
        streams: Streams of the batches, as `cut_all` gives them. Each is walked once.

    Returns:
        Counts by place, such as "block layer1.0" or "the entry of section 2", in the order of the network; places that
        made none are left out.

    Source: ours; a check, no measure.
    """
    counts: Counter[str] = Counter()
    with torch.no_grad():
        for stream in streams:
            seen = None
            for step in stream.walk():
                section = stream.sections[step.section]
                made = [(f"block {section.blocks[step.index].name} ({section.name})", step.after)]
                for place, h in [(f"the entry of {section.name}", step.before)] * (step.index == 0) + made:
                    broken = ~unmasked(h, step.mask).isfinite().all(tuple(range(1, h.ndim)))
                    counts[place] += int((broken if seen is None else broken & ~seen).sum())
                    seen = broken if seen is None else broken | seen
    return {place: count for place, count in counts.items() if count}


def norm(
    h: Float[Tensor, " example *state"], mask: Bool[Tensor, "example token"] | None = None
) -> Float[Tensor, " example"]:
    """Euclidean norm per example over all entries of its unmasked tokens; sums in float32 at least.

    In float64 where squares are beyond float32: gradients of answers that are certain by 50 nats are that small.
    """
    # Not `h.flatten(1)`, which copies channels-last memory.
    counted, over, dtype = unmasked(h, mask), tuple(range(1, h.ndim)), wide(h.dtype)
    size = torch.linalg.vector_norm(counted, dim=over, dtype=dtype)
    known = (size > torch.finfo(dtype).tiny ** 0.5) & (size < torch.inf)
    if known.all():
        return size
    return size.where(known, torch.linalg.vector_norm(counted, dim=over, dtype=torch.float64).to(dtype))


def dot(
    a: Float[Tensor, " example *state"],
    b: Float[Tensor, " example *state"],
    mask: Bool[Tensor, "example token"] | None = None,
) -> Float[Tensor, " example"]:
    """Inner product per example over all entries of its unmasked tokens; sums in float32 at least."""
    product = a.to(wide(a.dtype)) * b
    return unmasked(product, mask).sum(tuple(range(1, a.ndim)))


def cosine(
    a: Float[Tensor, " example *state"],
    b: Float[Tensor, " example *state"],
    mask: Bool[Tensor, "example token"] | None = None,
    *,
    product: Float[Tensor, " example"],
    lengths: tuple[Float[Tensor, " example"], Float[Tensor, " example"]],
) -> Float[Tensor, " example"]:
    """`<a, b> / (|a| |b|)` per example from what is known of a and b, in [-1, 1]; nan where one of them is 0.

    In float64, of vectors of length 1, where the product of the lengths is beyond the precision of the sums.
    """
    both = lengths[0] * lengths[1]
    found = ratio(product, both).clamp(-1, 1)
    within = (both > torch.finfo(both.dtype).tiny ** 0.5) & (both < torch.inf) & product.isfinite()
    if within.all():
        return found
    beyond = ~within & (lengths[0] > 0) & (lengths[1] > 0)
    one, two = (unmasked(v, mask)[beyond].double().flatten(1) for v in (a, b))
    one, two = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (one, two))
    return found.masked_scatter(beyond, (one * two).sum(1).clamp(-1, 1).to(found.dtype))


def unmasked(
    h: Float[Tensor, " example *state"], mask: Bool[Tensor, "example token"] | None
) -> Float[Tensor, " example *state"]:
    """The state with the entries of masked tokens set to 0; a state that is not [example, token, feature] as it is."""
    mask = token_mask(h, mask)
    return h if mask is None else h.masked_fill(~mask[..., None], 0)


def token_mask(
    h: Float[Tensor, " example *state"], mask: Bool[Tensor, "_ _"] | None
) -> Bool[Tensor, "example token"] | None:
    """The mask, for states or outputs [example, token, feature]; None for others, which have no tokens."""
    if mask is None or h.ndim != 3:
        return None
    if mask.shape != h.shape[:2]:
        raise ValueError(
            f"the mask is for {list(mask.shape)} examples and tokens, but the states have shape {list(h.shape)}; "
            "measure without a mask, or only blocks whose states have one token per token of the mask (blocks=...)"
        )
    return mask


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, nan where b is 0."""
    return a / b.masked_fill(b == 0, torch.nan)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision to sum in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _norm_of(step: Step, which: str) -> Float[Tensor, " example"]:
    """Norm of a step's `before` or `update`, computed once however many probes ask; nan where it is not finite."""
    memo, key = vars(step), f"_{which}_norm"  # as functools.cached_property keeps its values
    if key not in memo:
        length = norm(getattr(step, which), step.mask)
        if step.mask is not None:  # of no token nothing is known
            length = length.masked_fill(~step.mask.any(1), torch.nan)
        memo[key] = length.masked_fill(~length.isfinite(), torch.nan)
    return memo[key]
