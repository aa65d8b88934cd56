"""P3's claims that no training is needed for: stability, and what its blocks, gradients and solvers are."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from residuum.claims import Claim, Obtained, Results, between, equals, every
from residuum.effects import mean_over
from residuum.experiments.p3_runs import Scale, at
from residuum.layers.branches import Antisymmetric
from residuum.layers.steps import Explicit, Theta
from residuum.linear import GMRES, Dense, LinearSolver, Neumann
from residuum.solve import fixed_point
from residuum.solvers import Anderson, Picard
from residuum.stability import amplification, radius, scheme_matrix
from residuum.toys.examples import Example
from residuum.toys.truncation import truncation

SPEC = "derived, spec of this project"
VERDICTS = {
    "forward euler": "unconditionally unstable: radius sqrt(1 + a^2)",
    "backward euler": "unconditionally stable, contracting: radius 1 / sqrt(1 + a^2)",
    "trapezoidal": "neutral: radius 1 for every step",
    "verlet": "conditionally stable: radius 1 if and only if a <= 2",
}
STEPS = (0.5, 1.0, 2.0, 2.1, 5.0)  # dt w of the table of radii
EXACT = 1e-6  # Verlet's double eigenvalue at dt w = 2 is found to the root of the rounding error, 1.5e-8
NEAR_THETA = 0.2  # the error of the truncated gradient was 0.21, 0.45, 0.73 at theta 0.25, 0.5, 0.75 in the example
THETAS, FORMS = (0.0, 0.25, 0.5, 0.75, 1.0), ("two_point", "midpoint")
# Spec 4.8, checks 2, 3, 6 and 8.
BY_DIFFERENCES, SAME_ADJOINT, REVERSED, TURNS = 1e-7, 1e-10, 1e-10, 10_000
TOL = 1e-14
WIDTH, LIPSCHITZ, ROWS = 6, 0.6, 4


def exact(to: Scale) -> list[Claim]:
    """The claims that are judged without a run."""
    stable = [
        (f"radius-{scheme.replace(' ', '-')}", "P3, section 2, figure 2",
         f"{scheme} for a rotation, a = dt w, is {words}", "the formula, at a = 0.5, 1, 2, 2.1, 5",
         partial(radii, scheme=scheme))
        for scheme, words in VERDICTS.items()
    ]  # fmt: skip
    few = f"{WIDTH} entries, double precision, theta = 0, 1/4, 1/2, 3/4, 1, both forms"
    rows = [
        *stable,
        ("half-plane", f"{SPEC}, section 4.2", "The theta step shrinks the whole left half plane if and only if theta "
         ">= 1/2", "|R| <= 1 on a grid of it", half_plane),
        ("gradient", "P3, section 2.1", f"Gradients by state, weights and biases are those of the formulas: {few}",
         f"relative error against central differences below {BY_DIFFERENCES:g}", gradient),
        ("adjoint", "P3, section 2.1", "One linear solve gives the backward pass: GMRES and Neumann agree with a dense "
         "solve", f"relative difference at most {SAME_ADJOINT:g}", adjoint),
        ("explicit", "P3, section 2.1", "theta = 0 is the residual block to the bit; at theta = 1 both forms are one",
         "no bit differs", explicit),
        ("guess", "P3, section 2.1", "The guess with f linearised is nearer to the solution than Euler's",
         "order 3 in the step, Euler's 2, within 0.1", guess),
        ("picard", "P3, section 2.1", "The fixed-point iteration contracts like a power of the Lipschitz constant",
         "by theta |J| = 0.3 per step, within 1e-6, where J is 0.6 of a rotation", contraction),
        ("reversible", "P3, abstract and section 2", "Blocks with theta = 1/2 are undone from their output",
         f"error of 10 blocks below {REVERSED:g}", reversal),
        ("conserves", "P3, section 2", f"For a rotation theta = 1/2 keeps the norm over {TURNS:,} steps, theta = 0 "
         "grows, theta = 1 shrinks", "by (1 + a^2)^(k/2) and its inverse, to 1e-8", conserves),
        ("count-sine", f"{SPEC}, section 4.8", "Parameters of the regression's network of 10 blocks", "316",
         partial(parameters, example=replace(to.sine, depth=10, width=5), expected=316)),
        ("count-spirals", f"{SPEC}, section 4.8", "Parameters of the spirals' network of 25 blocks", "1075",
         partial(parameters, example=replace(to.spirals, depth=25, width=6), expected=1075)),
        ("data-spirals", f"{SPEC}, section 4.8", "The spirals are the paper's: 513 rows in each half, of the classes "
         "256 and 257", "to train 257 of class 1, to validate 256", partial(halves, example=to.spirals)),
    ]  # fmt: skip
    found = [Claim(f"p3-{name}", source, text, known, (), test) for name, source, text, known, test in rows]
    for example in (to.sine, to.spirals):
        for theta in THETAS[1:]:
            text = f"{example.problem}, theta = {theta:g}: the gradient of the paper's code leaves out its share theta"
            test = partial(truncated_error, example=at(example, theta))
            known = "relative error 1" if theta == 1 else "relative error theta, within 20 %"
            label, limits = f"p3-truncated-{example.problem}-{theta:g}", "At fresh weights."
            found.append(Claim(label, f"{SPEC}, section 4.4", text, known, (), test, limits))
    return found


def radii(results: Results, *, scheme: str) -> Obtained:
    """The spectral radius of a step for the rotation is that of the formula."""
    expected = {
        "forward euler": lambda a: math.hypot(1, a),
        "backward euler": lambda a: 1 / math.hypot(1, a),
        "trapezoidal": lambda a: 1.0,
        "verlet": lambda a: 1.0 if a <= 2 else (a * a - 2 + a * math.sqrt(a * a - 4)) / 2,
    }[scheme]
    found = {a: radius(scheme_matrix(scheme, a)) for a in STEPS}
    right = sum(abs(found[a] - expected(a)) < EXACT for a in STEPS)
    words = ", ".join(f"{value:.4f} at {a:g}" for a, value in found.items())
    return Obtained(f"{words}; must be those of the formula to {EXACT:g}", "pass" if right == len(STEPS) else "fail")


def half_plane(results: Results) -> Obtained:
    """|R| <= 1 on the left half plane for theta >= 1/2 and for no other."""
    x, y = np.meshgrid(-np.logspace(-3, 3, 61), np.linspace(-1000, 1000, 81))
    most = {theta: float(np.abs(amplification(x + 1j * y, theta=theta)).max()) for theta in THETAS}
    right = all((size <= 1 + 1e-12) == (theta >= 0.5) for theta, size in most.items())
    words = ", ".join(f"{size:.4g} at theta = {theta:g}" for theta, size in most.items())
    return Obtained(f"largest |R| {words}; must be at most 1 from 1/2 on, and only there", "pass" if right else "fail")


def gradient(results: Results) -> Obtained:
    """The largest error of a slope along drawn directions by the length of the gradient, over theta, form and leaf."""
    worst = 0.0
    for theta in THETAS:
        for form in FORMS:
            branch, h, u = _branch(), _states(1).requires_grad_(), _states(2)
            block = Theta(theta, form=form, solver=Anderson(tol=TOL))(branch)
            by = [h, branch.weight, branch.bias]
            found = torch.autograd.grad((block(h) * u).sum(), by)
            for seed, (leaf, grad) in enumerate(zip(by, found, strict=True)):
                along = _random(*leaf.shape, seed=seed)
                along /= along.norm()
                wanted = _by_differences(lambda block=block, h=h, u=u: (block(h) * u).sum(), leaf, along)
                worst = max(worst, abs((grad * along).sum().item() - wanted) / grad.norm().item())
    return _judged("largest relative error", worst, BY_DIFFERENCES)


@torch.no_grad()
def _by_differences(loss: Callable[[], Tensor], leaf: Tensor, along: Tensor) -> float:
    """Central difference of a loss as a tensor that it reads moves along a direction."""
    ends, width = [], 1e-5
    for move in (width, -2 * width):
        leaf.add_(along, alpha=move)
        ends.append(loss().item())
    leaf.add_(along, alpha=width)
    return (ends[0] - ends[1]) / (2 * width)


def adjoint(results: Results) -> Obtained:
    """The gradient by the state with each solver beside that of the dense one."""
    solvers: tuple[LinearSolver, ...] = (Dense(TOL), GMRES(10 * TOL), Neumann(10 * TOL))
    worst = 0.0
    for form in FORMS:
        found = []
        for solver in solvers:
            h = _states(1).requires_grad_()
            block = Theta(0.6, form=form, solver=Anderson(tol=TOL), adjoint=solver)(_branch())
            found.append(torch.autograd.grad((block(h) * _states(2)).sum(), h)[0])
        worst = max(worst, *(((g - found[0]).norm() / found[0].norm()).item() for g in found[1:]))
    return _judged("largest relative difference", worst, SAME_ADJOINT)


def explicit(results: Results) -> Obtained:
    """Entries that differ by any bit."""
    branch, h = _branch(), _states(1)
    with torch.no_grad():
        none = [Theta(0.0, form=form)(branch)(h) for form in FORMS]
        one = [Theta(1.0, form=form, solver=Anderson(tol=TOL))(branch)(h) for form in FORMS]
        wanted = [Explicit()(branch)(h)] * 2 + one[:1]
    differ = sum(int((a != b).sum()) for a, b in zip([*none, one[1]], wanted, strict=True))
    return equals(f"{differ} entries differ", "0 entries differ")


def guess(results: Results) -> Obtained:
    """Orders of the residual at a solver's start, by two steps of which one is half the other."""
    parts = []
    for start, order in (("linearised", 3), ("euler", 2)):
        errors = []
        for dt in (0.02, 0.01):
            block = Theta(0.5, dt, solver=Anderson(tol=TOL), start=start)(_branch())
            with torch.no_grad():
                errors.append(block.solve(_states(1)).start.norm().item())
        found = math.log2(errors[0] / errors[1])
        parts.append(
            Obtained(f"{start} {found:.3f}; must be {order} within 0.1", "pass" if abs(found - order) < 0.1 else "fail")
        )
    return every(parts)


