"""Finding the residual blocks of a model: one plain forward is observed, then one class of modules is chosen."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from residuum.calls import argument, call_model, state_of, state_slot
from residuum.copies import copied

NAMING = "blocks=... in Python, --blocks on the command line"


@dataclass(eq=False)
class Seen:
    """One call as the observation saw it."""

    name: str
    module: nn.Module
    around: tuple["Seen", ...]  # the observed calls that it is part of, outermost first
    before: Tensor | None = None  # the state that it got
    after: Tensor | None = None  # the state that it gave
    changed: str = ""  # which state was changed in place

    @property
    def keeps(self) -> bool:
        """Whether the state has the same shape and number format after the call."""
        if self.before is None or self.after is None:
            return False
        return (self.before.shape, self.before.dtype) == (self.after.shape, self.after.dtype)


def find(model: nn.Module, x: Any, blocks: Sequence[str] | None) -> tuple[nn.Module, list[Seen], Any]:
    """A copy of the model, the calls of its blocks in the order of one plain forward, and what that forward gave.

    Args:
        model: Any module, in eval mode.
        x: One batch.
        blocks: Names of the block modules, or None to choose a class: candidates are classes outside `torch.nn` with
            parameters and at least two calls that keep the shape of their state; of those that hold at least half of
            the most parameters the outermost wins.

    Raises:
        ValueError: If no block is found or named, or if one changes a state in place; if the forward changes its input,
            a parameter, or, past the copy, the model itself.
    """
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ValueError(f"cut: {scripted or 'the model'} is scripted or traced; give the model as it was before that")
    copied = _twin_of(model)
    if blocks is None:
        watched = {n: m for n, m in copied.named_modules() if not _in_torch(m) and any(True for _ in m.parameters())}
    else:
        watched = _named(copied, blocks)
    given = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, x)
    users = _versions(model)
    seen, output = _observe(copied, given, watched)
    if any(value._version for value in tree_flatten(given)[0] if isinstance(value, Tensor)):
        raise ValueError(
            "cut: the model changes its input in place; use an operation that makes a new tensor (x = x - 1)"
        )
    for name, version in _versions(model).items():
        if version != users[name]:
            raise ValueError(
                f'cut: "{name}" was changed by a forward of a copy of the model: a parameter that counts (make it a '
                "buffer), or a forward that was replaced by a function which holds the model itself (make it a method)"
            )
    chosen = seen if blocks is not None else _choose(copied, x, seen)
    chosen = [call for call in chosen if not any(outer in chosen for outer in call.around)]
    if not any(call.keeps for call in chosen):
        raise ValueError(
            f"cut: no call of the blocks {', '.join(blocks or ())} keeps the shape of its state.\n{_candidates(seen)}"
        )
    for call in chosen:
        if call.changed:
            raise ValueError(
                f'cut: {call.changed} of block "{call.name}" is changed in place, so its states cannot be recorded; '
                "use an operation that makes a new tensor (x = x + y, relu without inplace=True)"
            )
    return copied, chosen, output


def _twin_of(model: nn.Module) -> nn.Module:
    """A deep copy that shares the parameters."""
    made = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if made is not None:
        raise ValueError(
            f'cut: parameter "{made}" was made under torch.inference_mode, which autograd cannot use; make or load the '
            "model outside of it"
        )
    try:
        twin = copied(model, same=model.parameters())
    except Exception as error:
        raise ValueError(
            f"cut works on a copy of the model, and {type(model).__name__} cannot be copied: {error}"
        ) from error
    for module in list(twin.modules()):
        module._modules.update({name: uncompiled(part) for name, part in module._modules.items()})
    return twin


def _versions(model: nn.Module) -> dict[str, int]:
    """Numbers that change when a parameter or buffer is changed in place; those made in inference mode have none."""
    values = (*model.named_parameters(), *model.named_buffers())
    return {name: value._version for name, value in values if not value.is_inference()}


def uncompiled(model: nn.Module) -> nn.Module:
    """What a model was compiled from, if it is compiled: compiled code cannot be watched block by block."""
    return getattr(model, "_orig_mod", model)


def _kind(module: nn.Module) -> type:
    """The module's class, as it was before torch parametrizations changed it."""
    return next(kind for kind in type(module).__mro__ if kind.__module__ != "torch.nn.utils.parametrize")


