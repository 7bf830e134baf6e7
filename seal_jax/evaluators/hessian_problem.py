"""The loss of a network whose Hessian is taken, its batches, and its operators."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seal_jax import data, hessian, masks
from seal_jax.data import Augmentation, Split
from seal_jax.evaluators.loaded_run import Network
from seal_jax.losses import cross_entropy

PyTree = Any
BATCH = "batch"


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean cross entropy of a batch; equal ones share their compiled programs.

    Attributes:
      module: the network.
      augmentation: of images that come with draws, and the normalisation of all.
      smoothing: of the labels.
      train: whether BatchNorm uses the batch's own statistics, and dropout drops, always alike.
    """

    module: Any
    augmentation: Augmentation
    smoothing: float
    train: bool

    def __call__(self, variables: PyTree, batch: dict[str, Any]) -> jax.Array:
        """Return the mean over the images of weight 1."""
        images = data.apply(batch["images"], batch["draws"], self.augmentation)
        if self.train:
            logits, _ = self.module.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
        else:
            logits = self.module.apply(variables, images, train=False)
        losses = cross_entropy(logits, batch["labels"], self.smoothing)
        return jnp.sum(batch["weights"] * losses) / jnp.sum(batch["weights"])


@dataclasses.dataclass(frozen=True)
class Batches:
    """Which images make up the batches; the images themselves are read when they are needed.

    Attributes:
      split: the data.
      rows: ``[batches, batch]``.
      weights: the same, 0 for filling.
      draws: random numbers of the augmentation, leaves ``[batches, batch, ...]``, or ``None``.
    """

    split: Split
    rows: np.ndarray
    weights: np.ndarray
    draws: data.Draws | None

    def read(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Return batches as the loss takes them, on the host."""
        part = slice(start, stop)
        rows = self.rows[part]
        return {
            "images": self.split.images[rows],
            "labels": self.split.labels[rows],
            "weights": self.weights[part],
            "draws": jax.tree.map(lambda leaf: leaf[part], self.draws),
        }

    @functools.cached_property
    def whole(self) -> dict[str, Any]:
        """All batches, on the host."""
        return self.read()


def all_images(split: Split, batch_size: int, drop: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and weights of every image once; without those that fill no batch if ``drop``."""
    rows, weights = data.padded_batches(len(split), batch_size)
    return (rows[weights.all(1)], weights[weights.all(1)]) if drop else (rows, weights)


def one_epoch(
    split: Split, batch_size: int, drop: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and weights of the mini-batches of an epoch in random order."""
    rows, weights = data.epoch_order(jax.random.key(seed), len(split), batch_size, drop)
    return np.asarray(rows), np.asarray(weights)


def draws(rows: np.ndarray, split: Split, spec: Augmentation, seed: int) -> data.Draws | None:
    """Return the random numbers that augment batches; ``None`` where the run augmented nothing."""
    if not spec.is_random:
        return None
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(rows))
    shape: tuple[int, int, int] = split.images.shape[1:]
    found = jax.vmap(lambda key: data.draw(key, rows.shape[1], spec, shape))(keys)
    return jax.tree.map(np.asarray, found)


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters whose Hessian is taken.

    Attributes:
      patterns: rules of :mod:`seal_jax.masks`, ``None`` for all parameters.
    """

    patterns: tuple[str, ...] | None

    def of(self, network: Network) -> tuple[PyTree, Any]:
        """Return a network's variables and the mask of the operator.

        Statistics are variables too, so that networks differ in arguments of one program alone.

        Raises:
          UsageError: the patterns select no parameter, or every one.
        """
        variables = {
            name: tree for name, tree in network.variables.items() if jax.tree.leaves(tree)
        }
        own: Any = True
        if self.patterns is not None:
            own = masks.resolve(self.patterns, variables["params"])
        if own is True and len(variables) == 1:
            return variables, None
        return variables, {name: own if name == "params" else False for name in variables}

    def shapes(self, network: Network) -> PyTree:
        """Return a vector of the operator, as host arrays."""
        variables, mask = self.of(network)
        if mask is None:
            return variables
        flags = masks.resolve(mask, variables)
        return jax.tree.map(lambda leaf, flag: leaf if flag else None, variables, flags)


def mesh(batch_size: int) -> Mesh:
    """Return as many of this process' devices as divide a batch."""
    devices = jax.local_devices()
    count = math.gcd(len(devices), batch_size)
    return jax.make_mesh((count,), (BATCH,), axis_types=(AxisType.Auto,), devices=devices[:count])


class Operators:
    """The Hessians of networks over all data, divided over the devices by images.

    Args:
      loss: of a batch.
      batches: of all data.
      part: which parameters.
      weight_decay: of the L2 term.
      byte_budget: for the data on the devices; more is streamed from the host.
    """

    def __init__(
        self,
        loss: Loss,
        batches: Batches,
        part: Part,
        weight_decay: float,
        byte_budget: int | None,
    ):
        self._loss, self._batches, self._part = loss, batches, part
        self._weight_decay, self._budget = weight_decay, byte_budget
        self._mesh = mesh(batches.rows.shape[1])

    def of(self, network: Network) -> hessian.Operator | hessian.Streamed:
        """Return the operator of a network."""
        variables, mask = self._part.of(network)
        placed = jax.device_put(variables, NamedSharding(self._mesh, PartitionSpec()))
        options: dict[str, Any] = {
            "weights": self._batches.weights,
            "mask": mask,
            "weight_decay": self._weight_decay,
        }
        if self._budget is None or self._bytes <= self._budget:
            return hessian.operator(self._loss, placed, self._on_device, **options)
        return hessian.streamed(
            self._loss,
            placed,
            self._batches.whole,
            byte_budget=self._budget,
            sharding=self._sharding,
            **options,
        )

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(None, BATCH))

    @property
    def _bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._batches.whole))

    @functools.cached_property
    def _on_device(self) -> PyTree:
        return jax.device_put(self._batches.whole, self._sharding)
