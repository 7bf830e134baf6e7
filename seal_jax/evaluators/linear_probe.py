"""Linear probe on other data sets: SEAL paper, Tables 1 and 12."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import data
from seal_jax.errors import UsageError, check_number, nearest
from seal_jax.evaluation import linear_probe
from seal_jax.evaluation.resizing import resized
from seal_jax.evaluators import linear_probe_views as views
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network


@dataclasses.dataclass(frozen=True)
class Options:
    """How the classifier learns. The paper leaves image size, augmentation and batch size open.

    Attributes:
      datasets: trained on the training split of each and scored on its test split.
      learning_rates: a classifier for each, without a schedule; the best test accuracy counts.
      epochs: passes over the training images.
      batch_size: of the classifier's training.
      augmentation: of the training images, anew in every epoch; "crop_flip" is that of the paper's
        pre-training, padding included. The features of all images are then computed in every epoch.
      crop_padding: pixels around the image, for "crop_flip".
      image_size: side of the images; "none" for the run's own.
      normalisation: name of channel statistics, such as "imagenet"; left out, the run's.
      test_fraction: share of its images that a data set without a test split is scored on, stratified
        by class and the same for every network; the rest are trained on.
      features: what the classifier sees, the input of the network's own or the output of a block,
        averaged over the image.
      seed: of the classifier's first weights and of the order of the images.
      feature_batch_size: images a step of the frozen network.
    """

    datasets: tuple[str, ...] = (
        "oxford_flowers102",
        "caltech_birds2011",
        "fgvc_aircraft",
        "mit_indoor67",
        "stanford_dogs",
    )
    learning_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    epochs: int = 120
    batch_size: int = 128
    augmentation: Literal["none", "flip", "crop_flip"] = "none"
    crop_padding: int = 4
    image_size: int | None = None
    normalisation: str = ""
    test_fraction: float = 0.2
    features: str = "features"
    seed: int = 0
    feature_batch_size: int = 256

    def __post_init__(self):
        transfer_data.check_names("datasets", self.datasets)
        transfer_data.check_names("learning-rates", self.learning_rates)
        for field in ("crop_padding", "image_size", "feature_batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UsageError(f"--{field.replace('_', '-')}={value} must be at least 1")
        share = self.test_fraction
        check_number("--test-fraction", share, lambda v: 0 < v < 1, "be between 0 and 1")
        self.protocol()

    def protocol(self) -> linear_probe.Protocol:
        """Return how the classifiers learn."""
        return linear_probe.Protocol(self.learning_rates, self.epochs, self.batch_size)


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit a data set and network, data sets outermost."""
    shape = transfer_data.image_shape(loaded_run, options.image_size)
    shown_as = transfer_data.normalisation(loaded_run, options.normalisation)
    known = ("features", *loaded_run.model.round_blocks)
    if options.features not in known:
        raise UsageError(
            f"--features={options.features} is not one of {', '.join(known)}"
            f"{nearest(options.features, known)}"
        )
    augmentation = _augmentation(options, shape)
    complete = {name: transfer_data.has_test_split(loaded_run, name) for name in options.datasets}
    model = resized(loaded_run.model, shape)

    @functools.lru_cache(maxsize=1)
    def load(name: str) -> data.Dataset:
        return transfer_data.transfer_set(loaded_run, name, shape[:2], options.test_fraction)

    def features_of(variables: Any, images: jax.Array) -> jax.Array:
        images = shown_as.from_theirs(images) if options.normalisation else images
        found = model.features(variables, images)[options.features]
        return found.mean((1, 2), dtype=jnp.float32) if found.ndim == 4 else found

    def features(network: Network, images: np.ndarray) -> np.ndarray:
        return transfer_data.features(
            loaded_run, network, images, features_of, options.feature_batch_size
        )

    def measure(name: str, network: Network) -> dict[str, Any]:
        dataset = load(name)
        train, test = dataset.train, dataset.test
        seen = (features(network, test.images), test.labels)
        protocol = options.protocol()
        if augmentation is None:
            learnt = (features(network, train.images), train.labels)
            found = linear_probe.fit(learnt, seen, dataset.num_classes, protocol, seed=options.seed)
        else:
            found = linear_probe.fit_augmented(
                lambda epoch: features(network, _augmented(train, augmentation, options, epoch)),
                train.labels,
                seen,
                dataset.num_classes,
                protocol,
                seed=options.seed,
            )
        return {
            **network.identity,
            "dataset": name,
            "train_images": len(train),
            "test_images": len(test),
            "held_out": not complete[name],
            "classes": dataset.num_classes,
            "accuracy": float(found.accuracies[found.best]),
            "learning_rate": options.learning_rates[found.best],
            "learning_rates": list(options.learning_rates),
            "accuracies": found.accuracies.tolist(),
            "diverged": [
                rate
                for rate, kernel in zip(options.learning_rates, found.kernels, strict=True)
                if not np.isfinite(kernel).all()
            ],
        }

    return [
        WorkItem(f"{network.key}/{name}", functools.partial(measure, name, network))
        for name in options.datasets
        for network in loaded_run.networks
    ]


def _augmentation(options: Options, shape: tuple[int, int, int]) -> data.Augmentation | None:
    """Return crop and flip, with a "normalisation" that leaves the pixels their values."""
    if options.augmentation == "none":
        return None
    channels = shape[-1]
    padding = options.crop_padding if options.augmentation == "crop_flip" else 0
    found = data.Augmentation(
        mean=(0.0,) * channels, std=(1 / 255,) * channels, crop_padding=padding, flip=True
    )
    try:
        data.check_image_shape(found, shape)
    except UsageError:
        raise UsageError(
            f"--crop-padding={padding} must be smaller than the images ({shape[0]}x{shape[1]})"
        ) from None
    return found


def _augmented(
    split: data.Split, augmentation: data.Augmentation, options: Options, epoch: int
) -> np.ndarray:
    """Return the images of one epoch, uint8: a pure function of the seed and the epoch."""
    key = jax.random.fold_in(jax.random.key(options.seed), epoch)
    batch = options.feature_batch_size
    found = np.empty_like(split.images)
    for start in range(0, len(split), batch):
        part = split.images[start : start + batch]
        # The last batch is filled up, so that there is one program.
        filled = np.pad(part, [(0, min(batch, len(split)) - len(part)), (0, 0), (0, 0), (0, 0)])
        drawn = _augment(jax.random.fold_in(key, start), filled, augmentation)
        found[start : start + batch] = np.asarray(drawn)[: len(part)]
    return found


@functools.partial(jax.jit, static_argnames=("augmentation",))
def _augment(key: jax.Array, images: jax.Array, augmentation: data.Augmentation) -> jax.Array:
    height, width, channels = images.shape[1:]
    draws = data.draw(key, len(images), augmentation, (height, width, channels))
    return jnp.rint(data.apply(images, draws, augmentation)).astype(jnp.uint8)


KIND = Evaluator(
    name="linear_probe",
    summary="linear classifiers on the frozen features, on other data sets",
    source="SEAL paper, Tables 1 and 12",
    options=Options,
    units=units,
    table=views.table,
    draw=views.draw,
    size=views.size,
)
