"""LLF: later layers are re-initialised where a generation starts."""

from __future__ import annotations

import jax
import optax

from seal_jax import masks
from seal_jax.forgetting import Initialiser
from seal_jax.generations import Schedule
from seal_jax.transforms.relearn import make_relearn_tx
from seal_jax.transforms.sgd import ResetMomentum


def make_llf_tx(
    mask: masks.Mask,
    learning_rate: float | Schedule = 0.01,
    *,
    init_fn: Initialiser,
    key: jax.Array,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    reset_momentum: ResetMomentum = "generation",
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return later-layer forgetting as one optax transformation.

    This is :func:`seal_jax.transforms.relearn.make_relearn_tx` with a static mask of whole layers.
    The first step of every generation from 1 on is spent on the event (see
    :func:`seal_jax.transforms.masked_reinit`); the rest is momentum SGD with a restarting schedule.

    Args:
      mask: the later layers (True), e.g. ``masks.restrict(masks.since(order, "layer3"))``, which
        leaves the normalisation layers alone as the released code does.
      learning_rate: a float, or an optax schedule of the step within the generation.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      key: a random key; each generation draws anew from it.
      steps_per_epoch: S.
      epochs_per_generation: E.
      momentum: of SGD, undamped.
      weight_decay: coupled L2.
      reset_momentum: "generation" (or "phase", the same here), or "never".
      optimizer: a whole optax optimizer in place of momentum SGD.

    References:
      Zhou et al., `Fortuitous Forgetting in Connectionist Networks`, 2022, section 4.

    >>> params = {"conv": jax.numpy.ones(()), "fc": jax.numpy.ones(())}
    >>> tx = make_llf_tx("fc", init_fn=lambda key: {"conv": 0.0, "fc": 0.0}, steps_per_epoch=2,
    ...                  epochs_per_generation=1, weight_decay=0.0, key=jax.random.key(0))
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jax.tree.map(jax.numpy.zeros_like, params), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(float(params["conv"]), float(params["fc"]))
    1.0 1.0
    1.0 1.0
    1.0 0.0
    """
    return make_relearn_tx(
        mask,
        learning_rate,
        init_fn=init_fn,
        key=key,
        steps_per_epoch=steps_per_epoch,
        epochs_per_generation=epochs_per_generation,
        momentum=momentum,
        weight_decay=weight_decay,
        reset_momentum=reset_momentum,
        optimizer=optimizer,
    )
