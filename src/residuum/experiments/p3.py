"""P3: Reshniak & Webster 2019, Robust learning with implicit residual networks (arXiv 1905.10479)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from residuum.claims import Claim, Obtained, Results, Study
from residuum.experiments.p3_exact import SPEC, exact
from residuum.experiments.p3_figures import figures
from residuum.experiments.p3_runs import BOUNDS, COMPARED, SCALES, Scale, at, by_levels, minutes
from residuum.experiments.p3_verdicts import (
    CHANCE,
    TENFOLD,
    WELL,
    accurate,
    both_lower,
    fewer,
    frozen,
    higher_rate,
    in_every_seed,
    like,
    lost,
    lower,
    median_lower,
    more_accurate,
    more_right,
    more_right_moved,
    more_steps,
    near_chance,
    nearly_all_right,
    no_fewer_right,
    no_worse,
    perfect,
    shrinks_less,
    smaller_gap,
    stretches_less,
    under_noise,
)
from residuum.jobs import Job
from residuum.toys.measures import NOISE

MIXED = {
    "2Lip-5-1Lip-5": "not built: in its code the limits of '2Lip' are 1 in this network, which makes it another '1Lip'",
    "10-0": "not built: what it limits, of the stability function, our sources do not say",
    "5-5": "not built: what it limits, of the stability function, our sources do not say",
}
NOT_KNOWN = "Depth and step of the paper's residual network are lost; here both have the same."
TRAINS = "Trained: a training loss below that of no answer, which is a low bar."
SHRINKING = "That stability is shrinking less is ours; growing less is judged by p3-spirals-expansion."
OWN = "An independent implementation of ours in numpy, 3 seeds; not the paper's numbers, which are curves."
# Validation losses of that implementation after 1000 epochs of the regression: theta, gradient, seeds 0 to 2; T = 1.
REGRESSION = (
    (0.0, "exact", (0.0474, 0.111, 0.100)),
    (0.5, "exact", (0.0352, 0.103, 0.0851)),
    (1.0, "exact", (0.0171, 0.0931, 0.0736)),
    (0.5, "truncated", (0.0690, 0.108, 0.115)),
    (1.0, "truncated", (0.163, 0.168, 0.143)),
)
DEEP = (0.317, 0.103, 0.0933)
VARIED = (0.148, 0.106, 0.104)
LONGER = ((0.0, (1.6e-3, 7.6e-4, 1.8e-4)), (0.5, (6.0e-5, 2.6e-4, 6.8e-4)))  # T = 5: theta, seeds 0 to 2


def study(scale: str) -> Study:
    """Examples, figures and claims of P3 at one scale.

    Args:
        scale: tiny, small or paper.
    """
    to = SCALES[scale]
    claims = (
        *exact(to),
        *_spirals(to),
        *_noise(to),
        *_regression(to),
        *_grids(to),
        *_extended(to),
        *_digits(to),
        *_penalised(to),
        *_arms(to),
        *_levels(to),
    )
    return Study(
        paper="p3",
        title="Reshniak & Webster 2019, Robust learning with implicit residual networks",
        scale=scale,
        about=to.about,
        figures=figures(scale),
        claims=claims,
        minutes=minutes,
        order=tuple(job for claim in claims for job in claim.jobs),
    )


def _claim(
    name: str,
    source: str,
    statement: str,
    expected: str,
    test: Callable[[Results], Obtained],
    *,
    jobs: Sequence[Job] = (),
    limits: str = "",
) -> Claim:
    return Claim(f"p3-{name}", source, statement, expected, tuple(jobs), test, limits)


def _spirals(to: Scale) -> list[Claim]:
    """The second example at its end."""
    none, half, one = (at(to.spirals, theta) for theta in (0.0, 0.5, 1.0))
    half_cut, one_cut = (at(to.spirals, theta, "truncated") for theta in (0.5, 1.0))
    pair, source = (half, none), "P3, example 2, figures 5 and 6"
    rows = [
        ("perfect", source, "theta = 1/2: every validation point is right in every seed", "all seeds",
         partial(perfect, of=half), (half,)),
        ("loss", f"{source}; ten times is ours", "theta = 1/2: the validation loss is ten times lower than that of the "
         "residual network", "log10 of the ratio at least 1; 2.3, 3.2, 2.9 in ours",
         partial(lower, of=half, than=none, by=TENFOLD), pair),
        ("loss-median", f"{SPEC}, section 4.8, check 9", "theta = 1/2: the validation loss is ten times lower, by the "
         "median over seeds", "median of the ratios at least 10", partial(median_lower, of=half, than=none), pair),
        ("accuracy", source, "theta = 1/2: more validation points are right", "difference above 0; 99.03, 99.81, 100 % "
         "against 100 % in ours", partial(more_accurate, of=half, than=none), pair),
        ("training", source, "theta = 1/2: the training loss is lower", "log10 of the ratio above 0",
         partial(lower, of=half, than=none, name="train_loss"), pair),
        ("gap", source, "theta = 1/2 generalises better: validation / training loss is lower",
         "2.1, 1.1, 1.0 against 244, 216, 1.8 in ours", partial(smaller_gap, of=half, than=none), pair),
        ("one-trains", f"{SPEC}, section 4.4; P3 says \"cannot be trained\"",
         "theta = 1 trains with the exact gradient: more is right than with the truncated one",
         "100, 94, 100 % against 66, 56, 66 %", partial(more_accurate, of=one, than=one_cut), (one, one_cut)),
        ("one-truncated", "P3, on theta = 1", "theta = 1 cannot be trained: with the gradient of its code it stays "
         "near chance", f"at most {CHANCE:.0%} right; 66, 56, 66 %", partial(near_chance, of=one_cut), (one_cut,)),
        ("one-frozen", f"{SPEC}, section 4.8, check 7", "theta = 1 with the truncated gradient: no block learns",
         "weights bit for bit as drawn", partial(frozen, of=one_cut), (one_cut,)),
        ("half-truncated", f"{SPEC}, section 4.7", "theta = 1/2 trains with the truncated gradient as well",
         f"at least {WELL:.0%} right; 99.6, 100, 100 %", partial(accurate, of=half_cut, least=WELL), (half_cut,)),
        ("half-above-one", f"{SPEC}, section 4.7", "theta = 1/2 ends below theta = 1 with the exact gradient",
         "log10 of the ratio above 0", partial(lower, of=half, than=one), (half, one)),
    ]  # fmt: skip
    return [
        _claim(f"spirals-{n}", s, text, known, test, jobs=jobs, limits=NOT_KNOWN)
        for n, s, text, known, test, jobs in rows
    ]


def _noise(to: Scale) -> list[Claim]:
    """Robustness of the second example."""
    none, half = (at(to.spirals, theta) for theta in (0.0, 0.5))
    source, pair = "P3, its claim of robustness", (half, none)
    limits = "How robustness was measured is not known; noise on validation points, 20 draws, is ours."
    found = []
    for sd in NOISE[1:]:
        text = f"Spirals with noise of standard deviation {sd:g}: at theta = 1/2 more is right than at theta = 0"
        test = partial(under_noise, of=half, than=none, sd=sd)
        label, known = f"spirals-noise-{sd:g}", "difference above 0, one-sided 95 %"
        found.append(_claim(label, source, text, known, test, jobs=pair, limits=limits))
    text = "Spirals with noise: on average over seeds at theta = 1/2 no fewer are right, at each of four deviations"
    test, known = partial(no_fewer_right, of=half, than=none, sds=NOISE[1:]), "means at least those of theta = 0"
    source_of_means = f"{SPEC}, section 4.8, check 10"
    found.append(_claim("spirals-noise-mean", source_of_means, text, known, test, jobs=pair, limits=limits))
    limits = "The measure is ours: quantiles over the validation points."
    for name, what in (("jacobian", "input to the last state"), ("expansion", "first state to the last")):
        text = f"Spirals: the largest stretching of a change, from the {what}, is smaller at theta = 1/2"
        test = partial(stretches_less, of=half, than=none, name=name)
        known = "log10 of the ratio of 95 % quantiles below 0"
        found.append(_claim(f"spirals-{name}", source, text, known, test, jobs=pair, limits=limits))
    text = "Spirals: gradients shrink less on their way back: the smallest singular value is larger at theta = 1/2"
    test, known = partial(shrinks_less, of=half, than=none), "log10 of the ratio of 5 % quantiles above 0"
    source = "P3, abstract: improved stability of backward propagation"
    found.append(_claim("spirals-backward", source, text, known, test, jobs=pair, limits=f"{limits} {SHRINKING}"))
    return found


def _regression(to: Scale) -> list[Claim]:
    """The first example at its end."""
    none, half, one, longer = at(to.sine, 0.0), at(to.sine, 0.5), at(to.sine, 1.0), to.longer
    deep, varied = replace(none, depth=to.deep), replace(half, variation=0.1)
    source, limits = (
        "P3, example 1, figures 3 and 4",
        f"{NOT_KNOWN} With T = 1 neither fits the function in 1000 epochs.",
    )
    known = "log10 of the ratio above 0"
    rows = [
        ("ahead", source, "Regression, T = 1: theta = 1/2 ends below the residual network in every seed, training and "
         "validation", "all seeds", partial(in_every_seed, of=half, than=none), (half, none)),
        ("mean", source, "Regression, T = 1: theta = 1/2 ends below the residual network in the mean of logarithms",
         known, partial(both_lower, of=half, than=none), (half, none)),
        ("longer", source, "Regression, T = 5: theta = 1/2 ends below the residual network", known,
         partial(both_lower, of=at(longer, 0.5), than=at(longer, 0.0)), (at(longer, 0.5), at(longer, 0.0))),
        ("deep", source, f"Regression, T = 1: theta = 1/2 with {to.sine.depth} blocks ends below a residual network "
         f"with {to.deep}", known, partial(both_lower, of=half, than=deep), (half, deep)),
        ("one-trains", f"{SPEC}, section 4.6", "Regression: theta = 1 ends lower with the exact gradient", known,
         partial(lower, of=one, than=at(to.sine, 1.0, "truncated")), (one, at(to.sine, 1.0, "truncated"))),
        ("variation", f"{SPEC}, section 4.6", "Regression: the variation penalty that the paper's code leaves without "
         "effect would raise the loss", known, partial(lower, of=half, than=varied), (half, varied)),
    ]  # fmt: skip
    found = [_claim(f"sine-{n}", s, text, k, test, jobs=jobs, limits=limits) for n, s, text, k, test, jobs in rows]
    numbers = [(at(to.sine, theta, gradient), losses) for theta, gradient, losses in REGRESSION]
    numbers += [(deep, DEEP), (varied, VARIED), *((at(longer, theta), losses) for theta, losses in LONGER)]
    for example, losses in numbers:
        kind = f"T = {example.time:g}, theta = {example.theta:g}, {example.depth} blocks, {example.param_grad} gradient"
        kind += f", penalty {example.variation:g}" if example.variation else ""
        text = f"Regression, {kind}: the validation loss is that of an independent implementation"
        known = f"{', '.join(f'{loss:g}' for loss in losses)}; within a factor of 3 of their mean"
        end = "-deep" if example is deep else "-varied" if example is varied else f"-{example.param_grad}"
        end = "-longer" if example.time == longer.time else end
        test = partial(like, of=example, losses=losses)
        label = f"sine-number-{example.theta:g}{end}"
        found.append(_claim(label, f"{SPEC}, section 4.6", text, known, test, jobs=(example,), limits=OWN))
    return found


def _grids(to: Scale) -> list[Claim]:
    """Learning rates and depths at equal T."""
    found = []
    for name, grid in to.grids.items():
        jobs = [job for theta in (0.5, 0.0) for job in grid.jobs(theta)]
        source = "P3, example 1" if name == "sine" else "P3 says it of example 1"
        limits = f"{NOT_KNOWN} T = {grid.example.time:g}; {', '.join(map(str, grid.depths))} blocks; coarse rates. "
        limits += "A training whose equations are not solved counts as unstable."
        text = f"{name}: the largest learning rate that trains is higher at theta = 1/2 than at theta = 0"
        test, known = partial(higher_rate, grid=grid), "log10 of the ratio above 0, mean over depths"
        place, words = "P3, abstract: allows for higher learning rates", f"{limits} {TRAINS}"
        found.append(_claim(f"{name}-rate", place, text, known, test, jobs=jobs, limits=words))
        for of, words in (("depth", "blocks"), ("parameters", "parameters")):
            text = f"{name}: theta = 1/2 needs fewer {words} for a validation loss of {grid.level:g}"
            test, known = partial(fewer, grid=grid, of=of), "log10 of the ratio below 0"
            found.append(_claim(f"{name}-{of}", source, text, known, test, jobs=jobs, limits=limits))
    return found


def _extended(to: Scale) -> list[Claim]:
    """The equations of the extended version."""
    source, known, found = "P3, extended version; the direction is ours", "log10 of the ratio above 0", []
    limits = "The extended version shows curves; the comparison by numbers, starting values and epochs are ours."
    for every in to.every:
        none, half, one = (at(replace(to.stiff, every=every), theta) for theta in (0.0, 0.5, 1.0))
        for label, example in (("half", half), ("one", one)):
            text = f"Stiff equation, known after every {every} steps: theta = {example.theta:g} is nearer to it than 0"
            test = partial(lower, of=example, than=none)
            name = f"stiff-{every}-{label}"
            found.append(_claim(name, source, text, known, test, jobs=(example, none), limits=limits))
    half = at(to.prey, 0.5)
    for label, theta in (("explicit", 0.0), ("backward", 1.0)):
        other = at(to.prey, theta)
        text = f"Prey and predators: theta = 1/2 is nearer to the orbits than theta = {theta:g}"
        words = f"{limits} Its 200 last epochs of L-BFGS are left out."
        test = partial(lower, of=half, than=other)
        found.append(_claim(f"prey-{label}", source, text, known, test, jobs=(half, other), limits=words))
    return found


def _digits(to: Scale) -> list[Claim]:
    """MNIST under noise."""
    source, at_most = "P3, extended version, MNIST", f"{to.digits.epochs} of 300 epochs, {to.seeds} seeds. "
    limits = at_most + "The settings are those of its code, but norms are limited and not divided by, and tol is 1e-5."
    rows = (
        ("", "theta = 0.75", "plain", 0.7, "train", "48.6 % against 25.3 %"),
        ("-limited", "1Lip", "plain", 0.7, "train", "32.3 % against 25.3 %"),
        ("-stable", "theta = 0", "plain", 0.7, "train", "42.6 % against 25.3 %"),
        ("-beyond", "theta = 0", "1Lip", 0.7, "train", "42.6 % against 32.3 %"),
        ("-implicit", "theta = 0.75", "theta = 0", 0.7, "train", "48.6 % against 42.6 %"),
        ("-small", "plain", "theta = 0.75", 0.2, "train", "99.5 % against 97.3 %"),
        ("-test", "theta = 0.75", "plain", 0.7, "test", "no number: the paper adds noise to training images"),
    )
    found = []
    for name, of, than, sd, images, known in rows:
        pair = to.noisy_networks(of), to.noisy_networks(than)
        words = "training" if images == "train" else "test"
        text = f"MNIST, noise of {sd:g} on {words} images: the network {of!r} has more right than {than!r}"
        test = partial(more_right, of=pair[0], than=pair[1], sd=sd, images=images)
        place = "ours" if images == "test" else source
        found.append(_claim(f"mnist-noise{name}", place, text, known, test, jobs=pair[0] + pair[1], limits=limits))
    for name in COMPARED:
        jobs = to.noisy_networks(name)
        text = f"MNIST: the network {name!r} has all training images right without noise"
        test, label = partial(nearly_all_right, of=jobs), name.replace(" = ", "-").lower()
        found.append(_claim(f"mnist-clean-{label}", source, text, "100 %", test, jobs=jobs, limits=limits))
    return found


def _penalised(to: Scale) -> list[Claim]:
    """The regression whose right-hand side is penalised: what it costs the solver, and the fit."""
    least, most = to.divergences[0], to.divergences[-1]
    one, one_without, half, half_without = (to.penalised(theta, d) for theta in (1.0, 0.5) for d in (most, least))
    mid = to.divergences[len(to.divergences) // 2]
    one_mid, half_mid = (to.penalised(theta, mid) for theta in (1.0, 0.5))
    rows = (
        ("half-divergence", f"theta = 1/2: the solver needs more steps with a divergence penalty of {most:g} than "
         "without", "16.6 against 5.0", partial(more_steps, of=half, than=half_without), (half, half_without)),
        ("theta-middle", f"divergence penalty of {mid:g}: the solver needs more steps at theta = 1 than at 1/2",
         "15.0 against 9.6", partial(more_steps, of=one_mid, than=half_mid), (one_mid, half_mid)),
        ("fit-one", f"theta = 1: a divergence penalty of {most:g} raises the training loss", "2.2e-2 against 1.2e-4",
         partial(lower, of=one_without, than=one, name="train_loss"), (one, one_without)),
        ("divergence", f"theta = 1: the solver needs more steps with a divergence penalty of {most:g} than without",
         "30.7 against 5.0", partial(more_steps, of=one, than=one_without), (one, one_without)),
        ("theta", f"divergence penalty of {most:g}: the solver needs more steps at theta = 1 than at 1/2",
         "30.7 against 16.6", partial(more_steps, of=one, than=half), (one, half)),
        ("fit", f"theta = 1/2: a divergence penalty of {most:g} raises the training loss",
         "2.7e-2 against 1.1e-4", partial(lower, of=half_without, than=half, name="train_loss"), (half, half_without)),
    )  # fmt: skip
    source = "P3, extended version, logs of its regression of sin x"
    limits = (
        "Steps are Anderson's, the paper's those of L-BFGS. Rates are constant, where the paper's fall on plateaus. A "
        "training ends where an equation is not solved; the paper's code goes on."
    )
    return [
        _claim(f"wave-{name}", source, f"sin x, {text}", f"{known}, log10 of the ratio above 0", test, jobs=jobs,
               limits=limits)
        for name, text, known, test, jobs in rows
    ]  # fmt: skip


def _arms(to: Scale) -> list[Claim]:
    """The spirals whose arms are 1 apart, moved."""
    source, third, middle = "P3, extended version, spirals", 0.33, 0.5
    limits = (
        "The settings are those of its script, but norms are exact and rates fall smoothly; it has one seed. Its "
        "networks of mixed limits and of limits on the stability function are not built."
    )
    plain, *limited = jobs = [to.bounded(name) for name in BOUNDS]
    found = []
    for name, of, known in zip(list(BOUNDS)[1:], limited, ("93 % against 85 %", "92 % against 85 %"), strict=True):
        text = f"Spirals moved by a third of their distance: the limited network {name!r} has more right than 'plain'"
        test = partial(more_right_moved, of=of, than=plain, by=third)
        found.append(_claim(f"arms-{name.lower()}", source, text, known, test, jobs=(of, plain), limits=limits))
    for name, known in (("2Lip-5-1Lip-5", 95), ("10-0", 97), ("5-5", 97)):
        text = f"Spirals moved by a third of their distance: the limited network {name!r} has more right than 'plain'"
        found.append(Claim(f"p3-arms-{name.lower()}", source, text, f"{known} % against 85 %", (), None, MIXED[name]))
    text, known = "Spirals moved half way to each other: no network has many right", "56 to 58 %"
    test = partial(lost, of=jobs, by=middle)
    found.append(_claim("arms-middle", source, text, known, test, jobs=jobs, limits=limits))
    return found


def _levels(to: Scale) -> list[Claim]:
    """Training that begins with few blocks."""
    found = []
    for label, theta in (("half", 0.5), ("none", 0.0)):
        whole = at(to.spirals, theta)
        few = by_levels(whole)
        depths = ", ".join(str(stage.depth) for stage in few.stages)
        text = (
            f"Spirals, theta = {theta:g}: trained with {depths} blocks, a third of the epochs each, the validation "
            "loss is at most three times that of all blocks throughout"
        )
        test = partial(no_worse, of=few, than=whole)
        known = "no numbers; log10 of the ratio at most 0.48"
        limits = "The paper has no numbers; levels, epochs and threshold are ours."
        source = "P3, its code of September 2019"
        found.append(_claim(f"levels-{label}", source, text, known, test, jobs=(few, whole), limits=limits))
    return found
