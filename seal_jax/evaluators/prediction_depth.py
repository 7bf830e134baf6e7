"""k-NN probes on every block: SEAL paper, Figures 2 and 3."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from seal_jax.core import plots, tables
from seal_jax.core.tables import Record, Table, grouped
from seal_jax.data import Split
from seal_jax.errors import UsageError
from seal_jax.evaluation import prediction_depth as library
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least, check_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM = "stem"


@dataclasses.dataclass(frozen=True)
class Options:
    """The input of the k-NN probes.

    Attributes:
      k: neighbours; 5 in the SEAL paper, 30 in Baldock et al.
      metric: distance between activations.
      pooling: of a block's output, flattened whole, averaged over the image, or averaged to windows.
      side: windows along each side, for adaptive pooling.
      relu: a residual block's output after its last ReLU, or before.
      layers: which blocks; none for all of them and the stem.
      images: training images in the bank, and test images, a random sample of so many; 0 for all.
      byte_budget: bytes of features and distances on the devices at a time; the features of the test
        images stay in the host's memory where they fit.
      batch_size: images per step of the network.
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
        check_least(self, k=1, side=1, images=0, byte_budget=1, batch_size=1)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for each network and layer."""
    model = loaded_run.model
    outputs = model.before_relu if options.relu == "before" else model.features
    train, test = (
        batching.subset(split, options.images, 0)
        for split in (loaded_run.dataset.train, loaded_run.dataset.test)
    )
    # Shapes alone, so nothing is computed: which layers there are, and how many numbers each gives.
    sample = jax.ShapeDtypeStruct((2, *model.image_shape), np.float32)
    known = jax.eval_shape(outputs, loaded_run.networks[0].variables, sample)
    layers = [name for name in (STEM, *model.round_blocks) if name in known]
    if not layers:
        raise UsageError(f"{model.name} declares no blocks to probe; take another network")
    check_names("layers", options.layers or (), layers)
    # In the network's order, in whatever order they were asked for: depth counts from the bottom.
    layers = [layer for layer in layers if options.layers is None or layer in options.layers]
    if options.k > len(train):
        raise UsageError(f"--k={options.k} is more than the {len(train)} images in the bank")

    @functools.cache  # one function for each layer: LoadedRun.apply compiles it for all networks
    def features_of(layer: str) -> Any:
        def features(variables: Any, images: jax.Array) -> jax.Array:
            return library.pool(outputs(variables, images)[layer], options.pooling, options.side)

        return features

    def features(network: Network, layer: str, split: Split) -> library.Rows:
        def read(start: int, stop: int) -> np.ndarray:
            values: np.ndarray = loaded_run.apply(
                features_of(layer),
                network,
                split.rows(slice(start, stop)).images,
                options.batch_size,
            )
            return values

        size = jax.eval_shape(features_of(layer), network.variables, sample).shape[1]
        return library.Rows(len(split), size, read)

    # Work items have the layers of a network in a row, so its predictions are computed once.
    @functools.lru_cache(maxsize=1)
    def predictions(network: Network) -> np.ndarray:
        return loaded_run.logits(network, test.images, options.batch_size).argmax(-1)

    def measure(network: Network, layer: str) -> dict[str, Any]:
        # Rows are computed when they are read: a layer's outputs of all training images need not fit in memory.
        by_neighbours = library.knn(
            features(network, layer, train),
            train.labels,
            features(network, layer, test),
            k=options.k,
            metric=options.metric,
            byte_budget=options.byte_budget,
        )
        by_network = predictions(network)
        return {
            **network.identity,
            "layer": layer,
            "accuracy": float((by_neighbours == test.labels).mean()),
            "network_accuracy": float((by_network == test.labels).mean()),
            # One character an image keeps the file small.
            "agrees": "".join("01"[same] for same in (by_neighbours == by_network).astype(int)),
        }

    return [
        WorkItem(f"{network.key}/{layer}", functools.partial(measure, network, layer))
        for network in loaded_run.networks
        for layer in layers
    ]


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row for each network: accuracies by layer, and the depths of its test images."""
    rows = []
    for layers in grouped(records, batching.NETWORK).values():
        agrees = np.array([[character == "1" for character in row["agrees"]] for row in layers])
        # Records hold whether each probe agrees with the network, so the network's own "prediction" is True.
        depths = library.depth(agrees, np.ones(agrees.shape[1], bool))
        of_layer = ("layer", "accuracy", "agrees")
        rows.append(
            {
                **{name: value for name, value in layers[0].items() if name not in of_layer},
                "mean_depth": float(depths.mean()),
                "layers": [row["layer"] for row in layers],
                "accuracies": [row["accuracy"] for row in layers],
                "depths": np.bincount(depths, minlength=len(layers) + 1).tolist(),
            }
        )
    return rows


