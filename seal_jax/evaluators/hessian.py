"""Spectrum of the Hessian, and the eigenvalues of mini-batches' Hessians: SEAL paper, Table 6."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import data, hessian, masks, papers
from seal_jax.core import plots, tables
from seal_jax.core.tables import MISSING, Column, Record, Table, grouped, seed_mean, shared, spread
from seal_jax.data import Augmentation, Split
from seal_jax.errors import UsageError
from seal_jax.evaluators import batching, transfer_data
from seal_jax.evaluators.evaluator import Evaluator, WorkItem
from seal_jax.evaluators.loaded_run import DescribedRun, LoadedRun, Network
from seal_jax.evaluators.options import check_least, check_names, flag
from seal_jax.hessian import trees
from seal_jax.hessian.krylov import Basis, device_bytes
from seal_jax.hessian.lanczos import choose_basis_size
from seal_jax.hessian.spectrum import share_error
from seal_jax.losses import cross_entropy
from seal_jax.training.batches import epoch_order, padded_batches
from seal_jax.training.streaming import CALL_BYTES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PyTree = Any
PARTS = ("eigenvalues", "trace", "density", "batches")
# Numbers of the random keys; those of the density's probes count up from its own.
_EIGENVALUES, _TRACE, _DENSITY, _BATCHES, _AUGMENTATION = 0, 1, 2, 1 << 20, (1 << 20) + 1


@dataclasses.dataclass(frozen=True)
class Options:
    """The loss, the data, and the accuracy of the measurements.

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
        less than the square root of 0.5 over the number of eigenvalues.
      density_steps: of Lanczos for each of them.
      threshold: eigenvalues below minus this, over the largest, count as clearly negative.
      batch_eigenvalues: of each mini-batch, by magnitude; 5 in the paper.
      batch_size: of the mini-batches, by default the training's.
      batches: how many mini-batches, 0 for all of an epoch; where training drops the images that
        fill no batch (train.drop_last), so does this.
      batch_steps: of Lanczos for each mini-batch.
      batch_tolerance: of a converged mini-batch's residuals, over its largest magnitude.
      chunk: mini-batches in one part of the work, divided over the devices.
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
      basis: where the Krylov basis of the whole data is stored; see seal_jax.hessian.eigenpairs.
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
        check_names("parts", self.parts, PARTS)
        positive = ("eigenvalues", "max_products", "probes", "density_steps", "batch_eigenvalues")
        sizes = ("batch_size", "chunk", "data_batch_size", "byte_budget")
        # For products and steps: with fewer the estimators are not defined.
        least = {
            **dict.fromkeys((*positive, *sizes), 1),
            **dict.fromkeys(("threshold", "batches", "examples", "weight_decay", "seed"), 0),
            "trace_products": 6 if self.trace_method == "hutch++" else 2,
            "batch_steps": self.batch_eigenvalues + 1,
        }
        check_least(self, **least)


def make_loss(module: Any, augmentation: Augmentation, smoothing: float, train: bool) -> Any:
    """Return the mean cross entropy of a batch, a function of variables and batch.

    With ``train``, BatchNorm uses the batch's own statistics, and dropout drops the same units each time.
    """

    def loss(variables: PyTree, batch: PyTree) -> jax.Array:
        images = data.apply(batch["images"], batch["draws"], augmentation)
        # A fixed key: a Hessian is that of one function, so every product must drop the same units.
        rngs = {"dropout": jax.random.key(0)} if train else None
        # Flax returns updated statistics beside the logits then. They are dropped: the weights stay where they are.
        mutable = ["batch_stats"] if train else False
        logits = module.apply(variables, images, train=train, mutable=mutable, rngs=rngs)
        losses = cross_entropy(logits[0] if train else logits, batch["labels"], smoothing)
        # The mean over the batch's own images; the operator weighs batches by how many that are.
        return jnp.sum(batch["weights"] * losses) / jnp.sum(batch["weights"])

    return loss


