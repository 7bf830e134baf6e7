"""What studies change in a training split: which images it has, and under which labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.core import files
from seal_jax.data.dataset import Dataset, Draws, Split, stratified_split
from seal_jax.errors import UsageError


def study(
    dataset: Dataset,
    *,
    validation_fraction: float = 0.0,
    validation_seed: int = 0,
    train_count: int = 0,
    imbalance: float = 1.0,
    subset_seed: int = 0,
    label_noise: float = 0.0,
    label_noise_seed: int = 0,
    label_file: str = "",
    draws: Sequence[Mapping[str, Any]] = (),
) -> Dataset:
    """Hold a validation split out of the training split, then choose images of the rest and change labels.

    Validation and test keep the data set's own labels, and all their images. The arguments are those
    settings of ``data``.

    Args:
      dataset: without a validation split.
      draws: of several draws the ``subset_seed``, ``label_noise`` and ``label_noise_seed`` of each, in place of the
        arguments.

    Returns:
      The data set; where labels were replaced, ``train.clean_labels`` are the images' own and
      ``label_record`` those of all images of the whole training split. With ``draws`` the training split has all
      images that are not held out, the draws are beside it, and there is a record of ``label_file`` alone.

    Raises:
      UsageError: as the functions below, and :func:`seal_jax.data.stratified_split`.
    """
    whole, classes = dataset.train, dataset.num_classes
    rows, held_out = stratified_split(whole.labels, validation_fraction, validation_seed)
    # Held out by the data set's own labels, and before anything else: no option below changes the validation split.
    record = read_labels(label_file, len(whole), classes) if label_file else whole.labels

    def drawn(
        subset_seed: int, label_noise: float, label_noise_seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose among the images that are not held out, and replace labels; return labels, clean ones, rows."""
        chosen = np.arange(len(rows), dtype=np.int32)
        if train_count or imbalance > 1:
            clean = whole.labels[rows]
            chosen = subset_rows(clean, classes, train_count, imbalance, subset_seed)
        seen = record[rows[chosen]]
        if label_noise:
            seen = noisy_labels(seen, classes, label_noise, label_noise_seed)
        return seen, whole.labels[rows][chosen], chosen.astype(np.int32)

    validation = whole.rows(held_out)
    if draws:
        # No copy of images where all of them stay.
        train = whole if len(rows) == len(whole) else whole.rows(rows)
        stacked = Draws(*map(np.stack, zip(*(drawn(**draw) for draw in draws), strict=True)))
        if not (label_file or any(draw["label_noise"] for draw in draws)):
            stacked = stacked._replace(clean_labels=None)
        return dataclasses.replace(
            dataset,
            train=train,
            validation=validation,
            draws=stacked,
            label_record=record if label_file else None,
        )
    seen, clean, chosen = drawn(subset_seed, label_noise, label_noise_seed)
    train = whole if len(chosen) == len(whole) else whole.rows(rows[chosen])
    if not (label_file or label_noise):
        return dataclasses.replace(dataset, train=train, validation=validation)
    record = record.copy()
    record[rows[chosen]] = seen
    return dataclasses.replace(
        dataset,
        train=Split(train.images, seen, clean),
        validation=validation,
        label_record=record,
    )


def class_counts(available: np.ndarray, train_count: int, imbalance: float) -> np.ndarray:
    r"""Return how many images of each class a subset has.

    With an imbalance :math:`\rho` class c of C has :math:`n\,\rho^{-c/(C-1)}` images, rounded down,
    where n is ``train_count``, or else the most for which all classes have enough.

    Args:
      available: images that there are of each class, integers ``[classes]``.
      train_count: images of a class, of the first one where there is an imbalance; 0 for the most.
      imbalance: images of the first class for one of the last.

    Returns:
      Integers ``[classes]``.

    Raises:
      UsageError: a class has fewer images, or would have none.

    Examples:
      >>> class_counts(np.array([500, 500, 500]), 0, 100.0).tolist()
      [500, 50, 5]

    References:
      Cao et al. (2019), `Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss`.
    """
    last = max(len(available) - 1, 1)
    profile = (1 / imbalance) ** (np.arange(len(available)) / last)
    most = train_count or float(np.min(available / profile))
    # A whole number that rounding left just below itself must not lose an image.
    counts = np.floor(most * profile + 1e-9).astype(np.int64)
    field = "train_count" if train_count else "imbalance"
    asked = f"data.{field} = {train_count or format(imbalance, 'g')}"
    for label in np.flatnonzero(counts > available):
        raise UsageError(
            f"{asked} needs {counts[label]} training images of class {label}, which has "
            f"{available[label]} that are not held out: lower it"
        )
    for label in np.flatnonzero(counts == 0):
        raise UsageError(
            f"{asked} leaves class {label} without a training image: "
            f"{'raise it, or lower data.imbalance' if train_count else 'lower it'}"
        )
    return counts


