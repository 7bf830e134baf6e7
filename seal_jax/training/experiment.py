"""Puts an experiment together from its settings: model, method, clock and compiled steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from seal_jax import data, methods, models, paths
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core import vary
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError
from seal_jax.methods import Method
from seal_jax.training import early_stopping, streaming
from seal_jax.training import workdir as workdirs
from seal_jax.training.batches import Batches, DataShape, row_bytes, steps_per_epoch, warm_count
from seal_jax.training.step import Experiment


def load(settings: Settings) -> data.Dataset:
    """Load the data that the trainings of a run see, into host memory or to be streamed."""
    return split(settings, load_source(settings.data))


def split(settings: Settings, source: data.Dataset) -> data.Dataset:
    """Return what the trainings of a run see of a data set: :func:`split_data`, or several draws of it."""
    draws = vary.draws(settings)[0]
    return split_data(draws[0], source, draws if len(draws) > 1 else ())


def load_data(fields: settings_lib.Data, run: Path | None = None) -> data.Dataset:
    """Load the data set that the settings name, into host memory or to be streamed.

    With the folder of a ``run`` that replaced labels, its training labels are those that it trained on,
    whatever became of ``data.label_file``.
    """
    if run is not None and (labels := run / workdirs.LABELS).exists():
        fields = dataclasses.replace(fields, label_noise=0.0, label_file=str(labels))
    return split_data(fields, load_source(fields))


def load_source(fields: settings_lib.Data) -> data.Dataset:
    """Load the data set that the settings name as it is: no validation split, no options for studies."""
    return data.load(
        fields.name,
        data_dir=fields.data_dir or None,
        train_split=fields.train_split,
        test_split=fields.test_split or None,
        label=fields.label or None,
        image_size=fields.image_size or None,
        validation_fraction=0.0,
        placement=fields.placement,
        room=_room() if fields.placement == "auto" else None,
        corrupt=fields.corrupt,
        channels=fields.channels or None,
    )


def split_data(
    fields: settings_lib.Data, source: data.Dataset, draws: Sequence[settings_lib.Data] = ()
) -> data.Dataset:
    """Return what the settings make of a data set that has no validation split yet: see :func:`seal_jax.data.study`."""
    dataset = data.study(
        source,
        validation_fraction=fields.validation_fraction,
        validation_seed=fields.validation_seed,
        train_count=fields.train_count,
        imbalance=fields.imbalance,
        subset_seed=fields.subset_seed,
        label_noise=fields.label_noise,
        label_noise_seed=fields.label_noise_seed,
        label_file=fields.label_file,
        draws=[{field: getattr(draw, field) for field in vary.DRAWN} for draw in draws],
    )
    if fields.selection == "test_best":
        # The test split in the validation split's place: nothing below knows the difference.
        return dataclasses.replace(dataset, validation=dataset.test)
    return dataset


def _room() -> int | None:
    """Return the bytes that images may take: half of what each device and host has free, None if it is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}  # CPU devices report none
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    room = min((part // 2 for part in (free, data.available_memory()) if part), default=None)
    if jax.process_count() == 1:
        return room
    # Of all processes the least: their programs differ by the placement. In MB, since JAX has 32 bits.
    most = np.iinfo(np.int32).max
    megabytes = np.int32(most if room is None else min(room >> 20, most))
    return int(multihost_utils.process_allgather(megabytes).min()) << 20


def check_data(settings: Settings, dataset: data.Dataset) -> None:
    """Raise if the training split lacks what the settings need of it, or a device has no room."""
    if dataset.train.streamed and dataset.draws is not None:
        if varied := [field for field in vary.points(settings)[0] if field in vary.DRAWS]:
            raise vary.CannotVary(varied, "images are streamed")
        raise UsageError(
            'data.placement: trainings with draws of their own share images on the device; set it to "device", or '
            'data.draws to "shared"'
        )
    if dataset.train.streamed:
        # Decoded, stacked and on their way to the devices, those of the next step beside those of this one.
        images = vary.trainings(settings) * settings.train.batch_size
        needed = 4 * images * math.prod(dataset.image_shape)
        free = data.available_memory() or needed
        if needed > free:
            raise UsageError(
                f"data.image_size: a step's {images} images of {'x'.join(map(str, dataset.image_shape))} "
                f"take {needed:,} bytes to stream, and {free:,} are free: lower it, or train.batch_size"
            )
    else:
        # Every device holds all splits whole, one that stands for two once. CPU devices report no limit.
        device = jax.local_devices()[0]
        validation = () if dataset.validation is dataset.test else dataset.validation
        count = sum(map(len, (dataset.train, validation, dataset.test)))
        needed = count * row_bytes(dataset.image_shape)
        room = (device.memory_stats() or {}).get("bytes_limit", needed)
        if needed > room:
            raise UsageError(
                f"data.placement: all images take {needed:,} bytes of each device, which has {room:,}: set "
                "it to stream, lower data.image_size, or choose smaller splits"
            )
    if settings.train.sampling == "balanced":
        labels = dataset.train.labels[None] if dataset.draws is None else dataset.draws.labels
        for drawn in labels:
            counts = np.bincount(drawn, minlength=dataset.num_classes)
            if not counts.all():
                raise UsageError(
                    f"data.train_split = {settings.data.train_split!r} has no image of class "
                    f'{np.argmin(counts)}, and train.sampling = "balanced" needs one of each'
                )


def data_shape(dataset: data.Dataset) -> DataShape:
    """Return the shape of a loaded data set."""
    draws = dataset.draws
    noisy = dataset.train if draws is None else draws
    return DataShape(
        train=len(dataset.train) if draws is None else draws.labels.shape[1],
        validation=len(dataset.validation),
        test=len(dataset.test),
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        noisy=noisy.clean_labels is not None,
        streamed=dataset.train.streamed,
        draws=0 if draws is None else len(draws.labels),
        images=0 if draws is None else len(dataset.train),
    )


def build(settings: Settings, shape: DataShape, mesh: Mesh) -> Experiment:
    """Return the experiment that ``settings`` describe on data of this shape.

    Raises:
      UsageError: settings that do not fit the data, the model, the devices or each other.
    """
    train = settings.train
    points = vary.points(settings)
    if points[0]:
        # What the programs are built from has the values of one point, so that it differs from the others in numbers
        # alone.
        settings = dataclasses.replace(vary.at(settings, points[0]), train=train)
    steps = steps_per_epoch(shape.train, train.batch_size, train.drop_last)
    # Checked again: Settings assumes one step per epoch, only the data tells how many there are.
    settings_lib.check_steps(train, steps)
    balanced = train.sampling == "balanced"
    if balanced and not train.drop_last:
        raise UsageError(
            'train.drop_last = False does not go with train.sampling = "balanced"; use True'
        )
    if balanced and train.batch_size % shape.num_classes:
        raise UsageError(
            f"train.batch_size = {train.batch_size} must be a multiple of the {shape.num_classes} "
            f'classes of {settings.data.name} with train.sampling = "balanced"'
        )
    _check_accumulation(settings, mesh)
    # On one device the batch is whole without communication.
    synchronised = train.batch_norm == "global" and mesh.shape[meshes.DATA] > 1
    model = create_model(
        settings.model,
        shape.image_shape,
        shape.num_classes,
        dtype=train.dtype,
        on_cpu=meshes.on_cpu(mesh),
        bn_axis_name=meshes.DATA if synchronised else None,
        remat=train.remat,
    )
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    # A method is built from shapes only: preflight compiles without weights or data.
    context = methods.Context(model, params, steps, settings.optimizer, train)
    method = methods.build(settings.method, context)
    # A warm start sees fewer images than there are.
    _check_extra_batches(method, warm_count(shape.train, settings.data), mesh)
    shards = mesh.shape[meshes.DATA]
    for field in ("mixup", "cutmix"):
        # Images are mixed with their neighbours, which must be on the same device.
        if getattr(settings.data, field) and train.batch_size // shards % 2:
            raise UsageError(
                f"train.batch_size = {train.batch_size} must be a multiple of {2 * shards} with "
                f"data.{field}: each of the {shards} devices along the data axis mixes pairs"
            )
    steps_per_call = _steps_per_call(settings, steps, shape, method)
    augmentation = augmentation_of(settings, shape.image_shape)
    experiment = Experiment(
        settings=settings,
        mesh=mesh,
        context=context,
        method=method,
        batches=Batches(
            shape, train, method, model, augmentation, settings.data, mesh.shape[meshes.DATA]
        ),
        early_stopping=early_stopping.rules(settings, context.clock, bool(shape.validation)),
        steps_per_call=steps_per_call,
    )
    if points[0]:
        _check_points(experiment)
    return experiment


def _check_points(experiment: Experiment) -> None:
    """Raise unless every point is an experiment, and all of them are one program."""
    settings, context = experiment.settings, experiment.context
    fields, points = tuple(vary.values(settings)), vary.points(settings)

    def leaves(opt_state: Any) -> list[str]:
        return [name for name, _ in paths.named_leaves(opt_state)]

    alone = []
    for point in points:
        one = vary.at(settings, point)
        method = methods.build(one.method, dataclasses.replace(context, optimizer=one.optimizer))
        alone.append(leaves(jax.eval_shape(method.tx.init, context.params)))
    if not fields:
        return

    def trace(*fields: str) -> list[str]:
        """Trace the programs that depend on the values of these fields; return the leaves of the optimizer's state."""
        state, data = experiment.abstract_state(fields=fields), experiment.abstract_data()
        jax.eval_shape(experiment.start_generation, state, data)
        jax.eval_shape(experiment.train, state, data)
        return leaves(state.opt_state)

    try:
        together = trace(*fields)
    # Raised where Python asks for the value of a traced number, to branch on it, to print it or to make a shape of it.
    except (UsageError, TypeError) as error:
        trace()  # whatever is wrong without any point is another error
        for field in fields:
            try:
                trace(field)
            except (UsageError, TypeError):
                raise vary.CannotVary([field], "it changes the program itself") from error
        raise vary.CannotVary(fields, "together they change the program itself") from error
    # A rate of 0 that is known when a method is built may leave parts of it out.
    for point, parts in zip(points, alone, strict=True):
        if parts != together:
            zeros = [field for field in fields if not point[field]]
            raise vary.CannotVary(zeros or fields, "0 is another program")


def create_model(
    fields: settings_lib.Model,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    dtype: str,
    on_cpu: bool,
    bn_axis_name: str | None = None,
    remat: bool = False,
) -> models.Model:
    """Return the network that the settings name, for these images and classes."""
    options = {field: v for field, v in dataclasses.asdict(fields).items() if v is not None}
    return models.create(
        **options,
        num_classes=num_classes,
        image_shape=image_shape,
        dtype=jnp.dtype(dtype),
        bn_axis_name=bn_axis_name,
        # Steps run in loops, in which XLA's convolutions are slow on a CPU.
        convolution="canonical" if on_cpu else "native",
        remat=remat,
    )


def _steps_per_call(settings: Settings, steps: int, shape: DataShape, method: Method) -> int:
    """Return how many steps a call of the train program has."""
    every = settings.train.validate_every
    if every and not shape.validation:
        raise UsageError(
            f"train.validate_every = {every} needs a validation split: set data.validation_fraction"
        )
    if every and steps % every:
        raise UsageError(
            f"train.validate_every = {every} does not divide the {steps} steps of an epoch"
        )
    # A call must end wherever the host has something to do: at the end of an epoch, and at each validation.
    count = settings.run.steps_per_call or every or steps
    if shape.streamed and not settings.run.steps_per_call:
        images = settings.train.batch_size + method.extra_batches * method.extra_batch_size
        step_bytes = vary.trainings(settings) * images * math.prod(shape.image_shape)
        count = streaming.steps_per_call(step_bytes, count)
    if steps % count:
        raise UsageError(
            f"run.steps_per_call = {count} does not divide the {steps} steps of an epoch"
        )
    if every and every % count:
        raise UsageError(
            f"run.steps_per_call = {count} does not divide train.validate_every = {every}"
        )
    return count


def _check_accumulation(settings: Settings, mesh: Mesh) -> None:
    """Raise unless each device's part of a batch can be cut into equal parts."""
    count, batch = settings.optimizer.accumulate, settings.train.batch_size
    shards = mesh.shape[meshes.DATA]
    if count > 1 and batch % (shards * count):
        raise UsageError(
            f"optimizer.accumulate = {count} does not divide the {batch // shards} images of a batch on each of "
            f"{shards} device(s): change it or train.batch_size"
        )


def _check_extra_batches(method: Method, images: int, mesh: Mesh) -> None:
    """Raise if the further batches that a method asks for cannot be had of so many ``images``."""
    size, shards = method.extra_batch_size, mesh.shape[meshes.DATA]
    if size * method.extra_batches > images:
        times = f" times {method.extra_batches} batches" if method.extra_batches > 1 else ""
        raise UsageError(
            f"method.weak_batch_size = {size}{times} is too large for {images} training images"
        )
    if size % shards:
        raise UsageError(
            f"method.weak_batch_size = {size} is no multiple of the {shards} devices along the data "
            "axis (run.data_devices)"
        )


def augmentation_of(settings: Settings, image_shape: tuple[int, int, int]) -> Any:
    """Return the augmentation that ``settings.data`` ask for."""
    fields = settings.data
    # Data sets whose statistics are not known take ImageNet's.
    name = fields.normalisation or data.normalisation(fields.name) or "imagenet"
    # The statistics of one channel are those of three copies of it.
    mean, std = (
        part * image_shape[-1] if len(part) == 1 else part for part in data.statistics(name)
    )
    spec = data.Augmentation(
        mean=mean,
        std=std,
        crop_padding=fields.crop_padding,
        flip=fields.flip,
        cutout=fields.cutout,
        randaugment=fields.randaugment,
        randaugment_magnitude=fields.randaugment_magnitude,
    )
    data.check_image_shape(spec, image_shape)
    return spec
