"""Loss increments and slices along the principal eigenvector of each layer: PoF paper, Figure 1.

The toy experiment of that figure (c and d: an MLP with five weight layers after plain SGD and after
PoF) is this evaluation of two such runs, side by side in a comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import data, hessian
from seal_jax.core import plots, tables
from seal_jax.core.tables import Column, Record, Table, cell, grouped, seed_mean, shared
from seal_jax.errors import UsageError
from seal_jax.evaluation import landscape as library
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun
from seal_jax.evaluators.options import check_least
from seal_jax.hessian import trees

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "all"  # the part that is the whole network


@dataclasses.dataclass(frozen=True)
class Options:
    """The directions, the data, and the extent of the slices.

    Attributes:
      per: the parts of the network whose Hessians are taken one by one, beside that of all of it:
        its "blocks" or its weight "layers".
      eigenvectors: leading eigenvectors of each part.
      examples: training and test images, each drawn at random; 0 for all.
      batch_size: images at a time.
      label_smoothing: of the loss; "none" takes the training's.
      points: of a slice.
      reach: of a slice to either side, in the norm of the weights; 0 goes to where the steeper of
        both losses' parabolas has risen by 0.5, and past the minimum of the test loss.
      tolerance: of the eigenvectors, their residual over the largest eigenvalue.
      max_products: bound on the products with each Hessian.
      seed: of the draw of images.
    """

    per: Literal["blocks", "layers"] = "blocks"
    eigenvectors: int = 1
    examples: int = 2048
    batch_size: int = 128
    label_smoothing: float | None = None
    points: int = 21
    reach: float = 0.0
    tolerance: float = 1e-3
    max_products: int = 200
    seed: int = 0

    def __post_init__(self):
        check_least(self, eigenvectors=1, examples=0, batch_size=1, points=3, reach=0)
        check_least(self, max_products=1, seed=0)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one work item for each network, part and eigenvector."""
    model = loaded_run.model
    parts = (*(model.blocks if options.per == "blocks" else model.layers), WHOLE)
    variables = loaded_run.networks[0].variables
    # The rules name paths among all variables, since statistics are arguments of the loss too.
    masks = {part: f"params/{part}" for part in parts} | {
        WHOLE: batching.parameters_rule(variables)
    }
    for part, mask in masks.items():
        count = trees.size(trees.select(mask, variables))
        if options.eigenvectors > count:
            raise UsageError(
                f"--eigenvectors={options.eigenvectors} is more than the {count} parameters of {part}"
            )

    smoothing = batching.label_smoothing(loaded_run, options)

    def loss(variables: Any, batch: Any) -> jax.Array:
        images, labels, example_weights = batch
        logits = model.module.apply(variables, loaded_run.normalise(images), train=False)
        return batching.weighted_loss(logits, labels, smoothing, example_weights)

    splits = {
        name: batching.subset(getattr(loaded_run.dataset, name), options.examples, options.seed)
        for name in ("train", "test")
    }

    @functools.cache
    def batches() -> Any:
        """Return the batches of both splits, placed together, so that they are on the same devices."""

        def of(split: data.Split) -> Any:
            rows, weights = batching.weighted_rows(len(split), min(options.batch_size, len(split)))
            return split.images[rows], split.labels[rows], weights

        return batching.place({}, {name: of(split) for name, split in splits.items()})[1]

    @functools.lru_cache(maxsize=1)  # a network's parts and eigenvectors are measured in a row
    def variables_of(index: int) -> Any:
        return batching.place(loaded_run.networks[index].variables, batches())[0]

    @functools.lru_cache(maxsize=1)  # the eigenvectors of a part are computed together
    def eigenpairs(index: int, part: str) -> hessian.Eigenpairs:
        # The parts are data, and directions have zeros elsewhere: one program for all of them.
        op = hessian.operator(loss, variables_of(index), batches()["train"], mask=masks[WHOLE])
        return hessian.eigenpairs(
            op.block(masks[part]),
            options.eigenvectors,
            tolerance=options.tolerance,
            max_products=options.max_products,
        )

    def measure(index: int, part: str, rank: int) -> dict[str, Any]:
        network = loaded_run.networks[index]
        variables, pairs = variables_of(index), eigenpairs(index, part)
        train, test = batches()["train"], batches()["test"]
        # vectors have the rank as their first axis
        direction = jax.tree.map(lambda rows: rows[rank], pairs.vectors)
        eigenvalue = float(pairs.values[rank])
        # Both searches get their curvature, which saves a third of the evaluations.
        curvature = float(library.curvature(loss, variables, direction, test))
        on_test = library.increment(loss, variables, direction, test, second_derivative=curvature)
        # An eigenvector's sign is arbitrary: towards the test minimum, slices of all seeds agree.
        if on_test.shift < 0:
            direction = jax.tree.map(jnp.negative, direction)
        on_train = library.increment(
            loss, variables, direction, train, second_derivative=eigenvalue
        )
        # The direction has been given the sign of the shift.
        shift = abs(on_test.shift) if on_test.bounded else 0.0
        along = (loss, variables, direction)
        # Where a parabola of the larger curvature has risen by 0.5, and past the test minimum.
        steepest = max(curvature, eigenvalue)
        parabola = math.sqrt(1 / steepest) if steepest > 0 else 1.0
        reach = options.reach or max(parabola, 1.25 * shift)
        distances = np.linspace(-reach, reach, options.points)
        return {
            **network.identity,
            "part": part,
            "rank": rank + 1,
            "parameters": trees.size(trees.select(masks[part], network.variables)),
            "examples": len(splits["train"]),
            "label_smoothing": smoothing,
            "eigenvalue": eigenvalue,
            "residual": float(pairs.residuals[rank]),
            "products": pairs.products,
            "converged": pairs.converged,
            "test_loss": on_test.loss,
            "test_curvature": curvature,
            "increment": batching.number(on_test.increment),
            "shift": shift if on_test.bounded else None,
            "train_loss": on_train.loss,
            "train_increment": batching.number(on_train.increment),
            "train_shift": batching.number(on_train.shift),
            "distances": distances.tolist(),
            "test_slice": batching.numbers(library.slices(*along, test, distances)),
            "train_slice": batching.numbers(library.slices(*along, train, distances)),
        }

    return [
        WorkItem(
            f"{network.key}/{part}/{rank + 1}",
            functools.partial(measure, index, part, rank),
        )
        # Ranks innermost: eigenpairs() keeps one part's pairs only.
        for index, network in enumerate(loaded_run.networks)
        for part in parts
        for rank in range(options.eigenvectors)
    ]


