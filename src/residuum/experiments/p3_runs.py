"""P3's examples at three scales: which are trained, and what is read from those that are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from residuum.claims import Results
from residuum.jobs import Job
from residuum.toys.digits import NoisyDigits
from residuum.toys.examples import Example

THETAS = (0.0, 0.5, 1.0)
PAPER = {
    "sine": Example("sine"),
    "spirals": Example(
        "spirals",
        depth=25,
        time=12.5,
        width=6,
        activation="tanh",
        epochs=300,
        batch=10,
        optimiser="adam",
        rates=(1e-3,),
    ),
    "stiff": Example(
        "stiff",
        depth=20,
        time=2.0,
        width=10,
        batch=0,
        optimiser="adam",
        rates=(1e-3,),
        every=2,
        epochs=2000,
        solver="anderson",
    ),
    "lotka_volterra": Example(
        "lotka_volterra",
        depth=50,
        time=10.0,
        width=10,
        batch=0,
        optimiser="adam",
        rates=(1e-3,),
        epochs=1000,
        solver="anderson",
    ),
    "wave": Example(
        "wave",
        depth=5,
        time=5.0,
        width=10,
        batch=0,
        optimiser="adam",
        rates=(1e-3,),
        epochs=3000,
        solver="anderson",
        jacobian=0.1,
    ),
    "arms": Example(
        "arms",
        theta=0.0,
        depth=10,
        time=10.0,
        width=10,
        batch=0,
        optimiser="adam",
        rates=(1e-2,),
        decay=0.1,
        epochs=1000,
        solver="anderson",
    ),
}


# Of MNIST under noise: theta and what is known of the spectrum, by the names of the paper's table.
NETWORKS = {
    "plain": (0.0, "free"),
    "1Lip": (0.0, "unit"),
    "theta = 0": (0.0, "stable"),
    "theta = 0.25": (0.25, "stable"),
    "theta = 0.5": (0.5, "stable"),
    "theta = 0.75": (0.75, "stable"),
    "theta = 1": (1.0, "stable"),
}
COMPARED = ("plain", "1Lip", "theta = 0", "theta = 0.75")
BOUNDS = {"plain": 0.0, "1Lip": 1.0, "2Lip": 2.0}  # of the spirals whose arms are 1 apart, by the paper's names
LEVELS = 3  # 7, 13 and 25 blocks of the spirals


def by_levels(example: Example) -> Example:
    """The same, begun with few blocks that are refined."""
    return replace(example, levels=LEVELS)


def at(example: Example, theta: float, gradient: str = "exact") -> Example:
    """The same with another theta, 0 for the residual network, and the exact or the truncated gradient."""
    return replace(example, theta=theta, param_grad=gradient)


def with_truncation(example: Example, thetas: Sequence[float] = (0.5, 1.0)) -> list[Example]:
    """Each theta with the exact gradient and with the truncated one of the paper's code."""
    return [at(example, theta, gradient) for theta in thetas for gradient in ("exact", "truncated")]


def equal_time(example: Example, depths: Sequence[int], rates: Sequence[float], theta: float) -> list[Example]:
    """Every depth with dt = T / depth; all rates of one are trained side by side."""
    return [replace(example, theta=theta, depth=depth, rates=tuple(rates)) for depth in depths]


@dataclass(frozen=True)
class Grid:
    """Depths at equal T and learning rates.

    Attributes:
        example: What they are of; each theta has every depth.
        depths: From the fewest blocks.
        rates: From the lowest.
        level: The validation loss that is to be reached.
        nothing: The loss of an answer that does not look at the input: a training that ends above it was not stable.
    """

    example: Example
    depths: tuple[int, ...]
    rates: tuple[float, ...]
    level: float
    nothing: float

    def jobs(self, theta: float) -> list[Example]:
        """One example per depth."""
        return equal_time(self.example, self.depths, self.rates, theta)


@dataclass(frozen=True)
class Scale:
    """How far the study goes.

    Attributes:
        about: What it is, for the reader.
        sine: The regression, T = 1; theta is set by `at`, as for the others.
        longer: The regression, T = 5.
        deep: Blocks of a residual network on the same equation, T = 1.
        spirals: The two spirals.
        stiff: The stiff equation.
        every: Which steps of it are trained on: every so many.
        prey: Prey and predators.
        wave: The regression whose right-hand side is penalised.
        wave_thetas: Those of it.
        divergences: The weights of its penalty.
        arms: The spirals whose arms are 1 apart; the bound is set by `bounded`.
        grids: By the example's name.
        digits: MNIST under noise; theta, spectrum and seed are set by `noisy_networks`.
        seeds: Of the networks of it that are compared.
        others: Of the other networks, which are drawn only.
    """

    about: str
    sine: Example
    longer: Example
    deep: int
    spirals: Example
    stiff: Example
    every: tuple[int, ...]
    prey: Example
    wave: Example
    wave_thetas: tuple[float, ...]
    divergences: tuple[float, ...]
    arms: Example
    grids: dict[str, Grid]
    digits: NoisyDigits
    seeds: int
    others: int

    def penalised(self, theta: float, divergence: float) -> Example:
        """The regression with a penalty on the divergence of its right-hand side."""
        return replace(self.wave, theta=theta, divergence=divergence)

    def bounded(self, name: str) -> Example:
        """The spirals whose arms are 1 apart, with one of `BOUNDS`."""
        return replace(self.arms, bound=BOUNDS[name])

    def noisy_networks(self, name: str) -> tuple[NoisyDigits, ...]:
        """One of `NETWORKS`, with each of its seeds."""
        theta, spectrum = NETWORKS[name]
        seeds = self.seeds if name in COMPARED else self.others
        return tuple(replace(self.digits, theta=theta, spectrum=spectrum, seed=seed) for seed in range(seeds))


