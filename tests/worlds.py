"""Finished runs of P2 that were never run: folders with the numbers of a law, so that verdicts are known beforehand."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from residuum.experiments.p2_runs import DISTANCE, SCALED
from residuum.files import write_json
from residuum.nulls import null_theory
from residuum.profiles import Measure, Point, Profile
from residuum.runs import Finished, Run

# (run, section) -> (distance, scaled distance, scaled distance at initialisation)
Law = Callable[[Run, int], tuple[float, float, float]]
IMAGES = 6


def as_the_paper(run: Run, section: int) -> tuple[float, float, float]:
    """Distances that saturate at the paper's values, a few per mille apart between seeds; decay changes nothing."""
    depth = run.model.blocks[0]
    data = "cifar10" if run.data.name == "cifar10" else "mnist"
    seed = 1 + 0.002 * run.seed
    grown, far = seed * (1 - math.exp(-depth / 15)), seed * (1 - math.exp(-depth / 20))
    longer = 1 - 0.002 * depth * (run.training.epochs > (200 if data == "cifar10" else 30))
    return DISTANCE[data][section] * far, SCALED[data][section] * grown * longer, untrained(depth, section)


def as_untrained(run: Run, section: int) -> tuple[float, float, float]:
    """Training makes every step 2 % longer, and nothing else but for a few per mille between seeds."""
    d = untrained(run.model.blocks[0], section)
    return 50 * d, d * (1.02 + 0.002 * run.seed), d * (1 + 0.001 * run.seed)


def untrained(depth: int, section: int) -> float:
    return null_theory((depth,) * 3)[section].scaled_distance


def make(jobs: Iterable[Run], out: Path, law: Law, *, version: str = "0.1.0") -> dict[str, Finished]:
    """Folders of runs with the numbers of a law, and what reads them."""
    return {job.key: _make(job, out / job.key, law, version) for job in jobs}


def _make(run: Run, folder: Path, law: Law, version: str) -> Finished:
    folder.mkdir(parents=True, exist_ok=True)
    found = [law(run, section) for section in range(3)]
    depth = run.model.blocks[0]
    content = {}
    for network, i in (("measured", 1), ("initial", 2)):
        absolute, scaled = [d[0] for d in found], [d[i] for d in found]
        content[network] = {
            name: {"sections": [v / by for v in values], "network": sum(values) / (by * (3 if by > 1 else 1))}
            for name, values, by in (
                ("computational_distance", absolute, 1),
                ("scaled_distance", scaled, 1),
                ("mean_perturbation", absolute, depth),
                ("mean_scaled_perturbation", scaled, depth),
            )
        }
    write_json(folder / "indices.json", content)
    write_json(folder / "history.json", [{"epoch": 1, "test_accuracy": 0.995 if run.data.name == "mnist" else 0.93}])
    write_json(folder / "provenance.json", {"versions": {"residuum": version}})
    for name, i in (("profile", 1), ("initial", 2)):
        profile_of(depth, [d[0] for d in found], [d[i] for d in found]).save(folder / f"{name}.safetensors")
    return Finished(run, folder)


def profile_of(depth: int, distances: list[float], scaled: list[float]) -> Profile:
    """Steps that add up to the distances; longer at the start of sections 1 and 2, at both ends of section 3."""
    points = tuple(Point(section, block) for section in range(3) for block in range(depth))

    def values(totals: list[float]) -> torch.Tensor:
        columns = []
        for section, total in enumerate(totals):
            places = torch.linspace(0, 1, depth) if depth > 1 else torch.tensor([0.5])
            shape = 1.5 - places if section < 2 else 0.5 + 4 * (places - 0.5).square()
            columns.append(total * shape / shape.sum())
        wobble = 1 + 0.01 * torch.arange(-(IMAGES // 2), IMAGES - IMAGES // 2)
        return (wobble[:, None] * torch.cat(columns)).float()

    measures = {
        "perturbation": Measure(values(distances), points, "block"),
        "scaled_perturbation": Measure(values(scaled), points, "block"),
    }
    return Profile(torch.arange(IMAGES), measures, ("1", "2", "3"), (depth,) * 3, {})
