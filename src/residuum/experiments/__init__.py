"""The papers' experiments: for each paper its runs, figures and claims, at three scales."""

from importlib import import_module

from residuum.claims import Study
from residuum.names import unknown

PAPERS = ("p0", "p1", "p2", "p3")  # each a file of this package with study(scale)
SCALES = ("tiny", "small", "paper")


def study(paper: str, scale: str) -> Study:
    """The study of one paper.

    Args:
        paper: One of `PAPERS`.
        scale: One of `SCALES`.

    Raises:
        ValueError: If there is no such paper or scale; the nearest is offered.
    """
    if paper not in PAPERS:
        raise unknown("paper", paper, PAPERS)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    return import_module(f"residuum.experiments.{paper}").study(scale)
