"""Recording one forward of a model at its blocks, and replaying the rest of it from a changed state."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from inspect import signature
from threading import RLock
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from residuum.calls import (
    argument,
    call_model,
    cuda_devices,
    detached,
    output_of,
    state_of,
    state_slot,
    with_argument,
    with_state,
)

Core = Callable[..., Any]  # a gated module's own call, user hooks included
Autocast = tuple[bool, torch.dtype]  # whether it is on, and to what it casts


@dataclass(frozen=True)
class Call:
    """One call of a block: the module, its other arguments, the form of its output."""

    name: str
    core: Core
    args: tuple[Any, ...]  # the state's place holds None
    kwargs: dict[str, Any]
    slot: int | str
    output: Any  # with the state in it, see `state_of`; only shapes matter where the call keeps the shape
    keeps: bool
    linked: bool  # got exactly what the call before it gave
    autocast: Autocast | None  # to which the model switches around it; None where it was on or off before

    def __call__(self, h: Tensor) -> Tensor:
        """Run the block alone on a state."""
        args, kwargs = with_argument(self.args, self.kwargs, self.slot, h)
        if self.autocast is None:
            return state_of(self.core(*args, **kwargs))
        enabled, dtype = self.autocast
        with torch.autocast(h.device.type, dtype, enabled):
            return state_of(self.core(*args, **kwargs))


class Reached(BaseException):  # no error: models may catch theirs
    """Ends a replay where the next section begins; carries the state that its first block gets."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


class _Unseen(nn.Module):
    """First base of a gate: `__init_subclass__` of the user's class, which may keep a list, does not see it."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


class Twin:
    """A private copy of the model whose blocks, and the modules outside them, ask the current pass what to do.

    Each such module becomes a gate: an object of a subclass of its own class, which asks when it is called. It stays
    the same object, so whatever it keeps on itself is where the model looks for it.
    """

    def __init__(self, model: nn.Module, block_names: Mapping[int, str]) -> None:
        self.model = model
        self.lock = RLock()
        self.unkept: set[tuple[str, int]] = set()  # calls outside the blocks whose outputs the model changes in place
        self.current: Recording | Replay | None = None
        self.recordings = 0  # what modules keep on themselves is of the last one
        self.parameters = tuple(model.parameters())
        _refuse_backward_hooks(model, block_names)
        for module, name, is_block in _gates(model, block_names):
            self._gate(module, name, is_block)

    def _gate(self, module: nn.Module, name: str, is_block: bool) -> None:
        plain = type(module)

        def call(gate: nn.Module, *args: Any, **kwargs: Any) -> Any:
            now = self.current
            if now is None:
                return plain.__call__(gate, *args, **kwargs)
            return (now.block if is_block else now.outside)(partial(plain.__call__, gate), name, args, kwargs)

        module.__class__ = type(plain)(
            plain.__name__, (_Unseen, plain), {"__call__": call, "__module__": plain.__module__}
        )

    def versions(self) -> list[tuple[int, int, bool]]:
        """What changes when a parameter is changed in place, gets other memory, or is frozen."""
        return [(p._version, p.data_ptr(), p.requires_grad) for p in self.parameters]

    def run(self, now: "Recording | Replay", x: Any) -> Any:
        """One forward under a pass."""
        with self.lock:
            self.current = now
            try:
                return call_model(self.model, x)
            finally:
                self.current = None

    def alone(self, core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module without a pass, so that gates inside it are open."""
        now, self.current = self.current, None
        try:
            return core(*args, **kwargs)
        finally:
            self.current = now