class Batches(NamedTuple):
    """Which images make up the batches; the images themselves are read when they are needed.

    Rows and weights are ``[batches, batch]``, with 0 for filling, as are the leaves of the augmentation
    parameters; ``None`` is no augmentation.
    """

    split: Split
    rows: np.ndarray
    weights: np.ndarray
    draws: data.AugmentationParams | None

    def read(self, numbers: Any = slice(None), *, encoded: bool = False) -> dict[str, Any]:
        """Return the batches of these numbers as the loss takes them, on the host.

        Images that the split holds ``encoded`` can remain so until batches of them are sliced.
        """
        rows = self.rows[numbers]
        encoded = encoded and self.split.streamed
        return {
            "images": self.split.images.take(rows) if encoded else self.split.images[rows],
            "labels": self.split.labels[rows],
            "weights": self.weights[numbers],
            "draws": jax.tree.map(lambda leaf: leaf[numbers], self.draws),
        }

    def shapes(self) -> dict[str, Any]:
        """Return the shapes of what :meth:`read` returns of all batches."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(self.rows), *leaf.shape[1:]), leaf.dtype),
            self.read(slice(0, 1)),
        )


class Measurement:
    """The measurements of a run's networks, each part small enough to be a work item.

    Args:
      loaded_run: the run; its weights are not needed.
      options: what is measured.
      devices: over which the whole data is divided, by default this process' own.

    Attributes:
      whole: the batches that stand for the whole data.
      mini_batches: those whose own Hessians are taken, ``chunk`` of them in a work item.
    """

    def __init__(
        self, loaded_run: DescribedRun, options: Options, *, devices: Sequence[Any] | None = None
    ):
        train, settings = loaded_run.dataset.train, loaded_run.settings
        self.options, self.devices = options, devices
        self.augmentation = loaded_run.augmentation
        self.loss = make_loss(
            loaded_run.model.module, self.augmentation, options.label_smoothing, options.train_mode
        )
        decay = options.weight_decay
        self.weight_decay = settings.optimizer.coupled_decay if decay is None else decay
        # One half of the budget for the data, the other for the basis.
        self.half_budget = None if options.byte_budget is None else options.byte_budget // 2

        split = batching.subset(train, options.examples, options.seed)
        size = min(options.data_batch_size, len(split))
        # rows and weights [batches, batch], 0 for the filling of the last
        rows, weights = padded_batches(len(split), size)
        if options.train_mode:  # every batch has its own statistics: filling would be in them
            rows, weights = rows[weights.all(1)], weights[weights.all(1)]
        self.whole = self._batches(split, rows, weights, options.augment == "all")

        batch_size = options.batch_size or settings.train.batch_size
        if batch_size > len(train):
            raise UsageError(
                f"--batch-size={batch_size} is more than the {len(train)} training images"
            )
        # Training never sees a batch that it drops, and a few images have a larger Hessian.
        drop = options.train_mode or settings.train.drop_last
        order = epoch_order(jax.random.key(options.seed), len(train), batch_size, drop)
        rows, weights = map(np.asarray, order)
        # The first batches of one epoch's order: no image counts in two of them.
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
        augmentation = self.augmentation
        if not (augmented and augmentation.is_random):
            return Batches(split, rows, weights, None)
        # Drawn once: the Hessian is that of one fixed set of augmented images, the same in every product.
        count, batch = rows.shape
        keys = jax.random.split(self._key(_AUGMENTATION), count)
        shape: Any = split.images.shape[1:]
        # each leaf [batches, batch, ...]; on the host, since the data may be larger than the device
        draws = jax.vmap(lambda key: data.draw(key, batch, augmentation, shape))(keys)
        return Batches(split, rows, weights, jax.tree.map(np.asarray, draws))

    @functools.cached_property
    def _shardings(self) -> tuple[Any, Any]:
        return batching.shardings(self.whole.rows.shape[1], devices=self.devices)

    @functools.cached_property
    def _whole_data(self) -> tuple[PyTree, int | None]:
        """The whole data, and its budget if it is larger and so stays on the host."""
        # Cached for all networks and parts: only the variables differ between their operators.
        images = self.whole.read(encoded=True)
        # Images that the training streamed are not expected to fit the device, or the host.
        budget = self.half_budget or (CALL_BYTES if self.whole.split.streamed else None)
        if budget is not None and trees.nbytes(images) > budget:
            return images, budget
        return jax.device_put(self.whole.read(), self._shardings[1]), None

    def _subtree(self, network: Network) -> tuple[PyTree, Any]:
        """Return a network's variables and the mask of the parameters whose Hessian is taken."""
        # With statistics, so that networks differ in the arguments of one program alone.
        variables = {name: v for name, v in network.variables.items() if jax.tree.leaves(v)}
        if self.options.mask is None:
            return variables, batching.parameters_rule(variables)
        # The rules of --mask name paths below params.
        flags = masks.resolve(self.options.mask, variables["params"])
        return variables, {name: name == "params" and flags for name in variables}

    def operator(self, network: Network) -> hessian.Operator | hessian.Streamed:
        """Return the Hessian over the whole data, divided over the devices by images."""
        variables, mask = self._subtree(network)
        everywhere, divided = self._shardings
        images, budget = self._whole_data
        streamed: dict[str, Any] = {"byte_budget": budget, "sharding": divided}
        # Streamed data stays on the host, and every product sends it again in pieces of the budget.
        make: Any = functools.partial(hessian.streamed, **streamed) if budget else hessian.operator
        return make(
            self.loss,
            jax.device_put(variables, everywhere),
            images,
            weights=self.whole.weights,
            mask=mask,
            weight_decay=self.weight_decay,
        )

    def abstract_operator(self, network: Network) -> hessian.Operator:
        """Return the Hessian over the whole data in shapes and shardings, of shapes of variables."""
        variables, mask = self._subtree(network)
        make = functools.partial(
            hessian.operator,
            self.loss,
            weights=self.whole.weights,
            mask=mask,
            weight_decay=self.weight_decay,
        )
        op = jax.eval_shape(make, variables, self.whole.shapes())
        everywhere, divided = self._shardings
        # As `operator` places them: the images of every batch are divided, all else is whole.
        shardings = jax.tree.map(lambda leaf: everywhere, op)
        of_data = jax.tree.map(lambda leaf: divided, op.data)
        shardings = dataclasses.replace(shardings, data=of_data)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            op,
            shardings,
        )

    def basis_bytes(self, like: PyTree) -> int:
        """Return the bytes of the Krylov basis of the eigenvalues on a device, without products."""
        options, count = self.options, 2 * self.options.eigenvalues
        size = choose_basis_size(like, count, None, self.half_budget, options.basis)
        return device_bytes(like, size, count, options.basis)

    def check(self, network: Network) -> None:
        """Raise unless the parameters suffice for what is asked."""
        variables, mask = self._subtree(network)
        like, options = trees.select(mask, variables), self.options
        size = trees.size(like)
        # The whole data's eigenvalues are taken at both ends, those of a mini-batch by magnitude.
        for field, ends in (("eigenvalues", 2), ("batch_eigenvalues", 1)):
            if ends * getattr(options, field) > size:
                raise UsageError(
                    f"{flag(field)}={getattr(options, field)} is too many for {size} parameters"
                )
        # Raises where not even the smallest basis fits the budget.
        if "eigenvalues" in options.parts:
            self.basis_bytes(like)

    def _key(self, number: int) -> jax.Array:
        """Return the random key of a part."""
        return jax.random.fold_in(jax.random.key(self.options.seed), number)

    def eigenvalues(self, network: Network) -> dict[str, Any]:
        """Return both ends of the spectrum of the whole data."""
        options = self.options
        op = self.operator(network)
        # "BE": both ends, half of the values from each. The larger half comes first, descending.
        pairs = hessian.eigenpairs(
            op,
            2 * options.eigenvalues,
            "BE",
            tolerance=options.tolerance,
            byte_budget=self.half_budget,
            basis=options.basis,
            max_products=options.max_products,
            key=self._key(_EIGENVALUES),
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
            key=self._key(_TRACE),
        )
        return {"trace": estimate.value, "trace_error": estimate.error}

    def density(self, probe: int, network: Network) -> dict[str, Any]:
        """Return one probe of the density."""
        density = hessian.density(
            self.operator(network),
            probes=1,
            steps=self.options.density_steps,
            basis=self.options.basis,
            key=self._key(_DENSITY + probe),
        )
        # Relative to the largest eigenvalue in magnitude: most eigenvalues are too near zero to have a sure sign.
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
        # Every mini-batch has a Hessian of its own, so devices share the batches and not the images of one.
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
            key=jax.random.fold_in(self._key(_BATCHES), start),
            devices=jax.local_devices(),
        )
        # Without the batches that only filled up the last chunk.
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
    # One probe of the density, or one chunk of mini-batches, is a work item: an interrupted evaluation loses little.
    divided = {
        "density": range(options.probes),
        "batches": range(0, len(measurement.mini_batches.rows), measurement.chunk),
    }
    for part in dict.fromkeys(options.parts):
        measure = getattr(measurement, part)
        parts += [(f"{part}/{n}", functools.partial(measure, n)) for n in divided.get(part, ())]
        parts += [] if part in divided else [(part, measure)]

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


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row for each network, of all its parts."""
    return [_combined(parts) for parts in grouped(records, batching.NETWORK).values()]


def _combined(parts: Sequence[Record]) -> dict[str, Any]:
    # The last record of a field wins; fields that several records have are put together below.
    row = {name: value for record in parts for name, value in record.items()}
    probes = [record for record in parts if "nodes" in record]
    if probes:
        row["nodes"] = np.ravel([record["nodes"] for record in probes]).tolist()
        # The density is the mean over probes: each probe's weights sum to 1, and those of the row again.
        weights = np.ravel([record["node_weights"] for record in probes]) / len(probes)
        row.update(node_weights=weights.tolist(), density_probes=len(probes))
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


def table(rows: Sequence[Record]) -> Table:
    """Return the statistics of mini-batches beside those of the whole data, mean over seeds."""
    columns = [
        *tables.CHECKPOINT_COLUMNS,
        seed_mean("max (batches)", "batch_max", optional=True),
        shared("paper max", functools.partial(_paper, "max"), optional=True),
        seed_mean("negative % (batches)", "batch_negative", scale=100, optional=True),
        shared("paper negative %", functools.partial(_paper, "negative"), optional=True),
        seed_mean("converged %", "batch_converged", 1, 100, optional=True),
        seed_mean("sign sure %", "batch_certain", 1, 100, optional=True),
        Column("largest", functools.partial(_outermost, "largest"), True),
        Column("residual of largest", functools.partial(_residual, "largest"), True),
        Column("smallest", functools.partial(_outermost, "smallest"), True),
        Column("residual of smallest", functools.partial(_residual, "smallest"), True),
        seed_mean("trace", "trace", optional=True),
        Column("negative mass %", functools.partial(_range, "negative_mass", 1), True),
        Column("clearly %", functools.partial(_range, "clearly_negative_mass", 2), True),
    ]
    fields = {name for row in rows for name in row}
    fields |= {"paper"} if any(_paper("max", row) for row in rows) else set()
    notes = [text for needed, text in _NOTES if needed & fields]
    return Table.of_groups("Eigenvalues of the Hessian", columns, tables.by_checkpoint(rows), notes)


def _paper(column: str, row: Record) -> str | None:
    """Return the number of Table 6 for a row's method, where mini-batches were measured."""
    method = transfer_data.paper_method(row) or ""
    number = papers.load("SEAL", "Table 6").get(method, column=column)
    return f"{number.mean:.2f}" if number and "batch_max" in row else None


