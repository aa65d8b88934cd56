"""What P1 claims about blocks: which way and how far they move the state, what is lost without them, what more does."""

from functools import partial

from residuum.claims import Claim, Test
from residuum.experiments.p1_runs import (
    KINDS,
    NAMES,
    SCALES,
    looked,
    of,
    shuffled_of,
)
from residuum.experiments.p1_verdicts import (
    ALMOST_ALL,
    CATASTROPHIC,
    GRADUAL,
    LAST_COSINE,
    MILD,
    MONOTONE,
    MUCH_MILDER,
    POINTS,
    STRONG,
    TENFOLD,
    answers_gradual,
    answers_rise,
    borderline_corrected,
    borderline_count,
    borderline_right,
    correct_worsen,
    cosine_beside,
    cosine_beside_initial,
    cosine_higher,
    cosine_last,
    cosine_negative,
    each_mild,
    entropy_falls,
    explodes,
    first_milder,
    first_needed,
    first_strong,
    loss_falls_each,
    loss_rises_last,
    none_needed,
    others_mild,
    ratio_falls,
    train_loss_is,
    unrolled_descends,
    unrolled_falls,
    unrolled_gains,
    unrolled_rises,
)
from residuum.experiments.seeds import runs_in
from residuum.runs import Run

OURS = "ours; P1 does not ask"
PROJECTIONS = "Blocks that change the shape are left out: their skip is not the identity."
CONFIDENT = (
    "One training each. The control has fewer images, more epochs and no augmentation, and is wrong with confidence: "
    "where its test loss is above guessing, blocks that bring that about move test images along the gradient."
)
GROUPS = "Borderline: top probabilities less than 10 points apart at the end; the paper's definition is not printed."
MODE = "Training loss is that in training mode, over the last epoch; test loss that in evaluation mode."
CALIBRATED = "Batch norm is calibrated on 1,000 images first; at its fresh 0 and 1 every network explodes."
EQUAL = "All gammas and betas are equal there, so that sharing them changes nothing, by construction."
SHORTER = (
    "Without it shared branches are ten times as long there, so that more growth is nearly certain by construction."
)
NEEDS_TABLE = "needs the paper's widths, images and 300 epochs"
BEYOND = "this scale has no such network, or not this data set"
SHALLOW, LONG = ("single", "wide"), ("single", "avgpool")  # few blocks; the first block moves the state far


def claim(
    name: str,
    place: str,
    statement: str,
    expected: str,
    test: Test,
    *,
    jobs: tuple[Run, ...],
    limits: str = "",
    unless: str = BEYOND,
) -> Claim:
    """A claim of P1; without runs no run of this scale tests it, for the reason in `unless`.

    Args:
        name: What follows "p1-" in its name.
        place: Where the paper says it; or `OURS`.
        statement: What is claimed.
        expected: What the paper found.
        test: What was obtained.
        jobs: The runs that it reads.
        limits: What keeps the verdict from being about the paper.
        unless: Why there are no runs.
    """
    source = place if place == OURS else f"P1, {place}"
    return Claim(f"p1-{name}", source, statement, expected, jobs, test if jobs else None, limits if jobs else unless)


