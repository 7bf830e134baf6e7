"""Trains an adaptation once more, step by step, and measures it at its deployment checkpoints.

A training is a function of its settings, its seeds and what it starts from, so a run that is over
can be gone through again: this is how a finished run gets its anytime performance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seal_jax import data, paths
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.core.state import Weights
from seal_jax.errors import UsageError
from seal_jax.evaluation import anytime
from seal_jax.evaluators.adaptation_course import Course, Trace, mean
from seal_jax.training import experiment as experiments
from seal_jax.training import pretrained
from seal_jax.training import workdir as workdirs
from seal_jax.training.batches import Arrays
from seal_jax.training.checkpoints import read_leaves
from seal_jax.training.step import CompiledSteps

if TYPE_CHECKING:
    from seal_jax.evaluators.loaded_run import LoadedRun, Network

PyTree = Any


class Source(NamedTuple):
    """The run that an adaptation starts from.

    Attributes:
      settings: of its training.
      dataset: of its task.
      leaves: of its state, by name, each with the seeds' axis.
      label: what messages call it.
    """

    settings: Settings
    dataset: data.Dataset
    leaves: Mapping[str, np.ndarray]
    label: str


def read_source(settings: Settings, run: Path) -> Source:
    """Read the run that ``train.pretrained`` names, and its data.

    Raises:
      UsageError: the folder is gone, or holds no checkpoint.
    """
    folder = pretrained.folder(settings, run)
    leaves = read_leaves(folder / workdirs.CHECKPOINTS)
    if leaves is None:
        raise UsageError(f"train.pretrained = {str(folder)!r} holds no checkpoint yet")
    theirs = settings_lib.read(Settings, workdirs.read(folder))
    label = f"train.pretrained = {str(folder)!r}"
    return Source(theirs, experiments.load_data(theirs.data), leaves, label)


def source_of(loaded_run: LoadedRun, networks: Sequence[Network]) -> Source:
    """Return networks of a run, one a seed, as what an adaptation starts from."""
    trees = [dict(paths.named_leaves(network.variables)) for network in networks]
    leaves = {f"weights/{name}": np.stack([tree[name] for tree in trees]) for name in trees[0]}
    return Source(loaded_run.settings, loaded_run.dataset, leaves, f"--checkpoint={loaded_run.run}")


def target(
    loaded_run: LoadedRun,
    name: str | None,
    image_size: int,
    validation_fraction: float,
    test_fraction: float,
) -> data.Dataset:
    """Return the data to adapt a run's network to, in its number of channels.

    Args:
      loaded_run: the run.
      name: of the data set; None for the run's own, with the validation split that it has.
      image_size: side; 0 for the size of the run's images.
      validation_fraction: held out of the training images, stratified by class.
      test_fraction: held out to test on where the data set has no test split.
    """
    own, fields = loaded_run.dataset, loaded_run.settings.data
    if name is None and not image_size:
        if len(own.validation) and fields.selection == "validation":
            return own
        train, test = ((split.images, split.labels) for split in (own.train, own.test))
        return data.from_arrays(
            train,
            test,
            name=own.name,
            class_names=own.class_names,
            validation_fraction=validation_fraction,
        )
    height, width, channels = own.image_shape
    mine = name is None or name == fields.name
    return data.load(
        name or fields.name,
        data_dir=fields.data_dir or None,
        train_split=fields.train_split if mine else "train",
        test_split=(fields.test_split or None) if mine else None,
        test_fraction=test_fraction,
        label=(fields.label or None) if mine else None,
        image_size=image_size or (height, width),
        channels=channels,
        validation_fraction=validation_fraction,
    )


class Replay:
    """One adaptation, ready to be trained.

    Args:
      settings: of the training; how it was spread over devices and calls is no matter.
      dataset: its images.
      source: what it starts from.
      max_steps: to stop after; 0 for its whole length.
      like: another adaptation to the same data from the same task, whose compiled scoring and
        placed data this one shares.

    Raises:
      UsageError: no validation split, or settings, data and source that do not fit each other.
    """

    settings: Settings
    dataset: data.Dataset
    experiment: experiments.Experiment
    programs: CompiledSteps
    total: int
    scoring: Scoring

    def __init__(
        self,
        settings: Settings,
        dataset: data.Dataset,
        source: Source,
        max_steps: int = 0,
        like: Replay | None = None,
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
        run = dataclasses.replace(settings.run, seed_devices=0, data_devices=0, steps_per_call=1)
        self.settings = dataclasses.replace(settings, run=run)
        mesh = like.programs.mesh if like else _mesh(self.settings)
        self.dataset = dataset
        self.experiment = experiments.build(self.settings, experiments.data_shape(dataset), mesh)
        self.programs = self.experiment.programs
        total = self.experiment.total_steps
        self.total = min(max_steps or total, total)
        self._source = source
        self.given()  # what does not fit is found here
        self.scoring = Scoring(self, source, like.scoring if like else None)

    def given(self) -> dict[str, np.ndarray]:
        """Return what the trainings start from; made anew, since it can be large."""
        return pretrained.take(
            self.settings,
            self._source.leaves,
            self.programs.abstract_state(self.settings.train.seeds),
            self._source.label,
            self._source.settings,
            momentum=self.experiment.method.continues_momentum,
        )

    @property
    def seeds(self) -> np.ndarray:
        """The seeds of its trainings."""
        train = self.settings.train
        return np.arange(train.seeds, dtype=np.uint32) + train.seed

    def run(self) -> Trace:
        """Train all seeds together and measure.

        Raises:
          UsageError: the loss or a parameter is no longer a number.
        """
        return Course(self).run()


class Scoring:
    """What states are scored by.

    Args:
      replay: whose states they are.
      source: what it starts from.
      like: that of another adaptation to the same data, whose programs and placed data serve here.
    """

    head: str
    programs: CompiledSteps
    source_programs: CompiledSteps

    def __init__(self, replay: Replay, source: Source, like: Scoring | None):
        self.head = replay.experiment.model.head
        theirs, head = _source_task(replay, source)
        self.programs = like.programs if like else replay.programs
        self.source_programs = like.source_programs if like else theirs
        self._source_head = head
        self._splits: dict[str, Arrays] = like._splits if like else {}
        self._datasets = {"source": source.dataset.test} | {
            name: getattr(replay.dataset, name) for name in ("train", "validation", "test")
        }

    def split(self, name: str) -> Arrays:
        """Return "train", "validation", "test" or the "source" task's test split on the devices."""
        if name not in self._splits:
            mesh, flat = self.programs.mesh, data.flatten(self._datasets[name])
            self._splits[name] = Arrays(*(meshes.place(mesh, part) for part in flat))
        return self._splits[name]

    @functools.cached_property
    def source_head(self) -> PyTree:
        """The source's own classifier."""
        mesh = self.programs.mesh
        return jax.tree.map(
            lambda leaf: meshes.place(mesh, leaf, meshes.BY_SEED), self._source_head
        )

    @functools.cached_property
    def sizes(self) -> Any:
        """Compiled :func:`seal_jax.evaluation.anytime.sizes` of all seeds."""
        return jax.jit(jax.vmap(functools.partial(anytime.sizes, head=self.head)))

    def validation(self, weights: Weights) -> np.ndarray:
        """Return the accuracy ``[S]`` on the validation split."""
        sums = jax.device_get(self.programs.score_validation(weights, self.split("validation")))
        return mean(sums.correct, sums)

    def test(self, weights: Weights) -> dict[str, np.ndarray]:
        """Return accuracies ``[S]`` on the test split: "" and, of more than five classes, "_top5"."""
        sums = jax.device_get(self.programs.test(weights, self.split("test")))
        top5 = {f"_{name}": mean(hits, sums) for name, hits in sums.measures.items()}
        return {"": mean(sums.correct, sums), **top5}

    def on_source(self, weights: Weights) -> np.ndarray:
        """Return the accuracy ``[S]`` on the source's test split, under its own classifier."""
        old = weights._replace(params={**weights.params, self.head: self.source_head})
        sums = jax.device_get(self.source_programs.test(old, self.split("source")))
        return mean(sums.correct, sums)


