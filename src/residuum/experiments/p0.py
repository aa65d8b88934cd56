"""P0: Lippl, Peters and Kriegeskorte 2024, iterative convergent computation in ResNets (PLOS ONE 19(3): e0293440)."""

from functools import partial

from residuum.claims import Claim, Study, Test
from residuum.experiments.costs import network_minutes
from residuum.experiments.p0_figures import figures
from residuum.experiments.p0_runs import (
    BOUND,
    CLIPPED,
    COUPLED,
    FAST,
    FIRST,
    FREE,
    GROUP,
    LIMITED,
    QUANTITIES,
    RECURRENT,
    SAMPLED,
    SCALES,
    SETS,
    SUMMED,
    UNEQUAL,
    Cell,
    by_worth,
    index_of,
    of_cell,
    sharing,
)
from residuum.experiments.p0_verdicts import (
    AS_LOW,
    AWAY,
    NO_GAIN,
    ONE_BLOCK,
    as_low,
    away,
    far,
    gain,
    index_falls,
    index_rises,
    near,
    no_gain,
    one_block,
    rises_along,
)
from residuum.experiments.seeds import Seeds, runs_in

ABSTRACT, INTRODUCTION = "P0, abstract", "P0, introduction"
DERIVED = "derived, spec of this project, section 5"
RECONSTRUCTED = (
    "Only the abstract, the introduction and a part of the related work could be read: networks, indices, limits and "
    "settings are reconstructed."
)
DEBRIS = "Debris is not named there."
ORDINARY = "ordinary networks, whose blocks start independent"
STARTS = "Those of strength 1 start from equal blocks, so that the start differs, too."
SLOWER = (
    "Coupled gradients are means: equal blocks learn as if shared at a third of the rate, in as many steps. The "
    "difference can be one of speed; see p0-mnist-4-sum and p0-clutter3-4-sum, where gradients are summed."
)
FASTER = "The rate is higher for all weights, the step of the sum for those of blocks alone."
EQUAL = (
    "Blocks start equal, so that the coupling is the only difference to strength 1, and stay alike; with independent "
    "starts, as an ordinary network has: {}."
)
CONVOLUTIONS = "The limit is on convolutions alone: batch norm is free, and can undo it, so it bounds no branch."
OWN_NORMS = (
    "Blocks have equal convolutions and batch norms of their own; with common ones it is 1, see p0-mnist-one-block."
)
SMALL = "Clipped networks learn more slowly: their branches are small, whatever batch norm measures."
UNTRAINED = (
    f"Few networks would fail it: {1 - AWAY:g} is near 1, and untrained networks of the small scale, whose blocks are "
    "equal, have 0.82 to 0.95 in the mean, by agreement with their own answers; two of eight data sets pass."
)
POINTS = f"one-sided bound of 95 % at most {100 * NO_GAIN:g} points"


def study(scale: str) -> Study:
    """Runs, figures and claims of P0 at one scale.

    Args:
        scale: tiny, small or paper.
    """
    claims = [claim for data in SETS for claim in _of_data(scale, data)]
    claims += [claim for data in SCALES[scale].strengths for claim in _along_strengths(scale, data)]
    claims += [claim for data in SCALES[scale].limits for claim in _of_kinds(scale, data)]
    claims += [claim for data in SAMPLED for claim in _of_sizes(scale, data)]
    return Study(
        paper="p0",
        title="Lippl, Peters and Kriegeskorte 2024, Can neural networks benefit from objectives that encourage "
        "iterative convergent computations?",
        scale=scale,
        about=SCALES[scale].about,
        figures=figures(scale),
        claims=(*claims, *_everywhere(scale)),
        minutes=network_minutes,
        order=by_worth(scale),
        quantities=QUANTITIES,
    )


def _claim(
    name: str, source: str, statement: str, expected: str, test: Test, *, runs: tuple[Seeds, ...], limits: str = ""
) -> Claim:
    """A claim; without runs, no run of this scale tests it."""
    if not runs:
        return Claim(f"p0-{name}", source, statement, expected, (), None, "no networks with a limit on these data")
    said = " ".join([RECONSTRUCTED, *[DEBRIS] * name.startswith("debris"), *[limits] * bool(limits)])
    return Claim(f"p0-{name}", source, statement, expected, runs_in(*runs), test, said)


