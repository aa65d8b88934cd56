"""Sharing: blocks that use the same weights at several places, with batch norms tied or their own; and true loops."""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from residuum.copies import copied
from residuum.names import unknown

BATCH_NORMS = (_BatchNorm,)  # with what others derive from it
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (*BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KINDS = ("shared", "unshared")


def _check_kinds(statistics: str, affine: str) -> None:
    for name, given in (("statistics", statistics), ("affine", affine)):
        if given not in _KINDS:
            raise unknown(name, given, _KINDS)


@dataclass(frozen=True)
class Sharing:
    """Which blocks of each section share their weights, and what of their batch norms they share.

    The defaults are unshared batch normalisation (UBN); `NAIVE` shares all. Convolutions, biases included, are shared
    always.

    Attributes:
        free: Blocks of each section, from its first, that have weights of their own. A block that changes the shape
            counts as one of them and is free in any case. A last block that would share with nobody is free, too.
        statistics: "unshared": every application of a shared block keeps running statistics of its own.
        affine: "unshared": every application has a scale and a shift (gamma, beta) of its own.
        gamma: Scale with which the batch norms of shared blocks begin.
        everywhere: Begin with that scale in all blocks, not only in shared ones.

    Source: P1 (Jastrzebski et al. 2018), section 4.5 and figure 9, after Cooijmans et al. 2017, "Recurrent Batch
    Normalization". To which batch norms gamma 0.1 applies is not printed: `everywhere` is the other reading.
    """

    free: int = 5
    statistics: str = "unshared"
    affine: str = "unshared"
    gamma: float = 0.1
    everywhere: bool = False

    def __post_init__(self) -> None:
        if self.free < 0:
            raise ValueError(f"sharing: free is {self.free}; it must be 0 or more")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"sharing: gamma is {self.gamma}; it must be 0 or more")
        _check_kinds(self.statistics, self.affine)

    @property
    def naive(self) -> bool:
        """Whether shared blocks are one module with its batch norms."""
        return self.statistics == self.affine == "shared"

    def pattern(self, length: int, *, before: int = 0) -> tuple[int, ...]:
        """The pattern for `share` of a section with so many blocks, after so many that change the shape."""
        free = max(self.free - before, 0)
        return tuple(min(place, free) for place in range(length))


UBN = Sharing()
NAIVE = Sharing(statistics="shared", affine="shared", gamma=1.0)


def share(
    blocks: Iterable[nn.Module],
    pattern: Sequence[int],
    *,
    statistics: str = "shared",
    affine: str = "shared",
    gamma: float | None = None,
) -> nn.ModuleList:
    """Blocks in which places of one number use the same weights; each weight exists once.

    With all shared, places of one number are the same module. With batch norms unshared they are different modules of
    the same class whose other submodules and parameters are the same objects, so parameters are counted and stored
    once, gradients of all applications add up, and nothing has to be kept equal.

    Args:
        blocks: Any blocks; they become part of the list. A block whose number stands at one place stays as it is.
        pattern: For each place the number of the block whose weights stand there: (0, 1, 2, 2, 2) leaves two blocks
            free and applies the third three times.
        statistics: "unshared": running statistics of batch norm for each application.
        affine: "unshared": scale and shift of batch norm for each application. They begin as those of the block.
        gamma: Scale with which batch norms of blocks that are applied several times begin; None: as it is.

    Raises:
        ValueError: If the pattern names a block that is not there or leaves one out, if batch norms are to be unshared
            in a block that has none, or clipped ones to share their statistics alone. No block has changed then.

    Source: P1 (Jastrzebski et al. 2018), section 4.5.
    """
    blocks, times = list(blocks), Counter(pattern)
    _check_kinds(statistics, affine)
    if set(times) != set(range(len(blocks))):
        raise ValueError(f"share: the pattern {tuple(pattern)} must name each of the {len(blocks)} blocks, from 0")
    made: dict[int, list[nn.Module]] = {}
    for number, block in enumerate(blocks):
        if times[number] > 1:
            made[number] = _applications(block, times[number], statistics, affine)
    for application in chain(*made.values()) if gamma is not None else ():  # when all are made: none may be refused
        scale_norms_(application, gamma)
    applications = {number: iter(made.get(number, [block])) for number, block in enumerate(blocks)}
    return as_list(next(applications[number]) for number in pattern)