def _refuse_backward_hooks(model: nn.Module, block_names: Mapping[int, str]) -> None:
    """Hooks on what holds blocks see gradients that a run does not have there."""
    for name, module in model.named_modules():
        hooked = name and id(module) not in block_names and (module._backward_hooks or module._backward_pre_hooks)
        if hooked and any(id(part) in block_names for part in module.modules()):
            raise ValueError(
                f'cut: "{name}", which holds blocks, has a backward hook, which a run of the blocks would not repeat: '
                "its parameter gradients would not be the model's; remove it, or put it on a block"
            )


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
    """One forward of the twin with everything a stream needs kept: block calls, outputs of modules outside.

    Blocks run without gradient, and what they give is marked: fresh tensors that carry gradient. Whatever the model
    computes between its blocks shows in its gradient graph which marks, and which parameters, it comes from.
    """

    twin: Twin
    changed: bool  # run the first block on a changed state
    given: list[Any]  # the model's input
    number: int  # of the recordings of this twin
    versions: list[tuple[int, int, bool]]  # of the parameters
    around: dict[str, Autocast] = field(default_factory=dict)  # autocast as the model was called, by device
    calls: list[Call] = field(default_factory=list)
    finished: dict[tuple[str, int], "Kept"] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    last: Tensor | None = None  # the state that the last call gave, marked
    before: Tensor | None = None  # the state that it got
    marks: dict[int, tuple[ReferenceType[Tensor], int]] = field(
        default_factory=dict
    )  # by id: tensor, call that gave it
    first: Any = None  # the first state in the gradient graph: its node, or itself
    leaf: Tensor | None = None  # the first state, where it was made to carry gradient
    end: Tensor | None = None  # the state after the last block that keeps its shape
    output: Tensor | None = None  # of the model

    def renew(self, x: Any, *, arguments: bool = True) -> None:
        """Record once more what can be of another batch, or of parameters as they were.

        Args:
            x: The batch.
            arguments: Whether what runs next uses what was kept of this one.
        """
        if self.number == self.twin.recordings and not (arguments and self.versions != self.twin.versions()):
            return
        with torch.inference_mode(False), torch.random.fork_rng(devices=cuda_devices(self.twin.model)):
            now = record(self.twin, x, changed=False)
        if [call.name for call in now.calls] != [call.name for call in self.calls]:
            raise ValueError("cut: with the parameters as they are now other blocks run; cut the model once more")
        self.calls, self.finished, self.versions, self.number = now.calls, now.finished, now.versions, now.number

    def outside(self, core: Core, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module outside the blocks runs; its output is kept, with the number of block calls begun by then."""
        key = (name, self.counts[name])
        self.counts[name] += 1
        output = self.twin.alone(core, args, kwargs)
        if key not in self.twin.unkept:
            self.finished[key] = Kept(len(self.calls), tree_map(detached, output))
        return output

    def block(self, core: Core, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block runs, on a changed state if it is the first; its arguments are kept, or refused."""
        slot = state_slot(args, kwargs)
        if slot is None:
            raise ValueError(f'cut: block "{name}" gets no floating-point tensor as its state')
        if not torch.is_grad_enabled():
            raise ValueError(
                f'cut: the model switches gradients off around block "{name}" (torch.no_grad, reentrant checkpoints), '
                "so parameter gradients of a run would be wrong; switch that off"
            )
        h = argument(args, kwargs, slot)
        linked = self._linked(h)
        if linked and (not h.requires_grad or h._backward_hooks):
            raise ValueError(
                f'cut: what block "{name}" gets from the one before it is detached, or has a gradient hook, which '
                "a run would not repeat: its parameter gradients would not be the model's; do that inside a block"
            )
        self._check_source(h, f'block "{name}" gets')
        if not self.calls:
            if not (h.requires_grad or isinstance(h, nn.Parameter) or any(h is value for value in self.given)):
                self.leaf = h.requires_grad_()  # with frozen parameters, too, the graph shows what comes from it
            self.first = h.grad_fn or (h if h.requires_grad else None)
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
        autocast = _autocast(h.device.type)
        inside = None if autocast == self.around.get(h.device.type, autocast) else autocast
        self.calls.append(Call(name, core, args, kwargs, slot, form, keeps, linked, inside))
        output = tree_map(self._marked, plain)
        self.before, self.last = h.detach(), state_of(output)
        if keeps:
            self.end = self.last.detach()
        return output

    def _linked(self, h: Tensor) -> bool:
        """Whether h is the very tensor that the previous call gave, or another view of all of it."""
        if self.last is None:
            return False
        last, before = self.last, self.before
        if h is last:
            return True
        if (h.data_ptr(), h.shape, h.stride()) == (last.data_ptr(), last.shape, last.stride()):
            # A function of the user's that gives what it gets can have a gradient of its own.
            return not any(isinstance(source, torch.autograd.function.BackwardCFunction) for source in _sources(h))
        added = before.shape == h.shape == last.shape and torch.allclose(h, before + last, rtol=1e-3, atol=1e-5)
        if added and not torch.allclose(h, last, rtol=1e-3, atol=1e-5):
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
        self.marks[id(value)] = (ref(value), len(self.calls) - 1)
        return value

    def _origins(self, sources: list[Any]) -> set[int]:
        """Numbers of the calls whose marked outputs are among the sources."""
        marked = (self.marks.get(id(source), (lambda: None, -1)) for source in sources)
        return {number for source, (tensor, number) in zip(sources, marked, strict=True) if tensor() is source} - {-1}

    def check_output(self, output: Tensor) -> None:
        """Refuse an output that comes from more than what the last block gave."""
        self._check_source(output, "the output comes")

    def _check_source(self, value: Tensor, what: str) -> None:
        """Refuse a value between blocks that comes from an earlier block than the last, or from the first state."""
        if not self.calls or not value.requires_grad:
            return
        sources = _sources(value)
        early = self._origins(sources) - {len(self.calls) - 1}
        if early or any(source is self.first for source in sources):
            where = f'from what block "{self.calls[min(early)].name}" gave' if early else "from the first state"
            raise ValueError(
                f"cut: {what} also {where}, not only from the block before: the model is not a path of one state "
                "(a long skip, modules that return only their branch, or whose first floating-point argument is not "
                "the state); name blocks that hold the skip inside"
            )

    def _check_arguments(self, core: Core, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positional = list(signature(core.args[0].forward).parameters)
        labels = (positional[i] if i < len(positional) else i for i in range(len(args)))
        for place, value in (*zip(labels, args, strict=True), *kwargs.items()):
            label = f'argument {place!r} of block "{name}"'
            for leaf in tree_flatten(value)[0]:
                if isinstance(leaf, Tensor):
                    if leaf.requires_grad:
                        raise ValueError(f"cut: {label} {self._dependence(leaf)}")
                elif not _is_plain(leaf):
                    raise ValueError(
                        f"cut: {label} is a {type(leaf).__name__}, an object that blocks can change (a cache?); "
                        "for Hugging Face models put use_cache=False into the input"
                    )

    def _dependence(self, value: Tensor) -> str:
        """Why a tensor that carries gradient is refused as an argument."""
        sources = _sources(value)
        if self._origins(sources) or any(source is self.first for source in sources):
            return (
                "depends on the state of an earlier block, so the blocks are not a path of one state; "
                "name other blocks (blocks=...) that hold that dependence inside"
            )
        return (
            "carries gradient of parameters that are used outside the blocks, which a run of the stream would lose; "
            "to measure without parameter gradients, call model.requires_grad_(False) first"
        )


@dataclass(frozen=True)
class Kept:
    """What a module outside the blocks gave, and when."""

    position: int
    output: Any


def _sources(value: Tensor) -> list[Any]:
    """The leaves and the nodes of the gradient graph that a value comes from."""
    pending, nodes = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return [value, *nodes, *(node.variable for node in nodes if hasattr(node, "variable"))]


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

    def outside(self, core: Core, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module outside the blocks: what it gave if it had finished before the restart, else its own run."""
        key = (name, self.counts[name])
        self.counts[name] += 1
        kept = self.recording.finished.get(key)
        if kept is not None and kept.position <= self.after and self._constant(core, (args, kwargs)):
            return kept.output
        return self.twin.alone(core, args, kwargs)

    def _constant(self, core: Core, given: Any) -> bool:
        """Whether a recorded output has no gradient to give."""
        if not torch.is_grad_enabled():
            return True
        tensors = [v for v in tree_flatten(given)[0] if isinstance(v, Tensor)]
        return not any(t.requires_grad for t in (*tensors, *core.args[0].parameters()))

    def block(self, core: Core, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block call: stand in for it up to the restart, give the new state there, run it after that."""
        p, self.position = self.position, self.position + 1
        slot = state_slot(args, kwargs)
        h = argument(args, kwargs, slot)
        if p == self.until:
            raise Reached(h)
        if p > self.after:
            return self.twin.alone(core, args, kwargs)
        call = self.recording.calls[p]
        if p == self.after:
            return with_state(call.output, self.state)
        return with_state(call.output, h) if call.keeps else call.output


def record(twin: Twin, x: Any, *, changed: bool) -> Recording:
    """Record one forward, from a changed first state or the true one."""
    x = tree_map(detached, x)  # whether its gradient is asked for is an affair of the runs
    given = [value for value in tree_flatten(x)[0] if isinstance(value, Tensor)]
    around = {device: _autocast(device) for device in {v.device.type for v in (*twin.parameters, *given)}}
    twin.recordings += 1
    recording = Recording(twin, changed, given, twin.recordings, twin.versions(), around)
    try:
        with torch.enable_grad():
            output = output_of(twin.run(recording, x))
            recording.check_output(output)
    finally:
        if recording.leaf is not None:
            recording.leaf.requires_grad_(False)
    recording.output = output.detach()
    recording.last = recording.before = recording.first = recording.leaf = None
    recording.given, recording.marks = [], {}
    return recording


def _autocast(device: str) -> Autocast:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _change(h: Tensor) -> Tensor:
    """A change of twice the state's size (of size two where the state is zero), the same at every call."""
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    size = h.detach().square().mean().sqrt()
    return 2 * torch.where(size > 0, size, 1) * noise


def _is_plain(value: Any) -> bool:
    """Values that a block cannot change behind our back."""
    kinds = (bool, int, float, complex, str, bytes, Enum, range, slice, torch.Size, torch.dtype, torch.device)
    return value is None or isinstance(value, kinds) or callable(value)
