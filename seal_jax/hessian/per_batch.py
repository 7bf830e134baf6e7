"""Eigenvalues of every mini-batch's own Hessian: Table 6 of the SEAL paper."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seal_jax.errors import UsageError, check_integer, check_key
from seal_jax.hessian import krylov
from seal_jax.hessian.lanczos import order_by, rounding
from seal_jax.hessian.operator import Operator, batch_weights, operator

PyTree = Any
_AXIS = "batches"
_SPREAD = PartitionSpec(_AXIS)


class BatchEigenvalues(NamedTuple):
    """Eigenvalues of each mini-batch's Hessian, and statistics of the pool of all of them.

    Attributes:
      values: ``[batches, k]``, falling in magnitude.
      residuals: ``[batches, k]``, upper bounds of the distance from each value to an eigenvalue.
      converged: ``[batches]``, whether all of a batch's are within the tolerance.
    """

    values: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray

    @property
    def max(self) -> float:
        """The largest of the pool."""
        return float(np.max(self.values))

    @property
    def negative_share(self) -> float:
        """The share of negative values, in [0, 1]."""
        return float(np.mean(self.values < 0))

    @property
    def certain_share(self) -> float:
        """The share of values whose sign is certain, since their residual is smaller."""
        return float(np.mean(np.abs(self.values) > self.residuals))


def batch_eigenvalues(
    loss: Any,
    params: PyTree,
    batches: PyTree,
    k: int = 5,
    *,
    steps: int | None = None,
    tolerance: float = 1e-2,
    key: jax.Array | None = None,
    devices: Sequence[jax.Device] | None = None,
    **options: Any,
) -> BatchEigenvalues:
    """Return the k eigenvalues of largest magnitude of each batch's own Hessian.

    One program takes the same number of Lanczos steps on every batch, from a random vector. Park and
    Kim (2022), whom the SEAL paper follows in its Table 6, pool five for every mini-batch of the
    training set, of the loss with its L2 term on augmented data; the table gives the largest of the
    pool and the share of negative ones.

    Args:
      loss: see :func:`seal_jax.hessian.operator`; a batch may hold its weights or random draws.
      params: where the Hessians are taken.
      batches: pytree whose leaves have the batches as their leading axis.
      k: values for each batch.
      steps: of Lanczos, and products for each batch; ``4 k + 20`` by default. Memory holds one
        vector more.
      tolerance: of a converged batch's residuals, over its largest magnitude. Values err by about the
        square of that.
      key: of the random starts; a fixed one by default.
      devices: share the batches, each with all parameters; that of the parameters by default.
      **options: ``mask``, ``weight_decay``, ``mode``, ``outer``, ``precision``, see
        :func:`seal_jax.hessian.operator`.

    Raises:
      UsageError: k or steps out of range, or products that are not finite.

    References:
      Park & Kim, `How Do Vision Transformers Work?`, 2022, arXiv:2202.06709.

    >>> import jax.numpy as jnp
    >>> batches = jnp.array([[3.0, -1.0], [1.0, -2.0]])
    >>> pool = batch_eigenvalues(
    ...     lambda x, batch: jnp.sum(batch * x**2) / 2, jnp.zeros(2), batches, k=1
    ... )
    >>> pool.values.round(4).tolist(), round(pool.max, 4), pool.negative_share
    ([[3.0], [-2.0]], 3.0, 0.5)
    """
    count = len(batch_weights(batches))
    # With one of the batches in it, whose place each of them takes in turn.
    op = operator(loss, params, jax.tree.map(lambda leaf: leaf[:1], batches), **options)
    size = op.size
    krylov.check_wanted(k, size, tolerance)
    steps = min(size, 4 * k + 20 if steps is None else steps)
    least = min(size, k + 1)
    check_integer("steps", steps, least, bounds=f"of at least {least} for k = {k}")
    keys = jax.random.split(check_key("key", key, optional=True), count)
    mesh, inputs = None, (op, keys, batches)
    if devices is not None and len(devices) > 1:
        mesh = jax.make_mesh((len(devices),), (_AXIS,), (AxisType.Auto,), devices=list(devices))
        inputs = _divide(op, keys, batches, mesh)
    results = _in_turn(*inputs, steps, mesh)
    # [batches, steps, steps] and [batches], without the batches that padded the devices' shares.
    projected, last = (np.asarray(result, np.float64)[:count] for result in results)
    if not (np.isfinite(projected).all() and np.isfinite(last).all()):
        raise UsageError(krylov.NOT_FINITE)
    # In float64 on the host, all batches at once.
    values, vectors = np.linalg.eigh(projected)
    order = np.stack([order_by(batch, "LM")[:k] for batch in values])
    ends = np.take_along_axis(vectors[:, -1, :], order, axis=1)
    values = np.take_along_axis(values, order, axis=1)
    scale = np.abs(values[:, :1])
    floor = rounding(scale)
    # |H y - value y| of a Ritz vector y is the last remainder times y's last coefficient.
    residuals = np.abs(last[:, None] * ends) + floor
    # As many steps as rows give the whole matrix: nothing is left to converge.
    converged = (residuals <= tolerance * scale + floor).all(1) | (steps == size)
    return BatchEigenvalues(values, residuals, converged)


@partial(jax.jit, static_argnames=("steps", "mesh"))
def _in_turn(
    op: Operator, keys: jax.Array, batches: PyTree, steps: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Return projections and last remainders of Lanczos on each batch; over a mesh, on each device's."""

    def in_turn(op: Operator, keys: jax.Array, batches: PyTree) -> Any:
        return jax.lax.map(
            lambda pair: krylov.lanczos(op.of_batch(pair[1]), pair[0], steps), (keys, batches)
        )

    if mesh is not None:
        specs = (PartitionSpec(), _SPREAD, _SPREAD)
        in_turn = jax.shard_map(
            in_turn, mesh=mesh, in_specs=specs, out_specs=_SPREAD, check_vma=False
        )
    return in_turn(op, keys, batches)


def _divide(
    op: Operator, keys: jax.Array, batches: PyTree, mesh: Mesh
) -> tuple[Operator, jax.Array, PyTree]:
    """Divide keys and batches over the devices, which do not communicate."""
    # Padded with the first batches, so that every device has as many.
    rows = np.arange(-(-len(keys) // mesh.size) * mesh.size) % len(keys)
    everywhere, spread = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), _SPREAD))
    # Straight from the host, if that is where the batches are: no device holds them all.
    batches = jax.device_put(jax.tree.map(lambda leaf: leaf[rows], batches), spread)
    return jax.device_put(op, everywhere), jax.device_put(keys[rows], spread), batches
