"""The programs that preflight compiles: training, scoring, a product with the Hessian, few-shot episodes.

Each is lowered by the functions that the trainer and the evaluators call, with shapes in place of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from seal_jax import data
from seal_jax.core import mesh as meshes
from seal_jax.core.settings import Settings
from seal_jax.data.catalogue import RECORDS
from seal_jax.errors import UsageError
from seal_jax.evaluation import affines
from seal_jax.evaluation import few_shot as episodes_lib
from seal_jax.evaluators import few_shot as few_shot_evaluator
from seal_jax.evaluators import hessian as hessian_evaluator
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.loaded_run import DescribedRun, Network
from seal_jax.hessian import krylov
from seal_jax.training import experiment as experiments
from seal_jax.training.batches import row_bytes
from seal_jax.training.step import Experiment
from tools.preflight.chips import CHIPS
from tools.preflight.report import Run, human

# (train, test, image shape, classes) of the data sets of the papers: a program depends on the shapes of its
# data alone, so it is compiled without the data.
KNOWN = {
    name: (int(info.train), int(info.test or 0), info.image_shape, info.classes)
    for info in RECORDS
    if info.image_shape
    for name in info.names
}


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      lowered: the ``jax.stages.Lowered``.
      steps: trips of its outermost loop in one call.
      run: the work that it is part of.
      notes: lines of text for the user.
    """

    lowered: Any
    steps: int
    run: Run
    notes: str


