"""k-NN probes on every block: SEAL paper, Figures 2 and 3."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, newest, spread
from seal_jax.data import Split
from seal_jax.errors import UsageError, nearest
from seal_jax.evaluation import prediction_depth as library
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEM = "stem"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the probes see.

    Attributes:
      k: neighbours; 5 in the SEAL paper, 30 in Baldock et al.
      metric: distance between activations.
      pooling: of a block's output, flattened whole, averaged over the image, or averaged to windows.
      side: windows along each side, for adaptive pooling.
      relu: a residual block's output after its last ReLU, or before.
      layers: which blocks; none for all of them and the stem.
      images: training images in the bank, and test images, the first so many; 0 for all.
      byte_budget: bytes of features and distances held at a time.
      batch_size: images a step of the network.
    """

    k: int = 5
    metric: Literal["l2", "cosine"] = "l2"
    pooling: Literal["flatten", "gap", "adaptive"] = "flatten"
    side: int = 4
    relu: Literal["after", "before"] = "after"
    layers: tuple[str, ...] | None = None
    images: int = 0
    byte_budget: int = 2**28
    batch_size: int = 256

    def __post_init__(self):
        least = {"k": 1, "side": 1, "images": 0, "byte_budget": 1, "batch_size": 1}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise UsageError(
                    f"--{field.replace('_', '-')}={getattr(self, field)} must be at least {bound}"
                )


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit a network and layer."""
    model = loaded_run.model
    train, test = (_first(split, options.images) for split in _splits(loaded_run))
    sample = jax.ShapeDtypeStruct((2, *model.image_shape), np.float32)
    shapes = jax.eval_shape(
        functools.partial(_outputs, model, options), loaded_run.networks[0].variables, sample
    )
    layers = [name for name in (STEM, *model.round_blocks) if name in shapes]
    for layer in options.layers or ():
        if layer not in layers:
            raise UsageError(
                f"--layers={layer} is no block of {model.name}, which has {', '.join(layers)}"
                f"{nearest(layer, layers)}"
            )
    layers = [layer for layer in layers if options.layers is None or layer in options.layers]
    if not layers:
        raise UsageError(f"{model.name} declares no blocks to probe; take another network")
    if options.k > len(train):
        raise UsageError(f"--k={options.k} is more than the {len(train)} images in the bank")

    def probe(layer: str) -> Any:
        def features(variables: Any, images: jax.Array) -> jax.Array:
            found = _outputs(model, options, variables, images)[layer]
            return library.pool(found, options.pooling, options.side)

        return features

    probes = {layer: probe(layer) for layer in layers}

    def rows(network: Network, layer: str, split: Split) -> library.Rows:
        def read(start: int, stop: int) -> np.ndarray:
            images = split.images[start:stop]
            found: np.ndarray = loaded_run.apply(probes[layer], network, images, options.batch_size)
            return found

        size = jax.eval_shape(probes[layer], network.variables, sample).shape[1]
        return library.Rows(len(split), size, read)

    @functools.lru_cache(maxsize=1)
    def final(key: str) -> np.ndarray:
        network = next(each for each in loaded_run.networks if each.key == key)
        return loaded_run.logits(network, test.images, options.batch_size).argmax(-1)

    def measure(network: Network, layer: str) -> dict[str, Any]:
        found = library.knn(
            rows(network, layer, train),
            train.labels,
            rows(network, layer, test),
            k=options.k,
            metric=options.metric,
            byte_budget=options.byte_budget,
        )
        predicted = final(network.key)
        return {
            **network.identity,
            "layer": layer,
            "accuracy": float((found == test.labels).mean()),
            "network_accuracy": float((predicted == test.labels).mean()),
            # One character an image keeps the file small.
            "agrees": "".join("01"[same] for same in (found == predicted).astype(int)),
        }

    return [
        WorkItem(f"{network.key}/{layer}", functools.partial(measure, network, layer))
        for network in loaded_run.networks
        for layer in layers
    ]


def _splits(loaded_run: LoadedRun) -> tuple[Split, Split]:
    return loaded_run.dataset.train, loaded_run.dataset.test


def _first(split: Split, count: int) -> Split:
    return split.rows(np.arange(count)) if 0 < count < len(split) else split


def _outputs(model: Any, options: Options, variables: Any, images: jax.Array) -> dict[str, Any]:
    if options.relu == "before":
        return model.before_relu(variables, images)
    return model.features(variables, images)


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row a network: accuracies by layer, and the depths of its test images."""
    found = []
    for own in grouped(records, ("run", "weights", "seed", "step")).values():
        agrees = np.array([[character == "1" for character in row["agrees"]] for row in own])
        depths = library.depth(agrees, np.ones(agrees.shape[1], bool))
        last = dict(own[0])
        for name in ("layer", "accuracy", "agrees"):
            del last[name]
        found.append(
            {
                **last,
                "mean_depth": float(depths.mean()),
                "layers": [row["layer"] for row in own],
                "accuracies": [row["accuracy"] for row in own],
                "depths": np.bincount(depths, minlength=len(own) + 1).tolist(),
            }
        )
    return found


