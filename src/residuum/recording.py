"""Recording one forward of a model at its blocks, and replaying the rest of it from a changed state."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from inspect import signature
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from residuum.calls import call_model, detached, state_of, state_slot, with_argument, with_state


@dataclass(frozen=True)
class Call:
    """One call of a block: the module, its other arguments, the form of its output."""

    name: str
    core: nn.Module
    args: tuple[Any, ...]  # the state's place holds None
    kwargs: dict[str, Any]
    slot: int | str
    output: Any  # the first tensor of it is the state; only shapes matter where the call keeps the shape
    keeps: bool
    linked: bool  # got exactly what the call before it gave

    def __call__(self, h: Tensor) -> Tensor:
        """Run the block alone on a state."""
        args, kwargs = with_argument(self.args, self.kwargs, self.slot, h)
        return state_of(self.core(*args, **kwargs))


class Reached(Exception):  # noqa: N818 - not an error
    """Ends a replay where the next section begins; carries the state that its first block gets."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


class Twin:
    """A private copy of the model whose blocks, and the modules outside them, ask the current pass what to do.

    Each such module stays in its place as a gate; `core` is a shallow copy of it that does the work, user hooks
    included. Without a current pass a gate simply runs its core.
    """

    def __init__(self, model: nn.Module, block_names: Mapping[int, str]) -> None:
        self.model = model
        self.lock = RLock()
        self.unkept: set[tuple[str, int]] = set()  # calls outside the blocks whose outputs the model changes in place
        self.current: Recording | Replay | None = None
        for module, name, is_block in _gates(model, block_names):
            self._gate(module, name, is_block)

    def _gate(self, module: nn.Module, name: str, is_block: bool) -> None:
        core = copy.copy(module)
        # The gate itself has no hooks: those of the user fire when the core runs.
        vars(module).update({k: v for k, v in vars(nn.Module()).items() if "hooks" in k and isinstance(v, dict)})

        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self.current
            if now is None:
                return core(*args, **kwargs)
            return (now.block if is_block else now.outside)(core, name, args, kwargs)

        module.forward = forward

    def run(self, now: "Recording | Replay", x: Any) -> Any:
        """One forward under a pass."""
        with self.lock:
            self.current = now
            try:
                return call_model(self.model, x)
            finally:
                self.current = None

    def alone(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a core without a pass, so that gates inside it are open."""
        now, self.current = self.current, None
        try:
            return core(*args, **kwargs)
        finally:
            self.current = now


def _gates(model: nn.Module, block_names: Mapping[int, str]) -> list[tuple[nn.Module, str, bool]]:
    """The blocks, and the outermost modules that neither are, nor hold, nor lie inside a block."""
    gates: dict[int, tuple[nn.Module, str, bool]] = {}

    def holds(module: nn.Module) -> bool:
        return any(id(m) in block_names for m in module.modules())

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in block_names:
            gates[id(module)] = (module, block_names[id(module)], True)
        elif name and not holds(module):
            gates.setdefault(id(module), (module, name, False))
        else:
            for part, child in module.named_children():
                visit(child, f"{name}.{part}" if name else part)

    visit(model, "")
    inside = {id(m) for module, _, block in gates.values() if block for m in module.modules() if m is not module}
    return [gate for key, gate in gates.items() if gate[2] or key not in inside]


@dataclass
class Recording:
    """One forward of the twin with everything a stream needs kept: block calls, outputs of modules outside."""

    twin: Twin
    changed: bool  # change the first state, and let all that depends on states or parameters carry gradient
    calls: list[Call] = field(default_factory=list)
    finished: dict[tuple[str, int], tuple[int, Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    previous: tuple[Tensor | None, Tensor | None] = (None, None)  # state before and after the last call
    marks: set[int] = field(default_factory=set)
    kept: list[Tensor] = field(default_factory=list)  # keeps the ids in marks alive

    def outside(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module outside the blocks runs; its output is kept, with the number of block calls begun by then."""
        key = (name, self.counts[name])
        self.counts[name] += 1
        output = self.twin.alone(core, args, kwargs)
        if key not in self.twin.unkept:
            self.finished[key] = (len(self.calls), tree_map(detached, output))
        return output

    def block(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block runs, on a changed state if it is the first; its arguments are kept, or refused."""
        slot = state_slot(args, kwargs)
        if slot is None:
            raise ValueError(f'cut: block "{name}" gets no floating-point tensor as its state')
        h = args[slot] if isinstance(slot, int) else kwargs[slot]
        linked = self._linked(h)
        with torch.no_grad():
            given = h + _change(h) if self.changed and not self.calls else h
            output = self.twin.alone(core, *with_argument(args, kwargs, slot, given))
        args, kwargs = with_argument(args, kwargs, slot, None)
        self._check_arguments(core, name, args, kwargs)
        state = state_of(output)
        keeps = state is not None and state.shape == h.shape and state.dtype == h.dtype
        plain = tree_map(detached, output)
        # Within a section the state is passed on, so only its shape is needed: one element stands for it.
        form = with_state(plain, state.detach().new_zeros(()).expand(state.shape)) if keeps else plain
        self.calls.append(Call(name, core, args, kwargs, slot, form, keeps, linked))
        output = tree_map(self._marked, plain) if self.changed else output
        self.previous = (h.detach(), state_of(output))
        return output

    def _linked(self, h: Tensor) -> bool:
        """Whether h is what the previous call gave; refuses blocks that return only their branch."""
        before, after = self.previous
        if before is None or after is None:
            return False
        if h is after or (h.shape == after.shape and torch.equal(h, after)):
            return True
        if before.shape == h.shape == after.shape and torch.allclose(h, before + after, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f'cut: block "{self.calls[-1].name}" returns only its branch: the next block gets h + block(h). '
                "Name modules that return the new state (blocks=...), or wrap the sum into the block"
            )
        return False

    def _marked(self, value: Any) -> Any:
        """A copy that carries gradient, so that whatever is computed from it is recognised."""
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        value = value.detach().requires_grad_()
        self.marks.add(id(value))
        self.kept.append(value)
        return value

    def _check_arguments(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positional = list(signature(core.forward).parameters)
        labels = (positional[i] if i < len(positional) else i for i in range(len(args)))
        for argument, value in (*zip(labels, args, strict=True), *kwargs.items()):
            label = f'argument {argument!r} of block "{name}"'
            for leaf in tree_flatten(value)[0]:
                if isinstance(leaf, Tensor):
                    if leaf.requires_grad and self.changed:
                        raise ValueError(f"cut: {label} {self._dependence(leaf)}")
                elif not _is_plain(leaf):
                    raise ValueError(
                        f"cut: {label} is a {type(leaf).__name__}, an object that blocks can change (a cache?); "
                        "for Hugging Face models put use_cache=False into the input"
                    )

    def _dependence(self, value: Tensor) -> str:
        """Why a tensor that carries gradient is refused."""
        pending, met = [value.grad_fn], set()
        leaves = {id(value)}
        while pending:
            node = pending.pop()
            if node is not None and node not in met:
                met.add(node)
                leaves.add(id(getattr(node, "variable", None)))
                pending.extend(following for following, _ in node.next_functions)
        if leaves & self.marks:
            return (
                "depends on the state of an earlier block, so the blocks are not a path of one state; "
                "name other blocks (blocks=...) that hold that dependence inside"
            )
        return (
            "carries gradient of parameters that are used outside the blocks, which a run of the stream would lose; "
            "to measure without parameter gradients, call model.requires_grad_(False) first"
        )


@dataclass
class Replay:
    """One forward of the twin that goes on from a state after a block call, up to another block call or the end."""

    twin: Twin
    recording: Recording
    after: int  # number of the call whose output is replaced; -1: from the start
    state: Any  # a tensor, or the model's input where the replay begins at the start
    until: int | None
    position: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def outside(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module outside the blocks: what it gave if it had finished before the restart, else its own run."""
        key = (name, self.counts[name])
        self.counts[name] += 1
        position, output = self.recording.finished.get(key, (self.after + 1, None))
        # A recorded output is a constant: where parameters need its gradient, the module runs again.
        constant = not torch.is_grad_enabled() or not any(p.requires_grad for p in core.parameters())
        if position <= self.after and constant:
            return output
        return self.twin.alone(core, args, kwargs)

    def block(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block call: stand in for it up to the restart, give the new state there, run it after that."""
        p, self.position = self.position, self.position + 1
        slot = state_slot(args, kwargs)
        h = args[slot] if isinstance(slot, int) else kwargs[slot]
        if p == self.until:
            raise Reached(h)
        if p > self.after:
            return self.twin.alone(core, args, kwargs)
        call = self.recording.calls[p]
        if p == self.after:
            return with_state(call.output, self.state)
        return with_state(call.output, h) if call.keeps else call.output


def record(twin: Twin, x: Any, *, changed: bool) -> Recording:
    """Record one forward."""
    recording = Recording(twin, changed)
    with torch.set_grad_enabled(changed):
        twin.run(recording, x)
    recording.previous = (None, None)
    recording.kept.clear()
    return recording


def _change(h: Tensor) -> Tensor:
    """A change of half the state's size (of size one half where the state is zero), the same at every call."""
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    size = h.detach().square().mean().sqrt()
    return 0.5 * torch.where(size > 0, size, 1) * noise


def _is_plain(value: Any) -> bool:
    """Values that a block cannot change behind our back."""
    kinds = (bool, int, float, complex, str, bytes, Enum, range, slice, torch.Size, torch.dtype, torch.device)
    return value is None or isinstance(value, kinds) or callable(value)
