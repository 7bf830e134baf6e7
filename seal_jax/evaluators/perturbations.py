"""How far SGD, SAM and PoF move the classifier for one mini-batch: PoF paper, Figure 6."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table, grouped, newest
from seal_jax.evaluation import perturbations as library
from seal_jax.evaluation.gradients import mini_batches
from seal_jax.evaluators import batches as batches_lib
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"sgd": "SGD", "sam": "SAM", "pof": "PoF"}

CHUNK = 50  # mini-batches of one unit


@dataclasses.dataclass(frozen=True)
class Options:
    """Which mini-batches, and the sizes of steps.

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
        batches_lib.check_options(self, {**dict.fromkeys(sizes, 1), **dict.fromkeys(rates, 0)})


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return the units of each network: the steps of SGD and SAM, and the searches of PoF."""
    split = loaded_run.dataset.train
    batch_size, weak_size = batches_lib.batch_sizes(loaded_run, options, {"training": split})
    smoothing = batches_lib.label_smoothing(loaded_run, options)
    mean_loss = functools.partial(batches_lib.weighted_loss, smoothing=smoothing)
    gamma = options.gamma
    if gamma is None:
        gamma = batches_lib.method_option(loaded_run, "pof", "gamma_high", 2.0)
    sam = _sam(loaded_run, options)
    model, train = loaded_run.model, options.batch_norm == "batch"

    def batches(size: int, start: int) -> Any:
        rows = mini_batches(len(split), size, options.batches, seed=options.seed)
        # The last unit is filled up, so that all have one program; `own` takes that away.
        numbers = np.arange(start, start + min(CHUNK, options.batches)) % options.batches
        chosen = rows[numbers]
        return split.images[chosen], split.labels[chosen], numbers.astype(np.uint32)

    def own(values: jax.Array, start: int) -> np.ndarray:
        return np.asarray(values)[: options.batches - start]

    def extract(variables: Any, images: jax.Array, number: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.fold_in(jax.random.key(options.seed), number)}
        return model.extract(variables, loaded_run.normalise(images), train, rngs=rngs)[0]

    def loss(variables: Any, batch: Any) -> jax.Array:
        images, labels, number = batch
        features = extract(variables, images, number)
        return mean_loss(model.classify(variables["params"][model.head], features), labels)

    @jax.jit
    def features_of(variables: Any, images: jax.Array, numbers: jax.Array) -> jax.Array:
        return jax.lax.map(lambda one: extract(variables, *one), (images, numbers))

    def steps(network: Network, start: int) -> dict[str, Any]:
        weights, placed = batches_lib.place(network.variables, batches(batch_size, start))
        found = library.steps(
            loss,
            weights,
            placed,
            head=f"params/{model.head}",
            trained=_trained(network.variables),
            learning_rate=options.learning_rate,
            **sam,
        )
        return {
            **network.identity,
            "batch_size": batch_size,
            "label_smoothing": smoothing,
            "sgd": batches_lib.numbers(own(found.sgd, start)),
            "sgd_setting": options.learning_rate,
            "sam": batches_lib.numbers(own(found.sam, start)),
            "sam_setting": sam["rho"],
            "adaptive": sam["adaptive"],
            "batch_norm": options.batch_norm,
        }

    def searches(network: Network, start: int) -> dict[str, Any]:
        images, labels, numbers = batches(weak_size, start)
        weights, placed = batches_lib.place(network.variables, (images, numbers))
        # To one device: to divide the few images of each search would be slower.
        features = np.asarray(features_of(weights, *placed))
        head = network.variables["params"][model.head]
        minima = library.searches(head, features, labels, model.classify, mean_loss)
        accepted = own(minima.accepted, start)
        return {
            **network.identity,
            "batch_size": weak_size,
            "label_smoothing": smoothing,
            "pof": batches_lib.numbers(gamma * own(minima.xi, start)[accepted]),
            "pof_setting": gamma,
            "rejected": int((~accepted).sum()),
            "batch_norm": options.batch_norm,
        }

    works: dict[str, Callable[..., dict[str, Any]]] = {"steps": steps, "searches": searches}
    return [
        WorkItem(f"{network.key}/{name}/{start}", functools.partial(work, network, start))
        for network in loaded_run.networks
        for name, work in works.items()
        for start in range(0, options.batches, CHUNK)
    ]


def _sam(loaded_run: LoadedRun, options: Options) -> dict[str, Any]:
    """Return SAM's options: those of the run, or plain SAM with the paper's radius."""
    of_run = functools.partial(batches_lib.method_option, loaded_run, "sam")
    decays = of_run("decay_in_perturbation", False)
    return {
        "rho": of_run("rho", 0.05) if options.rho is None else options.rho,
        "adaptive": of_run("adaptive", False),
        "eta": of_run("eta", 0.0),
        "weight_decay": loaded_run.settings.optimizer.weight_decay if decays else 0.0,
    }


def _trained(variables: Any) -> str | None:
    """Return the rule for the parameters among all variables."""
    others = jax.tree.leaves({name: tree for name, tree in variables.items() if name != "params"})
    return "params" if others else None  # a mask must leave something out


def combined(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row for each network and measure, of the sizes in all its units."""
    fields = ("run", "weights", "step", "seed")
    identity = ("run", "data", "model", "method", "weights", "seed", "step", "generation")
    found = []
    for own in grouped(records, fields).values():
        for measure in MEASURES:
            parts = [record for record in own if measure in record]
            sizes = [size for record in parts for size in record[measure]]
            rejected = sum(record["rejected"] for record in parts) if measure == "pof" else 0
            first = parts[0]
            found.append(
                {
                    **{name: first[name] for name in identity},
                    "batch_norm": first["batch_norm"],
                    "label_smoothing": first.get("label_smoothing", 0.0),
                    "measure": measure,
                    "setting": first[f"{measure}_setting"],
                    "adaptive": bool(first.get("adaptive")) and measure == "sam",
                    "batch_size": first["batch_size"],
                    "batches": len(sizes) + rejected,
                    "rejected": rejected,
                    "median": _quantile(sizes, 0.5),
                    "low": _quantile(sizes, 0.05),
                    "high": _quantile(sizes, 0.95),
                    "sizes": sizes,
                }
            )
    return found


