"""Train the variants of a config within a number of minutes on one accelerator, and report what was seen.

    python -m benchmarks.study pack --config=configs/studies/gpu_label_noise.py --output=fashion.npz
    python -m benchmarks.study train --study=fashion.npz --workdir=runs/gpu --minutes=30 [--per-call=9]
                                     [--variants=llf,seal]
    python -m benchmarks.study train --quick --workdir=runs/quick --minutes=5

`pack` needs the trainer's requirements and the prepared data; `train` only the packed file, jax, flax, optax, Orbax,
tqdm and matplotlib. It trains by `loop.train`, each variant in a run folder of its own, which `compare` and `evaluate`
read as any other.

The first call measures a step of the first variant, with its seeds by "vmap" and by "map", takes the faster, and
shortens the generations of all variants alike to what fits `--minutes` (a longer one keeps its ratio to the shortest;
epochs of warm-up and of decays stay as they are). `plan.json` keeps that. A call ends in time for its last checkpoint,
and the same command goes on (exit code 75 until the study is done, as `train` has it). With `--per-call`, whole
variants are planned into each call, so that the folder without the `checkpoints/` in it, some hundred kilobytes a
variant, is all that has to be carried to another machine between two calls; a variant that was stopped half way is
then trained again.

Every call writes `study.md`, `study.json` and `study.png`: speed, MFU (see benchmarks.gpu), accuracy, and the wrong
labels learnt. A variant whose loss is not finite is reported as diverged, and the others are trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import common, gpu, packed
from benchmarks.packed import Study
from seal_jax import data, records
from seal_jax.cli import main as cli
from seal_jax.core import files, plots
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import OK, STOPPED, UsageError
from seal_jax.records import Scalar
from seal_jax.reports import curves, runs
from seal_jax.reports.generations import stat
from seal_jax.reports.runs import Run
from seal_jax.training import experiment as experiments
from seal_jax.training import loop
from seal_jax.training import workdir as workdirs

PLAN, CALLS, REPORT = "plan.json", "calls.jsonl", "study"
# Of a call's minutes: what is planned to be trained, since scoring and checkpoints take time as well; and when a
# training that takes longer than planned is stopped, since its checkpoint and the report are still to be written.
PLANNED, STOP = 0.8, 0.9
CHECKPOINT_SECONDS = 120  # between checkpoints, about
# Of seeds and epochs: field of the metrics, and column of the table.
MEASURED = {
    "validation/accuracy": "validation %",
    "test_last/accuracy": "test %",
    "test_best/accuracy": "best by validation %",
    "train/memorised": "wrong labels learnt %",
    "train/corrected": "corrected %",
}
DRAWN = ("validation/accuracy", "train/memorised")


class Plan(TypedDict):
    """What the first call decides for all."""

    minutes: float
    variants: list[str]
    epochs: int  # of a generation of the variant with the shortest
    configured: int  # what these are in the config
    seed_batching: str
    checkpoint_every_epochs: int
    flops: float  # of an image, forward and backward
    peak: float | None  # of the device, per second
    device: str
    speeds: list[Mapping[str, Scalar]]


class Call(TypedDict):
    """One training of one variant, within one call of this program."""

    variant: str
    steps: int
    seconds: float  # compilation, scoring and checkpoints included
    diverged: str  # the message, or ""


def quick() -> Study:
    """Return a study of seconds, with the variants of configs/studies/gpu_label_noise.py on an MLP."""

    def variant(generations: int, epochs: int, **method: Any) -> Settings:
        return Settings(
            data=settings_lib.Data(
                name="synthetic",
                validation_fraction=0.2,
                label_noise=0.4,
                normalisation="cifar10",
            ),
            model=settings_lib.Model(name="mlp"),
            method=method,
            optimizer=settings_lib.Optimizer(learning_rate=0.05, label_smoothing=0.0),
            train=settings_lib.Train(
                generations=generations, epochs_per_generation=epochs, seeds=2
            ),
        )

    variants = {
        "normal_long": variant(1, 4, name="normal"),
        "llf": variant(2, 2, name="llf", threshold="dense2"),
        "seal": variant(2, 2, name="seal", threshold="dense2", ascent_scale=0.1),
    }
    return Study(variants, common.synthetic(200, side=8, classes=4))


def measure(settings: Settings, dataset: data.Dataset) -> list[dict[str, Any]]:
    """Return the speed of the compiled train program, for each way in which the seeds of a device can run."""
    speeds: list[dict[str, Any]] = []
    for batching in ("vmap", "map") if settings.train.seeds > 1 else ("auto",):
        run = dataclasses.replace(settings.run, seed_batching=batching)
        # One of them may not fit the memory, which must not cost the study.
        try:
            speed = _speed(dataclasses.replace(settings, run=run), dataset)
        except jax.errors.JaxRuntimeError as error:
            speed = {"note": f"failed: {str(error).splitlines()[0][:100]}"}
        speeds.append({"seeds by": batching, **speed})
    return speeds


def _speed(settings: Settings, dataset: data.Dataset) -> dict[str, Any]:
    # A function, so that its arrays are gone when the next one is measured.
    start = time.perf_counter()
    training = common.Training(settings, dataset)
    steps = training.train().shape[-1]
    first = time.perf_counter() - start
    times: list[float] = []
    # One may be slow out of all proportion, and the minutes are counted.
    while len(times) < 3 and sum(times) < 10:
        times.append(common.seconds(training.train))
    # Not the fastest: it is to tell how long the study will take, on this machine as it is.
    seconds = statistics.median(times)
    images = settings.train.seeds * settings.train.batch_size * steps
    return {
        "compile s": first - seconds,
        "ms/step": 1e3 * seconds / steps,
        "images/s": images / seconds,
    }


def make_plan(study: Study, names: list[str], minutes: float, per_call: float) -> Plan:
    """Measure the first variant and fit the epochs of all into the minutes.

    Raises:
      UsageError: not even one epoch of the shortest generation fits.
    """
    chosen = [study.variants[name] for name in names]
    lengths = [settings.train.epochs_per_generation for settings in chosen]
    configured = min(lengths)
    if any(length % configured for length in lengths):
        raise UsageError(
            f"train.epochs_per_generation = {', '.join(map(str, lengths))} must be multiples of the "
            "shortest, for all to be shortened alike: change the config, or choose --variants"
        )
    # Epochs of the whole training, for one of the shortest generation.
    units = sorted(
        settings.train.generations * length // configured
        for settings, length in zip(chosen, lengths, strict=True)
    )
    began = time.monotonic()
    dataset = experiments.split(chosen[0], study.source)
    experiment = common.build(chosen[0], dataset)
    speeds = measure(chosen[0], dataset)
    best = min(speeds, key=lambda speed: speed.get("ms/step", math.inf))
    if "note" in best:
        raise UsageError(f"{names[0]} does not train on this device: {best['note']}")
    epoch = experiment.clock.steps_per_epoch * best["ms/step"] / 1e3  # seconds
    # The programs that score and save are compiled as well.
    start = 1.5 * best["compile s"]
    # The longest variants that may meet in one call.
    calls = math.ceil(minutes / per_call)
    together = math.ceil(len(chosen) / calls)
    left = 60 * PLANNED * per_call - (time.monotonic() - began) - together * start
    needed = epoch * sum(units[-together:])
    if left < needed:
        least = per_call + (needed - left) / (60 * PLANNED)
        raise UsageError(
            f"--minutes={minutes:g} is too small: an epoch in each generation of {together} variant(s) takes "
            f"{least:.1f} minutes of a call; give more, or fewer --variants"
        )
    model = experiment.context.model
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    batch = chosen[0].train.batch_size
    device = jax.devices()[0].device_kind
    plan: Plan = {
        "minutes": minutes,
        "variants": names,
        "epochs": min(configured, int(left / needed)),
        "configured": configured,
        "seed_batching": best["seeds by"],
        "checkpoint_every_epochs": max(1, int(CHECKPOINT_SECONDS / epoch)),
        "flops": gpu.flops(model, variables, batch) / batch,
        "peak": gpu.peak(device),
        "device": device,
        "speeds": speeds,
    }
    return plan


def planned(settings: Settings, plan: Plan) -> Settings:
    """Return the settings of a variant with the length and the batching of seeds that were planned."""
    ratio = settings.train.epochs_per_generation // plan["configured"]
    train = dataclasses.replace(settings.train, epochs_per_generation=ratio * plan["epochs"])
    run = dataclasses.replace(
        settings.run,
        seed_batching=plan["seed_batching"],
        checkpoint_every_epochs=plan["checkpoint_every_epochs"],
        # Eight ResNet-18s with momentum and best weights are a gigabyte.
        keep_checkpoints=1,
        loggers="",
    )
    return dataclasses.replace(settings, train=train, run=run)


def train(study: Study, workdir: Path, minutes: float, per_call: float, names: list[str]) -> int:
    """Train what is left of the study, until it or the minutes of this call end; return the exit code."""
    began = time.monotonic()
    if (workdir / PLAN).exists():
        plan: Plan = records.load(workdir / PLAN, Plan, "give another --workdir")
        made_for = f"--minutes={plan['minutes']:g} --variants={','.join(plan['variants'])}"
        if (minutes, names) != (plan["minutes"], plan["variants"]):
            raise UsageError(
                f"{workdir / PLAN} was made for {made_for}: give these, or another --workdir"
            )
    else:
        plan = make_plan(study, names, minutes, per_call)
        workdir.mkdir(parents=True, exist_ok=True)
        files.write(workdir / PLAN, json.dumps(plan, indent=2) + "\n")
    until = began + 60 * STOP * per_call
    for name in names:
        if is_done(workdir, name):
            continue
        # Every call trains something, however late it is: `loop.train` trains at least one call of its steps.
        ended = train_variant(study, plan, workdir, name, until)
        if not ended or time.monotonic() > until:
            break
    publish(workdir, plan)
    return OK if all(is_done(workdir, name) for name in names) else STOPPED


def train_variant(study: Study, plan: Plan, workdir: Path, name: str, until: float) -> bool:
    """Train a variant until its end or the deadline; return whether it has ended."""
    settings, folder = planned(study.variants[name], plan), workdir / name
    dataset = experiments.split(settings, study.source)
    before = Run(folder, name, {}, ()).newest_checkpoint or 0
    call: Call = {"variant": name, "steps": 0, "seconds": 0.0, "diverged": ""}
    start, ended = time.monotonic(), True
    print(f"\n{name}", flush=True)
    try:
        outcome = loop.train(settings, folder, dataset, devices=1, until=until)
        call["steps"], ended = outcome.step - before, outcome.finished
    except loop.NonFiniteError as error:
        call["diverged"] = str(error)
    call["seconds"] = time.monotonic() - start
    files.append(workdir / CALLS, json.dumps(call).encode() + b"\n")
    return ended


def read_calls(workdir: Path) -> list[Call]:
    """Return what was trained so far; a line that a kill cut short is left out."""
    path = workdir / CALLS
    lines = records.lines(path, Call) if path.exists() else ()
    return [call for _, call, problem in lines if not problem]


def read_runs(workdir: Path, names: Sequence[str]) -> list[Run]:
    """Return the variants that have at least one epoch."""
    paths = [workdir / name for name in names]
    begun = [path for path in paths if (path / workdirs.METRICS).exists()]
    begun = [path for path in begun if (path / workdirs.METRICS).stat().st_size]
    return runs.read_all(begun) if begun else []


def is_done(workdir: Path, name: str) -> bool:
    """Return whether a variant has been trained to its end, or has diverged."""
    # By its metrics: checkpoints may have been left behind on another machine.
    finished = any(run.finished for run in read_runs(workdir, [name]))
    return finished or any(
        call["diverged"] for call in read_calls(workdir) if call["variant"] == name
    )


def speed_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return the rows of the measured speeds, with MFU."""
    columns = ("seeds by", "compile s", "ms/step", "images/s")
    return [
        {
            **{column: speed.get(column) for column in columns},
            "MFU %": utilisation(plan, speed.get("images/s")),
            "note": speed.get("note"),
        }
        for speed in plan["speeds"]
    ]


