"""Data sets: TFDS builders and sources, host arrays, device-resident batches and augmentation."""

from seal_jax.data.augment import Augmentation, AugmentationParams, apply, check_image_shape, draw
from seal_jax.data.catalogue import STATISTICS, find_info, statistics
from seal_jax.data.dataset import Dataset, Split, from_arrays, stratified_split
from seal_jax.data.device import epoch_order, flatten, padded_batches, steps_per_epoch, take
from seal_jax.data.preparation import prepare
from seal_jax.data.sources import load, load_labelled

__all__ = [
    "STATISTICS",
    "Augmentation",
    "AugmentationParams",
    "Dataset",
    "Split",
    "apply",
    "check_image_shape",
    "draw",
    "epoch_order",
    "find_info",
    "flatten",
    "from_arrays",
    "load",
    "load_labelled",
    "padded_batches",
    "prepare",
    "statistics",
    "steps_per_epoch",
    "stratified_split",
    "take",
]
