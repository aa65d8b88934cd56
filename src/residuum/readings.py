"""Numbers in plain language: values, and what a newcomer reads beside a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf, isfinite, log10
from typing import NamedTuple


class Value(NamedTuple):
    """The mean of a quantity over examples, its standard error, and over how many examples it is taken."""

    mean: float
    stderr: float
    count: int

    @property
    def low(self) -> float:
        """Two standard errors below the mean."""
        return self.mean - 2 * self.stderr

    @property
    def high(self) -> float:
        """Two standard errors above the mean."""
        return self.mean + 2 * self.stderr


Table = dict[str, dict[tuple[int, int, int], Value]]  # quantity -> (section, point, length) -> value

# The words for the size of a step, from this part of the state's length on. Ours, not a paper's; the page states them.
SIZES = (
    (1.0, "a step longer than the state itself"),
    (0.5, "a large step"),
    (0.2, "a clear step"),
    (0.05, "a small step"),
    (0.0, "hardly a change"),
)


@dataclass(frozen=True)
class Row:
    """One block as the table shows it; None is a quantity that was not measured."""

    place: str
    name: str
    step: Value | None
    initial: Value | None
    angle: Value | None
    accuracy: Value | None
    accuracy_before: Value | None
    agreement: Value | None
    label_change: Value | None

    @property
    def shade(self) -> int:
        """0 (hardly a change) to 4 (longer than the state), for the drawing of the network; -1: not measured."""
        return -1 if self.step is None else shade(self.step.mean)

    @property
    def reading(self) -> str:
        """What the block does, in sentences."""
        parts = (_size(self), _direction(self.angle), _effect(self), _changes(self.label_change))
        return " ".join(part for part in parts if part)


def finite(value: float | int) -> float | None:
    """A number as JSON can say it: None for infinity and for what is none."""
    return float(value) if isfinite(value) else None


def signed(text: str) -> str:
    """A number as it is printed, with a minus for the hyphen; what is rounded to 0 has no sign: "-0.00" -> "0.00"."""
    return text.lstrip("+-") if set(text) <= set("+-0.") else text.replace("-", "\u2212")


def percent(value: float | int) -> str:
    """0.1234 -> "12.3 %" (the space does not break)."""
    part = 100 * value
    digits = 0 if part == 0 or abs(part) >= 99.95 else 1 if abs(part) >= 0.95 else 2
    return f"{signed(f'{part:.{digits}f}')}\u00a0%"


def points(value: float) -> str:
    """A difference of two percentages: -0.012 -> "−1.2 points"."""
    return f"{signed(f'{100 * value:+.1f}')}\u00a0points"


def number(value: float | int) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("-", "\u2212")
    text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    return signed(text)


def with_error(value: Value) -> str:
    """A mean to the last digit that its standard error leaves: 1.1312, 0.0181 -> "1.131 ± 0.018"."""
    digits = 1 - floor(log10(value.stderr)) if 0 < value.stderr < inf else -1
    if digits > 6 and abs(value.mean) >= 1e-4:
        return f"{value.mean:,.6f} \u00b1 {number(value.stderr)}".replace("-", "\u2212")
    if not 0 <= digits <= 6:
        return f"{number(value.mean)} \u00b1 {number(value.stderr)}"
    return f"{value.mean:,.{digits}f} \u00b1 {value.stderr:,.{digits}f}".replace("-", "\u2212")


def cosine(value: float) -> str:
    """Two digits and a sign: 0.0831 -> "+0.08"."""
    return signed(f"{value:+.2f}")


def whole(value: float) -> str:
    """A percentage without needless digits: 0.1 -> "10 %"."""
    return f"{100 * value:g}\u00a0%"


def shade(step: float) -> int:
    """Which of the words of `SIZES` fits a scaled perturbation: 4 for the first, 0 for the last."""
    return next(len(SIZES) - 1 - i for i, (least, _) in enumerate(SIZES) if step >= least)


def place(section: int, block: int, lengths: Sequence[int]) -> str:
    """A block's number as the page writes it, from 1: "7", or "2.3" (section 2, block 3) where there are sections."""
    return f"{section + 1}.{block + 1}" if len(lengths) > 1 else f"{block + 1}"


