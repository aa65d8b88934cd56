"""Streams: one model on one batch, as a path of states that can be run under any schedule and watched step by step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from residuum.schedules import Schedule, full, path_of, tree_size

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One residual block, state -> state.

    Attributes:
        name: Where the block stands in the model.
        apply: The whole block, h_l -> h_{l+1}.
        branch: What it adds, h_l -> h_{l+1} - h_l, where the model has it as a function of its own; else None.
        layers: Modules whose chain is the branch, in their order, with nothing but 1-Lipschitz functions (ReLU) between
            them: the product of their norms bounds the branch. Empty where the branch is no such chain.
    """

    name: str
    apply: Map
    branch: Map | None = None
    layers: tuple[nn.Module, ...] = ()

    def __call__(self, h: Float[Tensor, " example *state"], scale: float = 1.0) -> Float[Tensor, " example *state"]:
        """The next state; with a scale a, `h + a (block(h) - h)`."""
        return self.apply(h) if scale == 1 else h + scale * self.update(h)

    def update(self, h: Float[Tensor, " example *state"]) -> Float[Tensor, " example *state"]:
        """What the block adds to the state."""
        return self.apply(h) - h if self.branch is None else self.branch(h)

    def step(self, h: Float[Tensor, " example *state"]) -> tuple[Tensor, Tensor]:
        """The next state and the update, from one evaluation."""
        if self.branch is not None:
            update = self.branch(h)
            return h + update, update
        after = self.apply(h)
        return after, after - h


@dataclass(frozen=True)
class Section:
    """Blocks that act on states of one shape, and the way in.

    Attributes:
        name: The section's name in tables and figures.
        entry: Last state of the previous section (first section: the model's input) -> first state of this one.
        blocks: The blocks in the order in which the model runs them.
        passed: Names of shape-changing blocks that are part of the entry; they are run but not measured.
        skip: The entry without the branch of the shape-changing block in it, where the model has it as a function of
            its own (our projection blocks: the projection alone); else None.
    """

    name: str
    entry: Callable[[Any], Tensor]
    blocks: tuple[Block, ...]
    passed: tuple[str, ...] = ()
    skip: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """One block at work on one batch.

    Attributes:
        section: Number of the section, from 0.
        index: Number of the block in its section, from 0.
        before: State h_l.
        after: State h_{l+1}.
        update: What the block added.
        own_branch: True if `update` is the output of the block's own branch, False if it is `after - before`.
        mask: True where a token counts, for token states of padded batches; else None.
    """

    section: int
    index: int
    before: Float[Tensor, " example *state"]
    after: Float[Tensor, " example *state"]
    update: Float[Tensor, " example *state"]
    own_branch: bool
    mask: Bool[Tensor, "example token"] | None = None


@dataclass(frozen=True)
class Trace:
    """What a run produced: the output, and per section its states (one more than blocks run; none if not kept)."""

    states: tuple[tuple[Tensor, ...], ...]
    output: Tensor


