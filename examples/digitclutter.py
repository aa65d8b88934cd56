"""The picture of docs/data.md: samples of Digitclutter.

python examples/digitclutter.py OUT.png [--handwriting mnist] [--data-root DIR]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from residuum.data import Clutter, ClutterConfig, digitclutter, load_splits

COLUMNS, SIDE, GAP = 12, 32, 2
TITLE = (
    "Digitclutter: more digits hide more of each other, the last one laid is whole\n"
    "32x32 pixels; below each image its digits in the order in which they are laid"
)


def strip(axis: plt.Axes, title: str, made: Clutter) -> None:
    """One row of images with their digits below."""
    images = [np.pad(image[..., 0], ((0, 0), (0, GAP)), constant_values=255) for image in made.images]
    axis.imshow(np.concatenate(images, axis=1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    places = [SIDE / 2 + (SIDE + GAP) * k for k in range(COLUMNS)]
    axis.set_xticks(places, ["".join(map(str, digits)) for digits in made.digits], fontsize=8)
    axis.set_yticks([])
    axis.tick_params(length=0)
    axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    axis.spines[:].set_visible(False)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--handwriting", default="digits", help="mnist, digits, or path/FILE.npz")
    parser.add_argument("--data-root", type=Path)
    flags = parser.parse_args()
    hands = load_splits(flags.handwriting, flags.data_root).train
    rows = [(f"{m} digits", ClutterConfig(m), None) for m in (2, 3, 4, 5)]
    rows += [(f"3 digits,\n{debris} debris", ClutterConfig(3, debris), None) for debris in ("light", "medium", "heavy")]
    rows += [("3 digits,\ngrey overflows", ClutterConfig(3, grey="overflow"), None)]
    rows += [("3 digits,\nhandwritten", ClutterConfig(3), hands)]
    rows += [("handwritten,\nlight debris", ClutterConfig(3, "light"), hands)]
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 8.4), layout="constrained")
    for axis, (title, config, handwriting) in zip(axes, rows, strict=True):
        strip(axis, title, digitclutter(config, COLUMNS, handwriting=handwriting))
    figure.suptitle(TITLE, fontsize=10)
    figure.savefig(flags.out, dpi=110)


if __name__ == "__main__":
    main()
