"""Measuring: values per example at the points of a stream, merged over batches; their means, errors and files."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn

from residuum.calls import counting
from residuum.cutting import cut_all
from residuum.draws import means_of_draws
from residuum.files import read_tensors, write_tensors
from residuum.names import one_line
from residuum.streams import Stream

if TYPE_CHECKING:
    import pandas

_FORMAT = "residuum profile 1"


class Point(NamedTuple):
    """Where along the depth of a network a value belongs.

    Attributes:
        section: Number of the section, from 0.
        index: Number of the block in its section (at="block"), of the first block (at="span"), or of the state
            (at="state": 0 is the state after the entry, i the one after block i - 1).
        length: Number of consecutive blocks that a span covers; of a pair of blocks (at="pair") the other block.
    """

    section: int
    index: int
    length: int = 1


@dataclass(frozen=True, eq=False)
class Measure:
    """One quantity, per example and point.

    Attributes:
        values: On the CPU. nan: undefined for that example (a denominator was zero); left out of means, and counted.
        points: Where the columns of `values` belong.
        at: What the points number: blocks, states, spans of consecutive blocks, or pairs of blocks.
        update: For measures of a block's update: "own branch" if it was taken from the block's branch,
            "after - before" if from the difference of two states; else "".
        note: What a reader must know besides, such as which loss; else "".
    """

    values: Float32[Tensor, "example point"]
    points: tuple[Point, ...]
    at: Literal["block", "state", "span", "pair"]
    update: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.points):
            raise ValueError(
                f"a measure needs values [example, point] with one column per point; "
                f"values has shape {tuple(self.values.shape)}, there are {len(self.points)} points"
            )


def measure(
    columns: Sequence[Float[Tensor, " example"]],
    points: Sequence[Point],
    at: Literal["block", "state", "span", "pair"],
    *,
    update: str = "",
    note: str = "",
) -> Measure:
    """A measure from one vector of values per point, on any device and in any precision."""
    return Measure(torch.stack(list(columns), 1).float().cpu(), tuple(points), at, update, note)


# (stream of one batch, its target) -> quantities by name
Probe = Callable[[Stream, Tensor | None], dict[str, Measure]]


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything measured on one model, per example.

    Attributes:
        examples: Number of each example in its data set, ascending.
        measures: Quantities by name; all have one row per example.
        sections: Names of the sections.
        lengths: Number of blocks of each section.
        about: Remarks on quantities by their names; "loss" says which loss it is.
    """

    examples: Int64[Tensor, " example"]
    measures: dict[str, Measure]
    sections: tuple[str, ...]
    lengths: tuple[int, ...]
    about: dict[str, str]

    def mean(self, name: str) -> Float64[Tensor, " point"]:
        """Mean over the examples at each point; nan where no example has a value."""
        return self._measure(name).values.double().nanmean(0)

    def count(self, name: str) -> Int64[Tensor, " point"]:
        """Number of examples that have a value, at each point."""
        return (~self._measure(name).values.isnan()).sum(0)

    def stderr(self, name: str) -> Float64[Tensor, " point"]:
        """Standard error of the mean at each point, `s / sqrt(n)` with n - 1 in s.

        nan for fewer than two examples, and where the mean is not finite.
        """
        n = self.count(name).double()
        mean = self.mean(name)
        squares = (self._measure(name).values.double() - mean).square().nansum(0)
        return (squares / ((n - 1) * n).masked_fill((n < 2) | ~mean.isfinite(), torch.nan)).sqrt()

    def interval(
        self, name: str, *, level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[Float64[Tensor, " point"], Float64[Tensor, " point"]]:
        """Bootstrap interval of the mean at each point: examples are drawn with replacement, whole rows at a time.

        Args:
            name: The quantity.
            level: Part of the draws' means that the interval holds (percentile bootstrap).
            draws: Number of draws.
            seed: Seed of the draws.

        Returns:
            Lower and upper end; nan where no example has a value, infinite where the draw at that end is.
        """
        if not 0 < level < 1 or draws < 1:
            raise ValueError(f"interval: level must be between 0 and 1 and draws at least 1; given {level} and {draws}")
        values = self._measure(name).values.double()
        n = len(values)
        if not n:
            return self.mean(name), self.mean(name)
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for _ in range(draws):
            # Times that each example is drawn; a product with the table is faster than gathering its rows.
            times = torch.randint(n, (n,), generator=generator).bincount(minlength=n)
            drawn.append(means_of_draws(values, times[None])[0])
        means, tail = torch.stack(drawn), (1 - level) / 2
        at = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        ends, infinite = means.nanquantile(at, dim=0), means.isinf().any(0)
        if infinite.any():  # between infinite draws nothing can be interpolated
            ends = ends.where(~infinite, means.nanquantile(at, dim=0, interpolation="nearest"))
        return ends[0], ends[1]

    def select(self, names: Collection[str]) -> "Profile":
        """The same with those of its quantities that are among these names."""
        measures = {name: given for name, given in self.measures.items() if name in names}
        return replace(self, measures=measures, about=_remarks(measures))

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; it appears complete or not at all."""
        tensors = {"examples": self.examples} | {f"values/{k}": m.values.contiguous() for k, m in self.measures.items()}
        table = {
            k: {"points": m.points, "at": m.at, "update": m.update, "note": m.note} for k, m in self.measures.items()
        }
        header = {"measures": table, "sections": self.sections, "lengths": self.lengths, "about": self.about}
        write_tensors(Path(path), tensors, header, format=_FORMAT)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per quantity and point: quantity, section, point, length, at, mean, stderr, count, update."""
        import pandas as pd

        rows = []
        for name, measure in self.measures.items():
            columns = (self.mean(name).tolist(), self.stderr(name).tolist(), self.count(name).tolist())
            for point, mean, stderr, count in zip(measure.points, *columns, strict=True):
                place = (name, self.sections[point.section], point.index, point.length, measure.at)
                rows.append((*place, mean, stderr, count, measure.update))
        names = ["quantity", "section", "point", "length", "at", "mean", "stderr", "count", "update"]
        return pd.DataFrame(rows, columns=names)

    def _measure(self, name: str) -> Measure:
        if name not in self.measures:
            raise ValueError(f"the profile has no quantity {name!r}; it has {sorted(self.measures)}")
        return self.measures[name]


def load(path: Path | str) -> Profile:
    """Read a profile that `Profile.save` wrote.

    Raises:
        ValueError: If the file is something else, or cut short.
    """
    tensors, header = read_tensors(path, format=_FORMAT)
    measures = {
        name: Measure(tensors[f"values/{name}"], tuple(Point(*p) for p in m["points"]), m["at"], m["update"], m["note"])
        for name, m in header["measures"].items()
    }
    return Profile(tensors["examples"], measures, tuple(header["sections"]), tuple(header["lengths"]), header["about"])


def merge(profiles: Iterable[Profile]) -> Profile:
    """Profiles of parts of a data set as one: rows put together and sorted by example. Associative.

    Args:
        profiles: Profiles of the same model with the same probes.

    Raises:
        ValueError: If there are none, they measured different things, or an example stands in two of them.
    """
    profiles = list(profiles)
    if not profiles:
        raise ValueError("merge: no profiles given")
    first = profiles[0]
    for other in profiles[1:]:
        for what, ours, theirs in zip(
            ("sections", "quantities and points", "remarks"), _form(first), _form(other), strict=True
        ):
            if ours != theirs:
                raise ValueError(f"merge: profiles differ in their {what}: {ours} and {theirs}")
    examples, order = torch.cat([p.examples for p in profiles]).sort()
    repeated = examples[1:][examples.diff() == 0]
    if len(repeated):
        raise ValueError(
            f"merge: {len(repeated)} examples stand in several profiles, first number {int(repeated[0])}; "
            "give each part its own numbers: profile(..., first_example=...)"
        )
    measures = {
        name: Measure(torch.cat([p.measures[name].values for p in profiles])[order], m.points, m.at, m.update, m.note)
        for name, m in first.measures.items()
    }
    return Profile(examples, measures, first.sections, first.lengths, first.about)


def _form(profile: Profile) -> tuple[Any, ...]:
    """What profiles must have in common to be merged."""
    quantities = {name: (m.points, m.at, m.update, m.note) for name, m in profile.measures.items()}
    return (profile.sections, profile.lengths), quantities, profile.about


def profile(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor | None]],
    probes: Sequence[Probe],
    *,
    blocks: Sequence[str] | None = None,
    first_example: int = 0,
    failed: Callable[[Probe, Exception], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Profile:
    """Measure a model on a data set.

    Every batch is cut into a stream, every probe measures it, and the results are merged; how the data are split into
    batches changes nothing beyond rounding.

    Args:
        model: Any module that `cut` accepts, in eval mode.
        batches: (input, target) pairs in the order of the data set; the target may be None.
        probes: Functions of (stream, target); `probes.passive(...)` makes one of many passive probes.
        blocks: Names of the blocks where `cut` finds the wrong ones.
        first_example: Number of the first example, to measure a data set in parts and merge them.
        failed: Called with a probe that raises, and its error. That probe is left out, with all that it gave for
            earlier batches, and the others go on. None: the error is raised.
        progress: Called after every batch with the number of examples measured so far.

    Returns:
        The values of every example.

    Raises:
        ValueError: If there are no batches, a batch is no pair, is empty or its target has another length, no probes
            are given, two of them give the same quantity, or all have failed; and whatever `cut` refuses.
    """
    if not probes:
        raise ValueError("profile: no probes given, so there is nothing to measure")
    parts: list[Profile] = []
    done, running, errors = 0, list(probes), []

    def lose(probe: Probe, error: Exception) -> None:
        if failed is None:
            raise error
        failed(probe, error)
        running.remove(probe)
        errors.append(one_line(error))  # its text only: an error holds on to the states that it saw
        if not running:
            raise ValueError(f"profile: every probe failed: {'; '.join(dict.fromkeys(errors))}") from error

    for_cut, for_probes = tee(_checked(batches))
    with torch.no_grad():
        streams = cut_all(model, (x for x, _, _ in for_cut), blocks)
        for stream, (_, target, count) in zip(streams, for_probes, strict=True):
            examples = torch.arange(first_example + done, first_example + done + count)
            parts.append(_measure_batch(stream, target, tuple(running), examples, lose))
            done += count
            if progress is not None:
                progress(done)
    if not parts:
        raise ValueError("profile: no batches given, so there is nothing to measure")
    return merge([part.select(parts[-1].measures) for part in parts] if errors else parts)


def _measure_batch(
    stream: Stream,
    target: Tensor | None,
    probes: Sequence[Probe],
    examples: Tensor,
    lose: Callable[[Probe, Exception], None],
) -> Profile:
    if not sum(stream.lengths):
        raise ValueError(f"profile: the network has no blocks to measure; its sections have {stream.lengths} blocks")
    measures: dict[str, Measure] = {}
    for probe in probes:
        try:
            new = probe(stream, target)
        except Exception as error:  # of the probe, or whatever a network of the user says to a changed state
            lose(probe, _of_steps(probe, error) if getattr(error, "obj", None) is stream else error)
            continue
        for name, given in new.items():
            if name in measures:
                raise ValueError(f"profile: two probes give the quantity {name!r}; leave one of them out")
            if len(given.values) != len(examples):
                raise ValueError(
                    f"profile: {name!r} has values for {len(given.values)} examples, the batch has {len(examples)}"
                )
        measures |= new
    return Profile(examples, measures, tuple(s.name for s in stream.sections), stream.lengths, _remarks(measures))


def _of_steps(probe: Probe, error: AttributeError) -> TypeError:
    """The error of a probe that asks a stream for what a step has."""
    name = getattr(probe, "__name__", repr(probe))
    said = (
        f"profile: {name} asks for {error.name!r}, which a stream does not have; a function of steps is a passive probe"
    )
    return TypeError(f"{said}, measured by passive({name})")


def _remarks(measures: Mapping[str, Measure]) -> dict[str, str]:
    return {name: given.note for name, given in measures.items() if given.note}


def _checked(batches: Iterable[tuple[Any, Tensor | None]]) -> Iterator[tuple[Any, Tensor | None, int]]:
    """The batches with their numbers of examples, empty and unequal ones refused."""
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            what = f"is a {type(batch).__name__}, no pair"
            raise ValueError(f"profile: batch {number} {what}; give (input, target), or (input, None) without labels")
        x, target = batch
        first = counting(x)
        if first is None:
            raise ValueError(f"profile: batch {number} has no tensor in its input, which is a {type(x).__name__}")
        if not len(first):
            raise ValueError(f"profile: batch {number} has no examples; its input has shape {tuple(first.shape)}")
        if target is not None and (not target.ndim or len(target) != len(first)):
            raise ValueError(
                f"profile: batch {number} has {len(first)} examples, but its target has shape {tuple(target.shape)}; "
                "give one target per example, or None to measure without labels"
            )
        yield x, target, len(first)