def contraction(results: Results) -> Obtained:
    """Error of a fixed-point iterate by that of the one before, for a branch whose Jacobian is 0.6 of a rotation."""
    turn = 0.6 * torch.linalg.qr(_random(WIDTH, WIDTH, seed=3))[0]
    h = _states(1)
    with torch.no_grad():
        y = torch.linalg.solve(torch.eye(WIDTH, dtype=torch.float64) - 0.5 * turn, (h + 0.5 * h @ turn.mT).mT).mT
        errors = [
            (fixed_point(lambda y: h + 0.5 * (h + y) @ turn.mT, h, Picard(TOL, max_steps=n), throw=False).value
             - y).norm().item()
            for n in (5, 6)
        ]  # fmt: skip
    ratio = errors[1] / errors[0]
    return Obtained(f"{ratio:.8f}; must be 0.3 within 1e-6", "pass" if abs(ratio - 0.3) < 1e-6 else "fail")


def reversal(results: Results) -> Obtained:
    """The largest error of a state that went through blocks and back."""
    blocks = [Theta(0.5, solver=Anderson(tol=TOL))(_branch(seed)) for seed in range(10)]
    h = first = _states(1)
    with torch.no_grad():
        for block in blocks:
            h = block(h)
        for block in reversed(blocks):
            h = block.inverse(h)
    return _judged("largest error", (h - first).abs().max().item(), REVERSED)