def utilisation(plan: Plan, rate: Any) -> float | None:
    """Return the share of the device's peak, in %, that so many images a second make."""
    return 100 * rate * plan["flops"] / plan["peak"] if rate and plan["peak"] else None


def training_rows(workdir: Path, plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each variant: how far it is, and its speed with everything in it."""
    calls, by_name = read_calls(workdir), {run.name: run for run in _named(workdir, plan)}
    rows = []
    for name in plan["variants"]:
        of_variant = [call for call in calls if call["variant"] == name]
        seconds = sum(call["seconds"] for call in of_variant if call["steps"])
        steps = sum(call["steps"] for call in of_variant)
        run = by_name.get(name)
        rate = None
        if run and seconds:
            rate = steps * run.seeds * run.setting("train.batch_size") / seconds
        diverged = "; ".join(filter(None, (call["diverged"] for call in of_variant)))
        state = "finished" if run and run.finished else "not finished" if run else "no epoch yet"
        rows.append(
            {
                "variant": name,
                "seeds": run.seeds if run else None,
                "epochs": f"{run.epochs_done} of {run.epochs}" if run else None,
                "minutes": seconds / 60,
                "images/s": rate,
                "MFU %": utilisation(plan, rate),
                "state": f"diverged: {diverged}" if diverged else state,
            }
        )
    return rows


def _named(workdir: Path, plan: Plan) -> list[Run]:
    """Return the runs under the names of their variants."""
    return [
        dataclasses.replace(run, name=run.path.name) for run in read_runs(workdir, plan["variants"])
    ]


def accuracy_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each variant and each epoch at which a generation of any ends, with lists over seeds."""
    ends = {
        epoch
        for run in runs
        for epoch in range(run.epochs_per_generation, run.epochs + 1, run.epochs_per_generation)
    }
    rows = []
    for run in runs:
        for row in run.rows:
            if (epoch := int(row["epoch"]) + 1) in ends:
                # JSON has no NaN: the share of wrong labels of an epoch without one.
                values = {
                    key: [None if math.isnan(value) else value for value in row[key]]
                    for key in MEASURED
                    if key in row
                }
                rows.append({"variant": run.name, "epoch": epoch, **values})
    return rows


def difference_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return how much better each variant ended than the first one on the same data: a mean of paired seeds."""
    firsts: dict[str, Run] = {}
    rows = []
    for run in runs:
        first = firsts.setdefault(json.dumps(run.setting("data"), sort_keys=True), run)
        if first is run or not (first.finished and run.finished):
            continue
        row: dict[str, Any] = {"variant": run.name, "over": first.name}
        for key, column in MEASURED.items():
            ours, theirs = run.series(key)[1], first.series(key)[1]  # [epochs, seeds]
            # Seed i of both has the same initial weights and order of images.
            both = len(ours) and len(theirs)
            row[column] = stat(ours[-1] - theirs[-1]).text() if both else None
        rows.append(row)
    return rows


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the same rows with means and intervals as text."""
    return [
        {
            "variant": row["variant"],
            "epoch": row["epoch"],
            **{
                column: stat(row[key]).text() if key in row else None
                for key, column in MEASURED.items()
            },
        }
        for row in rows
    ]


def draw(runs: Sequence[Run]) -> bytes:
    """Return the picture: accuracy on clean labels and wrong labels learnt, by epoch, as PNG."""
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    keys = [key for key in DRAWN if any(key in row for run in runs for row in run.rows)]
    panels = plots.panel_grid(figure, len(keys), 2)
    for panel, key in zip(panels, keys, strict=True):
        for run in runs:
            style = plots.style(run.index)
            curves.curve(panel, run, key, scale=100, label=plots.drawable(run.name), **style)
        panel.set_ylabel(MEASURED[key])
        panel.set_xlabel("epochs trained")
    plots.legend_below(figure, panels)
    return plots.as_png(figure)


def publish(workdir: Path, plan: Plan) -> None:
    """Print the tables, and write them with the command, the machine and the picture."""
    runs = _named(workdir, plan)
    accuracies = accuracy_rows(runs)
    tables = {
        f"Compiled steps of {plan['variants'][0]}, {plan['flops'] / 1e9:.4g} Gflops an image": speed_rows(
            plan
        ),
        "Whole trainings, with compilation, scoring and checkpoints": training_rows(workdir, plan),
        "Accuracy where generations end": accuracy_table(accuracies),
        "Paired differences at the end": difference_rows(runs),
    }
    texts = [common.Report(title, rows).as_text() for title, rows in tables.items() if rows]
    command = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
    machine = ", ".join(f"{key} {value}" for key, value in common.machine().items())
    print("\n".join(["", machine, *(f"\n{text}" for text in texts)]), flush=True)
    note = (
        "±: half the 95 % interval of the mean over seeds. Wrong labels learnt, corrected: of the training images "
        "under a wrong label, the share predicted as that says, and as their own says. MFU counts one gradient for "
        "each image: of a method that computes two it is half of what the device did."
    )
    lines = ["# Study", f"    {command}", f"{machine}."]
    lines += [f"```\n{text}\n```" for text in texts] + [note]
    if any(key in row for run in runs for row in run.rows for key in DRAWN):
        files.write(workdir / f"{REPORT}.png", draw(runs))
        lines.append(f"![by epoch]({REPORT}.png)")
    files.write(workdir / f"{REPORT}.md", "\n\n".join(lines) + "\n")
    figures = {
        "benchmark": "study",
        "command": command,
        "machine": common.machine(),
        "plan": plan,
        "trainings": training_rows(workdir, plan),
        "accuracy": accuracies,
        "differences": difference_rows(runs),
    }
    files.write(workdir / f"{REPORT}.json", json.dumps(figures, indent=2) + "\n")


def _pack(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    print(packed.pack(options.config, overrides, files.as_path(options.output)))
    return OK


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if bool(options.study) == options.quick:
        raise UsageError("give --study=FILE, which `pack` writes, or --quick, one of them")
    study = quick() if options.quick else packed.load(Path(options.study))
    names = options.variants.split(",") if options.variants else list(study.variants)
    for name in names:
        if name not in study.variants:
            raise UsageError(f"--variants={name} must be among {', '.join(study.variants)}")
    per_call = options.per_call or options.minutes
    for option, value in (("minutes", options.minutes), ("per-call", per_call)):
        if not value > 0:
            raise UsageError(f"--{option}={value:g} must be positive")
    cli.cache_programs()
    return train(study, Path(options.workdir), options.minutes, per_call, names)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pack` or `train`; return the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def command() -> int:
        parser = cli.Parser(
            prog="python -m benchmarks.study",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands = parser.add_subparsers(dest="command", required=True)
        to = commands.add_parser("pack", allow_abbrev=False)
        to.add_argument("--config", required=True, help="a file of configs/studies/")
        to.add_argument("--output", required=True, help="the file to write")
        to.set_defaults(run=_pack)
        to = commands.add_parser("train", allow_abbrev=False)
        to.add_argument("--study", help="a file that `pack` wrote")
        to.add_argument("--quick", action="store_true", help="a tiny one: shows that it runs")
        to.add_argument("--workdir", required=True, help="the folder of the study")
        to.add_argument("--minutes", type=float, required=True, help="of all calls together")
        to.add_argument("--per-call", type=float, help="minutes of this call; default: all")
        to.add_argument("--variants", help="some of the config's, with commas; default: all")
        to.set_defaults(run=_train)
        options, overrides = cli.parse(parser, arguments)
        return int(options.run(options, overrides))

    return cli.exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
