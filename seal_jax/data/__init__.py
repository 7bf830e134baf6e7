"""Data sets: TFDS builders and sources, host arrays, augmentation."""

from seal_jax.data.augment import Augmentation, AugmentationParams, apply, check_image_shape, draw
from seal_jax.data.catalogue import STATISTICS, find_info, normalisation, statistics
from seal_jax.data.dataset import Dataset, Split, from_arrays, stratified_split
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
    "find_info",
    "from_arrays",
    "load",
    "load_labelled",
    "normalisation",
    "prepare",
    "statistics",
    "stratified_split",
]
