"""P1's networks at three scales, and the numbers that are read from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from residuum.claims import Results
from residuum.data.catalogue import FACTS
from residuum.experiments.seeds import Seeds, along, last
from residuum.layers.sharing import NAIVE, UBN, Sharing
from residuum.models import ResNetConfig, avgpool, resnet, scaled, single, wide
from residuum.probes import SCALES as GRID
from residuum.profiles import Profile
from residuum.rates import RATES, Steps
from residuum.runs import DataConfig, Finished, Run
from residuum.training import TrainConfig

SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
# The networks of the figures, and those that share the upper blocks of each section.
KINDS = {"110": "original", "single": "single representation", "avgpool": "average pooling", "wide": "wide"}
SHARED = {
    "naive": ("naive sharing", NAIVE),
    "ubn": ("UBN", UBN),
    "gamma": ("UBN, gamma 1", replace(UBN, gamma=1.0)),
    "statistics": ("UBN, shared statistics", replace(UBN, statistics="shared")),
    "affine": ("UBN, shared gamma and beta", replace(UBN, affine="shared")),
    "ubn146": ("146-UBN", UBN),
    "ubn182": ("182-UBN", UBN),
}
NAMES = KINDS | {name: words for name, (words, _) in SHARED.items()} | {n: f"ResNet-{n}" for n in ("32", "38", "56")}
NAMES |= {"ubn": "110-UBN", "naive": "110, naive sharing", "110": "ResNet-110"}
ABLATED = ("gamma", "statistics", "affine")
TABLE = ("32", "38", "ubn", "ubn146", "ubn182", "56", "110")  # rows of Table 1
# Table 1: per cent of errors on training and test images, means of 4 runs.
PRINTED = {
    "cifar10": dict(
        zip(
            TABLE,
            ((1.53, 7.14), (1.20, 6.99), (0.63, 6.62), (0.68, 6.82), (0.48, 6.97), (0.58, 6.53), (0.22, 6.13)),
            strict=True,
        )
    ),
    "cifar100": dict(
        zip(
            TABLE,
            (
                (12.62, 30.08),
                (10.04, 29.66),
                (7.75, 29.94),
                (7.21, 29.49),
                (6.42, 29.33),
                (5.19, 28.99),
                (1.26, 27.54),
            ),
            strict=True,
        )
    ),
}
LAST = 5  # blocks that the paper's figure 6 looks at
WHOLE = ("perturbation", "state_norm", "readouts", "gradients", "margins", "drops")
SIZED = ("perturbation", "state_norm", "readouts", "gradients")  # of networks that share


@dataclass(frozen=True)
class Scale:
    """How far the study goes.

    Attributes:
        about: What it is, for the reader.
        data: What stands for each of P1's data sets; those that are not there are not looked at.
        blocks: Blocks per section of the networks with a depth in their name, by that name.
        free: Blocks of each section that share nothing.
        factors: On the widths, by network; others have that of "110".
        epochs: Likewise.
        rates: Learning-rate schedules likewise.
        lr: Learning rate at the start.
        batch: Images of a step.
        augment: Of training images.
        seeds: Of networks that are compared with each other.
        looked: Seeds of ResNet-110 that are looked at block by block; of the other networks of the figures the first.
        memorised: Training images with shuffled labels, and epochs over them.
        measured: Images of either split that are measured.
        table: Whether Table 1 can be compared by its numbers.
    """

    about: str
    data: Mapping[str, DataConfig]
    blocks: Mapping[str, int]
    free: int
    factors: Mapping[str, float]
    epochs: Mapping[str, int]
    rates: Mapping[str, Steps]
    lr: float
    batch: int
    augment: str
    seeds: tuple[int, ...]
    looked: tuple[int, ...]
    memorised: tuple[int, int]
    measured: int | None
    table: bool


_DEPTHS = {"110": 18, "56": 9, "38": 6, "32": 5, "146": 24, "182": 30}

SCALES = {
    "tiny": Scale(
        about="The scikit-learn digits, sections of 2 to 4 blocks, one epoch: it shows that everything runs. Its "
        "verdicts mean nothing.",
        data={"cifar10": DataConfig("digits", train=60, test=40)},
        blocks={"110": 4, "56": 3, "38": 2},
        free=1,
        factors={"110": 0.25, "single": 0.04, "avgpool": 0.03, "wide": 0.025},
        epochs={"110": 1},
        rates={"110": Steps()},
        lr=0.05,
        batch=20,
        augment="none",
        seeds=(0, 1),
        looked=(0,),
        memorised=(40, 1),
        measured=40,
        table=False,
    ),
    "small": Scale(
        about="Half the width of ResNets (8, 16, 32), a sixth of the others', 5,000 training images of CIFAR-10, 8 "
        "epochs, batches of 32. Depths and sharing are the paper's. Networks end far from fitting their images.",
        data={"cifar10": DataConfig("cifar10", train=5000, test=2000)},
        blocks={name: _DEPTHS[name] for name in ("110", "56", "38")},
        free=5,
        factors={"110": 0.5, "single": 0.16, "avgpool": 0.16, "wide": 0.15},
        epochs={"110": 8},
        rates={"110": Steps()},
        lr=0.05,  # with batches of 32 about as noisy as 0.2 with the paper's, if these are 128
        batch=32,
        augment="crop_flip",
        seeds=(0, 1, 2),
        looked=(0,),
        memorised=(1000, 40),  # as many steps
        measured=500,
        table=False,
    ),
    "paper": Scale(
        about="The paper's networks, epochs and rates; batches of 128 and decay 1e-4, which it does not give, are "
        "ours, as is the range of translations (4 pixels).",
        data={"cifar10": DataConfig("cifar10"), "cifar100": DataConfig("cifar100")},
        blocks=_DEPTHS,
        free=5,
        factors={"110": 1.0},
        epochs={"110": 300, "single": 200, "avgpool": 100, "wide": 100},
        rates={
            "110": RATES["p1-resnet110"],
            "single": RATES["p1-single"],
            "avgpool": RATES["p1-avgpool"],
            "wide": RATES["p1-wide"],
        },
        lr=0.1,
        batch=128,
        augment="crop_flip",
        seeds=(0, 1, 2, 3),
        looked=(0, 1, 2, 3),
        memorised=(5000, 300),
        measured=None,
        table=True,
    ),
}


def network(scale: str, name: str, *, classes: int = 10, channels: int = 3) -> ResNetConfig:
    """One of P1's networks at the width and depth of a scale.

    Args:
        scale: Of `SCALES`.
        name: Of `NAMES`.
        classes: Number of outputs.
        channels: Channels of the images.

    Source: P1 (Jastrzebski et al. 2018), section 4; the wide network has 4, 5 and 5 blocks and the average-pooling
    network two poolings, as their printed counts of parameters say, not its text.
    """
    at, size = SCALES[scale], {"classes": classes, "channels": channels}
    factor = at.factors.get(name, at.factors["110"])
    made = {"single": single, "avgpool": avgpool, "wide": wide}.get(name)
    if made:
        return scaled(made(**size), factor)
    number = name.removeprefix("ubn") if name in ("ubn146", "ubn182") else name if name in at.blocks else "110"
    return scaled(resnet(6 * at.blocks[number] + 2, **size, sharing=sharing_of(scale, name)), factor)


def sharing_of(scale: str, name: str) -> Sharing | None:
    """What a network shares; None: nothing."""
    return replace(SHARED[name][1], free=SCALES[scale].free) if name in SHARED else None


@cache  # most runs are named by many claims, and a key costs a while
def run_of(scale: str, name: str, seed: int, *, data: str = "cifar10", shuffled: bool = False) -> Run:
    """One network of the study.

    Args:
        scale: Of `SCALES`.
        name: Of `NAMES`.
        seed: Of everything.
        data: Of `SETS`.
        shuffled: Trained on the shuffled labels of few images, without augmentation.

    Source: P1 (Jastrzebski et al. 2018), section 4 and table 1. Its learning rates 1e-5 and 1.1e-5 are read as 1e-4 and
    1e-5.
    """
    at = SCALES[scale]
    given = at.data[data]
    images, epochs = at.memorised if shuffled else (given.train, at.epochs.get(name, at.epochs["110"]))
    training = TrainConfig(
        epochs=epochs,
        batch=at.batch,
        lr=at.lr,
        rate=at.rates.get(name, at.rates["110"]),
        augment="none" if shuffled else at.augment,
        test_every=max(1, epochs // 4) if shuffled else 1,
    )
    _, (channels, _, _), classes = FACTS[given.name]
    model = network(scale, name, classes=classes, channels=channels)
    read = replace(given, train=images, shuffled=shuffled)
    if shuffled:
        return Run(model, read, training, ("perturbation", "gradients"), at.measured, seed)
    whole = name in KINDS and seed in at.looked
    probes = (*WHOLE, *(("unrolled_last",) if name == "110" else ())) if whole else SIZED
    watched = ("readout",) if whole else ()
    if name in ("110", *SHARED, "38"):
        watched = (*watched, "gradient_ratio", *(("recalibration",) if name in SHARED or name == "38" else ()))
    return Run(model, read, training, probes, at.measured, seed, probe_train=True, watch=watched)


def of(scale: str, name: str, *, data: str = "cifar10") -> Seeds:
    """The networks of a name by seed; none where the scale has none."""
    at = SCALES[scale]
    number = {"ubn146": "146", "ubn182": "182"}.get(name, name)
    if data not in at.data or (number.isdecimal() and number not in at.blocks):
        return {}
    seeds = at.looked[:1] if name in KINDS and name != "110" else at.seeds
    return {seed: run_of(scale, name, seed, data=data) for seed in seeds}


def looked(scale: str, name: str) -> Seeds:
    """The networks of the figures that are looked at block by block."""
    return {seed: run for seed, run in of(scale, name).items() if seed in SCALES[scale].looked}


def shuffled_of(scale: str, name: str) -> Run:
    """The network of a name trained on shuffled labels."""
    return run_of(scale, name, 0, shuffled=True)


def by_worth(scale: str) -> tuple[Run, ...]:
    """All runs, those first that answer most: one seed of what the figures show, then more seeds and controls."""
    core = ("110", "naive", "38", "ubn")
    again, rest = SCALES[scale].seeds[1:], (*ABLATED, "56")
    parts = [
        [of(scale, name)[0] for name in (*KINDS, *core[1:])],
        [shuffled_of(scale, name) for name in ("110", "single")],
        [of(scale, name)[seed] for seed in again for name in core],
        [shuffled_of(scale, name) for name in ("avgpool", "wide")],
        [of(scale, name)[seed] for seed in SCALES[scale].seeds for name in rest],
        *(of(scale, name, data=data).values() for data in SETS for name in TABLE),
    ]
    return tuple({run.key: run for part in parts for run in part}.values())


def columns(profile: Profile, quantity: str, section: int | None = None) -> Tensor:
    """Values of a quantity, a row per image, a column per point, of one section or of all."""
    points = profile.measures[quantity].points
    wanted = [i for i, point in enumerate(points) if section in (None, point.section)]
    return profile.measures[quantity].values[:, wanted].double()


def last_of(profile: Profile) -> int:
    """The last section that has blocks."""
    return max(s for s, length in enumerate(profile.lengths) if length)


def unrolled(scale: float, quantity: str) -> str:
    """The name of a quantity along the extra runs of the last block, at a scale of its update."""
    return f"unrolled_{scale:g}_{quantity}"


_ANSWERS = ("accuracy", "loss", "entropy")
_EXTRA = tuple(unrolled(scale, name) for scale in GRID for name in _ANSWERS)
_DIRECTIONS = ("state_norm", "scaled_perturbation", "plugin_gradient_cosine")
# Read of profiles by figures and claims.
QUANTITIES = {
    "profile": (
        *("gradient_cosine", "scaled_perturbation", "drop_accuracy", "intact_accuracy", "chance", "margin"),
        *(*_ANSWERS, *_EXTRA, *(unrolled(scale, name) for scale in GRID for name in _DIRECTIONS)),
    ),
    "initial": ("gradient_cosine", "gradient_ratio", "gradient_norm", "scaled_perturbation", "state_norm"),
    "train": ("gradient_cosine", "scaled_perturbation", "margin", *_ANSWERS, *_EXTRA),
}


def chosen_scale(run: Finished) -> float:
    """Of the probe's scales the one with the lowest loss on training images after all extra runs."""
    train = run.profile("train")
    losses = {scale: along(train, unrolled(scale, "loss"))[-1] for scale in GRID}
    if not min(losses.values()) < math.inf:
        raise ValueError("the loss after all extra runs is infinite at every scale, so none is chosen")
    return min(GRID, key=losses.__getitem__)


def errors(results: Results, runs: Seeds, *, split: str = "test", recalibrated: bool = False) -> dict[int, float]:
    """Share of images that are wrong after training, in evaluation mode: of test or measured training images.

    Args:
        results: Finished runs by key.
        runs: By seed.
        split: "test" or "train".
        recalibrated: With statistics of batch norm re-estimated for every application, of test images only.
    """
    if split == "test":
        name = "recalibrated_test_accuracy" if recalibrated else "test_accuracy"
        return {seed: 1 - right for seed, right in last(results, runs, name).items()}
    return {seed: 1 - along(results[run.key].profile("train"), "accuracy")[-1] for seed, run in runs.items()}


def growths(profile: Profile) -> list[float]:
    """Norm of the state before the last block by that before the first, of every section."""
    norms = [along(profile, "state_norm", s) for s in range(len(profile.lengths))]
    return [values[-1] / values[0] for values in norms if values]
