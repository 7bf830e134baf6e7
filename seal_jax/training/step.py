"""The compiled steps of a run: initialise, start a generation, train, validate, test.

Each is one ``jit`` of a ``shard_map`` over the mesh: a device holds some of the seeds and, of each
batch, a shard. Seeds never communicate. Along the data axis a training step has one reduction, of
gradients, statistics and metrics together (and BatchNorm's own, if its statistics are global).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax import masks, methods, models, units
from seal_jax.core import mesh as meshes
from seal_jax.core import vary
from seal_jax.core.settings import Settings
from seal_jax.core.state import (
    Best,
    MetricSums,
    NoiseSums,
    State,
    Stream,
    Varied,
    Weights,
    stream_key,
)
from seal_jax.data import mixing
from seal_jax.evaluation import plasticity
from seal_jax.generations import Clock
from seal_jax.losses import cross_entropy
from seal_jax.methods.method import Auxiliary, Context, HookContext, Method, StepContext
from seal_jax.training import accumulation, early_stopping, streaming
from seal_jax.training.batches import (
    Arrays,
    Batches,
    Pixels,
    Step,
    padded_batches,
    row_bytes,
    warm_count,
)
from seal_jax.training.early_stopping import EarlyStopping, with_clocks
from seal_jax.training.pretrained import NORMALISERS, inserted, merge

PyTree = Any
TOP = 5
PLASTICITY_IMAGES = 256


class _Examples(NamedTuple):
    """What the loss takes of a device's batch, or of a part of it."""

    images: jax.Array
    labels: jax.Array
    weights: jax.Array  # 0 for those that only fill the batch up
    partners: jax.Array | None  # where images are mixed, the labels of the others
    share: jax.Array | None  # and how much of an image is its own
    clean_labels: jax.Array | None  # where labels were replaced
    rngs: dict[str, jax.Array]


class Start(NamedTuple):
    """What a training starts from: its ``seed``, and arrays of another run by the leaf's name."""

    seed: jax.Array
    init_from: dict[str, jax.Array]
    varied: Varied = Varied()