# Of the regression: the variance of the target, rounded; and what 10 blocks at the paper's rate reach with T = 5 in an
# independent implementation, give or take. Of the spirals: log 2; and a loss at which some 99 % are right.
_NOTHING, _LEVEL = {"sine": 0.376, "spirals": math.log(2)}, {"sine": 1e-3, "spirals": 0.03}


def _full(
    about: str,
    seeds: int,
    sine_depths: tuple[int, ...],
    spiral_depths: tuple[int, ...],
    penalised: tuple[tuple[float, ...], tuple[float, ...]],
    digits: tuple[NoisyDigits, int, int],
) -> Scale:
    """The paper's settings with so many seeds."""
    of = {name: replace(example, seeds=tuple(range(seeds))) for name, example in PAPER.items()}
    longer = replace(of["sine"], time=5.0)
    rates = {"sine": (0.01, 0.03, 0.1, 0.2, 0.4), "spirals": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
    grids = {
        "sine": Grid(longer, sine_depths, rates["sine"], _LEVEL["sine"], _NOTHING["sine"]),
        "spirals": Grid(of["spirals"], spiral_depths, rates["spirals"], _LEVEL["spirals"], _NOTHING["spirals"]),
    }
    thetas, divergences = penalised
    return Scale(
        about,
        sine=of["sine"],
        longer=longer,
        deep=50,
        spirals=of["spirals"],
        stiff=of["stiff"],
        every=(2, 5, 10),
        prey=of["lotka_volterra"],
        wave=of["wave"],
        wave_thetas=thetas,
        divergences=divergences,
        arms=of["arms"],
        grids=grids,
        digits=digits[0],
        seeds=digits[1],
        others=digits[2],
    )


def _tiny() -> Scale:
    of = {name: replace(example, seeds=(0, 1)) for name, example in PAPER.items()}
    sine = replace(of["sine"], depth=2, epochs=2, batch=50)
    spirals = replace(of["spirals"], depth=5, time=2.5, epochs=3, batch=200, draws=1)
    grids = {
        e.problem: Grid(e, (1, 2), (0.01, 0.1), _LEVEL[e.problem], _NOTHING[e.problem])
        for e in (replace(sine, time=5.0), spirals)
    }
    return Scale(
        about="A few steps of training with two seeds, few blocks: it shows that everything runs. Its verdicts mean "
        "nothing, but for those that need no runs.",
        sine=sine,
        longer=replace(sine, time=5.0),
        deep=4,
        spirals=spirals,
        stiff=replace(of["stiff"], depth=10, time=1.0, width=3, epochs=2),
        every=(2, 5, 10),
        prey=replace(of["lotka_volterra"], depth=4, time=1.0, width=3, epochs=2),
        wave=replace(of["wave"], depth=2, time=1.0, width=3, epochs=2),
        wave_thetas=(0.0, 0.5, 1.0),
        divergences=(0.0, 1.0),
        arms=replace(of["arms"], depth=2, time=2.0, width=3, epochs=1),
        grids=grids,
        digits=NoisyDigits(data="digits", images=100, epochs=1, draws=1),
        seeds=2,
        others=1,
    )


SCALES = {
    "tiny": _tiny(),
    "small": _full(
        "The paper's settings, as far as its code shows them, with 5 seeds; grids of learning rates and depths. "
        "MNIST under noise: 100 epochs of the paper's 300, 3 seeds.",
        5,
        (3, 5, 10, 20),
        (5, 10, 25),
        ((0.0, 0.5, 1.0), (0.0, 0.5, 1.0)),
        (NoisyDigits(epochs=100), 3, 1),
    ),
    "paper": _full(
        'The paper\'s settings, as far as its code shows them, with 20 seeds, since its "several" is not a number; '
        "wider grids.",
        20,
        (3, 5, 10, 20, 50, 100),
        (5, 10, 25, 50),
        ((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)),
        (NoisyDigits(), 5, 5),
    ),
}

# Training examples.
_COUNTS = {"sine": 100, "spirals": 513, "stiff": 5, "lotka_volterra": 7, "wave": 20, "arms": 400}
# A block in a training step of `_TOGETHER` members.
_MILLISECONDS = {"explicit": 0.15, "direct": 0.6, "other": 2.5, "wave": 13.0, "wave explicit": 2.0, "arms": 4.0}
_NOISY = {"free": 40, "unit": 50, "stable": 95, "implicit": 250}  # a step of all blocks, in milliseconds
# Times as long with the largest rates of the spirals' grid and with the large steps of levels: damped steps are needed.
_DAMPED = 6
_TOGETHER = 25  # members that cost about as much as one


def minutes(job: Job) -> float | None:
    """About how long an example takes on one idle core (AMD EPYC, Zen 4); None for other jobs.

    Args:
        job: The example.
    """
    if isinstance(job, NoisyDigits):
        steps = job.epochs * math.ceil(job.images / job.batch)
        return steps * job.steps * (_NOISY["implicit"] if job.theta else _NOISY[job.spectrum]) / 60_000
    if not isinstance(job, Example):
        return None
    steps = job.epochs * (math.ceil(_COUNTS[job.problem] / job.batch) if job.batch else 1)
    if job.problem in ("wave", "arms"):
        kind = "wave explicit" if job.problem == "wave" and job.theta == 0 else job.problem
    else:
        kind = "explicit" if job.theta == 0 else "direct" if job.solver == "direct" else "other"
    hard = job.problem == "spirals" and (len(job.rates) > 1 or job.levels > 1)
    damped = _DAMPED if kind == "direct" and hard else 1
    depth = sum(stage.depth for stage in job.stages) / job.levels
    return steps * depth * _MILLISECONDS[kind] / 60_000 * damped * max(1.0, len(job.members) / _TOGETHER)


BySeed = dict[int, float | int]


def final(results: Results, example: Example, name: str) -> BySeed:
    """The last value of the history, by seed, of an example with one rate.

    Raises:
        ValueError: If a training failed: what is left would be a choice of the lucky ones.
    """
    values = results[example.key].values
    failed = [why for why in values["failed"] if why]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(example.seeds)} trainings failed at theta = {example.theta:g}: {failed[0]}"
        )
    return dict(zip(example.seeds, values["history"][-1][name], strict=True))


