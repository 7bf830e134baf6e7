"""Spectrum of the Hessian, and the eigenvalues of mini-batches' Hessians: SEAL paper, Table 6."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import data, hessian, masks
from seal_jax.core import plots
from seal_jax.core.losses import cross_entropy
from seal_jax.core.tables import MISSING, Table, grouped, newest, spread
from seal_jax.data import Augmentation, Split
from seal_jax.errors import UsageError
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.batches import check_options, shardings, subset
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import flag
from seal_jax.hessian import trees
from seal_jax.hessian.krylov import Basis
from seal_jax.hessian.lanczos import choose_basis_size
from seal_jax.hessian.spectrum import share_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PyTree = Any
PARTS = ("eigenvalues", "trace", "density", "batches")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of which loss, on which data, and how exactly.

    Attributes:
      parts: what is measured: of the whole training data "eigenvalues", "trace" and "density", and
        "batches", the statistics of Table 6.
      eigenvalues: of the whole data at either end of the spectrum.
      tolerance: of their residuals, over the largest in magnitude at the same end; values err by
        about its square.
      max_products: bound on products with the Hessian for them.
      trace_method: "hutch++" or "hutchinson".
      trace_products: products for the trace.
      probes: random vectors for the density; the share of eigenvalues that one measures errs by
        less than the square root of 0.5 over their number.
      density_steps: of Lanczos for each of them.
      threshold: eigenvalues below minus this, over the largest, count as clearly negative.
      batch_eigenvalues: of each mini-batch, by magnitude; 5 in the paper.
      batch_size: of the mini-batches, by default the training's.
      batches: how many mini-batches, 0 for all of an epoch; where training drops the images that
        fill no batch (train.drop_last), so does this.
      batch_steps: of Lanczos for each mini-batch.
      batch_tolerance: of the residuals with which a mini-batch counts as converged.
      chunk: mini-batches in one part of the work, dealt out to the devices.
      examples: training images that stand for the whole data, 0 for all.
      data_batch_size: images at a time in products over the whole data.
      augment: which images are augmented as in training: "batches", those of the mini-batches;
        "all", the whole data too, once for all products; or "none".
      label_smoothing: in the loss; 0 is the negative log-likelihood of the paper.
      weight_decay: of the L2 term, which adds it to every eigenvalue; by default the training's.
      train_mode: normalise by the statistics of each batch instead of the running ones; images that
        do not fill a batch are then left out.
      mask: restrict the Hessian to the parameters at or below these paths; "re:..." is a regular
        expression.
      basis: where the Krylov basis of the whole data lies; see seal_jax.hessian.eigenpairs.
      byte_budget: bytes of device memory, one half for the data, which is streamed from the host if
        it is larger, the other for the basis of the eigenvalues.
      seed: of mini-batches, augmentation and random vectors.
    """

    parts: tuple[str, ...] = PARTS
    eigenvalues: int = 5
    tolerance: float = 1e-2
    max_products: int = 500
    trace_method: Literal["hutch++", "hutchinson"] = "hutch++"
    trace_products: int = 30
    probes: int = 1
    density_steps: int = 64
    threshold: float = 1e-3
    batch_eigenvalues: int = 5
    batch_size: int | None = None
    batches: int = 0
    batch_steps: int = 20
    batch_tolerance: float = 1e-2
    chunk: int = 32
    examples: int = 0
    data_batch_size: int = 256
    augment: Literal["batches", "all", "none"] = "batches"
    label_smoothing: float = 0.0
    weight_decay: float | None = None
    train_mode: bool = False
    mask: tuple[str, ...] | None = None
    basis: Basis = "device"
    byte_budget: int | None = None
    seed: int = 0

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"--parts={part} must be one of {', '.join(PARTS)}")
        positive = ("eigenvalues", "max_products", "probes", "density_steps", "batch_eigenvalues")
        sizes = ("batch_size", "chunk", "data_batch_size", "byte_budget")
        least = {
            **dict.fromkeys((*positive, *sizes), 1),
            **dict.fromkeys(("threshold", "batches", "examples", "weight_decay", "seed"), 0),
            "trace_products": 6 if self.trace_method == "hutch++" else 2,
            "batch_steps": self.batch_eigenvalues + 1,
        }
        check_options(self, least, tolerances=("tolerance", "batch_tolerance"))


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean cross entropy of a batch; equal ones share their compiled programs.

    Attributes:
      module: the network.
      augmentation: of images that come with augmentation parameters, and the normalisation of all.
      smoothing: of the labels.
      train: whether BatchNorm uses the batch's own statistics, and dropout drops, always alike.
    """

    module: Any
    augmentation: Augmentation
    smoothing: float
    train: bool

    def __call__(self, variables: PyTree, batch: dict[str, Any]) -> jax.Array:
        """Return the mean over the images of weight 1."""
        images = data.apply(batch["images"], batch["draws"], self.augmentation)
        if self.train:
            logits, _ = self.module.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
        else:
            logits = self.module.apply(variables, images, train=False)
        losses = cross_entropy(logits, batch["labels"], self.smoothing)
        return jnp.sum(batch["weights"] * losses) / jnp.sum(batch["weights"])


@dataclasses.dataclass(frozen=True)
class Batches:
    """Which images make up the batches; the images themselves are read when they are needed.

    Attributes:
      split: the data.
      rows: ``[batches, batch]``.
      weights: the same, 0 for filling.
      draws: augmentation parameters, leaves ``[batches, batch, ...]``; ``None``: no augmentation.
    """

    split: Split
    rows: np.ndarray
    weights: np.ndarray
    draws: data.Draws | None

    def read(self, numbers: Any = slice(None)) -> dict[str, Any]:
        """Return the batches of these numbers as the loss takes them, on the host."""
        rows = self.rows[numbers]
        return {
            "images": self.split.images[rows],
            "labels": self.split.labels[rows],
            "weights": self.weights[numbers],
            "draws": jax.tree.map(lambda leaf: leaf[numbers], self.draws),
        }


def all_images(split: Split, batch_size: int, drop: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and weights of every image once; without those that fill no batch if ``drop``."""
    rows, weights = data.padded_batches(len(split), batch_size)
    return (rows[weights.all(1)], weights[weights.all(1)]) if drop else (rows, weights)


