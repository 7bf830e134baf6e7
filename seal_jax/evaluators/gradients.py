"""Mini-batch gradients of the classifier against its Hessian: PoF paper, Figures 2 and 5.

Everything is in the space of the classifier's parameters, as in the paper, with the features of a
trained network; they are computed once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from seal_jax import hessian
from seal_jax.core import plots, tables
from seal_jax.core.tables import Record, Table, grouped, seed_mean, shared
from seal_jax.errors import UsageError
from seal_jax.evaluation import gradients as library
from seal_jax.evaluation import perturbations
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least
from seal_jax.hessian import trees

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPLITS = ("train", "test")
Styles = Mapping[str, Mapping[str, Any]]
# Text and Figure 2 b: "the peak point of the test distribution is roughly twice as that of the
# training distribution", on toy data.
PAPER_RATIO = 2.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers of mini-batches and of their images.

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
        check_least(self, **dict.fromkeys(sizes, 1), examples=0, seed=0)


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one work item for each network and split."""
    model = loaded_run.model
    splits = {
        name: batching.subset(getattr(loaded_run.dataset, name), options.examples, options.seed)
        for name in SPLITS
    }
    batch_size, weak_size = batching.batch_sizes(loaded_run, options, splits)
    smoothing = batching.label_smoothing(loaded_run, options)
    # All networks of a run have the same shapes, so the first one stands for all.
    parameters = trees.size(loaded_run.networks[0].variables["params"][model.head])
    if options.eigenvectors > parameters:
        raise UsageError(
            f"--eigenvectors={options.eigenvectors} is more than the {parameters} parameters of "
            f"{model.head}"
        )
    weak_loss = functools.partial(batching.weighted_loss, smoothing=smoothing)

    # Defined once: its programs serve all networks and both splits.
    def loss(weights: Any, batch: Any) -> jax.Array:
        rows, example_weights = batch
        logits = model.classify(weights["head"], weights["features"][rows])
        return batching.weighted_loss(logits, weights["labels"][rows], smoothing, example_weights)

    def measure(network: Network, name: str) -> dict[str, Any]:
        # The Hessian is that of the split itself: Figure 5 compares training and test curvatures.
        images, labels = splits[name].images, splits[name].labels
        count, seed = len(labels), options.seed
        # [n, d], computed once: the classifier's gradients and Hessian need no pass through the network
        features = loaded_run.features(network, images)
        head = network.variables["params"][model.head]
        rows = library.mini_batches(count, batch_size, options.batches, seed=seed)
        weights, (whole, batches) = batching.place(
            {"head": head, "features": features, "labels": labels},
            (
                # The whole split, in batches of 1024 feature vectors, which are small.
                batching.weighted_rows(count, min(1024, count)),
                # Mini-batches as in training: whole ones, at weight 1.
                (rows, np.ones(rows.shape, np.float32)),
            ),
        )
        # The weights hold data too (features, labels), so the mask names the classifier.
        op = hessian.operator(loss, weights, whole, mask="head")
        pairs = hessian.eigenpairs(
            op, options.eigenvectors, tolerance=options.tolerance, max_products=options.max_products
        )
        # All mini-batches are measured in one program, against all eigenvectors at once.
        probe = library.probe(loss, weights, batches, whole, pairs.vectors, mask="head")
        strongest = library.strongest(np.asarray(probe.cosines))
        # The searches have their own, smaller mini-batches: PoF's weak classifiers, 32 images in the paper.
        weak = library.mini_batches(count, weak_size, options.batches, seed=seed)
        # On one device: to divide the few images of each search would be slower.
        minima = perturbations.searches(
            head, features[weak], labels[weak], model.classify, weak_loss
        )
        accepted = np.asarray(minima.accepted)
        # A rejected search has no minimum: its 0 is no distance.
        xi = np.asarray(minima.xi)[accepted]
        return {
            **network.identity,
            "split": name,
            "examples": count,
            "batches": options.batches,
            "batch_size": batch_size,
            "weak_batch_size": weak_size,
            "label_smoothing": smoothing,
            "eigenvalue": float(pairs.values[0]),
            "converged": pairs.converged,
            "principal": float((strongest.eigenvector == 0).mean()),
            "certain": float(strongest.certain.mean()),
            "captured": float(strongest.captured.mean()),
            "curvature": batching.number(np.median(probe.curvatures)),
            "own_curvature": batching.number(np.median(probe.own_curvatures)),
            "xi": batching.number(np.median(xi)) if len(xi) else None,
            "rejected": float(1 - accepted.mean()),
            "eigenvalues": batching.numbers(pairs.values),
            "counts": np.bincount(strongest.eigenvector, minlength=options.eigenvectors).tolist(),
            "norms": batching.numbers(probe.norms),
            "curvatures": batching.numbers(probe.curvatures),
            "own_curvatures": batching.numbers(probe.own_curvatures),
            "distances": batching.numbers(xi),
        }

    return [
        WorkItem(f"{network.key}/{name}", functools.partial(measure, network, name))
        for network in loaded_run.networks
        for name in SPLITS
    ]


