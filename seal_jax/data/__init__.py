"""Data sets: TFDS builders and sources, host arrays, augmentation."""

from seal_jax.data.augment import Augmentation as Augmentation
from seal_jax.data.augment import AugmentationParams as AugmentationParams
from seal_jax.data.augment import apply as apply
from seal_jax.data.augment import check_image_shape as check_image_shape
from seal_jax.data.augment import draw as draw
from seal_jax.data.catalogue import STATISTICS as STATISTICS
from seal_jax.data.catalogue import Statistics as Statistics
from seal_jax.data.catalogue import find_info as find_info
from seal_jax.data.catalogue import name_of as name_of
from seal_jax.data.catalogue import normalisation as normalisation
from seal_jax.data.catalogue import statistics as statistics
from seal_jax.data.dataset import Dataset as Dataset
from seal_jax.data.dataset import Draws as Draws
from seal_jax.data.dataset import Split as Split
from seal_jax.data.dataset import from_arrays as from_arrays
from seal_jax.data.dataset import stratified_split as stratified_split
from seal_jax.data.preparation import prepare as prepare
from seal_jax.data.sources import available_memory as available_memory
from seal_jax.data.sources import load as load
from seal_jax.data.sources import load_labelled as load_labelled
from seal_jax.data.streaming import StoredImages as StoredImages
from seal_jax.data.streaming import batches as batches
from seal_jax.data.studies import class_counts as class_counts
from seal_jax.data.studies import study as study
