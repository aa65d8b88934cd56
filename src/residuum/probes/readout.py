"""Readout probes: what the network would answer if it stopped after each block."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from residuum.answers import IGNORED, largest
from residuum.names import one_line
from residuum.probes.passive import ratio, token_mask, wide
from residuum.profiles import Measure, Point, measure
from residuum.schedules import last_section
from residuum.streams import Stream


def readouts(stream: Stream, target: Tensor | None) -> dict[str, Measure]:
    """What the network answers at every state: later entries and the readout run, no further block.

    The answer of the network is that of the last state. At every state:

    - "loss": cross-entropy of the label, in nats; its note says which.
    - "accuracy": 1 where the answer is right, else 0.
    - "entropy": of the predicted distribution, in nats; 0: certain, log(classes): knows nothing.
    - "agreement": 1 where the answer is the network's answer, else 0; undefined where the network has none.
    - "label_change": 1 where the answer differs from that at the state before, else 0; nothing for the first state.

    The kind of target decides what an answer is:

    - int64 [example]: one label per example. The answer is the largest output.
    - 0/1 in uint8, bool or float [example, class]: several labels. The answer is the m largest outputs, where m is the
      number of ones; right if exactly those. Loss and entropy are means over classes of the binary ones (sigmoids).
    - int64 [example, token]: one label per token, -100 where it does not count. All values are means over the tokens of
      an example that count and are not masked. For decoders this is the logit lens, with one final norm.
    - None: no labels, hence no loss and no accuracy.

    An output that is not a number, or infinite, has infinite loss and is not right; nothing agrees with it.

    A section's last state and the next one's first have the same output, which is computed once.

    Args:
        stream: The stream of one batch.
        target: The labels, or None.

    Raises:
        ValueError: If the labels do not fit the outputs (see `misfit`), or the readout fails on a state.

    Source: P1 (Jastrzebski et al. 2018), figure 5, intermediate accuracy, there in the last section only. Several
    labels: exact match, as usual for the Digitclutter images of P0 (Lippl et al. 2024). Logit lens: nostalgebraist
    (2020).
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    points: list[Point] = []
    answers: list[Tensor] = []
    read = None
    for places, output in _exits(stream):
        if read is None:
            read = Reader.of(output, target, stream.mask)
        answer, values = read(output)
        for place in places:
            points.append(place)
            answers.append(answer)
            for name, column in values.items():
                columns[name].append(column)
    columns["agreement"] = [read.same(answer, answers[-1]) for answer in answers]
    changes = [1 - read.same(a, b) for a, b in pairwise(answers)]
    measures = {name: measure(column, points, "state", note=read.note(name)) for name, column in columns.items()}
    return measures | {"label_change": measure(changes, points[1:], "state")}


def misfit(output: Tensor, target: Tensor | None) -> str:
    """Why labels cannot be compared with outputs; "" if they can."""
    if output.ndim not in (2, 3):
        return f"outputs must be [example, class] or [example, token, class], they have shape {tuple(output.shape)}"
    if target is None:
        return ""
    given, classes = f"{target.dtype} {list(target.shape)}".removeprefix("torch."), output.shape[-1]
    if target.dtype == torch.int64:
        if target.shape != output.shape[:-1]:
            return f"labels int64 {list(output.shape[:-1])} are needed for outputs {list(output.shape)}, given {given}"
        counted = target[target != IGNORED] if target.ndim == 2 else target
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            return f"labels must be in 0..{classes - 1}, they are in {int(counted.min())}..{int(counted.max())}"
        return ""
    if target.dtype not in (torch.uint8, torch.bool) and not target.is_floating_point():
        return f"labels must be int64, or 0/1 in uint8, bool or float per class, given {given}"
    if target.ndim != 2 or target.shape != output.shape:
        return f"0/1 labels [example, class] must have the shape of the outputs {list(output.shape)}, given {given}"
    if not ((target == 0) | (target == 1)).all():
        return "labels per class must be 0 or 1"
    return ""


def _exits(stream: Stream) -> Iterator[tuple[list[Point], Tensor]]:
    """The output at every state, with the states that share it."""
    last = last_section(stream.lengths)
    shared: list[Point] = []
    for step in stream.walk():
        s, i = step.section, step.index
        if i == 0:
            yield [*shared, Point(s, 0)], _exit(stream, step.before, s, 0)
            shared = []
        if s < last and i + 1 == stream.lengths[s]:
            shared = [Point(s, i + 1)]  # the entry that `exit` would run is run by the walk
        else:
            yield [Point(s, i + 1)], _exit(stream, step.after, s, i + 1)


def _exit(stream: Stream, h: Tensor, section: int, state: int) -> Tensor:
    """The output at a state, or an error that says at which."""
    try:
        return stream.exit(h, section)
    except Exception as error:  # whatever a network of the user says to a state that it never saw there
        raise ValueError(
            f"readouts: the network cannot answer from state {state} of {stream.sections[section].name}: "
            f"{type(error).__name__}: {one_line(error)}; leave the probe out, or name later blocks (blocks=...)"
        ) from error