def _outermost(end: str, records: Sequence[Record]) -> str:
    """Return the outermost eigenvalue, marked where not all of the seeds' have converged."""
    records = [record for record in records if end in record]
    if not records:
        return MISSING
    text = spread([record[end][0] for record in records]).text(3)
    return text if all(record["converged"] for record in records) else f"{text} (not converged)"


def _residual(end: str, records: Sequence[Record]) -> str:
    """Return the largest residual of the outermost eigenvalue."""
    residuals = [record[f"{end}_residuals"][0] for record in records if end in record]
    return f"{max(residuals):.1e}" if residuals else MISSING


def _range(field: str, digits: int, records: Sequence[Record]) -> str:
    """Return the mean bounds of a share, widened by twice the error of the random vectors."""
    records = [record for record in records if f"{field}_bounds" in record]
    if not records:
        return MISSING
    lower, upper = np.mean([record[f"{field}_bounds"] for record in records], axis=0)
    # The standard error of a mean of independent estimates, one for each seed.
    error = np.sqrt(sum(record[f"{field}_error"] ** 2 for record in records)) / len(records)
    lower, upper = np.clip([lower - 2 * error, upper + 2 * error], 0, 1)
    return f"{100 * lower:.{digits}f}..{100 * upper:.{digits}f}"


