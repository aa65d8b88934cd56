"""Fitting: whether a network can be measured at all, and how it and the data go together."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from residuum.calls import call_model, output_of
from residuum.cutting import cut
from residuum.data import ImageSet, TextSet, text_batches
from residuum.loading import LoadedModel
from residuum.names import one_line
from residuum.probes import misfit
from residuum.streams import Stream


def check(loaded: LoadedModel, data: ImageSet | TextSet) -> None:
    """Refuse a network that cannot be measured, or that does not read such data.

    Raises:
        ValueError: If it is scripted, has complex numbers or weights without values; if it reads text and the data are
            images, the other way round, or there are tokens that it does not know.
    """
    model = loaded.model
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(f"{loaded.name} is scripted or traced; give the network as it was before that")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ValueError(f"{loaded.name} has no values in {name} (device meta); load its weights first")
        if value.is_complex():
            raise ValueError(f"{loaded.name} has complex numbers in {name}; only networks of real numbers are measured")
    reads_text = getattr(loaded.model, "main_input_name", "") == "input_ids"
    if reads_text and not isinstance(data, TextSet):
        raise ValueError(f"{loaded.name} reads text, not images; give --data FILE.txt")
    if isinstance(data, TextSet):
        if not reads_text:
            raise ValueError(f"{loaded.name} reads images, not text; give --data digits or FILE.npz")
        known = loaded.model.get_input_embeddings().num_embeddings
        if data.classes > known:
            raise ValueError(f"{data.name} has {data.classes} different tokens, {loaded.name} knows {known}")


def channels_of(model: nn.Module, images: Tensor, size: tuple[int, int] | None) -> int | None:
    """Channels that the first convolution reads; None if there is none.

    The first is the first that runs on such images; where none is reached, the first in the order of the modules.

    Args:
        model: The network.
        images: One image of the data, with its own channels.
        size: Rows and columns that the network reads; None are those of the image.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        return None
    found: list[int] = []

    def stop(conv: nn.Conv2d, _: Any) -> None:
        found.append(conv.in_channels)
        raise StopIteration  # nothing after it is asked for

    hooks = [module.register_forward_pre_hook(stop) for module in convolutions]
    like = next(model.parameters(), torch.zeros(()))
    with torch.no_grad(), suppress(Exception):  # such images need not fit
        model(like.new_zeros(1, images.shape[1], *(size or images.shape[2:])))
    for hook in hooks:
        hook.remove()
    return found[0] if found else convolutions[0].in_channels


def run_once(
    loaded: LoadedModel, given: Iterator[tuple[Tensor, Tensor]], blocks: Sequence[str]
) -> tuple[Stream, Tensor]:
    """The stream and the output of a few examples, so that what does not fit is refused before the work.

    Args:
        loaded: The network.
        given: Batches, of which the first is used.
        blocks: Names of the block modules; empty searches.

    Raises:
        ValueError: If the network does not run on such examples, or cannot be cut.
    """
    x, _ = next(given)
    try:
        with torch.no_grad():
            call_model(loaded.model, x)
    except Exception as error:  # whatever a network, perhaps of the user's file, says to a wrong shape
        raise ValueError(f"{loaded.name} does not run on examples of {_shape(x)}: {_said(error, x)}") from error
    with torch.no_grad():
        stream = cut(loaded.model, x, blocks or None)
        return stream, stream.run(keep=False).output


def _looks_ahead(model: nn.Module, data: TextSet) -> bool:
    """Whether what a network says at the first token changes with later ones, as that of a masked language model."""
    device = str(next(model.parameters()).device)
    few = data.take(2, seed=0)
    others = few.inputs.clone()
    others[:, 1:] = (others[:, 1:] + 1) % data.classes
    with torch.no_grad():
        said, changed = (
            output_of(call_model(model, x))[:, 0]
            for inputs in (few.inputs, others)
            for x, _ in text_batches(replace(few, inputs=inputs), batch=2, device=device)
        )
    both = torch.stack((said, changed)).nan_to_num(0, 0, 0)
    varies = (both != both[0, 0]).flatten(0, 1).any(0)  # a constant, as that of masked tokens, says nothing of size
    size = float((both.abs() * varies).max())
    rounding = max(1e-5, 2 * torch.finfo(said.dtype).eps)  # experts of other tokens can be other kernels
    return not torch.allclose(said, changed, rtol=0, atol=rounding * size, equal_nan=True)


def _shape(x: Any) -> str:
    return f"shape {list((x['input_ids'] if isinstance(x, dict) else x).shape[1:])}"


def _said(error: Exception, x: Any) -> str:
    """What a network said, and an option that could help."""
    text = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(x, dict):
        return f"{text}; try another --window"
    return text if "channel" in text else f"{text}; try another --size"


def labels_of(loaded: LoadedModel, data: ImageSet | TextSet, output: Tensor) -> tuple[bool, str]:
    """Whether the labels are those of the network's outputs, and a line about it.

    Args:
        loaded: The network.
        data: The examples.
        output: Its output of the first of them.
    """
    skipped = "measures with labels are skipped"
    if isinstance(data, TextSet):
        reason = misfit(output, data.targets[: len(output)])
        if not reason and _looks_ahead(loaded.model, data):
            reason = (
                f"{loaded.name} reads the tokens that come after each, so its outputs are no guesses of the next one"
            )
        return not reason, f"{reason}: {skipped}" if reason else ""
    if output.ndim != 2 or output.shape[1] != len(data.classes):
        return (
            False,
            f"{loaded.name} has outputs {list(output.shape[1:])}, {data.name} {len(data.classes)} classes: {skipped}",
        )
    if loaded.classes is not None and loaded.classes != data.classes:
        return False, f"the classes of {loaded.name} are not those of {data.name}: {skipped}"
    reason = misfit(output, data.labels[: len(output)])
    if reason:
        return False, f"{reason}: {skipped}"
    if loaded.classes is None and not loaded.fresh:
        return True, "the network does not name its classes; they are taken to be in the order of the data's"
    return True, ""
