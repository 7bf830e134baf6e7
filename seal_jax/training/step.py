"""The compiled programs of a run: initialise, start a generation, train, validate, test.

Each is one ``jit`` of a ``shard_map`` over the mesh: a device holds some of the seeds and, of each
batch, a part. Seeds never communicate. Along the data axis a training step has one reduction, of
gradients, statistics and metrics together (and BatchNorm's own, if its statistics are global).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from seal_jax.core import mesh as meshes
from seal_jax.core.state import (
    MetricSums,
    State,
    Stream,
    Weights,
    empty_best,
    empty_metric_sums,
    stream_key,
)
from seal_jax.data import device
from seal_jax.generations import Clock
from seal_jax.losses import cross_entropy
from seal_jax.methods.method import HookContext, Method
from seal_jax.models import Model
from seal_jax.training import problems
from seal_jax.training.batches import Arrays, Batches, Step
from seal_jax.training.early_stopping import EarlyStopping, with_clocks
from seal_jax.training.pretrained import NORMALISERS, inserted, merge

PyTree = Any
TOP = 5


class Start(NamedTuple):
    """What a training starts from: its ``seed``, and ``given`` arrays by the leaf's name."""

    seed: jax.Array
    given: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Builds the compiled programs of one experiment.

    Attributes:
      model: the network.
      method: how it is trained.
      clock: epochs and generations.
      batches: the training batches.
      early_stopping: early stopping and plateaus; ``None`` where neither is on.
      mesh: the devices.
      batching: how the seeds of one device run, "vmap" or "map".
      steps_per_call: steps in one call of ``train``; divides ``clock.steps_per_epoch``.
      total_steps: of the whole training.
      eval_batch_size: images a step of evaluation.
      validate_size: images in the validation split.
      test_size: images in the test split.
    """

    model: Model
    method: Method
    clock: Clock
    batches: Batches
    early_stopping: EarlyStopping | None
    mesh: Mesh
    batching: str
    steps_per_call: int
    total_steps: int
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
        """``init(Start, Arrays) -> State``, every leaf of the first with the seeds' axis."""
        return self._compile(self._init, shared=1)

    @functools.cached_property
    def start_generation(self):
        """``start_generation(state, Arrays) -> State``: the method's forgetting event; donates."""
        return self._compile(self._start_generation, shared=1, donate=True)

    @functools.cached_property
    def train(self):
        """``train(state, Arrays) -> (State, losses [seeds, steps_per_call])``; donates."""
        return self._compile(self._train, shared=1, donate=True)

    @functools.cached_property
    def validate(self):
        """``validate(state, Arrays) -> (State, MetricSums [seeds])``: also keeps the best; donates."""
        return self._compile(self._validate, shared=1, donate=True)

    @functools.cached_property
    def judge(self):
        """``judge(state) -> State`` where an epoch ends: who stops, whose rate falls; donates."""
        assert self.early_stopping is not None
        return self._compile(self.early_stopping.judge, donate=True)

    @functools.cached_property
    def end_generation(self):
        """``end_generation(state) -> State``: on to the end of the running generation; donates."""
        assert self.early_stopping is not None
        return self._compile(self.early_stopping.end_generation, donate=True)

    @functools.cached_property
    def test(self):
        """``test(Weights, Arrays) -> MetricSums [seeds]``, of more than five classes with "top5" hits."""
        measures = ("top5",) if self.model.num_classes > TOP else ()
        return self._compile(functools.partial(self._evaluate, self.test_size, measures), shared=1)

    @functools.cached_property
    def score_validation(self):
        """``score_validation(Weights, Arrays) -> MetricSums [seeds]``: ``validate`` without a method_state."""
        return self._compile(functools.partial(self._evaluate, self.validate_size, ()), shared=1)

    @functools.cached_property
    def finite(self):
        """``finite(state) -> bool [seeds]``: whether every parameter and statistic is a number."""
        return self._compile(
            lambda state: jnp.all(
                jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.weights)])
            )
        )

    def starts(self, seeds: np.ndarray, given: dict[str, np.ndarray] | None = None) -> Start:
        """Put what the trainings of these ``seeds`` start from on the mesh."""
        place = functools.partial(meshes.place, self.mesh, spec=meshes.BY_SEED)
        return Start(place(seeds), {name: place(leaf) for name, leaf in (given or {}).items()})

    def abstract_data(self) -> Any:
        """Return the training split on the device, its shapes only."""
        row = device.row_bytes(self.model.image_shape)
        shapes: Any = (
            jax.ShapeDtypeStruct((self.batches.size, row), jnp.uint8),
            jax.ShapeDtypeStruct((self.batches.size,), jnp.int32),
        )
        return Arrays(*shapes)

    def abstract_state(self, seeds: int, given: Mapping[str, Any] | None = None) -> State:
        """Return the state's shapes and shardings, to restore a checkpoint against.

        Args:
          seeds: how many.
          given: what the training takes from another run; only normalisers change the shapes.
        """
        seed: Any = jax.ShapeDtypeStruct((seeds,), jnp.uint32)
        normalisers: Any = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in (given or {}).items()
            if name.startswith(NORMALISERS)
        }
        start = Start(seed, normalisers)
        shapes = jax.eval_shape(self.init, start, self.abstract_data())
        sharding = NamedSharding(self.mesh, meshes.BY_SEED)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )

    def _init(self, start: Start, data: Arrays) -> State:
        seed = start.seed
        variables = self.model.init(stream_key(seed, Stream.INIT, 0))
        statistics = variables.get("batch_stats", {})
        weights = Weights(variables["params"], statistics, inserted(start.given))
        weights = merge(weights, start.given, "weights/")
        step = jnp.zeros((), jnp.int32)
        method_state: PyTree = ()
        if self.method.on_start is not None:
            key = stream_key(seed, Stream.START, 0)
            event = self._event(key, step, weights, None, (), data)
            event = self.method.on_start(event)
            weights, method_state = event.weights, event.method_state
        opt_state = merge(self.method.tx.init(weights.params), start.given, "opt_state/")
        return State(
            step=step,
            seed=seed,
            weights=weights,
            opt_state=opt_state,
            method_state=method_state,
            metric_sums=empty_metric_sums(self.method.measures),
            best=empty_best(weights) if self.validate_size else None,
            early_stopping=self.early_stopping.fresh(step) if self.early_stopping else None,
        )

    def _start_generation(self, state: State, data: Arrays) -> State:
        weights, opt_state, method_state = state.weights, state.opt_state, state.method_state
        if self.method.on_generation_start is not None:
            generation = self.clock.generation(state.step)
            key = stream_key(state.seed, Stream.EVENT, generation)
            event = self._event(key, generation, weights, opt_state, method_state, data)
            event = self.method.on_generation_start(event)
            weights, opt_state, method_state = event.weights, event.opt_state, event.method_state
        return state._replace(
            weights=weights,
            opt_state=opt_state,
            method_state=method_state,
            best=empty_best(weights) if state.best is not None else None,
            early_stopping=self.early_stopping.fresh(state.step) if self.early_stopping else None,
        )

    def _event(
        self, key, generation, weights, opt_state, method_state, data: Arrays
    ) -> HookContext:
        # A draw of its own, whatever else the event makes of its key.
        images = functools.partial(self.batches.sample, data, jax.random.fold_in(key, 1))
        return HookContext(key, generation, weights, opt_state, method_state, images)

    def _train(self, state: State, data: Arrays) -> tuple[State, jax.Array]:
        per_epoch = self.clock.steps_per_epoch
        steps = self.batches.steps(
            state.seed, state.step, self.steps_per_call, per_epoch, data.labels
        )
        starts_epoch = state.step % per_epoch == 0
        metric_sums = jax.tree.map(
            lambda total: jnp.where(starts_epoch, 0.0, total), state.metric_sums
        )
        return jax.lax.scan(
            lambda carry, step: self._step(carry, data, step),
            state._replace(metric_sums=metric_sums),
            steps,
        )

    def _step(self, state: State, data: Arrays, step: Step) -> tuple[State, jax.Array]:
        """One step of one seed on a whole batch, of which this device takes its part."""
        # Weights are the same along the data axis; what comes of them here is not, until reduced.
        weights = jax.lax.pcast(state.weights, meshes.DATA, to="varying")
        problem = problems.problem(self, state, weights, data, step)
        auxiliary, gradient, measures = self.method.gradient(problem, weights.params)
        with jax.named_scope("gradient_reduce"):
            # A device counts by its images, of which the last batch may give it few or none.
            share = auxiliary.sums.weight / step.batch.weights.sum()
            statistics = jax.tree.map(lambda leaf: leaf * share, auxiliary.batch_stats)
            measures = jax.tree.map(lambda leaf: leaf / self.mesh.shape[meshes.DATA], measures)
            parts = (gradient, statistics, auxiliary.sums._replace(measures=measures))
            gradient, statistics, sums = jax.lax.psum(parts, meshes.DATA)

        def gradient_at(params):
            """Return the gradient of the same batch at other parameters."""
            there = self.method.gradient(problem, jax.lax.pcast(params, meshes.DATA, to="varying"))
            with jax.named_scope("gradient_reduce"):
                return jax.lax.psum(there.gradient, meshes.DATA)

        loss = sums.loss / sums.weight
        with jax.named_scope("optimizer"):
            updates, opt_state = self.method.tx.update(
                gradient,
                state.opt_state,
                state.weights.params,
                value=loss,
                grad_fn=gradient_at,
                key=problems.key(step, problems.Use.UPDATE),
                **self.method.extra_args(state.method_state),
            )
            stopping = state.early_stopping
            if stopping is not None:
                updates = jax.tree.map(lambda leaf: leaf * stopping.rate_scale, updates)
            params = optax.apply_updates(state.weights.params, updates)
        frozen = self.method.frozen_statistics(state.method_state)
        # The mean over the devices of one and the same number may be rounded to another.
        statistics = _where(frozen, state.weights.batch_stats, statistics)
        new = state.weights._replace(params=params, batch_stats=statistics)
        if stopping is not None:
            # A stopped training is frozen whole; only its clocks go on with the others'.
            new = _where(stopping.stopped, state.weights, new)
            held = _where(stopping.stopped, state.opt_state, opt_state)
            opt_state = with_clocks(held, opt_state, params)
        after = state._replace(
            step=state.step + 1,
            weights=new,
            opt_state=opt_state,
            metric_sums=jax.tree.map(jnp.add, state.metric_sums, sums),
        )
        return after, loss

    def _validate(self, state: State, data: Arrays) -> tuple[State, MetricSums]:
        sums = self._evaluate(self.validate_size, (), state.weights, data)
        assert state.best is not None  # there is a validation split
        accuracy = sums.correct / sums.weight
        better = accuracy > state.best.accuracy
        epoch = self.clock.epoch(state.step - 1)
        candidate = state.best._replace(accuracy=accuracy, epoch=epoch, weights=state.weights)
        best = _where(better, candidate, state.best)
        method_state = state.method_state
        if self.method.on_validation is not None:
            method_state = self.method.on_validation(method_state, accuracy, state.step)
            if state.early_stopping is not None:
                method_state = _where(
                    state.early_stopping.stopped, state.method_state, method_state
                )
        return state._replace(best=best, method_state=method_state), sums

    def _evaluate(
        self, size: int, measures: tuple[str, ...], weights: Weights, data: Arrays
    ) -> MetricSums:
        """Score a split in inference mode.

        Args:
          size: its number of images.
          measures: ``("top5",)`` to count the images whose class is among the first five, too.
          weights: of one seed.
          data: the split.
        """
        shares = self.mesh.shape[meshes.DATA]
        batch = -(-min(self.eval_batch_size, size) // shares) * shares
        order = device.padded_batches(size, batch)
        variables = weights._asdict()

        def score(sums, whole):
            rows, example_weights = self.batches.part(whole, batch)
            images, labels = self.batches.images(data, rows, None)
            logits = self.model.module.apply(variables, images, train=False)
            losses = cross_entropy(logits, labels)
            correct = (logits.argmax(-1) == labels) * example_weights
            hits = {
                name: ((rank(logits, labels) < TOP) * example_weights).sum() for name in measures
            }
            scored = MetricSums(
                (losses * example_weights).sum(), correct.sum(), example_weights.sum(), hits
            )
            return jax.tree.map(jnp.add, sums, scored), None

        zero = jax.lax.pcast(empty_metric_sums(measures), (meshes.SEED, meshes.DATA), to="varying")
        sums, _ = jax.lax.scan(score, zero, jax.tree.map(np.asarray, order))
        return jax.lax.psum(sums, meshes.DATA)


def _where(condition: Any, this: PyTree, other: PyTree) -> PyTree:
    """Return the leaves of ``this`` where a condition holds, those of ``other`` elsewhere."""
    return jax.tree.map(functools.partial(jnp.where, condition), this, other)


def rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return how many classes come before the label's, int32 ``[b]``, without sorting.

    Of equal logits the first class comes first, as with ``argmax``; NaN comes before everything.

    >>> rank(jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), jnp.array([2, 1])).tolist()
    [1, 1]
    """
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    return (~(logits <= own) | ((logits == own) & before)).sum(-1)
