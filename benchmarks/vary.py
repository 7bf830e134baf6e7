"""Points of hyper-parameters in one program (train.vary), against one program after the other and against processes.

    python -m benchmarks.vary

About four minutes on two quiet CPU cores. SEAL on digits, an MLP of three layers and ResNet-8, twelve points: four
learning rates times three scales of ascent. Whole trainings are timed, compilation included, as a user waits for them:
"map" and "vmap" are one program; "runs" compiles and trains each point in this process, as values are constants of a
program; "processes" starts `python -m seal_jax train` for each, as many at a time as there are cores, as tuners do,
without a cache of compiled programs; on a CPU only, where they share nothing but its cores. "ratio" is the time of
"runs" over that of the row.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

from benchmarks import common
from seal_jax import data
from seal_jax.core import settings as settings_lib
from seal_jax.core import vary
from seal_jax.core.settings import Settings

GRID = {"optimizer.learning_rate": [0.01, 0.02, 0.05, 0.1], "method.ascent_scale": [0.03, 0.1, 0.3]}


def settings(model: str, generations: int, epochs: int) -> Settings:
    """Return SEAL with the points of the grid."""
    mlp = {"width": 128, "depth": 3} if model == "mlp" else {}
    return Settings(
        data=settings_lib.Data(name="digits", validation_fraction=0.5),
        model=settings_lib.Model(name=model, **mlp),
        method={"name": "seal", "threshold": "dense3" if model == "mlp" else "layer3"},
        train=settings_lib.Train(
            batch_size=32,
            generations=generations,
            epochs_per_generation=epochs,
            vary=json.dumps(GRID),
        ),
    )


def train(chosen: Settings, dataset: data.Dataset) -> None:
    """Compile and train to the end, without a run's files."""
    experiment = common.build(chosen, dataset)
    train_data = common.on_device(experiment, dataset.train)
    state = experiment.init(experiment.starts(experiment.seeds), train_data)
    per_generation = experiment.clock.steps_per_generation
    for step in range(0, experiment.total_steps, experiment.steps_per_call):
        if step and step % per_generation == 0:
            state = experiment.start_generation(state, train_data)
        state, losses = experiment.train(state, train_data)
    jax.block_until_ready(losses)


def process(point: vary.Point, model: str, generations: int, epochs: int, folder: str) -> None:
    """Train one point by the command line."""
    alone = vary.at(settings(model, generations, epochs), point)
    overrides = [
        f"--config.{section}.{field}={value}"
        for section, fields in dataclasses.asdict(alone).items()
        for field, value in fields.items()
        if section in ("data", "model", "method", "optimizer", "train")
        and field not in ("name", "args")
        and value not in (None, "")
    ]
    name = "_".join(map(str, point.values()))
    command = [sys.executable, "-m", "seal_jax", "train", "--config=configs/digits.py:seal"]
    command += [f"--config.model.name={model}", f"--workdir={folder}/{name}", *overrides]
    environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache-{name}"}
    subprocess.run(command, env=environment, check=True, capture_output=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=1, argv=argv)
    dataset = common.digits(0.5)
    lengths = {"mlp": (2, 1)} if options.quick else {"mlp": (4, 10), "resnet8": (2, 2)}
    reports = []
    for model, (generations, epochs) in lengths.items():
        chosen = settings(model, generations, epochs)
        points = vary.points(chosen)[: 2 if options.quick else None]
        together = json.dumps([dict(point) for point in points])
        chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, vary=together))

        def batched(how, chosen=chosen):
            run = dataclasses.replace(chosen.run, seed_batching=how)
            train(dataclasses.replace(chosen, run=run), dataset)

        def runs(chosen=chosen, points=points):
            for point in points:
                train(vary.at(chosen, point), dataset)

        def processes(model=model, generations=generations, epochs=epochs, points=points):
            with (
                tempfile.TemporaryDirectory() as folder,
                concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
            ):
                done = [
                    pool.submit(process, point, model, generations, epochs, folder)
                    for point in points
                ]
                for future in done:
                    future.result()

        candidates = {
            "map": lambda batched=batched: batched("map"),
            "vmap": lambda batched=batched: batched("vmap"),
            "runs": runs,
        }
        if jax.default_backend() == "cpu":
            candidates["processes"] = processes
        seconds = {}
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name] = time.perf_counter() - start
        rows = [
            {"points as": name, "s": seconds[name], "ratio": seconds["runs"] / seconds[name]}
            for name in candidates
        ]
        steps = common.build(chosen, dataset).total_steps
        reports.append(common.Report(f"{model}: {len(points)} points of {steps} steps", rows))
    common.publish("vary", reports, options.json)


if __name__ == "__main__":
    main()
