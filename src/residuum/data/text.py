"""Text for language models: a file as windows of tokens, each with the tokens that come next."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from residuum.answers import IGNORED
from residuum.data.subsets import random_subset
from residuum.names import missing, one_line

BYTES = 256  # tokens without a tokenizer


@dataclass(frozen=True)
class TextSet:
    """One split of a text, as windows of equal length.

    Attributes:
        name: Name of the file.
        split: "train" or "test".
        inputs: Tokens; padding is 0.
        targets: The token that comes next; -100 at padding, which does not count.
        mask: 1 where there is a token, 0 at padding.
        classes: Number of different tokens.
        sha256: Checksum of the file.
    """

    name: str
    split: str
    inputs: Int64[Tensor, "window token"]
    targets: Int64[Tensor, "window token"]
    mask: Int64[Tensor, "window token"]
    classes: int
    sha256: str

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, count: int | None, *, seed: int) -> "TextSet":
        """At most `count` windows drawn without replacement, in their old order; None is all of them.

        Raises:
            ValueError: If `count` is below 1.
        """
        if count is None:
            return self
        chosen = random_subset(len(self), count, seed=seed)
        return replace(self, inputs=self.inputs[chosen], targets=self.targets[chosen], mask=self.mask[chosen])


class TextSplits(NamedTuple):
    """Both splits of a text."""

    train: TextSet
    test: TextSet


def load_text(path: Path, *, window: int = 128, tokenizer: Any = None) -> TextSplits:
    """A text file as training and test windows; the last tenth of the text is the test split.

    Window k of a split has the tokens k window ... (k+1) window - 1 as inputs and each token's successor as target;
    windows do not overlap. The last one is padded.

    Args:
        path: The file.
        window: Tokens in each window.
        tokenizer: A tokenizer of transformers, which reads the file as UTF-8; None takes bytes as tokens.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, a split has fewer tokens than one window and the token that comes next, or the
            text is not UTF-8, makes no tokens or has some that the tokenizer does not know, and one is given.
    """
    path = Path(path)
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 token")
    if not path.is_file():
        raise missing(path, ".txt", "a text file")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty")
    text = content if tokenizer is None else _decoded(path, content)
    cut = len(text) * 9 // 10
    classes = BYTES if tokenizer is None else len(tokenizer)
    checksum = sha256(content).hexdigest()
    sets = []
    for split, part in zip(TextSplits._fields, (text[:cut], text[cut:]), strict=True):
        tokens = part if tokenizer is None else _encoded(path, part, tokenizer)
        if part and not tokens:
            raise ValueError(
                f"{path}: the model's tokenizer ({type(tokenizer).__name__}) makes no token of the {split} split; "
                "is its own beside its weights (tokenizer.json)?"
            )
        if len(tokens) <= window:
            raise ValueError(
                f"{path}: the {split} split has {len(tokens)} tokens, a window of {window} needs {window + 1}; "
                f"give a smaller window or a longer text (the test split is its last tenth)"
            )
        sets.append(TextSet(path.name, split, *_windows(tokens, window), classes, checksum))
    return TextSplits(*sets)


def text_batches(
    data: TextSet, *, batch: int, device: str = "cpu"
) -> Iterator[tuple[dict[str, Any], Int64[Tensor, "example token"]]]:
    """The windows in order as inputs of a decoder of transformers, with their targets.

    Args:
        data: The windows.
        batch: Windows in each batch; the last may have fewer.
        device: Where the batches go.

    Yields:
        ({"input_ids", "attention_mask", "use_cache": False}, targets).

    Raises:
        ValueError: If `batch` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    for inputs, mask, targets in zip(*(t.split(batch) for t in (data.inputs, data.mask, data.targets)), strict=True):
        x = {"input_ids": inputs.to(device), "attention_mask": mask.to(device), "use_cache": False}
        yield x, targets.to(device)


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {content[error.start]:#04x} at {error.start}), which the tokenizer reads; "
            "convert it, e.g. with iconv"
        ) from error


def _encoded(path: Path, text: str, tokenizer: Any) -> Sequence[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)
    except Exception as error:  # tokenizers has no class of its own for what it raises
        raise ValueError(
            f"{path}: the model's tokenizer ({type(tokenizer).__name__}) cannot read the text: {one_line(error)}; "
            "give one in the characters and words that the model knows"
        ) from error


def _windows(tokens: bytes | Sequence[int], window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and mask [window, token] of a row of tokens."""
    row = torch.tensor(list(tokens))
    missing = -(len(row) - 1) % window
    inputs, targets, mask = row[:-1], row[1:], torch.ones(len(row) - 1, dtype=torch.int64)
    padded = (
        torch.cat([part, part.new_full((missing,), fill)])
        for part, fill in ((inputs, 0), (targets, IGNORED), (mask, 0))
    )
    return tuple(part.view(-1, window) for part in padded)
