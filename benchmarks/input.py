"""Images a second of both placements, of PyTorch's DataLoader and of Grain alone, on one folder of JPEGs.

    python -m benchmarks.input [--folder=DIR]

Five minutes of two CPU cores' time; it needs PyTorch and torchvision. Without ``--folder``, a folder of
images with one subfolder per class, it writes 4,000 JPEGs of 256x256 pixels to a temporary one. All
candidates read, decode and resize the same images to 64x64 in the same random order, in batches of 64;
that the pixels are the same is asserted for the JPEGs of its own (torchvision ignores EXIF orientation).

- DataLoader: ``ImageFolder`` with ``Resize`` and ``PILToTensor``.
- stream: ``data.placement = "stream"`` with as many worker processes.
- Grain: a ``MapDataset`` of paths, mapped to pixels, batched, with ``mp_prefetch``.
- stream, threads: in threads of this process, as the trainer streams small data.
- device: ``data.placement = "device"``, decoded before the clock starts and gathered by a compiled program.

Worker processes run ahead of their use by two batches each, and live through all rounds. A few batches
are taken before the clock starts, so that none is counted that was decoded while another candidate ran.
"ratio" is images a second over the DataLoader's with as many workers, from the fastest rounds; "median"
is the median of the rounds' ratios.

The last table is of the training loop itself, ResNet-18 in batches of 32: "waiting %" is the share of the
time in which it had nothing left to do but to wait for images.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from seal_jax import data
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.data.streaming import batches
from seal_jax.training import loop
from seal_jax.training.batches import flatten, take

AHEAD = 2  # batches that wait in each worker process of every candidate
SETTLE = 1.0  # seconds after which the processes of other candidates have filled their queues


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured."""

    images: int = 4_000
    stored: int = 256  # side of the JPEGs
    side: int = 64  # that they are resized to
    batch: int = 64
    batches: int = 16  # in a round
    network: str = "resnet18"
    train_batch: int = 32
    steps: int = 4  # of a call of the compiled program
    calls: int = 2  # in a round


