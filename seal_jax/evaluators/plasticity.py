"""Plasticity by block: dormant units, ranks of features, norms, gradients, deviation from isometry."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from seal_jax import paths, units
from seal_jax.core import plots, tables
from seal_jax.core.state import Stream, stream_key
from seal_jax.core.tables import Record, Table, grouped, seed_mean, shared
from seal_jax.errors import UsageError
from seal_jax.evaluation import plasticity as library
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least
from seal_jax.training.accumulation import accumulated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What counts as dormant and as rank, and on how many images.

    Attributes:
      threshold: a unit is dormant whose mean activation is at most this share of its layer's mean.
      share: of the sum of singular values that the rank holds.
      examples: training images, drawn at random; 0 for all.
      batch_size: images in a pass.
      label_smoothing: of the loss whose gradient is measured; "none" takes the training's.
      seed: of the draw of images.
    """

    threshold: float = 0.025
    share: float = 0.99
    examples: int = 512
    batch_size: int = 256
    label_smoothing: float | None = None
    seed: int = 0

    def __post_init__(self):
        check_least(self, threshold=0, examples=0, batch_size=1)
        if not 0 < self.share <= 1:
            raise UsageError(f"--share={self.share:g} must lie in (0, 1]")


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return a work item for each network."""
    model = loaded_run.model
    sample = batching.subset(loaded_run.dataset.train, options.examples, options.seed)
    smoothing = batching.label_smoothing(loaded_run, options)

    # Defined once, as are the two programs below: they serve all networks.
    def activity(variables: Any, images: jax.Array) -> dict[str, Any]:
        outputs = model.features(variables, images)
        return {
            # [N, n] and [N, C]: of each image, the means over positions.
            "magnitudes": jax.tree.map(
                jax.vmap(lambda values: units.mean_magnitude(values[None])),
                model.hidden(variables, images),
            ),
            "features": {
                block: outputs[name].mean(tuple(range(1, outputs[name].ndim - 1)))
                for block, name in features_of.items()
            },
        }

    features_of = _outputs_by_block(model.blocks, model.round_blocks) | {model.head: "features"}
    initial = jax.jit(lambda seed: model.init(stream_key(seed, Stream.INIT, 0))["params"])
    rows, weights = batching.weighted_rows(len(sample), min(options.batch_size, len(sample)))

    @jax.jit
    def gradient(variables: Any, batches: Any) -> PyTree:
        def loss(params: Any, batch: Any) -> tuple[jax.Array, None]:
            images, labels, example_weights = batch
            logits = model.module.apply(
                {**variables, "params": params}, loaded_run.normalise(images), train=False
            )
            mean = batching.weighted_loss(logits, labels, smoothing, example_weights)
            return mean / len(rows), None

        return jax.grad(accumulated(loss, batches), has_aux=True)(variables["params"])[0]

    def measure(network: Network) -> dict[str, Any]:
        params = network.variables["params"]
        found = loaded_run.apply(activity, network, sample.images, options.batch_size)
        magnitudes = {name: values.mean(0) for name, values in found["magnitudes"].items()}
        batches = (sample.images[rows], sample.labels[rows], weights)
        slope = jax.device_get(gradient(*batching.place(network.variables, batches)))
        values: dict[str, Mapping[str, Any]] = {
            "dormant": library.dormant_shares(magnitudes, model.blocks, options.threshold),
            "rank": {
                block: library.effective_rank(values, options.share)
                for block, values in found["features"].items()
            },
            "entropy_rank": {
                block: library.entropy_rank(values) for block, values in found["features"].items()
            },
            "norm": library.norms(params, model.blocks),
            "distance": {},
            "gradient": library.norms(slope, model.blocks),
            "isometry": library.isometry_deviations(params, model.blocks),
        }
        # The initial weights are a function of the seed; those of another run or of a file are not.
        if not loaded_run.settings.train.pretrained:
            start = jax.device_get(initial(np.uint32(network.seed)))
            moved = jax.tree.map(np.subtract, params, start)
            values["distance"] = library.norms(moved, model.blocks)
        return {
            **network.identity,
            "examples": len(sample),
            "threshold": options.threshold,
            "share": options.share,
            "label_smoothing": smoothing,
            "blocks": list(model.blocks),
            "units": [
                sum(len(of) for name, of in magnitudes.items() if paths.below(name, block))
                for block in model.blocks
            ],
            **{
                name: [
                    float(by_name[block]) if block in by_name else None for block in model.blocks
                ]
                for name, by_name in values.items()
            },
        }

    return [
        WorkItem(network.key, functools.partial(measure, network))
        for network in loaded_run.networks
    ]


def _outputs_by_block(blocks: Sequence[str], round_blocks: Sequence[str]) -> dict[str, str]:
    """Return the name of the output that each block ends with, where it ends with one.

    >>> _outputs_by_block(("conv1", "block1/layer0", "block1/layer1", "fc"), ("block1",))
    {'block1/layer1': 'block1'}
    """
    # The declared order of a DenseNet has its layers, of which the last one ends a round block.
    return {
        [block for block in blocks if paths.below(block, output)][-1]: output
        for output in round_blocks
    }


LISTS = ("units", "dormant", "rank", "entropy_rank", "norm", "distance", "gradient", "isometry")


def by_blocks(records: Sequence[Record]) -> Sequence[Record]:
    """Return a row for each network and block."""
    return [
        {
            **{name: value for name, value in record.items() if name not in (*LISTS, "blocks")},
            "block": block,
            **{name: record[name][index] for name in LISTS},
        }
        for record in records
        for index, block in enumerate(record["blocks"])
    ]


def table(rows: Sequence[Record]) -> Table:
    """Return all measures by block, mean over seeds."""
    row = rows[0]
    return Table.of_groups(
        "Plasticity by block",
        [
            *tables.CHECKPOINT_COLUMNS,
            shared("block"),
            shared("units", lambda row: row["units"] or None),
            seed_mean("dormant %", "dormant", 1, 100, optional=True),
            seed_mean("rank", "rank", 1),
            seed_mean("entropy rank", "entropy_rank", 1),
            seed_mean("norm", "norm", 2),
            seed_mean("distance", "distance", 2, optional=True),
            seed_mean("gradient", "gradient", None),
            seed_mean("isometry", "isometry", 2),
        ],
        tables.by_checkpoint(rows, "block"),
        (
            f"Over {row['examples']} training images, not augmented, in inference mode.",
            f"dormant: share of the block's hidden units whose mean activation is at most "
            f"{row['threshold']:g} of their layer's mean (Sokar et al. 2023); units that are added to a "
            "residual sum do not count.",
            f"rank: singular values of the block's outputs that hold {100 * row['share']:g} % of their sum "
            "(Kumar et al. 2021); entropy rank: the exponential of their entropy (Roy & Vetterli 2007). "
            "Outputs are averaged over positions; those of the classifier's block are its inputs.",
            "norm, distance, gradient: Euclidean norms of all parameters of the block, of their difference "
            "from the seed's initial ones, and of the gradient of the mean loss.",
            "isometry: deviation of the squared singular values of a kernel, relative to their mean; 0 "
            "for a scaled isometry. Mean over positions and over the block's kernels.",
            batching.loss_note(rows),
        ),
    )


# By title and label: a field, and its factor.
PANELS: dict[str, tuple[str, float]] = {
    "dormant units, %": ("dormant", 100),
    "effective rank": ("rank", 1),
    "norm of the weights": ("norm", 1),
    "distance from the start": ("distance", 1),
    "norm of the gradient": ("gradient", 1),
    "deviation from isometry": ("isometry", 1),
}


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw each measure over the blocks, one line per run, in a row of panels for each of the weights."""
    rows = tables.newest(rows)
    styles = plots.run_styles(rows)
    panels = plots.panels_by_weights(figure, rows, len(PANELS))
    for weights, of_weights, line in panels:
        for axes, (title, (field, scale)) in zip(line, PANELS.items(), strict=True):
            shown = [row for row in of_weights if row[field] is not None]
            # Runs may have different networks: the places are those of all blocks with a value.
            blocks = list(dict.fromkeys(row["block"] for row in shown))
            for (run,), of_run in grouped(shown, ("run",)).items():
                of_block = grouped(of_run, ("block",))
                points = plots.over_seeds(
                    [scale * row[field] for row in seeds] for seeds in of_block.values()
                )
                places = [blocks.index(block) for (block,) in of_block]
                axes.errorbar(
                    places, points[0], plots.bars(points), label=run, marker=".", **styles[run]
                )
            axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=7)
            axes.set_title(title)
        line[0].set_ylabel(f"{weights} weights\n{plots.BAND}", fontsize=8)
    plots.legend_below(figure, [axes for _, _, line in panels for axes in line])


EVALUATOR = Evaluator(
    name="plasticity",
    summary="dormant units, ranks of features, norms, gradients and conditioning of the weights, by block",
    source="Sokar et al. 2023; Kumar et al. 2021; Roy & Vetterli 2007",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    rows=by_blocks,
    size=plots.size_by_weights(20, 4, 0.5),
    order=51,
)
