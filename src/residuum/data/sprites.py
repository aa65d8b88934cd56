"""Digits as ink on a grey page of 512x512 pixels: drawn once, laid over each other, averaged down to 32x32."""

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt16

from residuum.names import one_line

Grey = UInt8[np.ndarray, "row column"]

PAGE, IMAGE = 512, 32
BACKGROUND = 119
FONT_SIZE, OUTLINE = 384, 10  # pixels; a stroke of 20 pixels shows 10 of them around the face
# Where the reference (ImageMagick, gravity centre) puts the line of Helvetica: 0.27 of the size below the middle.
BASELINE = round(0.27 * FONT_SIZE)
MARGIN = 112  # around the page, so that no digit has to be clipped
SMALLEST, LARGEST = 6, 9  # sides of debris
_CELL, _SIDE = PAGE // IMAGE, PAGE + 2 * MARGIN
_PEN = 14  # page pixels per pixel of handwriting: MNIST's digits, at most 20 pixels high, get the font's 280


class Sprite(NamedTuple):
    """A digit with its white outline. It covers a page `c` by `c -> c T + L`; T is 0 or 1 but for the outer edge.

    Attributes:
        place: Row and column of its upper left corner from the middle of the page, for offset 0.
        keep: 0 where the digit is opaque, else 255.
        ink: Its grey where it is opaque, else 0.
        edge: Places of the pixels that are partly covered, counted along the rows of a page with its margin.
        through: `255 T` of these.
        glow: `255 L` of these.
    """

    place: tuple[int, int]
    keep: Grey
    ink: Grey
    edge: Int64[np.ndarray, " pixel"]
    through: UInt16[np.ndarray, " pixel"]
    glow: UInt16[np.ndarray, " pixel"]


class Template(NamedTuple):
    """A digit at the images' size, of which debris is cut.

    Attributes:
        grey: Its pixels.
        mask: Where it covers at least half of a pixel.
    """

    grey: Grey
    mask: Bool[np.ndarray, "row column"]


