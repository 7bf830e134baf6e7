"""A stratified, seeded split of a training set into training and validation rows."""

from __future__ import annotations

import numpy as np

from seal_jax.errors import UsageError


def _class_quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Largest-remainder apportionment of ``round(fraction * sum(counts))`` over the classes.

    Rounding every class by itself can miss the total by half an example a class; here the total is
    exact and every class stays within one example of ``fraction * count``.
    """
    ideal = fraction * counts
    quotas = np.floor(ideal).astype(np.int64)
    missing = int(np.floor(fraction * counts.sum() + 0.5)) - int(quotas.sum())
    # A stable sort: equal remainders go to the lower class.
    largest_first = np.argsort(-(ideal - quotas), kind="stable")
    quotas[largest_first[: max(missing, 0)]] += 1
    return quotas


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int = 0, *, field: str = "data.validation_fraction"
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into training and validation rows, class by class.

    The validation set has ``round(fraction * n)`` rows in all, and of each class within one example
    of ``fraction * count``. The same labels, fraction and seed give the same rows on any machine.

    Args:
      labels: integer ``[n]``.
      fraction: share of the rows to hold out, in ``[0, 1)``; 0 holds out nothing.
      seed: a non-negative integer.
      field: what messages call the fraction.

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
    if seed < 0:
        raise UsageError(f"data.validation_seed={seed} must not be negative")
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
    emptied = np.flatnonzero(quotas >= counts)
    if emptied.size:
        first = emptied[0]
        raise UsageError(
            f"{field}={fraction} leaves class {classes[first]} "
            f"({counts[first]} examples) without a training example: lower it"
        )

    random = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        held_out[random.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return rows[~held_out], rows[held_out]