@dataclass(frozen=True)
class Reader:
    """Reads answers and values off outputs, for one kind of target. What they are, `readouts` says.

    Attributes:
        target: The labels, or None.
        several: Whether there are several labels per example.
        counted: True where a token counts; None where outputs have no tokens.
    """

    target: Tensor | None
    several: bool
    counted: Bool[Tensor, "example token"] | None

    @classmethod
    def of(cls, output: Tensor, target: Tensor | None, mask: Tensor | None) -> "Reader":
        """The reader for these outputs and labels; refuses what does not fit."""
        target = None if target is None else target.to(output.device)
        reason = misfit(output, target)
        if reason:
            raise ValueError(f"{reason}; give None as target to measure without labels")
        counted = None
        if output.ndim == 3:
            mask = token_mask(output, mask)
            counted = output.new_ones(output.shape[:2], dtype=torch.bool) if mask is None else mask
            counted = counted if target is None else counted & (target != IGNORED)
        return cls(target, target is not None and target.dtype != torch.int64, counted)

    def __call__(self, output: Tensor) -> tuple[Tensor, dict[str, Float[Tensor, " example"]]]:
        """The answer, and the values that need nothing but this output."""
        output = output.to(wide(output.dtype))
        values = self._several(output) if self.several else self._single(output)
        answer = values.pop("answer")
        return answer, {name: self.per_example(value) for name, value in values.items()}

    def _single(self, output: Tensor) -> dict[str, Tensor]:
        logs, broken = output.log_softmax(-1), _broken(output)
        answer = output.argmax(-1).masked_fill(broken, -1)
        values = {"answer": answer, "entropy": torch.special.entr(logs.exp()).sum(-1)}
        if self.target is None:
            return values
        loss = _label_loss(output, self.target).masked_fill(broken, torch.inf)
        return values | {"loss": loss.masked_fill(self.target == IGNORED, 0), "accuracy": answer == self.target}

    def _several(self, output: Tensor) -> dict[str, Tensor]:
        ones, broken = self.target.bool(), _broken(output)
        answer = largest(output, ones).to(torch.int8).masked_fill(broken[:, None], -1)
        chances = torch.stack([output.sigmoid(), (-output).sigmoid()])
        loss = F.softplus(torch.where(ones, -output, output)).mean(1)  # see `_label_loss`
        entropy = torch.special.entr(chances).sum(0).mean(1)
        accuracy = (answer == ones).all(1) & ~broken
        return {"answer": answer, "entropy": entropy, "loss": loss.masked_fill(broken, torch.inf), "accuracy": accuracy}

    def per_example(self, value: Shaped[Tensor, "example ..."]) -> Float[Tensor, " example"]:
        """Values as floats; those of tokens as means over the tokens that count."""
        value = value if value.is_floating_point() else value.float()
        if self.counted is None:
            return value
        return ratio(value.masked_fill(~self.counted, 0).sum(1), self.counted.sum(1).to(value))

    def chance(self, output: Tensor) -> Float[Tensor, " example"]:
        """How often a blind guess is right: 1 / classes; with m labels of several, 1 / (classes choose m)."""
        classes = output.shape[-1]
        if self.several:
            return torch.tensor([1 / math.comb(classes, int(m)) for m in self.target.sum(1)])
        return torch.full((len(output),), 1 / classes)

    def same(self, a: Tensor, b: Tensor) -> Float[Tensor, " example"]:
        """1 where two answers are the same, else 0, nan where `b` is none; a mean over the tokens that count."""
        same, none = (a == b).float(), b < 0
        if self.several:
            same, none = same.amin(1), none.any(1)
        return self.per_example(same.masked_fill(none, torch.nan))

    def note(self, name: str) -> str:
        """Which loss or entropy it is."""
        if name == "loss" and self.several:
            return "binary cross-entropy with logits, mean over the classes (nats)"
        if name == "loss":
            return "cross-entropy (nats)" + (
                ", mean over the counted tokens of an example" if self.counted is not None else ""
            )
        return "of the sigmoids, mean over the classes (nats)" if name == "entropy" and self.several else ""


def _label_loss(output: Float[Tensor, "*place class"], target: Int64[Tensor, "*place"]) -> Float[Tensor, "*place"]:
    """Cross entropy as `softplus(log sum_(j != y) exp(z_j) - z_y)`, whose gradient is right for certain answers, too.

    That of `log_softmax` is `p_y - 1`, which float32 has no digits for above 10 nats, and which is 0 above 17: the
    direction of the gradient would be that of the other classes alone.
    """
    if output.shape[-1] == 1:
        return output[..., 0] * 0
    place = target.clamp(min=0)[..., None]  # those below are ignored
    others = output.scatter(-1, place, -torch.inf).logsumexp(-1)
    return F.softplus(others - output.gather(-1, place)[..., 0])


def _broken(output: Float[Tensor, "example ... class"]) -> Bool[Tensor, "example ..."]:
    """Outputs that are no distribution: not a number, or infinite. Minus infinity is an impossible class."""
    return ~output.amax(-1).isfinite()
