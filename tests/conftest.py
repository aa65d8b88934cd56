"""Shared by all tests: one thread, no downloads, random tiny models of every family."""

import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn

import typed
from residuum.models import ResNet, ResNetConfig
from residuum.vision import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()  # before anything else imports it: beside a CPU torch its own import fails

torch.set_num_threads(1)
# In the background of a shell Ctrl-C is ignored, and so it would be by the processes that tests start and stop by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _begin() -> None:
    torch.manual_seed(0)
    typed.begin()


class Loop(nn.Module):
    """A block that a loop applies several times, with its own embedding and readout."""

    class Cell(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.outer(torch.tanh(self.inner(h)))

    def __init__(self, *, times: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(5, width), self.Cell(width), nn.Linear(width, 3)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(self.times):
            h = self.cell(h)
        return self.head(h)


@dataclass(frozen=True)
class Example:
    """A tiny model: how to build it with its input, and the blocks per section that cutting must find."""

    build: Callable[[], tuple[nn.Module, Any]]
    lengths: tuple[int, ...]


def _image(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def _tokens(**more: Any) -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 90, (2, 7)), "attention_mask": mask, **more}


_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(**options)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def _hf(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64)


_GPT2 = {
    "vocab_size": 99,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA = {**_TEXT, "num_key_value_heads": 2}
_HFVIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}

MODELS: dict[str, Example] = {
    "own": Example(lambda: (ResNet(ResNetConfig(blocks=(3, 2), widths=(4, 8))), _image(12)), (3, 2)),
    "own projection": Example(
        lambda: (ResNet(ResNetConfig(blocks=(3, 2), widths=(4, 8), transition="projection")), _image(12)), (3, 1)
    ),
    "loop": Example(lambda: (Loop(), torch.randn(2, 5)), (4,)),
    "torchvision resnet18": Example(lambda: (_torchvision("resnet18"), _image(32)), (2, 1, 1, 1)),
    "torchvision resnet50": Example(lambda: (_torchvision("resnet50"), _image(32)), (2, 3, 5, 2)),
    "torchvision vit": Example(lambda: (_vit(), _image(32)), (4,)),
    "timm resnet": Example(lambda: (_timm("resnet26"), _image(32)), (1, 1, 1, 1)),
    "timm vit": Example(lambda: (_timm("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48), _image(32)), (3,)),
    "timm swin": Example(
        lambda: (_timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, num_heads=(1, 1, 2, 2)), _image(56)),
        (2, 2, 6, 2),
    ),
    "gpt2": Example(lambda: (_hf("GPT2LMHeadModel", "GPT2Config", **_GPT2), _tokens(use_cache=False)), (3,)),
    "llama": Example(lambda: (_hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA), _tokens(use_cache=False)), (3,)),
    "qwen3": Example(
        lambda: (_hf("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=16), _tokens(use_cache=False)), (3,)
    ),
    "bert": Example(lambda: (_hf("BertForSequenceClassification", "BertConfig", **_TEXT), _tokens()), (3,)),
    "albert": Example(lambda: (_hf("AlbertModel", "AlbertConfig", **_TEXT, embedding_size=16), _tokens()), (3,)),
    "hf vit": Example(
        lambda: (
            _hf("ViTForImageClassification", "ViTConfig", **_HFVIT, image_size=32, patch_size=8),
            {"pixel_values": _image(32)},
        ),
        (3,),
    ),
}


def converted(x: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating-point tensors in another type."""
    if isinstance(x, dict):
        return {k: converted(v, dtype) for k, v in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.fixture(params=MODELS, scope="module")
def example(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, tuple[int, ...]]:
    """Every family in turn, in float64 and eval mode, with its input and the blocks that must be found."""
    torch.manual_seed(0)
    made = MODELS[request.param]
    model, x = made.build()
    return model.double().eval(), converted(x, torch.float64), made.lengths