def cosines(scale: str) -> list[Claim]:
    """Blocks move the state against the gradient of the loss."""
    found = []
    for name, words in KINDS.items():
        runs = looked(scale, name)
        rows: list[tuple[str, str, str, str, Test]] = [
            (
                "negative",
                "figure 4 (poster 3)",
                "almost every block moves the state against the gradient",
                f"cosine negative in {ALMOST_ALL:.0%} of the blocks",
                partial(cosine_negative, runs=runs),
            ),
            (
                "higher",
                "figure 4 (poster 3)",
                "higher blocks do so more",
                "mean cosine of the last third of the blocks below that of the first third",
                partial(cosine_higher, runs=runs),
            ),
            (
                "initial",
                OURS,
                "training makes blocks move against the gradient more than they do at initialisation",
                "mean cosine lower",
                partial(cosine_beside_initial, runs=runs),
            ),
        ]
        found += [
            claim(
                f"cosine-{name}-{label}", place, f"{words}: {text}", known, test, jobs=runs_in(runs), limits=PROJECTIONS
            )
            for label, place, text, known, test in rows
        ]
        pair = (runs[0], shuffled_of(scale, name))
        text = f"{words}: on test images, more so than the same network trained on shuffled labels"
        test = partial(cosine_beside, pairs=(pair,))
        found.append(
            claim(f"cosine-{name}-shuffled", OURS, text, "mean cosine lower", test, jobs=pair, limits=CONFIDENT)
        )
    for name in ("naive", "ubn"):
        runs = of(scale, name)
        text, known = f"{NAMES[name]}: almost every block moves the state against the gradient", "as for the others"
        test = partial(cosine_negative, runs=runs)
        found.append(claim(f"cosine-{name}-negative", "appendix", text, known, test, jobs=runs_in(runs)))
    runs = looked(scale, "110")
    pairs = [(looked(scale, deep)[0], looked(scale, flat)[0]) for deep in ("110", "avgpool") for flat in SHALLOW]
    low, high = LAST_COSINE
    return [
        *found,
        claim(
            "cosine-110-last",
            "figure 4 (poster 3)",
            "original: the last block's cosine is about -0.1",
            f"{low:g} to {high:g}",
            partial(cosine_last, runs=runs),
            jobs=runs_in(runs),
        ),
        claim(
            "cosine-deep",
            "section 4.1",
            "The effect is stronger in the deep networks (original, average pooling) than in single and wide",
            "mean cosine lower, in each of 4 pairs",
            partial(cosine_beside, pairs=pairs),
            jobs=tuple(dict.fromkeys(run for pair in pairs for run in pair)),
        ),
    ]


def ratios(scale: str) -> list[Claim]:
    """How much blocks change the state."""
    found = []
    place, long = "figure 2 (poster 5)", {name: looked(scale, name) for name in LONG}
    for name, runs in long.items():
        text = f"{KINDS[name]}: the first block changes the state strongly"
        test, known = partial(first_strong, runs=runs), f"l2 ratio at least {STRONG:g}; up to 2"
        found.append(claim(f"ratio-{name}-first", place, text, known, test, jobs=runs_in(runs)))
        text, known = f"{KINDS[name]}: the ratio falls from block to block", f"rank correlation at most -{MONOTONE:g}"
        test = partial(ratio_falls, runs=runs)
        limits = "Of average pooling the first group. An untrained network's falls, too."
        found.append(claim(f"ratio-{name}-falls", place, text, known, test, jobs=runs_in(runs), limits=limits))
    for name in ("110", "wide"):
        pairs = [(looked(scale, name)[0], runs[0]) for runs in long.values()]
        text = f"{KINDS[name]}: the first block changes the state much less than in single and average pooling"
        test, known = partial(first_milder, pairs=pairs), f"ratio of ratios at most {MUCH_MILDER:g}, both"
        jobs = tuple(dict.fromkeys(run for pair in pairs for run in pair))
        found.append(claim(f"ratio-{name}-milder", place, text, known, test, jobs=jobs))
    return found


def drops(scale: str) -> list[Claim]:
    """What is lost without one block."""
    place, found = "figure 3 (poster 4)", []
    for name in KINDS:
        runs = looked(scale, name)
        rows: list[tuple[str, str, str, Test]] = [
            (
                "others",
                "dropping a typical block is mild",
                f"{MILD:.0%} of the accuracy above chance are left",
                partial(others_mild, runs=runs),
            ),
            (
                "each",
                f"dropping any block{' but the first' * (name in LONG)} is mild",
                f"{MILD:.0%} of the accuracy above chance are left without each",
                partial(each_mild, runs=runs, first=int(name in LONG)),
            ),
        ]
        if name in LONG:
            row = (
                "first",
                "dropping the first block is catastrophic",
                f"at most {CATASTROPHIC:.0%} are left",
                partial(first_needed, runs=runs),
            )
        else:
            row = (
                "none",
                "dropping no block is catastrophic",
                f"at least {CATASTROPHIC:.0%} are left without any",
                partial(none_needed, runs=runs),
            )
        found += [
            claim(
                f"drop-{name}-{label}",
                place,
                f"{KINDS[name]}: {text}",
                known,
                test,
                jobs=runs_in(runs),
                limits=PROJECTIONS,
            )
            for label, text, known, test in (row, *rows)
        ]
    return found


