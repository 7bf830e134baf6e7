"""Initial values of a classifier head, by name."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from seal_jax import layers, paths
from seal_jax.errors import UsageError, check_choice, check_key, check_number, positive

PyTree = Any
Name = Literal["zero", "tiny", "normal", "kaiming_fan_in", "kaiming_fan_out", "xavier"]


def check(name: str, sigma: float | None = None) -> None:
    """Raise ``UsageError`` unless ``name`` and ``sigma`` go together: see :func:`initialise`.

    >>> check("normal")
    Traceback (most recent call last):
    ...
    seal_jax.errors.UsageError: head = "normal" needs sigma, its standard deviation, e.g. 0.1
    """
    check_choice("head", name, get_args(Name), suggest=True)
    if name == "normal":
        if sigma is None:
            raise UsageError('head = "normal" needs sigma, its standard deviation, e.g. 0.1')
        check_number("sigma", sigma, positive, "be positive")
    elif sigma is not None:
        raise UsageError(f'sigma = {sigma!r} goes with head = "normal" only, not {name!r}')


def initialise(
    key: jax.Array,
    head_params: PyTree,
    name: Name = "zero",
    sigma: float | None = None,
    *,
    layout: layers.Layout | None = None,
) -> PyTree:
    r"""Return fresh values for a head: kernels as the name says, biases 0.

    ===================  ==========================================================================
    ``zero``             0: every prediction is 1/N, the first gradient of the features 0 (FAST)
    ``tiny``             :math:`N(0, (10^{-8})^2)`, FAST's other choice
    ``normal``           :math:`N(0, \sigma^2)`
    ``kaiming_fan_in``   :math:`N(0, 2 / D)`
    ``kaiming_fan_out``  :math:`N(0, 2 / N)`
    ``xavier``           :math:`U(\pm\sqrt{6 / (D + N)})`
    ===================  ==========================================================================

    Args:
      key: a random key; use a new one for every head.
      head_params: arrays or ``jax.ShapeDtypeStruct``, for structure, shapes and dtypes: kernels of
        two dimensions, D features by N classes or the other way round, and biases of one.
      name: one of the above.
      sigma: the standard deviation of "normal".
      layout: "in_out" for kernels ``[D, N]``, "out_in" for ``[N, D]``; by default inferred from
        their names, see :func:`seal_jax.layers.fans`.

    References:
      Varno et al., `Learn Faster and Forget Slower via Fast and Stable Task Adaptation`, eq. 15 and
      section 6.2.1 (which writes the standard deviation, not the variance, into N); He et al.,
      `Delving Deep into Rectifiers`, 2015, eq. 10 and 14, gain :math:`\sqrt 2`; Glorot & Bengio,
      2010, eq. 16.

    >>> head = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    >>> initialise(jax.random.key(0), head)["bias"].tolist()
    [0.0, 0.0]
    >>> bool(abs(initialise(jax.random.key(0), head, "xavier")["kernel"]).max() <= 1)
    True
    """
    check(name, sigma)
    check_key("key", key)

    def draw(path, leaf, index, role):
        # A bias in a tree without its kernel has the role of a norm: it is recognized by its name.
        is_kernel = role == "kernel" and len(leaf.shape) == 2
        if not (is_kernel or role == "bias" or path.rpartition("/")[2] in layers.BIASES):
            raise UsageError(
                f"head parameter {path!r} of shape {tuple(leaf.shape)} is neither a kernel of two "
                "dimensions nor a bias: give the classifier's last layer alone"
            )
        if not is_kernel:
            return jnp.zeros(leaf.shape, leaf.dtype)
        # [features, classes] or [classes, features]; ``fans`` tells them apart.
        features, classes = layers.fans(path, leaf.shape, layout)
        leaf_key = jax.random.fold_in(key, index)
        if name == "zero":
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name == "xavier":
            bound = math.sqrt(6 / (features + classes))
            return jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)
        # The whole table is computed for every name, so ``sigma`` may be None here.
        deviation = {
            "tiny": 1e-8,
            "normal": sigma or 0.0,
            "kaiming_fan_in": math.sqrt(2 / features),
            "kaiming_fan_out": math.sqrt(2 / classes),
        }[name]
        # In float32: in bfloat16 a normal has few distinct values, and 1e-8 few of their digits.
        noise = jax.random.normal(leaf_key, leaf.shape, jnp.float32)
        return (deviation * noise).astype(leaf.dtype)

    roles = layers.roles(head_params)
    return paths.map_named(draw, head_params, range(len(roles)), roles)
