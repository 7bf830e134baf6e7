"""How far SGD, SAM and PoF move the classifier for one mini-batch: PoF paper, Figure 6."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from seal_jax.core import plots, tables
from seal_jax.core.tables import Record, Table, grouped, seed_mean, shared
from seal_jax.evaluation import perturbations as library
from seal_jax.evaluation.gradients import mini_batches
from seal_jax.evaluators import batching
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import check_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"sgd": "SGD", "sam": "SAM", "pof": "PoF"}
CHUNK = 50  # mini-batches of one work item


@dataclasses.dataclass(frozen=True)
class Options:
    """The mini-batches, and the settings of the three steps.

    Attributes:
      batches: training mini-batches.
      batch_size: images of a mini-batch of SGD and SAM; "none" takes the training's.
      weak_batch_size: images of a mini-batch of PoF; "none" takes the training's, if it is PoF, or
        the paper's 32.
      learning_rate: of SGD; the paper's is that of its last epochs.
      rho: SAM's radius; "none" takes the training's, if it is SAM, or the paper's 0.05.
      gamma: PoF's expansion factor; "none" takes the training's highest, if it is PoF, or the
        paper's 2.
      label_smoothing: of the loss; "none" takes the training's.
      batch_norm: "running" statistics, as in inference, or those of the "batch", as in training,
        dropout included.
      seed: of the draw of mini-batches.
    """

    batches: int = 400
    batch_size: int | None = None
    weak_batch_size: int | None = None
    learning_rate: float = 1.6e-4
    rho: float | None = None
    gamma: float | None = None
    label_smoothing: float | None = None
    batch_norm: Literal["running", "batch"] = "running"
    seed: int = 0

    def __post_init__(self):
        sizes = ("batches", "batch_size", "weak_batch_size")
        rates = ("learning_rate", "rho", "gamma", "seed")
        check_least(self, **dict.fromkeys(sizes, 1), **dict.fromkeys(rates, 0))


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return the work items of each network: the steps of SGD and SAM, and the searches of PoF."""
    split = loaded_run.dataset.train
    batch_size, weak_size = batching.batch_sizes(loaded_run, options, {"training": split})
    smoothing = batching.label_smoothing(loaded_run, options)
    mean_loss = functools.partial(batching.weighted_loss, smoothing=smoothing)
    gamma = options.gamma
    if gamma is None:
        gamma = batching.method_option(loaded_run, "pof", "gamma_high", 2.0)
    sam = _sam(loaded_run, options)
    model, train = loaded_run.model, options.batch_norm == "batch"

    def batches(size: int, start: int) -> Any:
        # All work items cut one sequence of mini-batches, so CHUNK does not change which there are.
        rows = mini_batches(len(split), size, options.batches, seed=options.seed)
        # The last work item is filled up with other batches, so that all have one program.
        chunk = np.arange(start, start + min(CHUNK, options.batches)) % options.batches
        return split.images[rows[chunk]], split.labels[rows[chunk]], chunk.astype(np.uint32)

    # Dropout is that of the batch's number, so that it does not depend on the work item.
    def extract(variables: Any, images: jax.Array, number: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.fold_in(jax.random.key(options.seed), number)}
        # The updated statistics are dropped: every mini-batch is measured at the same weights and statistics.
        return model.extract(variables, loaded_run.normalise(images), train, rngs=rngs)[0]

    def loss(variables: Any, batch: Any) -> jax.Array:
        images, labels, number = batch
        features = extract(variables, images, number)
        return mean_loss(model.classify(variables["params"][model.head], features), labels)

    @jax.jit
    def features_of(variables: Any, images: jax.Array, chunk: jax.Array) -> jax.Array:
        # Mini-batch by mini-batch: with statistics of the batch, images of another one would change the features.
        return jax.lax.map(lambda batch: extract(variables, *batch), (images, chunk))

    def steps(network: Network, start: int) -> dict[str, Any]:
        weights, placed = batching.place(network.variables, batches(batch_size, start))
        sizes = library.steps(
            loss,
            weights,
            placed,
            head=f"params/{model.head}",
            # Statistics are arguments of the loss, but no step or perturbation moves them.
            trained=batching.parameters_rule(network.variables),
            learning_rate=options.learning_rate,
            **sam,
        )
        kept = options.batches - start  # without the filling
        return {
            **network.identity,
            "batch_size": batch_size,
            "label_smoothing": smoothing,
            "sgd": batching.numbers(sizes.sgd[:kept]),
            "sgd_setting": options.learning_rate,
            "sam": batching.numbers(sizes.sam[:kept]),
            "sam_setting": sam["rho"],
            "adaptive": sam["adaptive"],
            "batch_norm": options.batch_norm,
        }

    def searches(network: Network, start: int) -> dict[str, Any]:
        images, labels, chunk = batches(weak_size, start)
        weights, placed = batching.place(network.variables, (images, chunk))
        # To one device: to divide the few images of each search would be slower.
        features = np.asarray(features_of(weights, *placed))
        head = network.variables["params"][model.head]
        minima = library.searches(head, features, labels, model.classify, mean_loss)
        kept = options.batches - start
        accepted = np.asarray(minima.accepted[:kept])
        return {
            **network.identity,
            "batch_size": weak_size,
            "label_smoothing": smoothing,
            "pof": batching.numbers(gamma * np.asarray(minima.xi[:kept])[accepted]),
            "pof_setting": gamma,
            "rejected": int((~accepted).sum()),
            "batch_norm": options.batch_norm,
        }

    measurements: dict[str, Callable[..., dict[str, Any]]] = {"steps": steps, "searches": searches}
    return [
        WorkItem(f"{network.key}/{name}/{start}", functools.partial(measure, network, start))
        for network in loaded_run.networks
        for name, measure in measurements.items()
        for start in range(0, options.batches, CHUNK)
    ]