def _quantile(sizes: Sequence[float | None], share: float) -> float | None:
    known = [size for size in sizes if size is not None]
    return float(np.quantile(known, share)) if known else None


def table(rows: Sequence[Record]) -> Table:
    """Return the sizes, mean over seeds, beside those of SAM."""
    signs = {"sgd": "rate", "sam": "rho", "pof": "gamma"}
    cells = []
    for (run, weights, step), all_three in grouped(rows, ("run", "weights", "step")).items():
        sam = {row["seed"]: row["median"] for row in all_three if row["measure"] == "sam"}
        for (measure,), own in grouped(all_three, ("measure",)).items():
            found = {name: [row[name] for row in own] for name in own[0]}
            times = [
                row["median"] / sam[row["seed"]] if row["median"] and sam.get(row["seed"]) else None
                for row in own
            ]
            name = "ASAM" if own[0]["adaptive"] else MEASURES[measure]
            shares = [row["rejected"] / row["batches"] for row in own]
            cells.append(
                [
                    run,
                    weights,
                    str(step),
                    str(len(own)),
                    name + own_mark(own[0]),
                    f"{signs[measure]} = {own[0]['setting']:g}",
                    str(own[0]["batch_size"]),
                    batches_lib.short(found["median"]),
                    batches_lib.short(found["low"]),
                    batches_lib.short(found["high"]),
                    batches_lib.short(times),
                    batches_lib.short(shares, 100) if measure == "pof" else "-",
                ]
            )
    modes = sorted({row["batch_norm"] for row in rows})
    return Table(
        "Sizes of the classifier's perturbations by one mini-batch",
        (
            "run",
            "weights",
            "step",
            "seeds",
            "measure",
            "setting",
            "batch",
            "median",
            "5 %",
            "95 %",
            "times SAM",
            "rejected %",
        ),
        cells,
        (
            f"Euclidean norms over {rows[0]['batches']} training mini-batches, not augmented; "
            f"BatchNorm's statistics: {' or '.join(modes)}. *: the training's own method.",
            batches_lib.loss_note(rows),
            "SGD: the learning rate times the gradient's norm. SAM: the classifier's part of the "
            "perturbation of all parameters, of radius rho. PoF: gamma times the distance of the "
            "mini-batch's minimum; rejected: those whose loss falls without end, left out.",
            "The PoF paper (Figure 6: WRN-28-10, CIFAR-10, each measure on the run of its own "
            "method) has PoF a few orders of magnitude above SAM, and SAM far above SGD at 1.6e-4.",
        ),
    )


def own_mark(row: Record) -> str:
    """Return a mark where a row measures the method that the run trained with."""
    return "*" if _measure_of(row["method"]) == row["measure"] else ""


def _measure_of(method: str) -> str:
    return method if method in MEASURES else "sgd"


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw histograms on a log axis: all three of one run, or of several each its own."""
    rows = newest(rows)
    styles = plots.run_styles(rows)
    several = len({row["run"] for row in rows}) > 1
    if several:
        rows = [row for row in rows if own_mark(row)]
    found = grouped(rows, ("weights",))
    grid = figure.subplots(len(found), 1, sharex=True, squeeze=False)
    sizes = np.array([size for row in rows for size in row["sizes"] if size])
    edges = batches_lib.log_edges(sizes) if len(sizes) else np.array([0.1, 1.0])
    for (axes,), ((weights,), own) in zip(grid, found.items(), strict=True):
        groups = [
            (
                f"{run}: {MEASURES[measure]}" if several else MEASURES[measure],
                np.array([size for row in mine for size in row["sizes"] if size]),
                styles[run] if several else plots.style(index),
            )
            for index, ((run, measure), mine) in enumerate(grouped(own, ("run", "measure")).items())
        ]
        batches_lib.histogram(axes, groups, edges)
        axes.set_xscale("log")
        shown = dict.fromkeys(MEASURES[row["measure"]] for row in own)
        axes.set_title(f"{', '.join(shown)}, {weights} weights")
        axes.set_ylabel("share of the mini-batches")
        axes.set_xlabel("‖δθ‖₂, size of the classifier's perturbation")
    grid[0][0].legend(frameon=False)


KIND = Evaluator(
    name="perturbations",
    summary="sizes of the classifier's perturbations by one mini-batch",
    source="PoF paper, Figure 6",
    options=Options,
    units=units,
    table=table,
    draw=draw,
    rows=combined,
    size=batches_lib.height(3.5, 8),
)