@dataclass(frozen=True)
class Stream:
    """One model on one batch: sections of blocks, each behind an entry, then a readout.

    Attributes:
        input: What the model was called with.
        sections: The sections in order.
        readout: Last state -> the model's output (logits, if the model returns several things).
        mask: True where a token counts, for token states of padded batches; else None.
    """

    input: Any
    sections: tuple[Section, ...]
    readout: Map
    mask: Bool[Tensor, "example token"] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of blocks of each section."""
        return tuple(len(section.blocks) for section in self.sections)

    @property
    def full(self) -> Schedule:
        """The schedule that is the model itself."""
        return full(self.lengths)

    def run(
        self,
        schedule: Schedule | None = None,
        scales: Sequence[Sequence[float]] | None = None,
        *,
        keep: bool = True,
    ) -> Trace:
        """Run the blocks that the schedule names.

        Step k applies block b = schedule[s][k] of section s: `h <- h + scales[s][k] (block_b(h) - h)`.

        Args:
            schedule: Block numbers per section; None is the model itself.
            scales: One factor per applied block, on its update; None is 1 everywhere.
            keep: Keep the states. With False only the output is kept.

        Raises:
            ValueError: If the schedule names a block that the stream does not have, or scales do not match it.
        """
        schedule = self.full if schedule is None else schedule
        self.check(schedule)
        scales = tuple((1.0,) * len(row) for row in schedule) if scales is None else scales
        if tuple(map(len, scales)) != tuple(map(len, schedule)):
            raise ValueError(
                f"scales must give one factor per applied block: the schedule runs {tuple(map(len, schedule))} "
                f"blocks per section, scales has {tuple(map(len, scales))}"
            )
        h, states = self.input, []
        for section, row, factors in zip(self.sections, schedule, scales, strict=True):
            h = section.entry(h)
            kept = [h]
            for block, factor in zip(row, factors, strict=True):
                h = section.blocks[block](h, factor)
                if keep:
                    kept.append(h)
            states.append(tuple(kept))
        return Trace(tuple(states) if keep else (), self.readout(h))

    def walk(self) -> Iterator[Step]:
        """One forward, block by block; at most three states are alive, the readout is not run."""
        h = self.input
        for s, section in enumerate(self.sections):
            h = section.entry(h)
            for i, block in enumerate(section.blocks):
                after, update = block.step(h)
                yield Step(s, i, h, after, update, block.branch is not None, self.mask)
                h = after

    def finish(self, h: Float[Tensor, " example *state"], after: tuple[int, int]) -> Tensor:
        """The output of the rest of the network, from a (changed) state.

        Args:
            h: The state to go on from.
            after: (section, block) whose output `h` replaces; block -1 is the section's entry.

        Raises:
            ValueError: If there is no such place.
        """
        s, i = after
        if not (0 <= s < len(self.sections) and -1 <= i < self.lengths[s]):
            raise ValueError(
                f"finish: no block {i} in section {s}; sections have {self.lengths} blocks, -1 is the entry"
            )
        for block in self.sections[s].blocks[i + 1 :]:
            h = block(h)
        for section in self.sections[s + 1 :]:
            h = section.entry(h)
            for block in section.blocks:
                h = block(h)
        return self.readout(h)

    def exit(self, h: Float[Tensor, " example *state"], section: int) -> Tensor:
        """The output if the network stops here: later entries and the readout, no further block.

        Args:
            h: A state of the section.
            section: Number of that section.

        Raises:
            ValueError: If there is no such section.
        """
        if not 0 <= section < len(self.sections):
            raise ValueError(f"exit: no section {section}; there are sections 0..{len(self.sections) - 1}")
        for later in self.sections[section + 1 :]:
            h = later.entry(h)
        return self.readout(h)

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule with other sections or blocks than the stream has.

        Raises:
            ValueError: With the first section or block that does not exist.
        """
        if len(schedule) != len(self.sections):
            raise ValueError(f"schedule has {len(schedule)} sections, the stream has {len(self.sections)}")
        for section, row in zip(self.sections, schedule, strict=True):
            for block in row:
                if not 0 <= block < len(section.blocks):
                    raise ValueError(
                        f'schedule names block {block} of section "{section.name}", '
                        f"which has blocks 0..{len(section.blocks) - 1}"
                    )


def run_all(stream: Stream, schedules: Iterable[Schedule]) -> Iterator[tuple[Schedule, Trace]]:
    """Run many schedules, each distinct prefix once.

    Block evaluations are the nodes of the schedules' prefix tree (`schedules.tree_size`): with the full schedule,
    dropping each of N blocks of one section costs N (N + 1) / 2 instead of N^2. States of one path are alive at a time.

    Args:
        stream: The stream to run.
        schedules: Schedules of that stream; equal ones are run once and given once.

    Yields:
        (schedule, trace) in the order of the prefix tree, not in the order given.

    Raises:
        ValueError: If a schedule does not fit the stream.
    """
    paths = {schedule: path_of(schedule) for schedule in (tuple(map(tuple, given)) for given in schedules)}
    for schedule in paths:
        stream.check(schedule)
    evaluations = 0
    stack: list[tuple[list[Schedule], int, tuple[Any, ...]]] = [(list(paths), 0, (stream.input,))]
    while stack:
        group, depth, states = stack.pop()
        if depth:
            section, block = paths[group[0]][depth - 1]
            evaluations += block >= 0
            place = stream.sections[section]
            states = (*states, (place.blocks[block] if block >= 0 else place.entry)(states[-1]))
        ended = [schedule for schedule in group if len(paths[schedule]) == depth]
        for schedule in ended:
            yield schedule, Trace(_by_section(schedule, states[1:]), stream.readout(states[-1]))
        followers: dict[tuple[int, int], list[Schedule]] = {}
        for schedule in group:
            if schedule not in ended:
                followers.setdefault(paths[schedule][depth], []).append(schedule)
        stack.extend((following, depth + 1, states) for following in reversed(followers.values()))
    assert evaluations == tree_size(paths)


def _by_section(schedule: Schedule, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    """Cut a flat path of states (entries included) into sections."""
    parts, start = [], 0
    for row in schedule:
        parts.append(states[start : start + len(row) + 1])
        start += len(row) + 1
    return tuple(parts)
