"""What a block did in a forward, kept without its tensors, and doing it again: same random numbers, no new statistics.

A *call* is one call of a module that the block holds, from the outside (a branch), in one forward of the block. Tensors
that the gradient needs have a *key*: the number of the call, -1 outside of all, and their number in it. Only calls from
which the gradient needs something are numbered: how many others a solver makes depends on rounding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from residuum.layers.held import parts, replayed

Key = tuple[int, int]
RandomState = tuple[Tensor, ...]


@dataclass
class Call:
    """One call of a branch.

    Attributes:
        module: The branch.
        needs: Whether its argument required gradient; None if it was called with anything but one tensor.
        random: The random state after the call before it, or before the block, if it drew numbers.
        saved: How many tensors its gradient needs.
        number: Among the calls of which the gradient needs something; -1 if this is none of them.
    """

    module: nn.Module
    needs: bool | None
    random: RandomState | None = None
    saved: int = 0
    number: int = -1


class Record:
    """One forward of a block, and how to run it or its inverse again as it ran.

    Args:
        block: A module with `forward` and `inverse`.
        h: The state that it gets.
    """

    def __init__(self, block: nn.Module, h: Tensor) -> None:
        self.block, self.needs, self.device = block, h.requires_grad, h.device
        self.calls: list[Call] = []
        self.loose = 0  # tensors that the gradient needs from outside of all calls
        self.draws_outside = False
        self.random: RandomState | None = None  # before the block, if it drew numbers
        self.branches = list(dict.fromkeys(_branches(block)))
        modules = parts(block)
        self.stateful = [module for module in modules if module._buffers]
        self.changed: list[tuple[nn.Module, str, Tensor]] = []
        self.weights = [p for module in modules for p in module._parameters.values() if p is not None]
        self.versions = [p._version for p in self.weights]
        self.autocast = _autocast(h.device.type)

    @property
    def saved(self) -> int:
        """How many tensors the block's gradient needs."""
        return self.loose + sum(call.saved for call in self.calls)

    @property
    def shape(self) -> list[int]:
        """How many tensors the gradient needs from outside of all calls, and from each call that is numbered."""
        return [self.loose, *(call.saved for call in self.calls if call.saved)]

    def run(self, h: Tensor, kept: dict[Key, Any], give: Callable[[Key], Any]) -> Tensor:
        """The block's forward.

        Args:
            h: The state before it.
            kept: Is filled with what the gradient needs. The caller empties it to forget that.
            give: Is asked for what the gradient needs and `kept` no longer has.

        Raises:
            RuntimeError: If the block changes in place what its gradient needs.
        """
        tensors: list[Tensor] = []
        versions: list[int] = []
        inside: list[Call] = []
        first = last = random_state(self.device)

        def watch(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal last
            if inside:
                return plain(*args, **kwargs)
            inside.append(Call(module, args[0].requires_grad if _one_tensor(args, kwargs) else None))
            self.calls.append(inside[0])
            try:
                output = plain(*args, **kwargs)
            finally:
                inside.clear()
            after = random_state(self.device)
            if not _same(after, last):
                self.calls[-1].random, last = last, after
            return output

        def pack(tensor: Tensor) -> Any:
            if inside:
                call = inside[0]
                call.number = call.number if call.saved else sum(one.saved > 0 for one in self.calls)
                key = call.number, call.saved
                call.saved += 1
            else:
                key = -1, self.loose
                self.loose += 1
            kept[key] = tensor
            tensors.append(tensor)
            versions.append(tensor._version)
            return key

        before = [
            (module, name, buffer, buffer._version, buffer.clone())
            for module in self.stateful
            if not _gathers(module)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        with _intercepted(self.branches, watch), _saved(pack, kept, give):
            after = self.block(h)
        if [tensor._version for tensor in tensors] != versions:
            raise RuntimeError(
                f"reversible: {type(self.block).__name__} changes a tensor in place that its gradient needs; use the "
                "operation that gives a new one"
            )
        tensors.clear()  # the graph keeps `pack`, and so the list
        end = random_state(self.device)
        if not _same(last, end):
            self.draws_outside, last = True, end
        if last is not first:
            self.random = first
        for module, name, buffer, version, value in before:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                self.changed.append((module, name, value))
        return after

    def again(self, x: Tensor) -> tuple[Tensor, dict[Key, Tensor]]:
        """The forward once more: the next state, and what its gradient needs.

        Raises:
            RuntimeError: If the block computes something else than it did.
        """
        kept: dict[Key, Tensor] = {}
        twin = Record(self.block, x)
        with self._as_it_was(), torch.enable_grad():
            if self.random:
                set_random_state(self.random, self.device)
            after = twin.run(x.detach().requires_grad_(self.needs), kept, _gone)
        if twin.shape != self.shape:
            raise RuntimeError(
                f"reversible: {type(self.block).__name__} computes something else when its forward runs again; what it "
                "computes may depend on its state, its weights, its buffers and torch's random numbers only"
            )
        return after.detach(), {key: tensor.detach() for key, tensor in kept.items()}

    def back(self, y: Tensor, *, capture: bool = False) -> tuple[Tensor, dict[Key, Tensor] | None]:
        """The state before, by the block's inverse; and what the gradient needs, if the inverse computes that, too.

        It does where forward and inverse call the same branches at the same states, in opposite orders, as couplings
        do. Each call gets the random numbers that it had.

        Args:
            y: The state after the block.
            capture: Keep what the gradient needs.

        Raises:
            RuntimeError: If the block draws random numbers and its inverse does not call what it called.
        """
        kept: dict[Key, Tensor] = {}
        counts: dict[int, int] = {}
        left: dict[int, list[int]] = defaultdict(list)
        for number, call in enumerate(self.calls):
            left[id(call.module)].append(number)
        inside: list[nn.Module] = []
        strange = False

        def watch(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal strange
            if inside:
                return plain(*args, **kwargs)
            number = left[id(module)].pop() if left[id(module)] else None
            strange |= number is None or not _one_tensor(args, kwargs)
            if self.random and number is None:
                raise RuntimeError(
                    f"reversible: {type(self.block).__name__} draws random numbers, and its inverse calls "
                    f"{type(module).__name__} more often than its forward: they cannot be drawn again"
                )
            inside.append(module)
            try:
                if number is None:
                    return plain(*args, **kwargs)
                call = self.calls[number]
                if call.random:
                    set_random_state(call.random, self.device)
                if not capture or strange or call.needs is None:
                    return plain(*args, **kwargs)
                x = args[0].detach().requires_grad_(call.needs)
                output, counts[number] = captured(plain, x, call.number, kept)
                return output.detach()
            finally:
                inside.clear()

        with self._as_it_was(), torch.no_grad(), _intercepted(self.branches, watch):
            if self.random:
                set_random_state(self.random, self.device)
            x = self.block.inverse(y).detach()
        complete = not (strange or any(left.values()) or self.loose or self.draws_outside)
        complete = complete and all(counts.get(number) == call.saved for number, call in enumerate(self.calls))
        return x, kept if capture and complete else None

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Buffers as before the forward, and copies, so that nothing is updated again; random state put back."""
        if [p._version for p in self.weights] != self.versions:
            raise RuntimeError(
                f"reversible: parameters of {type(self.block).__name__} were changed in place since the forward whose "
                "gradient is asked for; run the forward again"
            )
        before = {(id(module), name): value for module, name, value in self.changed}
        own = [(module, dict(module._buffers)) for module in self.stateful]
        random = random_state(self.device) if self.random else None
        try:
            for module, buffers in own:
                for name, buffer in buffers.items():
                    if buffer is not None:
                        module._buffers[name] = before.get((id(module), name), buffer).clone()
            with self.autocast(), replayed():
                yield
        finally:
            for module, buffers in own:
                module._buffers.update(buffers)
            if random:
                set_random_state(random, self.device)


def random_state(device: torch.device) -> RandomState:
    """The state of torch's random numbers: the processor's, and that of the device."""
    cpu = torch.default_generator.get_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Put back what `random_state` gave."""
    cpu, *others = state
    torch.set_rng_state(cpu)
    for other in others:
        torch.cuda.set_rng_state(other, device)


def _same(a: RandomState, b: RandomState) -> bool:
    return all(map(torch.equal, a, b))


def _autocast(device: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts with the present settings of autocast."""
    if not torch.is_autocast_enabled(device):
        return partial(_no_autocast, device)
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), True, torch.is_autocast_cache_enabled())


def _no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _branches(block: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside a block that can be called."""
    for child in block._modules.values():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _branches(child)
        elif child is not None:
            yield child


def _gathers(module: nn.Module) -> bool:
    """Whether a module's buffers are statistics that it gathers and does not compute with, so old values are no use."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.training


def _one_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


@contextmanager
def _intercepted(modules: list[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Forwards of these modules go through `run(module, forward, *args, **kwargs)`."""
    own = [(module, vars(module).get("forward")) for module in modules]
    for module, _ in own:
        vars(module)["forward"] = partial(run, module, module.forward)
    try:
        yield
    finally:
        for module, forward in own:
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def captured(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    number: int,
    kept: dict[Key, Tensor],
    give: Callable[[Key], Any] | None = None,
) -> tuple[Tensor, int]:
    """f(x) with gradient; what that needs goes into `kept`, as of the call of that number. And how much it was.

    What is then no longer in `kept` is asked of `give`.
    """
    count = 0

    def pack(tensor: Tensor) -> Key:
        nonlocal count
        key = number, count
        kept[key], count = tensor.detach(), count + 1
        return key

    with torch.enable_grad(), _saved(pack, kept, give or _gone):
        output = f(x)
    return output, count


def _saved(
    pack: Callable[[Tensor], Key], kept: dict[Key, Any], give: Callable[[Key], Any]
) -> AbstractContextManager[None]:
    """What autograd saves goes through `pack`, and comes from `kept` or else from `give`."""
    return saved_tensors_hooks(pack, lambda key: kept[key] if key in kept else give(key))


def _gone(key: Key) -> Tensor:
    raise RuntimeError("reversible: the gradient of a block that was run again is not there")