def logs(values: BySeed) -> BySeed:
    """Decimal logarithms."""
    return {seed: math.log10(value) for seed, value in values.items()}


def quantile(results: Results, example: Example, name: str, place: int) -> BySeed:
    """A quantile of singular values over the validation points, by seed; place 0, 1, 2: 5 %, 50 %, 95 %."""
    final(results, example, "validation_loss")
    return {s: row[place] for s, row in zip(example.seeds, results[example.key].values["measured"][name], strict=True)}


def last_in_common(results: Results, one: Example, other: Example, name: str) -> tuple[int, BySeed, BySeed]:
    """The last epoch in whose row no training of both has failed, and their values there, by seed.

    Raises:
        ValueError: If there is no such row.
    """
    histories = (results[example.key].values["history"] for example in (one, other))
    rows = [pair for pair in zip(*histories, strict=True) if None not in (*pair[0][name], *pair[1][name])]
    if not rows:
        raise ValueError(f"a training failed before epoch {results[one.key].values['history'][0]['epoch']}")
    found = [dict(zip(e.seeds, row[name], strict=True)) for e, row in zip((one, other), rows[-1], strict=True)]
    return rows[-1][0]["epoch"], *found


def accuracy_under(results: Results, example: Example, change: str, size: float) -> BySeed:
    """Accuracy of spirals under "noise" of a standard deviation, or "shifted" by a length, by seed."""
    final(results, example, "validation_loss")
    return dict(zip(example.seeds, results[example.key].values["measured"][change][str(size)], strict=True))


def losses(results: Results, example: Example, name: str) -> dict[int, list[float]]:
    """The last losses at each rate, by seed; infinite where the training failed."""
    found: dict[int, list[float]] = {seed: [] for seed in example.seeds}
    for member, loss in zip(example.members, results[example.key].values["history"][-1][name], strict=True):
        found[member.seed].append(math.inf if loss is None else loss)
    return found


def stable_rate(results: Results, example: Example, nothing: float) -> BySeed:
    """The largest learning rate up to which all end below the loss of no answer; half the lowest if not even that."""
    found = {}
    for seed, row in losses(results, example, "train_loss").items():
        stable = [rate for n, rate in enumerate(example.rates) if max(row[: n + 1]) < nothing]
        found[seed] = stable[-1] if stable else example.rates[0] / 2
    return found


def depth_needed(results: Results, grid: Grid, theta: float) -> BySeed:
    """The fewest blocks that reach the level at their best rate, by seed; twice the most if none does."""
    best = {job.depth: losses(results, job, "validation_loss") for job in grid.jobs(theta)}
    return {
        seed: next((d for d in grid.depths if min(best[d][seed]) <= grid.level), 2 * grid.depths[-1])
        for seed in grid.example.seeds
    }


def parameters(example: Example, depth: float | int) -> float | int:
    """Parameters of the network of so many blocks; for depths with and without a network."""
    inputs, width = 1 if example.problem == "sine" else 2, example.width
    return (inputs + 2) * width + 1 + depth * (width * width + width)
