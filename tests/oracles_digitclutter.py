"""Digitclutter pixel by pixel: laid in float64 on the whole page, averaged last; debris pixel by pixel."""

from functools import cache

import numpy as np

from residuum.data.digitclutter import Draws
from residuum.data.sprites import BACKGROUND, IMAGE, PAGE, coverage

ROOM = 200  # around the page, for digits that stick out


def lay(page: np.ndarray, digit: int, x: int, y: int) -> np.ndarray:
    """White outline over the page, then the black face: twice the usual blending."""
    outline, face = (np.roll(np.pad(part / 255, ROOM), (y, x), (0, 1)) for part in coverage(digit))
    return (page * (1 - outline) + 255 * outline) * (1 - face)


def averaged(page: np.ndarray) -> np.ndarray:
    """Means of 16x16 pixels."""
    cells = page[ROOM:-ROOM, ROOM:-ROOM].reshape(IMAGE, PAGE // IMAGE, IMAGE, PAGE // IMAGE)
    return cells.mean((1, 3))


def clutter(digits: list[int], offsets: list[tuple[int, int]]) -> np.ndarray:
    """The image before debris, not rounded."""
    page = np.full((PAGE + 2 * ROOM,) * 2, float(BACKGROUND))
    for digit, (x, y) in zip(digits, offsets, strict=True):
        page = lay(page, digit, x, y)
    return averaged(page)


@cache
def template(digit: int) -> tuple[np.ndarray, np.ndarray]:
    """One digit at the images' size, trimmed to where it covers half of a pixel: grey and mask."""
    outline, face = (np.pad(part / 255, ROOM) for part in coverage(digit))
    mask = averaged(1 - (1 - outline) * (1 - face)) >= 0.5
    rows, columns = np.nonzero(mask)
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    return clutter([digit], [(0, 0)])[box], mask[box]


def strew(image: np.ndarray, draws: Draws, i: int) -> np.ndarray:
    """Debris over one image, pixel by pixel."""
    image = image.copy()
    for u in draws.debris[i]:
        grey, mask = template(int(10 * u[0]))
        side = (6, 7, 8, 9)[int(4 * u[1])]
        top, left = int(u[2] * (mask.shape[0] - side + 1)), int(u[3] * (mask.shape[1] - side + 1))
        row, column = int(u[4] * (IMAGE - side + 1)), int(u[5] * (IMAGE - side + 1))
        for a in range(side):
            for b in range(side):
                if mask[top + a, left + b]:
                    image[row + a, column + b] = grey[top + a, left + b]
    return image