def _of_data(scale: str, data: str) -> list[Claim]:
    """The claims about one data set, which need its end points only."""
    return [*_ordinary(scale, data), *_coupled(scale, data), *_limited(scale, data)]


def _ordinary(scale: str, data: str) -> list[Claim]:
    """Claim 1: networks do not learn iterative, convergent solutions by themselves."""
    free, unequal = (of_cell(scale, data, cell) for cell in (FREE, UNEQUAL))
    kinds = [
        (
            "",
            "networks without coupling",
            free,
            EQUAL.format("see the claims ending in -unequal" if data in FIRST else "not run here"),
        )
    ]
    kinds += [("-unequal", f"{ORDINARY},", unequal, "")] * (data in FIRST)
    return [
        _claim(
            f"{data}-1-{index}{end}",
            f"{ABSTRACT}: networks do not learn iterative solutions",
            f"{SETS[data]}: {who} {words}",
            f"{index} index at {known}",
            partial(away, runs=runs, index=index),
            runs=(runs,),
            limits=" ".join(filter(None, (limits, UNTRAINED if index == "recurrence" and not end else ""))),
        )
        for end, who, runs, limits in kinds
        for index, words, known in (
            ("convergence", "need their last blocks", f"most {1 - AWAY:g}"),
            ("recurrence", "have blocks that cannot stand for each other", f"most {1 - AWAY:g}"),
            ("divergence", "lose the answer when the last block goes on", f"least {AWAY:g}"),
        )
    ]


def _coupled(scale: str, data: str) -> list[Claim]:
    """Claims 2 to 4: what coupling does without a limit."""
    free, coupled, unequal = (of_cell(scale, data, cell) for cell in (FREE, COUPLED, UNEQUAL))
    return [
        *_beside(data, coupled, free, "strength 0", "", ""),
        *(_beside(data, coupled, unequal, ORDINARY, "-unequal", STARTS) if data in FIRST else ()),
        _claim(
            f"{data}-2-iterative",
            f"{ABSTRACT}: gradient coupling succeeds at making networks iterative",
            f"{SETS[data]}: at strength 1 blocks can stand for each other",
            f"recurrence index at least {1 - AWAY:g}",
            partial(near, cells=(coupled,), indices=("recurrence",)),
            runs=(coupled,),
            limits=OWN_NORMS,
        ),
        _claim(
            f"{data}-3-general",
            f"{INTRODUCTION}: whether recurrent or not, ResNets in general do not converge",
            f"{SETS[data]}: networks of strength 1 need their last blocks, and lose the answer when the last goes on",
            f"convergence index at most {1 - AWAY:g}, divergence index at least {AWAY:g}",
            partial(far, runs=coupled, indices=("convergence", "divergence")),
            runs=(coupled,),
        ),
    ]


def _beside(
    data: str, coupled: Seeds, other: Seeds, who: str, end: str, limits: str, one: str = "strength 1"
) -> list[Claim]:
    """Strength 1 beside networks that are not coupled."""
    up, convergent = ((coupled, other),), f"{INTRODUCTION}: recurrent networks are more convergent"
    rows: tuple[tuple[str, str, str, str, Test], ...] = (
        ("2-recurrence", f"{ABSTRACT}: recurrence regularisation",
         f"{one} makes blocks more interchangeable than {who}", "recurrence index higher",
         partial(index_rises, pairs=up, index="recurrence")),
        ("3-convergence", convergent, f"{one} makes networks settle earlier than {who}",
         "convergence index higher", partial(index_rises, pairs=up, index="convergence")),
        ("3-divergence", convergent, f"{one} makes networks more stable under further steps than {who}",
         "divergence index lower", partial(index_falls, pairs=up, index="divergence")),
        ("4-accuracy", f"{ABSTRACT}: recurrence does not improve accuracy",
         f"{one} is not more accurate than {who}", f"gain: {POINTS}", partial(no_gain, pairs=up)),
        ("4-freedom", f"{INTRODUCTION}: unconstrained networks benefit from the freedom of non-recurrent blocks",
         f"{one} is less accurate than {who}", "difference above 0", partial(gain, pairs=((other, coupled),))),
    )  # fmt: skip
    return [
        _claim(
            f"{data}-{name}{end}",
            source,
            f"{SETS[data]}: {text}",
            known,
            test,
            runs=(other, coupled),
            limits=" ".join(filter(None, (limits, SLOWER if name.startswith("4") and one == "strength 1" else ""))),
        )
        for name, source, text, known, test in rows
    ]


