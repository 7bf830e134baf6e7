"""Loss increments and slices along the principal eigenvector of each layer: PoF paper, Figure 1.

The toy experiment of that figure (c and d: an MLP with five weight layers after plain SGD and after
PoF) is this kind on two such runs, side by side in a comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from seal_jax import hessian
from seal_jax.core import plots
from seal_jax.core.tables import Table, cell, grouped, newest
from seal_jax.errors import UsageError
from seal_jax.evaluation import landscape as library
from seal_jax.evaluators import batches as batches_lib
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.hessian import trees

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHOLE = "all"  # the part that is the whole network


@dataclasses.dataclass(frozen=True)
class Options:
    """Along what, on which data, and how far.

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
        least = {"eigenvectors": 1, "examples": 0, "batch_size": 1, "points": 3, "reach": 0}
        batches_lib.check_options(self, {**least, "max_products": 1, "seed": 0})


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit for each network, part and eigenvector."""
    model = loaded_run.model
    parts = (*(model.blocks if options.per == "blocks" else model.layers), WHOLE)
    variables = loaded_run.networks[0].variables
    masks = {part: _mask(variables, part) for part in parts}
    for part, mask in masks.items():
        count = trees.size(trees.select(mask, variables))
        if options.eigenvectors > count:
            raise UsageError(
                f"--eigenvectors={options.eigenvectors} is more than the {count} parameters of {part}"
            )

    smoothing = batches_lib.label_smoothing(loaded_run, options)

    def loss(variables: Any, batch: Any) -> jax.Array:
        images, labels, example_weights = batch
        logits = model.module.apply(variables, loaded_run.normalise(images), train=False)
        return batches_lib.weighted_loss(logits, labels, smoothing, example_weights)

    splits = {
        name: batches_lib.subset(getattr(loaded_run.dataset, name), options.examples, options.seed)
        for name in ("train", "test")
    }

    @functools.cache
    def batches(name: str) -> Any:
        split = splits[name]
        rows, shares = batches_lib.weighted_rows(len(split), min(options.batch_size, len(split)))
        return split.images[rows], split.labels[rows], shares

    @functools.lru_cache(maxsize=1)  # the eigenvectors of a part are found together
    def found(index: int, part: str) -> hessian.Eigenpairs:
        weights, train = batches_lib.place(loaded_run.networks[index].variables, batches("train"))
        # The parts are data, and directions have zeros elsewhere: one program for all of them.
        op = hessian.operator(loss, weights, train, mask=masks[WHOLE])
        return hessian.eigenpairs(
            op.block(masks[part]),
            options.eigenvectors,
            tolerance=options.tolerance,
            max_products=options.max_products,
        )

    def measure(index: int, network: Network, part: str, rank: int) -> dict[str, Any]:
        pairs = found(index, part)
        weights, train = batches_lib.place(network.variables, batches("train"))
        direction = jax.tree.map(lambda rows: rows[rank], pairs.vectors)
        return {
            **network.identity,
            "part": part,
            "rank": rank + 1,
            "parameters": trees.size(trees.select(masks[part], network.variables)),
            "examples": len(splits["train"]),
            "label_smoothing": smoothing,
            "eigenvalue": float(pairs.values[rank]),
            "residual": float(pairs.residuals[rank]),
            "products": pairs.products,
            "converged": pairs.converged,
            **_along(loss, weights, direction, train, batches("test"), pairs, rank, options),
        }

    return [
        WorkItem(
            f"{network.key}/{part}/{rank + 1}",
            functools.partial(measure, index, network, part, rank),
        )
        for index, network in enumerate(loaded_run.networks)
        for part in parts
        for rank in range(options.eigenvectors)
    ]


def _along(
    loss: Callable[..., jax.Array],
    weights: Any,
    direction: Any,
    train: Any,
    test: Any,
    pairs: hessian.Eigenpairs,
    rank: int,
    options: Options,
) -> dict[str, Any]:
    """Return increments and slices of both losses along one direction."""
    _, test = batches_lib.place({}, test)
    eigenvalue = float(pairs.values[rank])
    steepness = float(library.curvature(loss, weights, direction, test))
    on_test = library.increment(loss, weights, direction, test, second_derivative=steepness)
    if on_test.bounded:
        direction = library.oriented(direction, on_test.shift)
    on_train = library.increment(loss, weights, direction, train, second_derivative=eigenvalue)
    shift = abs(on_test.shift) if on_test.bounded else 0.0
    reach = options.reach or _reach(max(steepness, eigenvalue), shift)
    distances = np.linspace(-reach, reach, options.points)
    return {
        "test_loss": on_test.loss,
        "test_curvature": steepness,
        "increment": batches_lib.number(on_test.increment),
        "shift": shift if on_test.bounded else None,
        "train_loss": on_train.loss,
        "train_increment": batches_lib.number(on_train.increment),
        "train_shift": batches_lib.number(on_train.shift),
        "distances": distances.tolist(),
        "test_slice": batches_lib.numbers(
            library.slices(loss, weights, direction, test, distances)
        ),
        "train_slice": batches_lib.numbers(
            library.slices(loss, weights, direction, train, distances)
        ),
    }


def _mask(variables: Any, part: str) -> str | None:
    """Return the rule that selects a part's parameters among all variables."""
    if part != WHOLE:
        return f"params/{part}"
    others = jax.tree.leaves({name: tree for name, tree in variables.items() if name != "params"})
    return "params" if others else None  # a mask must leave something out


