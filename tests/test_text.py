"""Text: windows of a file and back, targets shifted by one, padding masked, bytes or a tokenizer."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from residuum.data import TextSet, load_text, text_batches
from residuum.probes.readout import readouts
from residuum.profiles import profile


def tokens_of(data: TextSet) -> list[int]:
    """The tokens of a split, put together again."""
    return [int(data.inputs[0, 0]), *data.targets[data.mask.bool()].tolist()]


def words() -> Any:
    """A tokenizer of four words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"?": 0, "to": 1, "be": 2, "or": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", model_max_length=4)


@given(content=st.binary(min_size=30, max_size=200), window=st.integers(1, 2))
def test_bytes_come_back(content: bytes, window: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(content)
    splits = load_text(path, window=window)
    cut = len(content) * 9 // 10
    for data, part in zip(splits, (content[:cut], content[cut:]), strict=True):
        assert bytes(tokens_of(data)) == part
        assert data.inputs.shape == data.targets.shape == data.mask.shape
        assert data.inputs.shape[1] == window
        assert data.inputs.dtype == data.targets.dtype == torch.int64
        assert torch.equal(data.targets == -100, data.mask == 0)
        assert torch.equal(
            data.inputs.flatten()[1:][data.mask.flatten()[1:] == 1], data.targets.flatten()[: data.mask.sum() - 1]
        )
        assert data.mask[:-1].all()
        assert data.mask[-1, 0] == 1, "no window is all padding"
    assert splits.train.classes == 256


def test_a_tokenizer_gives_its_own_tokens(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("to be or not " * 30, encoding="utf-8")
    train, test = load_text(path, window=5, tokenizer=words())
    assert tokens_of(train)[:5] == [1, 2, 3, 0, 1]
    assert len(tokens_of(train)) + len(tokens_of(test)) == 120
    assert train.classes == 4


def test_characters_that_a_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "shakespeare.py"))
    path = tmp_path / "x.txt"
    path.write_bytes(b"to be or not\r\n" * 30)
    with pytest.raises(ValueError, match=r"x\.txt: the model's tokenizer \(\w+\) cannot read the text: .*UNK"):
        load_text(path, window=5, tokenizer=example["characters_of"]("to be or not"))


def test_draws_are_windows(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(bytes(range(256)) * 4)
    train = load_text(path, window=10).train
    few = train.take(5, seed=1)
    assert len(few) == 5
    assert few.inputs.tolist() == [row for row in train.inputs.tolist() if row in few.inputs.tolist()]
    assert torch.equal(few.inputs + 1, torch.where(few.targets == 0, 256, few.targets))
    assert train.take(None, seed=1) is train
    with pytest.raises(ValueError, match="limit is 0"):
        train.take(0, seed=1)


def test_batches_are_what_a_decoder_reads(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path / "x.txt"
    path.write_text("All the world's a stage, and all the men and women merely players. " * 4)
    test = load_text(path, window=8).test
    given = list(text_batches(test, batch=2))
    assert torch.equal(torch.cat([x["input_ids"] for x, _ in given]), test.inputs)
    assert torch.equal(torch.cat([x["attention_mask"] for x, _ in given]), test.mask)
    assert torch.equal(torch.cat([y for _, y in given]), test.targets)
    assert all(x["use_cache"] is False for x, _ in given)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    losses = profile(model, given, [readouts]).mean("loss")
    with torch.no_grad():
        logits = model(test.inputs, attention_mask=test.mask).logits
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), test.targets, reduction="none")
    expected = (each.sum(1) / test.mask.sum(1)).mean()
    assert losses[-1] == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(ValueError, match="batch is 0"):
        next(text_batches(test, batch=0))


class Silent:
    """What transformers gives for a folder without a tokenizer."""

    def __len__(self) -> int:
        return 2

    def encode(self, text: str, **options: bool) -> list[int]:
        return []


def test_files_that_do_not_do(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"play\.txt is empty"):
        load_text(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="the train split has 90 tokens, a window of 128 needs 129; give a smaller"):
        load_text(path)
    with pytest.raises(ValueError, match="the test split has 10 tokens, a window of 10 needs 11"):
        load_text(path, window=10)
    path.write_bytes(b"x" * 50 + b"\xff" + b"x" * 50)
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 0xff at 50\), which the tokenizer reads; convert it"):
        load_text(path, window=2, tokenizer=words())
    assert load_text(path, window=2).train.inputs.max() == 255
    path.write_text("x" * 100)
    with pytest.raises(ValueError, match=r"tokenizer \(Silent\) makes no token of the train split; is its own beside"):
        load_text(path, window=2, tokenizer=Silent())
    with pytest.raises(ValueError, match="window is 0"):
        load_text(path, window=0)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*plya\.txt; did you mean 'play\.txt'\?"):
        load_text(tmp_path / "plya.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_text(tmp_path)