def subset_rows(
    labels: np.ndarray, num_classes: int, train_count: int, imbalance: float, seed: int
) -> np.ndarray:
    """Choose images of each class: as many as :func:`class_counts` says.

    With the same seed a larger subset contains a smaller one.

    Args:
      labels: integers ``[n]``.

    Returns:
      Row numbers in ascending order.

    Examples:
      >>> labels = np.array([0, 0, 0, 1, 1, 1])
      >>> labels[subset_rows(labels, 2, 2, 1.0, seed=0)].tolist()
      [0, 0, 1, 1]
    """
    counts = class_counts(np.bincount(labels, minlength=num_classes), train_count, imbalance)
    random = np.random.default_rng(seed)
    # The whole class is permuted whatever its count is: that makes subsets nested.
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in enumerate(counts)
    ]
    return np.sort(np.concatenate(chosen))


def noisy_labels(labels: np.ndarray, num_classes: int, share: float, seed: int) -> np.ndarray:
    """Replace the labels of a share of the images by one of the other classes, each equally likely.

    Exactly ``round(share * n)`` images, drawn from all of them and not class by class. With the same
    seed a larger share contains the wrong labels of a smaller one.

    Args:
      labels: int32 ``[n]``.

    Returns:
      int32 ``[n]``.

    Raises:
      UsageError: there is one class only, or the share is of no image.

    Examples:
      >>> noisy = noisy_labels(np.zeros(10, np.int32), 3, 0.4, seed=0)
      >>> int((noisy == 0).sum()), sorted(set(noisy.tolist()))
      (6, [0, 1, 2])
    """
    count = int(np.floor(share * len(labels) + 0.5))
    if num_classes < 2 or not count:
        reason = "there is one class only" if num_classes < 2 else "too few to change one"
        raise UsageError(
            f"data.label_noise = {share:g} changes no label of {len(labels)} training images: "
            f"{reason}; set 0"
        )
    # Not the generator of `subset_rows`: equal seeds of both must not choose alike.
    random = np.random.default_rng((seed, 1))
    rows = random.permutation(len(labels))[:count]
    # Drawn for all images, so that a shift does not depend on the share.
    shifts = random.integers(1, num_classes, len(labels))
    noisy = labels.copy()
    noisy[rows] = (labels[rows] + shifts[rows]) % num_classes
    return noisy


def read_labels(path: str, count: int, num_classes: int) -> np.ndarray:
    """Read labels from a ``.npy`` file, or from a text file with integers between spaces or on lines.

    Returns:
      int32 ``[count]``.

    Raises:
      UsageError: the file cannot be read, or does not hold ``count`` integers in
        ``0 .. num_classes-1``.
    """
    field = f"data.label_file = {path!r}"
    try:
        file = files.as_path(path)
        if file.suffix == ".npy":
            labels = files.load_array(file)
        else:
            labels = np.array(file.read_text().split(), np.int64)
    except OSError as error:
        raise UsageError(f"{field} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, OverflowError):
        raise UsageError(
            f"{field} holds no integers: give a .npy file of integers, or text with one a line"
        ) from None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != count:
        raise UsageError(
            f"{field} holds {labels.dtype}{list(labels.shape)}: give one integer for each of the "
            f"{count} images of data.train_split"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise UsageError(
            f"{field} has label {labels[row]} for image {row}: give 0..{num_classes - 1}"
        )
    return labels.astype(np.int32)
