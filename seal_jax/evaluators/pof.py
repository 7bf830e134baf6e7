"""What the kinds of the PoF paper's figures share: losses, batches on the devices, formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seal_jax import data, methods
from seal_jax.core.tables import MISSING, spread
from seal_jax.data import Split
from seal_jax.errors import UsageError
from seal_jax.evaluators.evaluator import Record
from seal_jax.losses import cross_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from seal_jax.evaluators.loaded_run import LoadedRun

PyTree = Any
BATCH = "batch"


def check(options: Any, least: Mapping[str, float]) -> None:
    """Raise unless every named option is at least so much and finite, and the others in range."""
    for field, bound in least.items():
        value = getattr(options, field)
        if value is not None and not bound <= value < math.inf:
            flag = field.replace("_", "-")
            raise UsageError(f"--{flag}={value:g} must be at least {bound:g}")
    smoothing, tolerance = options.label_smoothing, getattr(options, "tolerance", 1.0)
    if smoothing is not None and not 0 <= smoothing < 1:
        raise UsageError(f"--label-smoothing={smoothing:g} must lie in [0, 1)")
    if not 0 < tolerance < math.inf:
        raise UsageError(f"--tolerance={tolerance:g} must be positive and finite")


def batch_sizes(
    loaded_run: LoadedRun, options: Any, splits: Mapping[str, Split]
) -> tuple[int, int]:
    """Return the sizes of mini-batches and of PoF's weak batches.

    Those that are not given are the training's, or the PoF paper's 32 for weak batches where another
    method trained; but no more than the smallest split has.

    Raises:
      UsageError: one that is given is more than a split has.
    """
    sizes = []
    weak = method_option(loaded_run, "pof", "weak_batch_size", 32)
    for field, default in (
        ("batch_size", loaded_run.settings.train.batch_size),
        ("weak_batch_size", weak),
    ):
        asked = getattr(options, field)
        for name, split in splits.items():
            if asked is not None and asked > len(split):
                flag = field.replace("_", "-")
                raise UsageError(
                    f"--{flag}={asked} is more than the {len(split)} {name} images; lower it"
                )
        sizes.append(asked or min(default, *map(len, splits.values())))
    return sizes[0], sizes[1]


def label_smoothing(loaded_run: LoadedRun, options: Any) -> float:
    """Return the label smoothing asked for, or the training's, of whose loss weights are a minimum."""
    asked = options.label_smoothing
    return loaded_run.settings.optimizer.label_smoothing if asked is None else asked


def loss_note(rows: Sequence[Record]) -> str:
    """Say for a table which loss was measured."""
    smoothing = sorted({row.get("label_smoothing", 0.0) for row in rows})
    return f"Cross entropy with label smoothing {' or '.join(f'{value:g}' for value in smoothing)}."


def method_option(loaded_run: LoadedRun, method: str, field: str, default: Any) -> Any:
    """Return an option of the run's method, ``default`` where it trained with another method.

    An option that the run left out has the method's own default.
    """
    given = loaded_run.settings.method
    if given["name"] != method:
        return default
    return given.get(field, getattr(methods.options(method), field))


def some(split: Split, count: int, seed: int) -> Split:
    """Return ``count`` examples drawn without replacement; all for 0 or more than there are."""
    if not 0 < count < len(split):
        return split
    rows = np.random.default_rng(seed).choice(len(split), count, replace=False)
    return split.rows(np.sort(rows))


