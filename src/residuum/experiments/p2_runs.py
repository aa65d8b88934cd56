"""P2's networks at three scales, and the curves that are read from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from residuum.claims import Results
from residuum.data.catalogue import FACTS
from residuum.effects import Effect, over_examples
from residuum.experiments.seeds import done, last
from residuum.models import ResNetConfig
from residuum.runs import DataConfig, Run
from residuum.training import TrainConfig

SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
# The numbers of the paper by data set: sections 1, 2, 3, then the whole network. The predicted depths are recomputed
# from its distances, because those that it prints are exchanged between the data sets (and 46 is printed as 36).
DISTANCE = {"mnist": (130, 160, 200, 490), "cifar10": (250, 290, 320, 860)}
SCALED = {"mnist": (4.11, 3.12, 4.58, 11.81), "cifar10": (3.69, 3.81, 4.27, 11.77)}
CROSSING = {"mnist": (40, 32, 40, 112), "cifar10": (34, 38, 48, 120)}
PREDICTED = {"mnist": (42, 32, 46, 120), "cifar10": (37, 39, 43, 119)}
PRINTED = {"mnist": (37, 39, 43), "cifar10": (42, 32, 36)}
# Read of profiles by figures and claims.
QUANTITIES = {"profile": ("perturbation", "scaled_perturbation"), "initial": ("scaled_perturbation",)}
EPS = 0.1  # the mean scaled perturbation to reach, P2 section 3.5

Curve = dict[int, float]  # a number by the depth L


@dataclass(frozen=True)
class Scale:
    """How far the study goes.

    Attributes:
        about: What it is, for the reader.
        data: What stands for each of P2's data sets.
        depths: Blocks per section, L.
        widths: Channels of the sections.
        seeds: Seeds; each is a sweep over all depths.
        epochs: Of each data set.
        longer: Factor of the ablation's long trainings.
        decay: Weight decay of the ablation's trainings with decay.
        ablated: Depths of the ablation.
        repeated: Seeds of the ablation, and of the shallowest and the deepest networks.
        measured: Test images that are measured.
        deep: Depth from which the shape within a section and the slope beside the null model are read.
        plateau: Depth from which the paper's distances do not grow, by data set.
        ranges: Small, medium and large depths, P2 section 3.2: MNIST up to 20 and 20 to 80, CIFAR-10 up to 15 and 15 to
            70, above that no growth. Large is from 70 on for both: from 80 on MNIST has three depths.
    """

    about: str
    data: dict[str, DataConfig]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: dict[str, int]
    longer: int
    decay: float
    ablated: tuple[int, ...]
    repeated: tuple[int, ...]
    measured: int | None
    deep: int
    plateau: dict[str, int]
    ranges: dict[str, tuple[tuple[int, int], ...]]


PLATEAU = {"mnist": 80, "cifar10": 70}  # P2, section 3.2
RANGES = {"mnist": ((2, 20), (20, 80), (70, 100)), "cifar10": ((2, 15), (15, 70), (70, 100))}

SCALES = {
    "tiny": Scale(
        about="The scikit-learn digits in place of both data sets, one epoch, L = 1 and 2: it shows that everything "
        "runs. Its verdicts mean nothing.",
        data={"mnist": DataConfig("digits", train=100, test=50), "cifar10": DataConfig("digits", train=100, test=50)},
        depths=(1, 2),
        widths=(4, 4, 4),
        seeds=(0, 1),
        epochs={"mnist": 1, "cifar10": 1},
        longer=2,
        decay=0.01,
        ablated=(1, 2),
        repeated=(0, 1),
        measured=50,
        deep=1,
        plateau=dict.fromkeys(SETS, 1),
        ranges=dict.fromkeys(SETS, ((1, 2),) * 3),
    ),
    "small": Scale(
        about="Half the widths (8, 16, 32), 10,000 training images, 3 epochs, batches of "
        "64, L from 2 to 32, 3 seeds. The paper's plateaus lie above L = 70, out of reach here.",
        data={"mnist": DataConfig("mnist", train=10_000, test=2000), "cifar10": DataConfig("cifar10", 10_000, 2000)},
        depths=(2, 4, 8, 16, 32),
        widths=(8, 16, 32),
        seeds=(0, 1, 2),
        epochs={"mnist": 3, "cifar10": 3},
        longer=3,
        # The sum of learning rate x decay over the 471 steps (1413 if longer) comes to 0.25 (0.75); over the 78,000
        # steps of the full recipe at 1e-4 it is 0.41. With 1e-4 it would be 0.003, and decay could have no effect.
        decay=0.01,
        ablated=(4, 16),
        repeated=(0, 1, 2),
        measured=1000,
        deep=8,
        plateau=PLATEAU,
        ranges=RANGES,
    ),
    "paper": Scale(
        about="The paper's depths, widths, images and batches; optimiser, epochs and weight decay, which it does not "
        "give, are those of pre-activation ResNets (He et al. 2016).",
        data={"mnist": DataConfig("mnist"), "cifar10": DataConfig("cifar10")},
        depths=(*range(2, 71, 2), 80, 90, 100),
        widths=(16, 32, 64),
        seeds=(0,),
        epochs={"mnist": 30, "cifar10": 200},
        longer=2,
        decay=1e-4,
        ablated=(10, 40),
        repeated=(0, 1, 2),
        measured=None,
        deep=8,
        plateau=PLATEAU,
        ranges=RANGES,
    ),
}


@cache
def run_of(scale: str, data: str, depth: int, seed: int, *, decay: float = 1e-4, longer: bool = False) -> Run:
    """One network of the study.

    Args:
        scale: Of `SCALES`.
        data: Of `SETS`.
        depth: Blocks per section, L.
        seed: Of everything.
        decay: Weight decay.
        longer: Train as long as the ablation's long trainings.

    Source: P2 (Hauser 2019), section 3; the optimiser is ours. The head has batch norm and ReLU, because the head as
    printed diverges at this learning rate.
    """
    at = SCALES[scale]
    channels = FACTS[at.data[data].name].shape[0]
    network = ResNetConfig(blocks=(depth,) * 3, widths=at.widths, channels=channels, head="norm")
    training = TrainConfig(
        epochs=at.epochs[data] * (at.longer if longer else 1),
        batch=_batch(data, depth) if scale == "paper" else 64,
        weight_decay=decay,
        augment="crop_flip" if data == "cifar10" and scale != "tiny" else "none",
    )
    return Run(network, at.data[data], training, ("perturbation",), at.measured, seed)


def _batch(data: str, depth: int) -> int:
    """P2, section 3. Its MNIST networks of L = 62 to 68 have no batch; we take that of the deeper ones."""
    if data == "mnist":
        return 128 if depth <= 60 else 64
    return 256 if depth <= 28 else 128 if depth <= 58 else 64


Sweep = dict[int, dict[int, Run]]  # by seed, then by depth


def sweep_of(scale: str, data: str) -> Sweep:
    """The main sweep over depths."""
    at = SCALES[scale]
    return {seed: {depth: run_of(scale, data, depth, seed) for depth in at.depths} for seed in at.seeds}


def ends_of(scale: str, data: str) -> Sweep:
    """The shallowest and the deepest networks, of several seeds where the sweep has one."""
    at = SCALES[scale]
    ends = at.depths[0], at.depths[-1]
    return {seed: {depth: run_of(scale, data, depth, seed) for depth in ends} for seed in at.repeated}


def ablation_of(scale: str, data: str) -> dict[tuple[bool, bool], Sweep]:
    """The 2 x 2 ablation: by (with weight decay, longer), each a sweep over few depths."""
    at = SCALES[scale]
    return {
        (decays, longer): {
            seed: {
                depth: run_of(scale, data, depth, seed, decay=at.decay if decays else 0.0, longer=longer)
                for depth in at.ablated
            }
            for seed in at.repeated
        }
        for decays in (False, True)
        for longer in (False, True)
    }


def runs_of(sweep: Sweep, depths: Iterable[int] | None = None) -> tuple[Run, ...]:
    """The runs of a sweep, those of some depths only."""
    wanted = None if depths is None else set(depths)
    return tuple(run for runs in sweep.values() for depth, run in runs.items() if wanted is None or depth in wanted)


def curve(
    results: Results, runs: Mapping[int, Run], name: str, section: int | None, *, network: str = "measured"
) -> Curve:
    """An index against depth, of the runs that are complete.

    Args:
        results: Finished runs by key.
        runs: By depth.
        name: Of an index, such as "scaled_distance".
        section: From 0; None is the whole network.
        network: "measured", or "initial" for the calibrated null model.
    """
    found = {}
    for depth, run in runs.items():
        if run.key in results:
            index = results[run.key].indices[network][name]
            found[depth] = index["network"] if section is None else index["sections"][section]
    return found


def test_errors(results: Results, runs: Mapping[int, Run]) -> Curve:
    """Test error at the end of training, in [0, 1], against depth."""
    return {depth: 1 - right for depth, right in last(results, done(results, runs), "test_accuracy").items()}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds at each depth, of the seeds that have it."""
    depths = sorted({depth for curve in curves for depth in curve})
    return {d: float(np.mean([curve[d] for curve in curves if d in curve])) for d in depths}