def data_shape(settings: Settings) -> experiments.DataShape:
    """Return the shape of the settings' data, as the trainer splits it.

    Raises:
      UsageError: a data set whose shape is not known.
    """
    fields = settings.data
    if fields.name not in KNOWN:
        raise UsageError(
            f"data.name = {fields.name!r} has no known shape for preflight; "
            f"known are {', '.join(KNOWN)}"
        )
    train_size, test_size, image_shape, classes = KNOWN[fields.name]
    if fields.image_size:
        image_shape = (fields.image_size, fields.image_size, image_shape[2])
    image_shape = (*image_shape[:2], fields.channels or image_shape[2])
    held_out = round(train_size * fields.validation_fraction)
    train_size -= held_out
    if fields.train_count or fields.imbalance > 1:
        # The known data sets have as many images of each class, or nearly.
        available = np.full(classes, train_size // classes)
        train_size = int(data.class_counts(available, fields.train_count, fields.imbalance).sum())
    noisy = bool(fields.label_noise or fields.label_file)
    return experiments.DataShape(train_size, held_out, test_size, image_shape, classes, noisy=noisy)


def train(experiment: Experiment, options: Any, price: float | None) -> Program:
    """Return a call of the train program."""
    settings, shape = experiment.settings, experiment.batches.shape
    lowered = experiment.train.lower(_state(experiment), _on_mesh(experiment))
    # Not arguments of the train program, so the compiler does not count them.
    beside = (shape.validation + shape.test) * row_bytes(shape.image_shape) / 2**20
    return Program(
        lowered,
        experiment.steps_per_call,
        Run(
            experiment.total_steps,
            settings.train.seeds * settings.train.batch_size,
            experiment.mesh.size,
            price,
            settings.train.seeds,
        ),
        f"not counted below: validation and test images, {beside:,.1f} MiB on every device",
    )


def evaluate(experiment: Experiment, options: Any, price: float | None) -> Program:
    """Return the scoring of the test images during training."""
    size = experiment.batches.shape.test
    order = experiment.scoring_order(size)
    weights = _state(experiment).weights
    lowered = experiment.score_batches.lower(weights, _on_mesh(experiment, size), order)
    batches = len(order[0])
    seeds = experiment.settings.train.seeds
    return Program(
        lowered,
        batches,
        Run(
            batches,
            seeds * size / batches,
            experiment.mesh.size,
            price,
            seeds,
            work="One pass over the test images",
        ),
        "not counted below: the state of the training, the other images",
    )


def hessian(
    experiment: Experiment, options: hessian_evaluator.Options, price: float | None
) -> Program:
    """Return a product with the Hessian over the whole data, of which Lanczos iterations consist."""
    described, variables = _described(experiment)
    devices = list(experiment.mesh.devices.flat)
    measurement = hessian_evaluator.Measurement(described, options, devices=devices)
    pixels = measurement.whole.rows.size * math.prod(described.model.image_shape)
    if measurement.half_budget is not None and pixels > measurement.half_budget:
        raise UsageError(
            f"--byte-budget={options.byte_budget} streams the {human(pixels)} of images, and preflight compiles "
            "products with images on the device alone; leave it out"
        )
    op = measurement.abstract_operator(Network("last", 0, 0, variables, {}))
    lowered = krylov.applied.lower(op, op.like)
    count = len(measurement.whole.rows)
    used = jax.tree.leaves(op)[0].sharding.mesh.size
    return Program(
        lowered,
        count,
        Run(
            count,
            len(measurement.whole.split) / count,
            used,
            price,
            work="One product with the Hessian over the training images",
        ),
        f"in float32, over {used} device(s), which divide --data-batch-size={options.data_batch_size}\n"
        "not counted below: the Krylov basis of the eigenvalues and the work on it, "
        f"{human(measurement.basis_bytes(op.like))} on every device",
    )


def few_shot(
    experiment: Experiment, options: few_shot_evaluator.Options, price: float | None
) -> Program:
    """Return a call of the episodes whose head is Linear+Affines, with the most shots."""
    described, variables = _described(experiment)
    if not affines.affines_of(variables["params"], variables["batch_stats"]):
        raise UsageError(
            f"--program=few_shot: {described.model.name} has no BatchNorm whose scales and biases could train"
        )
    devices = list(experiment.mesh.devices.flat)
    chip = CHIPS.get(devices[0].device_kind)
    model = transfer_data.model_for(described, options.image_size)
    normalise, _ = transfer_data.normalisation(described, options.normalisation)
    protocol = options.protocol(max(options.shots))
    mesh = meshes.along(episodes_lib.EPISODES, devices)
    spec, size, together = affines.plan(
        model,
        variables,
        model.image_shape,
        normalise,
        protocol,
        mesh,
        together=options.together,
        # As on the chip itself: a third of its memory.
        byte_budget=chip.hbm // 3 if chip else None,
    )
    # As many as a work item has.
    count = -(-min(together * mesh.size, options.affines_chunk, options.episodes) // mesh.size)
    count *= mesh.size
    images = protocol.ways * (protocol.shots + protocol.queries)
    one = episodes_lib.draw(
        np.split(np.arange(images), protocol.ways), size, protocol, seed=0, number=0
    )
    drawn = jax.tree.map(lambda part: jax.ShapeDtypeStruct((count, *part.shape), part.dtype), one)
    pixels = jax.ShapeDtypeStruct((count, images, math.prod(model.image_shape)), jnp.uint8)
    whole = NamedSharding(mesh, meshes.REPLICATED)
    lowered = affines.tune.lower(_placed(variables, whole), pixels, drawn, spec)
    calls = -(-options.episodes // count)
    return Program(
        lowered,
        protocol.epochs,
        Run(
            calls * protocol.epochs,
            count * protocol.ways * protocol.shots,
            mesh.size,
            price,
            work=f"{options.episodes} episodes of {protocol.shots} shots on one data set",
        ),
        f"Linear+Affines in float32, {count} episodes a call; a step below is an epoch of all of them\n"
        "not counted below: the linear head, decoding and resizing of images",
    )


# By the value of --program. Of those that are evaluators, the options are those of `evaluate`.
PROGRAMS: dict[str, Callable[[Experiment, Any, float | None], Program]] = {
    function.__name__: function for function in (train, evaluate, hessian, few_shot)
}


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _on_mesh(experiment: Experiment, size: int | None = None) -> Any:
    """Return the shapes of a split, which every device holds whole."""
    replicated = NamedSharding(experiment.mesh, meshes.REPLICATED)
    return _placed(experiment.abstract_data(size), replicated)


def _state(experiment: Experiment) -> Any:
    return experiment.abstract_state()


def _described(experiment: Experiment) -> tuple[DescribedRun, dict[str, Any]]:
    """Return the run that the experiment would leave, and the shapes of one network's variables."""
    settings, shape = experiment.settings, experiment.batches.shape
    # One seed of the trainer's own state: normalisers are among its weights.
    weights = _state(experiment).weights._asdict()
    variables = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
        for name, tree in weights.items()
    }
    dataset = data.Dataset(
        name=settings.data.name,
        num_classes=shape.num_classes,
        class_names=tuple(map(str, range(shape.num_classes))),
        train=_blank(shape.train, shape.image_shape),
        validation=_blank(0, shape.image_shape),
        # Never empty.
        test=_blank(1, shape.image_shape),
    )
    on_cpu = meshes.on_cpu(experiment.mesh)
    return DescribedRun(settings, dataset, on_cpu=on_cpu), variables


def _blank(count: int, image_shape: Sequence[int]) -> data.Split:
    """Return a split of black images, which take the memory of one byte."""
    images = np.broadcast_to(np.uint8(0), (count, *image_shape))
    return data.Split(images, np.zeros(count, np.int32))
