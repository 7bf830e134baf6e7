"""Mini-batch gradients of the classifier against its Hessian: PoF paper, Figures 2 and 5.

Everything is in the space of the classifier's parameters, as in the paper, with the features of a
trained network; they are computed once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from seal_jax import hessian
from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, newest
from seal_jax.data import Split
from seal_jax.errors import UsageError
from seal_jax.evaluation import gradients as library
from seal_jax.evaluation import perturbations
from seal_jax.evaluators import batches as batches_lib
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.hessian import trees

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPLITS = ("train", "test")
Runs = Mapping[tuple[str, ...], Sequence[Record]]
Styles = Mapping[str, Mapping[str, Any]]

# Text and Figure 2 b: "the peak point of the test distribution is roughly twice as that of the
# training distribution", on toy data.
PAPER_RATIO = 2.0


@dataclasses.dataclass(frozen=True)
class Options:
    """How many mini-batches, and of how many images.

    Attributes:
      batches: mini-batches of each split.
      batch_size: images of a mini-batch whose gradient is compared with the Hessian; "none" takes
        the training's.
      weak_batch_size: images of a mini-batch whose minimum is searched for; "none" takes the
        training's (method "pof") or the paper's 32.
      eigenvectors: leading eigenvectors of the classifier's Hessian.
      examples: training and test images, each drawn at random; 0 for all.
      label_smoothing: of gradients, Hessian and searches; "none" takes the training's.
      tolerance: of the eigenvectors, their residual over the largest eigenvalue.
      max_products: bound on the products with each Hessian.
      seed: of the draws.
    """

    batches: int = 400
    batch_size: int | None = None
    weak_batch_size: int | None = None
    eigenvectors: int = 10
    examples: int = 0
    label_smoothing: float | None = None
    tolerance: float = 1e-3
    max_products: int = 300
    seed: int = 0

    def __post_init__(self):
        sizes = ("batches", "batch_size", "weak_batch_size", "eigenvectors", "max_products")
        batches_lib.check_options(self, {**dict.fromkeys(sizes, 1), "examples": 0, "seed": 0})


class _Setup(NamedTuple):
    """What all units of an evaluation share."""

    loss: Callable[..., jax.Array]
    classify: Callable[..., jax.Array]
    options: Options
    batch_size: int
    weak_batch_size: int
    label_smoothing: float


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit for each network and split."""
    model = loaded_run.model
    splits = {
        name: batches_lib.subset(getattr(loaded_run.dataset, name), options.examples, options.seed)
        for name in SPLITS
    }
    batch_sizes = batches_lib.batch_sizes(loaded_run, options, splits)
    smoothing = batches_lib.label_smoothing(loaded_run, options)
    parameters = trees.size(loaded_run.networks[0].variables["params"][model.head])
    if options.eigenvectors > parameters:
        raise UsageError(
            f"--eigenvectors={options.eigenvectors} is more than the {parameters} parameters of "
            f"{model.head}"
        )

    def loss(weights: Any, batch: Any) -> jax.Array:
        rows, example_weights = batch
        logits = model.classify(weights["head"], weights["features"][rows])
        labels = weights["labels"][rows]
        return batches_lib.weighted_loss(logits, labels, smoothing, example_weights)

    setup = _Setup(loss, model.classify, options, *batch_sizes, smoothing)

    def measure(network: Network, name: str) -> dict[str, Any]:
        split = splits[name]
        features = loaded_run.features(network, split.images)
        head = network.variables["params"][model.head]
        return {**network.identity, "split": name, **_measured(setup, head, features, split)}

    return [
        WorkItem(f"{network.key}/{name}", functools.partial(measure, network, name))
        for network in loaded_run.networks
        for name in SPLITS
    ]


