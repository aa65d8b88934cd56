"""What P3's figures share: empty panels, titles, the colour and the name of an example, and what its run left."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residuum.toys.examples import Example
from residuum.toys.networks import Chain, Flow

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

Drawn = "matplotlib.figure.Figure"
Folders = Mapping[Example, Path]
COLOURS = {0.0: "C3", 0.25: "C1", 0.5: "C0", 0.75: "C5", 1.0: "C2"}
FALLBACK = "C4"


def values(folder: Path) -> dict[str, Any]:
    """What an example's training and measures gave."""
    return json.loads((folder / "values.json").read_text(encoding="utf-8"))


def final(found: dict[str, Any], name: str) -> list[float]:
    """The last values of the history of the members that have not failed."""
    return [value for value in found["history"][-1][name] if value is not None]


def label(example: Example) -> str:
    """What tells an example from its neighbours in a figure."""
    what = f"theta = {example.theta:g}" + (" (residual network)" if example.theta == 0 else "")
    what += ", truncated gradient" if example.param_grad == "truncated" else ""
    return what + (f", from {example.stages[0].depth} blocks" if example.levels > 1 else "")


def short(example: Example) -> str:
    """The same, without what theta = 0 is."""
    return label(example).replace(" (residual network)", "")


def one(example: Example, folder: Path, member: int) -> Chain | Flow:
    """The trained network of one member alone."""
    rate, seed = example.members[member]
    network = replace(example, rates=(rate,), seeds=(seed,)).network().requires_grad_(False)
    for p, trained in zip(network.parameters(), example.trained(folder).parameters(), strict=True):
        p.copy_(trained[member : member + 1])
    return network


def line_of(example: Example) -> dict[str, Any]:
    """Colour and style of its line."""
    style = "--" if example.param_grad == "truncated" or example.levels > 1 else "-"
    return {"color": COLOURS.get(example.theta, FALLBACK), "ls": style}


def failed_of(history: list[dict[str, Any]]) -> str:
    """How many members have failed, in words; "" if none has."""
    last = history[-1]["validation_loss"]
    lost = sum(value is None for value in last)
    return f" ({lost} of {len(last)} failed, left out)" if lost else ""


def blank(rows: int, columns: int, size: float) -> tuple["matplotlib.figure.Figure", list[list["Axes"]]]:
    """A figure of empty panels, each so many inches wide and high."""
    from matplotlib.figure import Figure as Empty

    wide = size * 1.5 if columns == 1 else size * columns
    figure = Empty(figsize=(max(wide, 7.5), size * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def titled(figure: "matplotlib.figure.Figure", what: str, numbers: Sequence[str]) -> None:
    """Give a figure its conclusion as a title: what it is of, and the numbers, two in a line."""
    lines = ["; ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    figure.suptitle("\n".join([f"{what}:", *lines]), fontsize=11)
