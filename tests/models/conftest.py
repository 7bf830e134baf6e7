"""One forward pass of a tiny network, for every independent implementation to agree with."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, Family, draw_variables, make_family
from flax import traverse_util

from seal_jax.models import ResNet

# block, stem, shortcut: every value of each.
KINDS = [
    ("basic", "imagenet", "B"),
    ("basic", "cifar", "A"),
    ("bottleneck", "cifar", "B"),
    ("bottleneck", "imagenet", "B"),
]


@dataclasses.dataclass(frozen=True)
class Forward:
    """Parameters and statistics by flat path, and what the network made of the images."""

    block: str
    stem: str
    shortcut: str
    images: np.ndarray
    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    inferred: np.ndarray
    trained: np.ndarray
    new_stats: dict[str, np.ndarray]


@functools.cache
def forward(block: str, stem: str, shortcut: str) -> Forward:
    module = ResNet(
        num_classes=3, stage_sizes=(2, 1), block=block, width=4, stem=stem, shortcut=shortcut
    )
    # One side even at every stride, where SAME would pad otherwise, the other odd at first.
    images = np.random.default_rng(0).normal(size=(3, 20, 13, 3)).astype(np.float32)
    spec = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(0), jnp.asarray(images)
    )

    variables = draw_variables(spec)

    @jax.jit
    def both(variables: Any, images: jax.Array) -> Any:
        inferred = module.apply(variables, images, train=False)
        return inferred, module.apply(variables, images, train=True, mutable=["batch_stats"])

    inferred, (trained, update) = jax.device_get(both(variables, images))
    flat = functools.partial(traverse_util.flatten_dict, sep="/")
    return Forward(
        block,
        stem,
        shortcut,
        images,
        flat(variables["params"]),
        flat(variables["batch_stats"]),
        inferred,
        trained,
        flat(update["batch_stats"]),
    )


@pytest.fixture(params=KINDS, ids="-".join)
def tiny(request: pytest.FixtureRequest) -> Forward:
    return forward(*request.param)


@pytest.fixture
def tiny_of() -> Callable[..., Family]:
    """The tiny network of a family with other fields."""
    return make_family


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Every family in turn, with its default fields."""
    return make_family(request.param)
