"""Cut any torch model into its residual stream, run it under any schedule of blocks, measure what each block does."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and where they live. They are imported when first used, so that `residuum --help` imports no torch.
_HOMES = {
    "cut": "cutting",
    "cut_all": "cutting",
    "run_all": "streams",
    "Block": "streams",
    "Section": "streams",
    "Step": "streams",
    "Stream": "streams",
    "Trace": "streams",
    "Measure": "profiles",
    "Point": "profiles",
    "Profile": "profiles",
    "profile": "profiles",
    "ResNet": "models",
    "ResNetConfig": "models",
    "Sharing": "layers.sharing",
    "Coupling": "layers.coupling",
    "achieved_sharing": "layers.coupling",
    "couple_gradients_": "layers.coupling",
    "tied": "layers.coupling",
    "Limit": "layers.lipschitz",
    "limit_": "layers.lipschitz",
    "Controlled": "layers.controlled",
    "Spectrum": "layers.controlled",
    "spectrum_of": "stability",
    "Penalty": "penalties",
    "penalised": "penalties",
    "export": "layers.lipschitz",
    "reversible": "layers.reversible",
    "share": "layers.sharing",
    "fold": "layers.sharing",
    "fold_coupled": "folding",
    "Explicit": "layers.steps",
    "Theta": "layers.steps",
    "RungeKutta": "layers.steps",
    "Verlet": "layers.pairs",
    "Additive": "layers.pairs",
    "Leapfrog": "layers.pairs",
    "Midpoint": "layers.pairs",
    "Momentum": "layers.pairs",
    "fixed_point": "solve",
    "Solution": "solve",
    "ConvergenceError": "solve",
    "Picard": "solvers",
    "Anderson": "solvers",
    "NewtonKrylov": "solvers",
    "GradientDescent": "solvers",
    "Neumann": "linear",
    "BiCGStab": "linear",
    "GMRES": "linear",
    "Dense": "linear",
    "load_model": "loading",
    "Run": "runs",
    "DataConfig": "runs",
    "TrainConfig": "training",
    "execute": "runs",
    "grid": "sweeps",
    "sweep": "sweeps",
    "watch": "curves",
    "calibrate_": "nulls",
    "null_model": "nulls",
    "recalibrated": "nulls",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'residuum' has no attribute {name!r}")
    return getattr(import_module(f"residuum.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
