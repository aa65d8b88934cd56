"""Claims: what a paper states, tested on runs, with a verdict by rules that stand in the code."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from residuum.effects import Effect
from residuum.jobs import Job
from residuum.names import one_line
from residuum.runs import Finished

if TYPE_CHECKING:
    import matplotlib.figure

Verdict = Literal["pass", "fail", "inconclusive"]
NOT_RUN = "not run"
VERDICTS = ("pass", "fail", "inconclusive", NOT_RUN)
Results = Mapping[str, Finished]  # finished runs by their keys
# What reading a run may raise that is damaged or of another version, so that one such run does not end a whole report.
FAULTS = (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Obtained:
    """What a test found.

    Attributes:
        value: In words, with the interval and what it had to be.
        verdict: By a rule of this file.
        effects: The numbers behind it.
    """

    value: str
    verdict: Verdict
    effects: tuple[Effect, ...] = ()


Test = Callable[[Results], Obtained]
Drawn: TypeAlias = "matplotlib.figure.Figure | None"


def at_least(effect: Effect, threshold: float) -> Obtained:
    """Pass if the whole interval is at or above a threshold, fail if it is all below, else inconclusive.

    Args:
        effect: What was found; without an interval, or undefined, it is inconclusive.
        threshold: A constant of the code, with its reason there.
    """
    return _judged(effect, f"at least {threshold:g}", effect.low >= threshold, effect.high < threshold, threshold)


def at_most(effect: Effect, threshold: float) -> Obtained:
    """Pass if the whole interval is at or below a threshold, fail if it is all above, else inconclusive.

    "Does not improve" is `at_most(gain, 0.005)` with an effect of level 0.90, whose upper end is the one-sided bound of
    95 %.
    """
    return _judged(effect, f"at most {threshold:g}", effect.high <= threshold, effect.low > threshold, threshold)


def above(effect: Effect, threshold: float) -> Obtained:
    """Like `at_least`, for what is claimed to be more: an interval that touches the threshold does not pass."""
    return _judged(effect, f"above {threshold:g}", effect.low > threshold, effect.high <= threshold, threshold)


def below(effect: Effect, threshold: float) -> Obtained:
    """Like `at_most`, for what is claimed to be less: an interval that touches the threshold does not pass."""
    return _judged(effect, f"below {threshold:g}", effect.high < threshold, effect.low >= threshold, threshold)


def between(effect: Effect, low: float, high: float) -> Obtained:
    """Pass if the interval lies in a range, fail if all of it lies outside, else inconclusive."""
    inside = low <= effect.low and effect.high <= high
    return _judged(effect, f"between {low:g} and {high:g}", inside, effect.high < low or effect.low > high, low, high)


def equals(value: object, expected: object) -> Obtained:
    """Pass if a number that has no error, such as a count of parameters, is the expected one; else fail."""
    return Obtained(f"{value}; must be {expected}", "pass" if value == expected else "fail")


def every(parts: Iterable[Obtained]) -> Obtained:
    """All must hold: fail if one fails, inconclusive if one is that, else pass.

    That all hold is said at the level of each part; that one fails is said more often by chance, the more parts.

    Raises:
        ValueError: If there are no parts.
    """
    parts = tuple(parts)
    if not parts:
        raise ValueError("every: no parts given")
    verdicts = {part.verdict for part in parts}
    verdict = next(v for v in ("fail", "inconclusive", "pass") if v in verdicts)
    effects = tuple(effect for part in parts for effect in part.effects)
    return Obtained("; ".join(dict.fromkeys(part.value for part in parts)), verdict, effects)


def _judged(effect: Effect, rule: str, holds: bool, fails: bool, *bounds: float) -> Obtained:
    verdict = "inconclusive" if math.isnan(effect.value) else "pass" if holds else "fail" if fails else "inconclusive"
    return Obtained(f"{effect.words(bounds)}; must be {rule}", verdict, (effect,))


@dataclass(frozen=True)
class Claim:
    """A statement of a paper and how it is tested.

    Attributes:
        id: Its name: paper, data set, what, section.
        source: Where the paper says it, or where it was derived.
        statement: What is claimed.
        expected: What the paper found.
        jobs: The runs that the test reads.
        test: What was obtained, from these runs, which are all complete. None: no run of this scale can test it, and
            `limits` says why.
        limits: What keeps the verdict from being about the paper: scale, reconstruction, errata.
    """

    id: str
    source: str
    statement: str
    expected: str
    jobs: tuple[Job, ...]
    test: Test | None
    limits: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of a paper.

    Attributes:
        id: Its name: paper and number.
        source: Where it stands in the paper.
        caption: What it shows: axes, series.
        jobs: The runs that it can show.
        draw: A matplotlib figure of those that are complete; None if they are too few for any.
    """

    id: str
    source: str
    caption: str
    jobs: tuple[Job, ...]
    draw: Callable[[Results], Drawn]


