"""Several seeds in one run, against as many runs of one seed, with and without compilation.

    python -m benchmarks.seeds
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.seeds   # two CPU devices

About two minutes on two CPU cores. The setting is that of configs/digits_resnet8.py (SEAL, ResNet-8, digits, batch
32) with 8 seeds. "vmap" and "map" are ``run.seed_batching``: all seeds as one batched program, or
one after the other inside the program. "runs" is one seed per run, each from the initial state of that
seed, through a program that is compiled once. "vmap over devices" and "map over devices" appear where
there are several devices: the seeds are spread over the mesh's seed axis.

"ratio" is the time of the runs over that of the candidate, for all seeds' steps, without
compilation: how many times faster the candidate is, from the fastest rounds; "median" is the median
of the rounds' ratios. "with compilation" is the same ratio for its 128 epochs with the
compilation of the train program: once for each row, except for "runs", where every seed compiles it (in
separate processes, without a persistent compilation cache).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import common
from seal_jax import data
from seal_jax.core import mesh as meshes

# Epochs of that config, over which the compilation is spread.
EPOCHS = 128


class Run:
    """Trains all seeds of ``batching`` in one program, or each in a program of one seed."""

    def __init__(
        self, dataset: data.Dataset, seeds: int, batching: str, *, spread: bool, width: Any
    ):
        one_each = batching == "runs"
        settings = common.digits_resnet8(
            seeds=1 if one_each else seeds,
            seed_batching="auto" if one_each else batching,
            width=width,
        )
        devices = jax.devices() if spread else jax.devices()[:1]
        self.experiment = common.build(settings, dataset, devices)
        self.data = common.on_device(self.experiment, dataset.train)
        # One state of all seeds, or one state per seed, from the same initial weights.
        firsts = range(seeds) if one_each else (0,)
        self.states = [common.initial_state(self.experiment, self.data, first) for first in firsts]
        start = time.perf_counter()
        program = self.experiment.train
        self.compiled = program.lower(self.states[0], self.data).compile()
        self.compile_seconds = time.perf_counter() - start

    def train(self, epochs: int) -> None:
        # Run by run: a run trains all its epochs before the next one starts.
        for index in range(len(self.states)):
            for _ in range(epochs):
                self.states[index], losses = self.compiled(self.states[index], self.data)
                jax.device_get(losses)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=12, argv=argv)
    seeds, epochs, width = (2, 1, 4) if options.quick else (8, 3, None)
    dataset = common.digits(0.75)
    candidates = {"runs": ("runs", False), "vmap": ("vmap", False), "map": ("map", False)}
    devices = len(jax.devices())
    # Only where the whole mesh is seeds: a divided batch would be another comparison.
    if devices > 1 and meshes.layout(common.digits_resnet8(seeds=seeds), devices)[1] == 1:
        candidates |= {f"{name} over devices": (name, True) for name in ("vmap", "map")}
    runs = {
        name: Run(dataset, seeds, batching, spread=spread, width=width)
        for name, (batching, spread) in candidates.items()
    }
    times = common.interleave(
        {name: functools.partial(run.train, epochs) for name, run in runs.items()}, options.rounds
    )
    steps = epochs * runs["runs"].experiment.clock.steps_per_epoch * seeds
    # Measured epochs extrapolated to the whole training, plus the compilations.
    whole = {
        name: min(times[name]) * EPOCHS / epochs + run.compile_seconds * len(run.states)
        for name, run in runs.items()
    }
    rows = []
    for name, run in runs.items():
        fastest, median = common.ratio(times, "runs", name)
        rows.append(
            {
                "seeds as": name,
                "ms/seed-step": 1e3 * min(times[name]) / steps,
                "ratio": fastest,
                "median": median,
                "compile s": run.compile_seconds,
                f"s for {EPOCHS} epochs": whole[name],
                "with compilation": whole["runs"] / whole[name],
            }
        )
    title = f"{seeds} seeds, {options.rounds} rounds of {steps} seed-steps, {devices} device(s)"
    common.publish("seeds", [common.Report(title, rows)], options.json)


if __name__ == "__main__":
    main()
