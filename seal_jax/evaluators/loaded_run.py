"""The networks of a training run with its data, loaded to be evaluated."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from seal_jax import data, paths
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core import vary
from seal_jax.core.settings import Settings
from seal_jax.data.readers import IN_PLACE
from seal_jax.errors import UsageError
from seal_jax.evaluators.options import check_names
from seal_jax.generations import Clock
from seal_jax.models import Model
from seal_jax.training import experiment as experiments
from seal_jax.training import workdir as workdirs
from seal_jax.training.batches import padded_batches, steps_per_epoch
from seal_jax.training.checkpoints import Checkpoints, read_leaves
from seal_jax.training.pretrained import NEEDS, SOURCES

PyTree = Any
BATCH = "batch"


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: arrays have no hash
class Network:
    """One trained network.

    Attributes:
      weights: "last", "best" by validation accuracy in the running generation, or their average over steps, "ema".
      seed: of its training.
      step: of the checkpoint.
      variables: Flax collections of host arrays: params, batch_stats, and LW's normalisers.
      identity: JSON values that identify it; every record begins with them.
    """

    weights: str
    seed: int
    step: int
    variables: Mapping[str, PyTree]
    identity: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Its name within the run, for the keys of work items.

        >>> Network("last", 0, 88, {}, {}).key
        'step88/last/seed0'
        """
        return f"step{self.step}/{self.weights}/seed{self.seed}"


class DescribedRun:
    """The settings, data and network of a run, without its weights.

    The network computes in float32, regardless of the training's precision.

    Args:
      settings: the training's.
      dataset: its data.
      on_cpu: whether the network is to run on a CPU.
    """

    def __init__(self, settings: Settings, dataset: data.Dataset, *, on_cpu: bool):
        self.settings, self.dataset = settings, dataset
        self.model: Model = experiments.create_model(
            settings.model,
            dataset.image_shape,
            dataset.num_classes,
            dtype="float32",
            on_cpu=on_cpu,
            remat=settings.train.remat,
        )

    @property
    def channels(self) -> int:
        """Channels of the images that the network takes."""
        return self.model.image_shape[-1]

    @functools.cached_property
    def augmentation(self) -> data.Augmentation:
        """The augmentation of training images, with the normalisation of all images."""
        return experiments.augmentation_of(self.settings, self.dataset.image_shape)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Return uint8 images as the network's input; traced."""
        return data.apply(images, None, self.augmentation)


class DivergedError(UsageError):
    """None of the networks holds finite weights."""


def load(run: Path, *, weights: Sequence[str] = (), steps: str = "newest") -> list[LoadedRun]:
    """Load a run: once, or where its seeds have draws of the data of their own, once for each of them."""
    which: dict[str, Any] = {"weights": weights, "steps": steps}
    # Where it is no run, the class says so.
    if (run / workdirs.CONFIG).is_file():
        settings = settings_lib.read(Settings, workdirs.read_single(run))
        if len(vary.draws(settings)[0]) > 1:
            first, count = settings.train.seed, settings.train.seeds
            parts: list[LoadedRun] = []
            lost: list[DivergedError] = []
            for seed in range(first, first + count):
                try:
                    parts.append(LoadedRun(run, **which, seed=seed))
                except DivergedError as error:
                    lost.append(error)
            if not parts:
                raise lost[0]
            for reason in lost:
                warnings.warn(f"left out: {reason}", stacklevel=2)
            return parts
    return [LoadedRun(run, **which)]