def one_epoch(
    split: Split, batch_size: int, drop: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and weights of the mini-batches of an epoch in random order."""
    rows, weights = data.epoch_order(jax.random.key(seed), len(split), batch_size, drop)
    return np.asarray(rows), np.asarray(weights)


def augmentation_parameters(
    rows: np.ndarray, split: Split, spec: Augmentation, seed: int
) -> data.Draws | None:
    """Draw what augments batches; ``None`` where the training augmented nothing."""
    if not spec.is_random:
        return None
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(rows))
    shape: tuple[int, int, int] = split.images.shape[1:]
    drawn = jax.vmap(lambda key: data.draw(key, rows.shape[1], spec, shape))(keys)
    return jax.tree.map(np.asarray, drawn)


class Measurement:
    """Measures networks, each part small enough to be a work item.

    Args:
      loaded_run: whose data and settings.
      options: of the evaluator.

    Attributes:
      whole: the batches that stand for the whole data.
      mini_batches: those whose own Hessians are taken.
      chunk: how many of them one work item measures.

    Raises:
      UsageError: more images or batches than there are.
    """

    def __init__(self, loaded_run: LoadedRun, options: Options):
        train, settings = loaded_run.dataset.train, loaded_run.settings
        self.options = options
        self.loss = Loss(
            loaded_run.model.module,
            loaded_run.augmentation,
            options.label_smoothing,
            options.train_mode,
        )
        decay = options.weight_decay
        self.weight_decay = settings.optimizer.weight_decay if decay is None else decay
        # One half of the budget for the data, the other for the basis.
        self.half_budget = None if options.byte_budget is None else options.byte_budget // 2

        split = subset(train, options.examples, options.seed)
        size = min(options.data_batch_size, len(split))
        self.whole = self._batches(
            split, *all_images(split, size, options.train_mode), options.augment == "all"
        )

        batch_size = options.batch_size or settings.train.batch_size
        if batch_size > len(train):
            raise UsageError(
                f"--batch-size={batch_size} is more than the {len(train)} training images"
            )
        # Training never sees a batch that it drops, and a few images have a larger Hessian.
        drop = options.train_mode or settings.train.drop_last
        rows, weights = one_epoch(train, batch_size, drop, options.seed)
        count = options.batches or len(rows)
        if count > len(rows):
            raise UsageError(f"--batches={count} is more than the {len(rows)} of an epoch")
        self.mini_batches = self._batches(
            train, rows[:count], weights[:count], options.augment != "none"
        )
        self.chunk = min(options.chunk, count)

    def _batches(
        self, split: Split, rows: np.ndarray, weights: np.ndarray, augmented: bool
    ) -> Batches:
        draws = None
        if augmented:
            seed = self.options.seed
            draws = augmentation_parameters(rows, split, self.loss.augmentation, seed)
        return Batches(split, rows, weights, draws)

    @functools.cached_property
    def _host_data(self) -> dict[str, Any]:
        return self.whole.read()

    @functools.cached_property
    def _device_data(self) -> PyTree:
        return jax.device_put(self._host_data, self._shardings[1])

    @functools.cached_property
    def _shardings(self) -> Any:
        return shardings(self.whole.rows.shape[1])

    def _subtree(self, network: Network) -> tuple[PyTree, Any]:
        """Return a network's variables and the mask of the parameters whose Hessian is taken.

        Statistics are variables too, so that networks differ in arguments of one program alone.

        Raises:
          UsageError: ``--mask`` selects no parameter, or every one.
        """
        variables = {
            name: tree for name, tree in network.variables.items() if jax.tree.leaves(tree)
        }
        selected: Any = True
        if self.options.mask is not None:
            selected = masks.resolve(self.options.mask, variables["params"])
        if selected is True and len(variables) == 1:
            return variables, None  # a mask must leave something out
        return variables, {name: name == "params" and selected for name in variables}

    def operator(self, network: Network) -> hessian.Operator | hessian.Streamed:
        """Return the Hessian over the whole data, divided over the devices by images."""
        variables, mask = self._subtree(network)
        everywhere, divided = self._shardings
        placed = jax.device_put(variables, everywhere)
        options: dict[str, Any] = {
            "weights": self.whole.weights,
            "mask": mask,
            "weight_decay": self.weight_decay,
        }
        budget = self.half_budget
        if budget is None or trees.nbytes(self._host_data) <= budget:
            return hessian.operator(self.loss, placed, self._device_data, **options)
        return hessian.streamed(
            self.loss, placed, self._host_data, byte_budget=budget, sharding=divided, **options
        )

    def check(self, network: Network) -> None:
        """Raise unless the parameters suffice for what is asked."""
        like, options = trees.select(*reversed(self._subtree(network))), self.options
        size = trees.size(like)
        for field, count in (
            ("eigenvalues", 2 * options.eigenvalues),
            ("batch_eigenvalues", options.batch_eigenvalues),
        ):
            if count > size:
                raise UsageError(
                    f"{flag(field)}={getattr(options, field)} is too many for {size} parameters"
                )
        if "eigenvalues" in options.parts:
            choose_basis_size(like, 2 * options.eigenvalues, None, self.half_budget, options.basis)

    def _key(self, number: int) -> jax.Array:
        """Return the random key of a part."""
        return jax.random.fold_in(jax.random.key(self.options.seed), number)

    def eigenvalues(self, network: Network) -> dict[str, Any]:
        """Return both ends of the spectrum of the whole data."""
        options = self.options
        op = self.operator(network)
        pairs = hessian.eigenpairs(
            op,
            2 * options.eigenvalues,
            "BE",
            tolerance=options.tolerance,
            byte_budget=self.half_budget,
            basis=options.basis,
            max_products=options.max_products,
            key=self._key(0),
        )
        half = options.eigenvalues
        return {
            "parameters": op.size,
            "largest": pairs.values[:half].tolist(),
            "largest_residuals": pairs.residuals[:half].tolist(),
            "smallest": pairs.values[half:][::-1].tolist(),
            "smallest_residuals": pairs.residuals[half:][::-1].tolist(),
            "products": pairs.products,
            "converged": pairs.converged,
        }

    def trace(self, network: Network) -> dict[str, Any]:
        """Return the trace of the whole data's Hessian."""
        estimate = hessian.trace(
            self.operator(network),
            probes=self.options.trace_products,
            method=self.options.trace_method,
            key=self._key(1),
        )
        return {"trace": estimate.value, "trace_error": estimate.error}

    def density(self, probe: int, network: Network) -> dict[str, Any]:
        """Return one probe of the density."""
        density = hessian.density(
            self.operator(network),
            probes=1,
            steps=self.options.density_steps,
            basis=self.options.basis,
            key=self._key(2 + probe),
        )
        clear = -self.options.threshold * np.abs(density.nodes).max()
        return {
            "parameters": density.size,
            "nodes": density.nodes[0].tolist(),
            "node_weights": density.weights[0].tolist(),
            "negative_mass_bounds": np.ravel(density.mass_below()).tolist(),
            "clearly_negative_mass_bounds": np.ravel(density.mass_below(clear)).tolist(),
        }

    def batches(self, start: int, network: Network) -> dict[str, Any]:
        """Return the eigenvalues of a chunk of mini-batches, from ``start`` on."""
        options, count = self.options, len(self.mini_batches.rows)
        variables, mask = self._subtree(network)
        pool = hessian.batch_eigenvalues(
            self.loss,
            variables,
            # Filled up with other batches: one shape, one program.
            self.mini_batches.read((start + np.arange(self.chunk)) % count),
            options.batch_eigenvalues,
            steps=options.batch_steps,
            tolerance=options.batch_tolerance,
            mask=mask,
            weight_decay=self.weight_decay,
            key=jax.random.fold_in(self._key(1 << 20), start),
            devices=jax.local_devices(),
        )
        kept = slice(0, count - start)
        return {
            "batch_values": pool.values[kept].ravel().tolist(),
            "batch_residuals": pool.residuals[kept].ravel().tolist(),
            "batch_converged": pool.converged[kept].tolist(),
        }


def work_items(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return the parts of each network's spectrum, and chunks of its mini-batches."""
    measurement = Measurement(loaded_run, options)
    measurement.check(loaded_run.networks[0])  # all have the same shapes
    parts: list[tuple[str, Any]] = []
    for part in dict.fromkeys(options.parts):
        measure = getattr(measurement, part)
        numbers: Any = {
            "density": range(options.probes),
            "batches": range(0, len(measurement.mini_batches.rows), measurement.chunk),
        }
        if part in numbers:
            parts += [(f"{part}/{n}", functools.partial(measure, n)) for n in numbers[part]]
        else:
            parts.append((part, measure))

    def run(network: Network, measure: Any) -> dict[str, Any]:
        try:
            return {**network.identity, **measure(network)}
        except UsageError as error:
            raise UsageError(f"{network.key}: {error}") from None

    return [
        WorkItem(f"{network.key}/{name}", functools.partial(run, network, measure))
        for network in loaded_run.networks
        for name, measure in parts
    ]


_IDENTITY = ("run", "data", "model", "method", "weights", "seed", "step", "generation")


def rows(records: Sequence[Record]) -> Sequence[Record]:
    """Combine the parts of each network to one row."""
    return [
        {**dict(zip(_IDENTITY, identity, strict=True)), **_combined(parts)}
        for identity, parts in grouped(records, _IDENTITY).items()
    ]


def _combined(parts: Sequence[Record]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for record in parts:
        row.update({name: value for name, value in record.items() if name not in _IDENTITY})
    probes = [record for record in parts if "nodes" in record]
    if probes:
        nodes = np.array([record["nodes"] for record in probes])
        weights = np.array([record["node_weights"] for record in probes])
        row.update(
            nodes=nodes.ravel().tolist(),
            node_weights=(weights / len(weights)).ravel().tolist(),
            density_probes=len(probes),
        )
        for name in ("negative_mass", "clearly_negative_mass"):
            bounds = np.array([record[f"{name}_bounds"] for record in probes]).mean(0)
            row[f"{name}_bounds"] = bounds.tolist()
            row[f"{name}_error"] = share_error(bounds, row["parameters"], len(probes))
    chunks = [record for record in parts if "batch_values" in record]
    if chunks:
        fields = [f"batch_{name}" for name in hessian.BatchEigenvalues._fields]
        pool = hessian.BatchEigenvalues(
            *(np.concatenate([record[field] for record in chunks]) for field in fields)
        )
        row.update(
            batch_values=pool.values.tolist(),
            batch_residuals=pool.residuals.tolist(),
            batches=len(pool.converged),
            batch_converged=float(pool.converged.mean()),
            batch_max=pool.max,
            batch_negative=pool.negative_share,
            batch_certain=pool.certain_share,
        )
    return row


# Table 6: maximum eigenvalue, and negative eigenvalues in %.
PAPER = {
    "Normal": (889.06, 4.25),
    "Normal (long)": (2353.74, 0.0),
    "LLF": (1027.21, 14.63),
    "SEAL": (847.89, 0.0),
}
# Of the density's bumps, over the width of the spectrum.
_SIGMA = 0.01

# Title, field, scale and digits.
_BATCH_COLUMNS = (
    ("max (batches)", "batch_max", 1, 2),
    ("negative % (batches)", "batch_negative", 100, 2),
)
_CHECK_COLUMNS = (
    ("converged %", "batch_converged", 100, 1),
    ("sign sure %", "batch_certain", 100, 1),
)
_ENDS = ("largest", "smallest")
# Title, field and digits of a range in percent.
_MASS_COLUMNS = (
    ("negative mass %", "negative_mass", 1),
    ("clearly %", "clearly_negative_mass", 2),
)


def table(rows: Sequence[Record]) -> Table:
    """Return the statistics of mini-batches beside those of the whole data, mean over seeds."""
    known = any("batch_max" in row and transfer_data.paper_method(row) in PAPER for row in rows)
    parts = {name for row in rows for name in row}
    header = ["run", "weights", "step", "seeds"]
    for index, (title, field, _, _) in enumerate(_BATCH_COLUMNS):
        if field in parts:
            header += [title, *([f"paper {('max', 'negative %')[index]}"] if known else [])]
    header += [title for title, field, _, _ in _CHECK_COLUMNS if field in parts]
    header += [title for end in _ENDS if end in parts for title in (end, f"residual of {end}")]
    header += ["trace"] if "trace" in parts else []
    header += [title for title, field, _ in _MASS_COLUMNS if f"{field}_bounds" in parts]
    cells = []
    for (run, weights, step), own in grouped(rows, ("run", "weights", "step")).items():
        line = [str(run), weights, str(step), str(len(own))]
        theirs = PAPER.get(transfer_data.paper_method(own[0]) or "")
        for index, column in enumerate(_BATCH_COLUMNS):
            if column[1] in parts:
                line.append(_cell(own, *column[1:]))
                if known:
                    line.append(MISSING if theirs is None else f"{theirs[index]:.2f}")
        line += [_cell(own, *column[1:]) for column in _CHECK_COLUMNS if column[1] in parts]
        line += [cell for end in _ENDS if end in parts for cell in _first(own, end)]
        line += [_cell(own, "trace", 1, 2)] if "trace" in parts else []
        line += [
            _range(own, *column[1:]) for column in _MASS_COLUMNS if f"{column[1]}_bounds" in parts
        ]
        cells.append(line)
    return Table("Eigenvalues of the Hessian", header, cells, _notes(rows, parts, known))


def _cell(own: Sequence[Record], field: str, scale: float, digits: int) -> str:
    found = [row[field] for row in own if field in row]
    return spread(found).text(digits, scale) if found else MISSING


def _first(own: Sequence[Record], field: str) -> tuple[str, str]:
    """Return the outermost eigenvalue, marked where not all converged, and its largest residual."""
    rows = [row for row in own if field in row]
    if not rows:
        return MISSING, MISSING
    text = spread([row[field][0] for row in rows]).text(3)
    residual = max(row[f"{field}_residuals"][0] for row in rows)
    return (
        text if all(row["converged"] for row in rows) else f"{text} (not converged)",
        f"{residual:.1e}",
    )


def _range(own: Sequence[Record], field: str, digits: int) -> str:
    """Return the mean bounds of a share, widened by twice the error of the random vectors."""
    rows = [row for row in own if f"{field}_bounds" in row]
    if not rows:
        return MISSING
    lower, upper = np.mean([row[f"{field}_bounds"] for row in rows], axis=0)
    error = np.sqrt(sum(row[f"{field}_error"] ** 2 for row in rows)) / len(rows)
    lower, upper = np.clip([lower - 2 * error, upper + 2 * error], 0, 1)
    return f"{100 * lower:.{digits}f}..{100 * upper:.{digits}f}"


def _notes(rows: Sequence[Record], parts: set[str], known: bool) -> list[str]:
    notes = []
    if "batch_max" in parts:
        notes.append(
            "batches: the eigenvalues of largest magnitude of each training mini-batch's own "
            "Hessian, pooled over the mini-batches; the largest of the pool, and the share of it "
            "that is negative (Park & Kim 2022, whom the SEAL paper follows). converged: "
            "mini-batches whose residuals are within the tolerance; sign sure: values that their "
            "residual keeps away from zero."
        )
    if "largest" in parts or "trace" in parts or "negative_mass_bounds" in parts:
        notes.append(
            "largest, smallest, trace, negative mass: of the one Hessian of the mean loss over the "
            "training data."
        )
    if "largest" in parts:
        notes.append(
            "residual: |H v - value v| of the outermost value, the largest over seeds: so far at "
            "most is the value from an eigenvalue. not converged: of all values computed at that end "
            "or the other, one has a residual above the tolerance."
        )
    if "negative_mass_bounds" in parts:
        notes.append(
            "negative mass: between which bounds the share of ALL its eigenvalues below zero is, "
            "mean over seeds; not the negative % of mini-batches, which is that of a few of the "
            "largest magnitude. The bounds are those that the Lanczos iteration proves (Chebyshev, "
            "Markov, Stieltjes), widened by two standard errors of the random vectors. Most "
            "eigenvalues are so near zero that only more --density-steps would tell their sign; "
            "clearly: the same of those below minus the threshold, times the largest."
        )
    if known:
        notes.append(
            "paper: SEAL paper, Table 6, the row of the same method: ResNet-50 on Tiny-ImageNet "
            "(64x64). It names neither the number of images in a mini-batch nor that of "
            "eigenvalues; maxima grow as mini-batches shrink."
        )
    return notes


def density_of(row: Record) -> hessian.Density:
    """Return a row's spectral density."""
    probes = row["density_probes"]
    nodes = np.reshape(row["nodes"], (probes, -1))
    weights = np.reshape(row["node_weights"], (probes, -1)) * probes
    return hessian.Density(nodes, weights, np.zeros_like(nodes), 0.0, row["parameters"])


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the density of each run, and the pool of its mini-batches' eigenvalues, both log."""
    rows = newest(rows)
    kinds = grouped(rows, ("weights",))
    shown = [
        (field, title, painter)
        for field, title, painter in (
            ("nodes", "density of all eigenvalues, whole training data", _draw_density),
            ("batch_values", "share of the largest, by magnitude, of mini-batches", _draw_pool),
            ("largest", "outermost eigenvalues, whole training data", _draw_ends),
        )
        if any(field in row for row in rows)
    ]
    shown = shown[:2] or [("", "trace", _draw_trace)]
    panes = figure.subplots(len(kinds), len(shown), squeeze=False)
    for line, ((weights,), own) in zip(panes, kinds.items(), strict=True):
        for axes, (field, title, painter) in zip(line, shown, strict=True):
            painter(axes, [row for row in own if not field or field in row])
            axes.set_title(f"{title}\n{weights} weights", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    transfer_data.legend(figure, panes)


def _draw_density(axes: Axes, rows: Sequence[Record]) -> None:
    low = min(min(row["nodes"]) for row in rows)
    high = max(max(row["nodes"]) for row in rows)
    width = (high - low) or 1.0
    grid = np.linspace(low - 0.05 * width, high + 0.05 * width, 600)
    highest = 0.0
    for index, (run, own) in _runs(rows):
        lines = np.array([density_of(row).on_grid(grid, _SIGMA * width) for row in own])
        axes.plot(grid, lines.mean(0), label=run, linewidth=1.2, **plots.style(index))
        highest = max(highest, float(np.max(lines.mean(0))))
    axes.set_yscale("log")
    # One eigenvalue among all of them is as little as there is to be seen.
    least = min(1 / row["parameters"] for row in rows) / (_SIGMA * width * np.sqrt(2 * np.pi))
    # A margin over all decades that a density falls through would leave the axis mostly empty.
    axes.set_ylim(0.05 * least, 3 * max(highest, least))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")


def _draw_pool(axes: Axes, rows: Sequence[Record]) -> None:
    values = np.concatenate([row["batch_values"] for row in rows])
    low, high = float(np.min(values)), float(np.max(values))
    edges = np.linspace(low, high if high > low else low + 1, 61)
    for index, (run, own) in _runs(rows):
        pool = np.concatenate([row["batch_values"] for row in own])
        shares = np.histogram(pool, edges)[0] / len(pool)
        axes.stairs(shares, edges, label=run, linewidth=1.2, **plots.style(index))
    axes.axvline(0, color="#888888", linewidth=0.7)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 / len(values), top=1)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of the pool")


def _draw_ends(axes: Axes, rows: Sequence[Record]) -> None:
    for index, (run, own) in _runs(rows):
        for row in own:
            values = [*row["smallest"], *row["largest"]]
            colour = plots.style(index)["color"]
            axes.plot(np.full(len(values), index), values, "_", color=colour, label=run, ms=14)
    axes.set_xticks([])
    axes.set_ylabel("eigenvalue")


def _draw_trace(axes: Axes, rows: Sequence[Record]) -> None:
    for index, (run, own) in _runs(rows):
        for row in own:
            axes.errorbar(
                index, row["trace"], row["trace_error"], fmt="o", label=run,
                color=plots.style(index)["color"],
            )  # fmt: skip
    axes.set_xticks([])
    axes.set_ylabel("trace and its standard error")


def _runs(rows: Sequence[Record]) -> list[tuple[int, tuple[str, Any]]]:
    return [
        (own[0].get("index", index), (str(run), own))
        for index, ((run,), own) in enumerate(grouped(rows, ("run",)).items())
    ]


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: a row of panels for each of the weights."""
    return 10.0, 1.0 + 3.4 * len({row["weights"] for row in rows})


KIND = Evaluator(
    name="hessian",
    summary="eigenvalues, trace and density of the Hessian; eigenvalues of mini-batches' Hessians",
    source="SEAL paper, Table 6; Park & Kim 2022",
    options=Options,
    units=work_items,
    rows=rows,
    table=table,
    draw=draw,
    size=size,
)
