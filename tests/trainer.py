"""A small training as a program, for tests that kill it or run it in several processes.

python trainer.py OUT.safetensors CHECKPOINT|- NORM|none KILL_AT_STEP [SETTING=VALUE ...]
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from residuum.data import Splits, load_splits
from residuum.layers.anystep import step_of
from residuum.layers.coupling import Coupling
from residuum.models import ResNet, ResNetConfig
from residuum.training import TrainConfig, train


class Small(nn.Module):
    """Convolutions with dropout, with or without batch norm."""

    def __init__(self, *, norm: bool, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.dropout(torch.relu(self.inner(torch.relu(self.norm(h)))))
        return self.dense(h.mean((2, 3)))


class Coupled(nn.Module):
    """Three equal blocks without batch norm, whose gradients are coupled while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.sections = nn.ModuleList([nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))])
        self.dense = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.sections[0]:
            h = h + 0.5 * torch.tanh(block(h))
        return self.dense(h.mean((2, 3)))


def data() -> Splits:
    """A hundred digits."""
    return Splits(*(part.take(100, seed=0) for part in load_splits("digits")))


def main(out: str, checkpoint: str, norm: str, kill_at: str, *settings: str) -> None:
    """Train, and write weights and history, unless killed first."""
    torch.set_num_threads(1)
    options = dict(setting.split("=") for setting in settings)
    config = TrainConfig(
        epochs=3,
        batch=16,
        lr=0.05,
        augment=options.get("augment", "crop_flip"),
        optimiser=options.get("optimiser", "sgd"),
        clip=float(options["clip"]) if "clip" in options else None,
        accumulate=int(options.get("accumulate", "1")),
    )
    double = options.get("dtype") == "float64"
    model = Small(norm=norm == "NORM", dropout=float(options.get("dropout", "0.2")))
    coupling = Coupling(float(options["couple"])) if "couple" in options else None
    model = Coupled() if coupling else model
    if "step" in options:
        step, reversible = step_of(options["step"], dt=0.25), options.get("reversible") == "1"
        model = ResNet(ResNetConfig((2,), (4,), 1, norm="group", step=step, reversible=reversible))
    model = model.double() if double else model
    steps = 0

    def after_backward(model: nn.Module, share: float) -> None:
        nonlocal steps
        steps += 1
        if steps == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        if coupling:
            coupling.after_backward(model, share)

    path = None if checkpoint == "-" else Path(checkpoint)
    history = train(
        model,
        data(),
        config,
        after_backward=after_backward,
        checkpoint=path,
        checkpoint_seconds=float(options.get("every", "0")),
    )
    if os.environ.get("RANK", "0") == "0":
        for row in history:
            del row["seconds"]
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, out, {"history": json.dumps(history)})


if __name__ == "__main__":
    main(*sys.argv[1:])
