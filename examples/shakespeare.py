"""A decoder of 12 layers learns Shakespeare character by character; then it is measured with every probe.

python examples/shakespeare.py TEXT OUT [--steps 800] [--width 128] [--measured 24]

TEXT is any text file; tiny Shakespeare is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn. The training
is a plain torch loop over a Llama of transformers, as one would write it without residuum; stopped by Ctrl-C or a
crash, the same command goes on. It saves OUT/decoder as transformers does, and `residuum probe hf:OUT/decoder`
measures that folder into OUT/probe, beside the same network at initialisation. One thread: OMP_NUM_THREADS=1.
"""

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residuum.checkpoints import Progress, resume_, save
from residuum.cli import main as residuum
from residuum.data import TextSet, TextSplits, load_text, text_batches
from residuum.files import new_folder
from residuum.progress import bar
from residuum.vision import import_torchvision

if find_spec("torchvision"):  # transformers imports it, which beside a CPU torch needs help
    import_torchvision()

WINDOW, BATCH, WARM_UP, RATE, EVERY = 128, 16, 100, 2e-3, 100


def characters_of(text: str) -> Any:
    """A tokenizer of transformers with one token for each character of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({character: k for k, character in enumerate(sorted(set(text)))}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def decoder(*, tokens: int, width: int) -> nn.Module:
    """A Llama with random weights: 12 layers, 4 heads, about 200,000 parameters in each layer at width 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, x: dict, y: Tensor) -> Tensor:
    """Cross-entropy of the character that comes next, in nats."""
    return F.cross_entropy(model(**x).logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def test_loss(model: nn.Module, test: TextSet) -> float:
    """Mean loss per character over a fixed draw of test windows."""
    model.eval()
    losses = [loss_of(model, x, y).item() for x, y in text_batches(test.take(128, seed=0), batch=32)]
    model.train()
    return sum(losses) / len(losses)


def train(model: nn.Module, data: TextSplits, *, steps: int, checkpoint: Path) -> list[dict]:
    """AdamW with warm-up and cosine; every step draws its windows with a seed of its own, so that it can go on."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    about = {"steps": steps, "width": model.config.hidden_size, "data": data.train.sha256}
    at = resume_(checkpoint, model, optimiser, about) if checkpoint.exists() else Progress()
    history = list(at.history)
    model.train()
    with bar("training", steps * BATCH) as show:
        for step in range(at.step, steps):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            windows = data.train.take(BATCH, seed=step)
            x, y = next(text_batches(windows, batch=BATCH))
            optimiser.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                history.append({"step": step + 1, "loss": loss.item(), "test_loss": test_loss(model, data.test)})
                save(checkpoint, model, optimiser, Progress(step=step + 1, history=tuple(history)), about)
            show((step + 1) * BATCH, f"step {step + 1}/{steps}, loss {loss.item():.2f}")
    return history


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--measured", type=int, default=24, help="test windows of 128 characters that are measured")
    flags = parser.parse_args()
    saved, probed, checkpoint = flags.out / "decoder", flags.out / "probe", flags.out / "decoder.checkpoint"
    if not saved.exists():
        flags.out.mkdir(parents=True, exist_ok=True)
        tokenizer = characters_of(flags.text.read_bytes().decode("utf-8"))  # with its line ends as they are
        data = load_text(flags.text, window=WINDOW, tokenizer=tokenizer)
        torch.manual_seed(0)
        model = decoder(tokens=len(tokenizer), width=flags.width)
        history = train(model, data, steps=flags.steps, checkpoint=checkpoint)
        with new_folder(saved) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "history.json").write_text(json.dumps(history))
        checkpoint.unlink(missing_ok=True)
        print(f"test loss {history[-1]['test_loss']:.3f} nats per character")
    if not probed.exists():
        measuring = ["--window", WINDOW, "--limit", flags.measured, "--batch", 12, "--probes", "all"]
        arguments = ["probe", f"hf:{saved}", "--data", flags.text, "--out", probed, *measuring]
        if residuum([str(argument) for argument in arguments]):
            raise SystemExit(2)


if __name__ == "__main__":
    main()
