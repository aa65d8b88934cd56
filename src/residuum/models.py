"""Networks: our own pre-activation ResNets, which are their stream, and loading of everybody else's."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from residuum.streams import Block, Section, Stream


@dataclass(frozen=True)
class ResNetConfig:
    """A pre-activation ResNet: sections of blocks, each section at half the resolution of the one before.

    Attributes:
        blocks: Residual blocks of each section.
        widths: Channels of each section.
        channels: Channels of the input images.
        classes: Number of outputs.
        transition: How the shape changes. "separate": a 1x1 convolution of stride 2 before the section's blocks.
            "projection": the section's first block has stride 2 and a 1x1 skip; it then is the section's entry, so the
            section counts one residual block less.
        head: "norm": batch norm, ReLU, average pool, dense (P1). "pool": average pool, dense (P2 as printed).
        bias: Convolutions with bias (P1) or without.

    Source: P1 (Jastrzebski et al. 2018), section 4; P2 (Hauser 2019), section 3, eq. 13: L blocks in each of three
    sections of 16, 32, 64 channels.
    """

    blocks: tuple[int, ...] = (2, 2, 2)
    widths: tuple[int, ...] = (16, 32, 64)
    channels: int = 3
    classes: int = 10
    transition: str = "separate"
    head: str = "norm"
    bias: bool = False

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.widths):
            raise ValueError(
                f"blocks {self.blocks} and widths {self.widths} need one number per section, and at least one section"
            )
        if min(self.blocks) < 1:
            raise ValueError(f"blocks is {self.blocks}: every section needs at least 1 block")
        if min((*self.widths, self.channels, self.classes)) < 1:
            raise ValueError("widths, channels and classes must be at least 1")
        for name, given, allowed in (
            ("transition", self.transition, ("separate", "projection")),
            ("head", self.head, ("norm", "pool")),
        ):
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; allowed are {allowed}")


class Residual(nn.Module):
    """Pre-activation block: `h + W2 relu(bn2(W1 relu(bn1(h))))`; skip and W1 may change the shape.

    Source: P2 (Hauser 2019), eq. 13; P1 (Jastrzebski et al. 2018), section 4.
    """

    def __init__(self, width_in: int, width: int, *, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=bias)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        keeps_shape = stride == 1 and width_in == width
        self.skip = nn.Identity() if keeps_shape else nn.Conv2d(width_in, width, 1, stride, bias=bias)

    def branch(self, h: Float[Tensor, "example width_in row column"]) -> Float[Tensor, "example width row2 column2"]:
        """What the block adds."""
        # In place on the output of a norm, which nobody else sees and whose backward does not need it.
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(h), inplace=True))), inplace=True))

    def as_step(self, name: str) -> Block:
        """The block in a stream; hooks on it can change what it gives, so then its branch is not what it adds."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        chain = (self.norm1, self.conv1, self.norm2, self.conv2)
        return Block(name, self, *((None, ()) if hooked else (self.branch, chain)))

    def forward(self, h: Float[Tensor, "example width_in row column"]) -> Float[Tensor, "example width row2 column2"]:
        """The next state."""
        return self.skip(h) + self.branch(h)


class ResNet(nn.Module):
    """A pre-activation ResNet whose forward is a run of its own stream, so that what is measured is what is run.

    Weights are He-normal (variance 2 / fan_in), biases 0, batch-norm scales 1. Memory layout is channels-last.

    Args:
        config: The network.
        seed: Seed of the weights; the global random state is left alone.
    """

    def __init__(self, config: ResNetConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build()
            self._initialise()
        self.to(memory_format=torch.channels_last)

    def fresh(self, seed: int) -> "ResNet":
        """The same network with other initial weights, on the same device in the same precision."""
        return ResNet(self.config, seed=seed).to(self.dense.weight)

    def _build(self) -> None:
        config, widths = self.config, self.config.widths
        self.stem = nn.Conv2d(config.channels, widths[0], 3, 1, 1, bias=config.bias)
        self.transitions = nn.ModuleList(self._transition(a, b) for a, b in pairwise(widths))
        self.sections = nn.ModuleList(
            nn.ModuleList(Residual(width, width, bias=config.bias) for _ in range(self._length(s)))
            for s, width in enumerate(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1]) if config.head == "norm" else None
        self.dense = nn.Linear(widths[-1], config.classes)

    def _length(self, section: int) -> int:
        return self.config.blocks[section] - (self.config.transition == "projection" and section > 0)

    def _transition(self, width_in: int, width: int) -> nn.Module:
        if self.config.transition == "projection":
            return Residual(width_in, width, stride=2, bias=self.config.bias)
        return nn.Conv2d(width_in, width, 1, 2, bias=self.config.bias)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def cut(self, x: Float[Tensor, "example channel row column"]) -> Stream:
        """The network as a stream on one batch of images."""
        entries = (self.enter, *self.transitions)
        sections = []
        for s, (entry, blocks) in enumerate(zip(entries, self.sections, strict=True)):
            names = (f"sections.{s}.{i}" for i in range(len(blocks)))
            passed = (f"transitions.{s - 1}",) if s and self.config.transition == "projection" else ()
            steps = tuple(block.as_step(name) for name, block in zip(names, blocks, strict=True))
            sections.append(Section(f"section {s + 1}", entry, steps, passed))
        return Stream(x, tuple(sections), self.readout)

    def enter(self, x: Float[Tensor, "example channel row column"]) -> Float[Tensor, "example width row column"]:
        """The stem: one 3x3 convolution, on channels-last memory (about a third faster on processors)."""
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def readout(self, h: Float[Tensor, "example width row column"]) -> Float[Tensor, "example class"]:
        """Logits from a state of the last section."""
        if self.norm is not None:
            h = F.relu(self.norm(h), inplace=True)
        return self.dense(h.mean((2, 3)))

    def forward(self, x: Float[Tensor, "example channel row column"]) -> Float[Tensor, "example class"]:
        """Logits: a full run of the stream."""
        return self.cut(x).run(keep=False).output