# What a table says about the fields that its rows have, each of a set.
_NOTES = (
    (
        {"batch_max"},
        "batches: the eigenvalues of largest magnitude of each training mini-batch's own Hessian, "
        "pooled over the mini-batches; the largest of the pool, and the share of it that is negative "
        "(Park & Kim 2022, whom the SEAL paper follows). converged: mini-batches whose residuals are "
        "within the tolerance; sign sure: values that their residual keeps away from zero.",
    ),
    (
        {"largest", "trace", "negative_mass_bounds"},
        "largest, smallest, trace, negative mass: of the one Hessian of the mean loss over the "
        "training data.",
    ),
    (
        {"largest"},
        "residual: |H v - value v| of the outermost value, the largest over seeds: so far at most is "
        "the value from an eigenvalue. not converged: of all values computed at that end or the "
        "other, one has a residual above the tolerance.",
    ),
    (
        {"negative_mass_bounds"},
        "negative mass: between which bounds the share of ALL its eigenvalues below zero is, mean "
        "over seeds; not the negative % of mini-batches, which is that of a few of the largest "
        "magnitude. The bounds are those that the Lanczos iteration proves (Chebyshev, Markov, "
        "Stieltjes), widened by two standard errors of the random vectors. Most eigenvalues are so "
        "near zero that only more --density-steps would tell their sign; clearly: the same of those "
        "below minus the threshold, times the largest.",
    ),
    (
        {"paper"},
        "paper: SEAL paper, Table 6, the row of the same method: ResNet-50 on Tiny-ImageNet (64x64). "
        "It names neither the number of images in a mini-batch nor that of eigenvalues; maxima grow "
        "as mini-batches shrink.",
    ),
)


