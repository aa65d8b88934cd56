"""Gradient probes: does each block move the state against the gradient of the loss, as a step of descent would?"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from residuum.graphs import leaf, recorded
from residuum.probes.passive import cosine, dot, norm, origin, ratio, wide
from residuum.probes.readout import Reader
from residuum.profiles import Measure, Point, Probe, measure
from residuum.schedules import drop, last_section
from residuum.streams import Stream, run_all


def gradients(*, grad: str = "backprop", at: str = "input") -> Probe:
    """A probe of updates f_l against the gradients g_l of the loss with respect to the state.

    - "gradient_cosine": `<f_l, g_l> / (|f_l| |g_l|)`, in [-1, 1], undefined where one is 0. -1: the block is a step of
      gradient descent; 0: unrelated to the loss to first order; > 0: it raises the loss.
    - "gradient_norm": `|g_l|`, nats per unit of the state.
    - "first_order_change": `<f_l, g_l>`, what the block changes in the loss to first order in its update.
    - "gradient_ratio" ("backprop", of several sections): |g| at the first block of each section over that at the first
      block of the last section. Much above 1: gradients explode on their way down.
    - "loss_change" ("plugin"): the true change `L(h_{l+1}) - L(h_l)`; for "backprop" see `loss_changes`.

    The loss of an example is that of `readouts` (tokens: mean over those that count), without weight decay. Updates and
    gradients are flattened (unmasked tokens only). Names begin with "plugin_" for "plugin" and end in "_at_output" for
    "output", so that several kinds can stand in one profile.

    In float16 each example's loss goes backwards times a power of 2, so that small gradients are not lost.

    Args:
        grad: "backprop": of the network's loss, through all later blocks, in all sections. "plugin": of the loss that
            the readout gives right at the state, in the last section.
        at: Where g_l is taken: "input" at h_l, as P1 does; "output" at h_{l+1}, which predicts what dropping the block
            does. They differ by the transpose of the block's Jacobian.

    Returns:
        The probe: one forward and one backward ("plugin": one forward and one readout and its backward per state), no
        gradients of parameters, and one gradient at a time in memory.

    Raises:
        ValueError: If `grad` or `at` is something else; when it measures, if there are no labels, they do not fit, or
            the loss cannot be differentiated, because the readout or a block (which is named) cuts the gradient.

    Source: P1 (Jastrzebski et al. 2018), figure 4 (cosine), section 4.5 and figure 8 (ratio), eq. 2 to 4 (expansion).
    """
    for name, given, allowed in (("grad", grad, ("backprop", "plugin")), ("at", at, ("input", "output"))):
        if given not in allowed:
            raise ValueError(f"gradients: {name} is {given!r}; allowed are {allowed}")
    measures = _backprop if grad == "backprop" else _plugin

    def probe(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        if target is None:
            raise ValueError("gradients: need labels, because they are of the loss; the target is None")
        if target.is_inference():  # no graph may keep it
            with torch.inference_mode(False):
                target = target.clone()
        found = measures(stream, target, at)
        before, after = "plugin_" if grad == "plugin" else "", "_at_output" if at == "output" else ""
        return {f"{before}{name}{after}": values for name, values in found.items()}

    return probe


def loss_changes(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
    """What each block truly changes in the loss of the network: loss with the block minus loss without it.

    The true value of which "first_order_change" of `gradients(grad="backprop")` is the first order; their difference is
    of second order in the size of the blocks. N (N + 1) / 2 block evaluations for N blocks.

    Args:
        stream: The stream of one batch.
        target: The labels.

    Returns:
        "loss_change" per block, in nats; negative: the block is useful.

    Raises:
        ValueError: If there are no labels, or they do not fit.

    Source: P1 (Jastrzebski et al. 2018), figure 3, there as accuracy; the expansion is its eq. 2 to 4.
    """
    if target is None:
        raise ValueError("loss_changes: needs labels; the target is None")
    points = [Point(s, i) for s, length in enumerate(stream.lengths) for i in range(length)]
    without = {drop(stream.full, s, i): (s, i) for s, i, _ in points}
    losses: dict[tuple[int, int] | None, Tensor] = {}
    read = None
    for schedule, trace in run_all(stream, (stream.full, *without)):
        read = read or Reader.of(trace.output, target, stream.mask)
        losses[without.get(schedule)] = read(trace.output)[1]["loss"]
    return {"loss_change": measure([losses[None] - losses[s, i] for s, i, _ in points], points, "block")}


# A block's update against one gradient, per example: <f, g>, cos(f, g), |g|
_Seen = tuple[Float[Tensor, " example"], Float[Tensor, " example"], Float[Tensor, " example"]]


def _look(update: Tensor, gradient: Tensor, factor: Float[Tensor, " example"], mask: Tensor | None) -> _Seen:
    product, size = dot(update, gradient, mask), norm(gradient, mask)
    angle = cosine(update, gradient, mask, product=product, lengths=(norm(update, mask), size))
    return product / factor, angle, size / factor


def _backprop(stream: Stream, target: Tensor, at: str) -> dict[str, Measure]:
    """One forward and one backward; each gradient is looked at when it arrives, and let go."""
    seen: dict[Point, _Seen] = {}
    updates: dict[Point, Tensor] = {}
    own: set[bool] = set()
    with recorded():
        state, rest = _from_leaf(stream)
        first = state
        for step in rest.walk():
            point, section = Point(step.section, step.index), stream.sections[step.section]
            _check_path(state, step.before, f"the entry of {section.name}")
            _check_path(step.before, step.after, f'block "{section.blocks[step.index].name}"')
            state = step.after
            updates[point] = step.update.detach()
            own.add(step.own_branch)

            def hook(gradient: Tensor, point: Point = point) -> None:
                seen[point] = _look(updates.pop(point), gradient, factor, stream.mask)

            (step.before if at == "input" else step.after).register_hook(hook)
        loss, factor = _loss(rest, step.after, step.section, target)
        _gradient(loss * factor, first)
    seen = dict(sorted(seen.items()))
    firsts = [seen[point] for point in seen if point.index == 0]
    found = _measures(seen, own, loss.detach())
    if len(firsts) > 1:
        points = [point for point in seen if point.index == 0][:-1]
        ratios = [ratio(gradient, firsts[-1][2]) for _, _, gradient in firsts[:-1]]
        found["gradient_ratio"] = measure(ratios, points, "block", note="to the first block of the last section")
    return found


def _plugin(stream: Stream, target: Tensor, at: str) -> dict[str, Measure]:
    """The states of the last section, each handed to the readout."""
    last = last_section(stream.lengths)
    seen: dict[Point, _Seen] = {}
    own, losses = set(), []
    for step in stream.walk():
        if step.section < last:
            continue
        if not losses:
            loss, *before = _at_readout(stream, step.before, last, target)
            losses.append(loss)
        loss, *after = _at_readout(stream, step.after, last, target)
        losses.append(loss)
        own.add(step.own_branch)
        seen[Point(last, step.index)] = _look(step.update, *(before if at == "input" else after), stream.mask)
        before = after
    changes = [after - before for before, after in pairwise(losses)]
    return _measures(seen, own, losses[-1]) | {"loss_change": measure(changes, list(seen), "block")}


def _at_readout(stream: Stream, h: Tensor, section: int, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss that the readout gives right at a state, its gradient there times a factor, and the factor."""
    with recorded():
        state = leaf(h)
        loss, factor = _loss(stream, state, section, target)
        return loss.detach(), _gradient(loss * factor, state), factor