def _limited(scale: str, data: str) -> list[Claim]:
    """Claims 5 and 6: what the Lipschitz limit does, and coupling with it."""
    bare = [of_cell(scale, data, cell) for cell in (FREE, COUPLED)]
    bound = [] if data in SCALES[scale].free_only else [of_cell(scale, data, cell) for cell in LIMITED]
    return [
        *_with_limit(data, f"a limit of {BOUND:g}", "", bare, bound, CONVOLUTIONS),
        _claim(
            f"{data}-5-convergent",
            f"{ABSTRACT}: the Lipschitz constraint succeeds at making networks convergent",
            f"{SETS[data]}: with a limit of {BOUND:g} networks have settled before their last blocks and stay where "
            "they are, at strengths 0 and 1",
            f"convergence index at least {1 - AWAY:g}, divergence index at most {AWAY:g}",
            partial(near, cells=bound, indices=("convergence", "divergence")),
            runs=tuple(bound),
            limits=CONVOLUTIONS,
        ),
    ]


def _with_limit(data: str, limit: str, end: str, bare: list[Seeds], bound: list[Seeds], limits: str) -> list[Claim]:
    """What a limit does at strengths 0 and 1, and what coupling does with it."""
    added, removed = tuple(zip(bound, bare, strict=False)), tuple(zip(bare, bound, strict=False))
    both, convergent = "at strengths 0 and 1", f"{ABSTRACT}: the Lipschitz constraint makes networks convergent"
    rows: tuple[tuple[str, str, str, str, Test, tuple[Seeds, ...]], ...] = (
        ("5-convergence", convergent, f"{limit} makes networks settle earlier, {both}", "convergence index higher",
         partial(index_rises, pairs=added, index="convergence"), (*bare, *bound)),
        ("5-divergence", convergent, f"{limit} makes networks more stable under further steps, {both}",
         "divergence index lower", partial(index_falls, pairs=added, index="divergence"), (*bare, *bound)),
        ("5-accuracy", f"{INTRODUCTION}: the Lipschitz constraint lowers accuracy",
         f"{limit} makes networks less accurate, {both}", "difference above 0", partial(gain, pairs=removed),
         (*bare, *bound)),
        ("6-accuracy", f"{INTRODUCTION}: in constrained networks recurrence does not hurt",
         f"with {limit}, strength 1 is not less accurate than strength 0", f"loss: {POINTS}",
         partial(no_gain, pairs=(tuple(bound),)), tuple(bound)),
    )  # fmt: skip
    return [
        _claim(
            f"{data}-{name}{end}",
            source,
            f"{SETS[data]}: {text}",
            known,
            test,
            runs=runs if bound else (),
            limits=limits,
        )
        for name, source, text, known, test, runs in rows
    ]


