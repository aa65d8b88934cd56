"""Linear stability: the paper's table, functions and their inverses, the pictures and the command that draws them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from residuum.cli import main
from residuum.files import FIGURES
from residuum.layers import tableaus
from residuum.layers.tableaus import Tableau
from residuum.stability import (
    SCHEMES,
    amplification,
    amplification_of,
    inverse_amplification,
    radius,
    scheme_matrix,
)

few = settings(max_examples=50, deadline=None)
POINTS = np.array([0.3 + 0.2j, -1.7 + 0.4j, 4j, -30.0])


@pytest.mark.parametrize(
    ("a", "radii"),
    [
        (0.5, (1.1180340, 0.8944272, 1, 1)),
        (1.0, (1.4142136, 0.7071068, 1, 1)),
        (1.9, (2.1470911, 0.4657464, 1, 1)),
        (2.1, (2.3259407, 0.4299336, 1, 1.8773280)),
        (5.0, (5.0990195, 0.1961161, 1, 22.9564392)),
    ],
)
def test_radii_of_the_four_schemes(a: float, radii: tuple[float, ...]) -> None:
    """Source: P3, section 2, verdicts; the values follow from the matrices by hand (spec 4.2 prints four digits)."""
    assert [radius(scheme_matrix(name, a)) for name in SCHEMES] == pytest.approx(radii, abs=1e-6)


def test_verlet_at_two_has_a_double_eigenvalue_and_grows() -> None:
    matrix = scheme_matrix("verlet", 2.0)
    assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-14)
    assert np.trace(matrix) == -2  # both eigenvalues are -1
    assert np.linalg.matrix_rank(matrix + np.eye(2)) == 1  # of one eigenvector
    assert np.abs(np.linalg.matrix_power(matrix, 100)).max() > 100


@few
@given(a=st.floats(0.01, 20))
def test_scheme_radii_follow_their_formulas(a: float) -> None:
    """sqrt(1 + a^2), its inverse, 1, and for Verlet the larger root of l^2 - (2 - a^2) l + 1."""
    root = np.abs(np.roots([1, a * a - 2, 1])).max()
    wanted = (np.hypot(1, a), 1 / np.hypot(1, a), 1, root)
    # a double root loses half of the digits
    assert [radius(scheme_matrix(name, a)) for name in SCHEMES] == pytest.approx(wanted, rel=1e-6)


@few
@given(theta=st.floats(0, 1), z=st.complex_numbers(max_magnitude=100))
def test_the_inverse_undoes_the_stability_function(theta: float, z: complex) -> None:
    if abs(1 - theta * z) < 1e-3:
        return
    r = amplification(np.array([z]), theta=theta)
    # 1 - r = -z / (1 - theta z) loses digits where theta z is large
    assert np.abs(inverse_amplification(r, theta=theta) - z)[0] < 1e-13 * (1 + abs(theta * z)) ** 2 * (1 + abs(z))


@few
@given(theta=st.floats(0.5, 1), z=st.complex_numbers(max_magnitude=1e6))
def test_from_one_half_on_the_left_half_plane_is_stable(theta: float, z: complex) -> None:
    left = complex(-abs(z.real), z.imag)
    assert np.abs(amplification(np.array([left]), theta=theta))[0] <= 1 + 1e-12


def test_below_one_half_it_is_not() -> None:
    assert np.abs(amplification(np.array([-50.0]), theta=0.4))[0] > 1
    assert amplification(np.array([-1e12]), theta=0.4)[0] == pytest.approx(-0.6 / 0.4)


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (tableaus.EULER, lambda z: 1 + z),
        (tableaus.BACKWARD_EULER, lambda z: 1 / (1 - z)),
        (tableaus.TRAPEZOID, lambda z: (2 + z) / (2 - z)),
        (tableaus.GAUSS2, lambda z: (2 + z) / (2 - z)),
        (tableaus.RK4, lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24),
        (tableaus.GAUSS4, lambda z: (1 + z / 2 + z**2 / 12) / (1 - z / 2 + z**2 / 12)),
        (tableaus.RADAU3, lambda z: (1 + z / 3) / (1 - 2 * z / 3 + z**2 / 6)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_stability_functions_of_tableaus(method: Tableau, function) -> None:
    """Pade approximants of exp. Source: Hairer & Wanner, Solving Ordinary Differential Equations II, section IV.3."""
    assert np.allclose(amplification_of(method, POINTS), function(POINTS), rtol=1e-12)


def test_the_command_draws_two_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures"
    assert main(["stability", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "phase_plane.pdf",
        "phase_plane.png",
        "regions.pdf",
        "regions.png",
    ]
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    for path in out.glob("*.png"):
        picture = np.asarray(Image.open(path).convert("L"))
        assert min(picture.shape) > 1000
        assert picture.std() > 10  # something is drawn
    for path in out.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
    assert main(["stability", "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == FIGURES, "which is what --force may replace"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: amplification(POINTS, theta=1.5), "theta is 1.5"),
        (lambda: inverse_amplification(POINTS, theta=-0.1), "theta is -0.1"),
        (lambda: scheme_matrix("verlett", 1.0), "did you mean 'verlet'"),
    ],
)
def test_what_is_wrong_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