def answers(scale: str) -> list[Claim]:
    """What the network would answer after each block of the last section."""
    place, found = "figure 5 (poster 6)", []
    for name in KINDS:
        runs = looked(scale, name)
        for label, text, known, test in (
            ("rises", "rises with the block", f"rank correlation at least {MONOTONE:g}", answers_rise),
            ("gradual", "rises gradually", f"no block brings more than {GRADUAL:.0%} of the gain", answers_gradual),
        ):
            what = f"{KINDS[name]}: accuracy along the last section {text}"
            found.append(
                claim(f"answers-{name}-{label}", place, what, known, partial(test, runs=runs), jobs=runs_in(runs))
            )
    return found


def borderline(scale: str) -> list[Claim]:
    """What the last five blocks of the original network do to whom."""
    runs = looked(scale, "110")
    rows = (
        ("corrected", "borderline test images are corrected", "accuracy rises", borderline_corrected),
        ("correct", "the loss of test images that are right rises", "loss rises", correct_worsen),
        ("entropy", "entropy falls for borderline, correct and all test images", "below 0 in each", entropy_falls),
        ("train", "each lowers the training loss", "below 0 in each", loss_falls_each),
        ("test", "the last raises the test loss", "above 0", loss_rises_last),
    )
    return [
        claim(
            f"borderline-{label}",
            "section 4.3, figure 6",
            f"Last five blocks of the original network: {text}",
            known,
            partial(test, runs=runs),
            jobs=runs_in(runs),
            limits=GROUPS,
        )
        for label, text, known, test in rows
    ]


def unrolling(scale: str) -> list[Claim]:
    """The last block of the original network run 20 more times."""
    runs, jobs = looked(scale, "110"), runs_in(looked(scale, "110"))
    numbers = jobs if SCALES[scale].table else ()
    rows: tuple[tuple[str, str, str, Test, tuple[Run, ...]], ...] = (
        ("train", "with scaling the training loss falls", "below 0", partial(unrolled_falls, runs=runs), jobs),
        ("test", "with scaling the test loss rises", "above 0", partial(unrolled_rises, runs=runs), jobs),
        (
            "borderline",
            "with scaling more borderline test images are right",
            "gain above 0; 43 to 53 %",
            partial(unrolled_gains, runs=runs, group="borderline"),
            jobs,
        ),
        (
            "accuracy",
            "with scaling slightly more test images are right",
            "gain above 0",
            partial(unrolled_gains, runs=runs, group="all"),
            jobs,
        ),
        (
            "cosine",
            "without scaling the first two extra runs move against the gradient",
            "cosine below 0 in both",
            partial(unrolled_descends, runs=runs, naive=True),
            jobs,
        ),
        (
            "cosine-scaled",
            "with scaling all extra runs move against the gradient",
            "cosine below 0 in each",
            partial(unrolled_descends, runs=runs, naive=False),
            jobs,
        ),
        (
            "explodes",
            "without scaling activations explode",
            f"state at least {TENFOLD:g} times as long",
            partial(explodes, runs=runs),
            jobs,
        ),
        (
            "count",
            "51 test images are borderline",
            "26 to 102",
            partial(borderline_count, runs=runs, expected=51),
            numbers,
        ),
        *(
            (
                f"borderline-{label}",
                f"{share:.0%} of borderline test images are right {label} the extra runs",
                f"{share - POINTS:.0%} to {share + POINTS:.0%}",
                partial(borderline_right, runs=runs, step=step, expected=share),
                numbers,
            )
            for label, step, share in (("before", 0, 0.43), ("after", -1, 0.53))
        ),
        *(
            (
                f"loss-{label}",
                f"the training loss is {loss:g} {label} the extra runs",
                f"{loss / 2:g} to {2 * loss:g}",
                partial(train_loss_is, runs=runs, step=step, expected=loss),
                numbers,
            )
            for label, step, loss in (("before", 0, 0.0012), ("after", -1, 0.001))
        ),
    )
    return [
        claim(
            f"unroll-{label}",
            "section 4.4, figure 7",
            f"Last block of the original network run 20 more times: {text}",
            known,
            test,
            jobs=needed,
            limits=f"The scale is of 5 the one with the lowest training loss; the paper's is not printed. {GROUPS}",
            unless=NEEDS_TABLE,
        )
        for label, text, known, test, needed in rows
    ]
