"""Hauser's network on MNIST at several depths: trains, measures and tabulates; what is there already is not repeated.

python examples/p2_mnist.py OUT [--data-root DIR] [--depths 2 4 8] [--epochs 3]

Trains one network per depth into OUT/L<depth>, measures it on the test images into OUT/probe-L<depth>, compares them on
one page OUT/report.html, and prints the tables of docs/results/p2.md. One thread per process is fastest for the bits
that count: OMP_NUM_THREADS=1.
"""

import argparse
import json
from pathlib import Path

from residuum.cli import main as residuum
from residuum.indices import slopes
from residuum.nulls import null_theory


def run(*arguments: object) -> None:
    """One command of residuum; an error has been said."""
    if residuum([str(argument) for argument in arguments]):
        raise SystemExit(2)


def measure(out: Path, depth: int, epochs: int, root: Path | None) -> dict:
    """The indices of one depth and its test error in percent."""
    data = ["--data", "mnist", *(["--data-root", root] if root else [])]
    trained, probed = out / f"L{depth}", out / f"probe-L{depth}"
    if not trained.exists():
        size = ["--blocks", depth, depth, depth, "--epochs", epochs, "--batch", 128]
        run("train", "--out", trained, *data, *size)
    if not probed.exists():
        run("probe", trained, *data, "--out", probed)
    found = json.loads((probed / "indices.json").read_text())
    history = json.loads((trained / "history.json").read_text())
    return found | {"error": 100 * (1 - history[-1]["test_accuracy"])}


def table(found: dict[int, dict], index: str) -> None:
    """One index: trained, calibrated at initialisation, and its slope between the depths."""
    sections = len(next(iter(found.values()))["measured"][index]["sections"])
    names = [*(f"section {s + 1}" for s in range(sections)), "network"]
    print(f"\n| {index.replace('_', ' ')} | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    rows: dict[tuple[str, int], list[float]] = {}
    for kind in ("measured", "initial"):
        for depth, indices in found.items():
            values = [*indices[kind][index]["sections"], indices[kind][index]["network"]]
            rows[kind, depth] = values
            said = "trained" if kind == "measured" else "initial"
            print(f"| L={depth}, {said} | {' | '.join(f'{v:.3g}' if v < 1000 else f'{v:.0f}' for v in values)} |")
    if len(found) > 1:
        span = (min(found), max(found))
        for kind, said in (("measured", "trained"), ("initial", "initial")):
            columns = zip(*(rows[kind, depth] for depth in found), strict=True)
            fitted = [slopes(dict(zip(found, column, strict=True)), ranges=(span,))[span] for column in columns]
            print(f"| log-log slope, {said} | {' | '.join(f'{v:+.2f}' for v in fitted)} |")


def main() -> None:
    """Do the work and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--epochs", type=int, default=3)
    flags = parser.parse_args()
    found = {depth: measure(flags.out, depth, flags.epochs, flags.data_root) for depth in sorted(flags.depths)}
    run("report", *(flags.out / f"probe-L{depth}" for depth in found), "--out", flags.out / "report.html", "--force")
    print(f"\n| | {' | '.join(f'L={depth}' for depth in found)} |\n| --- |{' --- |' * len(found)}")
    errors = [indices["error"] for indices in found.values()]
    print(f"| test error, % | {' | '.join(f'{error:.2f}' for error in errors)} |")
    for index in ("computational_distance", "mean_perturbation", "scaled_distance", "mean_scaled_perturbation"):
        table(found, index)
    print(
        "\n| scaled distance at initialisation, theory | section 1 | section 2 | section 3 |\n| --- | --- | --- | --- |"
    )
    for depth in found:
        theory = null_theory((depth,) * 3)
        print(f"| L={depth} | {' | '.join(f'{section.scaled_distance:.3g}' for section in theory)} |")


if __name__ == "__main__":
    main()
