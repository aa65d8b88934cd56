"""Networks: our own pre-activation ResNets, which are their stream, and those of P1 by their names."""

import copy
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from residuum.layers.anystep import Step, branches_of, check_network
from residuum.layers.coupling import mix_weights_
from residuum.layers.lipschitz import Limit, clip_, limit_
from residuum.layers.reversible import Reversible
from residuum.layers.sharing import BATCH_NORMS, Sharing, scale_norms_, share, unrolled
from residuum.layouts import arranged, fast_layout
from residuum.names import unknown
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
            section counts one residual block less. "pool": 2x2 average pooling; widths are equal.
        head: "norm": a `norm`, ReLU, average pool, dense (P1). "pool": average pool, dense (P2 as printed).
        bias: Convolutions with bias (P1) or without.
        stem: Channels of the first convolution; None: those of the first section. If they differ, the first section
            begins with a change of shape as the others do, with stride 1.
        cells: The last state is averaged over cells x cells parts of the image, each an input of the dense layer.
        norm: "batch"; "group": group norm of 4 groups (fewer where 4 does not divide the width), which needs no
            statistics; "none". Without norms He-normal weights double the variance of the state in every block.
        sharing: Which blocks share their weights; None: each has its own.
        alike: How alike the weights of a section's blocks start: 0 independent, 1 equal, between them mixtures of own
            and common weights (`mix_weights_`).
        relaxed: beta in (0, 1]: the two convolutions and norms are a map G, and a block is `h + beta (G(h) - h)`. With
            a limit below 1 on G every block is then a contraction (ours). None: the branch is the map itself.
        limit: Lipschitz limit of the branches of residual blocks (those that change the shape are left alone).
        step: How the branch f of a residual block becomes the block; None: h + f(h). A step that solves an equation
            needs norm "group" or "none". A two-state step acts on halves of the channels, its branches are as wide.
            Blocks that change the shape stay as they are.
        reversible: Train each section as a `reversible` stack, with a number of stored states that hardly grows with
            its blocks: in the backward their inverses rebuild the others. Needs a step that has an inverse.

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
    stem: int | None = None
    cells: int = 1
    norm: str = "batch"
    sharing: Sharing | None = None
    alike: float = 0.0
    relaxed: float | None = None
    limit: Limit | None = None
    step: Step | None = None
    reversible: bool = False

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.widths):
            raise ValueError(
                f"blocks {self.blocks} and widths {self.widths} need one number per section, and at least one section"
            )
        if min(self.blocks) < 1:
            raise ValueError(f"blocks is {self.blocks}: every section needs at least 1 block")
        if min((*self.widths, self.first, self.channels, self.classes, self.cells)) < 1:
            raise ValueError("widths, stem, channels, classes and cells must be at least 1")
        for name, given, allowed in (
            ("transition", self.transition, ("separate", "projection", "pool")),
            ("head", self.head, ("norm", "pool")),
            ("norm", self.norm, ("batch", "group", "none")),
        ):
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; allowed are {allowed}")
        if self.transition == "pool" and len({self.first, *self.widths}) > 1:
            raise ValueError(f"transition 'pool' changes no width, but stem and widths are {self.first}, {self.widths}")
        if self.relaxed is not None and not 0 < self.relaxed <= 1:
            raise ValueError(f"relaxed is {self.relaxed}; it must lie in (0, 1], or be None")
        if not 0 <= self.alike <= 1:
            raise ValueError(f"alike is {self.alike}; it must lie in [0, 1]")
        if self.alike and self.sharing is not None:
            raise ValueError("blocks that share their weights need no likeness; leave out sharing or alike")
        if self.limit is not None and self.norm == "group":
            raise ValueError("group norm has no Lipschitz constant to limit; use norm 'batch' or 'none'")
        if self.limit is not None and self.sharing is not None and self.sharing.statistics != self.sharing.affine:
            raise ValueError(
                "batch norm that shares one of statistics and affine cannot be clipped; share both or none"
            )
        if self.sharing is not None:
            self._check(self.sharing)
        if self.step is None and self.reversible:
            raise ValueError("blocks h + f(h) cannot be undone; reversible needs a step, as Verlet or Theta")
        if self.step is not None:
            check_network(self.step, norm=self.norm, widths=self.widths, reversible=self.reversible)

    def _check(self, sharing: Sharing) -> None:
        if max(self.blocks) <= sharing.free:
            raise ValueError(
                f"sharing leaves {sharing.free} blocks free, so with blocks {self.blocks} nothing is shared"
            )
        if self.norm != "batch" and not sharing.naive:
            raise ValueError(f"there is no batch norm to unshare with norm {self.norm!r}; share all of it")

    @property
    def first(self) -> int:
        """Channels that the first convolution gives."""
        return self.widths[0] if self.stem is None else self.stem

    def shapes_inside(self, section: int) -> bool:
        """Whether a section's entry contains a residual block of it, which changes the shape."""
        return self.transition == "projection" and (section > 0 or self.first != self.widths[0])


