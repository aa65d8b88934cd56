"""Cutting: any torch model and one batch as a stream of residual blocks, found, recorded and proved.

The work happens on a twin: a deep copy that shares the parameters and has buffers of its own. It runs three times:

1. *observe* the model on x, and choose the blocks;
2. *record* it with a changed first state h + d: the blocks' arguments, the outputs of modules outside the blocks;
3. *prove*: run the stream made from that recording on the true h; every state and the output must be those of 1.

A value that reaches a block or the readout by another way than the state differs between 1 and 2, so 3 finds it.
"""

import copy
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from inspect import signature
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from residuum.streams import Block, Section, Stream

# Relative difference allowed between the model and its stream. Both run the same kernels on the same shapes, so they
# agree to the last bit on processors; the margin is for kernels that are not deterministic.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def cut(model: nn.Module, x: Any, blocks: Sequence[str] | None = None) -> Stream:
    """A model on one batch as a stream: sections of residual blocks, their entries, the readout.

    Networks that define `cut(x)` themselves (ours do) are asked. In any other model calls are recorded, and the blocks
    are found: candidates are classes outside `torch.nn` with parameters and at least two calls that keep the shape of
    their state; of those that hold at least half of the most parameters the outermost wins. Sections are maximal runs
    of shape-keeping calls in which each block gets what the previous one gave; shape-changing blocks become part of
    the entry of the next section. The cut is then proved on a changed first state.

    The model is not touched: parameters are shared with a private copy, buffers, hooks and random state are not.
    Hooks of the user are part of the computation and fire on the copy. Changes of the parameters in place are seen.

    Args:
        model: Any module, in eval mode.
        x: One batch: a tensor, a tuple of arguments, or a mapping of keyword arguments; examples along dimension 0.
        blocks: Names of the block modules where the search finds the wrong ones; `*` stands for one part of a name,
            as in `("layer1.*", "layer2.*")`.

    Returns:
        The stream; a full run of it equals the model, parameter gradients included.

    Raises:
        ValueError: If the model is in training mode, no residual block is found, blocks return only their branch,
            get a cache or a value that depends on the state or carries gradient, change a state in place, or if the
            proof fails. The message says which, lists the candidates, and says what to do.
    """
    return next(cut_all(model, (x,), blocks))


def cut_all(model: nn.Module, inputs: Iterable[Any], blocks: Sequence[str] | None = None) -> Iterator[Stream]:
    """Streams of many batches; the blocks are found and the cut is proved on the first, later ones are recorded only.

    Args:
        model: Any module, in eval mode.
        inputs: Batches as `cut` takes them.
        blocks: As in `cut`.

    Yields:
        One stream per batch.

    Raises:
        ValueError: As `cut`.
    """
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"cut() needs model.eval(): {name or type(model).__name__} is in training mode, so dropout and "
                "batch norm would mix examples and statistics would be updated while probing"
            )
    own = getattr(type(model), "cut", None)
    if own is not None:
        yield from (own(model, x) for x in inputs)
        return
    twin = None
    for x in inputs:
        with torch.inference_mode(False), torch.random.fork_rng(devices=_cuda_devices(model)):
            x = tree_map(_normal, x)
            if twin is None:
                twin, observed, output = _prepare(model, x, blocks)
                stream = _proved(twin, x, observed, output)
            else:
                stream = _stream(twin, _record(twin, x, changed=False), x)
        yield stream


# A call and where its state is -----------------------------------------------------------------------------------


def _state_slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a block's state stands among its arguments: the first floating-point tensor."""
    places = (*enumerate(args), *kwargs.items())
    return next((at for at, v in places if isinstance(v, Tensor) and v.is_floating_point()), None)


def _state_of(output: Any) -> Tensor | None:
    """The state that a block returns: its output, or the first tensor of it."""
    return next((v for v in tree_flatten(output)[0] if isinstance(v, Tensor)), None)


def _with_state(output: Any, h: Tensor) -> Any:
    """A block's output with another state in it."""
    leaves, form = tree_flatten(output)
    at = next(i for i, v in enumerate(leaves) if isinstance(v, Tensor))
    return tree_unflatten([*leaves[:at], h, *leaves[at + 1 :]], form)


