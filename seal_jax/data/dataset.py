"""What a loaded data set is: three splits of uint8 images with integer labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from seal_jax.errors import UsageError, check_integer, check_labels


@dataclass(frozen=True)
class Split:
    """Images and labels; other shapes or dtypes are a ``UsageError``.

    The images are an array, or :class:`seal_jax.data.StoredImages` that are decoded when indexed.
    """

    images: Any  # uint8 [n, height, width, channels]
    labels: np.ndarray  # int32 [n]
    clean_labels: np.ndarray | None = None  # int32 [n], the images' own where some were replaced

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UsageError(
                f"images have shape {self.images.shape} and dtype {self.images.dtype}: "
                "give uint8 of shape [n, height, width, channels]"
            )
        if self.labels.dtype != np.int32 or self.labels.ndim != 1:
            raise UsageError(
                f"labels have shape {self.labels.shape} and dtype {self.labels.dtype}: "
                "give int32 of shape [n]"
            )
        if len(self.images) != len(self.labels):
            raise UsageError(
                f"there are {len(self.images)} images but {len(self.labels)} labels: "
                "give one label an image"
            )
        if self.clean_labels is not None:
            check_labels("clean_labels", self.clean_labels, len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: np.ndarray | slice) -> "Split":
        """Return the split of these rows, in their order."""
        images = self.images.take(rows) if self.streamed else self.images[rows]
        clean = None if self.clean_labels is None else self.clean_labels[rows]
        return Split(images, self.labels[rows], clean)

    @property
    def streamed(self) -> bool:
        """Whether the images are not in memory, but decoded when they are indexed."""
        return not isinstance(self.images, np.ndarray)


class Draws(NamedTuple):
    """Several draws of one training split, each int32 ``[draws, n]``: other images, or under other labels."""

    labels: np.ndarray
    clean_labels: np.ndarray | None = None  # the images' own where some were replaced in any draw
    rows: np.ndarray | None = None  # of the split


class Origin(NamedTuple):
    """The prepared data that a data set was loaded from.

    Attributes:
      version: TFDS's.
      folder: of that version.
      fingerprint: identifies its files; see :func:`seal_jax.data.shards.fingerprint`.
    """

    version: str
    folder: str
    fingerprint: str


@dataclass(frozen=True)
class Dataset:
    """A named data set; ``validation`` was held out of the training split and may be empty.

    ``origin`` is None where it was not loaded from prepared data.

    Raises:
      UsageError: where images of two splits have different shapes, a split has a label outside
        ``0 .. num_classes-1``, train or test is empty, or the class names are too many or too few.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    origin: Origin | None = None
    # Where labels were replaced: those of the whole training split in stored order, int32, what is not trained on
    # included. It is what ``data.label_file`` takes.
    label_record: np.ndarray | None = None
    # What trainings of one run see where they do not all see ``train``.
    draws: Draws | None = None

    def __post_init__(self):
        if len(self.class_names) != self.num_classes:
            raise UsageError(
                f"{self.name}: {len(self.class_names)} class names for {self.num_classes} classes: "
                "give one name a class"
            )
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            if not len(split):
                if name == "validation":  # may be empty, and then has no shape to compare
                    continue
                raise UsageError(f"{self.name}: the {name} split is empty: give it examples")
            if split.images.shape[1:] != self.image_shape:
                raise UsageError(
                    f"{self.name}: {name} images have shape {split.images.shape[1:]}, train images "
                    f"{self.image_shape}: set data.image_size so that they agree"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise UsageError(
                    f"{self.name}: the {name} split has label {low if low < 0 else high}, outside "
                    f"0..{self.num_classes - 1}: choose a split whose examples are labelled"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(height, width, channels)`` of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def from_arrays(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    name: str = "arrays",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    validation_seed: int = 0,
) -> Dataset:
    """Return plain arrays as a data set.

    Args:
      train: ``(images, labels)``: uint8 ``[n, height, width, channels]``, integers ``[n]``.
      test: the same.
      validation: the same, or None to hold ``validation_fraction`` out of ``train``, stratified.
      name: what messages and reports call it.
      num_classes: by default the number of class names, else the highest training label plus one.
      class_names: by default the class numbers.
      validation_fraction: in ``[0, 1)``; unused where ``validation`` is given.
      validation_seed: seed of the split.

    Raises:
      UsageError: where the arrays are not as said above or contradict each other.

    Examples:
      >>> images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 0, 0, 1, 1, 1])
      >>> dataset = from_arrays((images, labels), (images, labels), validation_fraction=0.34)
      >>> len(dataset.train), len(dataset.validation), dataset.image_shape, dataset.num_classes
      (4, 2, (8, 8, 1), 2)
    """

    def as_split(arrays: tuple[np.ndarray, np.ndarray]) -> Split:
        images, labels = (np.asarray(array) for array in arrays)
        whole_numbers = np.issubdtype(labels.dtype, np.integer)
        # Labels that are no integers are left as they are, for Split to refuse.
        return Split(images, labels.astype(np.int32) if whole_numbers else labels)

    whole = as_split(train)
    if num_classes is None:
        highest = int(whole.labels.max(initial=-1))
        num_classes = highest + 1 if class_names is None else len(class_names)
    if class_names is None:
        class_names = [str(index) for index in range(num_classes)]
    if validation is not None:
        trained, held_out = whole, as_split(validation)
    else:
        trained, held_out = hold_out(whole, validation_fraction, validation_seed)
    return Dataset(name, num_classes, tuple(class_names), trained, held_out, as_split(test))


def hold_out(
    split: Split, fraction: float, seed: int, field: str = "data.validation_fraction"
) -> tuple[Split, Split]:
    """Return ``(train, held out)`` of a stratified split; no copy is made for fraction 0."""
    train_rows, validation_rows = stratified_split(split.labels, fraction, seed, field=field)
    validation = split.rows(validation_rows)
    return (split if not len(validation) else split.rows(train_rows)), validation


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int = 0, *, field: str = "data.validation_fraction"
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into training and validation rows, class by class.

    The validation set has ``round(fraction * n)`` rows in all, and of each class within one example
    of ``fraction * count``. The same labels, fraction and seed give the same rows on any machine.

    Args:
      labels: integer ``[n]``.
      fraction: share of the rows to hold out, in ``[0, 1)``; messages call it ``field``.
      seed: a non-negative integer.

    Returns:
      ``(train_rows, validation_rows)``, both int64, sorted, disjoint, together ``0 .. n-1``.

    Raises:
      UsageError: for a fraction outside ``[0, 1)``, one that holds out no example although it is
        positive, or one that leaves a class without a training example; for a negative seed.

    Examples:
      >>> train, validation = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
      >>> len(train), len(validation)
      (6, 2)
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}: give integers of shape [n]"
        )
    if not 0.0 <= fraction < 1.0:
        raise UsageError(f"{field}={fraction!r} must lie in [0, 1): 0.1 holds out a tenth")
    check_integer("data.validation_seed", seed, 0)
    rows = np.arange(len(labels), dtype=np.int64)
    if fraction == 0.0:
        return rows, rows[:0]

    classes, counts = np.unique(labels, return_counts=True)
    quotas = _class_quotas(counts, fraction)
    if quotas.sum() == 0:
        raise UsageError(
            f"{field}={fraction} holds out no example of {len(labels)}: "
            "raise it, or set 0 for no validation split"
        )
    # Rounding may hold out the only example of a class.
    emptied = np.flatnonzero(quotas >= counts)
    if emptied.size:
        first = emptied[0]
        raise UsageError(
            f"{field}={fraction} leaves class {classes[first]} "
            f"({counts[first]} examples) without a training example: lower it"
        )

    # One generator for all classes, in the order of their labels.
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        held_out[random.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return rows[~held_out], rows[held_out]


def _class_quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Return the largest-remainder apportionment of ``round(fraction * sum(counts))`` to the classes."""
    # Rounding each class separately could miss the total by half an example per class.
    ideal = fraction * counts
    quotas = np.floor(ideal).astype(np.int64)
    # Halves up; Python's round would go to the even number.
    missing = int(np.floor(fraction * counts.sum() + 0.5)) - int(quotas.sum())
    # A stable sort: equal remainders go to the lower class.
    largest_first = np.argsort(-(ideal - quotas), kind="stable")
    quotas[largest_first[: max(missing, 0)]] += 1
    return quotas
