"""A tiny network of each family, with drawn variables."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from seal_jax import models


def draw_variables(spec: Any, seed: int = 2) -> Any:
    """Draw arrays in the shapes of ``spec``.

    Norms are away from their initial 0 and 1, where a swapped or forgotten one would go unseen.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1] in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif path[-1] == "kernel":
            value = rng.normal(scale=np.sqrt(2 / np.prod(leaf.shape[:-1])), size=leaf.shape)
        else:
            value = rng.normal(size=leaf.shape)
        return value.astype(np.float32)

    return traverse_util.path_aware_map(draw, spec)


# One tiny network of each class. Images are 8x6: a swap of height and width would show.
FAMILIES: dict[str, Any] = {
    "resnet": functools.partial(models.ResNet, stage_sizes=(1, 1), width=4, stem="cifar"),
    "wide_resnet": functools.partial(models.WideResNet, depth=10, width=4, stem_width=2),
    "scnn": functools.partial(models.SimpleCNN, widths=(3, 4, 5, 3), dense_width=5),
    "vgg": functools.partial(
        models.VGG, group_sizes=(1, 2, 1, 1), widths=(3, 2, 4, 3), dense_width=5
    ),
    "mobilenet": functools.partial(models.MobileNet, widths=(3, 4, 5), strides=(2, 1, 2)),
    "densenet": functools.partial(
        models.DenseNet, block_sizes=(2, 1), growth=2, bottleneck=2, width=4, stem="cifar"
    ),
    "vit": functools.partial(models.ViT, patch=2, width=4, depth=2),
    "mlp": functools.partial(models.MLP, hidden=(5, 3)),
}


class Family(NamedTuple):
    """A tiny network with drawn variables and normalisers, and images for it."""

    model: models.Model
    variables: Any
    images: np.ndarray


@functools.cache
def make_family(family: str, **fields: Any) -> Family:
    module = FAMILIES[family](num_classes=3, **fields)
    model = models.from_module(module, name=family, image_shape=(8, 6, 3))
    variables = draw_variables(jax.eval_shape(model.init, jax.random.key(0)))
    variables["normalisers"] = draw_variables(jax.eval_shape(model.empty_normalisers), seed=3)
    images = np.random.default_rng(0).normal(size=(4, 8, 6, 3)).astype(np.float32)
    return Family(model, variables, images)
