"""Batches of a loaded run's images on the devices, and the options of their size and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax import methods
from seal_jax.core import mesh as meshes
from seal_jax.core.tables import Record
from seal_jax.data import Split
from seal_jax.errors import UsageError
from seal_jax.evaluators.loaded_run import BATCH, LoadedRun
from seal_jax.evaluators.options import flag
from seal_jax.losses import cross_entropy
from seal_jax.training.batches import padded_batches

PyTree = Any
NETWORK = ("run", "weights", "step", "seed")  # the fields that identify a row's network


def batch_sizes(
    loaded_run: LoadedRun, options: Any, splits: Mapping[str, Split]
) -> tuple[int, int]:
    """Return the sizes of mini-batches and of PoF's weak batches; raise where a split has fewer images.

    By default they are the training's, or the PoF paper's 32 for weak batches where another method
    trained, but at most the size of the smallest split.
    """
    sizes = []
    defaults = {
        "batch_size": loaded_run.settings.train.batch_size,
        "weak_batch_size": method_option(loaded_run, "pof", "weak_batch_size", 32),
    }
    for field, default in defaults.items():
        asked = getattr(options, field)
        for name, split in splits.items():
            if asked is not None and asked > len(split):
                raise UsageError(
                    f"{flag(field)}={asked} is more than the {len(split)} {name} images; lower it"
                )
        # A default adapts to small data; what was asked for is never changed silently.
        sizes.append(asked or min(default, *map(len, splits.values())))
    return sizes[0], sizes[1]


def label_smoothing(loaded_run: LoadedRun, options: Any) -> float:
    """Return the label smoothing asked for, or the training's, whose loss the weights minimise."""
    asked = options.label_smoothing
    return loaded_run.settings.optimizer.label_smoothing if asked is None else asked


def parameters_rule(variables: Mapping[str, PyTree]) -> str | None:
    """Return the rule that selects the parameters among all variables, ``None`` where that is all."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return "params" if jax.tree.leaves(others) else None  # a mask must leave something out


def network_of(row: Record) -> tuple[Any, ...]:
    """Return the values that identify a row's network."""
    return tuple(row[name] for name in NETWORK)


def loss_note(rows: Sequence[Record]) -> str:
    """Return a table's note on which loss was measured."""
    smoothing = sorted({row.get("label_smoothing", 0.0) for row in rows})
    return f"Cross entropy with label smoothing {' or '.join(f'{value:g}' for value in smoothing)}."


def method_option(loaded_run: LoadedRun, method: str, field: str, default: Any) -> Any:
    """Return an option of the run's method, ``default`` where it trained with another method."""
    options = loaded_run.settings.method
    if options["name"] != method:
        return default
    # A config names only the options that it sets; the others have the method's defaults.
    return options.get(field, getattr(methods.options(method), field))


def subset(split: Split, count: int, seed: int) -> Split:
    """Return ``count`` examples drawn without replacement; all for 0 or more than there are."""
    if not 0 < count < len(split):
        return split
    # A function of the seed and the size: every network and every run with this data is measured on the same images.
    rows = np.random.default_rng(seed).choice(len(split), count, replace=False)
    return split.rows(np.sort(rows))


def weighted_rows(count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of all examples in batches, with weights by which a mean of means is the mean.

    The last batch is filled up at weight 0.

    >>> rows, weights = weighted_rows(3, 2)
    >>> rows.tolist(), weights.tolist()
    ([[0, 1], [2, 0]], [[1.3333333730697632, 1.3333333730697632], [1.3333333730697632, 0.0]])
    """
    rows, weights = padded_batches(count, batch_size)
    # Each batch counts alike in a mean over batches, the filled one too: rows.size / count makes up for it.
    return rows, weights * np.float32(rows.size / count)


def weighted_loss(
    logits: jax.Array, labels: jax.Array, smoothing: float, weights: Any = 1.0
) -> jax.Array:
    """Return the mean of the examples' cross entropies times their weights."""
    return jnp.mean(weights * cross_entropy(logits, labels, smoothing))


def shardings(
    *batch_sizes: int, devices: Sequence[Any] | None = None
) -> tuple[NamedSharding, NamedSharding]:
    """Return the sharding of replicated arrays, and that of batches divided along their second axis.

    As many of the devices, by default this process' own, take part as divide every batch.
    """
    devices = jax.local_devices() if devices is None else devices
    count = math.gcd(len(devices), *batch_sizes)  # equal parts, so that no device waits
    mesh = meshes.along(BATCH, devices[:count])
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, BATCH))


def place(weights: PyTree, batches: PyTree) -> tuple[PyTree, PyTree]:
    """Put weights on every device, and divide batches ``[batches, batch, ...]`` over the devices.

    Arrays of one axis are not divided.
    """
    # One division for all arrays, or a batch's images and labels would be on different devices.
    sizes = {leaf.shape[1] for leaf in jax.tree.leaves(batches) if leaf.ndim > 1}
    everywhere, divided = shardings(*sizes)
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, divided if leaf.ndim > 1 else everywhere), batches
    )
    return jax.device_put(weights, everywhere), placed


def number(value: Any) -> float | None:
    """Return a JSON number, ``None`` for one that is not finite.

    >>> number(np.float32(0.5)), number(np.nan)
    (0.5, None)
    """
    # JSON has no NaN: strict readers would refuse the whole file.
    value = float(value)
    return value if math.isfinite(value) else None


def numbers(values: Any) -> list[float | None]:
    """Return the JSON numbers of an array of one axis."""
    return [number(value) for value in np.asarray(values)]
