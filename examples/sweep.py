"""A study of how far blocks move the state, by depth: `residuum sweep examples/sweep.py:depths --out OUT`."""

from residuum import DataConfig, ResNetConfig, Run, TrainConfig, grid


def depths() -> list[Run]:
    """Three depths, two seeds."""
    base = Run(
        ResNetConfig((2, 2, 2), (8, 16, 32), channels=1),
        DataConfig("digits"),
        TrainConfig(epochs=4),
        probes=("perturbation", "readouts"),
    )
    return grid(base, {"model.blocks": [(2, 2, 2), (4, 4, 4), (8, 8, 8)], "seed": range(2)})