class Residual(nn.Module):
    """Pre-activation block: `h + W2 relu(bn2(W1 relu(bn1(h))))`; skip and W1 may change the shape.

    Source: P2 (Hauser 2019), eq. 13; P1 (Jastrzebski et al. 2018), section 4.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        *,
        stride: int = 1,
        bias: bool = False,
        norm: str = "batch",
        relaxed: float | None = None,
    ) -> None:
        super().__init__()
        self.relaxed = relaxed
        self.norm1 = _norm(norm, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=bias)
        self.norm2 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        keeps_shape = stride == 1 and width_in == width
        self.skip = nn.Identity() if keeps_shape else nn.Conv2d(width_in, width, 1, stride, bias=bias)

    def branch(self, h: Float[Tensor, "example width_in row column"]) -> Float[Tensor, "example width row2 column2"]:
        """What the block adds."""
        out = self.conv2(_rectified(self.norm2, self.conv1(_rectified(self.norm1, h))))
        return out if self.relaxed is None else self.relaxed * (out - h)

    def as_step(self, name: str) -> Block:
        """The block in a stream; where hooks or another forward can change what it gives its branch is left out."""
        own = type(self).forward is not Residual.forward or "forward" in vars(self)
        hooked = own or self._forward_hooks or self._forward_pre_hooks
        bounded = type(self).branch is Residual.branch and "branch" not in vars(self) and self.relaxed is None
        chain = (self.norm1, self.conv1, self.norm2, self.conv2) if bounded else ()
        return Block(name, self, *((None, ()) if hooked else (self.branch, chain)))

    def forward(self, h: Float[Tensor, "example width_in row column"]) -> Float[Tensor, "example width row2 column2"]:
        """The next state."""
        return self.skip(h) + self.branch(h)


def _as_step(block: nn.Module, name: str) -> Block:
    """A block in a stream; of a step of another kind than h + f(h) the update is what it changes."""
    return block.as_step(name) if isinstance(block, Residual) else Block(name, block)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(math.gcd(4, width), width) if kind == "group" else nn.Identity()


def _rectified(norm: nn.Module, h: Tensor) -> Tensor:
    """`relu(norm(h))`; in place on what the norm gave, unless a hook sees it; its backward does not need it."""
    normalised = norm(h)
    return F.relu(normalised, inplace=normalised is not h and not norm._forward_hooks)


class _Branch(nn.Module):
    """The branch of a residual block as a module, for steps."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        return self.block.branch(h)