def as_list(blocks: Iterable[nn.Module]) -> nn.ModuleList:
    """The blocks as a list that is in the mode in which they are."""
    made = nn.ModuleList(blocks)
    made.training = all(block.training for block in made)
    return made


def _applications(block: nn.Module, times: int, statistics: str, affine: str) -> list[nn.Module]:
    """A block for each of several places, all with the weights of one."""
    if statistics == affine == "shared":
        return [block] * times
    norms = {name: _for_each(norm, times, statistics, affine) for name, norm in batch_norms(block).items()}
    if not norms:
        raise ValueError(
            f"share: {type(block).__name__} has no batch norm to unshare; leave statistics and affine shared"
        )
    return [with_norms(block, {name: each[place] for name, each in norms.items()}) for place in range(times)]


def _for_each(norm: nn.Module, times: int, statistics: str, affine: str) -> list[nn.Module]:
    """A norm for each of several places, which have statistics or the affine map in common, or neither."""
    if statistics == "unshared":
        others = [own_statistics(norm) if affine == "shared" else copy.deepcopy(norm) for _ in range(times - 1)]
        return [norm, *others]
    if parametrize.is_parametrized(norm):
        raise ValueError(
            "share: batch norm that shares one of statistics and affine cannot be clipped; share both or none"
        )
    # Buffers that two modules share part when the network moves to another device; so the module is shared.
    plain = copy.deepcopy(norm)
    plain.affine, plain.weight, plain.bias = False, None, None
    if norm.weight is None:
        return [plain] * times
    return [nn.Sequential(plain, Affine.of(norm)).train(norm.training) for _ in range(times)]


class Affine(nn.Module):
    """A scale and a shift per channel, `gamma h + beta`: what batch norm does to what it has normalised.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @classmethod
    def of(cls, norm: nn.Module) -> "Affine":
        """A copy of a norm's."""
        made = cls(len(norm.weight)).to(norm.weight)
        made.load_state_dict({"weight": norm.weight, "bias": norm.bias})
        return made

    def reset_parameters(self) -> None:
        """To the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, h: Float[Tensor, "example width *size"]) -> Float[Tensor, "example width *size"]:
        """The scaled and shifted map."""
        shape = (-1, *(1,) * (h.ndim - 2))
        gamma, beta = (part.to(h.dtype).view(shape) for part in (self.weight, self.bias))
        return torch.addcmul(beta, h, gamma)


def batch_norms(block: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a block by their names."""
    return {name: module for name, module in block.named_modules() if isinstance(module, BATCH_NORMS)}


def norms_of(block: nn.Module) -> dict[str, nn.Module]:
    """The norms of a block by their names; an `Affine` beside shared statistics is part of one."""
    return {name: module for name, module in block.named_modules() if isinstance(module, (*_NORMS, Affine))}