def _measured(setup: _Setup, head: Any, features: np.ndarray, split: Split) -> dict[str, Any]:
    """Compare the mini-batches of one split with its Hessian."""
    options, labels = setup.options, split.labels
    drawn = library.mini_batches(len(split), setup.batch_size, options.batches, seed=options.seed)
    weights = {"head": head, "features": features, "labels": labels}
    weights, (whole, batches) = batches_lib.place(
        weights,
        (
            batches_lib.weighted_rows(len(split), min(1024, len(split))),
            (drawn, np.ones(drawn.shape, np.float32)),
        ),
    )
    op = hessian.operator(setup.loss, weights, whole, mask="head")
    pairs = hessian.eigenpairs(
        op,
        options.eigenvectors,
        tolerance=options.tolerance,
        max_products=options.max_products,
    )
    probe = library.probe(setup.loss, weights, batches, whole, pairs.vectors, mask="head")
    strongest = library.strongest(np.asarray(probe.cosines))
    weak = library.mini_batches(
        len(split), setup.weak_batch_size, options.batches, seed=options.seed
    )
    # On one device: to divide the few images of each search would be slower.
    weak_loss = functools.partial(batches_lib.weighted_loss, smoothing=setup.label_smoothing)
    minima = perturbations.searches(head, features[weak], labels[weak], setup.classify, weak_loss)
    accepted = np.asarray(minima.accepted)
    xi = np.asarray(minima.xi)[accepted]
    return {
        "examples": len(split),
        "batches": options.batches,
        "batch_size": setup.batch_size,
        "weak_batch_size": setup.weak_batch_size,
        "label_smoothing": setup.label_smoothing,
        "eigenvalue": float(pairs.values[0]),
        "converged": pairs.converged,
        "principal": float((strongest.eigenvector == 0).mean()),
        "certain": float(strongest.certain.mean()),
        "captured": float(strongest.captured.mean()),
        "curvature": batches_lib.number(np.median(probe.curvatures)),
        "own_curvature": batches_lib.number(np.median(probe.own_curvatures)),
        "xi": batches_lib.number(np.median(xi)) if len(xi) else None,
        "rejected": float(1 - accepted.mean()),
        "eigenvalues": batches_lib.numbers(pairs.values),
        "counts": np.bincount(strongest.eigenvector, minlength=options.eigenvectors).tolist(),
        "norms": batches_lib.numbers(probe.norms),
        "curvatures": batches_lib.numbers(probe.curvatures),
        "own_curvatures": batches_lib.numbers(probe.own_curvatures),
        "distances": batches_lib.numbers(xi),
    }


def table(rows: Sequence[Record]) -> Table:
    """Return curvatures, correlations and distances, mean over seeds."""
    cells = []
    for (run, weights, step), both in grouped(rows, ("run", "weights", "step")).items():
        for (split,), own in grouped(both, ("split",)).items():
            found = {name: [row[name] for row in own] for name in own[0]}
            cells.append(
                [
                    run,
                    weights,
                    str(step),
                    str(len(own)),
                    split,
                    batches_lib.short(found["eigenvalue"]),
                    batches_lib.short(found["curvature"]),
                    batches_lib.short(found["own_curvature"]),
                    batches_lib.short(found["principal"], 100),
                    batches_lib.short(found["certain"], 100),
                    batches_lib.short(found["xi"]),
                    batches_lib.short(found["rejected"], 100),
                    batches_lib.short(_ratios(both)) if split == "test" else MISSING,
                    f"{PAPER_RATIO:g}" if split == "test" else MISSING,
                ]
            )
    row = rows[0]
    notes = [
        f"λ: largest eigenvalue of the classifier's Hessian over the images of the split. g'Hg, "
        f"g'H_B g: median over {row['batches']} mini-batches of {row['batch_size']}, with the unit "
        "gradient g of a mini-batch and the Hessian of the split or of that mini-batch.",
        f"principal: mini-batches whose gradient correlates most with the first of the "
        f"{len(row['counts'])} leading eigenvectors; certain: those for which none beyond these "
        "can correlate more.",
        f"ξ*: median distance of a mini-batch's minimum against its gradient (PoF paper, eq. 2; "
        f"{row['weak_batch_size']} images), without the rejected, whose loss falls without end.",
        batches_lib.loss_note(rows),
        "Inference mode, no augmentation.",
        "paper: the peak of the test distribution of ξ* lies at roughly twice that of the training "
        "distribution, on toy data with an MLP (Figure 2 b). Figure 5: PoF has peaks of g'Hg about "
        "half as large as SAM's, on training and test images (WRN-28-10, CIFAR-10, 400 batches).",
    ]
    if not all(row["converged"] for row in rows):
        notes.append("Some eigenvectors are short of their tolerance: raise --max-products.")
    return Table(
        "Mini-batch gradients of the classifier against its Hessian",
        (
            "run",
            "weights",
            "step",
            "seeds",
            "split",
            "λ",
            "g'Hg",
            "g'H_B g",
            "principal %",
            "certain %",
            "ξ*",
            "rejected %",
            "ξ* test/train",
            "paper",
        ),
        cells,
        notes,
    )


