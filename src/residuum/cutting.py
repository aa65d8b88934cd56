"""Cutting: any torch model and one batch as a stream of residual blocks, found, recorded and proved.

The work happens on a twin: a deep copy that shares the parameters and has buffers of its own. It runs three times:

1. *observe* the model on x, keep its states, and choose the blocks;
2. *record* it with a changed first state h + d: the blocks' arguments, the outputs of modules outside the blocks. The
   gradient graph of what is computed between blocks shows where it comes from; side paths are refused here;
3. *prove*: run each part of the stream made from that recording on the states of 1, from the last part to the first,
   and compare. A value that goes another way than the state is then still that of h + d, so it is found.

Later batches are recorded from their true first state, with the check of the gradient graph, and their readout is run
on the last state.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from residuum.calls import counting, cuda_devices, output_of, state_of
from residuum.finding import NAMING, Seen, find, uncompiled
from residuum.recording import Reached, Recording, Replay, Twin, record
from residuum.solve import of_the_batch
from residuum.streams import Block, Section, Stream

# Relative difference allowed between the model and its stream. Both run the same kernels on the same shapes, so they
# agree to the last bit on processors; the margin is for kernels that are not deterministic.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def cut(model: nn.Module, x: Any, blocks: Sequence[str] | None = None) -> Stream:
    """A model on one batch as a stream: sections of residual blocks, their entries, the readout.

    Networks that define `cut(x) -> Stream` themselves, annotated so (ours are), are asked, and checked. In any other
    model calls are recorded and the blocks are found: candidates are classes outside `torch.nn` with parameters and at
    least two calls that keep the shape of their state; of those that hold at least half of the most parameters the
    outermost wins. Sections are runs of shape-keeping calls in which each block gets what the previous one gave;
    shape-changing blocks become part of the entry of the next section. The cut is then proved on a changed first state.

    The model is not touched: parameters are shared with a private copy, buffers, hooks and random state are not.
    Hooks of the user are part of the computation and fire on the copy. Changes of the parameters in place, of their
    memory and of `requires_grad` are seen, those in place through `parameter.data` are not; the first run after one
    records the batch once more, a forward. Where the model or a part of it is compiled, the stream runs what it was
    compiled from.

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
    """Streams of many batches; blocks are found and proved on the first, of later ones the output is checked.

    Using streams by turns is right and slow: the model keeps what it keeps (an attribute of a block) for one batch, so
    going to another one records it anew, a forward.

    Args:
        model: Any module, in eval mode.
        inputs: Batches as `cut` takes them.
        blocks: As in `cut`.

    Yields:
        One stream per batch.

    Raises:
        ValueError: As `cut`.
    """
    model = uncompiled(model)
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"cut() needs model.eval(): {name or type(model).__name__} is in training mode, so dropout and "
                "batch norm would mix examples and statistics would be updated while probing"
            )
        if of_the_batch(module):
            raise ValueError(
                f"cut: {name or 'the model'} is a {type(module).__name__} without running statistics, which mixes the "
                "examples of a batch in eval mode, too; measures per example need track_running_stats=True"
            )
    twin = None
    for x in inputs:
        with torch.inference_mode(False), torch.random.fork_rng(devices=cuda_devices(model)):
            x = tree_map(_normal, dict(x) if isinstance(x, Mapping) else x)
            _check_input(x)
            stream = _own(model, x, blocks, prove=twin is None)
            if stream is not None:
                twin = model
            elif twin is None:
                twin, stream = _found(model, x, blocks)
            else:
                stream = _recorded(twin, x, changed=False, differs=_answers_otherwise)
        yield stream


def _found(model: nn.Module, x: Any, blocks: Sequence[str] | None) -> tuple[Twin, Stream]:
    """The twin and its first stream, proved; the states of the proof are let go."""
    copied, observed, output = find(model, x, blocks)
    twin = Twin(copied, {id(call.module): call.name for call in observed})

    def differs(recording: Recording, stream: Stream) -> str:
        return _difference(stream, observed, output_of(output))

    return twin, _recorded(twin, x, changed=True, differs=differs)


