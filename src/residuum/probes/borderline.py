"""Borderline examples: those whose decision hangs on little, and what blocks and extra steps do to them."""

from dataclasses import replace

import torch
from torch import Tensor

from residuum.probes.gradient import gradients
from residuum.probes.intervene import SCALES, scaled
from residuum.probes.passive import passive, perturbation, state_norm, wide
from residuum.probes.readout import Reader, readouts
from residuum.profiles import Measure, Point, Probe, Profile, measure
from residuum.schedules import last_section
from residuum.streams import Stream


def margins(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
    """How clearly the network decides for the right label: `p_y - max_{k != y} p_k`, of its final output.

    In [-1, 1]; positive: right. With several labels per example: the least probable right label against the most
    probable wrong one, by sigmoids, because the m most probable are the answer (m labels: undefined if there are no
    labels, or no others). With one label per token: the mean over the tokens of an example that count, so positive
    says that the right tokens outweigh the wrong ones. Undefined for outputs that are not a number, or infinite.

    Args:
        stream: The stream of one batch.
        target: The labels, as `readouts` takes them.

    Returns:
        "margin" at the last state.

    Raises:
        ValueError: If there are no labels, or they do not fit.

    Source: P1 (Jastrzebski et al. 2018), section 4.3 and figure 6, our reading; several labels, tokens: ours.
    """
    if target is None:
        raise ValueError("margins: need labels, because they are of the right answer; the target is None")
    output = stream.run(keep=False).output
    read = Reader.of(output, target, stream.mask)
    output = output.to(wide(output.dtype))
    margin = _several(output, read.target) if read.several else _single(output, read.target)
    margin = read.per_example(margin.masked_fill(margin.isinf(), torch.nan))
    last = last_section(stream.lengths)
    note = "mean over the counted tokens of an example" if read.counted is not None else ""
    return {"margin": measure([margin], [Point(last, stream.lengths[last])], "state", note=note)}


def _single(output: Tensor, target: Tensor) -> Tensor:
    """Probability of the label less that of the most probable other class; ignored tokens get some numbers."""
    chances, label = output.softmax(-1), target.clamp(min=0)[..., None]
    return chances.gather(-1, label)[..., 0] - chances.scatter(-1, label, -torch.inf).amax(-1)


def _several(output: Tensor, target: Tensor) -> Tensor:
    """Probability of the least probable right label less that of the most probable wrong one; nan where one is none."""
    right = target.bool()
    a, b = output.masked_fill(~right, torch.inf).amin(1), output.masked_fill(right, -torch.inf).amax(1)
    # Of two likely labels by what is left of 1, because near 1 probabilities have no digits to differ in.
    margin = torch.where((a > 0) & (b > 0), (-b).sigmoid() - (-a).sigmoid(), a.sigmoid() - b.sigmoid())
    return margin.masked_fill(right.all(1) | ~right.any(1) | ~output.amax(1).isfinite(), torch.nan)


def groups(profile: Profile, *, width: float = 0.1, margin_kind: str = "full") -> dict[str, Profile]:
    """A profile taken apart by how clearly the network decides: "borderline", "correct" and "all" examples.

    Everything in a profile can then be read per group: accuracy, loss and entropy at every state (`readouts`), and
    after every extra step (`unrolled`). Examples without a margin are in "all" only; a group can be empty.

    Args:
        profile: A profile that has "margin".
        width: An example is borderline below this margin.
        margin_kind: "full": `|margin| < width`; "half": `|margin| / 2 < width`, because moving probability d from one
            class to another changes the margin by 2 d.

    Returns:
        The profiles of the groups. "correct" are right at the end of the network (margin > 0; of tokens: on balance).

    Raises:
        ValueError: If the profile has no margin, the width is not positive, or the kind is something else.

    Source: P1 (Jastrzebski et al. 2018), section 4.3 and figure 6: "less than 10 % probability change"; both readings.
    """
    if "margin" not in profile.measures:
        raise ValueError('groups: the profile has no "margin"; measure it with the probe `margins`')
    if margin_kind not in ("full", "half") or not width > 0:
        raise ValueError(
            f"groups: margin_kind must be 'full' or 'half' and width positive; given {margin_kind!r} and {width}"
        )
    margin = profile.measures["margin"].values[:, 0]
    limit = width * (2 if margin_kind == "half" else 1)
    return {
        "borderline": _rows(profile, margin.abs() < limit),
        "correct": _rows(profile, margin > 0),
        "all": profile,
    }


def unrolled(probe: Probe, *, times: int = 20, scale: float = 1.0) -> Probe:
    """A probe of the network with its last block run `times` more times, `h <- h + a f(h)`, looking at these steps.

    Any probe will do: `unrolled(readouts)` gives accuracy, loss and entropy after every step (the answer that
    "agreement" compares with is the one after the last step), `unrolled(passive(perturbation))` the size and
    `unrolled(gradients(grad="plugin"))` the direction of every step. Blocks and states are numbered on; the state
    before the first extra step is kept, as the reference.

    Args:
        probe: What is measured.
        times: Number of extra steps.
        scale: Factor a on the update of every extra step; 1 is naive.

    Returns:
        The probe; its quantities have "unrolled_1_" (the scale) before their names.

    Raises:
        ValueError: If `times` is less than 1.

    Source: P1 (Jastrzebski et al. 2018), section 4.4 and figure 7: 20 steps; the scale of the paper is not known.
    """
    if times < 1:
        raise ValueError(f"unrolled: times is {times}; it must be 1 or more")

    def of_steps(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        last = last_section(stream.lengths)
        section = stream.sections[last]
        longer = replace(section, blocks=section.blocks + (scaled(section.blocks[-1], scale),) * times)
        sections = (*stream.sections[:last], longer, *stream.sections[last + 1 :])
        found = probe(replace(stream, sections=sections), target)
        kept = {name: _from(values, last, len(section.blocks)) for name, values in found.items()}
        return {f"unrolled_{scale:g}_{name}": values for name, values in kept.items() if values.points}

    return of_steps


def unrolled_last(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
    """The last block run 20 more times at each of `SCALES`: answers, sizes and directions of these steps.

    What `unrolled` gives for `readouts`, `perturbation` and `state_norm`, and `gradients(grad="plugin")`. For sections
    before the last see `unrolls`.

    Args:
        stream: The stream of one batch.
        target: The labels.

    Raises:
        ValueError: If there are no labels, or they do not fit.

    Source: P1 (Jastrzebski et al. 2018), section 4.4 and figure 7; the grid of scales is ours.
    """
    probes = (readouts, passive(perturbation, state_norm), gradients(grad="plugin"))
    found: dict[str, Measure] = {}
    for scale in SCALES:
        for probe in probes:
            found |= unrolled(probe, scale=scale)(stream, target)
    return found


def _from(values: Measure, section: int, index: int) -> Measure:
    """The points of a section from an index on."""
    columns = [c for c, point in enumerate(values.points) if point.section == section and point.index >= index]
    return replace(values, values=values.values[:, columns], points=tuple(values.points[c] for c in columns))


def _rows(profile: Profile, chosen: Tensor) -> Profile:
    """The chosen examples of a profile."""
    measures = {name: replace(m, values=m.values[chosen]) for name, m in profile.measures.items()}
    return replace(profile, examples=profile.examples[chosen], measures=measures)
