"""Reinitialize and relearn: parts of the network get new values where a generation starts.

The methods differ in what they select. :func:`make_llf_tx` has a static mask of whole layers. Each of
:func:`wels`, :func:`welsr`, :func:`dsd` and :func:`kels` returns a ``select`` of (key, parameters,
generation) for :func:`make_relearn_tx`, or for an exact event between two steps::

    selection = select(key_to_select, params, generation)
    params = forgetting.reinitialise_selected(key_to_draw, params, selection, init_fn)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax import masks, selections, slimming
from seal_jax.errors import UsageError, check_choice, check_integer, check_key, require_params
from seal_jax.forgetting import Initialiser, check_like, initialiser
from seal_jax.generations import Clock, Schedule, branch
from seal_jax.transforms.sgd import descent, make_normal_tx, takes_options_of

PyTree = Any
Select = Callable[[jax.Array, PyTree, Any], PyTree]

# Steps are int32, so that no event draws its weights from this number.
_SELECTING = np.uint32(0xFFFFFFFF)


class ReinitState(NamedTuple):
    """State of :func:`masked_reinit`: updates so far, int32, and the key that events derive theirs from, if any."""

    count: jax.Array
    key: jax.Array | None


def masked_reinit(
    mask: masks.Mask | Select,
    init_fn: Initialiser,
    when: Callable[[Any], Any],
    *,
    key: jax.Array | None,
    generation: Callable[[Any], Any] = lambda count: count,
    spends_step: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Spend an update on moving the masked parameters to freshly initialized values.

    Put it at the END of a chain. When ``when(count)`` holds, the updates of the masked parameters
    become ``fresh - p``, exact up to rounding, and all others zero: the gradient of that step belongs
    to weights that are no longer there. Updates in bfloat16 or float16 come out in float32, in every
    step, since a sum in that precision would keep digits of the old weights
    (``optax.apply_updates`` returns the parameters' dtype). The event takes the FIRST step of a
    generation, so that the weights at the end of a generation can be evaluated. For an exact event
    between two steps use :func:`seal_jax.forgetting.reinitialise`.

    Args:
      mask: the forget subtree, in any form of :mod:`seal_jax.masks`; or a function of (key,
        parameters, generation) that returns a selection (see :mod:`seal_jax.selections`).
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      when: maps the (traced) count of updates to a bool, e.g. ``Clock.starts_generation``.
      key: a random key; every event uses another key derived from it, reproducibly. ``None`` stands for the
        extra argument ``key`` of ``update``.
      generation: maps the count to the generation that such a function is given, e.g.
        ``Clock.generation``; by default the count itself.
      spends_step: whether the others have no update in that step. Otherwise they keep theirs, which belongs to the
        weights before the event: it then takes place after the step.

    Raises:
      ValueError: there is no key of either kind.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> fresh = lambda key: {"conv": jnp.zeros(()), "fc": jnp.full((), 5.0)}
    >>> tx = masked_reinit("fc", fresh, when=lambda count: count == 0, key=jax.random.key(0))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["conv"]), float(updates["fc"])
    (0.0, 4.0)
    """
    sample_key = check_key("key", key, optional=True)
    static = None if is_select(mask) else masks.fixed(mask)

    def selection(base, count, params):
        if static is not None:
            return static(params)
        # Another key than that of the fresh weights: what is forgotten must not depend on what replaces it.
        event_key = jax.random.fold_in(jax.random.fold_in(base, _SELECTING), count)
        chosen = mask(event_key, params, generation(count))
        selections.check(chosen, params)
        return chosen

    def init_state(params):
        # A copy: a training step that donates its state must not take the caller's key with it.
        state = ReinitState(jnp.zeros((), jnp.int32), None if key is None else jnp.copy(key))
        # What cannot be used fails here, before any training.
        if static is None:
            jax.eval_shape(selection, sample_key, state.count, params)
        else:
            static(params)
        check_like(jax.eval_shape(initialiser(init_fn, params), sample_key), params)
        return state

    def update_fn(updates, state, params=None, *, key=None, **extra_args):
        del extra_args
        require_params(params)
        base = key if state.key is None else state.key
        require_key(base)

        def event():
            # From the count, not a key that is split and carried: a resumed run repeats the event.
            fresh = initialiser(init_fn, params)(jax.random.fold_in(base, state.count))

            # A static mask gives Python's bool for whole leaves, a selection arrays of bool.
            def move(chosen, new, old, update):
                kept = jnp.zeros_like(update) if spends_step else update
                if isinstance(chosen, bool):
                    return difference(new, old, update) if chosen else kept
                return jnp.where(chosen, difference(new, old, update), kept)

            chosen = selection(base, state.count, params)
            return jax.tree.map(move, chosen, fresh, params, updates)

        # In every step, since both branches must have the same dtypes.
        updates = jax.tree.map(widen, updates)
        # A branch, so that the initialisation runs in the steps that need it only.
        updates = branch(when(state.count), event, updates)
        return updates, ReinitState(optax.safe_increment(state.count), state.key)

    return optax.GradientTransformationExtraArgs(init_state, update_fn)