def _compiled(*specs: Any, donate: bool = False, sliced: bool = True) -> Callable[[Any], Any]:
    """Make of a method, written for one seed, a program over the mesh, built on first use.

    ``specs``, pytrees of PartitionSpec, say how each argument is divided over the devices; the last ones
    may be left out in a call.
    Every leaf of an argument that is divided along the seeds, and of the result, has a leading axis of
    seeds. With ``donate`` the first argument's memory is reused.
    Where the state is stored in slices over the data axis, XLA divides along it what is computed, and inserts the
    communication; unless ``sliced``, a device gets all slices and computes what the method says.
    """

    def decorate(method: Callable[..., Any]) -> Any:
        def build(self: Experiment) -> Any:
            def one(first: Any, *others: Any) -> Any:
                # Weights alone are the same function of images at every point.
                varied = getattr(first, "varied", Varied())
                return method(self.at(varied.values), first, *others)

            function = meshes.over_seeds(
                one,
                self.seed_batching,
                [meshes.SEED in jax.tree.leaves(spec)[0] for spec in specs],
            )

            manual, in_specs = {meshes.SEED, meshes.DATA}, specs
            if sliced and self.slices > 1:
                manual = {meshes.SEED}
                in_specs = jax.tree.map(
                    lambda spec: PartitionSpec(
                        *(axis if axis in manual else None for axis in spec)
                    ),
                    specs,
                )

            def program(*arguments: Any) -> Any:
                # Results are divided along seeds alone. shard_map checks that nothing in them still varies along the
                # data axis, hence the psum in every program.
                result = jax.shard_map(
                    function,
                    mesh=self.mesh,
                    in_specs=in_specs[: len(arguments)],
                    out_specs=meshes.BY_SEED,
                    axis_names=manual,
                )(*arguments)
                return self._in_slices(result) if self.slices > 1 else result

            options = meshes.compiler_options(self.settings, self.mesh)
            return jax.jit(program, donate_argnums=(0,) if donate else (), compiler_options=options)

        build.__doc__ = method.__doc__
        # It writes to the instance's __dict__, which a frozen dataclass allows.
        return functools.cached_property(build)

    return decorate


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment ready to run: what it is made of, and its compiled steps."""

    settings: Settings
    mesh: Mesh
    context: Context  # what the method was built from: the network, epochs and generations
    method: Method
    batches: Batches
    early_stopping: EarlyStopping | None  # None where neither it nor plateaus are on
    steps_per_call: int  # in one call of ``train``; divides ``clock.steps_per_epoch``

    @property
    def model(self) -> models.Model:
        """The network."""
        return self.context.model

    @property
    def clock(self) -> Clock:
        """Epochs and generations."""
        return self.context.clock

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.context.total_steps

    @property
    def seed_batching(self) -> str:
        """How the seeds of one device run, "vmap" or "map"."""
        kernels = (leaf for leaf in jax.tree.leaves(self.context.params) if leaf.ndim == 4)
        widest = max((kernel.shape[-1] for kernel in kernels), default=0)
        return meshes.batching(self.settings, meshes.platform(self.mesh), widest)

    @property
    def slices(self) -> int:
        """Into how many slices the devices along the data axis divide the state: see ``run.parameter_sharding``."""
        whole = self.settings.run.parameter_sharding == "none"
        return 1 if whole else self.mesh.shape[meshes.DATA]

    @property
    def seeds(self) -> np.ndarray:
        """The seeds of its trainings, uint32: those of the run, again at every point."""
        train = self.settings.train
        seeds = np.arange(train.seeds, dtype=np.uint32) + train.seed
        return np.tile(seeds, len(vary.points(self.settings)))

    @property
    def ema_decay(self) -> Any:
        """The decay of the average of the weights, ``None`` if there is none."""
        return (self.settings.optimizer.ema or None) if self.method.ema is None else self.method.ema

    def at(self, values: Mapping[str, Any]) -> Experiment:
        """Return the experiment with other values of settings, which may be traced."""
        if not values:
            return self
        settings = vary.replaced(self.settings, values)
        context = dataclasses.replace(self.context, optimizer=settings.optimizer)
        return dataclasses.replace(
            self,
            settings=settings,
            context=context,
            method=methods.build(settings.method, context),
            early_stopping=early_stopping.rules(
                settings, context.clock, bool(self.batches.shape.validation)
            ),
        )

    def learning_rate(self, step: int) -> float | list[float]:
        """Return the learning rate of a step, for the log; where points differ in it that of every training."""
        # As the transformation's own clock restarts it.
        clock = Clock(self.context.steps_per_epoch, self.context.epochs)

        def rate(values: Mapping[str, Any]) -> jax.Array:
            experiment = self.at(values)
            return clock.restart(experiment.method.rate or experiment.context.schedule())(step)

        values = vary.values(self.settings)
        if not values:
            return float(rate({}))
        rates = np.asarray(jax.vmap(rate)(values), float)
        return float(rates[0]) if (rates == rates[0]).all() else rates.tolist()

    def summary(self) -> str:
        """Return a few lines that say what will be trained, and what the mask selects."""
        train, mesh = self.settings.train, self.mesh
        params = self.context.params
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        points = vary.points(self.settings)
        together = f"{len(points)} points of {', '.join(points[0])} with " if points[0] else ""
        lines = [
            f"{self.settings.method['name']} on {self.settings.data.name}: {self.model.name}, "
            f"{count:,} parameters, {together}{train.seeds} seed(s), {train.generations} generations of "
            f"{train.epochs_per_generation} epochs of {self.clock.steps_per_epoch} steps",
            f"devices: {mesh.shape[meshes.SEED]} along seeds, {mesh.shape[meshes.DATA]} along data",
        ]
        if self.settings.data.selection == "test_best":
            lines.append(
                'the best weights are chosen ON THE TEST SPLIT (data.selection = "test_best"): their '
                "test accuracy is no estimate"
            )
        if self.method.mask is not None:
            lines.append(f"forget subtree: {masks.report(self.method.mask, params)}")
        if self.method.note:
            lines.append(self.method.note)
        return "\n".join(lines)

    def starts(self, seeds: np.ndarray, init_from: Mapping[str, np.ndarray] | None = None) -> Start:
        """Put what the trainings of these ``seeds`` start from on the mesh."""
        place = functools.partial(meshes.place, self.mesh, spec=meshes.BY_SEED)
        # On the host until here.
        start: Any = (seeds, dict(init_from or {}), self.varied())
        return Start(*jax.tree.map(place, start))

    def varied(self, fields: Sequence[str] | None = None) -> Varied:
        """Return what sets its trainings apart besides the seed, with an axis of trainings, on the host.

        With ``fields`` only values of these, or of all.
        """
        values: Any = vary.values(self.settings)
        if fields is not None:
            values = {field: values[field] for field in fields}
        draw: Any = vary.draws(self.settings)[1] if self.batches.shape.draws else None
        return Varied(values, draw)

    def abstract_data(self, size: int | None = None) -> Any:
        """Return the training split on the device, or another one of this size, its shapes only."""
        shape, row = self.batches.shape, row_bytes(self.model.image_shape)

        def integers(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def images(count: int) -> Any:
            return jax.ShapeDtypeStruct((count, row), jnp.uint8)

        if size is not None:
            return Arrays(images(size), integers(size))
        drawn = integers(*[shape.draws] * bool(shape.draws), shape.train)
        return Arrays(
            images(shape.images or shape.train),
            drawn,
            drawn if shape.noisy else None,
            rows=drawn if shape.draws else None,
        )

    def abstract_state(
        self,
        seeds: int | None = None,
        init_from: Mapping[str, Any] | None = None,
        fields: Sequence[str] | None = None,
    ) -> State:
        """Return the state's shapes and shardings, to restore a checkpoint against.

        Of all its trainings, or of so many ``seeds``; with all varied values, or those of some ``fields``. Of what the
        training takes from another run only normalisers change the shapes.
        """
        count = len(self.seeds) if seeds is None else seeds
        seed: Any = jax.ShapeDtypeStruct((count,), jnp.uint32)
        varied = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count,), leaf.dtype), self.varied(fields)
        )
        normalisers: Any = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in (init_from or {}).items()
            if name.startswith(NORMALISERS)
        }
        start = Start(seed, normalisers, varied)
        shapes = jax.eval_shape(self.init, start, self.abstract_data())
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings(shapes),
        )

    def _specs(self, state: State) -> State:
        """Return how the leaves of one training's state are divided along the data axis."""
        return meshes.state_specs(state, self.settings.run.parameter_sharding, self.slices)

    def _shardings(self, state: State) -> State:
        """Return how the leaves of the state of all trainings are stored."""
        one = jax.eval_shape(functools.partial(jax.tree.map, lambda leaf: leaf[0]), state)
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, PartitionSpec(meshes.SEED, *spec)),
            self._specs(one),
        )

    def _in_slices(self, result: PyTree) -> PyTree:
        """Store the states in a program's result in slices."""
        return jax.tree.map(
            lambda part: (
                jax.lax.with_sharding_constraint(part, self._shardings(part))
                if isinstance(part, State)
                else part
            ),
            result,
            is_leaf=lambda part: isinstance(part, State),
        )

    @_compiled(meshes.BY_SEED, meshes.REPLICATED)
    def init(self, start: Start, data: Arrays) -> State:
        """Return the state before the first step."""
        seed, data = start.seed, data.at(start.varied.draw)
        # The order of what follows matters: the other run's weights take the place of the initial ones, then on_start
        # may change them (FAST's new head), then the optimizer state is made of the result.
        variables = self.model.init(stream_key(seed, Stream.INIT, 0))
        statistics = variables.get("batch_stats", {})
        # Normalisers are inserted, since a network does not start with any; merge only replaces leaves.
        weights = Weights(variables["params"], statistics, inserted(start.init_from))
        weights = merge(weights, start.init_from, "weights/")
        step = jnp.zeros((), jnp.int32)
        sums = self._no_sums()
        stopping = self.early_stopping.start(step) if self.early_stopping else None
        # The two Nones, optimizer state and best weights, are made below of the weights that on_start leaves.
        state = State(step, seed, weights, None, (), sums, None, stopping, varied=start.varied)
        state = self._apply(self.method.on_start, Stream.START, step, state, data)
        opt_state = self.method.tx.init(state.weights.params)
        return state._replace(
            opt_state=merge(opt_state, start.init_from, "opt_state/"),
            best=Best.none(state.weights) if self.batches.shape.validation else None,
            ema=self._ema(state.weights),
        )

    @_compiled(meshes.BY_SEED, meshes.REPLICATED, donate=True)
    def start_generation(self, state: State, data: Arrays) -> State:
        """Apply the method's forgetting event, and start the generation's records."""
        data = data.at(state.varied.draw)
        generation, hook = self.clock.generation(state.step), self.method.on_generation_start
        single = self.settings.optimizer.schedule == "single"
        keeps_ema = single or self.method.returns_to_ema is not None
        state = self._apply(hook, Stream.EVENT, generation, state, data)
        return state._replace(
            best=Best.none(state.weights) if state.best is not None else None,
            # Or it would remember what was to be forgotten. With one schedule for all generations nothing is.
            ema=state.ema if keeps_ema else self._ema(state.weights),
            early_stopping=self.early_stopping.start(state.step) if self.early_stopping else None,
        )

    def _ema(self, weights: Weights) -> Weights | None:
        """Return the average of the weights where it starts, ``None`` if there is none."""
        return None if self.ema_decay is None else weights

    def _no_sums(self) -> MetricSums:
        """Return the metric sums of an epoch before its first step."""
        return MetricSums.zero(self.method.measures, noisy=self.batches.shape.noisy)

    def _apply(
        self, hook: Any, stream: Stream, generation: Any, state: State, data: Arrays
    ) -> State:
        """Let a hook of the method, if it has one, change weights, optimizer and method state."""
        if hook is None:
            return state
        key = stream_key(state.seed, stream, generation)
        # Another key for the images: the hook may use ``key`` itself in any way.
        examples = functools.partial(
            self.batches.sample, data, state.seed, generation, jax.random.fold_in(key, 1)
        )

        def images(count: int) -> jax.Array:
            return examples(count)[0]

        before = (state.weights, state.opt_state, state.method_state)
        after = hook(HookContext(key, generation, *before, images, examples))
        return state._replace(
            weights=after.weights, opt_state=after.opt_state, method_state=after.method_state
        )

    @_compiled(meshes.BY_SEED, meshes.REPLICATED, streaming.SPECS, donate=True)
    def train(
        self, state: State, data: Arrays, pixels: Pixels | None = None
    ) -> tuple[State, jax.Array]:
        """Train for ``steps_per_call`` steps; return the state and the losses ``[steps_per_call]``."""
        data = data.at(state.varied.draw)
        # A call lies within one epoch, since steps_per_call divides it.
        per_epoch = self.clock.steps_per_epoch
        steps = self.batches.steps(
            state.seed, state.step, self.steps_per_call, per_epoch, data.labels, pixels
        )
        zero = self._no_sums()
        # Not where an epoch ends: there the loop still reads the sums, for the epoch's row.
        metric_sums = _where(state.step % per_epoch == 0, zero, state.metric_sums)
        return jax.lax.scan(
            lambda carry, step: self._step(carry, data, step),
            state._replace(metric_sums=metric_sums),
            steps,
        )

    def _step(self, state: State, data: Arrays, step: Step) -> tuple[State, jax.Array]:
        """Train one seed for one step on a batch, of which this device takes its shard."""
        # Here and at the end, or XLA divides what is to be whole between two steps and gathers it twice.
        state = self._divided(state, self._specs(state))
        if self.method.returns_to_ema is not None:
            returns = self.method.returns_to_ema(state.step)
            if state.early_stopping is not None:
                returns &= ~state.early_stopping.stopped
            state = state._replace(weights=_where(returns, state.ema, state.weights))
        slices = jax.tree.map(
            lambda leaf: meshes.sliced(leaf.shape, self.slices), state.weights.params
        )
        summed = functools.partial(self._summed, slices)
        if self.slices > 1:
            # What is a device's own part is written out. What the optimizer does with slices of the summed gradient,
            # whose norms are of all of it, is left to XLA.
            whole: Any = meshes.REPLICATED
            pixels = whole
            if step.pixels is not None:
                pixels = jax.tree.map(lambda spec: PartitionSpec(*spec[2:]), streaming.SPECS)
            summed = jax.shard_map(
                summed,
                in_specs=(whole, whole, whole, Step(whole, whole, pixels, whole)),
                out_specs=(slices, whole, whole, whole),
                axis_names={meshes.DATA},
            )
        point = self.method.point(state.weights.params, state.opt_state, state.step)
        gradient, statistics, sums, activations = summed(point, state, data, step)
        gradient = self._clipped(gradient)

        def gradient_at(params):
            """Return the gradient of the same batch at other parameters."""
            gradient, *_ = summed(params, state, data, step)
            return self._clipped(gradient)

        loss = sums.loss / sums.weight
        with jax.named_scope("optimizer"):
            updates, opt_state = self.method.tx.update(
                gradient,
                state.opt_state,
                state.weights.params,
                value=loss,
                grad_fn=gradient_at,
                key=step.key_for(Stream.UPDATE),
                activations=activations,
                **self.method.extra_args(state.method_state, state.step),
            )
            # The old state is never taken: what an optimizer sets to a constant (Adafactor's unused moments) would no
            # longer vary along the seeds, and a scan cannot carry it.
            opt_state = _where(False, state.opt_state, opt_state)
            # Plateaus scale the finished updates, as if the learning rate had fallen: momentum, weight decay and the
            # sign of an ascent are already in them.
            stopping = state.early_stopping
            if stopping is not None:
                updates = jax.tree.map(lambda leaf: leaf * stopping.rate_scale, updates)
            params = self._divided(optax.apply_updates(state.weights.params, updates), slices)
        frozen = self.method.frozen_statistics(state.method_state, state.step)
        # The mean over the devices of one and the same number may be rounded to another.
        statistics = _where(frozen, state.weights.batch_stats, statistics)
        new = state.weights._replace(params=params, batch_stats=statistics)
        if stopping is not None:
            # A stopped training is frozen whole; only its clocks advance with the others'.
            new = _where(stopping.stopped, state.weights, new)
            frozen_state = _where(stopping.stopped, state.opt_state, opt_state)
            opt_state = with_clocks(frozen_state, opt_state, params)
        ema = state.ema
        if ema is not None:
            rate = 1 - self.ema_decay
            # By the difference, so that what does not change stays as it is.
            moved = jax.tree.map(lambda mean, leaf: mean + rate * (leaf - mean), ema, new)
            ema = moved if stopping is None else _where(stopping.stopped, ema, moved)
        after = state._replace(
            step=state.step + 1,
            weights=new,
            ema=ema,
            opt_state=opt_state,
            metric_sums=jax.tree.map(jnp.add, state.metric_sums, sums),
        )
        return self._divided(after, self._specs(after)), loss

    def _divided(self, tree: PyTree, specs: PyTree) -> PyTree:
        """Have XLA divide a traced tree along the data axis, where it divides anything."""
        return jax.lax.with_sharding_constraint(tree, specs) if self.slices > 1 else tree

    def _summed(
        self, slices: PyTree, params: PyTree, state: State, data: Arrays, step: Step
    ) -> tuple[PyTree, PyTree, MetricSums, PyTree]:
        """Return gradient at ``params``, BatchNorm statistics, metric sums and activations of the whole batch.

        Written for one device, whose part of the gradient are its ``slices``. A second call within a step sees the
        same images and the same dropout.
        """
        # Weights are the same along the data axis; what is computed from them on a shard is not.
        # Marked as varying, their gradient stays this device's own until the one reduction below.
        params, weights = meshes.varying((params, state.weights), meshes.DATA)
        context = self._context(state, weights, data, step)
        auxiliary, gradient, measures = self.method.gradient(context, params)
        with jax.named_scope("gradient_reduce"):
            # A device counts by its images, of which the last batch may give it few or none.
            fraction = auxiliary.sums.weight / step.batch.weights.sum()
            statistics = jax.tree.map(lambda leaf: leaf * fraction, auxiliary.batch_stats)
            # Every device has the same number; psum of the n-th parts is that number, known to be the same.
            measures = jax.tree.map(lambda leaf: leaf / self.mesh.shape[meshes.DATA], measures)
            sums = auxiliary.sums._replace(measures=measures)
            rest = (statistics, sums, auxiliary.activations)
            specs = jax.tree.map(lambda leaf: meshes.REPLICATED, rest)
            return meshes.sum_over_data((gradient, *rest), (slices, *specs))

    def _clipped(self, gradient: PyTree) -> PyTree:
        """Return the gradient of all parameters at no more than the norm that the settings allow."""
        norm = self.settings.optimizer.clip_norm
        if not norm:
            return gradient
        return optax.clip_by_global_norm(norm).update(gradient, optax.EmptyState())[0]

    def _context(self, state: State, weights: Weights, data: Arrays, step: Step) -> StepContext:
        """Return the loss of this device's shard of the step's batch, and what goes with it.

        Every call of its objective sees the same images and the same dropout.
        """
        batches, method, module = self.batches, self.method, self.model.module
        # Of the whole batch, not of this device's part: the losses of all parts add up to its mean.
        total = step.batch.weights.sum()
        batch = batches.part(step.batch, batches.train.batch_size)
        streamed = None if step.pixels is None else step.pixels.batch
        images, labels = batches.images(data, batch.rows, batch.augmentation, streamed)
        share = None
        if batch.mixing is not None:
            share = batch.mixing.share
            with jax.named_scope("augment"):
                images = mixing.mix(images, batch.mixing)
        clean_labels = None
        if data.clean_labels is not None:
            clean_labels = jnp.take(data.clean_labels, batch.rows, mode="clip")
        frozen = method.frozen_statistics(state.method_state, state.step)

        def targets_of(images: Any) -> Any:
            return None if method.targets is None else method.targets(state.method_state, images)

        def rngs(stream: Stream) -> dict[str, jax.Array]:
            if not module.dropout:
                return {}
            key = step.key_for(stream)
            assert key is not None  # dropout makes a step random
            # Each device draws the dropout of its shard.
            return {"dropout": jax.random.fold_in(key, jax.lax.axis_index(meshes.DATA))}

        dropout, extra_dropout = rngs(Stream.DROPOUT), rngs(Stream.EXTRA_DROPOUT)

        def forward(params: Any, images: Any, rngs: Any, example_mask: Any) -> tuple[Any, Any, Any]:
            """Return logits, what the modules sow and the statistics after a pass in training mode."""
            with models.batch_statistics(frozen=frozen, example_mask=example_mask):
                logits, changed = module.apply(
                    weights._replace(params=params)._asdict(),
                    images,
                    train=True,
                    mutable=["batch_stats", "intermediates"],
                    rngs=rngs,
                )
            return logits, self.model.sown(changed), changed.get("batch_stats", {})

        def losses_of(logits: jax.Array, examples: _Examples, targets: Any) -> jax.Array:
            losses = method.loss(logits, examples.labels, targets)
            if examples.share is not None and examples.partners is not None:
                of_partners = method.loss(logits, examples.partners, targets)
                losses = mixing.interpolate(examples.share, losses, of_partners)
            return examples.weights * losses

        def loss_of(params: Any, examples: _Examples, targets: Any) -> tuple[jax.Array, Auxiliary]:
            weights = examples.weights
            # Images that only fill the batch up must not enter BatchNorm either.
            mask = weights if batches.fills else None
            logits, sown, statistics = forward(params, examples.images, examples.rngs, mask)
            losses, predicted = losses_of(logits, examples, targets), logits.argmax(-1)
            # The label of a mixed image is that of its larger part, which is always its own.
            correct = weights * (predicted == examples.labels)
            noise = None
            if examples.clean_labels is not None:
                noise = noise_sums(predicted, examples.labels, examples.clean_labels, weights)
            sums = MetricSums(losses.sum(), correct.sum(), weights.sum(), {}, noise)
            activations: dict[str, jax.Array] = {}
            if method.uses_activations:
                # This part's share of the means over the whole batch.
                mean = functools.partial(units.mean_magnitude, weights=weights / total)
                activations = jax.tree.map(mean, self.model.activations(sown))
            return losses.sum() / total, Auxiliary(statistics, sums, sown["features"], activations)

        partners = None if share is None else mixing.partners(labels)
        examples = _Examples(images, labels, batch.weights, partners, share, clean_labels, {})
        objective: Callable[[Any], tuple[jax.Array, Auxiliary]]
        count = self.settings.optimizer.accumulate
        if count == 1:
            whole = examples._replace(rngs=dropout)
            # Outside of the objective, so that they are computed once and not differentiated.
            targets = targets_of(images)
            objective = functools.partial(loss_of, examples=whole, targets=targets)
        else:
            parts = accumulation.split(examples, count)
            keys = jax.tree.map(lambda key: jax.random.split(key, count), dropout)
            parts = parts._replace(rngs=keys)
            objective = accumulation.accumulated(
                lambda params, part: loss_of(params, part, targets_of(part.images)), parts, _merged
            )

        # The index may be traced: PoF takes further batches in a while_loop until one is accepted.
        def extra_features(params: Any, index: Any) -> tuple[Any, Any]:
            streamed = None if step.pixels is None else step.pixels.extra
            extra, pixels = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
                (step.extra, streamed),
            )
            extra = batches.part(extra, method.extra_batch_size)
            images, labels = batches.images(data, extra.rows, extra.augmentation, pixels)
            # No mask: further batches are always full.
            _, sown, statistics = forward(params, images, extra_dropout, None)
            whole = jax.lax.all_gather((sown["features"], labels), meshes.DATA, tiled=True)
            return whole, statistics

        key = step.key_for(Stream.GRADIENT)
        if key is not None:
            # Like the weights: what is drawn from it and then differentiated is this device's own,
            # or differentiation would sum over the devices.
            key = meshes.varying(key, meshes.DATA)
        return StepContext(
            objective=objective,
            loss=lambda logits: losses_of(logits, examples, targets_of(images)).sum() / total,
            weights=weights,
            method_state=meshes.varying(state.method_state, meshes.DATA),
            key=key,
            progress=state.step / self.total_steps,
            extra_features=extra_features,
        )

    def validate(self, state: State, data: Arrays) -> tuple[State, MetricSums]:
        """Score the validation split, and keep the weights if they are the best so far."""
        sums = self.score(state.weights, data)
        return self.judge(state, sums), sums

    @_compiled(meshes.BY_SEED, meshes.BY_SEED, donate=True)
    def judge(self, state: State, sums: MetricSums) -> State:
        """Keep the weights if their sums over the validation split are the best so far."""
        assert state.best is not None  # there is a validation split
        accuracy = sums.correct / sums.weight
        # Strictly better: of equal scores the earliest stays.
        better = accuracy > state.best.accuracy
        # The counter already stands at the next step.
        epoch = self.clock.epoch(state.step - 1)
        candidate = state.best._replace(accuracy=accuracy, epoch=epoch, weights=state.weights)
        best = _where(better, candidate, state.best)
        method_state = state.method_state
        if self.method.on_validation is not None:
            method_state = self.method.on_validation(method_state, accuracy, state.step)
            # A stopped training is frozen whole, the method's own state included.
            if state.early_stopping is not None:
                method_state = _where(
                    state.early_stopping.stopped, state.method_state, method_state
                )
        return state._replace(best=best, method_state=method_state)

    @_compiled(meshes.BY_SEED, donate=True)
    def update_early_stopping(self, state: State) -> State:
        """Apply the rules of early stopping to the epoch that has just ended."""
        assert self.early_stopping is not None
        return self.early_stopping.update(state)

    @_compiled(meshes.BY_SEED, donate=True)
    def end_generation(self, state: State) -> State:
        """Skip to the end of the running generation."""
        assert self.early_stopping is not None
        return self.early_stopping.end_generation(state)

    @_compiled(meshes.BY_SEED, meshes.REPLICATED, sliced=False)
    def plasticity(self, state: State, data: Arrays) -> dict[str, jax.Array]:
        """Return what ``run.log_plasticity`` adds to the row of the epoch that has just ended, by name."""
        data, blocks = data.at(state.varied.draw), self.model.blocks

        def measure(hook: HookContext) -> HookContext:
            count = warm_count(self.batches.shape.train, self.settings.data)
            images, labels = hook.examples(min(PLASTICITY_IMAGES, count), 0)
            variables, params = hook.weights._asdict(), hook.weights.params
            hidden = self.model.hidden(variables, images)

            def loss(params: PyTree) -> jax.Array:
                logits = self.model.module.apply(
                    {**variables, "params": params}, images, train=False
                )
                return cross_entropy(logits, labels).mean()

            measures = {
                "dormant": plasticity.dormant_shares(
                    jax.tree.map(units.mean_magnitude, hidden), blocks
                ),
                "norm": plasticity.norms(params, blocks),
                "gradient": plasticity.norms(jax.grad(loss)(params), blocks),
            }
            # What another run or a file gave is gone by now.
            if not self.settings.train.pretrained:
                start = self.model.init(stream_key(state.seed, Stream.INIT, 0))["params"]
                measures["distance"] = plasticity.norms(
                    jax.tree.map(jnp.subtract, params, start), blocks
                )
            by_name = {
                f"{name}/{block}": value
                for name, by_block in measures.items()
                for block, value in by_block.items()
            }
            return hook._replace(method_state=by_name)

        # A hook that only looks: as any other it has a sample of the images of the generation.
        generation = self.clock.generation(state.step - 1)
        return self._apply(measure, Stream.PLASTICITY, generation, state, data).method_state

    @_compiled(meshes.BY_SEED)
    def finite(self, state: State) -> jax.Array:
        """Tell whether all weights are finite."""
        leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.weights)]
        return jnp.all(jnp.stack(leaves))

    def scoring_order(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and weights ``[batches, batch]`` by which a split of this size is scored."""
        batch = min(self.settings.run.eval_batch_size, size)
        batch += -batch % self.mesh.shape[meshes.DATA]  # a multiple of the shards
        return padded_batches(size, batch)

    def score(self, weights: Weights, data: Arrays) -> MetricSums:
        """Return sums over a whole split; with more than five classes the measures include "top5"."""
        rows, example_weights = self.scoring_order(len(data))
        if data.stored is None:
            return self.score_batches(weights, data, (rows, example_weights))
        parts = streaming.evaluation(self.mesh, data.stored, rows, self.settings.run)
        sums = None
        # All parts have the same number of batches, those of weight 0 at the end included.
        for start, pixels in parts:
            stop = start + pixels.batch.shape[0]
            chunk = tuple(
                np.concatenate([of[start:stop], np.zeros_like(of[: max(stop - len(of), 0)])])
                for of in (rows, example_weights)
            )
            scored = self.score_batches(weights, data, chunk, pixels)
            sums = scored if sums is None else jax.tree.map(jnp.add, sums, scored)
        assert sums is not None  # no split that is scored is empty
        return sums

    @_compiled(meshes.BY_SEED, meshes.REPLICATED, meshes.REPLICATED, meshes.BATCHES, sliced=False)
    def score_batches(
        self,
        weights: Weights,
        data: Arrays,
        order: tuple[jax.Array, jax.Array],
        pixels: Pixels | None = None,
    ) -> MetricSums:
        """Return sums over batches in inference mode, whose rows and weights ``order`` has."""
        variables = weights._asdict()
        measures = ("top5",) if self.model.num_classes > TOP else ()

        def score(sums: MetricSums, batch: Any) -> tuple[MetricSums, None]:
            order, pixels = batch
            rows, example_weights = self.batches.part(order, order[0].shape[0])
            images, labels = self.batches.images(data, rows, None, pixels and pixels.batch)
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

        # The carry of a scan must vary over the same axes as what the body returns.
        zero = meshes.varying(MetricSums.zero(measures), (meshes.SEED, meshes.DATA))
        sums, _ = jax.lax.scan(score, zero, (order, pixels))
        return jax.lax.psum(sums, meshes.DATA)


def noise_sums(
    predicted: jax.Array, labels: jax.Array, clean_labels: jax.Array, weights: jax.Array
) -> NoiseSums:
    """Return the sums over images of which some have another label than their own; each argument is ``[b]``.

    >>> sums = noise_sums(*jnp.array([[1, 2, 0], [1, 2, 2], [1, 0, 0]]), jnp.ones(3))
    >>> [float(total) for total in sums]  # clean_correct, wrong, memorised, corrected
    [2.0, 2.0, 1.0, 1.0]
    """
    clean_correct = weights * (predicted == clean_labels)
    wrong = weights * (labels != clean_labels)
    return NoiseSums(
        clean_correct.sum(),
        wrong.sum(),
        (wrong * (predicted == labels)).sum(),
        (wrong * (predicted == clean_labels)).sum(),
    )


def _where(condition: Any, this: PyTree, other: PyTree) -> PyTree:
    """Return the leaves of ``this`` where a condition holds, those of ``other`` elsewhere."""
    return jax.tree.map(functools.partial(jnp.where, condition), this, other)


def _merged(parts: Auxiliary) -> Auxiliary:
    """Return what the parts of a batch, each leaf ``[parts, ...]``, make together."""
    # Each part counts by its images, as each device does; a device may have none at all.
    shares = parts.sums.weight / jnp.maximum(parts.sums.weight.sum(), 1)
    return Auxiliary(
        jax.tree.map(lambda leaf: jnp.tensordot(shares, leaf, 1), parts.batch_stats),
        jax.tree.map(lambda leaf: leaf.sum(0), parts.sums),
        accumulation.join(parts.features),
        jax.tree.map(lambda leaf: leaf.sum(0), parts.activations),
    )


def rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return how many classes come before the label's, int32 ``[b]``, without sorting.

    Of equal logits the first class comes first, as with ``argmax``; NaN comes before everything.

    >>> rank(jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), jnp.array([2, 1])).tolist()
    [1, 1]
    """
    score = jnp.take_along_axis(logits, labels[:, None], 1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    # Not `logits > score`: a comparison with NaN is false, and NaN is to come first.
    return (~(logits <= score) | ((logits == score) & earlier)).sum(-1)