def crossing(steps: Curve) -> float:
    """Depth at which a mean scaled perturbation falls to `EPS`, between depths along a straight line of the logarithms.

    Returns:
        The first crossing; inf if the deepest network is still above, the shallowest depth if all are below.
    """
    depths = sorted(steps)
    for before, after in pairwise(depths):
        if steps[before] > EPS >= steps[after]:
            part = math.log(steps[before] / EPS) / math.log(steps[before] / steps[after])
            return before * (after / before) ** part
    return math.inf if steps[depths[-1]] > EPS else float(depths[0])


def steps_of_images(results: Results, runs: Mapping[int, Run], section: int) -> Float[np.ndarray, "example depth"]:
    """Mean scaled perturbation of a section for each image, one column per depth."""
    columns = []
    for run in runs.values():
        profile = results[run.key].profile()
        measure = profile.measures["scaled_perturbation"]
        inside = [i for i, point in enumerate(measure.points) if point.section == section]
        columns.append(measure.values[:, inside].double().mean(1).numpy())
    return np.stack(columns, 1)


def crossing_over_images(results: Results, runs: Mapping[int, Run], section: int, deepest: float | int) -> Effect:
    """The crossing of one sweep with its bootstrap interval over images; draws without one count as `deepest`."""
    depths = list(runs)
    return over_examples(
        steps_of_images(results, runs, section),
        lambda means: min(crossing(dict(zip(depths, means.tolist(), strict=True))), deepest),
    )


def within(runs: Mapping[int, Run], low: int, high: int) -> dict[int, Run]:
    """The runs whose depth lies in a range, both ends included."""
    return {depth: run for depth, run in runs.items() if low <= depth <= high}