def _sam(loaded_run: LoadedRun, options: Options) -> dict[str, Any]:
    """Return SAM's options: those of the run, or plain SAM with the paper's radius."""
    # ASAM and the decay are options of a run that trained with SAM; elsewhere plain SAM stands for comparison.
    of_run = functools.partial(batching.method_option, loaded_run, "sam")
    decays = of_run("decay_in_perturbation", False)
    return {
        "rho": of_run("rho", 0.05) if options.rho is None else options.rho,
        "adaptive": of_run("adaptive", False),
        "eta": of_run("eta", 0.0),
        "weight_decay": loaded_run.settings.optimizer.coupled_decay if decays else 0.0,
    }


def combined(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row for each network and measure, of the sizes in all its work items."""
    shared_fields = (
        *("run", "data", "model", "method", "weights", "seed", "step", "generation"),
        *("batch_norm", "label_smoothing"),
    )
    rows = []
    for of_network in grouped(records, batching.NETWORK).values():
        for measure in MEASURES:
            parts = [record for record in of_network if measure in record]
            sizes = [size for record in parts for size in record[measure]]
            rejected = sum(record["rejected"] for record in parts) if measure == "pof" else 0
            # Settings are the same in all work items of an evaluation; sizes and rejections are put together.
            first = parts[0]
            # A gradient that is not finite leaves a null among the sizes: quantiles are of the others.
            finite = [size for size in sizes if size is not None]
            quantiles = np.quantile(finite, (0.5, 0.05, 0.95)).tolist() if finite else [None] * 3
            rows.append(
                {
                    **{name: first[name] for name in shared_fields},
                    "measure": measure,
                    "setting": first[f"{measure}_setting"],
                    "adaptive": bool(first.get("adaptive")) and measure == "sam",
                    "batch_size": first["batch_size"],
                    "batches": len(sizes) + rejected,
                    "rejected": rejected,
                    **dict(zip(("median", "low", "high"), quantiles, strict=True)),
                    "sizes": sizes,
                }
            )
    return rows


def _is_of_training(row: Record) -> bool:
    """Return whether a row measures the method that the run trained with."""
    method = row["method"]
    return row["measure"] == (method if method in MEASURES else "sgd")


def table(rows: Sequence[Record]) -> Table:
    """Return the sizes, mean over seeds, beside those of SAM."""
    signs = {"sgd": "rate", "sam": "rho", "pof": "gamma"}
    of_sam = {batching.network_of(row): row["median"] for row in rows if row["measure"] == "sam"}

    def title(row: Record) -> str:
        name = "ASAM" if row["adaptive"] else MEASURES[row["measure"]]
        return f"{name}*" if _is_of_training(row) else name

    def times_sam(row: Record) -> float | None:
        sam = of_sam.get(batching.network_of(row))
        return row["median"] / sam if row["median"] and sam else None

    def rejected(row: Record) -> float | None:
        return row["rejected"] / row["batches"] if row["measure"] == "pof" else None

    modes = sorted({row["batch_norm"] for row in rows})
    return Table.of_groups(
        "Sizes of the classifier's perturbations by one mini-batch",
        [
            *tables.CHECKPOINT_COLUMNS,
            shared("measure", title),
            shared("setting", lambda row: f"{signs[row['measure']]} = {row['setting']:g}"),
            shared("batch", "batch_size"),
            seed_mean("median", "median", None),
            seed_mean("5 %", "low", None),
            seed_mean("95 %", "high", None),
            seed_mean("times SAM", times_sam, None),
            seed_mean("rejected %", rejected, None, 100),
        ],
        tables.by_checkpoint(rows, "measure"),
        (
            f"Euclidean norms over {rows[0]['batches']} training mini-batches, not augmented; "
            f"BatchNorm's statistics: {' or '.join(modes)}. *: the training's own method.",
            batching.loss_note(rows),
            "SGD: the learning rate times the gradient's norm. SAM: the classifier's part of the "
            "perturbation of all parameters, of radius rho. PoF: gamma times the distance of the "
            "mini-batch's minimum; rejected: those whose loss falls without end, left out.",
            "The PoF paper (Figure 6: WRN-28-10, CIFAR-10, each measure on the run of its own "
            "method) has PoF a few orders of magnitude above SAM, and SAM far above SGD at 1.6e-4.",
        ),
    )


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw histograms on a log axis: all three of one run, or of several each its own."""
    rows = tables.newest(rows)
    styles = plots.run_styles(rows)
    several = len(styles) > 1
    # As in Figure 6, where each measure is of the run of its own method.
    if several:
        rows = [row for row in rows if _is_of_training(row)]
    edges = plots.log_edges(_sizes(rows))
    panels = plots.panels_by_weights(figure, rows, grid=None, sharex=True)
    for weights, of_weights, (axes,) in panels:
        groups = grouped(of_weights, ("run", "measure"))
        for index, ((run, measure), of_run) in enumerate(groups.items()):
            label = f"{run}: {MEASURES[measure]}" if several else MEASURES[measure]
            style = styles[run] if several else plots.style(index)
            plots.histogram(axes, label, _sizes(of_run), edges, style)
        axes.set_xscale("log")
        shown = dict.fromkeys(MEASURES[row["measure"]] for row in of_weights)
        axes.set_title(f"{', '.join(shown)}, {weights} weights")
        axes.set_ylabel("share of the mini-batches")
        axes.set_xlabel("‖δθ‖₂, size of the classifier's perturbation")
    panels[0][2][0].legend(frameon=False)


def _sizes(rows: Sequence[Record]) -> np.ndarray:
    """Return the sizes of all seeds together, those that a log axis can show."""
    return np.array([size for row in rows for size in row["sizes"] if size])


EVALUATOR = Evaluator(
    name="perturbations",
    summary="sizes of the classifier's perturbations by one mini-batch",
    source="PoF paper, Figure 6",
    options=Options,
    work_items=work_items,
    table=table,
    draw=draw,
    rows=combined,
    size=plots.size_by_weights(8, 3.5),
    order=32,
)
