"""A trained network for images of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from seal_jax import paths
from seal_jax.errors import UsageError

if TYPE_CHECKING:
    from seal_jax.models import Model


def resized(model: Model, image_shape: tuple[int, int, int]) -> Model:
    """Return the model for images of ``(height, width, channels)``, its parameters the same.

    Raises:
      UsageError: the images are too small, or the network has another shape for them.
    """
    from seal_jax import models

    found = models.from_module(model.module, name=model.name, image_shape=image_shape)
    there, here = (
        {path: leaf.shape for path, leaf in paths.named_leaves(tree)}
        for tree in (jax.eval_shape(each.init, jax.random.key(0)) for each in (model, found))
    )
    # Where features are flattened for a dense layer, its kernel depends on the size of the images.
    for path, shape in there.items():
        if here.get(path) != shape:
            wanted = "x".join(map(str, model.image_shape))
            given = "x".join(map(str, image_shape))
            raise UsageError(
                f"image_size: {model.name} was made for images of {wanted} and cannot take {given}: "
                f"its {path} would change from {list(shape)} to {list(here[path])}; use {wanted}"
            )
    return found
