"""Shared parts of the benchmarks: the setting of configs/digits_resnet8.py, interleaved timing, the table and the JSON.

Only jax, flax, optax, NumPy and scikit-learn are needed, so that the benchmarks also run where the
trainer's other requirements are not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seal_jax import data
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.core.tables import aligned
from seal_jax.training import experiment as experiments
from seal_jax.training.batches import Arrays, place
from seal_jax.training.experiment import Experiment


def digits_resnet8(
    *, seeds: int = 1, seed_batching: str = "auto", width: int | None = None
) -> Settings:
    """Return the settings of ``configs/digits_resnet8.py`` (SEAL), without ml_collections."""
    # A test compares them with the config.
    return Settings(
        data=settings_lib.Data(name="digits", validation_fraction=0.75, crop_padding=1),
        model=settings_lib.Model(name="resnet8", width=width),
        method={"name": "seal", "ascent_scale": 0.2},
        optimizer=settings_lib.Optimizer(learning_rate=0.1),
        train=settings_lib.Train(generations=4, epochs_per_generation=32, seeds=seeds),
        run=settings_lib.Run(checkpoint_every_epochs=8, seed_batching=seed_batching),
    )


def digits(validation_fraction: float) -> data.Dataset:
    """Return the data set "digits", split as by its TFDS builder, directly from scikit-learn."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    # Pixels are 0 to 16. Every fifth image is a test image, as in the builder; a test compares them.
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.arange(len(images)) % 5 == 0
    return data.from_arrays(
        (images[~test], raw.target[~test]),
        (images[test], raw.target[test]),
        name="digits",
        validation_fraction=validation_fraction,
    )


def synthetic(images: int, side: int, classes: int) -> data.Dataset:
    """Return images of noise over a pattern of their class, so that there is something to learn."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % classes
    patterns = rng.integers(0, 160, (classes, side, side, 3))
    pictures = (patterns[labels] + rng.integers(0, 96, (images, side, side, 3))).astype(np.uint8)
    # A data set must have a test split; it is not used.
    few = slice(0, 2 * classes)
    return data.from_arrays(
        (pictures, labels), (pictures[few], labels[few]), name="synthetic", validation_fraction=0.0
    )


def build(
    settings: Settings, dataset: data.Dataset, devices: Sequence[Any] | None = None
) -> Experiment:
    """Return the experiment on these devices, by default on the first one of the machine."""
    mesh = meshes.make(settings, list(devices or jax.devices()[:1]))
    return experiments.build(settings, experiments.data_shape(dataset), mesh)


def on_device(experiment: Experiment, split: data.Split) -> Arrays:
    """Return a split as the compiled programs take it."""
    return place(experiment.mesh, split)


def initial_state(experiment: Experiment, train: Arrays, first_seed: int = 0) -> Any:
    """Return the state of all seeds of an experiment before its first step."""
    seeds = np.arange(experiment.settings.train.seeds, dtype=np.uint32) + first_seed
    return experiment.init(experiment.starts(seeds), train)


class Training:
    """A compiled train program, and its current state."""

    def __init__(self, settings: Settings, dataset: data.Dataset):
        experiment = build(settings, dataset)
        self.data = on_device(experiment, dataset.train)
        start = experiment.starts(experiment.seeds)
        # The initialisation runs once, which is not worth the seconds that optimising it takes on a CPU.
        on_cpu = jax.default_backend() == "cpu"
        quickly = {"xla_backend_optimization_level": 0} if on_cpu else {}
        init = experiment.init.lower(start, self.data).compile(compiler_options=quickly)
        self.state = init(start, self.data)
        self.compiled = experiment.train.lower(self.state, self.data).compile()
        # The compiler counts the body of a loop once, so this is the cost of one step.
        self.cost: dict[str, float] = self.compiled.cost_analysis()

        self.processor: list[float] = []  # seconds of all threads, of each call

    def train(self) -> jax.Array:
        # The state is donated, so every call continues the training.
        start = time.process_time()
        self.state, losses = self.compiled(self.state, self.data)
        jax.block_until_ready(losses)
        self.processor.append(time.process_time() - start)
        return losses


def convolution() -> str:
    """Return how the trainer computes convolutions on this machine's device."""
    return "canonical" if jax.default_backend() == "cpu" else "native"


def seconds(function: Callable[[], Any]) -> float:
    """Return how long one call takes until its result is ready."""
    # JAX returns before the computation is done, hence the wait.
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: bool = True,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Time each candidate once per round, in turn, so that a disturbance affects all of them alike.

    The order is reversed every other round, so that running first gives no advantage. ``before`` is called
    with the name of a candidate ahead of each time, while no clock runs.
    """
    # The first call compiles.
    if warm_up:
        for function in candidates.values():
            jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        names = list(candidates) if index % 2 == 0 else list(candidates)[::-1]
        for name in names:
            before(name)
            times[name].append(seconds(candidates[name]))
    return times


def ratio(times: Mapping[str, Sequence[float]], of: str, to: str) -> tuple[float, float]:
    """Return ``of`` / ``to`` of the fastest rounds, and the median of that ratio over the rounds."""
    # Other work on the machine only adds time, so the fastest rounds are closest to the cost of the code. The
    # ratio within a round compares calls that are close in time; its median shows how far to trust the other.
    rounds = [a / b for a, b in zip(times[of], times[to], strict=True)]
    return min(times[of]) / min(times[to]), statistics.median(rounds)


@dataclasses.dataclass(frozen=True)
class Report:
    """A table with its title; each row maps columns to values."""

    title: str
    rows: list[dict[str, Any]]

    def as_text(self) -> str:
        """Return the table, its columns aligned."""
        columns = list(self.rows[0])
        cells = [columns, *([_cell(row[column]) for column in columns] for row in self.rows)]
        return "\n".join([self.title, *aligned(cells, right=range(1, len(columns)))])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """Return the properties of the machine on which the figures depend."""
    device = jax.devices()[0]
    # The load at the end: whether other work has disturbed the measurement.
    return {
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def arguments(doc: str | None, *, rounds: int, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of tiny networks: shows that it runs, its figures mean nothing",
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = 1
    return options


def publish(name: str, reports: Iterable[Report], path: Path | None) -> None:
    """Print the machine and the tables as they come; write those so far as JSON if ``path`` is given."""
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    tables: list[dict[str, Any]] = []
    for report in reports:
        print(f"\n{report.as_text()}", flush=True)
        tables.append(dataclasses.asdict(report))
        if path is not None:
            figures = {"benchmark": name, "machine": machine(), "tables": tables}
            path.write_text(json.dumps(figures, indent=2))
