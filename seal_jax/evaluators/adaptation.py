"""Adaptations to other data: their settings by system, and measurements of their training step by step.

A training is a function of its settings, its seeds and the weights it starts from, so a finished run
can be repeated, and its anytime performance measured on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seal_jax import data, methods, paths
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.core.state import Weights
from seal_jax.data.dataset import hold_out
from seal_jax.errors import UsageError
from seal_jax.evaluation import anytime
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.training import experiment as experiments
from seal_jax.training import loop, pretrained
from seal_jax.training.batches import Arrays, place, steps_per_epoch
from seal_jax.training.step import Experiment

PyTree = Any


# FAST and the baselines it is compared with: the fields of each that differ from the method's defaults.
SYSTEMS = {
    key: variant.changes for key, variant in methods.VARIANTS.items() if variant.method == "fast"
}
# Steps between the validations that end the classifier's warm-up, where they divide an epoch.
WARMUP_EVERY = 5


def settings_of(
    name: str,
    source: Settings,
    target: data.Dataset,
    *,
    alpha: float,
    beta: float,
    sigma: float,
    batch_size: int,
    steps: int,
    seeds: int,
    flip: bool,
) -> Settings:
    """Return the settings by which a system adapts a run's network to other data.

    Constant rates, damped momentum 0.9, no decay, balanced batches (FAST paper, section 6.2.1). The
    baselines learn everything with ``alpha``, FAST its features with ``beta``; with Adam and RAdam
    both are a tenth. ``sigma`` is the deviation of a normal head, ``batch_size`` a multiple of the
    classes; training has ``steps``, rounded up to whole epochs.
    """
    changes = SYSTEMS[name]
    optimizer = changes.get("optimizer.name", "sgd")
    scale = 0.1 if optimizer in ("adam", "radam") else 1.0
    rate = scale * alpha
    # Baselines have one rate for everything. A variant's own fields come last: they freeze the features (beta = 0)
    # or the head (alpha = 0).
    method: dict[str, Any] = {
        "name": "fast",
        "alpha": rate,
        "beta": scale * beta if name.startswith("fast") else rate,
        **{field: value for field, value in changes.items() if "." not in field},
    }
    if "sigma" in method:
        # The variant's deviation is only a default.
        method["sigma"] = sigma
    # Balanced epochs have whole batches only, hence drop_last.
    per_epoch = steps_per_epoch(len(target.train), batch_size, True)
    settings = Settings(
        data=settings_lib.Data(
            name=target.name,
            data_dir=source.data.data_dir,
            flip=flip,
            normalisation=_normalisation(target, source),
        ),
        model=source.model,
        method=method,
        optimizer=settings_lib.Optimizer(
            name=optimizer,
            nesterov=changes.get("optimizer.nesterov", False),
            learning_rate=rate,
            schedule="constant",
            weight_decay=0.0,
            label_smoothing=0.0,
        ),
        train=settings_lib.Train(
            generations=1,
            epochs_per_generation=math.ceil(steps / per_epoch),
            batch_size=batch_size,
            sampling="balanced",
            # The trainer only takes a divisor of the epoch's steps: 5 where it is one, every step otherwise.
            validate_every=math.gcd(per_epoch, WARMUP_EVERY) if method.get("warmup") else 0,
            seed=source.train.seed,
            seeds=seeds,
            dtype=source.train.dtype,
        ),
        run=settings_lib.Run(eval_batch_size=source.run.eval_batch_size),
    )
    return methods.complete(settings)


def _normalisation(target: data.Dataset, source: Settings) -> str:
    """Return the name of the channel statistics: the target's own if there are any, else the source's."""
    name = data.normalisation(target.name)
    if name and len(data.statistics(name).mean) == target.image_shape[-1]:
        return name
    return source.data.normalisation or data.normalisation(source.data.name) or "imagenet"


def system_of(settings: Settings) -> str:
    """Return the name of the system that a run adapted by, or that of its method.

    >>> system_of(Settings(method={"name": "fast", "beta": 0.0}))
    'feature_extraction'
    >>> system_of(Settings(method={"name": "fast", "head": "xavier"}))
    'xavier'
    """
    if settings.method["name"] != "fast":
        return str(settings.method["name"])
    optimizer = settings.optimizer
    # Rates differ between runs of one system, so they count only as zero or not.
    traits = _traits(settings.method, optimizer.name, optimizer.nesterov)
    for name, changes in SYSTEMS.items():
        kind = changes.get("optimizer.name", "sgd")
        if traits == _traits(changes, kind, changes.get("optimizer.nesterov", False)):
            return name
    head, *_, warmup, _, probes, kind = traits
    first = "warmup " if warmup else "probing " if probes else ""
    return f"{head} {first}{kind}"


def _traits(options: Mapping[str, Any], optimizer: str, nesterov: bool) -> tuple[Any, ...]:
    """Return the traits that identify a system: the head, what learns, what precedes it and the optimizer."""
    options = {**dataclasses.asdict(methods.options("fast")), **options}
    # Both are FAST's head: exactly 0, or normal with deviation 1e-8.
    head = "zero" if options["head"] == "tiny" else options["head"]
    kind = "nesterov" if optimizer == "sgd" and nesterov else optimizer
    learns = (options["alpha"] != 0, options["beta"] != 0)
    before = (options["warmup"], options["warmup_statistics"], options["probe_share"] != 0)
    return head, *learns, *before, kind


def source_of(loaded_run: LoadedRun, networks: Sequence[Network]) -> pretrained.Source:
    """Return networks of a run, one per seed, as the source of an adaptation."""
    trees = [dict(paths.named_leaves(network.variables)) for network in networks]
    # As a checkpoint names them, whichever weights they are: the adaptation takes its source as "last".
    leaves = {f"weights/{name}": np.stack([tree[name] for tree in trees]) for name in trees[0]}
    return pretrained.Source(loaded_run.settings, leaves, f"--checkpoint={loaded_run.run}")


def target(
    loaded_run: LoadedRun,
    name: str | None,
    image_size: int,
    validation_fraction: float,
    test_fraction: float,
) -> data.Dataset:
    """Return the data to adapt a run's network to, in its number of channels.

    Without a name it is the run's own, with the validation split that it has; with an image size of 0
    it is of the size of the run's images.
    """
    dataset, fields = loaded_run.dataset, loaded_run.settings.data
    if name is None and not image_size:
        # The run's own validation images were not trained on, unlike any part of its training images.
        if len(dataset.validation) and fields.selection == "validation":
            return dataset
        train, validation = hold_out(dataset.train, validation_fraction, 0)
        return dataclasses.replace(dataset, train=train, validation=validation)
    height, width, channels = dataset.image_shape
    # The options of the run's own data set (splits, label) mean nothing for another one.
    same = name is None or name == fields.name
    return data.load(
        name or fields.name,
        data_dir=loaded_run.data_dir(name or fields.name),
        train_split=fields.train_split if same else "train",
        test_split=(fields.test_split or None) if same else None,
        test_fraction=test_fraction,
        label=(fields.label or None) if same else None,
        image_size=image_size or (height, width),
        channels=channels,
        validation_fraction=validation_fraction,
        corrupt=fields.corrupt,
    )


class Replay:
    """One adaptation, ready to be trained.

    Args:
      settings: of the training; its division over devices and calls does not matter.
      dataset: its images.
      source: the run that it starts from.
      task: the data of the source.
      max_steps: to stop after; 0 for its whole length.
      scorer: another adaptation to the same data from the same task, whose compiled scoring and
        placed data this one shares.

    Raises:
      UsageError: no validation split, or settings, data and source that do not fit each other.
    """

    experiment: Experiment
    _source_experiment: Experiment

    def __init__(
        self,
        settings: Settings,
        dataset: data.Dataset,
        source: pretrained.Source,
        task: data.Dataset,
        max_steps: int = 0,
        scorer: Replay | None = None,
    ):
        if not len(dataset.validation):
            raise UsageError(
                f"data.validation_fraction = {settings.data.validation_fraction:g} leaves no "
                f"validation split of {dataset.name}, by which the state to deploy is chosen; "
                "adapt with one, such as 0.05"
            )
        if settings.data.selection != "validation":
            raise UsageError(
                f"data.selection = {settings.data.selection!r} chooses by the test split, and what is "
                "deployed must be chosen without; adapt with a validation split"
            )
        experiments.check_data(settings, dataset)
        # One step a call: a state may be due after any step.
        run = dataclasses.replace(settings.run, seed_devices=0, data_devices=0, steps_per_call=1)
        self.settings = dataclasses.replace(settings, run=run)
        # The scorer's data is placed on its mesh, so a training that shares it must be there too.
        mesh = scorer.experiment.mesh if scorer else _mesh(self.settings)
        self.experiment = experiments.build(self.settings, experiments.data_shape(dataset), mesh)
        self.total = min(max_steps or self.experiment.total_steps, self.experiment.total_steps)
        self.head = self.experiment.model.head
        self._source = source
        self.init_from()  # raises for a source that does not fit, before any work
        self._source_experiment = (
            scorer._source_experiment if scorer else _source_task(self.experiment, source, task)
        )
        self._source_head = _source_head(self._source_experiment, self.experiment, source, task)
        self._sizes = jax.jit(jax.vmap(functools.partial(anytime.sizes, head=self.head)))
        self._splits = {
            "train": dataset.train,
            "validation": dataset.validation,
            "test": dataset.test,
            "source": task.test,
        }
        self._placed: dict[str, Arrays] = {}
        self._scorer = scorer or self

    def init_from(self) -> dict[str, np.ndarray]:
        """Return the arrays that the trainings start from; computed at each call, since they can be large."""
        return pretrained.take(
            self.settings,
            self._source,
            self.experiment.abstract_state(),
            momentum=self.experiment.method.continues_momentum,
        )

    def run(self) -> Trace:
        """Train all seeds together and measure; raise once the loss or a parameter is not finite."""
        experiment = self.experiment
        starts = experiment.starts(experiment.seeds, self.init_from())
        state = experiment.init(starts, self.split("train"))
        # Divided by seed, like the weights among which it replaces the new head.
        place_head = functools.partial(meshes.place, experiment.mesh, spec=meshes.BY_SEED)
        trace = Trace(
            self,
            # Distances are from the source's features; a parameter that it lacks counts from its initial value.
            features=pretrained.merge(
                {name: v for name, v in state.weights.params.items() if name != self.head},
                starts.init_from,
                "weights/params/",
            ),
            source_head=jax.tree.map(place_head, self._source_head),
        )
        # Step 0 is due as well: the source's features under the new head.
        trace.observe(state.weights, 0)
        for call in loop.calls(
            experiment, state, 0, self.total, self.split("train"), self.split("validation")
        ):
            trace.losses.append(call.losses)
            if call.trained % experiment.clock.steps_per_epoch == 0:
                # Fetched now, since the next call overwrites the state: its buffers are donated.
                sums = jax.device_get(call.state.metric_sums)
                trace.train_loss[call.trained] = _mean(sums.loss, sums)
            trace.observe(call.state.weights, call.step)
        # On the device, and a trace is kept for the records of all its seeds.
        del trace._best, trace._source
        return trace

    def split(self, name: str) -> Arrays:
        """Return "train", "validation", "test" or the "source" task's test split on the devices."""
        scorer = self._scorer
        if name not in scorer._placed:
            scorer._placed[name] = place(scorer.experiment.mesh, scorer._splits[name])
        return scorer._placed[name]

    def validation_accuracy(self, weights: Weights) -> np.ndarray:
        """Return the accuracy ``[S]`` on the validation split."""
        # A compiled program belongs to one experiment object: with the scorer's, all systems share one.
        score = self._scorer.experiment.score
        sums = jax.device_get(score(weights, self.split("validation")))
        return _mean(sums.correct, sums)

    def scores(self, weights: Weights, features: PyTree, source_head: PyTree) -> dict[str, Any]:
        """Return accuracies ``[S]`` on both test splits, and the distance of ``weights`` from ``features``."""
        scorer = self._scorer
        head_norm, distance = jax.device_get(scorer._sizes(weights.params, features))
        on_target = jax.device_get(scorer.experiment.score(weights, self.split("test")))
        # The source's task is scored under its own classifier.
        weights = weights._replace(params={**weights.params, self.head: source_head})
        on_source = jax.device_get(scorer._source_experiment.score(weights, self.split("source")))
        return {
            "test": _mean(on_target.correct, on_target),
            # The top-5 accuracy, where there are more than five classes.
            **{f"test_{name}": _mean(hits, on_target) for name, hits in on_target.measures.items()},
            "source": _mean(on_source.correct, on_source),
            "head_norm": head_norm,
            "distance": distance,
        }