class Page:
    """A page that digits are laid on, with its margin."""

    def __init__(self) -> None:
        self._all = np.zeros((_SIDE, _SIDE), np.uint8)
        self._page = self._all[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def clear(self, grey: int = BACKGROUND) -> None:
        """One grey everywhere."""
        self._page[:] = grey

    def lay(self, sprite: Sprite, *, x: int, y: int) -> None:
        """Cover what is there with a digit, `x` pixels to the right and `y` below its place at the middle."""
        (top, left), (rows, columns) = sprite.place, sprite.keep.shape
        top, left = top + y + MARGIN + PAGE // 2, left + x + MARGIN + PAGE // 2
        under = self._all[top : top + rows, left : left + columns]
        under &= sprite.keep
        under |= sprite.ink
        from_here = self._all.reshape(-1)[top * _SIDE + left :]
        from_here[sprite.edge] = (from_here[sprite.edge] * sprite.through + sprite.glow + 127) // 255

    def average(self) -> Grey:
        """The page at the images' size: means of 16x16 pixels, rounded."""
        rows = np.add.reduce(self._page.reshape(IMAGE, _CELL, PAGE), axis=1, dtype=np.uint16)
        sums = rows.reshape(IMAGE, IMAGE, _CELL).sum(2, dtype=np.uint32)
        return ((sums + _CELL**2 // 2) // _CELL**2).astype(np.uint8)


def sprite(outline: Grey, face: Grey, *, place: tuple[int, int]) -> Sprite:
    """A digit from the coverage (0 to 255) of its white outline, face included, and of its black face.

    The outline is laid first, then the face: `T = (1 - outline) (1 - face)`, `L = 255 outline (1 - face)`.

    Args:
        outline: Coverage of the outline.
        face: Coverage of the face.
        place: Row and column of the upper left pixel from the middle of the page.
    """
    opaque = (outline == 255) | (face == 255)
    rows, columns = np.nonzero(~opaque & ((outline > 0) | (face > 0)))
    white, black = outline[rows, columns] / 255, face[rows, columns] / 255
    return Sprite(
        place,
        np.where(opaque, 0, 255).astype(np.uint8),
        np.where(opaque, 255 - face, 0).astype(np.uint8),
        rows * _SIDE + columns,
        (255 * (1 - white) * (1 - black)).round().astype(np.uint16),
        (255 * 255 * white * (1 - black)).round().astype(np.uint16),
    )


def coverage(digit: int) -> tuple[Grey, Grey]:
    """How far outline and face of a printed digit cover the pixels of a whole page, at offset 0.

    Raises:
        OSError: If matplotlib's font is not there.
    """
    from PIL import Image, ImageDraw

    font = _font()
    found = []
    for stroke in (OUTLINE, 0):
        page = Image.new("L", (PAGE, PAGE))
        at = (PAGE // 2, PAGE // 2 + BASELINE)
        ImageDraw.Draw(page).text(at, str(digit), fill=255, font=font, anchor="ms", stroke_width=stroke)
        found.append(np.asarray(page))
    return found[0], found[1]


def font_name() -> str:
    """Family, style and version of the font, as the file itself says."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(_font_file()))
    return f"{font.family_name} {font.style_name}, {font.get_sfnt()[3, 1, 1033, 5].decode('utf-16-be')}"


@cache
def printed() -> tuple[Sprite, ...]:
    """The ten digits in DejaVu Sans Bold of 384 pixels, the font that comes with matplotlib."""
    sprites = []
    for digit in range(10):
        outline, face = coverage(digit)
        rows, columns = (np.flatnonzero(outline.any(axis)) for axis in (1, 0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        place = int(rows[0]) - PAGE // 2, int(columns[0]) - PAGE // 2
        sprites.append(sprite(outline[box], face[box], place=place))
    return tuple(sprites)


def handwritten(image: Grey) -> Sprite:
    """A handwritten digit, white on black, as black ink with a white outline of 10 pixels, in the size of print.

    The image is enlarged (14 times for 28x28 pixels, bicubic) and its contrast raised until the border of the ink, at
    half brightness, is about one pixel of the page wide. Its middle stands where the middle of a printed digit stands.
    """
    from PIL import Image

    scale = _PEN * 28 / max(image.shape)
    box = tuple(_trimmed(image.any(axis)) for axis in (1, 0))
    size = [round((part.stop - part.start) * scale) for part in box]
    large = Image.fromarray(image[box]).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    face = np.pad(np.asarray(large.point(lambda grey: (grey - 127.5) * scale + 127.5)), OUTLINE)
    outline = _widened(face, OUTLINE)
    middle = BASELINE - 140  # of a printed digit, 280 pixels high
    top, left = (round((part.start - side / 2) * scale) for part, side in zip(box, image.shape, strict=True))
    return sprite(outline, face, place=(middle + top - OUTLINE, left - OUTLINE))


def _trimmed(ink: Bool[np.ndarray, " place"]) -> slice:
    """From the first to the last with ink, and two more on each side, as far as the bicubic curve reaches."""
    places = np.flatnonzero(ink)
    return slice(max(0, int(places[0]) - 2), min(len(ink), int(places[-1]) + 3)) if len(places) else slice(0, len(ink))


def _font_file() -> Path:
    """DejaVu Sans Bold comes with matplotlib."""
    from matplotlib import get_data_path

    return Path(get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")


def _font() -> Any:
    from PIL import ImageFont

    try:
        content = BytesIO(_font_file().read_bytes())  # for a path PIL would look for a font of that name elsewhere
        return ImageFont.truetype(content, FONT_SIZE)
    except OSError as error:
        raise OSError(
            f"{_font_file()}, which comes with matplotlib, cannot be read ({one_line(error)}); install matplotlib anew"
        ) from error


def _widened(image: Grey, radius: int) -> Grey:
    """Every pixel becomes the brightest of the square around it, found in ever wider steps: 2, 4, 8, .. pixels."""
    wide, side = np.pad(image, radius), 2 * radius + 1
    for _ in range(2):  # along columns, then rows
        wide, reached = wide.T, 1
        while reached < side:
            step = min(reached, side - reached)
            wide = np.maximum(wide[:-step], wide[step:])
            reached += step
    return wide


def template(digit: Sprite) -> Template:
    """The digit alone, averaged down and trimmed to its mask, but for the largest debris at least."""
    page, averages = Page(), []
    for grey in (0, 255, BACKGROUND):
        page.clear(grey)
        page.lay(digit, x=0, y=0)
        averages.append(page.average())
    mask = averages[1] - averages[0] < 128  # the difference is what is seen of the page
    box = tuple(_span(mask.any(axis)) for axis in (1, 0))
    return Template(averages[2][box], mask[box])


def _span(covered: Bool[np.ndarray, " place"]) -> slice:
    """From the first to the last that is covered, widened to the side of the largest debris."""
    places = np.flatnonzero(covered)
    first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (IMAGE // 2, IMAGE // 2)
    first = min(max(0, min(first, (first + last - LARGEST) // 2)), IMAGE - LARGEST)
    return slice(first, max(last, first + LARGEST))


def overflowed(image: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """The grey that the reference makes: the mean of three equal channels whose sum is kept in 8 bits."""
    return image * np.uint8(3) // np.uint8(3)
