"""P0's networks at three scales, and the numbers that are read from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from residuum.claims import Results
from residuum.data import ClutterConfig
from residuum.data.catalogue import FACTS
from residuum.experiments.seeds import Seeds
from residuum.layers.coupling import Coupling
from residuum.layers.lipschitz import Limit
from residuum.models import ResNetConfig
from residuum.runs import DataConfig, Run
from residuum.training import TrainConfig

SETS = {
    "mnist": "MNIST",
    "clutter3": "Digitclutter-3",
    "cifar10": "CIFAR-10",
    "clutter2": "Digitclutter-2",
    "clutter4": "Digitclutter-4",
    "clutter5": "Digitclutter-5",
    "debris": "Digitclutter-3 with debris",
    "cifar100": "CIFAR-100",
}
SAMPLED = ("mnist", "clutter3", "cifar10", "cifar100")  # data sets of which smaller subsets are compared
INDICES = ("convergence", "recurrence", "divergence")
PASSIVE = ("perturbation", "update_angle", "pairs", "readouts")
# Read of profiles, beside the indices.
QUANTITIES = {"profile": ("intact_accuracy", "drop_last_accuracy", "unroll_1_accuracy", "chance")}
PROBES = (*PASSIVE, "drops_last", "drops_first", "replacements", "shuffles", "extra_runs")


@dataclass(frozen=True)
class Cell:
    """How the blocks of a network are held together and bounded.

    Attributes:
        strength: Of the coupling, lambda: 0 is ordinary training.
        bound: Lipschitz limit c of each branch; None: none.
        clipped: Whether batch norm is clipped, so that c bounds the branch; else only the convolutions are limited.
        couple: "weights", or "all" for one recurrent block with one set of statistics.
        norm: Norm inside the blocks.
        reduce: Of the coupling: "mean", or "sum" for gradients as large as those of shared weights.
        alike: How alike the blocks of a section start: 1 equal, so that only the coupling differs, 0 independent.
        fast: As many times the learning rate as a section has blocks: the step of summed gradients.
    """

    strength: float = 0.0
    bound: float | None = None
    clipped: bool = False
    couple: str = "weights"
    norm: str = "batch"
    reduce: str = "mean"
    alike: float = 1.0
    fast: bool = False

    @property
    def coupled(self) -> str:
        """The strength in words."""
        kinds = {"all": self.couple == "all", "sum": self.reduce == "sum"}
        kinds |= {"fast": self.fast, "unequal": self.alike < 1}
        return ", ".join((f"{self.strength:g}", *(name for name, given in kinds.items() if given)))


FREE, COUPLED = Cell(0.0), Cell(1.0)  # the end points without limit
BOUND = 1.0  # that of the end points with a limit
# These limit convolutions and leave batch norm alone: clipped, too, networks of the small scale cannot be compared, for
# on Digitclutter-3 they hardly learn in a thousand steps (2.9 % right, 0.8 % by chance; 8.7 % unclipped; seed 0).
LIMITED = (Cell(0.0, BOUND), Cell(1.0, BOUND))
ENDS = (FREE, COUPLED, *LIMITED)
RECURRENT = tuple(Cell(1.0, bound, couple="all") for bound in (None, BOUND))
GROUP = (Cell(0.0, norm="group"), Cell(1.0, couple="all", norm="group"))
# Strength 1 with the mean is weight sharing at a third of the learning rate (three blocks), and may just learn slower.
SUMMED, FAST = Cell(1.0, reduce="sum"), Cell(fast=True)
CLIPPED = tuple(Cell(strength, BOUND, clipped=True) for strength in (0.0, 1.0))
UNEQUAL = Cell(alike=0.0)  # as ordinary residual networks start
FIRST = ("mnist", "clutter3", "cifar10")  # data sets that come first, and on which networks also start unequal


@dataclass(frozen=True)
class Scale:
    """How far the study goes.

    Attributes:
        about: What it is, for the reader.
        blocks: Blocks of each section.
        widths: Channels of each section.
        data: What stands for each data set, all of its training images.
        updates: Optimiser steps on each data set, the same for all networks and subsets; of `batch` images.
        batch: Images of a step.
        ends: Seeds of the end points.
        seeds: Seeds of all others.
        strengths: Data sets that have strengths between 0 and 1.
        between: These strengths.
        limits: Data sets that have other limits and kinds of networks, too, and limits at strengths between.
        free_only: Data sets without limited networks.
        sizes: Sizes of the smaller subsets, by data set; of their end points without limit.
        limited_sizes: Whether also of those with a limit.
        bounds: Limits beside 1, at strengths 0 and 1.
        lr: Learning rate on MNIST and CIFAR; on Digitclutter it is 0.1.
        measured: Test images that are measured.
        memorised: Images with shuffled labels.
    """

    about: str
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    data: Mapping[str, DataConfig]
    updates: Mapping[str, int]
    batch: int
    ends: tuple[int, ...]
    seeds: tuple[int, ...]
    strengths: tuple[str, ...]
    between: tuple[float, ...]
    limits: tuple[str, ...]
    free_only: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    limited_sizes: bool
    bounds: tuple[float, ...]
    lr: float
    measured: int
    memorised: int


def _clutter(train: int, test: int) -> dict[str, DataConfig]:
    """The Digitclutter sets."""
    kinds = {f"clutter{m}": ClutterConfig(digits=m) for m in (2, 3, 4, 5)}
    kinds["debris"] = ClutterConfig(digits=3, debris="medium")
    return {
        name: DataConfig("digitclutter", train=train, clutter=kind, clutter_sizes=(train, test))
        for name, kind in kinds.items()
    }


def _updates(mnist: int, cifar: int, clutter: int) -> dict[str, int]:
    return {name: mnist if name == "mnist" else cifar if "cifar" in name else clutter for name in SETS}


SCALES = {
    "tiny": Scale(
        about="60 images of Digitclutter-2, and of the scikit-learn digits in place of MNIST and CIFAR, six steps: it "
        "shows that everything runs. Its verdicts mean nothing.",
        blocks=(2, 2),
        widths=(4, 4),
        data=dict.fromkeys(SETS, _clutter(60, 20)["clutter2"])
        | dict.fromkeys(("mnist", "cifar10", "cifar100"), DataConfig("digits", train=60, test=20)),
        updates=_updates(6, 6, 6),
        batch=20,
        ends=(0,),
        seeds=(0,),
        strengths=("mnist",),
        between=(0.5, 0.9, 0.99),
        limits=("mnist",),
        free_only=("cifar100",),
        sizes={"mnist": (20,)},
        limited_sizes=True,
        bounds=(2.0,),
        lr=0.05,
        measured=10,
        memorised=20,
    ),
    "small": Scale(
        about="Three sections of 3 blocks of 8, 16 and 32 channels, steps of 64 images: 938 on MNIST (of 60,000 "
        "images), 1125 on CIFAR and 1500 on Digitclutter (of 24,000 each). Networks are far from trained to the end, "
        "limited ones above all.",
        blocks=(3, 3, 3),
        widths=(8, 16, 32),
        data={"mnist": DataConfig("mnist", train=60_000)}
        | {name: DataConfig(name, train=24_000, test=5000) for name in ("cifar10", "cifar100")}
        | _clutter(24_000, 5000),
        updates=_updates(938, 1125, 1500),
        batch=64,
        ends=(0, 1, 2, 3, 4),
        seeds=(0, 1, 2),
        strengths=("mnist", "clutter3"),
        between=(0.5, 0.9, 0.99),
        limits=("mnist",),
        free_only=("clutter2", "clutter4", "clutter5", "debris", "cifar100"),
        sizes={"mnist": (500, 2500, 10_000), "clutter3": (2500, 10_000)},
        limited_sizes=False,
        bounds=(2.0, 0.5),
        lr=0.05,
        measured=500,
        memorised=500,
    ),
    "paper": Scale(
        about="Three sections of 5 blocks of 16, 32 and 64 channels; 20 epochs of MNIST and Digitclutter, 160 of "
        "CIFAR. The paper's own settings could not be read: all of these are a reconstruction. A limit of 0.9, "
        "which our specification lists too, lies so near to 1 that it is left out.",
        blocks=(5, 5, 5),
        widths=(16, 32, 64),
        data={name: DataConfig(name) for name in ("mnist", "cifar10", "cifar100")} | _clutter(100_000, 10_000),
        updates=_updates(9380, 62_560, 15_640),
        batch=128,
        ends=(0, 1, 2, 3, 4),
        seeds=(0, 1, 2),
        strengths=("mnist", "clutter3", "cifar10"),
        between=(0.25, 0.5, 0.75, 0.9, 0.99),
        limits=("mnist", "clutter3", "cifar10"),
        free_only=(),
        sizes=dict.fromkeys(SAMPLED, (500, 1000, 2500, 5000, 10_000, 25_000)),
        limited_sizes=True,
        bounds=(5.0, 2.0, 0.5),
        lr=0.1,
        measured=1000,
        memorised=10_000,
    ),
}


@cache  # most runs are named by many claims, and a key costs a while
def run_of(
    scale: str,
    data: str,
    cell: Cell,
    seed: int,
    *,
    size: int | None = None,
    shuffled: bool = False,
    measure: bool = True,
) -> Run:
    """One network of the study. All but `UNEQUAL` start with equal weights in each section.

    The learning rate is 0.1 on Digitclutter, of which networks learn little in few steps, and that of the scale on all
    others.

    Args:
        scale: Of `SCALES`.
        data: Of `SETS`.
        cell: Coupling and limit.
        seed: Of everything.
        size: Training images; None: all.
        shuffled: Whether their labels are shuffled.
        measure: Whether the indices are measured.

    Source: P0 (Lippl et al. 2024); networks and training are reconstructed.
    """
    at = SCALES[scale]
    images = at.data[data]
    count = size or images_of(scale, data)
    (channels, side, _), classes = FACTS[images.name][1:] if images.clutter is None else ((1, 32, 32), 10)
    limit = None if cell.bound is None else Limit(cell.bound, side, "clipped" if cell.clipped else "allowed")
    network = ResNetConfig(
        at.blocks, at.widths, channels=channels, classes=classes, norm=cell.norm, alike=cell.alike, limit=limit
    )
    epochs = max(1, round(at.updates[data] / -(-count // at.batch)))
    rate = 0.1 if SETS[data].startswith("Digitclutter") else at.lr
    training = TrainConfig(
        epochs=epochs,
        batch=at.batch,
        lr=rate * at.blocks[0] if cell.fast else rate,
        # Strength 0 is ordinary training; given as a coupling, it says what sharing is left.
        coupling=Coupling(cell.strength, cell.couple, cell.reduce),
        augment="crop_flip" if scale == "paper" and images.name in ("cifar10", "cifar100") else "none",
        test_every=max(1, epochs // 3),
    )
    given = replace(images, train=count if size else images.train, shuffled=shuffled)
    return Run(network, given, training, PROBES if measure else (), at.measured, seed)


def images_of(scale: str, data: str) -> int:
    """How many training images a data set has."""
    images = SCALES[scale].data[data]
    return images.train or FACTS[images.name].counts[0]


def of_cell(scale: str, data: str, cell: Cell, *, size: int | None = None) -> Seeds:
    """The networks of one cell by seed: more of the end points. Subsets are trained on for their accuracy only."""
    at = SCALES[scale]
    seeds = at.ends if cell in (*ENDS, UNEQUAL) and (size is None or cell.bound is None) else at.seeds
    return {seed: run_of(scale, data, cell, seed, size=size, measure=size is None) for seed in seeds}


def cells_of(scale: str, data: str) -> tuple[Cell, ...]:
    """The cells of a data set, end points first."""
    at = SCALES[scale]
    found = [cell for cell in ENDS if cell.bound is None or data not in at.free_only]
    found += [UNEQUAL] * (data in FIRST)
    if data in at.strengths:
        found += [SUMMED, FAST, *map(Cell, at.between)]
    if data in at.limits:
        found += [*RECURRENT, *GROUP, *CLIPPED, *(Cell(strength, BOUND) for strength in at.between)]
        found += [replace(cell, bound=bound) for bound in at.bounds for cell in LIMITED]
    return tuple(found)


def shuffled_of(scale: str, data: str) -> Run:
    """An ordinary network trained on shuffled labels, of few images, so that it learns them."""
    return run_of(scale, data, FREE, 0, size=SCALES[scale].memorised, shuffled=True)


def by_worth(scale: str) -> tuple[Run, ...]:
    """All runs, in such an order that the first already answer something: end points first, seed by seed."""
    at = SCALES[scale]
    later = [data for data in SETS if data not in FIRST]

    def ordered(data: str, cells: Iterable[Cell], size: int | None = None) -> list[Run]:
        table = [of_cell(scale, data, cell, size=size) for cell in cells]
        return [seeds[seed] for seed in at.ends for seeds in table if seed in seeds]

    def ends(data: str) -> list[Run]:
        return ordered(data, [cell for cell in cells_of(scale, data) if cell in ENDS])

    def sizes(data: str, cells: Sequence[Cell] = (FREE, COUPLED)) -> list[Run]:
        return [run for size in at.sizes.get(data, ()) for run in ordered(data, cells, size)]

    parts = [
        *map(ends, FIRST),
        [shuffled_of(scale, data) for data in FIRST],
        *(ordered(data, [UNEQUAL]) for data in FIRST),
        [run for data in at.strengths for run in ordered(data, [SUMMED, FAST])],
        sizes("mnist"),
        ordered("mnist", cells_of(scale, "mnist")),
        *([*ends(data), shuffled_of(scale, data)] for data in later),
        *(sizes(data) for data in at.sizes),
        *(ordered(data, cells_of(scale, data)) for data in SETS),
        *(sizes(data, LIMITED) for data in at.sizes if at.limited_sizes),
    ]
    return tuple({run.key: run for part in parts for run in part}.values())


def index_of(
    results: Results, runs: Seeds, name: str, *, network: str = "", by: str = "accuracy", none: bool = False
) -> dict[int, float]:
    """An index of iterative convergence of whole networks, by seed.

    Args:
        results: Finished runs by key.
        runs: By seed, complete.
        name: "convergence", "recurrence", "divergence", "drop_gap", ...
        network: "" after training, "initial" before.
        by: "accuracy" or "agreement".
        none: Leave out networks of which it is undefined.

    Raises:
        ValueError: If it is undefined, since the network nearly guesses.
    """
    kind = f"{network}_convergence".removeprefix("_") + ("_by_agreement" if by == "agreement" else "")
    found = {}
    for seed, run in runs.items():
        index = results[run.key].indices[kind][name]["network"]
        if index is None and not none:
            raise ValueError(f"the {name} index of seed {seed} is undefined: the network nearly guesses")
        if index is not None:
            found[seed] = index["value"]
    return found


def sharing(results: Results, runs: Seeds) -> dict[int, float]:
    """How alike the weights of a section have stayed, mean over sections, by seed: 1 equal, 0 unrelated."""
    found = {}
    for seed, run in runs.items():
        sections = [s["above_unrelated"] for s in results[run.key].history[-1]["sharing"] if s]
        found[seed] = sum(sections) / len(sections)
    return found


def errors_by_blocks(results: Results, run: Run) -> dict[int, float]:
    """Error by how many blocks of a section are left out at its end (negative) or run more; mean over the sections."""
    profile = results[run.key].profile()
    found: dict[int, list[float]] = {0: [1 - profile.mean("intact_accuracy")[-1].item()]}
    for name, sign in (("drop_last_accuracy", -1), ("unroll_1_accuracy", 1)):
        for point, right in zip(profile.measures[name].points, profile.mean(name).tolist(), strict=True):
            k = -point.length if sign < 0 else point.index - profile.lengths[point.section]
            found.setdefault(k, []).append(1 - right)
    return {k: sum(values) / len(values) for k, values in sorted(found.items())}


def guess_error(results: Results, run: Run) -> float:
    """Error of a blind guess."""
    return 1 - results[run.key].profile().mean("chance")[-1].item()


def right_by_image(results: Results, runs: Sequence[Run]) -> list[list[float]]:
    """For each run, whether each measured test image is right; the images are the same for all."""
    return [results[run.key].profile().measures["intact_accuracy"].values[:, -1].tolist() for run in runs]