def require_key(key: Any) -> None:
    """Raise unless an optax ``update`` has a random key."""
    if key is None:
        raise ValueError(
            "update needs key: call update(..., key=...), or make the transformation with key=..."
        )


def widen(update: jax.Array) -> jax.Array:
    """Return an update in float32 if it is of a narrower floating type."""
    narrow = jnp.issubdtype(update.dtype, jnp.floating)
    return update.astype(jnp.promote_types(update.dtype, jnp.float32)) if narrow else update


def difference(new: Any, old: Any, update: jax.Array) -> jax.Array:
    """Return the update, of the dtype of ``update``, that takes ``old`` to ``new``."""
    return jnp.asarray(new, update.dtype) - jnp.asarray(old, update.dtype)


def is_select(mask: Any) -> bool:
    """Tell whether ``mask`` is a function of (key, parameters, generation), not a static mask.

    >>> is_select(lambda key, params, generation: params), is_select(lambda path, leaf: True)
    (True, False)
    """
    if not callable(mask) or isinstance(mask, type):
        return False
    # A tree of bool may itself be callable: an Equinox module.
    holds_bool = any(map(masks.is_bool, jax.tree.leaves(mask)))
    return not holds_bool and masks.count_arguments(mask) == 3


def wels(
    fraction: float, key: jax.Array, *, exact: bool = True, among: masks.Mask | None = None
) -> Select:
    """Select a random part of the weights, the same in every generation (weight-level splitting).

    Args:
      fraction: the share that is FORGOTTEN, in (0, 1): 0.2 in the LW paper, 0.5 in knowledge
        evolution.
      key: the random key of the one selection.
      exact, among: see :func:`seal_jax.selections.random_subset`.
    """
    select = welsr(fraction, exact=exact, among=among)
    check_key("key", key)
    # The key of the one selection in place of the event's, which differs in every generation.
    return lambda _, params, generation: select(key, params, generation)


def welsr(fraction: float, *, exact: bool = True, among: masks.Mask | None = None) -> Select:
    """Select as :func:`wels` does, but other weights in every generation.

    >>> select, params = welsr(0.5), {"kernel": jnp.ones((8, 8))}
    >>> one, other = (select(jax.random.key(seed), params, 1)["kernel"] for seed in (1, 2))
    >>> int(one.sum()), bool((one == other).all())
    (32, False)
    """
    selections.check_fraction("fraction", fraction)
    return lambda key, params, generation: selections.random_subset(
        key, params, fraction, exact=exact, among=among
    )


def dsd(
    fraction: float = 0.2,
    *,
    scope: selections.Scope = "tensor",
    among: masks.Mask | None = None,
) -> Select:
    """Select the smallest magnitudes (dense-sparse-dense); see :func:`seal_jax.selections.smallest`."""
    selections.check_fraction("fraction", fraction)
    check_choice("scope", scope, get_args(selections.Scope))
    return lambda key, params, generation: selections.smallest(
        params, fraction, scope=scope, among=among
    )


def kels(
    keep: float, first: str, head: str, *, flattened: Mapping[str, slimming.Parts] | None = None
) -> Select:
    """Select all but a slim network; see :func:`seal_jax.slimming.kernel_slices`.

    Args:
      keep: the share of channels that is KEPT, in (0, 1).
      first: path of the first layer.
      head: path of the last layer.
      flattened: layers after a flatten or a concatenation, see
        :func:`seal_jax.slimming.kernel_slices`.

    >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    >>> kels(0.5, "a", "b")(jax.random.key(0), params, 1)["a"]["kernel"].tolist()
    [[False, True], [False, True]]
    """
    selections.check_fraction("keep", keep)
    return lambda key, params, generation: slimming.kernel_slices(
        params, keep, first=first, head=head, flattened=flattened
    )


def random_classes(head: masks.Mask, classes: int) -> Select:
    """Select the weights and biases of a few random classes in the classifier (zapping).

    Args:
      head: the classifier, in any form of :mod:`seal_jax.masks`; the last axis of each of its tensors is the classes.
      classes: how many, fewer than there are.

    >>> select = random_classes("fc", 2)
    >>> chosen = select(jax.random.key(0), {"conv": jnp.ones(4), "fc": jnp.ones((4, 5))}, 1)
    >>> bool(chosen["conv"]), chosen["fc"].sum(1).tolist()
    (False, [2, 2, 2, 2])
    """
    classes, head = check_integer("classes", classes, 1), masks.fixed(head)

    def select(key, params, generation):
        del generation

        def of_classes(flag, leaf):
            if not flag:
                return jnp.zeros((), bool)
            count = leaf.shape[-1]
            if classes >= count:
                raise UsageError(f"classes = {classes} must be fewer than the {count} of the head")
            # The same for kernel and bias: both have the key and the count.
            return jnp.broadcast_to(jax.random.permutation(key, count) < classes, leaf.shape)

        return jax.tree.map(of_classes, head(params), params)

    return select


