"""PoF: post-training of the feature extractor under perturbations of the classifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from seal_jax import masks
from seal_jax.errors import check_number, known_zero, nonnegative, require_params
from seal_jax.generations import Clock, Schedule
from seal_jax.transforms.sgd import descent

_LONGEST = 2**31 - 1  # steps that an int32 counts


def make_pof_tx(
    head: masks.Mask,
    learning_rate: float | Schedule = 3e-5,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    classifier_learning_rate: float = 0.0,
    steps_per_epoch: int = 1,
    epochs_per_generation: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Return PoF's optimizer: Nesterov SGD on the feature extractor, none on the classifier.

    The updates of the classifier :math:`\theta_0` are exactly 0, whatever its gradient and the
    weight decay; nor does its gradient enter the optimizer. The gradient is taken at a weak
    classifier (:mod:`seal_jax.weak_classifiers`), the update applied to the parameters themselves,
    as in the example. The state has the structure of that of :func:`make_normal_tx` over ALL
    parameters: continue with the state at the end of the pre-training to keep its momentum, and its
    count of steps, which a schedule reads.

    Args:
      head: the classifier, in any form of :mod:`seal_jax.masks`.
      learning_rate: of the features; a float, or a schedule of the step within the generation.
      momentum: of SGD, undamped, as in PyTorch; never reset.
      nesterov: whether the momentum is Nesterov's; without effect together with ``optimizer``.
      weight_decay: coupled L2 on the features.
      classifier_learning_rate: if positive, the classifier follows plain SGD at this rate, against
        a drift of the minimum away from it (the paper saw no gain): give it its gradient at
        :math:`\theta_0` then, not the one at the weak classifier.
      steps_per_epoch: S, for a schedule that restarts.
      epochs_per_generation: E, for the same; ``None`` never restarts it.
      optimizer: a whole optax optimizer for the features in place of decay, momentum and learning
        rate, which must then be left alone.

    References:
      Sato et al., `PoF: Post-Training of Feature Extractor for Improving Generalization`, eq. 5,
      Algorithm 1, section 4.1.

    >>> from seal_jax.weak_classifiers import perturb
    >>> params = {"conv": jnp.ones((2, 3)), "fc": {"kernel": jnp.eye(3, 2), "bias": jnp.zeros(2)}}
    >>> tx = make_pof_tx("fc", learning_rate=0.1)
    >>> state = tx.init(params)  # or the state that the pre-training ends with
    >>> features = lambda params, x: jnp.tanh(x @ params["conv"])
    >>> classify = lambda head, features: features @ head["kernel"] + head["bias"]
    >>> def loss(logits, labels):
    ...     return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    >>> @jax.jit
    ... def step(params, state, key, weak_x, weak_y, x, y):
    ...     weak_features = features(params, weak_x)
    ...     weak, shift, gamma = perturb(key, params["fc"], weak_features, weak_y, classify, loss)
    ...     objective = lambda params: loss(classify(params["fc"], features(params, x)), y)
    ...     gradient = jax.grad(objective)({**params, "fc": weak})
    ...     updates, state = tx.update(gradient, state, params)
    ...     return optax.apply_updates(params, updates), state, ~shift.accepted
    >>> x, y = jax.random.normal(jax.random.key(1), (8, 2)), jnp.arange(8) % 2
    >>> after, state, rejected = step(params, state, jax.random.key(2), x[:4], y[:4], x, y)
    >>> same = jax.tree.map(lambda new, old: bool((new == old).all()), after, params)
    >>> same["conv"], same["fc"]
    (False, {'bias': True, 'kernel': True})
    """
    must = "be 0 (the classifier stays) or positive"
    check_number("classifier_learning_rate", classifier_learning_rate, nonnegative, must)
    if epochs_per_generation is None:
        # Checks S; then one generation, as long as can be counted.
        epochs_per_generation = max(1, _LONGEST // Clock(steps_per_epoch, 1).steps_per_epoch)
    # Over all parameters, not ``optax.partition``: the state must have the structure of the pre-training's.
    # Never reset: the momentum of the pre-training goes on.
    inner = descent(
        Clock(steps_per_epoch, epochs_per_generation),
        learning_rate,
        momentum=momentum,
        # True is this function's default, not a choice of the caller's: it gives way to an optimizer.
        nesterov=nesterov and optimizer is None,
        weight_decay=weight_decay,
        reset_momentum="never",
        optimizer=optimizer,
        default_rate=3e-5,
    )
    head = masks.fixed(head)

    def classifier_update(gradient):
        if known_zero(classifier_learning_rate):
            return jnp.zeros_like(gradient)  # exact zeros, for an infinite gradient too
        return (-classifier_learning_rate * gradient).astype(gradient.dtype)

    def init_fn(params):
        head(params)  # a mask that cannot be used fails here, before any training
        return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params)
        flags = head(params)
        # Zero on the way in as well: a gradient clipped by its global norm is that of the features.
        features = jax.tree.map(lambda flag, g: jnp.zeros_like(g) if flag else g, flags, updates)
        features, state = inner.update(features, state, params, **extra_args)
        # What ``inner`` made of the zeros is dropped as well: its weight decay would still move the classifier.
        updates = jax.tree.map(
            lambda flag, g, update: classifier_update(g) if flag else update,
            flags,
            updates,
            features,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