def _with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str, h: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another state in them."""
    if isinstance(slot, int):
        return (*args[:slot], h, *args[slot + 1 :]), kwargs
    return args, {**kwargs, slot: h}


@dataclass(frozen=True)
class _Call:
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
        args, kwargs = _with_argument(self.args, self.kwargs, self.slot, h)
        return _state_of(self.core(*args, **kwargs))


# 1. Observe and choose -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """One call as the observation saw it."""

    name: str
    module: nn.Module
    around: tuple["_Seen", ...]  # the observed calls that it is part of, outermost first
    before: torch.Size | None = None
    after: torch.Size | None = None
    norm: Tensor | None = None
    changed: str = ""  # which state was changed in place

    @property
    def keeps(self) -> bool:
        return self.before is not None and self.before == self.after


def _prepare(model: nn.Module, x: Any, blocks: Sequence[str] | None) -> tuple["_Twin", list[_Seen], Tensor]:
    """The twin with its blocks chosen, the observed calls of these, and the model's output."""
    copied = _copy(model)
    if blocks is None:
        watched = {n: m for n, m in copied.named_modules() if not _in_torch(m) and any(True for _ in m.parameters())}
    else:
        watched = _named(copied, blocks)
    seen, output = _observe(copied, x, watched)
    chosen = seen if blocks is not None else _choose(copied, x, seen)
    chosen = [call for call in chosen if not any(outer in chosen for outer in call.around)]
    if not any(call.keeps for call in chosen):
        raise ValueError(
            f"cut: no call of blocks={tuple(blocks or ())} keeps the shape of its state.\n{_candidates(seen)}"
        )
    for call in chosen:
        if call.changed:
            raise ValueError(
                f'cut: {call.changed} of block "{call.name}" is changed in place, so its states cannot be recorded; '
                "use an operation that makes a new tensor (x = x + y, relu without inplace=True)"
            )
    names = {id(call.module): call.name for call in chosen}
    return _Twin(copied, names), chosen, _output(output)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares the parameters."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():  # results kept on modules (old-style weight norm) cannot be deep-copied
        memo |= {id(v): v.detach() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"cut works on a copy of the model, and {type(model).__name__} cannot be copied: {error}"
        ) from error