def _loss(
    stream: Stream, h: Tensor, section: int, target: Tensor
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
    """The loss that the readout gives at a state, and a power of 2 by which float16 can hold its gradient.

    Below 6e-8 float16 has no numbers, and the gradient of an answer that is certain by 17 nats is smaller. Times the
    factor its length in the output is about 1. Other precisions need none.
    """
    output = stream.exit(h, section)
    output = output.to(wide(output.dtype))
    loss = Reader.of(output, target, stream.mask)(output)[1]["loss"]
    factor = torch.ones_like(loss)
    if h.dtype == torch.float16 and loss.requires_grad:
        size = norm(torch.autograd.grad(loss.sum(), output, retain_graph=True)[0])
        factor = torch.ldexp(factor, -torch.frexp(size.nan_to_num(1, 1)).exponent.clamp(-100, 0))
    return loss, factor


def _from_leaf(stream: Stream) -> tuple[Tensor, Stream]:
    """The first state, and the stream that starts from it; gradients end there, so no parameter needs to be frozen."""
    first, *others = stream.sections
    with torch.no_grad():
        state = leaf(first.entry(stream.input))
    return state, replace(stream, sections=(replace(first, entry=lambda _: state), *others))


def _check_path(before: Tensor, after: Tensor, place: str) -> None:
    """Refuse a place that cuts the gradient: a backward to the first state would not even run after it."""
    goal = get_gradient_edge(before).node
    pending, met = [get_gradient_edge(after).node] if after.requires_grad else [], set()
    while pending:
        node = pending.pop()
        if node is goal:
            return
        if node is not None and node not in met:
            met.add(node)
            pending.extend(following for following, _ in node.next_functions)
    raise ValueError(
        f"gradients: {place} cuts the gradient (torch.no_grad or .detach() inside of it?), so states before it have "
        "none; take that out, or measure later blocks only (blocks=...)"
    )


def _gradient(loss: Tensor, state: Tensor) -> Tensor:
    """The gradient of each example's loss; with respect to the state only, so that none of parameters is computed."""
    gradient = torch.autograd.grad(loss.sum(), state, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "gradients: the loss cannot be differentiated with respect to the states; is there a torch.no_grad or "
            ".detach() in the readout?"
        )
    return gradient


def _measures(seen: dict[Point, _Seen], own: set[bool], loss: Float[Tensor, " example"]) -> dict[str, Measure]:
    """The quantities that both kinds have; undefined for examples without a finite loss."""
    lost = ~loss.isfinite()

    def columns(values: Iterable[Tensor]) -> list[Tensor]:
        return [v.masked_fill(lost, torch.nan) for v in values]

    update, points = origin(own), list(seen)
    return {
        "gradient_cosine": measure(columns(c for _, c, _ in seen.values()), points, "block", update=update),
        "gradient_norm": measure(columns(g for _, _, g in seen.values()), points, "block"),
        "first_order_change": measure(columns(p for p, _, _ in seen.values()), points, "block", update=update),
    }