def conserves(results: Results) -> Obtained:
    """The norm after many steps by that before; a block with a linear branch is a matrix, and many are its power."""
    a, turn = 0.3, Antisymmetric(2, "identity").double().requires_grad_(False)
    turn.weight.copy_(torch.tensor([[0.0, a], [0.0, 0.0]], dtype=torch.float64))
    said, right = [], True
    for theta, steps, expected in (
        (0.5, TURNS, 1.0),
        (0.0, 20, math.hypot(1, a) ** 20),
        (1.0, 20, math.hypot(1, a) ** -20),
    ):
        matrix = Theta(theta, solver=Anderson(tol=TOL))(turn)(torch.eye(2, dtype=torch.float64))
        found = torch.linalg.matrix_norm(torch.linalg.matrix_power(matrix, steps), 2).item()
        right &= abs(found / expected - 1) < 1e-8
        said.append(f"{found:.10g} after {steps:,} steps at theta = {theta:g}")
    return Obtained(f"{', '.join(said)}; must be those of the formula to 1e-8", "pass" if right else "fail")


def parameters(results: Results, *, example: Example, expected: int) -> Obtained:
    """The number of parameters of one member."""
    network = replace(example, seeds=(0,), rates=example.rates[:1]).network()
    return equals(sum(p.numel() for p in network.parameters()), expected)


def halves(results: Results, *, example: Example) -> Obtained:
    """Rows, and those of class 1, of the training and of the validation half."""
    found = [(pairs.y.shape[1], int(pairs.y[0].sum())) for pairs in replace(example, seeds=(0,)).data()]
    return equals(found, [(513, 257), (513, 256)])


def truncated_error(results: Results, *, example: Example) -> Obtained:
    """The relative error of the truncated gradient is about theta, at fresh weights."""
    found = _errors(replace(example, seeds=example.seeds[:5]))
    if example.theta == 1:
        return equals(sorted(set(found)), [1.0])
    return between(mean_over(found), (1 - NEAR_THETA) * example.theta, (1 + NEAR_THETA) * example.theta)


@cache
def _errors(example: Example) -> list[float]:
    return truncation(example)["error"]


def _judged(words: str, found: float, most: float) -> Obtained:
    return Obtained(f"{words} {found:.2g}; must be below {most:g}", "pass" if found < most else "fail")


def _branch(seed: int = 0) -> nn.Module:
    """An antisymmetric branch with tanh and a Lipschitz constant of `LIPSCHITZ`, in double precision."""
    branch = Antisymmetric(WIDTH).double()
    with torch.no_grad():
        drawn = _random(WIDTH, WIDTH, seed=(10 + seed))
        branch.weight.copy_(LIPSCHITZ * drawn / torch.linalg.matrix_norm(drawn - drawn.mT, 2))
        branch.bias.copy_(0.3 * _random(WIDTH, seed=(100 + seed)))
    return branch


def _states(seed: int) -> Tensor:
    return _random(ROWS, WIDTH, seed=seed)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