def _own(model: nn.Module, x: Any, blocks: Sequence[str] | None, *, prove: bool) -> Stream | None:
    """The stream that the model's class makes itself; None if it makes none."""
    make = getattr(type(model), "cut", None)
    if not isinstance(x, Tensor) or not inspect.isfunction(make):
        return None
    form = inspect.signature(make)
    if len(form.parameters) != 2 or form.return_annotation not in (Stream, "Stream"):
        return None  # `cut` can mean anything
    stream = make(model, x)
    if blocks is not None:
        raise ValueError(f"cut: {type(model).__name__} says itself what its blocks are; leave blocks out")
    names = [section.name for section in stream.sections]
    if len(set(names)) < len(names):
        raise ValueError(f"cut: {type(model).__name__}.cut names its sections {names}; give each a name of its own")
    if prove and type(model).forward is not nn.Module.forward:
        with torch.no_grad():
            if not _close(stream.run(keep=False).output, output_of(model(x))):
                raise ValueError(f"cut: the stream that {type(model).__name__}.cut makes is not what its forward does")
            for step in stream.walk():
                block = stream.sections[step.section].blocks[step.index]
                if step.own_branch and not _close(step.after, block(step.before)):
                    raise ValueError(f'cut: block "{block.name}" is not h + its branch(h); make it without a branch')
    return stream


def _stream(twin: Twin, recording: Recording, x: Any) -> Stream:
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
    if not runs:
        raise ValueError("cut: which blocks run depends on the state, so the model is not one path of states")
    for run in runs:
        _check_batch(state_of(calls[run[0]].output).shape, x)
    names = _section_names([[calls[p].name for p in run] for run in runs])
    sections = []
    for s, run in enumerate(runs):
        after = runs[s - 1][-1] if s else -1
        passed = tuple(call.name for call in calls[after + 1 : run[0]])
        blocks = tuple(Block(calls[p].name, _block(recording, x, p)) for p in run)
        entry = _entry(twin, recording, x, after, run[0])
        sections.append(Section(names[s], entry, blocks, passed))
    return Stream(x, tuple(sections), _readout(twin, recording, x, runs[-1][-1]), _mask(twin.model, x))


def _block(recording: Recording, x: Any, p: int) -> Callable[[Tensor], Tensor]:
    call = recording.calls[p]
    alone = all(value is None or isinstance(value, bool | str) for value in (*call.args, *call.kwargs.values()))

    def block(h: Tensor) -> Tensor:
        recording.renew(x, arguments=not alone)
        return recording.calls[p](h)

    return block


def _entry(twin: Twin, recording: Recording, x: Any, after: int, until: int) -> Callable[[Any], Tensor]:
    def entry(h: Any) -> Tensor:
        recording.renew(x)
        try:
            twin.run(Replay(twin, recording, after, h, until), h if after < 0 else x)
        except Reached as reached:
            return reached.state
        raise RuntimeError(f"the model did not reach block {recording.calls[until].name} again")

    return entry


def _readout(twin: Twin, recording: Recording, x: Any, last: int) -> Callable[[Tensor], Tensor]:
    def readout(h: Tensor) -> Tensor:
        recording.renew(x)
        return output_of(twin.run(Replay(twin, recording, last, h, None), x))

    return readout


def _recorded(twin: Twin, x: Any, *, changed: bool, differs: Callable[[Recording, Stream], str]) -> Stream:
    """A stream of a batch, recorded from a changed first state or the true one, and found to be the model."""
    while True:
        recording = record(twin, x, changed=changed)
        stream = _stream(twin, recording, x)
        versions = {key: _versions(kept.output) for key, kept in recording.finished.items()}
        try:
            problem = differs(recording, stream)
        except Exception as error:  # of the model's own code, run where it does not expect it
            if not changed:
                raise
            problem = f"a part fails ({type(error).__name__}: {error})"
        moved = {key for key, kept in recording.finished.items() if _versions(kept.output) != versions[key]}
        if not moved:
            break
        twin.unkept |= moved  # code between the modules changes these outputs in place: run them again in replays
    if problem:
        _refuse(stream, f"after a changed first state {problem}" if changed else f"on a later batch {problem}")
    recording.end = recording.output = None
    return stream


def _answers_otherwise(recording: Recording, stream: Stream) -> str:
    """Whether the readout of the last state, as it was recorded, is what the model gave on that batch."""
    with torch.no_grad():
        return "" if _close(stream.readout(recording.end), recording.output) else "the output differs"