def rows(trained: Table, initial: Table | None, sections: Sequence[tuple[str, Sequence[str]]]) -> list[Row]:
    """Every block of the network with what was measured at it.

    Args:
        trained: The model's values.
        initial: Those of the network at initialisation, or None.
        sections: Name and block names of each section.
    """
    lengths = [len(names) for _, names in sections]
    found = []
    for s, (_, names) in enumerate(sections):
        for i, name in enumerate(names):
            here, after = (s, i, 1), (s, i + 1, 1)
            found.append(
                Row(
                    place(s, i, lengths),
                    name,
                    trained.get("scaled_perturbation", {}).get(here),
                    (initial or {}).get("scaled_perturbation", {}).get(here),
                    trained.get("update_angle", {}).get(here),
                    trained.get("accuracy", {}).get(after),
                    trained.get("accuracy", {}).get((s, i, 1)),
                    trained.get("agreement", {}).get(after),
                    trained.get("label_change", {}).get(after),
                )
            )
    return found


def _size(row: Row) -> str:
    if row.step is None:
        return ""
    word = SIZES[len(SIZES) - 1 - row.shade][1]
    text = f"Changes the state by {percent(row.step.mean)} of its length: {word}"
    if row.initial is None or row.initial.mean <= 0:
        return text + "."
    ratio = row.step.mean / row.initial.mean
    if 0.8 <= ratio <= 1.25:
        return text + ", about as at initialisation."
    if ratio < 0.1:
        return text + ", less than a tenth of that at initialisation."
    return text + f", {ratio:.1f} times that at initialisation."


def _direction(angle: Value | None) -> str:
    if angle is None:
        return ""
    if abs(angle.mean) <= max(0.1, 2 * angle.stderr):
        return "Moves nearly at right angles to the block before: a new direction."
    words = {
        (True, True): "Goes on in much the same direction as the block before.",
        (True, False): "Leans towards the direction of the block before.",
        (False, False): "Leans against the direction of the block before: undoes a part of it.",
        (False, True): "Mostly undoes the block before.",
    }
    return words[angle.mean > 0, abs(angle.mean) > 0.5]


def _effect(row: Row) -> str:
    if row.accuracy is None:
        return (
            "" if row.agreement is None else f"Stopping here gives the final answer for {percent(row.agreement.mean)}."
        )
    text = f"Stopping here would be right for {percent(row.accuracy.mean)}"
    if row.accuracy_before is None:
        return text + "."
    change = row.accuracy.mean - row.accuracy_before.mean
    clear = abs(change) > 2 * (row.accuracy.stderr**2 + row.accuracy_before.stderr**2) ** 0.5
    return f"{text} ({points(change)}{'' if clear else ', within the error'})."


def _changes(change: Value | None) -> str:
    if change is None or change.mean < 0.005:
        return ""
    return f"It changes the answer of {percent(change.mean)} of the examples."


def settings(values: Mapping[str, object], names: Mapping[str, str]) -> str:
    """Settings in one line; what is None was not used and is left out: {"lr": 0.1, "clip": None} -> "lr 0.1".

    Args:
        values: The settings.
        names: What values are called that have a name.
    """
    parts = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            text = f"({settings(value, names)})"
        elif isinstance(value, list | tuple):
            text = ", ".join(map(str, value))
        else:
            text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else names.get(str(value), str(value))
        parts.append(f"{name.replace('_', ' ')} {text}")
    return "; ".join(parts)


def shortened(text: str, longest: int) -> str:
    """A text on one line, with an ellipsis if it is longer."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "\u2026"


def listed(items: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
