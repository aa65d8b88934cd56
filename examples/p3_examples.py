"""The small examples of P3: trains, measures and draws; nothing is repeated.

python examples/p3_examples.py OUT [--seeds 5] [--only spirals] [--draw]

Each kind of network is trained with several seeds side by side into OUT/<problem>-<theta>-<gradient>; the figures and
the tables of docs/results/p3.md are made of those that are there. Stopped, the same command goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from residuum.experiments.p3 import PAPER, Example, with_thetas, with_truncation
from residuum.progress import bar


def examples(seeds: int) -> list[Example]:
    """What is run: each theta, and the truncated gradient of the paper's code."""
    sine, spirals, stiff, prey = (replace(e, seeds=tuple(range(seeds))) for e in PAPER.values())
    plain = [*with_thetas(spirals), *with_thetas(sine), *with_thetas(stiff), *with_thetas(prey)]
    return list(dict.fromkeys([*plain, *with_truncation(spirals), *with_truncation(sine)]))


def name(example: Example) -> str:
    """The folder of an example."""
    return f"{example.problem}-{example.theta:g}-{example.param_grad}"


def main() -> None:
    """Do the work and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--draw", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    for example in examples(flags.seeds):
        folder = flags.out / name(example)
        if flags.only in name(example) and not (folder / "values.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            example.execute(folder, progress=bar)


if __name__ == "__main__":
    main()
