"""Linear stability: what one step does to `y' = lambda y` and to a rotation, and pictures of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Complex, Float

from residuum.drawing import save
from residuum.layers.controlled import Spectrum
from residuum.layers.steps import Explicit, Theta
from residuum.layers.tableaus import Tableau
from residuum.names import unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Float[np.ndarray, "*shape"] | Complex[np.ndarray, "*shape"]
_REACH = 10.0  # of dt lambda, where a spectrum is looked for
SCHEMES = ("forward euler", "backward euler", "trapezoidal", "verlet")


def amplification(z: Numbers, *, theta: float) -> Numbers:
    """The stability function of the theta step: `R(z) = (1 + (1 - theta) z) / (1 - theta z)`, z = dt lambda.

    One step multiplies y of `y' = lambda y` by R. |R| < 1: it shrinks. |R| <= 1 on the whole left half plane if and
    only if theta >= 1/2; R tends to -(1 - theta) / theta for large z.

    Args:
        z: Any points but the pole 1 / theta, where R is infinite.
        theta: In [0, 1].

    Raises:
        ValueError: If theta is not in [0, 1].

    Source: P3 (Reshniak & Webster), section 2; Hairer & Wanner, Solving Ordinary Differential Equations II, IV.3.
    """
    _check_theta(theta)
    with np.errstate(divide="ignore"):
        return np.divide(1 + (1 - theta) * z, 1 - theta * z)


def inverse_amplification(r: Numbers, *, theta: float) -> Numbers:
    """The z of which the theta step's stability function is r: `(1 - r) / ((1 - r) theta - 1)`.

    Limits of what a block may do to a state become limits of the spectrum of its branch.

    Args:
        r: Any values but -(1 - theta) / theta, which R reaches at infinity only.
        theta: In [0, 1].

    Raises:
        ValueError: If theta is not in [0, 1].

    Source: P3 (Reshniak & Webster), extended version.
    """
    _check_theta(theta)
    with np.errstate(divide="ignore"):
        return np.divide(1 - r, (1 - r) * theta - 1)


def spectrum_of(step: Theta | Explicit, low: float, middle: float, high: float, *, learned: bool = True) -> Spectrum:
    """The spectrum of a branch with which a step amplifies by what lies in the disc with the diameter [low, high].

    R maps the disc between R^-1(low) and R^-1(high) onto that one, so eigenvalues lambda of the branch's Jacobian with
    dt lambda in the first have R(dt lambda) in the second. With a `Controlled` branch more holds: a linear one makes
    `|step - (low + high) / 2| <= (high - low) / 2`, and for low >= 0 no step, linear or not, brings two states nearer
    to each other than by the factor low, or moves them apart by more than the factor high.

    Args:
        step: The step that the branch is for.
        low: Smallest real part of an amplification, above -(1 - theta) / theta, which R reaches at infinity.
        middle: In [low, high]: the amplification to whose place the learned disc can shrink.
        high: Largest real part of an amplification.
        learned: As of `Spectrum`.

    Returns:
        The disc; dt lambda is clipped to [-10, 10].

    Raises:
        ValueError: If the three are not in this order, if low is not above -(1 - theta) / theta, or if clipping leaves
            nothing between low and high.

    Source: P3 (Reshniak & Webster), extended version, with a reach of 10; von Neumann's inequality for what holds
    beyond eigenvalues.
    """
    theta = step.theta if isinstance(step, Theta) else 0.0
    least = -(1 - theta) / theta if theta else -np.inf
    if not least < low <= middle <= high:
        raise ValueError(
            f"spectrum_of: low is {low}, middle {middle}, high {high}; they must be in this order, and for theta = "
            f"{theta:g} above {least:g}, which no finite spectrum reaches"
        )
    z = inverse_amplification(np.array([low, middle, high]), theta=theta).clip(-_REACH, _REACH) / step.dt
    if low < high and z[0] == z[2]:
        raise ValueError(
            f"spectrum_of: low {low} and high {high} both need dt lambda beyond the reach of {_REACH:g} and are one "
            "after clipping; give amplifications nearer to 1"
        )
    return Spectrum(*map(float, sorted(z)), learned=learned)


def amplification_of(tableau: Tableau, z: Numbers) -> Complex[np.ndarray, "*shape"]:
    """The stability function of a Runge-Kutta method: `R(z) = 1 + z b^T (I - z A)^-1 1`.

    Args:
        tableau: The method.
        z: Any points that are no poles.

    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, proposition IV.3.1.
    """
    z = np.asarray(z, dtype=complex)
    a, b = np.array(tableau.a), np.array(tableau.b)
    systems = np.eye(len(b)) - z[..., None, None] * a
    return 1 + z * (np.linalg.solve(systems, np.ones((*z.shape, len(b), 1)))[..., 0] @ b)


def scheme_matrix(name: str, a: float) -> Float[np.ndarray, "2 2"]:
    """The matrix of one step for `y' = w z`, `z' = -w y`, whose exact flow turns (y, z) and keeps its length.

    Args:
        name: One of `SCHEMES`; verlet is symplectic Euler, `y <- y + dt f(z)` first.
        a: dt w.

    Raises:
        ValueError: If there is no scheme of that name.

    Source: P3 (Reshniak & Webster), eq. 6; the matrices are derived.
    """
    turn, one = np.array([[0.0, a], [-a, 0.0]]), np.eye(2)
    if name == "forward euler":
        return one + turn
    if name == "backward euler":
        return np.linalg.inv(one - turn)
    if name == "trapezoidal":
        return np.linalg.solve(one - turn / 2, one + turn / 2)
    if name == "verlet":
        return np.array([[1.0, a], [-a, 1.0 - a * a]])
    raise unknown("scheme", name, SCHEMES)


def radius(matrix: Float[np.ndarray, "n n"]) -> float:
    """The largest modulus of an eigenvalue: above 1 states grow, below 1 they shrink.

    At 1 they may still grow, by a power of the number of steps, where an eigenvalue lacks an eigenvector, as Verlet's
    does at a = 2.
    """
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def draw(folder: Path) -> list[Path]:
    """Draw the phase plane of the four schemes and the regions of stability, each as PNG and PDF.

    Args:
        folder: Where to write; it exists.

    Returns:
        The files: phase_plane.png, phase_plane.pdf, regions.png, regions.pdf.

    Source: P3 (Reshniak & Webster), figure 2, there with a step size that is not printed; the regions are those of its
    later code.
    """
    from matplotlib import rc_context

    written = []
    with rc_context({"font.size": 11, "axes.titlesize": 12}):
        for name, figure in (("phase_plane", phase_plane(0.5)), ("regions", _regions())):
            written += save(figure, folder, name)
    return written


_VERDICTS = {
    "forward euler": "Forward Euler spirals outwards",
    "backward euler": "Backward Euler spirals inwards",
    "trapezoidal": "The trapezoidal rule stays on circles",
    "verlet": "Verlet stays on ellipses (dt w < 2)",
}


def phase_plane(a: float) -> "Figure":
    """Orbits of the four schemes for the rotation, in the plane of y and z.

    Args:
        a: dt w.

    Source: P3 (Reshniak & Webster), figure 2.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9.6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, SCHEMES, strict=True):
        _flow(axes, name, a)
    figure.suptitle(f"Four steps for the rotation y' = w z, z' = -w y, with dt w = {a:g}", fontsize=14)
    return figure