def table(rows: Sequence[Record]) -> Table:
    """Return curvatures, correlations and distances, mean over seeds."""
    train_xi = {batching.network_of(row): row["xi"] for row in rows if row["split"] == "train"}

    def ratio(row: Record) -> float | None:
        # Of medians, over the same network's training split; the paper compares the peaks of both distributions.
        of_train = train_xi.get(batching.network_of(row))
        return row["xi"] / of_train if row["split"] == "test" and row["xi"] and of_train else None

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
        batching.loss_note(rows),
        "Inference mode, no augmentation.",
        "paper: the peak of the test distribution of ξ* lies at roughly twice that of the training "
        "distribution, on toy data with an MLP (Figure 2 b). Figure 5: PoF has peaks of g'Hg about "
        "half as large as SAM's, on training and test images (WRN-28-10, CIFAR-10, 400 batches).",
    ]
    if not all(row["converged"] for row in rows):
        notes.append("Some eigenvectors are short of their tolerance: raise --max-products.")
    return Table.of_groups(
        "Mini-batch gradients of the classifier against its Hessian",
        [
            *tables.CHECKPOINT_COLUMNS,
            shared("split"),
            seed_mean("λ", "eigenvalue", None),
            seed_mean("g'Hg", "curvature", None),
            seed_mean("g'H_B g", "own_curvature", None),
            seed_mean("principal %", "principal", None, 100),
            seed_mean("certain %", "certain", None, 100),
            seed_mean("ξ*", "xi", None),
            seed_mean("rejected %", "rejected", None, 100),
            seed_mean("ξ* test/train", ratio, None),
            shared(
                "paper", lambda row: PAPER_RATIO if row["split"] == "test" else None, "{:g}".format
            ),
        ],
        tables.by_checkpoint(rows, "split"),
        notes,
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw counts, distances, and the curvatures of both splits, one row of panels for weights."""
    rows = tables.newest(rows)
    styles = plots.run_styles(rows)
    panels = plots.panels_by_weights(figure, rows, 4, grid=None)
    for weights, of_weights, line in panels:
        runs = {run: of_run for (run,), of_run in grouped(of_weights, ("run",)).items()}
        _draw_counts(line[0], runs, styles)
        line[0].set_title(f"{weights} weights: strongest eigenvector")
        _draw_distances(line[1], runs, styles)
        line[1].set_title("ξ*: training filled, test dashed")
        for axes, split in zip(line[2:], SPLITS, strict=True):
            # Edges are common to the runs of a panel, or their bars could not be compared.
            values = _values(of_weights, split, "curvatures")
            # A few outliers would leave the others in one bin: they are counted in the last.
            top = float(np.quantile(values, 0.99)) if len(values) else 1.0
            edges = np.linspace(min(0.0, np.min(values, initial=0.0)), top or 1.0, 41)
            for run, of_run in runs.items():
                plots.histogram(axes, run, _values(of_run, split, "curvatures"), edges, styles[run])
            axes.set_title(f"g'Hg, {split} images")
            beyond = f"\n(last bin: all from {edges[-2]:.3g} up)" if (values > top).any() else ""
            axes.set_xlabel(f"curvature along the gradient{beyond}")
            axes.set_ylabel("share of the mini-batches")
    panels[0][2][-1].legend(frameon=False)


def _values(rows: Sequence[Record], split: str, name: str) -> np.ndarray:
    """Return the values of all seeds together."""
    return np.array(
        [v for row in rows if row["split"] == split for v in row[name] if v is not None]
    )


def _draw_counts(axes: Axes, runs: Mapping[str, Sequence[Record]], styles: Styles) -> None:
    width = 0.8 / len(runs)
    for index, (run, of_run) in enumerate(runs.items()):
        # Figure 2 a is of the training gradients.
        counts = np.sum([row["counts"] for row in of_run if row["split"] == "train"], axis=0)
        place = np.arange(1, len(counts) + 1) + width * (index - (len(runs) - 1) / 2)
        axes.bar(place, counts, width, color=styles[run]["color"], label=run)
    axes.set_xticks(np.arange(1, len(counts) + 1))
    axes.set_xlabel("eigenvector, the largest eigenvalue first")
    axes.set_ylabel("training mini-batches")


def _draw_distances(axes: Axes, runs: Mapping[str, Sequence[Record]], styles: Styles) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    # Common edges for both splits and all runs.
    edges = plots.log_edges(
        np.concatenate(
            [_values(rows, split, "distances") for rows in runs.values() for split in SPLITS]
        )
    )
    for run, of_run in runs.items():
        train, test = (_values(of_run, split, "distances") for split in SPLITS)
        colour = styles[run]["color"]
        plots.histogram(axes, run, train, edges, {"color": colour, "linestyle": "-"})
        axes.stairs(plots.bin_shares(test, edges), edges, color=colour, linestyle="--")
    axes.set_xscale("log")
    # Over less than a decade matplotlib labels every small tick, one upon the other.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("distance of the mini-batch's minimum")
    axes.set_ylabel("share of the mini-batches")


EVALUATOR = Evaluator(
    name="gradients",
    summary="mini-batch gradients of the classifier against the eigenvectors of its Hessian",
    source="PoF paper, Figures 2 and 5",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    size=plots.size_by_weights(18, 4),
    order=31,
)
