"""The normalisation that layerwise reinitialisation inserts after a block of a finished round."""

import jax
import jax.numpy as jnp
from flax import linen as nn

COLLECTION = "normalisers"


def inserted_normaliser(module: nn.Module, x: jax.Array) -> jax.Array:
    r"""Return :math:`(x - \mu) / \sigma` if the collection "normalisers" has an entry for ``module``.

    The entry is ``{"mean": mu, "scale": 1 / sigma}``, float32 scalars under the module's own path:
    model state that is never trained and that ``apply`` never changes. Mean 0 and scale 1 give ``x``
    itself, bit for bit, though XLA may fuse, and so round, what lies around it another way. Without
    an entry nothing is added to the program.

    Args:
        module: the block whose output ``x`` is, from within its ``__call__``.
        x: any shape and dtype; the arithmetic is float32.

    Returns:
        An array of the shape and the dtype of ``x``.

    References:
        Alabdulmohsin, Maennel and Keysers, `The Impact of Reinitialization on Generalization in
        Convolutional Neural Networks`, algorithm 1, lines 8 and 10.
    """
    if not module.has_variable(COLLECTION, "mean"):
        return x
    mean: jax.Array = module.get_variable(COLLECTION, "mean")
    scale: jax.Array = module.get_variable(COLLECTION, "scale")
    return ((x.astype(jnp.float32) - mean) * scale).astype(x.dtype)