def table(rows: Sequence[Record]) -> Table:
    """Return the accuracy of the probe on every layer, a column for each run and weights."""
    last = newest(rows)
    groups = grouped(last, ("run", "weights"))
    earlier = ["Of each run its newest checkpoint; the plot has the others."]
    earlier = earlier if len(last) < len(rows) else []
    layers = list(dict.fromkeys(layer for row in rows for layer in row["layers"]))

    def accuracy(own: Sequence[Record], layer: str) -> str:
        values = [
            row["accuracies"][row["layers"].index(layer)] for row in own if layer in row["layers"]
        ]
        return spread(values).text(scale=100) if values else MISSING

    cells = [[layer, *(accuracy(own, layer) for own in groups.values())] for layer in layers]
    cells.append(
        [
            "network itself",
            *(
                spread([row["network_accuracy"] for row in own]).text(scale=100)
                for own in groups.values()
            ),
        ]
    )
    cells.append(
        [
            "mean prediction depth",
            *(spread([row["mean_depth"] for row in own]).text(3) for own in groups.values()),
        ]
    )
    return Table(
        "Test accuracy (%) of a k-NN probe on every block, and prediction depth",
        ("layer", *(f"{run} {weights}" for run, weights in groups)),
        cells,
        (
            "Prediction depth of a test image: the first probe from which on all agree with the "
            "network's own prediction, 0 for the lowest, the number of probes if even the last does "
            "not.",
            "The SEAL paper shows these as bars; of numbers it gives Block4.1 of LLF, 50.15 in G = 1 "
            "and 45.62 in G = 10 (Tiny-ImageNet, ResNet-50, k = 5).",
            *earlier,
        ),
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw accuracy over layers; with several checkpoints, the course of each layer's accuracy."""
    if any(len({row["step"] for row in own}) > 1 for own in grouped(rows, ("run",)).values()):
        _draw_course(figure, rows)
    else:
        _draw_layers(figure, rows)


def _mean(own: Sequence[Record]) -> np.ndarray:
    return 100 * np.mean([row["accuracies"] for row in own], axis=0)


def _draw_layers(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw points and not bars: the differences are small, and bars would have to start at 0."""
    found, styles = grouped(rows, ("weights",)), plots.run_styles(rows)
    layers = list(dict.fromkeys(layer for row in rows for layer in row["layers"]))
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for each, ((weights,), own) in zip(axes, found.items(), strict=True):
        for (run,), mine in grouped(own, ("run",)).items():
            points = plots.over_seeds(100 * np.array([row["accuracies"] for row in mine]).T)
            # Other networks have other blocks.
            place = [layers.index(layer) for layer in mine[0]["layers"]]
            bars = plots.bars(points) if len(mine) > 1 else None
            each.errorbar(place, points[0], bars, label=run, marker="o", ms=4, **styles[run])
        each.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        each.set_ylabel(f"k-NN accuracy, %, {weights} weights\n{plots.BAND}", fontsize=8)
        each.grid(axis="y", color="#dddddd", linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _draw_course(figure: Figure, rows: Sequence[Record]) -> None:
    """One panel a run: the accuracy of every layer at every checkpoint (Figure 3)."""
    weights = "last" if any(row["weights"] == "last" for row in rows) else "best"
    runs = grouped([row for row in rows if row["weights"] == weights], ("run",))
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for each, ((run,), own) in zip(axes, runs.items(), strict=True):
        by_step = sorted(grouped(own, ("step",)).items())
        values = np.array([_mean(mine) for _, mine in by_step])
        for index, layer in enumerate(own[0]["layers"]):
            steps = [step for (step,), _ in by_step]
            each.plot(steps, values[:, index], label=layer, marker=".", **plots.style(index))
        each.set_title(run)
        each.set_xlabel("training step")
        each.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"k-NN accuracy, %, {weights} weights")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: wider for more bars."""
    bars = len(rows[0]["layers"]) * len({row["run"] for row in rows})
    return (min(6 + 0.12 * bars, 16.0), 3.0 * math.ceil(len({row["weights"] for row in rows})))


KIND = Evaluator(
    name="prediction_depth",
    summary="k-NN probes on every block of the network",
    source="SEAL paper, Figures 2 and 3; Baldock et al. 2021",
    options=Options,
    units=units,
    table=table,
    draw=draw,
    rows=combine,
    size=size,
)
