"""Data sets: real examples as tensors, checked when they are read."""

from residuum.data.augmentation import TrainingImages
from residuum.data.digitclutter import Clutter, ClutterConfig, digitclutter, write_digitclutter
from residuum.data.images import ImageSet, Preparation, Splits, batches, load, load_splits
from residuum.data.subsets import balanced_subset, shuffled_labels
from residuum.data.text import TextSet, TextSplits, load_text, text_batches

__all__ = [
    "Clutter",
    "ClutterConfig",
    "ImageSet",
    "Preparation",
    "Splits",
    "TextSet",
    "TextSplits",
    "TrainingImages",
    "balanced_subset",
    "batches",
    "digitclutter",
    "load",
    "load_splits",
    "load_text",
    "shuffled_labels",
    "text_batches",
    "write_digitclutter",
]