class ResNet(nn.Module):
    """A pre-activation ResNet whose forward is a run of its own stream, so that what is measured is what is run.

    Weights are He-normal (variance 2 / fan_in), biases 0, batch-norm scales 1. Memory layout: `fast_layout`.

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
            if config.limit is not None:
                self._limit(config.limit)
        self.layout = fast_layout(self)
        self.to(memory_format=self.layout)

    def fresh(self, seed: int) -> "ResNet":
        """The same network with other initial weights, on the same device in the same precision."""
        return ResNet(self.config, seed=seed).to(self.dense.weight)

    def _build(self) -> None:
        config, widths = self.config, self.config.widths
        self.stem = nn.Conv2d(config.channels, config.first, 3, 1, 1, bias=config.bias)
        self.widen = None if config.first == widths[0] else self._transition(config.first, widths[0], stride=1)
        self.transitions = nn.ModuleList(self._transition(a, b, stride=2) for a, b in pairwise(widths))
        self.sections = nn.ModuleList(self._section(s) for s in range(len(widths)))
        self.stacks: list[tuple[Block, ...]] = []  # not submodules: they hold the blocks of the sections once more
        self.norm = _norm(config.norm, widths[-1]) if config.head == "norm" else None
        self.dense = nn.Linear(widths[-1] * config.cells**2, config.classes)
        if config.sharing is not None and config.sharing.everywhere:
            for module in self.modules():
                if isinstance(module, Residual):
                    scale_norms_(module, config.sharing.gamma)

    def _section(self, section: int) -> nn.ModuleList:
        config, width = self.config, self.config.widths[section]
        inside = int(config.shapes_inside(section))
        length, sharing = config.blocks[section] - inside, config.sharing
        pattern = tuple(range(length)) if sharing is None else sharing.pattern(length, before=inside)
        blocks = [self._block(width) for _ in set(pattern)]
        if sharing is None:
            return nn.ModuleList(blocks)
        return share(blocks, pattern, statistics=sharing.statistics, affine=sharing.affine, gamma=sharing.gamma)

    def _block(self, width: int) -> nn.Module:
        config = self.config
        count, parts = (1, 1) if config.step is None else branches_of(config.step)
        part, settings = width // parts, {"bias": config.bias, "norm": config.norm, "relaxed": config.relaxed}
        residuals = [Residual(part, part, **settings) for _ in range(count)]
        return residuals[0] if config.step is None else config.step(*map(_Branch, residuals))

    def _transition(self, width_in: int, width: int, *, stride: int) -> nn.Module:
        config = self.config
        if config.transition == "projection":
            return Residual(width_in, width, stride=stride, bias=config.bias, norm=config.norm)
        if config.transition == "pool":
            return nn.AvgPool2d(2)
        return nn.Conv2d(width_in, width, 1, stride, bias=config.bias)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        for blocks in filter(len, self.sections) if self.config.alike else ():
            common = copy.deepcopy(blocks[0])
            if self.config.alike < 1:
                for conv in (module for module in common.modules() if isinstance(module, nn.Conv2d)):
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            for block in blocks:
                mix_weights_([block], common, self.config.alike)

    def _limit(self, limit: Limit) -> None:
        size = limit.size
        for s, section in enumerate(self.sections):
            if s:
                size = size // 2 if self.config.transition == "pool" else -(-size // 2)
            for block in (module for module in section.modules() if isinstance(module, Residual)):
                for conv in (block.conv1, block.conv2):
                    if not parametrize.is_parametrized(conv):  # blocks that share have it once
                        limit_(conv, limit.bound**0.5, (size, size))
                for norm in (block.norm1, block.norm2) if limit.norm == "clipped" else ():
                    for part in norm.modules():
                        if isinstance(part, BATCH_NORMS) and not parametrize.is_parametrized(part):
                            clip_(part)

    def cut(self, x: Float[Tensor, "example channel row column"]) -> Stream:
        """The network as a stream on one batch of images."""
        entries = (self.enter, *self.transitions)
        sections = []
        for s, (entry, section) in enumerate(zip(entries, self.sections, strict=True)):
            blocks = unrolled(section)
            names = (f"sections.{s}.{i}" for i in range(len(blocks)))
            passed = (f"transitions.{s - 1}" if s else "widen",) if self.config.shapes_inside(s) else ()
            steps = tuple(_as_step(block, name) for name, block in zip(names, blocks, strict=True))
            inner = self.widen if s == 0 else entry
            # With hooks on the block its branch is not what it adds, and its skip not what is left.
            skip = inner.skip if isinstance(inner, Residual) and inner.as_step("").branch else None
            if s == 0 and skip is not None:
                skip = self._enter_by_skip
            sections.append(Section(f"section {s + 1}", entry, steps, passed, skip))
        return Stream(x, tuple(sections), self.readout)

    def enter(self, x: Float[Tensor, "example channel row column"]) -> Float[Tensor, "example width row column"]:
        """The stem: one 3x3 convolution, in the memory layout that is fast here."""
        h = self.stem(arranged(x, self.layout))
        return h if self.widen is None else self.widen(h)

    def _enter_by_skip(self, x: Tensor) -> Tensor:
        return self.widen.skip(self.stem(arranged(x, self.layout)))

    def readout(self, h: Float[Tensor, "example width row column"]) -> Float[Tensor, "example class"]:
        """Logits from a state of the last section."""
        if self.norm is not None:
            h = _rectified(self.norm, h)
        if self.config.cells > 1:
            return self.dense(F.adaptive_avg_pool2d(h, self.config.cells).flatten(1))
        return self.dense(h.mean((2, 3)))

    def forward(self, x: Float[Tensor, "example channel row column"]) -> Float[Tensor, "example class"]:
        """Logits: a full run of the stream."""
        stream = self.cut(x)
        if self.config.reversible and self.training and torch.is_grad_enabled():
            pairs = zip(stream.sections, self._stacked(), strict=True)
            stream = replace(stream, sections=tuple(replace(section, blocks=stack) for section, stack in pairs))
        return stream.run(keep=False).output

    def _stacked(self) -> list[tuple[Block, ...]]:
        """Each section as one reversible block; made anew when it has other blocks, as after folding."""
        blocks = [unrolled(section) for section in self.sections]
        if [list(stack[0].apply.blocks) if stack else [] for stack in self.stacks] != blocks:
            self.stacks = [
                (Block(f"section {s + 1}", Reversible(section)),) if section else () for s, section in enumerate(blocks)
            ]
        return self.stacks


def resnet(depth: int, *, classes: int = 10, channels: int = 3, sharing: Sharing | None = None) -> ResNetConfig:
    """The ResNet of a depth for CIFAR: depth 6n + 2 is n blocks of 16, n of 32 and n of 64 channels, with projections.

    Args:
        depth: 8, 14, 20, .., 32, 38, 56, 110, 146, 182, ..
        classes: Number of outputs.
        channels: Channels of the input images.
        sharing: Which blocks share their weights.

    Raises:
        ValueError: If the depth is not 6n + 2.

    Source: P1 (Jastrzebski et al. 2018), section 4 and table 1.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"there is no ResNet of depth {depth}: depths are 6n + 2, as 32, 38, 56 or 110")
    blocks = ((depth - 2) // 6,) * 3
    return ResNetConfig(blocks, (16, 32, 64), channels, classes, "projection", bias=True, sharing=sharing)


def resnet110(*, classes: int = 10, channels: int = 3) -> ResNetConfig:
    """P1's original ResNet-110: 1,742,762 parameters and statistics. `scaled` makes it narrower.

    Source: P1 (Jastrzebski et al. 2018), section 4.
    """
    return resnet(110, classes=classes, channels=channels)


def single(*, classes: int = 10, channels: int = 3) -> ResNetConfig:
    """P1's single-representation network: 10 blocks of 100 channels at full resolution; 1,829,210 numbers.

    Its last state is averaged over 4 x 4 parts of the image, of 8 x 8 pixels on CIFAR.

    Source: P1 (Jastrzebski et al. 2018), section 4.
    """
    return ResNetConfig((10,), (100,), channels, classes, bias=True, cells=4)


def avgpool(*, classes: int = 10, channels: int = 3) -> ResNetConfig:
    """P1's average-pooling network: three sections of 10 blocks of 150 channels; 12,201,310 numbers.

    Between sections 2x2 averages halve the resolution. The text has a pooling after each section; two of them give the
    printed count.

    Source: P1 (Jastrzebski et al. 2018), section 4.
    """
    return ResNetConfig((10,) * 3, (150,) * 3, channels, classes, "pool", bias=True)


def wide(*, classes: int = 10, channels: int = 3, blocks: tuple[int, ...] = (4, 5, 5)) -> ResNetConfig:
    """P1's wide network: sections of 160, 320 and 640 channels behind a stem of 16, each with a projection.

    The text has four blocks in each section; 4, 5 and 5 give the printed count of 45,732,842 numbers, `(4, 4, 4)` gives
    36,507,242.

    Source: P1 (Jastrzebski et al. 2018), section 4.
    """
    return ResNetConfig(blocks, (160, 320, 640), channels, classes, "projection", bias=True, stem=16)


NETWORKS = ("resnet32", "resnet38", "resnet56", "resnet110", "resnet146", "resnet182", "single", "avgpool", "wide")


def network_of(name: str, *, classes: int = 10, channels: int = 3) -> ResNetConfig:
    """A network of P1 by its name: one of `NETWORKS`, or resnet with another depth 6n + 2.

    Raises:
        ValueError: If there is none of that name; the nearest is offered.
    """
    depth = name.removeprefix("resnet")
    if depth != name and depth.isdecimal():
        return resnet(int(depth), classes=classes, channels=channels)
    made = {"single": single, "avgpool": avgpool, "wide": wide}.get(name)
    if made is None:
        raise unknown("network", name, NETWORKS)
    return made(classes=classes, channels=channels)


def scaled(config: ResNetConfig, factor: float) -> ResNetConfig:
    """The same network with all widths times a factor (rounded, at least 1), for smaller studies.

    Raises:
        ValueError: If the factor is not above 0.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor on all widths is {factor}; it must be above 0")
    widths = tuple(max(1, round(factor * width)) for width in config.widths)
    return replace(config, widths=widths, stem=None if config.stem is None else max(1, round(factor * config.stem)))


def count_parameters(model: nn.Module, *, statistics: bool = True) -> int:
    """How many numbers a network has; weights that are used at several places count once.

    Args:
        model: Any network.
        statistics: Count the running means and variances of batch norm, too, as P1's totals do (4 numbers per channel);
            else only what is trained (2).
    """
    trained = sum(parameter.numel() for parameter in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
    return trained + statistics * sum(norm.running_mean.numel() + norm.running_var.numel() for norm in norms)