class Trace:
    """The measurements of one training of S seeds, whose weights it is shown in the order of steps.

    Args:
      replay: the training.
      features: the source's parameters except the head, with the seeds' axis.
      source_head: the source's classifier, with the seeds' axis.

    Attributes:
      checkpoints: T steps.
      validated: V steps.
      validation: V accuracies ``[S]`` after each of these.
      series: T arrays ``[S]`` by name. ``test``: test accuracy of the weights in training;
        ``test_top5``: the same, with more than five classes; ``source``: accuracy of their features on
        the source's test data under its own head; ``distance``: of their features from the source's;
        ``head_norm``. ``adp``, ``adp_top5``, ``adp_source`` and ``adp_distance`` are the same of the
        deployed weights.
      train_loss: ``[S]`` at the end of each epoch, by step, as the run's own metrics have it.
      losses: since the last check, on the device.
    """

    def __init__(self, replay: Replay, features: PyTree, source_head: PyTree):
        self.checkpoints = anytime.checkpoints(replay.total)
        self.validated = anytime.validations(replay.total)
        self.validation: list[np.ndarray] = []
        self.series: dict[str, list[np.ndarray]] = {}
        self.train_loss: dict[int, np.ndarray] = {}
        self.losses: list[jax.Array] = []
        self._replay, self._source = replay, (features, source_head)
        # Latest first, so that the next one is popped from the end.
        self._due = sorted({*self.checkpoints, *self.validated}, reverse=True)
        self._best: Weights | None = None
        self._best_accuracy = np.full(replay.settings.train.seeds, -np.inf)
        self._deployed: dict[str, np.ndarray] | None = None  # the scores of the best weights

    def observe(self, weights: Weights, step: int) -> None:
        """Score the weights where due; steps skipped by an early stop count with the last step's weights."""
        while self._due and self._due[-1] <= step:
            # Fetched only where a measurement waits for the device anyway: otherwise the host would at every step.
            if self.losses:
                finite = np.isfinite(np.concatenate(jax.device_get(self.losses), 1))
                self.losses = []
                self._check(finite.all(1), "the loss", f" by step {step}")
            due = self._due.pop()
            # Validation first: a state that is validated and measured at one step may be the one to deploy.
            if due in self.validated:
                self._keep_if_better(weights)
            if due in self.checkpoints:
                self._measure(weights)

    def _keep_if_better(self, weights: Weights) -> None:
        """Score the validation split; seeds whose accuracy is the best so far are kept."""
        accuracy = self._replay.validation_accuracy(weights)
        self.validation.append(accuracy)
        # Strictly better, as anytime.deployed has it; a NaN never is.
        better = accuracy > self._best_accuracy
        if self._best is None or better.any():
            # A copy: the training overwrites its own.
            self._best = _choose(better, weights, weights if self._best is None else self._best)
            self._deployed = None
        self._best_accuracy = np.where(better, accuracy, self._best_accuracy)

    def _measure(self, weights: Weights) -> None:
        """Measure the deployed weights and the weights in training."""
        if self._deployed is None:
            # Scored again only when the best weights have changed: it takes two passes over test data.
            scores = self._scores(self._best)
            # Only the norm of the head in training is shown.
            del scores["head_norm"]
            self._deployed = {
                f"adp_{name}".replace("adp_test", "adp"): values for name, values in scores.items()
            }
        for name, values in {**self._deployed, **self._scores(weights)}.items():
            self.series.setdefault(name, []).append(values)

    def _scores(self, weights: Any) -> dict[str, np.ndarray]:
        scores = self._replay.scores(weights, *self._source)
        # Together these take in the head's kernel and all features.
        for name in ("head_norm", "distance"):
            self._check(np.isfinite(scores[name]), "a parameter")
        return scores

    def _check(self, finite: np.ndarray, what: str, where: str = "") -> None:
        """Raise a UsageError that names the first seed for which ``finite``, ``[S]``, is False."""
        if not finite.all():
            seed = self._replay.experiment.seeds[np.flatnonzero(~finite)[0]]
            settings = self._replay.settings
            raise UsageError(
                f"{system_of(settings)} on {settings.data.name}, seed {seed}: {what} is not finite"
                f"{where}; lower the learning rate, {settings.optimizer.learning_rate:g}"
            )