@takes_options_of(make_normal_tx)
def make_relearn_tx(
    select: Select | masks.Mask,
    learning_rate: float | Schedule = 0.01,
    *,
    init_fn: Initialiser,
    key: jax.Array,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return reinitialize-and-relearn training as one optax transformation.

    The first step of every generation from 1 on is spent on the event (see
    :func:`masked_reinit`); the rest is momentum SGD with a restarting schedule.

    Args:
      select: maps (key, parameters, generation) to what is forgotten, e.g. ``dsd(0.2)``; or a static
        mask in any form of :mod:`seal_jax.masks`, for "FC" of the dense layers after the last
        convolution.
      learning_rate: a float, or an optax schedule of the step within the generation.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      key: a random key; each generation derives its own keys from it, for weights and selection.
      steps_per_epoch: S.
      epochs_per_generation: E.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    References:
      "FC": Li et al., `RIFLE`, 2020; Zhao et al., `Retraining`, 2018. Others: see :func:`wels`, ...

    >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
    >>> tx = make_relearn_tx(dsd(0.5), init_fn=lambda key: {"kernel": jnp.full((1, 2), 9.0)},
    ...                      steps_per_epoch=1, epochs_per_generation=1, key=jax.random.key(0))
    >>> state = tx.init(params)
    >>> for _ in range(2):  # generation 1 starts at step 1
    ...     updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    >>> updates["kernel"].tolist()
    [[0.0, 10.0]]
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    # The event comes last: nothing may scale or decay an update that has to reach given values.
    return optax.chain(
        descent(clock, learning_rate, starts_with_event=True, **options),
        masked_reinit(
            select, init_fn, clock.starts_generation, key=key, generation=clock.generation
        ),
    )


@takes_options_of(make_relearn_tx)
def make_llf_tx(
    mask: masks.Mask, learning_rate: float | Schedule = 0.01, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Return later-layer forgetting as one optax transformation.

    This is :func:`make_relearn_tx` with a static mask of whole layers, which are reinitialized in the
    first step of every generation from 1 on.

    Args:
      mask: the later layers (True), e.g. ``masks.restrict(masks.since(order, "layer3"))``, which
        leaves the normalisation layers alone as the released code does.
      learning_rate: a float, or an optax schedule of the step within the generation.
      **options: ``init_fn``, ``key`` and ``steps_per_epoch``, which are required, and the others of
        :func:`make_relearn_tx`.

    References:
      Zhou et al., `Fortuitous Forgetting in Connectionist Networks`, 2022, section 4.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(())}
    >>> tx = make_llf_tx("fc", init_fn=lambda key: {"conv": 0.0, "fc": 0.0}, steps_per_epoch=2,
    ...                  epochs_per_generation=1, weight_decay=0.0, key=jax.random.key(0))
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(float(params["conv"]), float(params["fc"]))
    1.0 1.0
    1.0 1.0
    1.0 0.0
    """
    return make_relearn_tx(mask, learning_rate, **options)


@takes_options_of(make_normal_tx)
def make_zapping_tx(
    head: masks.Mask,
    learning_rate: float | Schedule = 0.01,
    *,
    init_fn: Initialiser,
    key: jax.Array | None = None,
    every: int = 1,
    classes: int | None = None,
    steps_per_epoch: int,
    epochs_per_generation: int = 160,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return zapping, training whose classifier is resampled again and again, as one optax transformation.

    The event follows the first step of every k-th epoch, so that the classifier has relearned by the epoch's end; the
    features take that step as any other. The momentum of the classifier goes on.

    Args:
      head: the classifier, in any form of :mod:`seal_jax.masks`.
      learning_rate: a float, or a schedule of the step within the generation.
      init_fn: maps a key to a whole tree of fresh parameters, or "torch_default".
      key: a random key; ``None`` for the extra argument ``key`` of ``update``.
      every: k, epochs. The paper resamples in several ways, as the task has classes one by one or all at once; these
        defaults are ours.
      classes: random classes that are resampled at a time; ``None`` for all.
      steps_per_epoch: S.
      epochs_per_generation: E, for momentum and schedule, which restart.
      **options: of momentum SGD, see :func:`make_normal_tx`.

    References:
      Frati et al., `Reset It and Forget It: Relearning Last-Layer Weights Improves Continual and Transfer Learning`,
      2024.

    >>> params = {"conv": jnp.ones(()), "fc": jnp.ones(2)}
    >>> tx = make_zapping_tx("fc", 0.1, init_fn=lambda key: {"conv": 0.0, "fc": jnp.full(2, 7.0)}, weight_decay=0.0,
    ...                      momentum=0.0, steps_per_epoch=2, key=jax.random.key(0))
    >>> gradient, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    >>> for _ in range(4):
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(round(float(params["conv"]), 2), round(float(params["fc"][0]), 2))
    0.9 0.9
    0.8 0.8
    0.7 7.0
    0.6 6.9
    """
    clock = Clock(steps_per_epoch, epochs_per_generation)
    interval = check_integer("every", every, 1) * clock.steps_per_epoch
    return optax.chain(
        descent(clock, learning_rate, **options),
        masked_reinit(
            head if classes is None else random_classes(head, classes),
            init_fn,
            # The initial classifier has nothing to forget.
            lambda count: (count > 0) & (count % interval == 0),
            key=key,
            spends_step=False,
        ),
    )