def _reach(curvature: float, shift: float) -> float:
    """Return half the width of a slice that shows a parabola and the test minimum.

    >>> _reach(4.0, 0.1), _reach(4.0, 2.0), _reach(0.0, 0.0)
    (0.5, 2.5, 1.0)
    """
    own = math.sqrt(1 / curvature) if curvature > 0 else 1.0
    return max(own, 1.25 * shift)


def table(rows: Sequence[Record]) -> Table:
    """Return curvatures and loss increments, mean over seeds."""
    ranks = max(row["rank"] for row in rows)
    cells = []
    fields = ("run", "weights", "step", "part", "rank")
    for (run, weights, step, part, rank), own in grouped(rows, fields).items():
        found = {name: [row[name] for row in own] for name in own[0]}
        unbounded = sum(value is None for value in found["increment"])
        cells.append(
            [
                run,
                weights,
                str(step),
                str(len(own)),
                part if ranks == 1 else f"{part}, {rank}",
                batches_lib.short(found["eigenvalue"]),
                batches_lib.short(found["test_curvature"]),
                batches_lib.short(found["train_loss"]),
                batches_lib.short(found["test_loss"]),
                batches_lib.short(found["increment"]),
                batches_lib.short(found["shift"]),
                batches_lib.short(found["train_increment"]),
                cell(unbounded or None),
            ]
        )
    some = sorted({row["examples"] for row in rows})
    notes = [
        "ΔL: the test loss less its nearest minimum along the eigenvector of the largest "
        "eigenvalue (λ) of the training Hessian, restricted to the part; Δw: how far that minimum "
        "is. v'Hv: curvature of the test loss along it. Train ΔL: the same of the training loss.",
        "No minimum: seeds whose test loss falls without end along it; they are left out of ΔL.",
        batches_lib.loss_note(rows),
        f"Inference mode, no augmentation, {' or '.join(map(str, some))} training images.",
        "The PoF paper (Figure 1 c, d) shows these for a toy MLP, without numbers.",
    ]
    loose = sum(not row["converged"] for row in rows)
    if loose:
        notes.append(f"{loose} eigenvectors are short of their tolerance: raise --max-products.")
    return Table(
        "Loss increment along the principal eigenvector of each part",
        (
            "run",
            "weights",
            "step",
            "seeds",
            "part",
            "λ",
            "test v'Hv",
            "train loss",
            "test loss",
            "ΔL",
            "Δw",
            "train ΔL",
            "no minimum",
        ),
        cells,
        notes,
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw ΔL of every part, and slices along the eigenvectors of the classifier and of all."""
    rows = [row for row in newest(rows) if row["rank"] == 1]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    sliced = [*[part for part in parts if part != WHOLE][-1:], WHOLE]
    found, styles = grouped(rows, ("weights",)), plots.run_styles(rows)
    grid = figure.subplots(len(found), 1 + len(sliced), squeeze=False)
    for line, ((weights,), own) in zip(grid, found.items(), strict=True):
        for (run,), mine in grouped(own, ("run",)).items():
            style = styles[run]
            means = [_mean([row["increment"] for row in mine if row["part"] == p]) for p in parts]
            line[0].plot(parts, means, marker="o", markersize=4, label=run, **style)
            for axes, part in zip(line[1:], sliced, strict=True):
                for number, row in enumerate(row for row in mine if row["part"] == part):
                    _slices(axes, row, style["color"], run if not number else None)
        line[0].set_ylim(bottom=0)
        line[0].set_title(f"{weights} weights: loss increment")
        line[0].set_ylabel("ΔL of the test loss")
        line[0].tick_params(axis="x", rotation=90)
        for axes, part in zip(line[1:], sliced, strict=True):
            axes.set_title(f"along the eigenvector of {part}")
            axes.set_xlabel("distance in the weights")
            axes.set_ylabel("loss: training solid, test dashed")
        for axes in line:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    grid[0][-1].legend(frameon=False)


def _slices(axes: Axes, row: Record, colour: str, label: str | None) -> None:
    for split, dashes, name in (("train", "-", label), ("test", "--", None)):
        values = [np.nan if value is None else value for value in row[f"{split}_slice"]]
        axes.plot(row["distances"], values, dashes, color=colour, linewidth=1.2, label=name)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


KIND = Evaluator(
    name="landscape",
    summary="loss increment and slices along the principal eigenvector of each part",
    source="PoF paper, Figure 1 c, d",
    options=Options,
    units=units,
    table=table,
    draw=draw,
    size=batches_lib.height(4.5, 13),
)
