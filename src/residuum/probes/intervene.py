"""Interventions: what the network answers with blocks dropped, repeated, exchanged, replaced, reordered or unrolled."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from residuum import schedules
from residuum.probes.readout import Reader
from residuum.profiles import Measure, Point, Probe, measure
from residuum.schedules import Schedule, full, last_section
from residuum.streams import Block, Stream, run_all

_VALUES = ("loss", "entropy", "accuracy", "agreement", "flip")
_ANY = Point(0, 0)
SCALES = (1.0, 0.5, 0.2, 0.1, 0.05)  # a grid of factors for unrolling


class Case(NamedTuple):
    """One changed network of an intervention.

    Attributes:
        name: The intervention.
        at: What the point numbers.
        point: Where the change is.
        schedule: The blocks that run.
        extra: How often the last block of the point's section runs once more after that.
        scale: Factor on the updates of these extra runs.
        skip: Whether the section is entered without the branch of its shape-changing block (`Section.skip`), while
            all blocks run. Where the section has no such way in, the case is left out.
        note: What a reader must know about the intervention.
    """

    name: str
    at: Literal["block", "state", "span", "pair"]
    point: Point
    schedule: Schedule
    extra: int = 0
    scale: float = 1.0
    skip: bool = False
    note: str = ""


Lengths = tuple[int, ...]  # numbers of blocks of each section
Intervention = Callable[[Lengths], Iterable[Case]]


def drops(lengths: Lengths) -> Iterator[Case]:
    """Each block left out: "drop", per block; of own networks also "drop_entry", per first state of a section.

    Entries (down-sampling) always run, and with them blocks that change the shape; the note says which. Only where the
    skip of such a block is known by itself (our projection blocks) "drop_entry" leaves its branch out.

    Source: P1 (Jastrzebski et al. 2018), section 4.2 and figure 3: no retraining.
    """
    for s, i in _places(lengths):
        yield Case("drop", "block", Point(s, i), schedules.drop(full(lengths), s, i))
    for s in range(len(lengths)):
        yield Case("drop_entry", "state", Point(s, 0), full(lengths), skip=True)


def drops_first(lengths: Lengths) -> Iterator[Case]:
    """The first k blocks of a section left out, k = 1 .. all: "drop_first", per span of blocks left out.

    Source: P0 (Lippl et al. 2024), a secondary reading of recurrence: of equal blocks it is the same as the last k.
    """
    for s, i in _places(lengths):
        yield Case("drop_first", "span", Point(s, 0, i + 1), schedules.drop(full(lengths), s, 0, count=i + 1))


def drops_last(lengths: Lengths) -> Iterator[Case]:
    """The last k blocks of a section left out, k = 1 .. all: "drop_last", per span of blocks left out.

    Source: P0 (Lippl et al. 2024), convergence index.
    """
    for s, i in _places(lengths):
        start = lengths[s] - i - 1
        yield Case("drop_last", "span", Point(s, start, i + 1), schedules.drop(full(lengths), s, start, count=i + 1))


def repeats(lengths: Lengths, *, times: Sequence[int] = (2,)) -> Iterator[Case]:
    """Each block run several times in a row: "repeat_2" and so on, per block.

    Args:
        lengths: Numbers of blocks.
        times: How often the block runs.

    Source: P0 (Lippl et al. 2024) names repeated evaluation of the last block; of every block: ours.
    """
    for t in times:
        for s, i in _places(lengths):
            yield Case(f"repeat_{t}", "block", Point(s, i), schedules.repeat(full(lengths), s, i, times=t))


def swaps(lengths: Lengths) -> Iterator[Case]:
    """Each two blocks of a section exchanged: "swap", per pair (index < length).

    With the network itself N + (N - 1) N (N + 1) / 3 block evaluations for one section of N blocks.

    Source: P0 (Lippl et al. 2024), shuffling the order of blocks; pairs: ours.
    """
    for s, i in _places(lengths):
        for j in range(i + 1, lengths[s]):
            yield Case("swap", "pair", Point(s, i, j), schedules.swap(full(lengths), s, i, j))


def replacements(lengths: Lengths) -> Iterator[Case]:
    """Each block replaced by each other of its section: "replace", per pair: block `length` runs in place of `index`.

    With the network itself N + (N - 1) N (N + 1) / 2 block evaluations for one section of N blocks.

    Source: P0 (Lippl et al. 2024), our reading of the recurrence index: no effect if blocks are interchangeable.
    """
    for s, i in _places(lengths):
        for j in range(lengths[s]):
            if j != i:
                yield Case("replace", "pair", Point(s, i, j), schedules.replace(full(lengths), s, i, j))


def shuffles(lengths: Lengths, *, draws: int = 10, seed: int = 0) -> Iterator[Case]:
    """k blocks of a section, drawn at random, change places so that none stays: "shuffle", k = 2 .. all.

    The value of an example is its mean over the draws. The point's length is k; the blocks are not consecutive.

    Args:
        lengths: Numbers of blocks.
        draws: Draws for each k.
        seed: Seed of the draws.

    Source: P0 (Lippl et al. 2024), shuffling the order of blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    note = f"mean over {draws} draws; length: how many blocks stand elsewhere"
    for s, length in enumerate(lengths):
        for k in range(2, length + 1):
            for _ in range(draws):
                schedule = schedules.shuffle(full(lengths), s, _order(length, k, generator))
                yield Case("shuffle", "span", Point(s, 0, k), schedule, note=note)


