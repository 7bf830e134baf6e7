"""How far SGD, SAM and PoF move the classifier for one mini-batch: PoF paper, Figure 6."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from seal_jax import masks
from seal_jax.evaluation.landscape import Loss, PyTree, exact
from seal_jax.hessian import trees
from seal_jax.transforms import sam
from seal_jax.weak_classifiers import Classify, perturbation


class Steps(NamedTuple):
    """Norms, each ``[count]``, of plain SGD's step and of SAM's perturbation of the classifier."""

    sgd: jax.Array
    sam: jax.Array


def steps(
    loss: Loss,
    weights: PyTree,
    batches: PyTree,
    *,
    head: masks.Mask,
    trained: masks.Mask | None = None,
    learning_rate: Any = 1.6e-4,
    rho: Any = 0.05,
    adaptive: bool = False,
    eta: Any = 0.0,
    weight_decay: Any = 0.0,
) -> Steps:
    r"""Return the sizes :math:`\|\delta\theta\|_2` of SGD's steps and of SAM's perturbations.

    For the gradient :math:`g_B` of each mini-batch, with :math:`g_\theta` the classifier's part,

    .. math::
        \eta \|g_\theta\| \ \text{(SGD)}, \qquad
        \rho \frac{\|T_\theta^2 g_\theta\|}{\|T g\|} \ \text{(SAM)}, \quad
        T = 1 \ \text{or}\ |w| + \eta_{ASAM}.

    SAM's norm is that over all parameters, so the classifier's part is at most :math:`\rho`. Sizes
    are computed from the gradient: as a difference of weights, rounding would leave nothing of them.

    Args:
      loss, weights, batches: as in :func:`seal_jax.evaluation.gradients.probe`.
      head: mask of the classifier; a path rule, or another that can be hashed.
      trained: mask of the parameters, where the weights hold statistics, too; ``None``: all.
      learning_rate: of SGD; the paper's is that of its last epochs.
      rho: SAM's radius.
      adaptive: ASAM.
      eta: of ASAM.
      weight_decay: of SAM's perturbation, see :func:`seal_jax.transforms.sam.perturb`.

    Raises:
      UsageError: a negative or infinite ``rho`` or ``eta``; masks that do not fit.

    References:
      Sato et al., `PoF`, section 4.2 ("Perturbation range") and Figure 6.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, batch: 3 * w["conv"] + 4 * w["fc"] * batch.mean()
    >>> weights, batches = {"conv": jnp.float32(0), "fc": jnp.float32(0)}, jnp.ones((1, 1))
    >>> sizes = steps(loss, weights, batches, head="fc", learning_rate=0.25, rho=0.5)
    >>> round(float(sizes.sgd[0]), 5), round(float(sizes.sam[0]), 5)
    (1.0, 0.4)
    """
    sam.check_radius(rho, eta)
    rates = (learning_rate, rho, eta, weight_decay)
    return _steps(loss, weights, batches, rates, head, trained, adaptive)


@partial(jax.jit, static_argnames=("loss", "head", "trained", "adaptive"))
def _steps(loss, weights, batches, rates, head, trained, adaptive):
    learning_rate, rho, eta, weight_decay = rates
    # Both masks are resolved on all weights, since their rules name paths from there.
    part = trees.select(trained, weights)
    of_head = trees.select(head, weights)

    def head_norm(tree: PyTree) -> jax.Array:
        # The tree has None outside the trained part; what of it is outside the head becomes None too.
        in_head = jax.tree.map(
            lambda selected, leaf: None if selected is None else leaf,
            of_head,
            tree,
            is_leaf=lambda selected: selected is None,
        )
        return optax.tree.norm(in_head)

    def sizes(batch: PyTree) -> Steps:
        # One gradient gives both sizes. SGD's is without decay and momentum, as the paper measures it.
        gradient = jax.grad(lambda part: exact(loss)(trees.merge(weights, part), batch))(part)
        slopes, norm = sam.uphill(part, gradient, adaptive, eta, weight_decay)
        return Steps(learning_rate * head_norm(gradient), rho * head_norm(slopes) / (norm + 1e-12))

    # One mini-batch at a time: its gradient is of the whole network, with all activations.
    return jax.lax.map(sizes, batches)


class Searches(NamedTuple):
    """Distances of the mini-batches' minima, 0 where there is none, and whether there is one."""

    xi: jax.Array
    accepted: jax.Array


@partial(jax.jit, static_argnames=("classify", "loss", "chunk"))
def searches(
    head: PyTree,
    features: jax.Array,
    labels: jax.Array,
    classify: Classify,
    loss: Loss,
    *,
    chunk: int = 16,
) -> Searches:
    r"""Return :math:`\xi_B^*`, PoF's line search on the classifier, for each mini-batch.

    It is :func:`seal_jax.weak_classifiers.perturbation`, as in training. PoF's perturbation has the
    size :math:`\gamma \xi_B^*`, since the direction has norm 1.

    Args:
      head: the classifier's parameters.
      features: ``[count, batch, ...]``, the classifier's input.
      labels: ``[count, batch]``.
      classify: ``classify(head, features) -> logits``; can be hashed.
      loss: ``loss(logits, labels) -> scalar``, the mean over a batch; can be hashed.
      chunk: mini-batches side by side.

    References:
      Sato et al., `PoF`, eq. 2 and 3, Figures 2 b and 6.

    >>> import jax.numpy as jnp
    >>> head, labels = jnp.zeros((1, 1)), jnp.zeros((2, 1), jnp.int32)
    >>> classify = lambda head, features: features @ head
    >>> loss = lambda z, y: jnp.mean((z - 1.0) ** 2)
    >>> result = searches(head, jnp.array([[[2.0]], [[0.5]]]), labels, classify, loss)
    >>> result.xi.round(5).tolist(), result.accepted.tolist()
    ([0.5, 2.0], [True, True])
    """

    def search(batch: tuple[jax.Array, jax.Array]) -> Searches:
        # As the losses of :func:`exact`: near the minimum they differ by less than reduced precision resolves.
        with jax.default_matmul_precision("highest"):
            result = perturbation(head, *batch, classify, loss)
        return Searches(result.xi, result.accepted)

    return jax.lax.map(search, (features, labels), batch_size=chunk)