# Of the normal that every node of a density becomes in the plot, over the width of the spectrum.
_SIGMA = 0.01
Styles = Mapping[str, Mapping[str, Any]]


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw the density of each run, and the pool of its mini-batches' eigenvalues, both log."""
    rows = tables.newest(rows)
    styles = plots.run_styles(rows)
    views = (
        ("nodes", "density of all eigenvalues, whole training data", _draw_density),
        ("batch_values", "share of the largest, by magnitude, of mini-batches", _draw_pool),
        ("largest", "outermost eigenvalues, whole training data", _draw_ends),
    )
    fields = {name for row in rows for name in row}
    # Two panels at most: the outermost eigenvalues are drawn only where one of the others is missing.
    measured = [view for view in views if view[0] in fields][:2]
    measured = measured or [("trace", "trace", _draw_trace)]
    panels = plots.panels_by_weights(figure, rows, len(measured))
    for weights, of_weights, line in panels:
        for axes, (field, title, painter) in zip(line, measured, strict=True):
            painter(axes, [row for row in of_weights if field in row], styles)
            axes.set_title(f"{title}\n{weights} weights", fontsize=9)
    plots.legend_below(figure, [axes for _, _, line in panels for axes in line])


def _draw_density(axes: Axes, rows: Sequence[Record], styles: Styles) -> None:
    low = min(min(row["nodes"]) for row in rows)
    high = max(max(row["nodes"]) for row in rows)
    width = (high - low) or 1.0
    grid = np.linspace(low - 0.05 * width, high + 0.05 * width, 600)
    highest = 0.0
    for (run,), of_run in grouped(rows, ("run",)).items():
        mean = np.mean([_density(row).on_grid(grid, _SIGMA * width) for row in of_run], axis=0)
        axes.plot(grid, mean, label=run, linewidth=1.2, **styles[run])
        highest = max(highest, float(np.max(mean)))
    axes.set_yscale("log")
    # The least to be seen is one eigenvalue among all.
    least = min(1 / row["parameters"] for row in rows) / (_SIGMA * width * np.sqrt(2 * np.pi))
    # A margin over all decades that a density falls through would leave the axis mostly empty.
    axes.set_ylim(0.05 * least, 3 * max(highest, least))
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")