def _in_torch(module: nn.Module) -> bool:
    """Whether it is one of torch's modules, or a loop of ours, which is to blocks what torch's lists are."""
    return _kind(module).__module__.startswith(("torch.nn.", "residuum.layers.sharing"))


def _named(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose names match; `*` stands for one part."""
    if isinstance(patterns, str):
        raise TypeError(f"blocks must be a sequence of names, got the string {patterns!r}; write ({patterns!r},)")
    modules, found = dict(model.named_modules(remove_duplicate=False)), {}
    for pattern in patterns:
        form = re.escape(pattern).replace(r"\*", r"[^.]+")
        matching = {n: m for n, m in modules.items() if re.fullmatch(form, n)}
        if not matching:
            near = get_close_matches(pattern, modules, 3) or list(modules)[1:6]
            raise ValueError(f"the block {pattern!r} is no module of {type(model).__name__}; near: {', '.join(near)}")
        for name, module in matching.items():
            if module not in found.values():  # it can have several names
                found[name] = module
    return found


def _observe(model: nn.Module, x: Any, watched: Mapping[str, nn.Module]) -> tuple[list[Seen], Any]:
    """One plain forward; every call of a watched module with shapes, nesting, norm of its state, in-place changes."""
    seen: list[Seen] = []
    running: list[tuple[Seen, Tensor | None, int]] = []
    given: dict[type, tuple[Seen, Tensor, int]] = {}  # the last state that a class gave, and its version

    def check(kind: type) -> None:
        if kind in given and _version(given[kind][1]) != given[kind][2]:
            given[kind][0].changed = "the output"

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check(type(module))
        slot = state_slot(args, kwargs)
        h = None if slot is None else argument(args, kwargs, slot)
        if h is not None and h.is_nested:
            raise ValueError(
                f'cut: "{name}" gets a nested tensor, whose examples have different shapes; give a batch without '
                "padding, or build nn.TransformerEncoder with enable_nested_tensor=False"
            )
        call = Seen(name, module, tuple(c for c, *_ in running), h)
        seen.append(call)
        running.append((call, h, 0 if h is None else _version(h)))

    def after(module: nn.Module, output: Any) -> None:
        call, h, version = running.pop()
        state = state_of(output)
        if h is not None and _version(h) != version:
            call.changed = "the input"
        if state is not None and state.is_floating_point():
            call.after = state
            given[type(module)] = (call, state, _version(state))

    handles = [module.register_forward_hook(lambda m, a, o: after(m, o)) for module in watched.values()]
    handles += [
        module.register_forward_pre_hook(partial(before, name), prepend=True, with_kwargs=True)
        for name, module in watched.items()
    ]
    with torch.no_grad():
        output = call_model(model, x)
    for handle in handles:
        handle.remove()
    for kind in given:
        check(kind)
    return seen, output


def _version(state: Tensor) -> int:
    """A number that changes when the tensor is changed in place."""
    if state.is_inference():
        raise ValueError("cut: the model runs under torch.inference_mode, which hides changes in place; remove that")
    return state._version


def _choose(model: nn.Module, x: Any, seen: list[Seen]) -> list[Seen]:
    """The calls of the class that wins: at least half of the most parameters, then outermost, then most parameters."""
    by_class: dict[type, list[Seen]] = {}
    for call in seen:
        by_class.setdefault(_kind(call.module), []).append(call)
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


def _parameters(calls: Iterable[Seen]) -> int:
    return sum({id(p): p.numel() for call in calls for p in call.module.parameters()}.values())


def _candidates(seen: list[Seen]) -> str:
    """The refusal's second half: what was called, and the cure."""
    rows = {}
    for call in seen:
        kind = type(call.module).__name__
        name, keeping, calls = rows.get(kind, (call.name, 0, 0))
        rows[kind] = (name, keeping + call.keeps, calls + 1)
    listed = [f'  {kind} ("{n}"): {c} calls, {k} keep the shape' for kind, (n, k, c) in list(rows.items())[:8]]
    if not listed:
        return "No module that has parts was called, so there are only single layers to name."
    how = f'Name the blocks yourself: {NAMING}, e.g. "part.*" for all modules in part.'
    return "\n".join(["Candidates:", ";\n".join(listed) + ".", how])
