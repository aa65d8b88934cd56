"""The small examples of P3: trains, measures and draws; nothing is repeated.

python examples/p3_examples.py OUT [--seeds 5] [--epochs 100] [--only spirals]

Each kind of network is trained with several seeds side by side into OUT/<problem>-<theta>-<gradient>; then the figures
and the tables of docs/results/p3.md are made of those that are there. Stopped, the same command goes on.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from residuum.experiments import p3_figures as figures
from residuum.experiments.p3 import NOISE, PAPER, Example, with_thetas, with_truncation
from residuum.files import write_atomically
from residuum.progress import bar

FIGURES = {
    "sine": (figures.convergence, figures.fits),
    "spirals": (figures.convergence, figures.regions, figures.robustness),
    "stiff": (figures.stiffness,),
    "lotka_volterra": (figures.phase_plane,),
}


def examples(seeds: int, epochs: int | None) -> list[Example]:
    """What is run: each theta, and the truncated gradient of the paper's code."""
    found: list[Example] = []
    for paper in PAPER.values():
        example = replace(paper, seeds=tuple(range(seeds)), epochs=min(epochs or paper.epochs, paper.epochs))
        found += with_thetas(example)
        found += [e for e in with_truncation(example) if example.chained and e.param_grad == "truncated"]
    return found


def name(example: Example) -> str:
    """The folder of an example."""
    return f"{example.problem}-{example.theta:g}-{example.param_grad}"


def table(folders: dict[Example, Path]) -> Iterator[str]:
    """Losses at the end, median and range over seeds; of spirals also accuracy with and without noise."""
    yield "| network | training loss | validation loss | validation accuracy, % | with noise of 0.08 |"
    yield "| --- | --- | --- | --- | --- |"
    for example, folder in folders.items():
        found = figures.values(folder)
        cells = [spread(figures.final(found, key)) for key in ("train_loss", "validation_loss")]
        if example.problem == "spirals":
            noisy = found["measured"]["noise"][str(NOISE[-1])]
            cells += [
                " ".join(f"{100 * v:.1f}" for v in row) for row in (figures.final(found, "validation_accuracy"), noisy)
            ]
        yield f"| {figures.label(example)} | " + " | ".join([*cells, "", ""][:4]) + " |"


def spread(losses: list[float]) -> str:
    """The median and the range."""
    return f"{median(losses):.1e} ({min(losses):.1e} to {max(losses):.1e})" if losses else "failed"


def write_picture(path: Path, figure: Figure) -> None:
    """A figure as PNG."""
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=100))


def main() -> None:
    """Do the work, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--only", default="")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    for problem, drawings in FIGURES.items():
        folders = {e: flags.out / name(e) for e in examples(flags.seeds, flags.epochs) if e.problem == problem}
        for example, folder in folders.items():
            if flags.only in name(example) and not (folder / "values.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                example.execute(folder, progress=bar)
        there = {e: folder for e, folder in folders.items() if (folder / "values.json").exists()}
        if there:
            print(f"\n{problem}", *table(there), sep="\n", flush=True)
            for draw in drawings:
                write_picture(flags.out / f"{problem}-{draw.__name__}.png", draw(there))


if __name__ == "__main__":
    main()