def _mean(hits: np.ndarray, sums: Any) -> np.ndarray:
    """Return sums over a split divided by its total weight, float64."""
    return np.asarray(hits, np.float64) / np.asarray(sums.weight, np.float64)


@jax.jit
def _choose(better: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Return each seed's new leaves where they are better."""
    # better [S] takes an axis of one for each further axis of a leaf [S, ...].
    return jax.tree.map(
        lambda a, b: jnp.where(better.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old
    )


def _mesh(settings: Settings) -> Mesh:
    """Return the mesh over as many devices as seeds and batch can be divided over."""
    devices = jax.devices()
    # Not the run's own layout, which may be of another machine: results do not depend on it beyond rounding.
    for count in range(len(devices), 1, -1):
        with contextlib.suppress(UsageError):
            return meshes.make(settings, devices[:count])
    return meshes.make(settings, devices[:1])


def _source_task(
    adaptation: Experiment, source: pretrained.Source, task: data.Dataset
) -> Experiment:
    """Return the compiled steps that score the source's task."""
    settings = dataclasses.replace(
        source.settings,
        method={"name": "normal"},
        # Of its own training only the network's precision matters.
        train=settings_lib.Train(dtype=source.settings.train.dtype, batch_size=1),
        optimizer=settings_lib.Optimizer(),
        run=adaptation.settings.run,
    )
    return experiments.build(settings, experiments.data_shape(task), adaptation.mesh)


def _source_head(
    experiment: Experiment, adaptation: Experiment, source: pretrained.Source, task: data.Dataset
) -> PyTree:
    """Return the source's head for its own task, per seed of the adaptation."""
    head, train = experiment.model.head, adaptation.settings.train
    prefix = f"{pretrained.SOURCES[train.pretrained_weights]}params/"
    # The source's features must be those of the adapted network, and its head must have the task's classes.
    adapted = {name: leaf.shape for name, leaf in paths.named_leaves(adaptation.context.params)}
    for name, leaf in paths.named_leaves(experiment.context.params):
        saved = source.leaves.get(prefix + name)
        if saved is None or saved.shape[1:] != leaf.shape:
            shape = "absent" if saved is None else f"{list(saved.shape[1:])}"
            raise UsageError(
                f"{source.label}: its {name} is {shape}, and its data, "
                f"{task.name} of {task.num_classes} classes, asks for "
                f"{list(leaf.shape)}; give it the data that it was trained on"
            )
        if name.partition("/")[0] != head and adapted.get(name) != leaf.shape:
            raise UsageError(
                f"{source.label}: its {name} is {list(leaf.shape)}, and that of "
                f"the adaptation {list(adapted.get(name, ()))}; the source task cannot be scored"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: pretrained.for_seeds(
            source.leaves[f"{prefix}{head}/{paths.name(path)}"], train.seeds, source.label
        ),
        experiment.context.params[head],
    )
