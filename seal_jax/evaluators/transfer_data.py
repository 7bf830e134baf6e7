"""Transfer data: other data sets than the run's, as input of its networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from seal_jax import data
from seal_jax.data.readers import open_data
from seal_jax.errors import UsageError
from seal_jax.evaluation.resizing import resized
from seal_jax.evaluators.loaded_run import DescribedRun, LoadedRun, Network
from seal_jax.models import Model

PAPER_LABEL = "SEAL paper, the same method"


def paper_name(dataset: str) -> str:
    """Return the papers' name of a data set, or its own where they do not have it.

    >>> paper_name("image_folder/eurosat"), paper_name("digits")
    ('EuroSAT', 'digits')
    """
    info = data.find_info(dataset)
    return dataset if info is None else info.paper


def paper_method(row: Mapping[str, Any]) -> str | None:
    """Return the row of the SEAL paper's tables that a network's method has.

    >>> paper_method({"method": "normal", "generation": 0}), paper_method({"method": "fast"})
    ('Normal', None)
    """
    # The paper trains plainly for one generation of epochs and for ten.
    if row["method"] == "normal":
        return "Normal" if row["generation"] == 0 else "Normal (long)"
    return {"llf": "LLF", "seal": "SEAL"}.get(row["method"])


def settings_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the runs: which model was trained on which data, for how many generations.

    >>> row = {"run": "a", "model": "resnet8", "data": "digits", "generation": 3}
    >>> settings_of([row, row])
    'a is resnet8 on digits in generation 4'
    """
    settings = (
        f"{row['run']} is {row['model']} on {paper_name(row['data'])} "
        f"in generation {row['generation'] + 1}"
        for row in rows
    )
    return "; ".join(dict.fromkeys(settings))


def episode_data(loaded_run: LoadedRun, name: str, side: int, *, images: bool = True) -> data.Split:
    """Return all labelled images, resized and cropped as in the public few-shot protocol.

    The square that is 1.15 times as wide, then its centre: 257 and 224 in the protocol. Without
    ``images`` no image is decoded, and the labels alone come in a hundredth of the time.
    """
    split, _ = data.load_labelled(
        name,
        data_dir=loaded_run.data_dir(name),
        split=getattr(data.find_info(name), "episode_split", None),
        image_size=int(1.15 * side),
        crop=side,
        channels=loaded_run.channels,
        images=images,
        corrupt=loaded_run.settings.data.corrupt,
    )
    return split


def has_test_split(loaded_run: LoadedRun, name: str) -> bool:
    """Return whether a data set has a test split; without, a part of its images is held out."""
    opened = open_data(name, loaded_run.data_dir(name))
    return opened.test_split is not None


def model_for(loaded_run: DescribedRun, side: int | None) -> Model:
    """Return the network for images of ``--image-size``, by default for those of the run."""
    if side is None:
        return loaded_run.model
    try:
        return resized(loaded_run.model, (side, side, loaded_run.channels))
    except UsageError as error:
        raise UsageError(f"--image-size={side}: {error}") from None


Normalise = Callable[[jax.Array], jax.Array]


def normalisation(loaded_run: DescribedRun, name: str) -> tuple[Normalise, Normalise]:
    """Return a function that normalises uint8 images, and one that follows the run's own normalisation.

    Both are traced, and use the channel statistics called ``name``, "" for the run's.
    """
    # Features go through LoadedRun.apply, which normalises with the run's statistics: ``renormalise`` turns that
    # into the other ones, as an affine map of each channel.
    run = loaded_run.augmentation
    try:
        mean, std = data.statistics(name) if name else (run.mean, run.std)
    except UsageError as error:
        raise UsageError(f"--normalisation={name}: {error}") from None
    if len(mean) != loaded_run.channels:
        raise UsageError(
            f"--normalisation={name} has {len(mean)} channels and the network takes "
            f"{loaded_run.channels}; leave it out to use the run's"
        )
    scale = np.array(run.std) / np.array(std)
    shift = (np.array(run.mean) - np.array(mean)) / np.array(std)

    def normalise(images: jax.Array) -> jax.Array:
        return data.apply(images, None, data.Augmentation(mean=tuple(mean), std=tuple(std)))

    def renormalise(images: jax.Array) -> jax.Array:
        return images * scale.astype(np.float32) + shift.astype(np.float32) if name else images

    return normalise, renormalise


def features(
    loaded_run: LoadedRun, network: Network, images: np.ndarray, function: Any, batch_size: int
) -> np.ndarray:
    """Return ``function(variables, images)``, which is finite; see :meth:`LoadedRun.apply`."""
    values: np.ndarray = loaded_run.apply(function, network, images, batch_size)
    # Named by the network, since the library's own check of features cannot know it.
    if not np.isfinite(values).all():
        raise UsageError(
            f"{network.key}: features hold NaN or infinity: the network or its input is broken"
        )
    return values