def _ratios(rows: Sequence[Record]) -> list[float | None]:
    """Return for each seed the median distance on test images over that on training images."""
    found: list[float | None] = []
    for own in grouped(rows, ("seed",)).values():
        xi = {row["split"]: row["xi"] for row in own}
        known = xi.get("train") and xi.get("test")
        found.append(xi["test"] / xi["train"] if known else None)
    return found


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw counts, distances, and the curvatures of both splits, one row of panels for weights."""
    rows = newest(rows)
    found, styles = grouped(rows, ("weights",)), plots.run_styles(rows)
    grid = figure.subplots(len(found), 4, squeeze=False)
    for line, ((weights,), own) in zip(grid, found.items(), strict=True):
        runs = grouped(own, ("run",))
        _counts(line[0], runs, styles)
        line[0].set_title(f"{weights} weights: strongest eigenvector")
        _distances(line[1], runs, styles)
        line[1].set_title("ξ*: training filled, test dashed")
        for axes, split in zip(line[2:], SPLITS, strict=True):
            values = _values(own, split, "curvatures")
            # A few outliers would leave the others in one bin: they are counted in the last.
            top = float(np.quantile(values, 0.99)) if len(values) else 1.0
            edges = np.linspace(min(0.0, np.min(values, initial=0.0)), top or 1.0, 41)
            groups = [
                (run, _values(mine, split, "curvatures"), styles[run])
                for (run,), mine in runs.items()
            ]
            batches_lib.histogram(axes, groups, edges)
            axes.set_title(f"g'Hg, {split} images")
            beyond = f"\n(last bin: all from {edges[-2]:.3g} up)" if (values > top).any() else ""
            axes.set_xlabel(f"curvature along the gradient{beyond}")
            axes.set_ylabel("share of the mini-batches")
    grid[0][-1].legend(frameon=False)


def _values(rows: Sequence[Record], split: str, name: str) -> np.ndarray:
    """Return the values of all seeds together."""
    return np.array(
        [v for row in rows if row["split"] == split for v in row[name] if v is not None]
    )


def _counts(axes: Axes, runs: Runs, styles: Styles) -> None:
    width = 0.8 / len(runs)
    for index, ((run,), mine) in enumerate(runs.items()):
        counts = np.sum([row["counts"] for row in mine if row["split"] == "train"], axis=0)
        place = np.arange(1, len(counts) + 1) + width * (index - (len(runs) - 1) / 2)
        axes.bar(place, counts, width, color=styles[run]["color"], label=run)
    axes.set_xticks(np.arange(1, len(counts) + 1))
    axes.set_xlabel("eigenvector, the largest eigenvalue first")
    axes.set_ylabel("training mini-batches")
    axes.spines[["top", "right"]].set_visible(False)


def _distances(axes: Axes, runs: Runs, styles: Styles) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [_values(mine, split, "distances") for mine in runs.values() for split in SPLITS]
    positive = np.concatenate(values)
    if len(positive):
        edges = batches_lib.log_edges(positive)
        for (run,), mine in runs.items():
            style = styles[run]
            for split, dashes in (("train", "-"), ("test", "--")):
                share = batches_lib.shares(_values(mine, split, "distances"), edges)
                look = {"color": style["color"], "linestyle": dashes}
                axes.stairs(share, edges, label=run if split == "train" else None, **look)
                if split == "train":
                    axes.stairs(share, edges, fill=True, alpha=0.25, color=style["color"])
        axes.set_xscale("log")
        # Over less than a decade matplotlib labels every small tick, one upon the other.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("distance of the mini-batch's minimum")
    axes.set_ylabel("share of the mini-batches")
    axes.spines[["top", "right"]].set_visible(False)


KIND = Evaluator(
    name="gradients",
    summary="mini-batch gradients of the classifier against the eigenvectors of its Hessian",
    source="PoF paper, Figures 2 and 5",
    options=Options,
    units=units,
    table=table,
    draw=draw,
    size=batches_lib.height(4, 18),
)