def no_estimate(job: Job) -> float | None:
    """Nothing is known about how long a job takes."""
    return None


@dataclass(frozen=True)
class Study:
    """What is reproduced of a paper at one scale.

    Attributes:
        paper: Its tag: "p2".
        title: Authors, year, name.
        scale: tiny, small or paper.
        about: What this scale is, and what it cannot show.
        figures: Its figures.
        claims: Its claims.
        minutes: Predicted minutes of a job on one core; None where nothing is known.
        order: The runs that are to be done first, in this order; the others follow.
        quantities: What figures and claims read of profiles, by the name of the profile ("profile", "initial",
            "train"): what has to be kept of them.
    """

    paper: str
    title: str
    scale: str
    about: str
    figures: tuple[Figure, ...]
    claims: tuple[Claim, ...]
    minutes: Callable[[Job], float | None] = field(default=no_estimate)
    order: tuple[Job, ...] = ()
    quantities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [part.id for part in (*self.figures, *self.claims)]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"study {self.paper}: two figures or claims are called {', '.join(twice)}")

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The runs of all figures and claims, each once, in the order in which they are to be done."""
        wanted = {job.key: job for job in together((*self.figures, *self.claims))}
        return tuple(({job.key: job for job in self.order if job.key in wanted} | wanted).values())


def together(parts: Iterable[Figure | Claim]) -> tuple[Job, ...]:
    """The runs of figures and claims, each once, in the order in which they are first named."""
    return tuple({job.key: job for part in parts for job in part.jobs}.values())


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        claim: The claim.
        obtained: What was found; for "not run" why.
        verdict: One of `VERDICTS`.
        effects: The numbers behind it.
    """

    claim: Claim
    obtained: str
    verdict: str
    effects: tuple[Effect, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The claim and its verdict as JSON values."""
        names = ("id", "source", "statement", "expected", "limits")
        return {name: getattr(self.claim, name) for name in names} | {
            "obtained": self.obtained,
            "verdict": self.verdict,
            "effects": [effect.describe() for effect in self.effects],
        }


def judge(claim: Claim, results: Results) -> Judged:
    """The verdict on a claim; "not run" as long as one of its runs is not complete.

    A test that raises a ValueError, because what it needs is undefined in these runs, is inconclusive and says so. One
    that fails otherwise, since a run is damaged or the test is wrong, is inconclusive, too, and says which it is.

    Args:
        claim: The claim.
        results: Finished runs by key, of this and other claims.
    """
    if claim.test is None:
        return Judged(claim, "no run of this scale can tell", NOT_RUN)
    runs = {job.key for job in claim.jobs}
    missing = len(runs - results.keys())
    if missing:
        return Judged(claim, f"{missing} of {len(runs)} runs missing", NOT_RUN)
    try:
        found = claim.test(results)
    except ValueError as error:
        return Judged(claim, f"could not be computed: {one_line(error)}", "inconclusive")
    except FAULTS as error:
        said = f"could not be computed: {claim.id}: {type(error).__name__}: {one_line(error)}"
        return Judged(claim, said, "inconclusive")
    return Judged(claim, found.value, found.verdict, found.effects)
