"""P1: Jastrzebski et al. 2018, Residual Connections Encourage Iterative Inference (arXiv 1710.04773)."""

from functools import partial

from residuum.claims import Claim, Study, Test
from residuum.experiments.costs import network_minutes
from residuum.experiments.p1_claims import (
    CALIBRATED,
    EQUAL,
    MODE,
    NEEDS_TABLE,
    OURS,
    SHORTER,
    answers,
    borderline,
    claim,
    cosines,
    drops,
    ratios,
    unrolling,
)
from residuum.experiments.p1_figures import figures
from residuum.experiments.p1_runs import (
    ABLATED,
    KINDS,
    NAMES,
    PRINTED,
    QUANTITIES,
    SCALES,
    SETS,
    SHARED,
    TABLE,
    by_worth,
    of,
)
from residuum.experiments.p1_verdicts import (
    EXPLODES,
    GAIN,
    MUCH_LARGER,
    NO_MORE,
    RECOVERED,
    TOLERANCE,
    better,
    fits_worse,
    gains,
    grows_more,
    has_parameters,
    initial_calm,
    initial_explodes,
    most_needed,
    needs_no_repair,
    ratio_larger,
    recovers,
    table_entry,
    wider_gap,
    worse,
)
from residuum.experiments.seeds import Seeds, runs_in
from residuum.layers.sharing import NAIVE, UBN
from residuum.models import avgpool, resnet, resnet110, single, wide


def study(scale: str) -> Study:
    """Runs, figures and claims of P1 at one scale.

    Args:
        scale: tiny, small or paper.
    """
    claims = [
        *_counts(),
        *cosines(scale),
        *ratios(scale),
        *drops(scale),
        *answers(scale),
        *borderline(scale),
        *unrolling(scale),
        *_naive(scale),
        *_remedy(scale),
        *_order(scale),
        *_ablation(scale),
        *_table(scale),
    ]
    return Study(
        paper="p1",
        title="Jastrzebski et al. 2018, Residual Connections Encourage Iterative Inference",
        scale=scale,
        about=SCALES[scale].about,
        figures=figures(scale),
        claims=tuple(claims),
        minutes=network_minutes,
        order=by_worth(scale),
        quantities=QUANTITIES,
    )


def _counts() -> list[Claim]:
    """Numbers of parameters, exactly; no run is needed."""
    totals = {
        "110": (resnet110(), 1_742_762),
        "single": (single(), 1_829_210),
        "avgpool": (avgpool(), 12_201_310),
        "wide": (wide(), 45_732_842),
    }
    errata = {
        "avgpool": "The text has a pooling after each of three groups; the count says two.",
        "wide": "The text has four blocks in each section; the count says 4, 5 and 5.",
    }
    rows = [
        (f"count-{name}", "section 4", f"the {KINDS[name]} network", network, True, count, errata.get(name, ""))
        for name, (network, count) in totals.items()
    ]
    trained = {
        ("32", None): (467_946, 473_796),
        ("38", None): (565_386, 571_236),
        ("56", None): (857_706, 863_556),
        ("110", None): (1_734_666, 1_740_516),
        ("110", UBN): (570_762, 576_612),
        ("146", UBN): (573_450, 579_300),
        ("182", UBN): (576_138, 581_988),
    }
    for (depth, sharing), counts in trained.items():
        for data, classes, count in zip(SETS, (10, 100), counts, strict=True):
            words = f"ResNet-{depth}{'-UBN' if sharing else ''} for {SETS[data]}, trained ones"
            label = f"count-{depth}{'-ubn' if sharing else ''}-{data}"
            network = resnet(int(depth), classes=classes, sharing=sharing)
            rows.append((label, "table 1, in thousands", words, network, False, count, ""))
    naive = "naively shared ResNet-110, those of ResNet-38"
    erratum = "The submission says ResNet-32 at that place; the poster's ResNet-38 has equally many."
    rows.append(("count-naive", "section 4.5", naive, resnet(110, sharing=NAIVE), False, 565_386, erratum))
    return [
        Claim(
            f"p1-{label}",
            f"P1, {place}",
            f"Parameters of {words}",
            f"{count:,}",
            (),
            partial(has_parameters, network=network, statistics=total, expected=count),
            limits,
        )
        for label, place, words, network, total, count, limits in rows
    ]