def table(rows: Sequence[Record]) -> Table:
    """Return the accuracy of the probe on every layer, a column for each run and weights."""
    newest = tables.newest(rows)
    layers = dict.fromkeys(layer for row in rows for layer in row["layers"])
    lines = [
        *(
            tables.seed_mean(layer, tables.entry("layers", "accuracies", layer), scale=100)
            for layer in layers
        ),
        tables.seed_mean("network itself", "network_accuracy", scale=100),
        tables.seed_mean("mean prediction depth", "mean_depth", 3),
    ]
    groups = grouped(newest, ("run", "weights"))
    notes = [
        "Prediction depth of a test image: the first probe from which on all agree with the "
        "network's own prediction, 0 for the lowest, the number of probes if even the last does "
        "not.",
        "The SEAL paper shows these as bars; of numbers it gives Block4.1 of LLF, 50.15 in G = 1 "
        "and 45.62 in G = 10 (Tiny-ImageNet, ResNet-50, k = 5).",
    ]
    if len(newest) < len(rows):
        notes.append("Of each run its newest checkpoint; the plot has the others.")
    # Layers are many and runs are few, so what other tables have as columns are lines here.
    return Table(
        "Test accuracy (%) of a k-NN probe on every block, and prediction depth",
        ("layer", *(f"{run} {weights}" for run, weights in groups)),
        [[line.title, *map(line.text, groups.values())] for line in lines],
        notes,
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw accuracy over layers, or over steps for each layer where a run has several checkpoints."""
    runs = grouped(rows, ("run",)).values()
    if any(len({row["step"] for row in of_run}) > 1 for of_run in runs):
        panel = _draw_over_steps(figure, rows)
    else:
        panel = _draw_over_layers(figure, rows)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _draw_over_layers(figure: Figure, rows: Sequence[Record]) -> Axes:
    """Draw points and not bars: the differences are small, and bars would have to start at 0."""
    styles = plots.run_styles(rows)
    layers = list(dict.fromkeys(layer for row in rows for layer in row["layers"]))
    panels = plots.panels_by_weights(figure, rows, sharex=True)
    for weights, of_weights, (axes,) in panels:
        for (run,), seeds in grouped(of_weights, ("run",)).items():
            points = plots.over_seeds(100 * np.array([row["accuracies"] for row in seeds]).T)
            # Other networks have other blocks.
            place = [layers.index(layer) for layer in seeds[0]["layers"]]
            bars = plots.bars(points) if len(seeds) > 1 else None
            axes.errorbar(place, points[0], bars, label=run, marker="o", ms=4, **styles[run])
        axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        axes.set_ylabel(f"k-NN accuracy, %, {weights} weights\n{plots.BAND}", fontsize=8)
    return panels[0][2][0]


def _draw_over_steps(figure: Figure, rows: Sequence[Record]) -> Axes:
    """Draw a panel for each run: the accuracy of every layer at every checkpoint (Figure 3)."""
    # The best weights may be the same in several checkpoints; the last ones show the course.
    runs = grouped(rows, ("run",))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, ((run,), of_run) in zip(panels, runs.items(), strict=True):
        weights = "last" if any(row["weights"] == "last" for row in of_run) else "best"
        shown = [row for row in of_run if row["weights"] == weights]
        by_step = sorted(grouped(shown, ("step",)).items())
        steps = [step for (step,), _ in by_step]
        accuracies = [[row["accuracies"] for row in seeds] for _, seeds in by_step]
        means = 100 * np.array([np.mean(seeds, axis=0) for seeds in accuracies])
        for index, layer in enumerate(of_run[0]["layers"]):
            axes.plot(steps, means[:, index], label=layer, marker=".", **plots.style(index))
        axes.set_title(f"{run}, {weights} weights")
        axes.set_xlabel("training step")
        plots.tidy(axes, grid=None)
    panels[0].set_ylabel("k-NN accuracy, %")
    return panels[0]


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: wider for more points."""
    points = len(rows[0]["layers"]) * len({row["run"] for row in rows})
    return (min(6 + 0.12 * points, 16.0), 3.0 * len({row["weights"] for row in rows}))


EVALUATOR = Evaluator(
    name="prediction_depth",
    summary="k-NN probes on every block of the network",
    source="SEAL paper, Figures 2 and 3; Baldock et al. 2021",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    rows=combine,
    size=size,
    order=12,
)