def write_images(folder: Path, count: int, side: int, classes: int = 10) -> None:
    """Write smooth random JPEGs, ``folder/CLASS/NUMBER.jpg``, of about the size of photographs."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (max(side // 10, 2),) * 2 + (3,), np.uint8)
        path = folder / f"class{number % classes}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        image.save(path, quality=90)


def load(path: str, side: int) -> np.ndarray:
    """Return an image's pixels, as somebody who uses Grain alone would read it."""
    from PIL import Image

    with Image.open(path) as image:
        resized = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def loader(folder: Path, paths: Sequence[str], order: np.ndarray, side: int, workers: int) -> Any:
    """Yield batches of PyTorch's DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [transforms.Resize((side, side)), transforms.PILToTensor()]
    images = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    numbers = {path: number for number, (path, _) in enumerate(images.samples)}
    rows = np.array([numbers[path] for path in paths])[order]
    # Spawned as Grain does: JAX's threads do not survive a fork.
    loader = DataLoader(
        images,
        batch_sampler=rows.tolist(),
        num_workers=workers,
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",
    )
    for pixels, _ in loader:
        yield pixels.permute(0, 2, 3, 1)  # a view


def grain_alone(paths: Sequence[str], order: np.ndarray, side: int, workers: int) -> Any:
    """Yield batches of Grain."""
    import grain

    source = grain.MapDataset.source([paths[row] for row in order.reshape(-1)])
    images = source.map(functools.partial(load, side=side)).batch(order.shape[1])
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
    with closing(iter(images.to_iter_dataset(reading).mp_prefetch(options))) as iterator:
        yield from iterator


def on_device(pixels: np.ndarray, order: np.ndarray) -> Iterator[jax.Array]:
    """Yield batches that are gathered in device memory."""
    flat = jax.device_put(flatten(data.Split(pixels, np.zeros(len(pixels), np.int32))))
    gather = jax.jit(functools.partial(take, image_shape=pixels.shape[1:]))
    for rows in order:
        yield jax.block_until_ready(gather(flat, rows))


def advance(iterator: Iterator[Any], count: int) -> Any:
    """Take ``count`` elements and return the last."""
    for _ in range(count):
        last = next(iterator)
    return last


def throughput(
    folder: Path,
    images: data.StoredImages,
    pixels: np.ndarray,
    work: Work,
    workers: int,
    rounds: int,
    same: bool,
) -> common.Report:
    """Measure images a second of all candidates with this many worker processes."""
    counted, skipped = work.batches, AHEAD * workers + 1
    # The first batch, which is compared, and every round's; epoch after epoch in random orders.
    needed = 1 + rounds * (counted + skipped)
    random = np.random.default_rng(0)
    epochs = -(-needed * work.batch // len(images))
    rows = np.concatenate([random.permutation(len(images)) for _ in range(epochs)])
    order = rows[: needed * work.batch].reshape(needed, work.batch)
    paths = [images.reader.where(number) for number in images.rows]
    candidates = {
        "DataLoader": loader(folder, paths, order, work.side, workers),
        "stream": batches(images, order, workers),
        "Grain": grain_alone(paths, order, work.side, workers),
        "stream, threads": batches(images, order),
        "device": on_device(pixels, order),
    }
    with ExitStack() as held:
        for iterator in candidates.values():
            held.callback(iterator.close)
        for name, iterator in candidates.items():
            first = np.asarray(next(iterator))
            if same and not np.array_equal(first, pixels[order[0]]):
                raise AssertionError(f"{name} gives other pixels")

        def prepare(name: str) -> None:
            time.sleep(SETTLE)
            advance(candidates[name], skipped)

        times = common.interleave(
            {name: functools.partial(advance, each, counted) for name, each in candidates.items()},
            rounds,
            warm_up=False,
            before=prepare,
        )
    table = []
    for name, own in times.items():
        fastest, median = common.ratio(times, "DataLoader", name)
        table.append(
            {
                "images by": name,
                "images/s": counted * work.batch / min(own),
                "ms/batch": 1e3 * min(own) / counted,
                "ratio": fastest,
                "median": median,
                "aim": ">= 1" if name == "stream" else "-",
            }
        )
    title = (
        f"{workers} worker {'process' if workers == 1 else 'processes'}, {rounds} rounds of {counted} "
        f"batches of {work.batch}, {work.side}x{work.side}"
    )
    return common.Report(title, table)


def training(dataset: data.Dataset, pixels: np.ndarray, work: Work, rounds: int) -> common.Report:
    """Measure a training step of both placements, and how long it waits for images."""
    workers = max((os.cpu_count() or 2) - 1, 1)  # what the trainer chooses for large data
    settings = Settings(
        data=settings_lib.Data(crop_padding=4, flip=True, normalisation="imagenet"),
        model=settings_lib.Model(name=work.network),
        method={"name": "normal"},
        # Never at its end, which has no next call to get images for.
        train=settings_lib.Train(batch_size=work.train_batch, epochs_per_generation=1_000),
        run=settings_lib.Run(steps_per_call=work.steps, data_workers=workers),
    )
    per_call = work.train_batch * work.steps
    rows = np.arange(len(dataset.train) // per_call * per_call)
    streamed = dataset.train.rows(rows)
    splits = {"stream": streamed, "device": data.Split(pixels[rows], streamed.labels)}
    waited = dict.fromkeys(splits, 0.0)

    def steps(name: str) -> Iterator[float]:
        """Train as a run does; yield the seconds waited so far after every call."""
        experiment = common.build(settings, dataclasses.replace(dataset, train=splits[name]))
        train = common.on_device(experiment, splits[name])
        state = common.initial_state(experiment, train)
        for call in loop.calls(experiment, state, 0, experiment.total_steps, train, None):
            jax.block_until_ready(call.losses)
            yield call.waited

    runs = {name: steps(name) for name in splits}
    start = {}

    def prepare(name: str) -> None:
        time.sleep(SETTLE)
        start[name] = advance(runs[name], 1)

    def measure(name: str) -> None:
        waited[name] += advance(runs[name], work.calls) - start[name]

    with ExitStack() as held:
        for run in runs.values():
            held.callback(run.close)
            next(run)  # compiles
        times = common.interleave(
            {name: functools.partial(measure, name) for name in runs},
            rounds,
            warm_up=False,
            before=prepare,
        )
    table = []
    for name, own in times.items():
        fastest, median = common.ratio(times, name, "device")
        table.append(
            {
                "placement": name,
                "ms/step": 1e3 * min(own) / (work.calls * work.steps),
                "ratio": fastest,
                "median": median,
                "waiting %": 100 * waited[name] / sum(own),
                "aim": "< 2" if name == "stream" else "-",
            }
        )
    title = (
        f"{work.network}, batch {work.train_batch}, {work.side}x{work.side}, {rounds} rounds of "
        f"{work.calls * work.steps} steps, {workers} worker processes"
    )
    return common.Report(title, table)


def main(argv: Sequence[str] | None = None) -> None:
    # --help is that of the options all benchmarks have; the docstring names this one.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--folder", type=Path)
    mine, others = own.parse_known_args(argv)
    options = common.arguments(__doc__, rounds=10, argv=others)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise SystemExit(
            "benchmarks.input compares with PyTorch: pip install torch torchvision"
        ) from None
    work = Work()
    if options.quick:
        work = Work(48, 32, 16, batch=8, batches=4, network="mlp", train_batch=8, steps=1)
    cpus = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = mine.folder or Path(temporary)
        if not mine.folder:
            write_images(folder, work.images, work.stored)
        dataset = data.load(
            "folder/benchmark",
            data_dir=folder,
            image_size=work.side,
            placement="stream",
            test_fraction=0.1,
            validation_fraction=0.0,
        )
        # As many as of the JPEGs of its own: they are in memory, too.
        train = dataset.train.rows(np.arange(min(len(dataset.train), work.images)))
        dataset = dataclasses.replace(dataset, train=train)
        pixels = np.asarray(train.images)
        reports = [
            throughput(folder, train.images, pixels, work, workers, options.rounds, not mine.folder)
            for workers in ([1] if options.quick else sorted({1, cpus}))
        ]
        reports.append(training(dataset, pixels, work, options.rounds))
    common.publish("input", reports, options.json)


if __name__ == "__main__":
    main()