def unrolls(lengths: Lengths, *, times: int = 20, scales: Sequence[float] = (1.0,)) -> Iterator[Case]:
    """The last block of a section run k more times, `h <- h + a f(h)`: "unroll_1" for a = 1 and so on, k = 1 .. times.

    Per state: the one after k more steps has the number of blocks plus k. Later sections run as they are. A state that
    explodes has infinite loss and is not right.

    Args:
        lengths: Numbers of blocks.
        times: Most extra steps.
        scales: Factors a on the updates of the extra steps; 1 is naive, `SCALES` a grid.

    Source: P1 (Jastrzebski et al. 2018), section 4.4 and figure 7, in the last section; P0 (Lippl et al. 2024),
    divergence index.
    """
    for scale in scales:
        for s, length in enumerate(lengths):
            for k in range(1, times + 1) if length else ():
                yield Case(f"unroll_{scale:g}", "state", Point(s, length + k), full(lengths), k, scale)


def extra_runs(lengths: Lengths) -> Iterator[Case]:
    """The last block of a section run up to as often again as the section has blocks: "unroll_1", as of `unrolls`.

    All that the divergence index reads, at a small part of the cost of `unrolls`.

    Source: P0 (Lippl et al. 2024), divergence index.
    """
    for case in unrolls(lengths, times=max(lengths)):
        if case.extra <= lengths[case.point.section]:
            yield case


def interventions(*kinds: Intervention) -> Probe:
    """One probe of many interventions, which share all that they have in common.

    For each intervention ("drop", ...) and each of its points:

    - "drop_loss", "drop_entropy" and "drop_accuracy" of the changed network, as `readouts` has them.
    - "drop_agreement": 1 where the answer is that of the network itself, else 0.
    - "drop_flip": 1 where a wrong answer becomes right, -1 where a right one becomes wrong, else 0.

    Beside them, of the network itself, "intact_loss", "intact_entropy", "intact_accuracy", and "chance": how often a
    blind guess is right. Without labels there is no loss, accuracy or flip.

    Every distinct prefix of all changed networks is evaluated once (`run_all`), also across interventions: the block
    evaluations are the nodes of their prefix tree.

    Args:
        kinds: The interventions: `drops`, `swaps`, ...; settings by `functools.partial(unrolls, times=5)`. A function
            of your own that gives cases will do.

    Raises:
        ValueError: If none are given; when it measures, if labels do not fit or a case does not fit the stream.

    Source: P1 (Jastrzebski et al. 2018), figures 3 and 7; P0 (Lippl et al. 2024), the three perturbations.
    """
    if not kinds:
        raise ValueError("interventions() needs at least one, such as interventions(drops)")

    def probe(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
        cases = [case for kind in kinds for case in kind(stream.lengths)]
        cases = [case for case in cases if not case.skip or stream.sections[case.point.section].skip]
        read, intact, values = _run(stream, cases, target)
        last = last_section(stream.lengths)
        end = [Point(last, stream.lengths[last])]
        measures = {
            name if name == "chance" else f"intact_{name}": measure([intact[name]], end, "state", note=read.note(name))
            for name in intact.keys() & {"loss", "entropy", "accuracy", "chance"}
        }
        return measures | _gathered(cases, values, read, _about_entries(stream, cases))

    return probe


def _about_entries(stream: Stream, cases: Sequence[Case]) -> str:
    """Which blocks stand inside entries, and whether they run."""
    skipped = {case.point.section for case in cases if case.skip}
    always = [name for s, section in enumerate(stream.sections) if s not in skipped for name in section.passed]
    mostly = [name for s in sorted(skipped) for name in stream.sections[s].passed]
    return "; ".join(
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("blocks inside entries always run", always),
            ("blocks inside entries run, except for drop_entry", mostly),
        )
        if names
    )