def _difference(stream: Stream, observed: list[Seen], output: Tensor) -> str:
    """The first part of the stream, from the end, that gives something else than it gave in the model; "" if none.

    Backwards, so that whatever a block leaves behind for later ones (on itself, in a list) is still that of the changed
    state when the later ones run.
    """
    calls = [call for call in observed if call.keeps]
    if [call.name for call in calls] != [block.name for section in stream.sections for block in section.blocks]:
        return "the sequence of blocks differs"
    with torch.no_grad():
        if not _close(stream.readout(calls[-1].after), output):
            return "the output differs"
        for section in reversed(stream.sections):
            for block in reversed(section.blocks):
                call = calls.pop()
                if not _close(block(call.before), call.after):
                    return f'the state after block "{block.name}" differs'
            if not _close(section.entry(calls[-1].after if calls else stream.input), call.before):
                return f'the first state of section "{section.name}" differs'
    return ""


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    if torch.equal(ours, theirs):  # the rule on processors, and fast
        return True
    tolerance = _TOLERANCE.get(theirs.dtype, 1e-5)
    _, place, count = theirs.unique(return_inverse=True, return_counts=True)
    varied = (ours != theirs) | (count[place] == 1 if len(theirs) > 1 else False)
    sizes = theirs[varied].abs().nan_to_num(0, 0, 0).float()  # what repeats itself, as a mask's -1e9, is no scale
    half = theirs.dtype in (torch.float16, torch.bfloat16) and theirs.device.type == "cpu"
    scale = float(sizes.mean() if half else sizes.max())  # at 2 digits one large entry would let much pass
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _refuse(stream: Stream, problem: str) -> None:
    hint = ""
    if len(stream.sections) > 1 and all(n == 1 for n in stream.lengths):
        hint = (
            " No block gets just what the previous one gave: do the modules return only their branch, or are there two "
            "towers?"
        )
    raise ValueError(
        f"cut: the stream is not the model: {problem}. Something besides the state goes from earlier blocks to later "
        f"ones, or the model is random in eval mode.{hint} Blocks tried: "
        f'"{stream.sections[0].blocks[0].name}" .. "{stream.sections[-1].blocks[-1].name}"; name others: {NAMING}'
    )


def _section_names(sections: list[list[str]]) -> list[str]:
    """What the names of each section's blocks have in common; numbered where that is not unique."""
    found = []
    for names in sections:
        parts = [name.split(".") for name in names]
        common = [a for a, *rest in zip(*parts, strict=False) if all(b == a for b in rest)]
        found.append(".".join(common if len(set(names)) > 1 else parts[0][:-1]))
    return [
        name if name and found.count(name) == 1 else f"{name} section {s + 1}".strip() for s, name in enumerate(found)
    ]


def _mask(model: nn.Module, x: Any) -> Tensor | None:
    """The attention mask among the inputs, given by name or by position.

    Raises:
        ValueError: If a decoder has inputs of its own: which mask is that of the blocks' states is not known.
    """
    if isinstance(x, tuple | list):
        x = dict(zip(inspect.signature(model.forward).parameters, x, strict=False))
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    own = [name for name in ("decoder_input_ids", "decoder_attention_mask") if x.get(name) is not None]
    if own and not bool(mask.all()):
        raise ValueError(
            f"cut: beside attention_mask there is {own[0]}: whether the blocks' states are the encoder's or the "
            "decoder's tokens is not known; give examples without padding, or cut encoder and decoder on their own"
        )
    if mask.is_floating_point() and not bool((mask > 0).any()):  # added to scores: 0 where tokens count
        return mask >= 0
    return mask.bool()


def _check_input(x: Any) -> None:
    empty = next((v for v in tree_flatten(x)[0] if isinstance(v, Tensor) and not v.numel()), None)
    if empty is not None:
        raise ValueError(f"cut: the batch has no examples; its input has shape {tuple(empty.shape)}")


def _check_batch(state: torch.Size, x: Any) -> None:
    """Measures are per example, so states must have the examples along dimension 0."""
    first = counting(x)
    if first is not None and (len(state) < 2 or state[0] != first.shape[0]):
        raise ValueError(
            f"cut: the batch has {first.shape[0]} examples along dimension 0, but the states have shape "
            f"{tuple(state)}; measures need the examples along dimension 0 of the state"
        )


def _versions(values: Any) -> list[int]:
    return [v._version for v in tree_flatten(values)[0] if isinstance(v, Tensor)]


def _normal(value: Any) -> Any:
    """A tensor made under inference mode as one whose changes and gradients can be followed."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