def _flow(axes: "Axes", name: str, a: float) -> None:
    """Orbits of one scheme from three starting points, on the circles of the exact flow."""
    matrix = scheme_matrix(name, a)
    steps = 8 if name == "forward euler" else 26
    angles = np.linspace(0, 2 * np.pi, 200)
    for number, size in enumerate((0.4, 0.8, 1.2)):
        orbit = [np.array([size, 0.0])]
        for _ in range(steps):
            orbit.append(matrix @ orbit[-1])
        y, z = np.array(orbit).T
        axes.plot(size * np.cos(angles), size * np.sin(angles), color="0.8", lw=1, label=_once("exact flow", number))
        axes.plot(y, z, "o-", color="C0", ms=3, lw=1, label=_once("steps", number))
        axes.plot(y[0], z[0], "s", color="C1", ms=6, label=_once("start", number))
    axes.set(xlabel="y", ylabel="z", aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    axes.set_title(f"{_VERDICTS[name]}\nspectral radius {radius(matrix):.4f}")
    axes.legend(loc="upper right", fontsize=9)


def _once(label: str, number: int) -> str:
    return "" if number else label


def _regions() -> "Figure":
    from matplotlib.figure import Figure

    maps: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
        ("Plain layer: shrinks in a disc around 0", "|z|", np.abs),
        ("Forward Euler: only in a disc", "|1 + z|", lambda z: np.abs(amplification(z, theta=0.0))),
        ("Trapezoidal: exactly the left half", "|(2 + z) / (2 - z)|", lambda z: np.abs(amplification(z, theta=0.5))),
        ("Backward Euler: all but a disc", "|1 / (1 - z)|", lambda z: np.abs(amplification(z, theta=1.0))),
    ]
    side = np.linspace(-5, 5, 400)  # an even number, so that no point is a pole
    z = side[None] + 1j * side[:, None]
    figure = Figure(figsize=(9, 9.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (title, formula, size) in zip(panels.flat, maps, strict=True):
        with np.errstate(divide="ignore"):
            shades = np.log10(size(z))
        drawn = axes.imshow(shades, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", extent=(-5, 5, -5, 5))
        axes.contour(side, side, size(z), levels=[1.0], colors="black", linewidths=1.5)
        axes.set(aspect="equal", title=f"{title}\nfactor {formula}")
    for axes in panels[-1]:
        axes.set_xlabel("Re z, z = dt lambda")
    for axes in panels[:, 0]:
        axes.set_ylabel("Im z")
    bar = figure.colorbar(drawn, ax=panels, orientation="horizontal", shrink=0.6, extend="both")
    bar.set_label("log10 of the factor of one step; black line: factor 1, states shrink on its blue side")
    figure.suptitle("Where one step for y' = lambda y shrinks y", fontsize=14)
    return figure


def _check_theta(theta: float) -> None:
    if not 0 <= theta <= 1:
        raise ValueError(f"theta is {theta}; it must lie in [0, 1]")