def all_rows(count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of all examples in batches of one size, with their shares in the mean.

    The last batch is filled up at share 0; the other shares are such that the mean over batches of
    ``mean(share * loss)`` is that over all examples.

    >>> rows, shares = all_rows(3, 2)
    >>> rows.tolist(), shares.tolist()
    ([[0, 1], [2, 0]], [[1.3333333730697632, 1.3333333730697632], [1.3333333730697632, 0.0]])
    """
    rows, weights = data.padded_batches(count, batch_size)
    return rows, weights * np.float32(rows.size / count)


def weighted_loss(logits: jax.Array, labels: jax.Array, shares: Any, smoothing: float) -> jax.Array:
    """Return the mean of the examples' losses times their shares."""
    return jnp.mean(shares * cross_entropy(logits, labels, smoothing))


def place(weights: PyTree, batches: PyTree) -> tuple[PyTree, PyTree]:
    """Put weights on the devices, and divide every batch over them.

    Args:
      weights: host arrays, the same on every device.
      batches: host arrays ``[batches, batch, ...]``; those of one axis are not divided. As many
        devices take part as divide a batch.
    """
    devices = jax.local_devices()
    sizes = {leaf.shape[1] for leaf in jax.tree.leaves(batches) if leaf.ndim > 1}
    count = math.gcd(len(devices), *sizes)
    mesh = jax.make_mesh((count,), (BATCH,), axis_types=(AxisType.Auto,), devices=devices[:count])

    def put(leaf: Any) -> jax.Array:
        spec = PartitionSpec(None, BATCH) if leaf.ndim > 1 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    whole = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    return whole, jax.tree.map(put, batches)


def number(value: Any) -> float | None:
    """Return a JSON number, ``None`` for one that is not finite.

    >>> number(np.float32(0.5)), number(np.nan)
    (0.5, None)
    """
    found = float(value)
    return found if math.isfinite(found) else None


def numbers(values: Any) -> list[float | None]:
    """Return the JSON numbers of an array of one axis."""
    return [number(value) for value in np.asarray(values)]


def short(values: Iterable[float | None], scale: float = 1.0) -> str:
    """Return mean and interval over the seeds that have a value, in as many digits as these allow.

    >>> short([0.00012345]), short([1.0, 2.0, 3.0]), short([None])
    ('1.23e-4', '2.0 ± 2.5', '-')
    """
    known = [value for value in values if value is not None]
    return spread(known).text(None, scale) if known else MISSING


def log_edges(values: np.ndarray, bins: int = 60) -> np.ndarray:
    """Return edges of bins of one width on a log axis, around all values, which are positive.

    >>> log_edges(np.array([0.01, 100.0]), 4).round(6).tolist()
    [0.01, 0.1, 1.0, 10.0, 100.0]
    """
    low, high = np.log10(np.min(values)), np.log10(np.max(values))
    if high - low < 1e-3:  # all the same
        low, high = low - 0.5, high + 0.5
    return np.logspace(low, high, bins + 1)


def shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of the values in each bin; those beyond count in the outermost.

    >>> shares(np.array([0.5, 1.5, 9.0, 1.7]), np.array([0.0, 1.0, 2.0])).tolist()
    [0.25, 0.75]
    """
    inside = np.clip(values, edges[0], edges[-1])
    return np.histogram(inside, edges)[0] / max(len(values), 1)


def histogram(
    axes: Axes, groups: Sequence[tuple[str, np.ndarray, Mapping[str, Any]]], edges: np.ndarray
) -> None:
    """Draw each group's shares as filled steps.

    Args:
      axes: to draw on.
      groups: label, values, and colour and dashes of each.
      edges: of the bins, ascending.
    """
    for label, values, style in groups:
        share = shares(values, edges)
        axes.stairs(share, edges, fill=True, alpha=0.25, color=style["color"])
        axes.stairs(share, edges, label=label, linewidth=1.2, **style)
    axes.spines[["top", "right"]].set_visible(False)


def panel_rows(rows: Sequence[Record]) -> list[str]:
    """Return the weights, "last" and "best", that a plot has a row of panels for."""
    return list(dict.fromkeys(row["weights"] for row in rows))


def height(of_row: float, width: float) -> Callable[[Sequence[Record]], tuple[float, float]]:
    """Return the size of a figure with one row of panels for each of the weights, in inches."""
    return lambda rows: (width, of_row * max(1, len(panel_rows(rows))))