def _naive(scale: str) -> list[Claim]:
    """Naive sharing: the upper blocks of each section are one module, batch norm included."""
    naive, deep, small = (of(scale, name) for name in ("naive", "110", "38"))
    erratum = "Compared with ResNet-38, which has equally many parameters; the submission says ResNet-32."
    figure, both, grow = (
        "section 4.5, figure 8",
        f"{MODE} {erratum}",
        "has gradients that grow much more on their way down",
    )
    times = f"ratio at least {MUCH_LARGER:g} times as large, mean over epochs"

    def shared(name: str, place: str, text: str, known: str, test: Test, other: Seeds, limits: str = "") -> Claim:
        text = f"Naive sharing {text}"
        return claim(f"naive-{name}", place, text, known, test, jobs=runs_in(naive, other), limits=limits)

    return [
        shared("fit", figure, "fits its training images worse than ResNet-110", "training loss higher",
               partial(fits_worse, after=naive, before=deep), deep, MODE),
        shared("train", figure, "is wrong on more training images than ResNet-110, in evaluation mode",
               "training error higher", partial(worse, after=naive, before=deep, split="train"), deep),
        shared("test", figure, "is wrong on more test images than ResNet-38", "test error higher",
               partial(worse, after=naive, before=small), small, erratum),
        shared("gap", "poster, figure 8: heavily overfits", "has a wider gap between training and test than ResNet-38",
               "difference of losses larger", partial(wider_gap, after=naive, before=small, recalibrated=False), small,
               both),
        shared("gap-again", OURS, "still has a wider gap than ResNet-38 when statistics are re-estimated for every "
               "application", "difference of losses larger",
               partial(wider_gap, after=naive, before=small, recalibrated=True), small, both),
        shared("recovers", OURS, "gets back half of the test accuracy that it has cost by re-estimated statistics",
               f"at least {RECOVERED:.0%}, mean over seeds", partial(recovers, runs=naive, unshared=deep), deep),
        shared("ratio", "figure 8, right", f"{grow} than those of ResNet-38", times,
               partial(ratio_larger, runs=naive, before=small), small, erratum),
        shared("ratio-test", "figure 8, right; validation batches", f"{grow} than those of ResNet-38, on test images",
               times, partial(ratio_larger, runs=naive, before=small, split="test"), small, erratum),
        shared("ratio-unshared", "figure 8, right", f"{grow} than those of the unshared ResNet-110", times,
               partial(ratio_larger, runs=naive, before=deep), deep),
        *(
            shared(f"initial-{what}", "section 4.5", f"has {what} that explode at initialisation",
                   f"growth at least {EXPLODES:g} times that of ResNet-110",
                   partial(initial_explodes, runs=naive, unshared=deep, what=what), deep, CALIBRATED)
            for what in ("activations", "gradients")
        ),
    ]  # fmt: skip


def _remedy(scale: str) -> list[Claim]:
    """Unshared batch norm."""
    ubn, deep, naive = (of(scale, name) for name in ("ubn", "110", "naive"))
    known = f"growth at most {NO_MORE:g} times that of ResNet-110, where that of naive sharing is at least "
    known += f"{EXPLODES:g} times"
    return [
        *(
            claim(
                f"ubn-{what}",
                "section 4.5",
                f"UBN removes the explosion of {what} at initialisation",
                known,
                partial(initial_calm, runs=ubn, naive=naive, unshared=deep, what=what),
                jobs=runs_in(ubn, naive, deep),
                limits=CALIBRATED,
            )
            for what in ("activations", "gradients")
        ),
        claim(
            "ubn-repair",
            OURS,
            "UBN needs no re-estimation",
            "test error changes by at most a point",
            partial(needs_no_repair, runs=ubn),
            jobs=runs_in(ubn),
        ),
    ]