def _along_strengths(scale: str, data: str) -> list[Claim]:
    """Whether what strength 1 does comes gradually, and whether it only learns more slowly."""
    free, summed, fast = (of_cell(scale, data, cell) for cell in (FREE, SUMMED, FAST))
    cells = [of_cell(scale, data, cell) for cell in (FREE, *map(Cell, SCALES[scale].between), COUPLED)]
    known, stronger = "rank correlation with the strength above 0, mean over seeds", "the stronger the coupling"
    rows = (
        (
            "gradual",
            f"{ABSTRACT}: recurrence regularisation",
            "blocks are the more interchangeable",
            partial(index_of, name="recurrence"),
        ),
        ("sharing", DERIVED, "weights stay the more alike", sharing),
    )
    return [
        *(
            _claim(
                f"{data}-2-{name}",
                source,
                f"{SETS[data]}: {words}, {stronger}",
                known,
                partial(rises_along, cells=cells, of=of),
                runs=tuple(cells),
            )
            for name, source, words, of in rows
        ),
        _claim(
            f"{data}-4-between",
            f"{ABSTRACT}: recurrence does not improve accuracy",
            f"{SETS[data]}: no strength between 0 and 1 is more accurate than strength 0",
            f"gain: {POINTS}, at each",
            partial(no_gain, pairs=[(cell, free) for cell in cells[1:-1]]),
            runs=tuple(cells[:-1]),
        ),
        _claim(
            f"{data}-4-sum",
            f"{ABSTRACT}: recurrence does not improve accuracy",
            f"{SETS[data]}: strength 1 with summed gradients, those of shared weights, is not more accurate than 0",
            f"gain: {POINTS}",
            partial(no_gain, pairs=((summed, free),)),
            runs=(summed, free),
            limits="The sum has three times the step of the mean, and the same weight decay.",
        ),
        *_beside(data, summed, fast, "strength 0 at the rate of that step", "-fast", FASTER, "strength 1, summed,"),
    ]


def _of_kinds(scale: str, data: str) -> list[Claim]:
    """Networks that are recurrent to the bit, those with group norm, and the order of limits."""
    free = of_cell(scale, data, FREE)
    one, bounded, group, grouped = (of_cell(scale, data, cell) for cell in (*RECURRENT, *GROUP))
    clipped, bare = ([of_cell(scale, data, cell) for cell in cells] for cells in (CLIPPED, (FREE, COUPLED)))
    bounds = sorted((*SCALES[scale].bounds, BOUND), reverse=True)
    limits = [free, *(of_cell(scale, data, Cell(0.0, c)) for c in bounds)]
    words = ", ".join(("none", *(f"{c:g}" for c in bounds)))
    every_statistic = "Each application is trained with the statistics of its own batches, evaluated with common ones."
    mixed = [of_cell(scale, data, Cell(strength, BOUND)) for strength in SCALES[scale].between]
    constrained = of_cell(scale, data, LIMITED[0])
    ordinary = "one recurrent block (weights and batch norm)"
    rows: tuple[tuple[str, str, str, str, Test, tuple[Seeds, ...]], ...] = (
        ("3-one", f"{INTRODUCTION}: recurrent networks are more convergent",
         f"{ordinary} settles earlier than ordinary blocks", "convergence index higher",
         partial(index_rises, pairs=((one, free),), index="convergence"), (one, free)),
        ("3-one-divergence", f"{INTRODUCTION}: recurrent networks are more convergent",
         f"{ordinary} is more stable under further steps than ordinary blocks", "divergence index lower",
         partial(index_falls, pairs=((one, free),), index="divergence"), (one, free)),
        ("4-one", f"{ABSTRACT}: recurrence does not improve accuracy",
         f"{ordinary} is not more accurate than ordinary blocks", f"gain: {POINTS}",
         partial(no_gain, pairs=((one, free),)), (one, free)),
        ("6-one", f"{INTRODUCTION}: in constrained networks recurrence does not hurt",
         f"with a limit of {BOUND:g}, {ordinary} is not less accurate than ordinary blocks", f"loss: {POINTS}",
         partial(no_gain, pairs=((constrained, bounded),)), (constrained, bounded)),
    )  # fmt: skip
    return [
        *(
            _claim(f"{data}-{name}", source, f"{SETS[data]}: {text}", known, test, runs=runs, limits=every_statistic)
            for name, source, text, known, test, runs in rows
        ),
        _claim(
            f"{data}-6-between",
            f"{INTRODUCTION}: in constrained networks recurrence does not hurt",
            f"{SETS[data]}: with a limit of {BOUND:g}, no strength between 0 and 1 is less accurate than strength 0",
            f"loss: {POINTS}, at each",
            partial(no_gain, pairs=[(constrained, cell) for cell in mixed]),
            runs=(constrained, *mixed),
            limits=CONVOLUTIONS,
        ),
        _claim(
            f"{data}-3-group",
            f"{INTRODUCTION}: recurrent networks are more convergent",
            f"{SETS[data]}: one recurrent block with group norm settles earlier than ordinary blocks with group norm",
            "convergence index higher",
            partial(index_rises, pairs=((grouped, group),), index="convergence"),
            runs=(grouped, group),
        ),
        _claim(
            f"{data}-one-block",
            DERIVED,
            f"{SETS[data]}: networks of one recurrent block have recurrence 1 and lose the same without their first "
            "blocks as without their last, to the bit",
            ONE_BLOCK,
            partial(one_block, cells=(one, bounded)),
            runs=(one, bounded),
        ),
        *_with_limit(
            data, f"a limit of {BOUND:g} on whole branches (batch norm clipped)", "-clipped", bare, clipped, SMALL
        ),
        _claim(
            f"{data}-5-gradual",
            f"{ABSTRACT}: the Lipschitz constraint makes networks convergent",
            f"{SETS[data]}: networks settle the earlier, the lower the limit ({words})",
            "rank correlation above 0, mean over seeds",
            partial(rises_along, cells=limits, of=partial(index_of, name="convergence")),
            runs=tuple(limits),
            limits=CONVOLUTIONS,
        ),
    ]


