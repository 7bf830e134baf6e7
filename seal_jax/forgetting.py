"""Exact forgetting events on parameters, between two training steps.

An optax update reaches new values only up to rounding, since p + (fresh - p) differs from fresh in
the last bit; these functions replace leaves instead. They are pure: run them under ``jax.jit``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from seal_jax import layers, masks, optimizer_state, paths, pruning, selections
from seal_jax.errors import UsageError, check_choice, check_key, check_number, nonnegative

PyTree = Any
Initialiser = Callable[[jax.Array], PyTree] | Literal["torch_default"]
StatePolicy = Literal["fresh", "zero", "keep"]


def torch_default(key: jax.Array, params: PyTree, *, layout: layers.Layout | None = None) -> PyTree:
    r"""Initialize parameters as PyTorch's layers do by default, and with them the released LLF code.

    Kernels and their biases are :math:`U(\pm 1/\sqrt{\text{fan in}})`, with the fan-in of the kernel;
    in layers without a kernel ``bias``, ``b``, ``offset`` and ``beta`` are 0, all else is 1; class
    tokens and position embeddings are 0. See :func:`seal_jax.layers.roles`. What is not floating-point
    is returned as it is.

    Args:
      key: a random key.
      params: arrays or ``jax.ShapeDtypeStruct``, for the structure, shapes and dtypes.
      layout: which axes of kernels are inputs; by default inferred from their names, see
        :func:`seal_jax.layers.fans`.

    >>> params = {"fc": {"kernel": jnp.zeros((4, 2))}, "bn": {"scale": jnp.zeros(2)}}
    >>> fresh = torch_default(jax.random.key(0), params)
    >>> bool(abs(fresh["fc"]["kernel"]).max() <= 0.5), fresh["bn"]["scale"].tolist()
    (True, [1.0, 1.0])
    """
    leaves, roles = paths.named_leaves(params), layers.roles(params)
    # By layer, since PyTorch takes the bound of a bias from the layer's kernel.
    fan_in = {
        path.rpartition("/")[0]: layers.fans(path, leaf.shape, layout)[0]
        for (path, leaf), role in zip(leaves, roles, strict=True)
        if role == "kernel"
    }

    def draw(path, leaf, index, role):
        layer, _, name = path.rpartition("/")
        if not jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating):
            return leaf
        # PyTorch's normalisation layers start as the identity: scale 1, shift 0.
        if role == "norm":
            return jnp.full(leaf.shape, float(name not in layers.BIASES), leaf.dtype)
        if layer not in fan_in:
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = 1 / math.sqrt(fan_in[layer])
        # One key per leaf, so that two leaves of one shape do not get the same draws.
        leaf_key = jax.random.fold_in(key, index)
        return jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)

    return paths.map_named(draw, params, range(len(leaves)), roles)


def initialiser(init_fn: Initialiser, params: PyTree) -> Callable[[jax.Array], PyTree]:
    """Return ``init_fn`` as a function of a key alone; ``params`` gives the shapes."""
    if init_fn == "torch_default":
        return lambda key: torch_default(check_key("key", key), params)
    if not callable(init_fn):
        raise UsageError(f'init_fn = {init_fn!r} must be a function of a key, or "torch_default"')
    return lambda key: init_fn(check_key("key", key))


def reinitialise(key: jax.Array, params: PyTree, mask: masks.Mask, init_fn: Initialiser) -> PyTree:
    """Return ``params`` with the masked leaves reinitialized, bit for bit what ``init_fn`` returns.

    Args:
      key: a random key; use a new one for every event, or all events give the same weights.
      params: pytree of arrays.
      mask: the forget subtree, in any form of :mod:`seal_jax.masks`.
      init_fn: maps a key to a whole tree like ``params`` (the model's own initialisation), or
        "torch_default".

    Raises:
      UsageError: ``init_fn`` returns another structure, or other shapes, than ``params``.

    >>> params = {"conv": jnp.ones(2), "fc": jnp.ones(2)}
    >>> fresh = reinitialise(
    ...     jax.random.key(0), params, "fc", lambda key: {"conv": jnp.zeros(2), "fc": jnp.zeros(2)}
    ... )
    >>> fresh["conv"].tolist(), fresh["fc"].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    return reinitialise_selected(key, params, masks.resolve(mask, params), init_fn)


def replace(params: PyTree, fresh: PyTree, selection: PyTree) -> PyTree:
    """Return ``params`` with the selected entries taken from ``fresh``, bit for bit.

    Args:
      params: pytree of arrays.
      fresh: a tree like ``params``; its values are cast to their dtypes.
      selection: a tree of bool as in :mod:`seal_jax.selections`; may be traced.

    Raises:
      UsageError: ``fresh`` or ``selection`` has another structure, or other shapes.

    >>> old, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([8.0, 9.0])}
    >>> replace(old, new, {"w": jnp.array([False, True])})["w"].tolist()
    [1.0, 9.0]
    """
    selections.check(selection, params)
    check_like(fresh, params)

    def choose(chosen, new, old):
        # A static mask decides at trace time, so that a leaf which is kept costs nothing in the program.
        if isinstance(chosen, bool):
            return jnp.asarray(new, old.dtype) if chosen else old
        return jnp.where(chosen, jnp.asarray(new, old.dtype), old)

    return jax.tree.map(choose, selection, fresh, params)


def reinitialise_selected(
    key: jax.Array, params: PyTree, selection: PyTree, init_fn: Initialiser
) -> PyTree:
    r"""Return ``params`` with the selected entries reinitialized, bit for bit as by ``init_fn``.

    Like :func:`reinitialise`, for parts of tensors, with a tree of bool ``selection`` as in
    :mod:`seal_jax.selections`: :math:`w \leftarrow (1 - s) \odot w + s \odot \eta`.

    References:
      Alabdulmohsin et al., `The Impact of Reinitialization on Generalization in Convolutional Neural
      Networks`, 2022, eq. 1.

    >>> params, smallest = {"w": jnp.array([5.0, 1.0])}, {"w": jnp.array([False, True])}
    >>> zeros = lambda key: {"w": jnp.zeros(2)}
    >>> reinitialise_selected(jax.random.key(0), params, smallest, zeros)["w"].tolist()
    [5.0, 0.0]
    """
    return replace(params, initialiser(init_fn, params)(key), selection)


def shrink_and_perturb(
    key: jax.Array,
    params: PyTree,
    init_fn: Initialiser,
    *,
    shrink: Any = 0.4,
    perturb: Any = 0.1,
    mask: masks.Mask | None = None,
) -> PyTree:
    r"""Return ``params`` moved towards zero and mixed with fresh initial values.

    .. math:: w \leftarrow \lambda w + \sigma \eta

    Args:
      key: a random key; use a new one for every event.
      params: pytree of arrays.
      init_fn: maps a key to a whole tree like ``params``, :math:`\eta`, or "torch_default".
      shrink: :math:`\lambda`, in [0, 1]; may be traced.
      perturb: :math:`\sigma`, at least 0; may be traced.
      mask: the parameters to change, in any form of :mod:`seal_jax.masks`; ``None`` for all.

    References:
      Ash and Adams, `On Warm-Starting Neural Network Training`, 2020 ("shrink, perturb, repeat"; the
      defaults are those of the released code's example).

    >>> params = {"conv": jnp.full(2, 10.0), "fc": jnp.full(2, 20.0)}
    >>> ones = lambda key: jax.tree.map(jnp.ones_like, params)
    >>> new = shrink_and_perturb(jax.random.key(0), params, ones, shrink=0.5, perturb=0.25)
    >>> new["conv"].tolist(), new["fc"].tolist()
    ([5.25, 5.25], [10.25, 10.25])
    """
    check_number("shrink", shrink, lambda value: 0 <= value <= 1, "lie in [0, 1]")
    check_number("perturb", perturb, nonnegative, "be 0 or positive")
    fresh = initialiser(init_fn, params)(key)
    check_like(fresh, params)

    def mix(flag, new, old):
        return (shrink * old + perturb * new).astype(old.dtype) if flag else old

    # Not by a mask that is True everywhere: ``resolve`` refuses one that splits nothing.
    if mask is None:
        return jax.tree.map(partial(mix, True), fresh, params)
    return jax.tree.map(mix, masks.resolve(mask, params), fresh, params)


def shrink_by_direction(
    params: PyTree,
    gradient: PyTree,
    *,
    least: Any = 0.3,
    layout: layers.Layout | None = None,
) -> PyTree:
    r"""Return ``params`` with the weights of each neuron shrunk, the more the less its descent goes their way.

    .. math:: w \leftarrow \max(\cos(w, -g), \lambda) \, w

    w are the weights of one unit, g the part of the gradient that belongs to them: the incoming weights of a neuron in
    a dense layer, the positions of one input and output channel in a convolution (so in one of 1x1 the cosine is a
    sign), all biases of a layer together. What belongs to no kernel, such as normalisations, stays. The
    cosine with a gradient of zero counts as 0.

    Args:
      params: pytree of arrays.
      gradient: of the loss, a tree like ``params``; usually an average over batches.
      least: :math:`\lambda`, the least factor, in [0, 1]; may be traced.
      layout: which axes of kernels are inputs; see :func:`seal_jax.layers.fans`.

    References:
      Shin et al., `DASH: Warm-Starting Neural Network Training in Stationary Settings without Loss of Plasticity`,
      2024; what a unit is, and the default, are those of its released code.

    >>> params = {"kernel": jnp.array([[2.0, 2.0], [0.0, 0.0]])}
    >>> gradient = {"kernel": jnp.array([[-1.0, 1.0], [0.0, 0.0]])}  # descent lengthens the first neuron's weights
    >>> shrink_by_direction(params, gradient, least=0.5)["kernel"].tolist()
    [[2.0, 1.0], [0.0, 0.0]]
    """
    check_number("least", least, lambda value: 0 <= value <= 1, "lie in [0, 1]")
    slopes = [slope for _, slope, _ in paths.aligned("gradient", gradient, params)]
    kinds = layers.roles(params)

    def shrink(path, leaf, slope, role):
        if role == "norm" or path.rpartition("/")[2] in layers.EMBEDDINGS:
            return leaf
        axes = tuple(range(leaf.ndim))
        if role == "kernel":
            torch = layers.layout_of(path, layout) == "out_in"
            # Of two axes the inputs' alone; of more all but inputs and outputs, which are then positions.
            axes = axes[2:] if torch else axes[:-2]
            axes = axes or ((1,) if torch else (0,))
        # Each made a unit vector by itself: a product of small norms would vanish in float32.
        unit, towards = (_unit(x.astype(jnp.float32), axes) for x in (leaf, -slope))
        cosine = jnp.sum(unit * towards, axes, keepdims=True)
        return (jnp.clip(cosine, least, 1) * leaf).astype(leaf.dtype)

    return paths.map_named(shrink, params, slopes, kinds)


def _unit(vector: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return ``vector`` at norm 1 over some axes, 0 where it is zero."""
    # By the largest entry first, whose square then neither overflows nor vanishes.
    size = jnp.max(jnp.abs(vector), axes, keepdims=True)
    vector = vector / jnp.where(size > 0, size, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(vector), axes, keepdims=True))
    return vector / jnp.where(norm > 0, norm, 1)


def check_like(fresh: PyTree, params: PyTree) -> None:
    """Raise ``UsageError`` unless ``fresh`` has the structure and the shapes of ``params``."""
    for path, new, old in paths.aligned("the result of init_fn", fresh, params):
        if jnp.shape(new) != jnp.shape(old):
            raise UsageError(
                f"init_fn returns shape {jnp.shape(new)} for {path!r}, expected {jnp.shape(old)}"
            )


def forget_state(
    tx: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    mask: masks.Mask,
    policy: StatePolicy = "fresh",
) -> PyTree:
    """Return the optimizer state that belongs to reinitialized parameters.

    Args:
      tx: the optimizer.
      opt_state: its state. Clocks (the steps of schedules, of generations) are kept by every policy,
        and so are the masks and the snapshot of pruning, which are no memory of past gradients.
      params: the parameters after the event.
      mask: the parameters that were reinitialized.
      policy: "fresh" resets the memory of ALL parameters to that of a new optimizer (the released
        LLF code); "zero" sets that of the masked ones to zero; "keep" changes nothing.

    Raises:
      UsageError: "zero" for an optimizer such as Adam, whose memory of masked and other parameters
        has a count in common: see :func:`seal_jax.transforms.split_state`.

    >>> params, tx = {"conv": jnp.ones(()), "fc": jnp.ones(())}, optax.trace(decay=0.9)
    >>> _, state = tx.update(params, tx.init(params))
    >>> state = forget_state(tx, state, params, "fc", "zero")
    >>> float(state.trace["conv"]), float(state.trace["fc"])
    (1.0, 0.0)
    """
    check_choice("policy", policy, get_args(StatePolicy))
    # Only the structure is compared, so ``tx.init`` need not run.
    paths.check_tree("opt_state", opt_state, jax.eval_shape(tx.init, params), "tx.init(params)")
    if policy == "keep":
        return opt_state
    # Zeros can be given to some parameters only if no leaf counts for masked and other parameters together.
    if policy == "zero":
        fresh, flags = jax.tree.map(jnp.zeros_like, opt_state), masks.resolve(mask, params)
        # The masks of pruning stay in any case, so their count does not matter here.
        memory = jax.tree.map(
            lambda node: None if pruning.is_state(node) else node,
            opt_state,
            is_leaf=pruning.is_state,
        )
        if optimizer_state.shares(memory, params, flags):
            raise UsageError(
                "policy = 'zero' needs a count of its own for the masked parameters: "
                "use seal_jax.transforms.split_state(optimizer, mask) as the optimizer, or 'fresh'"
            )
    else:
        fresh, flags = tx.init(params), None
    # ``restart=False``: schedules restart by the clock of generations inside the optimizer, not by the event.
    new = optimizer_state.reinitialise(opt_state, fresh, params, flags, when=True, restart=False)
    # What pruning keeps has the structure of the parameters and so passes for memory: put it back.
    return jax.tree.map(
        lambda old, reset: old if pruning.is_state(old) else reset,
        opt_state,
        new,
        is_leaf=pruning.is_state,
    )