def scaled(block: Block, scale: float) -> Block:
    """The block with its update times a scale."""
    branch = None if block.branch is None else lambda h: scale * block.branch(h)
    return Block(f"{scale:g} x {block.name}", lambda h: block(h, scale), branch)


def _run(
    stream: Stream, cases: Sequence[Case], target: Tensor | None
) -> tuple[Reader, dict[str, Tensor], list[dict[str, Tensor]]]:
    """The reader, the values of the network itself, and those of every case."""
    scales = sorted({case.scale for case in cases})
    for case in cases:
        stream.check(case.schedule)  # here, where the scaled blocks are not yet among the blocks
    intact = _Way(stream.full)
    wanted = [
        intact._replace(skipped=case.point.section) if case.skip else _Way(_schedule(case, stream.lengths, scales))
        for case in cases
    ]
    read = None
    answers: dict[_Way, Tensor] = {}
    found: dict[_Way, dict[str, Tensor]] = {}
    for way, output in _outputs(stream, scales, [intact, *wanted]):
        read = read or Reader.of(output, target, stream.mask)
        answers[way], found[way] = read(output)
        if way == intact:
            found[way]["chance"] = read.chance(output)
    for way, values in found.items():
        values["agreement"] = read.same(answers[way], answers[intact])
        if "accuracy" in values:
            values["flip"] = values["accuracy"] - found[intact]["accuracy"]
    return read, found[intact], [found[way] for way in wanted]


class _Way(NamedTuple):
    """A way through the network: a schedule, and the section that is entered by its skip."""

    schedule: Schedule
    skipped: int | None = None


def _outputs(stream: Stream, scales: Sequence[float], ways: Sequence[_Way]) -> Iterator[tuple[_Way, Tensor]]:
    """The output of each way. What is entered by a skip goes on from the states of the network itself."""
    skipped = {way.skipped for way in ways if way.skipped is not None}
    for schedule, trace in run_all(_with_scaled(stream, scales), [way.schedule for way in ways]):
        yield _Way(schedule), trace.output
        for s in skipped if schedule == stream.full else ():
            before = trace.states[s - 1][-1] if s else stream.input
            yield _Way(schedule, s), stream.finish(stream.sections[s].skip(before), (s, -1))


def _gathered(
    cases: Sequence[Case], values: Sequence[dict[str, Tensor]], read: Reader, remark: str
) -> dict[str, Measure]:
    """Measures of the values of cases; those of one point are averaged."""
    columns: dict[tuple[Case, str], dict[Point, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for case, row in zip(cases, values, strict=True):
        kind = case._replace(point=_ANY, schedule=(), extra=0)
        for name in _VALUES:
            if name in row:
                columns[kind, name][case.point].append(row[name])
    names = [f"{kind.name}_{name}" for kind, name in columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"interventions: two kinds have the quantity {twice!r}; measure them one after the other")
    return {
        f"{kind.name}_{name}": measure(
            [torch.stack(draws).mean(0) for draws in by_point.values()],
            list(by_point),
            kind.at,
            note="; ".join(filter(None, (read.note(name), kind.note, remark))),
        )
        for (kind, name), by_point in columns.items()
    }


def _with_scaled(stream: Stream, scales: Sequence[float]) -> Stream:
    """The stream with further blocks in each section: its last block, with its update times each of the scales."""

    return replace(
        stream,
        sections=tuple(
            replace(s, blocks=(*s.blocks, *(scaled(s.blocks[-1], scale) for scale in scales if s.blocks)))
            for s in stream.sections
        ),
    )


def _schedule(case: Case, lengths: Lengths, scales: Sequence[float]) -> Schedule:
    """A case's schedule on the stream with scaled blocks."""
    s, schedule = case.point.section, case.schedule
    if not case.extra:
        return schedule
    number = lengths[s] - 1 if case.scale == 1 else lengths[s] + scales.index(case.scale)
    return (*schedule[:s], schedule[s] + (number,) * case.extra, *schedule[s + 1 :])


def _places(lengths: Lengths) -> list[tuple[int, int]]:
    return [(s, i) for s, length in enumerate(lengths) for i in range(length)]


def _order(length: int, k: int, generator: torch.Generator) -> list[int]:
    """A random order of a section in which exactly k entries stand elsewhere."""
    order, chosen = list(range(length)), torch.randperm(length, generator=generator)[:k].tolist()
    while True:
        moved = [chosen[j] for j in torch.randperm(k, generator=generator)]
        if all(a != b for a, b in zip(chosen, moved, strict=True)):
            break
    for a, b in zip(chosen, moved, strict=True):
        order[a] = b
    return order