def table(rows: Sequence[Record]) -> Table:
    """Return curvatures and loss increments, mean over seeds."""
    ranks = max(row["rank"] for row in rows)
    examples = sorted({row["examples"] for row in rows})
    notes = [
        "ΔL: the test loss less its nearest minimum along the eigenvector of the largest "
        "eigenvalue (λ) of the training Hessian, restricted to the part; Δw: how far that minimum "
        "is. v'Hv: curvature of the test loss along it. Train ΔL: the same of the training loss.",
        "No minimum: seeds whose test loss falls without end along it; they are left out of ΔL.",
        batching.loss_note(rows),
        f"Inference mode, no augmentation, {' or '.join(map(str, examples))} training images.",
        "The PoF paper (Figure 1 c, d) shows these for a toy MLP, without numbers.",
    ]
    loose = sum(not row["converged"] for row in rows)
    if loose:
        notes.append(f"{loose} eigenvectors are short of their tolerance: raise --max-products.")
    return Table.of_groups(
        "Loss increment along the principal eigenvector of each part",
        [
            *tables.CHECKPOINT_COLUMNS,
            shared("part", lambda row: row["part"] + (f", {row['rank']}" if ranks > 1 else "")),
            seed_mean("λ", "eigenvalue", None),
            seed_mean("test v'Hv", "test_curvature", None),
            seed_mean("train loss", "train_loss", None),
            seed_mean("test loss", "test_loss", None),
            seed_mean("ΔL", "increment", None),
            seed_mean("Δw", "shift", None),
            seed_mean("train ΔL", "train_increment", None),
            Column(
                "no minimum",
                lambda seeds: cell(sum(row["increment"] is None for row in seeds) or None),
            ),
        ],
        tables.by_checkpoint(rows, "part", "rank"),
        notes,
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw ΔL of every part, and slices along the eigenvectors of the classifier and of all."""
    rows = [row for row in tables.newest(rows) if row["rank"] == 1]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    # The last part is the classifier, by the model's declared order.
    sliced = [*[part for part in parts if part != WHOLE][-1:], WHOLE]
    styles = plots.run_styles(rows)
    panels = plots.panels_by_weights(figure, rows, 1 + len(sliced))
    for weights, of_weights, (increments, *slices) in panels:
        for (run,), of_run in grouped(of_weights, ("run",)).items():
            # Seeds without a minimum have no increment: they are left out of the means, and the table counts them.
            by_part = [[row["increment"] for row in of_run if row["part"] == p] for p in parts]
            bounded = [[gain for gain in gains if gain is not None] for gains in by_part]
            means = [np.mean(gains) if gains else np.nan for gains in bounded]
            increments.plot(parts, means, marker="o", markersize=4, label=run, **styles[run])
            for axes, part in zip(slices, sliced, strict=True):
                for seed, row in enumerate(row for row in of_run if row["part"] == part):
                    look = {"color": styles[run]["color"], "linewidth": 1.2}
                    for split, dashes in (("train", "-"), ("test", "--")):
                        label = None if seed or split == "test" else run
                        values = np.array(row[f"{split}_slice"], float)  # None becomes NaN
                        axes.plot(row["distances"], values, dashes, label=label, **look)
        increments.set_ylim(bottom=0)
        increments.set_title(f"{weights} weights: loss increment")
        increments.set_ylabel("ΔL of the test loss")
        increments.tick_params(axis="x", rotation=90)
        for axes, part in zip(slices, sliced, strict=True):
            axes.set_title(f"along the eigenvector of {part}")
            axes.set_xlabel("distance in the weights")
            axes.set_ylabel("loss: training solid, test dashed")
    panels[0][2][-1].legend(frameon=False)


EVALUATOR = Evaluator(
    name="landscape",
    summary="loss increment and slices along the principal eigenvector of each part",
    source="PoF paper, Figure 1 c, d",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    size=plots.size_by_weights(13, 4.5),
    order=30,
)