def _density(row: Record) -> hessian.Density:
    """Return a row's spectral density, without the bounds of its masses, which a row does not hold."""
    probes = row["density_probes"]
    nodes = np.reshape(row["nodes"], (probes, -1))
    weights = np.reshape(row["node_weights"], (probes, -1)) * probes
    return hessian.Density(nodes, weights, np.zeros_like(nodes), 0.0, row["parameters"])


def _draw_pool(axes: Axes, rows: Sequence[Record], styles: Styles) -> None:
    values = np.concatenate([row["batch_values"] for row in rows])
    low, high = float(np.min(values)), float(np.max(values))
    edges = np.linspace(low, high if high > low else low + 1, 61)
    for (run,), of_run in grouped(rows, ("run",)).items():
        pool = np.concatenate([row["batch_values"] for row in of_run])
        axes.stairs(plots.bin_shares(pool, edges), edges, label=run, linewidth=1.2, **styles[run])
    axes.axvline(0, color="#888888", linewidth=0.7)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 / len(values), top=1)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of the pool")


def _draw_ends(axes: Axes, rows: Sequence[Record], styles: Styles) -> None:
    for place, ((run,), of_run) in enumerate(grouped(rows, ("run",)).items()):
        for row in of_run:
            values = [*row["smallest"], *row["largest"]]
            axes.plot(
                [place] * len(values), values, "_", color=styles[run]["color"], label=run, ms=14
            )
    axes.set_xticks([])
    axes.set_ylabel("eigenvalue")


def _draw_trace(axes: Axes, rows: Sequence[Record], styles: Styles) -> None:
    for place, ((run,), of_run) in enumerate(grouped(rows, ("run",)).items()):
        for row in of_run:
            bar = {"fmt": "o", "label": run, "color": styles[run]["color"]}
            axes.errorbar(place, row["trace"], row["trace_error"], **bar)
    axes.set_xticks([])
    axes.set_ylabel("trace and its standard error")


EVALUATOR = Evaluator(
    name="hessian",
    summary="eigenvalues, trace and density of the Hessian; eigenvalues of mini-batches' Hessians",
    source="SEAL paper, Table 6; Park & Kim 2022",
    options=Options,
    work_items=work_items,
    rows=combine,
    table=table,
    draw=draw,
    size=plots.size_by_weights(10.0, 3.4, margin=1.0),
    order=13,
)