def _order(scale: str) -> list[Claim]:
    """Which network of Table 1 is better than which."""
    ubn, small = of(scale, "ubn"), of(scale, "38")
    far, near = of(scale, "ubn", data="cifar100"), of(scale, "38", data="cifar100")
    deepest = of(scale, "ubn182", data="cifar100")
    low, high = GAIN
    return [
        *(
            claim(
                f"order-{label}",
                "table 1",
                f"CIFAR-10: {NAMES[after]} is better than {NAMES[before]}",
                "test error lower",
                partial(better, after=of(scale, after), before=of(scale, before)),
                jobs=runs_in(of(scale, after), of(scale, before)),
            )
            for label, after, before in (("ubn-38", "ubn", "38"), ("56-ubn", "56", "ubn"), ("110-56", "110", "56"))
        ),
        claim(
            "order-cifar100",
            "table 1",
            "CIFAR-100: 110-UBN is worse than ResNet-38",
            "test error higher; 29.94 and 29.66 %",
            partial(worse, after=far, before=near),
            jobs=runs_in(far, near),
        ),
        claim(
            "order-cifar100-182",
            "table 1",
            "CIFAR-100: 182-UBN is better than ResNet-38",
            "test error lower; 29.33 and 29.66 %",
            partial(better, after=deepest, before=near),
            jobs=runs_in(deepest, near) if deepest and near else (),
        ),
        claim(
            "gain",
            "table 1 and section 4.5",
            "CIFAR-10: 110-UBN gains about 0.3 points on ResNet-38",
            f"{low:g} to {high:g} points; 6.99 less 6.62 %",
            partial(gains, after=ubn, before=small),
            jobs=runs_in(ubn, small) if SCALES[scale].table else (),
            unless=NEEDS_TABLE,
        ),
    ]


def _ablation(scale: str) -> list[Claim]:
    """UBN without one of its parts."""
    ubn, without = of(scale, "ubn"), {name: of(scale, name) for name in ABLATED}
    statistics, others = without["statistics"], [without["gamma"], without["affine"]]
    built_in = {"affine": EQUAL, "gamma": SHORTER}  # what holds at the start whatever networks do
    return [
        *(
            claim(
                f"ablation-{name}",
                "figure 9",
                f"{SHARED[name][0]} instead of all of UBN: more test errors",
                "difference above 0",
                partial(worse, after=runs, before=ubn),
                jobs=runs_in(runs, ubn),
            )
            for name, runs in without.items()
        ),
        *(
            claim(
                f"ablation-{name}-norm",
                "figure 9, right",
                f"{SHARED[name][0]} instead of all of UBN: the state grows more at initialisation",
                "ratio of growths above 1",
                partial(grows_more, after=runs, before=ubn),
                jobs=runs_in(runs, ubn),
                limits=f"{CALIBRATED} {built_in.get(name, '')}".rstrip(),
            )
            for name, runs in without.items()
        ),
        claim(
            "ablation-most",
            "figure 9",
            "Unshared statistics are the most important part of UBN",
            "more test errors without them than without each of the others",
            partial(most_needed, without=statistics, others=others),
            jobs=runs_in(statistics, *others),
        ),
    ]


def _table(scale: str) -> list[Claim]:
    """The numbers of Table 1."""
    found = []
    for data, rows in PRINTED.items():
        for name in TABLE:
            runs = of(scale, name, data=data) if SCALES[scale].table else {}
            for split, number in zip(("train", "test"), rows[name], strict=True):
                test = partial(table_entry, runs=runs, data=data, split=split, expected=number)
                text = f"{SETS[data]}: {NAMES[name]} has {number:g} % {split} error"
                known = f"{number:g} within {TOLERANCE[data]:g} points"
                label = f"table-{data}-{name}-{split}"
                found.append(claim(label, "table 1", text, known, test, jobs=runs_in(runs), unless=NEEDS_TABLE))
    return found