def _of_sizes(scale: str, data: str) -> list[Claim]:
    """Sample efficiency, and whether recurrent networks can fit what they see."""
    at = SCALES[scale]
    if data not in at.sizes:
        text = f"{SETS[data]}: trained on fewer images, strength 1 is not more accurate than strength 0"
        known, why = f"gain: {POINTS}, at every size", "no subsets of these data at this scale"
        return [Claim(f"p0-{data}-4-samples", f"{INTRODUCTION}: sample efficiency", text, known, (), None, why)]
    pairs = [tuple(of_cell(scale, data, cell, size=size) for cell in (COUPLED, FREE)) for size in at.sizes[data]]
    words = ", ".join(f"{size:,}" for size in at.sizes[data])
    return [
        _claim(
            f"{data}-4-samples",
            f"{INTRODUCTION}: recurrence does not improve sample efficiency",
            f"{SETS[data]}: trained on {words} images, strength 1 is not more accurate than strength 0",
            f"gain: {POINTS}, at every size",
            partial(no_gain, pairs=pairs),
            runs=tuple(runs for pair in pairs for runs in pair),
            limits=f"All sizes have the same number of steps, to 5 %. {SLOWER}",
        ),
        _claim(
            f"{data}-express",
            f"{ABSTRACT}: networks can express iterative solutions",
            f"{SETS[data]}: on {at.sizes[data][0]:,} images, strength 1 reaches the training loss of strength 0",
            f"difference by the loss of guessing: one-sided bound of 95 % at most {AS_LOW:g}",
            partial(as_low, pair=pairs[0]),
            runs=pairs[0],
            limits="Blocks have equal convolutions and batch norms of their own. Training accuracy is not recorded.",
        ),
    ]


def _everywhere(scale: str) -> list[Claim]:
    """Claim 7: on no data set does the bias help."""
    at = SCALES[scale]
    free, coupled = ([of_cell(scale, data, cell) for data in SETS] for cell in (FREE, COUPLED))
    having = [data for data in SETS if data not in at.free_only]
    bounded = [of_cell(scale, data, LIMITED[1]) for data in having]
    ordinary = [of_cell(scale, data, FREE) for data in having]
    names = ", ".join(SETS[data] for data in having)
    return [
        _claim(
            "7-recurrent",
            f"{ABSTRACT}: not a useful inductive bias",
            "On no data set is strength 1 more accurate than strength 0",
            f"gain: {POINTS}, on each of {len(SETS)} data sets",
            partial(no_gain, pairs=tuple(zip(coupled, free, strict=True))),
            runs=(*free, *coupled),
            limits=SLOWER,
        ),
        _claim(
            "7-convergent",
            f"{ABSTRACT}: not a useful inductive bias",
            f"On no data set is strength 1 with a limit of {BOUND:g} more accurate than strength 0 without one "
            f"({names})",
            f"gain: {POINTS}, on each",
            partial(no_gain, pairs=tuple(zip(bounded, ordinary, strict=True))),
            runs=(*bounded, *ordinary),
        ),
    ]
