"""Cross-domain few-shot classification: SEAL paper, Tables 4 and 5."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax.core.tables import grouped
from seal_jax.errors import UsageError, nearest
from seal_jax.evaluation import affines, few_shot
from seal_jax.evaluators import few_shot_views as views
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.few_shot_views import HEADS
from seal_jax.evaluators.loaded_run import LoadedRun, Network


@dataclasses.dataclass(frozen=True)
class Options:
    """What an episode is and how it is learnt; what has no option is as in the public protocol.

    Attributes:
      datasets: episodes are drawn from all labelled images of each.
      heads: "linear" on frozen features; "linear_affines" trains BatchNorm's scales and biases too.
      shots: images of each class to learn from.
      ways: classes of an episode.
      queries: images of each class to be scored on.
      episodes: how many, for each data set, head and number of shots.
      epochs: passes over the images to learn from.
      image_size: side of the images, after a resize to int(1.15 * side) and a crop of the centre;
        "none" for the run's own. The public protocol has 224.
      normalisation: name of channel statistics, such as the public protocol's "imagenet"; left out,
        the run's.
      statistics: what BatchNorm normalises with while its scales and biases learn: statistics of the
        batch that enter the running ones too (batch) or not (batch_only), or the running ones.
        Queries see the running ones.
      seed: of the episodes.
      chunk: episodes of the linear head in a unit of work.
      affines_chunk: episodes of the other head in a unit of work.
      together: of these, how many side by side on a device; "none" for what its memory holds.
      batch_size: images a step of the frozen network.
    """

    datasets: tuple[str, ...] = (
        "chestx",
        "isic2018",
        "image_folder/eurosat",
        "image_folder/cropdisease",
    )
    heads: tuple[str, ...] = ("linear", "linear_affines")
    shots: tuple[int, ...] = (1, 5, 20, 50)
    ways: int = 5
    queries: int = 15
    episodes: int = 600
    epochs: int = 100
    image_size: int | None = None
    normalisation: str = ""
    statistics: affines.Statistics = "batch"
    seed: int = 0
    chunk: int = 100
    affines_chunk: int = 20
    together: int | None = None
    batch_size: int = 256

    def __post_init__(self):
        for field in ("datasets", "heads", "shots"):
            transfer_data.check_names(field, getattr(self, field))
        for head in self.heads:
            if head not in HEADS:
                raise UsageError(
                    f"--heads={head} must be one of {', '.join(HEADS)}{nearest(head, HEADS)}"
                )
        for field in ("episodes", "chunk", "affines_chunk", "together", "image_size", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UsageError(f"--{field.replace('_', '-')}={value} must be at least 1")
        for shots in self.shots:
            self.protocol(shots)

    def protocol(self, shots: int) -> affines.Protocol:
        """Return the protocol of both heads."""
        return affines.Protocol(
            ways=self.ways,
            shots=shots,
            queries=self.queries,
            epochs=self.epochs,
            statistics=self.statistics,
        )


class _Shown(NamedTuple):
    """The images of one data set with their labels."""

    images: np.ndarray
    labels: np.ndarray


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit for every chunk of episodes, data sets outermost."""
    side = _side(loaded_run, options.image_size)
    shown_as = transfer_data.normalisation(loaded_run, options.normalisation)
    variables = loaded_run.networks[0].variables
    trainable = affines.affines_of(variables["params"], variables["batch_stats"])
    if "linear_affines" in options.heads and not trainable:
        raise UsageError(
            f"--heads=linear_affines: {loaded_run.model.name} has no BatchNorm whose scales and "
            "biases could train; use --heads=linear"
        )
    for name in options.datasets:
        labels = transfer_data.episode_labels(loaded_run, name)
        try:
            few_shot.check(labels, options.protocol(max(options.shots)))
        except UsageError as error:
            raise UsageError(f"--datasets={name}: {error}") from None

    # One data set at a time, and one network's features: units come in this order.
    @functools.lru_cache(maxsize=1)
    def shown(name: str) -> _Shown:
        split = transfer_data.episode_images(loaded_run, name, side)
        return _Shown(split.images, split.labels)

    def features_of(variables: Any, images: jax.Array) -> jax.Array:
        images = shown_as.from_theirs(images) if options.normalisation else images
        return loaded_run.model.features(variables, images)["features"]

    @functools.lru_cache(maxsize=1)
    def features(name: str, key: str) -> np.ndarray:
        network = next(each for each in loaded_run.networks if each.key == key)
        return transfer_data.features(
            loaded_run, network, shown(name).images, features_of, options.batch_size
        )

    def measure(
        name: str, network: Network, head: str, shots: int, first: int, count: int
    ) -> dict[str, Any]:
        protocol = options.protocol(shots)
        span: dict[str, Any] = {"seed": options.seed, "episodes": count, "first": first}
        images, labels = shown(name)
        diverged = 0
        if head == "linear":
            scores = few_shot.linear(features(name, network.key), labels, protocol, **span)
        else:
            found = affines.linear_affines(
                loaded_run.model,
                network.variables,
                images,
                labels,
                shown_as.ours,
                protocol,
                together=options.together,
                **span,
            )
            scores, diverged = found.scores, int(found.diverged.sum())
        return {
            **network.identity,
            "dataset": name,
            "head": head,
            "ways": options.ways,
            "shots": shots,
            "first": first,
            "diverged": diverged,
            "accuracies": scores.accuracies.tolist(),
        }

    return [
        WorkItem(
            f"{network.key}/{name}/{head}/{shots}-shot/{first}",
            functools.partial(measure, name, network, head, shots, first, count),
        )
        for name in options.datasets
        for network in loaded_run.networks
        for head in options.heads
        for shots in options.shots
        for first, count in _spans(options, head)
    ]


def _side(loaded_run: LoadedRun, asked: int | None) -> int:
    height, width, _ = transfer_data.image_shape(loaded_run, asked)
    if height != width:
        raise UsageError(
            f"the run's images are {height}x{width}, and those of episodes are square: "
            "give --image-size"
        )
    return height


def _spans(options: Options, head: str) -> list[tuple[int, int]]:
    """Return the first episode of each chunk, and how many it has."""
    chunk = options.chunk if head == "linear" else options.affines_chunk
    return [
        (first, min(chunk, options.episodes - first)) for first in range(0, options.episodes, chunk)
    ]


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row for all episodes of a network, data set, head and number of shots."""
    fields = ("run", "weights", "seed", "step", "dataset", "head", "shots")
    found = []
    for own in grouped(records, fields).values():
        accuracies = [value for each in own for value in each["accuracies"]]
        scores = few_shot.Scores(np.array(accuracies))
        row = {name: value for name, value in own[0].items() if name not in ("first", "accuracies")}
        row |= {
            "episodes": len(accuracies),
            "accuracy": scores.mean,
            "interval": scores.interval,
            "diverged": sum(each["diverged"] for each in own),
            "accuracies": accuracies,
        }
        found.append(row)
    return found


KIND = Evaluator(
    name="few_shot",
    summary="few-shot classification of other domains, on frozen features and with BatchNorm's affines",
    source="SEAL paper, Tables 4 and 5; Guo et al. 2020; Yazdanpanah et al. 2022",
    options=Options,
    units=units,
    table=views.table,
    draw=views.draw,
    rows=combine,
    size=views.size,
)
