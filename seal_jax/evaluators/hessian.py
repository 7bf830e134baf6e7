"""Spectrum of the Hessian, and the eigenvalues of mini-batches' Hessians: SEAL paper, Table 6."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from seal_jax.core.tables import grouped
from seal_jax.errors import UsageError
from seal_jax.evaluators import hessian_views as views
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem
from seal_jax.evaluators.hessian_work import Work
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import flag
from seal_jax.hessian import storage
from seal_jax.hessian.spectrum import share_error

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
    basis: storage.Basis = "device"
    byte_budget: int | None = None
    seed: int = 0

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"--parts={part} must be one of {', '.join(PARTS)}")
        least = {
            "eigenvalues": 1,
            "max_products": 1,
            "trace_products": 6 if self.trace_method == "hutch++" else 2,
            "probes": 1,
            "density_steps": 1,
            "threshold": 0,
            "batch_eigenvalues": 1,
            "batch_size": 1,
            "batches": 0,
            "batch_steps": self.batch_eigenvalues + 1,
            "chunk": 1,
            "examples": 0,
            "data_batch_size": 1,
            "weight_decay": 0,
            "byte_budget": 1,
            "seed": 0,
        }
        for field, bound in least.items():
            value = getattr(self, field)
            if value is not None and not bound <= value < math.inf:
                raise UsageError(f"{flag(field)}={value:g} must be at least {bound}")
        for field in ("tolerance", "batch_tolerance"):
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(f"{flag(field)}={getattr(self, field):g} must be positive")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"--label-smoothing={self.label_smoothing:g} must lie in [0, 1)")


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return the parts of each network's spectrum, and chunks of its mini-batches."""
    work = Work(loaded_run, options)
    for network in loaded_run.networks[:1]:  # all have the same shapes
        work.check(network)
    works: list[tuple[str, Any]] = []
    for part in dict.fromkeys(options.parts):
        if part == "density":
            works += [
                (f"density/{probe}", functools.partial(work.density, probe))
                for probe in range(options.probes)
            ]
        elif part == "batches":
            works += [
                (f"batches/{start}", functools.partial(work.mini_batches, start))
                for start in range(0, len(work.batches.rows), work.chunk)
            ]
        else:
            works.append((part, getattr(work, part)))

    def measure(network: Network, part: Any) -> dict[str, Any]:
        try:
            return {**network.identity, **part(network)}
        except UsageError as error:
            raise UsageError(f"{network.key}: {error}") from None

    return [
        WorkItem(f"{network.key}/{name}", functools.partial(measure, network, part))
        for network in loaded_run.networks
        for name, part in works
    ]


_IDENTITY = ("run", "data", "model", "method", "weights", "seed", "step", "generation")


def rows(records: Sequence[Record]) -> Sequence[Record]:
    """Combine the parts of each network to one row."""
    return [
        {**dict(zip(_IDENTITY, identity, strict=True)), **_combined(own)}
        for identity, own in grouped(records, _IDENTITY).items()
    ]


def _combined(own: Sequence[Record]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in own:
        found.update({name: value for name, value in record.items() if name not in _IDENTITY})
    probes = [record for record in own if "nodes" in record]
    if probes:
        nodes = np.array([record["nodes"] for record in probes])
        weights = np.array([record["node_weights"] for record in probes])
        found.update(
            nodes=nodes.ravel().tolist(),
            node_weights=(weights / len(weights)).ravel().tolist(),
            density_probes=len(probes),
        )
        for name in ("negative_mass", "clearly_negative_mass"):
            bounds = np.array([record[f"{name}_bounds"] for record in probes]).mean(0)
            found[f"{name}_bounds"] = bounds.tolist()
            found[f"{name}_error"] = share_error(bounds, found["parameters"], len(probes))
    chunks = [record for record in own if "batch_values" in record]
    if chunks:
        names = ("batch_values", "batch_residuals", "batch_converged")
        pools = {name: np.concatenate([record[name] for record in chunks]) for name in names}
        values, residuals, converged = (pools[name] for name in names)
        found.update(
            {name: pools[name].tolist() for name in names[:2]},
            batches=len(converged),
            batch_converged=float(converged.mean()),
            batch_max=float(np.max(values)),
            batch_negative=float((values < 0).mean()),
            batch_certain=float((np.abs(values) > residuals).mean()),
        )
    return found


KIND = Evaluator(
    name="hessian",
    summary="eigenvalues, trace and density of the Hessian; eigenvalues of mini-batches' Hessians",
    source="SEAL paper, Table 6; Park & Kim 2022",
    options=Options,
    units=units,
    rows=rows,
    table=views.table,
    draw=views.draw,
    size=views.size,
)
