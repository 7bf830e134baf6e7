"""The compiled programs of a run: initialise, start a generation, train, validate, test.

Each is one ``jit`` of a ``shard_map`` over the mesh: a device holds some of the seeds and, of each
batch, a part. Seeds never communicate. Along the data axis a training step has one reduction, of
gradients, statistics and metrics together (and BatchNorm's own, if its statistics are global).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from seal_jax.data import augment, device
from seal_jax.generations import Clock
from seal_jax.methods import Method
from seal_jax.models import Model
from seal_jax.training import mesh as meshes
from seal_jax.training.state import (
    State,
    Stream,
    Tally,
    Weights,
    empty_best,
    empty_tally,
    stream_key,
)

PyTree = Any


class Arrays(NamedTuple):
    """A split on the device: flat uint8 ``images [n, h*w*c]`` and int32 ``labels [n]``."""

    images: jax.Array
    labels: jax.Array


class Batch(NamedTuple):
    """A whole batch: ``rows`` of the data, their ``weights`` (0 for filling) and random ``draws``."""

    rows: jax.Array
    weights: jax.Array
    draws: augment.Draws | None


@dataclasses.dataclass(frozen=True)
class Programs:
    """Builds the compiled programs of one experiment.

    Attributes:
      model: the network.
      method: how it is trained.
      clock: epochs and generations.
      augmentation: what happens to training images; its normalisation also to the others.
      mesh: the devices.
      batching: how the seeds of one device run, "vmap" or "map".
      train_size: images in the training split.
      batch_size: images a step and seed, over the data axis.
      drop_last: whether an epoch leaves out the images that do not fill a batch.
      steps_per_call: steps in one call of ``train``; divides ``clock.steps_per_epoch``.
      eval_batch_size: images a step of evaluation.
      validate_size: images in the validation split.
      test_size: images in the test split.
    """

    model: Model
    method: Method
    clock: Clock
    augmentation: augment.Augmentation
    mesh: Mesh
    batching: str
    train_size: int
    batch_size: int
    drop_last: bool
    steps_per_call: int
    eval_batch_size: int
    validate_size: int
    test_size: int

    def _compile(self, function, *, shared: int = 0, donate: bool = False):
        """Jit a function of one seed's state (and of ``shared`` arrays) over the mesh."""
        spread = jax.shard_map(
            meshes.over_seeds(function, self.batching),
            mesh=self.mesh,
            in_specs=(meshes.BY_SEED, *(meshes.REPLICATED,) * shared),
            out_specs=meshes.BY_SEED,
        )
        return jax.jit(spread, donate_argnums=(0,) if donate else ())

    @functools.cached_property
    def init(self):
        """``init(seeds uint32 [seeds]) -> State``."""
        return self._compile(self._init)

    @functools.cached_property
    def start_generation(self):
        """``start_generation(state) -> State``: the method's forgetting event; donates."""
        return self._compile(self._start_generation, donate=True)

    @functools.cached_property
    def train(self):
        """``train(state, Arrays) -> (State, losses [seeds, steps_per_call])``; donates."""
        return self._compile(self._train, shared=1, donate=True)

    @functools.cached_property
    def validate(self):
        """``validate(state, Arrays) -> (State, Tally [seeds])``: also keeps the best; donates."""
        return self._compile(self._validate, shared=1, donate=True)

    @functools.cached_property
    def test(self):
        """``test(Weights, Arrays) -> Tally [seeds]``."""
        return self._compile(functools.partial(self._evaluate, self.test_size), shared=1)

    @functools.cached_property
    def finite(self):
        """``finite(state) -> bool [seeds]``: whether every parameter and statistic is a number."""
        return self._compile(
            lambda state: jnp.all(
                jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.weights)])
            )
        )

    def abstract_state(self, seeds: int) -> State:
        """Return the state's shapes and shardings, to restore a checkpoint against."""
        shapes = jax.eval_shape(self.init, jax.ShapeDtypeStruct((seeds,), jnp.uint32))
        sharding = NamedSharding(self.mesh, meshes.BY_SEED)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )

    def _init(self, seed: jax.Array) -> State:
        variables = self.model.init(stream_key(seed, Stream.INIT, 0))
        weights = Weights(variables["params"], variables.get("batch_stats", {}))
        return State(
            step=jnp.zeros((), jnp.int32),
            seed=seed,
            weights=weights,
            opt_state=self.method.tx.init(weights.params),
            tally=empty_tally(),
            best=empty_best(weights) if self.validate_size else None,
        )

    def _start_generation(self, state: State) -> State:
        weights, opt_state = state.weights, state.opt_state
        if self.method.on_generation_start is not None:
            key = stream_key(state.seed, Stream.EVENT, self.clock.generation(state.step))
            params, opt_state = self.method.on_generation_start(key, weights.params, opt_state)
            weights = weights._replace(params=params)
        best = empty_best(weights) if state.best is not None else None
        return state._replace(weights=weights, opt_state=opt_state, best=best)

    def _train(self, state: State, data: Arrays) -> tuple[State, jax.Array]:
        steps = self.clock.steps_per_epoch
        # Whatever is random is drawn ahead of the scan: in the step it would be many tiny kernels.
        with jax.named_scope("shuffle"):
            key = stream_key(state.seed, Stream.ORDER, self.clock.epoch(state.step))
            order = device.epoch_order(key, self.train_size, self.batch_size, self.drop_last)
            rows, example_weights = (
                jax.lax.dynamic_slice_in_dim(part, state.step % steps, self.steps_per_call)
                for part in order
            )
        with jax.named_scope("augment"):
            draws = jax.vmap(
                lambda step: augment.draw(
                    stream_key(state.seed, Stream.AUGMENT, step),
                    self.batch_size,
                    self.augmentation,
                    self.model.image_shape,
                )
            )(state.step + jnp.arange(self.steps_per_call))
        starts_epoch = state.step % steps == 0
        tally = jax.tree.map(lambda total: jnp.where(starts_epoch, 0.0, total), state.tally)
        return jax.lax.scan(
            lambda carry, batch: self._step(carry, data, batch),
            state._replace(tally=tally),
            Batch(rows, example_weights, draws),
        )

    def _step(self, state: State, data: Arrays, batch: Batch) -> tuple[State, jax.Array]:
        """One step of one seed on a whole batch, of which this device takes its part."""
        total = batch.weights.sum()
        rows, example_weights, draws = self._my_part(batch, self.batch_size)
        images, labels = self._images(data, rows, draws)
        # Weights are the same along the data axis; what comes of them here is not, until reduced.
        weights = jax.lax.pcast(state.weights, meshes.DATA, to="varying")

        def objective(params):
            variables = {"params": params, "batch_stats": weights.batch_stats}
            logits, changed = self.model.module.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            losses = example_weights * self.method.loss(logits, labels)
            correct = example_weights * (logits.argmax(-1) == labels)
            sums = Tally(losses.sum(), correct.sum(), example_weights.sum())
            return losses.sum() / total, (changed.get("batch_stats", {}), sums)

        (_, (statistics, sums)), gradient = self.method.gradient(objective, weights.params)
        with jax.named_scope("gradient_reduce"):
            shares = self.mesh.shape[meshes.DATA]
            statistics = jax.tree.map(lambda leaf: leaf / shares, statistics)
            gradient, statistics, sums = jax.lax.psum((gradient, statistics, sums), meshes.DATA)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.method.tx.update(
                gradient, state.opt_state, state.weights.params
            )
            params = optax.apply_updates(state.weights.params, updates)
        after = state._replace(
            step=state.step + 1,
            weights=Weights(params, statistics),
            opt_state=opt_state,
            tally=jax.tree.map(jnp.add, state.tally, sums),
        )
        return after, sums.loss / sums.weight

    def _my_part(self, tree: PyTree, batch: int) -> PyTree:
        """Return this device's rows of arrays over a whole batch."""
        size = batch // self.mesh.shape[meshes.DATA]
        start = jax.lax.axis_index(meshes.DATA) * size
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), tree)

    def _images(
        self, data: Arrays, rows: jax.Array, draws: augment.Draws | None
    ) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("gather"):
            images = device.take(data.images, rows, self.model.image_shape)
            labels = jnp.take(data.labels, rows, mode="clip")
        with jax.named_scope("augment"):
            images = augment.apply(images, draws, self.augmentation, self.model.module.dtype)
        return images, labels

    def _validate(self, state: State, data: Arrays) -> tuple[State, Tally]:
        sums = self._evaluate(self.validate_size, state.weights, data)
        assert state.best is not None  # there is a validation split
        accuracy = sums.correct / sums.weight
        better = accuracy > state.best.accuracy
        epoch = self.clock.epoch(state.step) - 1
        candidate = state.best._replace(accuracy=accuracy, epoch=epoch, weights=state.weights)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), candidate, state.best)
        return state._replace(best=best), sums

    def _evaluate(self, size: int, weights: Weights, data: Arrays) -> Tally:
        """Score a split in inference mode; ``size`` is its number of images."""
        shares = self.mesh.shape[meshes.DATA]
        batch = -(-min(self.eval_batch_size, size) // shares) * shares
        order = device.padded_batches(size, batch)
        variables = weights._asdict()

        def score(sums, whole):
            rows, example_weights = self._my_part(whole, batch)
            images, labels = self._images(data, rows, None)
            logits = self.model.module.apply(variables, images, train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            correct = (logits.argmax(-1) == labels) * example_weights
            part = Tally((losses * example_weights).sum(), correct.sum(), example_weights.sum())
            return jax.tree.map(jnp.add, sums, part), None

        zero = jax.lax.pcast(empty_tally(), (meshes.SEED, meshes.DATA), to="varying")
        sums, _ = jax.lax.scan(score, zero, jax.tree.map(np.asarray, order))
        return jax.lax.psum(sums, meshes.DATA)
