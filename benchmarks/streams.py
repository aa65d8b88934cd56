"""What cutting, watching and reading out cost against a plain forward: `make bench`.

One thread, processor time, interleaved pairs of processes, median of ratios (see timing.py). Both sides are first
checked to compute the same. The limits are those that the project set itself before measuring.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Side, Work, heading, ratio, row
from residuum.cutting import cut
from residuum.models import Residual, ResNet, ResNetConfig
from residuum.probes.passive import passive, perturbation
from residuum.probes.readout import readouts

BLOCKS = 8  # per section
PROBE = passive(perturbation)


def digits() -> Tensor:
    return torch.randn(128, 1, 28, 28)


def labels(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def hauser(blocks: int = BLOCKS) -> ResNet:
    """P2's network for MNIST."""
    return ResNet(ResNetConfig(blocks=(blocks,) * 3, channels=1)).eval()


class PlainBlock(nn.Module):
    """A block as it stands in most scripts."""

    def __init__(self, ours: Residual) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = ours.norm1, ours.conv1, ours.norm2, ours.conv2

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(h))))))


class Plain(nn.Module):
    """The same network as people write it: default memory layout, blocks called as modules."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.model = hauser(blocks)
        self.sections = nn.ModuleList(nn.ModuleList(map(PlainBlock, blocks)) for blocks in self.model.sections)
        for p in self.model.parameters():  # `to(memory_format=...)` leaves the strides of the one-channel stem
            p.data = p.data.clone(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> Tensor:
        h = self.model.stem(x)
        for s, blocks in enumerate(self.sections):
            h = self.model.transitions[s - 1](h) if s else h
            for block in blocks:
                h = block(h)
        assert h.is_contiguous()
        return self.model.readout(h)


def hooks() -> Work:
    """Norms of updates and states by hooks, as scripts do it."""
    model, x = Plain(), digits()
    norms: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        h = args[0]
        norms.append(((output - h).flatten(1).norm(dim=1), h.flatten(1).norm(dim=1)))

    for section in model.sections:
        for block in section:
            block.register_forward_hook(hook)

    def work() -> Tensor:
        norms.clear()
        model(x)
        return torch.stack([update for update, _ in norms], 1)

    return work


def own_forward() -> Work:
    model, x = hauser(), digits()
    return lambda: model(x)


def own_norms() -> Work:
    model, x = hauser(), digits()
    return lambda: PROBE(model.cut(x), None)["perturbation"].values


def own_readout() -> Work:
    model, x = hauser(), digits()
    return lambda: readouts(model.cut(x), labels(128))


def resnet50() -> tuple[nn.Module, Tensor]:
    from residuum.vision import import_torchvision

    import_torchvision()
    from torchvision.models import resnet50

    return resnet50().eval(), torch.randn(8, 3, 128, 128)


def foreign_forward() -> Work:
    model, x = resnet50()
    return lambda: model(x)


def foreign_norms() -> Work:
    stream = cut(*resnet50())
    return lambda: PROBE(stream, None)


def foreign_run() -> Work:
    stream = cut(*resnet50())
    return lambda: stream.run(keep=False).output


def foreign_cut() -> Work:
    model, x = resnet50()
    return lambda: cut(model, x)


COMPARISONS = [
    ("norms of all blocks, own network / NCHW hooks in a plain script", Side(own_norms), Side(hooks, keep=False), 0.68),
    ("norms of all blocks, own network / NCHW hooks, freed memory kept", Side(own_norms), Side(hooks), None),
    ("norms of all blocks, own network / its plain forward", Side(own_norms), Side(own_forward), 1.12),
    ("readout at every block, own network / its plain forward", Side(own_readout), Side(own_forward), 1.15),
    ("norms of all blocks, torchvision resnet50 / its plain forward", Side(foreign_norms), Side(foreign_forward), 1.25),
    ("full run, torchvision resnet50 / its plain forward", Side(foreign_run), Side(foreign_forward), 1.15),
    ("cut with its proof, torchvision resnet50 / its plain forward", Side(foreign_cut), Side(foreign_forward), 3.3),
]


def check() -> None:
    """Both sides compute the same."""
    results = []
    for make in (own_norms, hooks, foreign_run, foreign_forward):
        torch.manual_seed(0)
        results.append(make()())
    assert torch.allclose(results[0], results[1], rtol=1e-4)
    assert torch.equal(results[2], results[3])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    with torch.no_grad():
        check()
    print(heading(pairs))
    for name, ours, theirs, limit in COMPARISONS:
        print(row(name, *ratio(ours, theirs, pairs=pairs), limit), flush=True)


if __name__ == "__main__":
    main()