def weights_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a block by their names, without those of its norms."""
    of_norms = {id(p) for norm in norms_of(block).values() for p in norm.parameters()}
    return {name: p for name, p in block.named_parameters() if id(p) not in of_norms}


def own_statistics(norm: nn.Module) -> nn.Module:
    """A batch norm with the same scale and shift (the very parameters) and a copy of the statistics."""
    return copy.deepcopy(norm, {id(p): p for p in norm.parameters()})


def scale_norms_(block: nn.Module, gamma: float) -> None:
    """Set the scales of all batch norms of a block; of clipped ones those before they are clipped."""
    for module in block.modules():
        if isinstance(module, (*BATCH_NORMS, Affine)) and module.weight is not None:
            clipped = parametrize.is_parametrized(module, "weight")
            nn.init.constant_(module.parametrizations.weight.original if clipped else module.weight, gamma)


def with_norms(block: nn.Module, norms: Mapping[str, nn.Module]) -> nn.Module:
    """A block with other modules at some names; everything else is not a copy but the block's own.

    Args:
        block: The block; it is not changed.
        norms: The other modules by the names of those whose places they take.
    """
    memo: dict[int, object] = {id(p): p for p in (*block.parameters(), *block.buffers())}
    replaced = {id(block.get_submodule(name)): norm for name, norm in norms.items()}
    for module in block.modules():
        if not any(id(inner) in replaced for inner in module.modules()):
            memo[id(module)] = module
    return copy.deepcopy(block, memo | replaced)


class Loop(nn.Module):
    """A block and a count: `h <- block(h)`, so many times. Applications may have norms of their own.

    Args:
        block: The block, as it is applied first.
        times: How often it is applied.
        others: For norms that are not shared: the second and all further applications, which use the block's weights.
    """

    def __init__(self, block: nn.Module, times: int, *, others: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        if times < 1 or (others and len(others) != times - 1):
            raise ValueError(f"Loop: times is {times}; it must be 1 or more, and 1 more than others ({len(others)})")
        self.block, self.times, self.others = block, times, nn.ModuleList(others)
        self.training = self.others.training = block.training

    def applications(self) -> tuple[nn.Module, ...]:
        """The block once for each time that it is applied."""
        return (self.block, *self.others) if len(self.others) else (self.block,) * self.times

    def forward(self, h: Float[Tensor, " example *state"]) -> Float[Tensor, " example *state"]:
        """The state after all applications."""
        for block in self.applications():
            h = block(h)
        return h


def loop(blocks: Sequence[nn.Module]) -> Loop:
    """Blocks that share their weights as one loop, which computes the same bits.

    Raises:
        ValueError: If there are none, or two of them do not share their weights.
    """
    if not blocks:
        raise ValueError("loop: no blocks given; a loop needs at least 1")
    first, *others = blocks
    for place, block in enumerate(others, start=1):
        if not _tied(first, block):
            raise ValueError(f"loop: blocks 0 and {place} do not share their weights; share() makes blocks that do")
    return Loop(first, len(blocks), others=() if all(block is first for block in others) else others)


def unrolled(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks one by one, those of loops as often as they are applied."""
    return [single for block in blocks for single in (block.applications() if isinstance(block, Loop) else (block,))]


def fold(model: nn.Module) -> nn.Module:
    """A copy in which neighbours that share their weights, in any ModuleList or Sequential, are one `Loop`.

    The lists must be run one block after the other, each on the state alone: then it computes the same bits, and
    whoever runs the list need not know. Taking blocks of the list by their number gives others than before.

    Args:
        model: A network, or an nn.ModuleList of blocks; it is not changed.

    Raises:
        ValueError: If no two neighbours share their weights.
    """
    folded = copied(model)
    if not _fold_(folded):
        raise ValueError(
            f"fold: {type(model).__name__} has no neighbours that share their weights, in a ModuleList or Sequential; "
            "share() makes blocks that do"
        )
    return folded


def _fold_(module: nn.Module) -> int:
    """Fold all lists in a module; how many loops there are."""
    if isinstance(module, Loop):
        return 1
    if isinstance(module, nn.ModuleList | nn.Sequential):
        runs: list[list[nn.Module]] = []
        for block in module:
            if runs and _tied(runs[-1][-1], block):
                runs[-1].append(block)
            else:
                runs.append([block])
        if len(runs) < len(module):
            _refill_(module, [loop(run) if len(run) > 1 else run[0] for run in runs])
    return sum(_fold_(child) for child in module.children())


def _tied(a: nn.Module, b: nn.Module) -> bool:
    """Whether two blocks use the same weights: all parameters but those of norms are the same objects."""
    mine, theirs = ([id(p) for p in weights_of(block).values()] for block in (a, b))
    return type(a) is type(b) and mine == theirs != []


def _refill_(blocks: nn.ModuleList | nn.Sequential, content: Iterable[nn.Module]) -> None:
    blocks._modules.clear()
    for place, block in enumerate(content):
        blocks.add_module(str(place), block)


def unshare_statistics(model: nn.Module) -> nn.Module:
    """A copy in which every application has batch-norm statistics of its own; weights are tied as before.

    Applications are the places at which a module stands: several in one list, under several names, or in a `Loop`. A
    forward that calls one block several times is not seen. The copy's statistics begin as those of the model.
    """
    return _unshared(copied(model), {})


def _unshared(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """What stands at the next place of a module: at its first what `made` says then, else that with own statistics."""
    if module in made:
        first = made[module]
        return with_norms(first, {name: own_statistics(norm) for name, norm in batch_norms(first).items()})
    made[module] = module
    if isinstance(module, Loop):
        block, *others = (_unshared(application, made) for application in module.applications())
        own = others if any(other is not block for other in others) else ()
        made[module] = Loop(block, module.times, others=own)
    else:
        for name, child in module._modules.items():
            module._modules[name] = child if child is None else _unshared(child, made)
    return made[module]
