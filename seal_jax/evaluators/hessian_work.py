"""The measurements of the kind "hessian", each of a network and small enough to be a unit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from seal_jax import hessian
from seal_jax.errors import UsageError
from seal_jax.evaluators import hessian_problem
from seal_jax.evaluators.loaded_run import LoadedRun, Network
from seal_jax.evaluators.options import flag
from seal_jax.evaluators.pof import some
from seal_jax.hessian import trees
from seal_jax.hessian.lanczos import choose_basis_size


class Work:
    """Measures networks, with what all measurements share: loss, batches, parameters.

    Args:
      loaded_run: whose data and settings.
      options: of the kind.

    Raises:
      UsageError: more images or batches than there are.
    """

    def __init__(self, loaded_run: LoadedRun, options: Any):
        train, fields = loaded_run.dataset.train, loaded_run.settings
        self.options, self.part = options, hessian_problem.Part(options.mask)
        self.loss = hessian_problem.Loss(
            loaded_run.model.module,
            loaded_run.augmentation,
            options.label_smoothing,
            options.train_mode,
        )
        self.weight_decay = (
            fields.optimizer.weight_decay if options.weight_decay is None else options.weight_decay
        )
        split = some(train, options.examples, options.seed)
        self.operators = hessian_problem.Operators(
            self.loss,
            self._batches(
                split,
                hessian_problem.all_images(
                    split, min(options.data_batch_size, len(split)), options.train_mode
                ),
                options.augment == "all",
            ),
            self.part,
            self.weight_decay,
            self.half_budget,
        )
        batch_size = options.batch_size or fields.train.batch_size
        if batch_size > len(train):
            raise UsageError(
                f"--batch-size={batch_size} is more than the {len(train)} training images"
            )
        # Training never sees a batch that it drops, and a few images have a larger Hessian.
        drop = options.train_mode or fields.train.drop_last
        rows, weights = hessian_problem.one_epoch(train, batch_size, drop, options.seed)
        count = options.batches or len(rows)
        if count > len(rows):
            raise UsageError(f"--batches={count} is more than the {len(rows)} of an epoch")
        self.batches = self._batches(
            train, (rows[:count], weights[:count]), options.augment != "none"
        )
        self.chunk = min(options.chunk, count)

    def _batches(
        self, split: Any, rows: tuple[np.ndarray, np.ndarray], augmented: bool
    ) -> hessian_problem.Batches:
        drawn = None
        if augmented:
            drawn = hessian_problem.draws(rows[0], split, self.loss.augmentation, self.options.seed)
        return hessian_problem.Batches(split, *rows, drawn)

    @property
    def half_budget(self) -> int | None:
        """Bytes for the data, and for the basis."""
        budget = self.options.byte_budget
        return None if budget is None else budget // 2

    def check(self, network: Network) -> None:
        """Raise unless the parameters suffice for what is asked."""
        like, options = self.part.shapes(network), self.options
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

    def key(self, number: int) -> jax.Array:
        """Return the random key of a part."""
        return jax.random.fold_in(jax.random.key(self.options.seed), number)

    def eigenvalues(self, network: Network) -> dict[str, Any]:
        """Return both ends of the spectrum of the whole data."""
        options = self.options
        op = self.operators.of(network)
        found = hessian.eigenpairs(
            op,
            2 * options.eigenvalues,
            "BE",
            tolerance=options.tolerance,
            byte_budget=self.half_budget,
            basis=options.basis,
            max_products=options.max_products,
            key=self.key(0),
        )
        half = options.eigenvalues
        return {
            "parameters": op.size,
            "largest": found.values[:half].tolist(),
            "largest_residuals": found.residuals[:half].tolist(),
            "smallest": found.values[half:][::-1].tolist(),
            "smallest_residuals": found.residuals[half:][::-1].tolist(),
            "products": found.products,
            "converged": found.converged,
        }

    def trace(self, network: Network) -> dict[str, Any]:
        """Return the trace of the whole data's Hessian."""
        options = self.options
        found = hessian.trace(
            self.operators.of(network),
            probes=options.trace_products,
            method=options.trace_method,
            key=self.key(1),
        )
        return {"trace": found.value, "trace_error": found.error}

    def density(self, probe: int, network: Network) -> dict[str, Any]:
        """Return one probe of the density."""
        found = hessian.density(
            self.operators.of(network),
            probes=1,
            steps=self.options.density_steps,
            basis=self.options.basis,
            key=self.key(2 + probe),
        )
        clear = -self.options.threshold * np.abs(found.nodes).max()
        return {
            "parameters": found.size,
            "nodes": found.nodes[0].tolist(),
            "node_weights": found.weights[0].tolist(),
            "negative_mass_bounds": np.ravel(found.mass_below()).tolist(),
            "clearly_negative_mass_bounds": np.ravel(found.mass_below(clear)).tolist(),
        }

    def mini_batches(self, start: int, network: Network) -> dict[str, Any]:
        """Return the eigenvalues of a chunk of mini-batches, from ``start`` on."""
        options, count = self.options, len(self.batches.rows)
        stop = min(start + self.chunk, count)
        # Filled up with other batches: one shape, one program.
        wanted = (start + np.arange(self.chunk)) % count
        part = dataclasses.replace(
            self.batches,
            rows=self.batches.rows[wanted],
            weights=self.batches.weights[wanted],
            draws=jax.tree.map(lambda leaf: leaf[wanted], self.batches.draws),
        )
        variables, mask = self.part.of(network)
        found = hessian.batch_eigenvalues(
            self.loss,
            variables,
            part.read(),
            options.batch_eigenvalues,
            steps=options.batch_steps,
            tolerance=options.batch_tolerance,
            mask=mask,
            weight_decay=self.weight_decay,
            key=jax.random.fold_in(self.key(1 << 20), start),
            devices=jax.local_devices(),
        )
        own = slice(0, stop - start)
        return {
            "batch_values": found.values[own].ravel().tolist(),
            "batch_residuals": found.residuals[own].ravel().tolist(),
            "batch_converged": found.converged[own].tolist(),
        }
