"""Files for tests: a small npz file, from which arrays can be exchanged or left out; a tiny Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_npz(path: Path, **changes: object) -> Path:
    """A valid data file of 12 + 6 colour images in 3 classes, with some arrays exchanged; None leaves one out."""
    draw = np.random.default_rng(0)
    arrays: dict[str, object] = {
        "train_images": draw.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": draw.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8),
        "test_labels": np.arange(6) % 3,
        "classes": np.array(["cat", "dog", "owl"]),
    } | changes
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def hf_folder(folder: Path, *, processor: dict[str, Any] | None) -> Path:
    """A tiny image classifier of transformers in a folder."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=3,
        id2label={0: "cat", 1: "dog", 2: "owl"},
        label2id={"cat": 0, "dog": 1, "owl": 2},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