def _in_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _named(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose names match; `*` stands for one part."""
    if isinstance(patterns, str):
        raise TypeError(f"blocks must be a sequence of names, got the string {patterns!r}; write ({patterns!r},)")
    modules, found = dict(model.named_modules()), {}
    for pattern in patterns:
        form = re.escape(pattern).replace(r"\*", r"[^.]+")
        matching = {n: m for n, m in modules.items() if re.fullmatch(form, n)}
        if not matching:
            near = get_close_matches(pattern, modules, 3) or list(modules)[1:6]
            raise ValueError(f"blocks names {pattern!r}, which {type(model).__name__} does not have; near: {near}")
        found |= matching
    return found


def _observe(model: nn.Module, x: Any, watched: Mapping[str, nn.Module]) -> tuple[list[_Seen], Any]:
    """One plain forward; every call of a watched module with shapes, nesting, norm of its state, in-place changes."""
    seen: list[_Seen] = []
    running: list[tuple[_Seen, Tensor | None, int]] = []
    given: dict[type, tuple[_Seen, Tensor, int]] = {}  # the last state that a class gave, and its version

    def check(kind: type) -> None:
        if kind in given and given[kind][1]._version != given[kind][2]:
            given[kind][0].changed = "the output"

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check(type(module))
        slot = _state_slot(args, kwargs)
        h = None if slot is None else args[slot] if isinstance(slot, int) else kwargs[slot]
        call = _Seen(name, module, tuple(c for c, *_ in running), None if h is None else h.shape)
        seen.append(call)
        running.append((call, h, 0 if h is None else h._version))

    def after(module: nn.Module, output: Any) -> None:
        call, h, version = running.pop()
        state = _state_of(output)
        if h is not None and h._version != version:
            call.changed = "the input"
        if state is not None and state.is_floating_point():
            call.after = state.shape
            call.norm = torch.linalg.vector_norm(state.detach(), dtype=_wide(state.dtype))
            given[type(module)] = (call, state, state._version)

    handles = []
    for name, module in watched.items():
        # functools.partial would hide the module's name from the hook; default arguments bind it here.
        handles.append(
            module.register_forward_pre_hook(
                lambda m, a, k, name=name: before(name, m, a, k), prepend=True, with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, a, o: after(m, o)))
    try:
        with torch.no_grad():
            output = _call_model(model, x)
    finally:
        for handle in handles:
            handle.remove()
    for kind in given:
        check(kind)
    return seen, output


def _choose(model: nn.Module, x: Any, seen: list[_Seen]) -> list[_Seen]:
    """The calls of the class that wins: at least half of the most parameters, then outermost, then most parameters."""
    by_class: dict[type, list[_Seen]] = {}
    for call in seen:
        by_class.setdefault(type(call.module), []).append(call)
    eligible = {kind: calls for kind, calls in by_class.items() if sum(call.keeps for call in calls) >= 2}
    if not eligible:
        named = {n: m for n, m in model.named_modules() if n and any(True for _ in m.children())}
        raise ValueError(
            f"cut: no residual block found in {type(model).__name__}: no class outside torch.nn with parameters was "
            f"called twice with a state of unchanged shape.\n{_candidates(_observe(model, x, named)[0])}"
        )
    size = {kind: _parameters(calls) for kind, calls in eligible.items()}
    large = [kind for kind in eligible if 2 * size[kind] >= max(size.values())]
    depth = {kind: min(len(call.around) for call in eligible[kind] if call.keeps) for kind in large}
    return by_class[min(large, key=lambda kind: (depth[kind], -size[kind]))]


def _parameters(calls: Iterable[_Seen]) -> int:
    return sum({id(p): p.numel() for call in calls for p in call.module.parameters()}.values())


def _candidates(seen: list[_Seen]) -> str:
    """The refusal's second half: what was called, and the cure."""
    rows = {}
    for call in seen:
        kind = type(call.module).__name__
        name, keeping, calls = rows.get(kind, (call.name, 0, 0))
        rows[kind] = (name, keeping + call.keeps, calls + 1)
    listed = [f'  {kind} ("{n}"): {c} calls, {k} keep the shape' for kind, (n, k, c) in list(rows.items())[:8]]
    return "\n".join(
        ["Candidates:", *(listed or ["  none"]), 'Name the blocks yourself: cut(model, x, blocks=("part.*", ...)).']
    )


# 2. Record and replay --------------------------------------------------------------------------------------------


class _Reached(Exception):  # noqa: N818 - not an error: it ends a replay where the next section begins
    def __init__(self, state: Tensor) -> None:
        self.state = state


class _Twin:
    """A private copy of the model whose blocks, and the modules outside them, ask the current pass what to do.

    Each such module stays in its place as a gate; `core` is a shallow copy of it that does the work, user hooks
    included. Without a current pass a gate simply runs its core.
    """

    def __init__(self, model: nn.Module, block_names: Mapping[int, str]) -> None:
        self.model = model
        self.lock = RLock()
        self.unkept: set[tuple[str, int]] = set()  # calls outside the blocks whose outputs the model changes in place
        self.current: _Recording | _Replay | None = None
        for module, name, is_block in _gates(model, block_names):
            self._gate(module, name, is_block)

    def _gate(self, module: nn.Module, name: str, is_block: bool) -> None:
        core = copy.copy(module)
        blank = nn.Module()
        vars(module).update(
            {k: v for k, v in vars(blank).items() if "hooks" in k and isinstance(v, OrderedDict | dict)}
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self.current
            if now is None:
                return core(*args, **kwargs)
            return (now.block if is_block else now.outside)(core, name, args, kwargs)

        module.forward = forward

    def run(self, now: "_Recording | _Replay", x: Any) -> Any:
        """One forward under a pass."""
        with self.lock:
            self.current = now
            try:
                return _call_model(self.model, x)
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
class _Recording:
    """One forward of the twin with everything a stream needs kept: block calls, outputs of modules outside."""

    twin: _Twin
    changed: bool  # change the first state, and let what depends on states or parameters carry gradient
    calls: list[_Call] = field(default_factory=list)
    finished: dict[tuple[str, int], tuple[int, Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    previous: tuple[Tensor | None, Tensor | None] = (None, None)  # state before and after the last call
    marks: set[int] = field(default_factory=set)
    kept: list[Tensor] = field(default_factory=list)  # keeps the ids in marks alive

    def outside(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (name, self.counts[name])
        self.counts[name] += 1
        output = self.twin.alone(core, args, kwargs)
        if key not in self.twin.unkept:
            self.finished[key] = (len(self.calls), tree_map(_detached, output))
        return output

    def block(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slot = _state_slot(args, kwargs)
        if slot is None:
            raise ValueError(f'cut: block "{name}" gets no floating-point tensor as its state')
        h = args[slot] if isinstance(slot, int) else kwargs[slot]
        linked = self._linked(h)
        with torch.no_grad():
            given = h + _change(h) if self.changed and not self.calls else h
            output = self.twin.alone(core, *_with_argument(args, kwargs, slot, given))
        args, kwargs = _with_argument(args, kwargs, slot, None)
        self._check_arguments(core, name, args, kwargs)
        state = _state_of(output)
        keeps = state is not None and state.shape == h.shape and state.dtype == h.dtype
        plain = tree_map(_detached, output)
        # Within a section the state is passed on, so only its shape is needed: one element stands for it.
        form = _with_state(plain, state.detach().new_zeros(()).expand(state.shape)) if keeps else plain
        self.calls.append(_Call(name, core, args, kwargs, slot, form, keeps, linked))
        output = tree_map(self._marked, plain) if self.changed else output
        self.previous = (h.detach(), _state_of(output))
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
        for argument, value in (*zip(positional, args, strict=False), *kwargs.items()):
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
class _Replay:
    """One forward of the twin that goes on from a state after a block call, up to another block call or the end."""

    twin: _Twin
    recording: _Recording
    after: int  # number of the call whose output is replaced; -1: from the start
    state: Any  # a tensor, or the model's input where the replay begins at the start
    until: int | None
    position: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def outside(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (name, self.counts[name])
        self.counts[name] += 1
        position, output = self.recording.finished.get(key, (self.after + 1, None))
        # A recorded output is a constant: where parameters need its gradient, the module runs again.
        constant = not torch.is_grad_enabled() or not any(p.requires_grad for p in core.parameters())
        if position <= self.after and constant:
            return output
        return self.twin.alone(core, args, kwargs)

    def block(self, core: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        p, self.position = self.position, self.position + 1
        slot = _state_slot(args, kwargs)
        h = args[slot] if isinstance(slot, int) else kwargs[slot]
        if p == self.until:
            raise _Reached(h)
        if p > self.after:
            return self.twin.alone(core, args, kwargs)
        call = self.recording.calls[p]
        if p == self.after:
            return _with_state(call.output, self.state)
        return _with_state(call.output, h) if call.keeps else call.output


def _record(twin: _Twin, x: Any, *, changed: bool) -> _Recording:
    """Record one forward."""
    recording = _Recording(twin, changed)
    with torch.set_grad_enabled(changed):
        twin.run(recording, x)
    recording.previous = (None, None)
    recording.kept.clear()
    return recording


def _stream(twin: _Twin, recording: _Recording, x: Any) -> Stream:
    """The stream of a recording: sections are runs of linked calls of one shape."""
    calls = recording.calls
    runs: list[list[int]] = []
    for p, call in enumerate(calls):
        if not call.keeps:
            continue
        if runs and runs[-1][-1] == p - 1 and call.linked:
            runs[-1].append(p)
        else:
            runs.append([p])
    _check_batch(_state_of(calls[runs[0][0]].output).shape, x)
    names = [_section_name([calls[p].name for p in run], s) for s, run in enumerate(runs)]
    sections = []
    for s, run in enumerate(runs):
        after = runs[s - 1][-1] if s else -1
        passed = tuple(call.name for call in calls[after + 1 : run[0]])
        blocks = tuple(Block(calls[p].name, calls[p]) for p in run)
        entry = _entry(twin, recording, x, after, run[0])
        name = names[s] if names.count(names[s]) == 1 else blocks[0].name
        sections.append(Section(name, entry, blocks, passed))
    return Stream(x, tuple(sections), _readout(twin, recording, x, runs[-1][-1]), _mask(x))


def _entry(twin: _Twin, recording: _Recording, x: Any, after: int, until: int) -> Callable[[Any], Tensor]:
    def entry(h: Any) -> Tensor:
        try:
            twin.run(_Replay(twin, recording, after, h, until), h if after < 0 else x)
        except _Reached as reached:
            return reached.state
        raise RuntimeError(f"the model did not reach block {recording.calls[until].name} again")

    return entry


def _readout(twin: _Twin, recording: _Recording, x: Any, last: int) -> Callable[[Tensor], Tensor]:
    def readout(h: Tensor) -> Tensor:
        return _output(twin.run(_Replay(twin, recording, last, h, None), x))

    return readout


# 3. Prove --------------------------------------------------------------------------------------------------------


def _proved(twin: _Twin, x: Any, observed: list[_Seen], output: Tensor) -> Stream:
    """A stream made from a changed first state, and found equal to the model on the true one."""
    while True:
        recording = _record(twin, x, changed=True)
        stream = _stream(twin, recording, x)
        versions = {key: _versions(kept) for key, (_, kept) in recording.finished.items()}
        problem = _difference(stream, observed, output)
        changed = {key for key, (_, kept) in recording.finished.items() if _versions(kept) != versions[key]}
        if not changed:
            break
        twin.unkept |= changed  # code between the modules changes these outputs in place: run them again in replays
    if problem:
        _refuse(stream, problem)
    return stream


def _difference(stream: Stream, observed: list[_Seen], output: Tensor) -> str:
    """The first state, or else the output, in which the stream differs from what the model had; "" if none."""
    blocks = [block.name for section in stream.sections for block in section.blocks]
    keeping = [call for call in observed if call.keeps]
    if [call.name for call in keeping] != blocks:
        return "the sequence of blocks"
    with torch.no_grad():
        step = None
        for call, step in zip(keeping, stream.walk(), strict=True):
            norm = torch.linalg.vector_norm(step.after, dtype=_wide(step.after.dtype))
            if not _close(norm, call.norm, step.after.dtype):
                return f'the state after block "{call.name}"'
        return "" if _close(stream.readout(step.after), output, output.dtype) else "the output"


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    if ours.shape != theirs.shape:
        return False
    scale = theirs.abs().nan_to_num(0, 0, 0).max()
    tolerance = _TOLERANCE.get(dtype, 1e-5)
    return torch.allclose(ours, theirs, rtol=tolerance, atol=float(tolerance * scale), equal_nan=True)


def _refuse(stream: Stream, where: str) -> None:
    hint = ""
    if len(stream.sections) > 1 and all(n == 1 for n in stream.lengths):
        hint = " No block gets what the previous one gave: do the modules return only their branch?"
    raise ValueError(
        f"cut: the stream is not the model: on a changed first state {where} differs. Something besides the state goes "
        f"from earlier blocks to later ones, or the model is random in eval mode.{hint} Blocks tried: "
        f'"{stream.sections[0].blocks[0].name}" .. "{stream.sections[-1].blocks[-1].name}"; name others with blocks=...'
    )


# Small helpers ---------------------------------------------------------------------------------------------------


def _call_model(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def _output(output: Any) -> Tensor:
    """The tensor that a model's output stands for: its logits where it names them, else its first tensor."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    found = logits if isinstance(logits, Tensor) else _state_of(output)
    if found is None:
        raise ValueError(f"cut: the model returns {type(output).__name__} without a tensor in it")
    return found


def _section_name(names: list[str], number: int) -> str:
    """The common beginning of the blocks' names, or a number."""
    parts = [name.split(".") for name in names]
    common = [a for a, *rest in zip(*parts, strict=False) if all(b == a for b in rest)]
    if len(set(names)) > 1 and common:
        return ".".join(common)
    return ".".join(parts[0][:-1]) or f"section {number + 1}"


def _mask(x: Any) -> Tensor | None:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _check_batch(state: torch.Size, x: Any) -> None:
    """Measures are per example, so states must have the examples along dimension 0."""
    first = next((v for v in tree_flatten(x)[0] if isinstance(v, Tensor) and v.ndim), None)
    if first is not None and (len(state) < 2 or state[0] != first.shape[0]):
        raise ValueError(
            f"cut: the batch has {first.shape[0]} examples along dimension 0, but the states have shape "
            f"{tuple(state)}; measures need the examples along dimension 0 of the state"
        )


def _change(h: Tensor) -> Tensor:
    """A change of half the state's size (of size one half where the state is zero), the same at every call."""
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    size = h.detach().square().mean().sqrt()
    return 0.5 * torch.where(size > 0, size, 1) * noise


def _versions(values: Any) -> list[int]:
    return [v._version for v in tree_flatten(values)[0] if isinstance(v, Tensor)]


def _normal(value: Any) -> Any:
    """A tensor made under inference mode as one whose changes and gradients can be followed."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    """Values that a block cannot change behind our back."""
    kinds = (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        torch.Size,
        torch.dtype,
        torch.device,
        Enum,
        range,
        slice,
        nn.Module,
    )
    return value is None or isinstance(value, kinds) or callable(value)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