class LoadedRun(DescribedRun):
    """A run's networks and data.

    Args:
      run: the run's folder.
      weights: some of "last", "best" and "ema"; by default those that the run has.
      steps: "newest", "all", or steps separated by commas.
      seed: of the only training to load, where each seed has a draw of the data of its own; see :func:`load`.

    Attributes:
      run, settings, dataset, model: the training's.
      networks: by step, weights and seed, without those that diverged.

    Raises:
      UsageError: no such run or checkpoint, a checkpoint of another network, or data that was not prepared.
      DivergedError: the weights of no network are finite.
    """

    def __init__(
        self,
        run: Path,
        *,
        weights: Sequence[str] = (),
        steps: str = "newest",
        seed: int | None = None,
    ):
        if not (run / workdirs.CONFIG).is_file():
            raise UsageError(
                f"--checkpoint={run} is not the folder of a run: it has no {workdirs.CONFIG}"
            )
        check_names("weights", weights, SOURCES)
        if len(set(weights)) < len(weights):
            raise UsageError(f"--weights={','.join(weights)} names one twice; name each once")
        self.run = run
        settings = settings_lib.read(Settings, workdirs.read_single(run))
        self._seeds = range(settings.train.seed, settings.train.seed + settings.train.seeds)
        if seed is not None:
            train = dataclasses.replace(settings.train, seed=seed, seeds=1)
            settings = dataclasses.replace(settings, train=train)
        chosen = _steps(run / workdirs.CHECKPOINTS, steps)
        # The data before the network: images and classes determine its shape.
        dataset = experiments.load_data(vary.draw(settings.data, settings.train.seed), run)
        super().__init__(settings, dataset, on_cpu=jax.default_backend() == "cpu")
        every = [network for step in chosen for network in self._networks(step, tuple(weights))]
        self.networks = []
        lost = []
        for network in every:
            if (name := _not_finite(network.variables)) is None:
                self.networks.append(network)
            else:
                lost.append(
                    f"checkpoint {run / workdirs.CHECKPOINTS / str(network.step)} holds NaN or infinity in {name} of "
                    f"seed {network.seed}: the training diverged; evaluate an earlier one with --steps="
                )
        if lost and not self.networks:
            raise DivergedError(lost[0])
        for message in lost:
            warnings.warn(f"left out: {message}", stacklevel=2)
        self._programs: dict[Callable[..., Any], Any] = {}

    @property
    def label(self) -> dict[str, Any]:
        """The JSON values that the records of all its networks have in common."""
        return {
            "run": self.run.resolve().name,
            "data": self.settings.data.name,
            "model": self.settings.model.name,
            "method": self.settings.method["name"],
        }

    def data_dir(self, name: str) -> str | None:
        """Return where a data set is prepared: beside the run's own, unless that was read where it lies."""
        own = self.settings.data
        in_place = own.name.split("/")[0] in IN_PLACE and name != own.name
        return None if in_place else own.data_dir or None

    @property
    def fingerprint(self) -> str:
        """A digest of all weights, which changes when the run is continued or repeated."""
        digest = hashlib.sha256()
        for network in self.networks:
            # The order of leaves is that of sorted names, so the digest is the same in every process.
            for leaf in jax.tree.leaves(network.variables):
                digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()[:16]

    def logits(self, network: Network, images: np.ndarray, batch_size: int = 256) -> Any:
        """Return the logits ``[n, classes]`` of uint8 images in inference mode."""
        return self.apply(self._outputs, network, images, batch_size, "logits")

    def features(self, network: Network, images: np.ndarray, batch_size: int = 256) -> Any:
        """Return the classifier's input ``[n, d]`` of uint8 images in inference mode."""
        return self.apply(self._outputs, network, images, batch_size, "features")

    def _outputs(self, variables: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        # One program for both: an evaluation that needs logits and features compiles the network once.
        by_name = self.model.features(variables, images)
        return {name: by_name[name] for name in ("features", "logits")}

    def apply(
        self,
        function: Callable[[PyTree, jax.Array], PyTree],
        network: Network,
        images: np.ndarray,
        batch_size: int = 256,
        output: str | None = None,
    ) -> PyTree:
        """Return ``function(variables, normalised images)`` over all images, batch by batch.

        Every batch, of uint8 images ``[n, height, width, channels]``, is divided over the devices, so its
        size is rounded up to a multiple of them. The same object ``function`` is the same program for all
        networks; it is traced. The result is a pytree of NumPy arrays with first axis n; of a dictionary
        only ``output`` is fetched, if it is named.
        """
        mesh = meshes.along(BATCH)
        batch = -(-min(batch_size, len(images)) // mesh.size) * mesh.size
        # jax.jit caches by the function object, and the lambda here is a new one at every call.
        if function not in self._programs:
            self._programs[function] = jax.jit(
                lambda variables, images: function(variables, self.normalise(images))
            )
        program = self._programs[function]
        variables = jax.device_put(network.variables, NamedSharding(mesh, PartitionSpec()))
        divided = NamedSharding(mesh, PartitionSpec(BATCH))
        outputs = []
        for part in data.batches(images, padded_batches(len(images), batch)[0]):
            computed = program(variables, jax.device_put(part, divided))
            # Each batch is fetched before the next is sent, so a device holds one batch's outputs.
            outputs.append(jax.device_get(computed if output is None else computed[output]))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *outputs)

    def _networks(self, step: int, asked: tuple[str, ...]) -> list[Network]:
        """Return the networks of one checkpoint."""
        leaves = read_leaves(self.run / workdirs.CHECKPOINTS, step=step)
        assert leaves is not None  # of that step, or it raises
        train = self.settings.train
        per_epoch = steps_per_epoch(len(self.dataset.train), train.batch_size, train.drop_last)
        clock = Clock(per_epoch, train.epochs_per_generation)
        # A generation's last checkpoint is saved before the event that starts the next, so it belongs to the former.
        generation = int(clock.generation(max(step - 1, 0)))
        networks = []
        for weights in asked or SOURCES:
            missing = not any(name.startswith(SOURCES[weights]) for name in leaves)
            # An accuracy below 0: no validation split has been scored yet.
            if missing or (weights == "best" and np.min(leaves["best/accuracy"]) < 0):
                if not asked:
                    continue
                raise UsageError(
                    f"--weights={weights} needs {NEEDS[weights]}, and {self.run} has scored none at step "
                    f"{step}; use --weights=last"
                )
            all_seeds = self._variables(leaves, SOURCES[weights], step)
            for index, seed in enumerate(self._seeds):
                if not train.seed <= seed < train.seed + train.seeds:
                    continue
                variables = jax.tree.map(lambda leaf, index=index: leaf[index], all_seeds)
                identity = {"weights": weights, "seed": seed, "step": step}
                identity = {**self.label, **identity, "generation": generation}
                networks.append(Network(weights, seed, step, variables, identity))
        return networks

    def _variables(
        self, leaves: Mapping[str, np.ndarray], prefix: str, step: int
    ) -> dict[str, PyTree]:
        """Return the collections of all seeds, checked against the network."""
        model_leaves = paths.named_leaves(jax.eval_shape(self.model.init, jax.random.key(0)))
        expected = {name: leaf.shape for name, leaf in model_leaves}
        saved = {
            name.removeprefix(prefix): leaf
            for name, leaf in leaves.items()
            if name.startswith(prefix)
        }
        where = self.run / workdirs.CHECKPOINTS / str(step)
        for name, shape in expected.items():
            stacked = saved.get(name)  # the first axis is the seeds
            if stacked is None or stacked.shape[1:] != shape:
                saved_shape = "absent" if stacked is None else f"{list(stacked.shape[1:])}"
                raise UsageError(
                    f"checkpoint {where} is of another network than {workdirs.CONFIG} says: {name} "
                    f"is {saved_shape} there and {list(shape)} here; evaluate the run's own folder"
                )
            if len(stacked) != len(self._seeds):
                raise UsageError(
                    f"checkpoint {where} has {len(stacked)} seeds, and {workdirs.CONFIG} has "
                    f"train.seeds = {len(self._seeds)}; evaluate the run's own folder"
                )
        for name in saved:
            # The reverse check: a smaller network would fit, and lose weights. Only LW's normalisers may be extra.
            if name not in expected and not name.startswith("normalisers/"):
                raise UsageError(
                    f"checkpoint {where} is of another network than {workdirs.CONFIG} says: it has "
                    f"{name}; evaluate the run's own folder"
                )
        tree = traverse_util.unflatten_dict(saved, sep="/")
        # Always the three collections, empty ones too, so that all networks are arguments of one program.
        return {name: tree.get(name, {}) for name in ("params", "batch_stats", "normalisers")}


def _not_finite(variables: PyTree) -> str | None:
    """Return the name of a leaf that holds NaN or infinity, if there is one."""
    leaves = traverse_util.flatten_dict(variables, sep="/")
    return next((name for name, leaf in leaves.items() if not np.isfinite(leaf).all()), None)


def _steps(folder: Path, asked: str) -> list[int]:
    """Return the steps of the checkpoints that ``--steps`` names."""
    steps = Checkpoints(folder).steps()
    if not steps:
        raise UsageError(f"--checkpoint={folder.parent} holds no checkpoint yet")
    if asked == "newest":
        return steps[-1:]
    if asked == "all":
        return steps
    try:
        wanted = [int(part) for part in asked.split(",")]
    except ValueError:
        raise UsageError(
            f'--steps={asked} must be "newest", "all", or steps separated by commas'
        ) from None
    if len(set(wanted)) < len(wanted):  # or every seed would count twice
        raise UsageError(f"--steps={asked} names a checkpoint twice; name each once")
    for step in wanted:
        if step not in steps:
            raise UsageError(
                f"--steps={step}: there is no such checkpoint, only {', '.join(map(str, steps))}"
            )
    return wanted
