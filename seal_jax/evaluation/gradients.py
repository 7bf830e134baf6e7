"""What mini-batch gradients say about the Hessian: PoF paper, Figures 2 a and 5."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax import masks
from seal_jax.errors import check_integer, check_seed
from seal_jax.evaluation.landscape import Loss, PyTree, curvature, exact
from seal_jax.hessian import trees

_EPSILON = 1e-12  # a zero gradient then has direction 0, not NaN


def mini_batches(examples: int, batch_size: int, count: int, *, seed: int = 0) -> np.ndarray:
    """Return the rows of ``count`` mini-batches as training draws them, ``[count, batch_size]``.

    Every epoch goes through the examples in a new order; what does not fill a batch is left out. Batch
    i is a function of the seed and of i alone.

    Raises:
      UsageError: ``batch_size`` is not in 1..examples, or ``count`` below 1.

    >>> rows = mini_batches(7, 3, 4)
    >>> rows.shape, len(set(rows[:2].ravel().tolist())), len(set(rows[2:].ravel().tolist()))
    ((4, 3), 6, 6)
    """
    bounds = f"in 1..{examples}, the number of examples"
    check_integer("batch_size", batch_size, 1, examples, bounds=bounds)
    check_integer("batches", count, 1)
    check_seed("seed", seed)
    per_epoch = examples // batch_size
    # Every epoch has its own generator, so batch i is the same however many are asked for.
    epochs = [
        np.random.default_rng([seed, epoch]).permutation(examples)[: per_epoch * batch_size]
        for epoch in range(-(-count // per_epoch))
    ]
    return np.concatenate(epochs).reshape(-1, batch_size)[:count].astype(np.int32)


class Probe(NamedTuple):
    """Measurements of each mini-batch's gradient, with g the gradient over its norm.

    Attributes:
      norms: ``[count]``, of the gradient before normalisation.
      cosines: ``[count, k]``, the inner product of g with each vector, in [-1, 1].
      curvatures: ``[count]``, ``g' H g`` with the Hessian of all the data.
      own_curvatures: ``[count]``, the same with the Hessian of the mini-batch alone.
    """

    norms: jax.Array
    cosines: jax.Array
    curvatures: jax.Array
    own_curvatures: jax.Array


@partial(jax.jit, static_argnames=("loss", "mask", "chunk"))
def probe(
    loss: Loss,
    weights: PyTree,
    batches: PyTree,
    data: PyTree,
    vectors: PyTree | None = None,
    *,
    mask: masks.Mask | None = None,
    chunk: int = 8,
) -> Probe:
    r"""Compare the gradient of each mini-batch with the Hessian of all the data.

    The PoF paper estimates the largest eigenvalue of the classifier's Hessian by
    :math:`\hat g_B^\top H \hat g_B`, since mini-batch gradients point mostly along the principal
    eigenvector.

    Args:
      loss, weights, data: as in :func:`seal_jax.evaluation.landscape.slices`.
      batches: the mini-batches along the first axis of every array.
      vectors: k unit vectors along the first axis of every array, such as the ``vectors`` of
        :func:`seal_jax.hessian.eigenpairs`.
      mask: restricts gradient and Hessian to a part of the weights, a path rule or another mask that
        can be hashed.
      chunk: mini-batches side by side; memory grows with it.

    References:
      Sato et al., `PoF`, Figure 2 a; eq. 8 and Figure 5 ("Hessian evaluation").

    >>> loss = lambda w, batch: jnp.mean(w @ batch) + 2 * w[0] ** 2 + 3 * w[1] ** 2
    >>> batches = jnp.array([[[3.0], [0.0]], [[0.0], [-1.0]]])
    >>> result = probe(loss, jnp.zeros(2), batches, batches, jnp.eye(2))
    >>> result.norms.tolist(), result.curvatures.tolist(), jnp.abs(result.cosines).tolist()
    ([3.0, 1.0], [4.0, 6.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    # Gradients are of the part alone: g is normalised within it, as in the paper's space of the classifier.
    part = trees.select(mask, weights)

    def measure(batch: PyTree) -> Probe:
        gradient = jax.grad(lambda part: exact(loss)(trees.merge(weights, part), batch))(part)
        norm = optax.tree.norm(gradient)
        unit = optax.tree.scale(1 / (norm + _EPSILON), gradient)
        # curvature takes batches along the first axis: here one.
        alone = jax.tree.map(lambda leaf: leaf[None], batch)
        return Probe(
            norm,
            jnp.zeros(0) if vectors is None else trees.coefficients(vectors, unit),
            curvature(loss, weights, unit, data),
            curvature(loss, weights, unit, alone),
        )

    # Chunks bound the memory: each mini-batch side by side goes through all the data for its g'Hg.
    return jax.lax.map(measure, batches, batch_size=chunk)


class Strongest(NamedTuple):
    """Which of k eigenvectors each gradient correlates with most.

    Attributes:
      eigenvector: int ``[count]``, its number from 0.
      certain: bool ``[count]``, whether no further eigenvector can correlate more.
      captured: ``[count]``, the share of the squared gradient in the span of the k.
    """

    eigenvector: np.ndarray
    certain: np.ndarray
    captured: np.ndarray


def strongest(cosines: np.ndarray) -> Strongest:
    r"""Return :math:`\arg\max_i |v_i^\top g|` of each mini-batch, from ``cosines`` as in :class:`Probe`.

    Only k of the eigenvectors are known (PoF paper, Figure 2 a). Where the gradient's part outside their
    span is at most as long as its largest coefficient, the answer is that over all eigenvectors.

    >>> best = strongest(np.array([[-0.8, 0.1], [0.3, 0.4]]))
    >>> best.eigenvector.tolist(), best.certain.tolist(), best.captured.round(2).tolist()
    ([0, 1], [True, False], [0.65, 0.25])
    """
    sizes = np.abs(np.asarray(cosines, np.float64))
    captured = np.minimum((sizes**2).sum(1), 1.0)  # rounding may add up to more
    # The residual's squared length, 1 - captured, bounds the squared cosine with any further eigenvector.
    return Strongest(
        np.argmax(sizes, 1), np.max(sizes, 1, initial=0.0) ** 2 >= 1 - captured, captured
    )