def _mesh(settings: Settings) -> Mesh:
    """Return the mesh over as many devices as seeds and batch can be divided over."""
    devices = jax.devices()
    for count in range(len(devices), 1, -1):
        try:
            return meshes.make(settings, devices[:count])
        except UsageError:
            continue
    return meshes.make(settings, devices[:1])


def _source_task(replay: Replay, source: Source) -> tuple[CompiledSteps, PyTree]:
    """Return the programs that score the source's task, and the head for it, a row a seed.

    Raises:
      UsageError: the source's network does not fit its data any more, or that of the adaptation.
    """
    mesh, train = replay.programs.mesh, source.settings.train
    plain = dataclasses.replace(
        source.settings,
        method={"name": "normal"},
        # Of its own training only the network's precision matters.
        train=dataclasses.replace(settings_lib.Train(), dtype=train.dtype, batch_size=1),
        optimizer=settings_lib.Optimizer(),
        run=replay.settings.run,
    )
    theirs = experiments.build(plain, experiments.data_shape(source.dataset), mesh)
    head = theirs.model.head
    prefix = f"{pretrained.SOURCES[replay.settings.train.pretrained_weights]}params/"
    count = replay.settings.train.seeds
    target = jax.eval_shape(replay.experiment.model.init, jax.random.key(0))["params"]
    here = {name: leaf.shape for name, leaf in paths.named_leaves(target)}
    wanted = jax.eval_shape(theirs.model.init, jax.random.key(0))["params"]
    for name, leaf in paths.named_leaves(wanted):
        found = source.leaves.get(prefix + name)
        if found is None or found.shape[1:] != leaf.shape:
            there = "absent" if found is None else f"{list(found.shape[1:])}"
            raise UsageError(
                f"{source.label}: its {name} is {there}, and its data, "
                f"{source.dataset.name} of {source.dataset.num_classes} classes, asks for "
                f"{list(leaf.shape)}; give it the data that it was trained on"
            )
        if name.partition("/")[0] != head and here.get(name) != leaf.shape:
            raise UsageError(
                f"{source.label}: its {name} is {list(leaf.shape)}, and that of "
                f"the adaptation {list(here.get(name, ()))}; the source task cannot be scored"
            )

    def row(path: Any, leaf: Any) -> np.ndarray:
        own = source.leaves[f"{prefix}{head}/{paths.name(path)}"]
        return np.repeat(own, count, 0) if len(own) == 1 else own[:count]

    return theirs.programs, jax.tree_util.tree_map_with_path(row, wanted[head])
