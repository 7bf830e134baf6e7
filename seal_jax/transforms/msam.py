"""Momentum-SAM: the gradient at a point ahead, along the momentum, without a second pass."""

from __future__ import annotations

from typing import Any

import jax
import optax

from seal_jax.errors import UsageError
from seal_jax.transforms.sam import perturb

PyTree = Any
# Where transformations keep the momentum: optax.trace and damped_trace; Adam and its relatives, Lion.
_FIELDS = ("trace", "mu")


def perturb_along_momentum(params: PyTree, opt_state: PyTree, rho: Any = 0.3) -> PyTree:
    r"""Return where Momentum-SAM takes its gradient: the parameters moved along the momentum's step.

    .. math:: \tilde w_t = w_t - \rho \frac{v_t}{\|v_t\| + 10^{-12}}, \qquad
        v_{t+1} = \mu v_t + \nabla L(\tilde w_t), \qquad w_{t+1} = w_t - \eta v_{t+1}

    The momentum is a sum of gradients, so this is the way the optimizer goes, though mostly further than its step; the
    authors' code calls it an ascent. Nothing but the place of
    the gradient differs from the optimizer itself, which any with one momentum for all parameters may be: give its
    ``update`` this gradient and the parameters themselves. Its weight decay is then that of the parameters
    themselves; the authors' code has that of the perturbed ones, which it stores in their place.

    Args:
      params: w.
      opt_state: the state of the optimizer, however its parts are chained and wrapped, which has the momentum
        :math:`v_t`, or Adam's first moment; not that of ``optax.lars``, a sum of steps and so downhill. Before the
        first step, at :math:`v = 0`, nothing is perturbed.
      rho: :math:`\rho`, at least 0; may be traced. 0.3 is the default of the authors' code. Give 0 where the next
        update begins by resetting the momentum, at the start of a generation.

    Raises:
      UsageError: the state has no momentum, or several.

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational Overhead`, 2024, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> gradient = jax.grad(lambda w: 0.5 * w**2)
    >>> tx, w = optax.sgd(0.1, momentum=0.9), jnp.array(1.0)
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(gradient(perturb_along_momentum(w, state, 0.5)), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> round(float(w), 4)  # 0.9 - 0.1 (0.9 * 1 + 0.9 - 0.5)
    0.77
    """
    # SAM's own step, but along minus the momentum.
    return perturb(params, jax.tree.map(lambda v: -v, momentum(opt_state, params)), rho)


def momentum(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return the momentum in the state of an optimizer, a tree like ``params``.

    Raises:
      UsageError: there is none, or several, as in an optimizer of several parts.

    >>> params = {"w": jax.numpy.ones(2)}
    >>> momentum(optax.adamw(0.1).init(params), params)["w"].tolist()
    [0.0, 0.0]
    """

    def outline(tree: PyTree) -> Any:
        return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]

    candidates = [
        tree
        for field in _FIELDS
        for _, tree in optax.tree.get_all_with_path(opt_state, field)
        # A parameter may have the name of such a field; Galore's momentum has other shapes.
        if outline(tree) == outline(params)
    ]
    if len(candidates) != 1:
        number = "several momenta" if candidates else "no momentum"
        raise UsageError(
            f"the optimizer has {number} of all parameters; Momentum-SAM needs one: use sgd with momentum, adam, "
            "adamw, lion, ..."
        )
    return candidates[0]
