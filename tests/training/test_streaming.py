"""Streamed images: the same bits as with all images on the device, on any devices, from any step."""

import dataclasses
import io
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from programs import STRIPES, Trainer, assert_same, host, mlp

from seal_jax import data
from seal_jax.data.streaming import Decoder, StoredImages, batches, stream
from seal_jax.errors import UsageError
from seal_jax.training import loop, streaming
from seal_jax.training.batches import place


class Encoded:
    """A reader of PNG files that are held in memory."""

    name = "stripes"

    def __init__(self, split):
        self.files, self.given = [], split.labels
        for image in split.images:
            file = io.BytesIO()
            Image.fromarray(image[..., 0]).save(file, "PNG")
            self.files.append(file.getvalue())

    def __len__(self):
        return len(self.files)

    def read(self, numbers):
        return [(self.files[number], int(self.given[number])) for number in numbers]

    def labels(self):
        return self.given

    def where(self, number):
        return f"image {number}"


def stored(split):
    images = StoredImages(Encoded(split), Decoder(1), np.arange(len(split)), split.images.shape[1:])
    return data.Split(images, split.labels)


STREAMED = dataclasses.replace(
    STRIPES, **{part: stored(getattr(STRIPES, part)) for part in ("train", "validation", "test")}
)


def test_indexing_decodes_what_an_array_would_give():
    images, pixels = STREAMED.train.images, STRIPES.train.images
    assert (images.shape, images.dtype, images.ndim) == (pixels.shape, pixels.dtype, pixels.ndim)
    rows = np.array([[3, 80, 3], [0, 1, 89]])
    for index in (5, -1, slice(4, 60, 7), rows, rows[0], np.arange(90) % 3 == 1):
        np.testing.assert_array_equal(images[index], pixels[index])
    np.testing.assert_array_equal(images.read(rows), pixels[rows])
    np.testing.assert_array_equal(np.asarray(images), pixels)
    part = STREAMED.train.rows(np.array([7, 2, 50]))
    np.testing.assert_array_equal(part.images[1:], pixels[[2, 50]])
    assert part.streamed
    assert not STRIPES.train.rows(np.array([7])).streamed


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_starts_anywhere(processes):
    order = np.random.default_rng(0).integers(0, 90, (9, 2, 5))
    images, pixels = STREAMED.train.images, STRIPES.train.images
    streamed = list(stream(images, order.__getitem__, 3, 9, processes))
    np.testing.assert_array_equal(np.stack(streamed), pixels[order[3:]].reshape(6, 2, 5, 64))
    for taken, rows in zip(batches(images, order, processes), order, strict=True):
        np.testing.assert_array_equal(taken, pixels[rows])


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_decoded_is_named(processes):
    images = stored(STRIPES.test).images
    images.reader.files[7] = images.reader.files[7][:40]
    with pytest.raises(UsageError, match=r"image 7: .*data.corrupt"):
        list(stream(images, np.arange(20).reshape(4, 5).__getitem__, 0, 4, processes))


class Gone(Encoded):
    remedy = "restore it"

    def read(self, numbers):
        raise OSError(f"no {numbers[0]}.png")

    def damaged(self):
        return "stripes"


def test_a_file_that_is_gone_is_named():
    images = dataclasses.replace(STREAMED.test.images, reader=Gone(STRIPES.test))
    with pytest.raises(UsageError, match=r"stripes cannot be read \(no 3.png\)"):
        list(stream(images, np.arange(3, 9).reshape(2, 3).__getitem__, 0, 2, 0))


def trained(dataset, config, devices, calls):
    """Train as the loop does; return the state, the losses and the last validation's sums."""
    trainer = Trainer(dataset, config, devices)
    steps = calls * trainer.experiment.steps_per_call
    losses = []
    splits = trainer.splits["train"], trainer.splits["validation"]
    for call in loop.calls(trainer.experiment, trainer.state, 0, steps, *splits):
        losses.append(np.asarray(call.losses))
        trainer.state = call.state
    return host(trainer), np.concatenate(losses, 1), trainer


RUNS = {
    "several_seeds_and_a_last_partial_batch": (
        mlp(
            {"name": "seal", "threshold": "dense2", "ascent_epochs": 1.0},
            train={"seeds": 2, "drop_last": False, "generations": 2, "epochs_per_generation": 2},
        ),
        1,
    ),
    "balanced_on_four_devices": (
        mlp(train={"sampling": "balanced", "seeds": 2, "batch_size": 8}),
        4,
    ),
    "further_batches": (
        mlp({"name": "pof", "weak_batch_size": 8}, train={"generations": 1, "pretrained": "a run"}),
        2,
    ),
    "a_sample_between_generations": (
        mlp(
            {"name": "lw", "sample_size": 20, "blocks": 2},
            train={"generations": 2, "epochs_per_generation": 2, "seeds": 2},
        ),
        2,
    ),
    "batches_between_generations": (
        mlp({"name": "dash"}, train={"generations": 2, "epochs_per_generation": 2, "seeds": 2}),
        2,
    ),
}

SLOW = ("batches_between_generations",)
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_both_placements_train_alike(name, rounding):
    config, devices = RUNS[name]
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps_per_call=0))
    expected, losses, _ = trained(STRIPES, config, devices, 3)
    found, streamed, trainer = trained(STREAMED, config, devices, 3)
    # The batches are the same bits; how XLA fuses what is done with them may differ.
    np.testing.assert_allclose(streamed, losses, rtol=max(10 * rounding, 1e-5))
    for part in ("params", "batch_stats"):
        ours, theirs = (getattr(state.weights, part) for state in (found, expected))
        assert_same(ours, theirs, rtol=1e-3, atol=1e-5)
    assert trainer.splits["train"].images is None


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_given_the_images_that_its_steps_draw(name):
    """Of every step, from any step on: for the devices what the order of the epoch says, bit for bit."""
    config, devices = RUNS[name]
    experiment = Trainer.build(STREAMED, config, devices)
    batches, per_epoch = experiment.batches, experiment.clock.steps_per_epoch
    arrays = place(experiment.mesh, STREAMED.train)
    pixels = STRIPES.train.images.reshape(90, -1)
    with streaming.Feed(experiment, arrays, experiment.seeds) as feed:
        # One after the other, then back, then where a later epoch begins.
        for step in (0, 1, 2, 1, per_epoch, per_epoch + 1):
            given = feed.pixels(step)
            epoch, number = divmod(step, per_epoch)
            for index, seed in enumerate(experiment.seeds):
                rows, _ = batches.order(seed, epoch, arrays.labels)
                np.testing.assert_array_equal(given.batch[index, 0], pixels[rows[number]])
                if batches.method.extra_batch_size:
                    extra = batches.extra_order(seed, epoch, per_epoch)[number]
                    np.testing.assert_array_equal(given.extra[index, 0], pixels[extra])


def test_images_are_decoded_while_the_caller_goes_on(monkeypatch):
    may_read, read = threading.Event(), Encoded.read

    def wait_then_read(reader, numbers):
        assert may_read.wait(timeout=60)
        return read(reader, numbers)

    experiment = Trainer.build(STREAMED, mlp(), 1)
    arrays = place(experiment.mesh, STREAMED.train)
    monkeypatch.setattr(Encoded, "read", wait_then_read)
    with streaming.Feed(experiment, arrays, experiment.seeds) as feed:
        feed.prepare(0)  # returns, though nothing can be read yet
        assert feed.waited == 0
        may_read.set()
        first = feed.pixels(0)
        assert feed.waited > 0
        feed.prepare(1)
        # Another call than the one that was prepared, as after a generation that ended early.
        np.testing.assert_array_equal(feed.pixels(0).batch, first.batch)


def test_a_worker_that_is_ahead_ends_with_the_training():
    # Epochs of one step: the worker is soon at one whose order is not drawn yet.
    experiment = Trainer.build(STREAMED, mlp(train={"batch_size": 90}), 1)
    arrays = place(experiment.mesh, STREAMED.train)
    before = set(threading.enumerate())
    with streaming.Feed(experiment, arrays, experiment.seeds) as feed:
        feed.pixels(0)
        started = set(threading.enumerate()) - before
    # Not those that decode, which all streams of a process share.
    started = [thread for thread in started if not thread.name.startswith("decode")]
    assert started
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_call_has_no_more_steps_than_fit(monkeypatch):
    monkeypatch.setattr(streaming, "CALL_BYTES", 16 * 64 * 3)
    config = mlp(run={"steps_per_call": 0}, train={"batch_size": 15})
    assert Trainer(STRIPES, config).experiment.steps_per_call == 6
    _, losses, trainer = trained(STREAMED, config, 1, 2)
    assert trainer.experiment.steps_per_call == 3
    whole = trained(STRIPES, config, 1, 1)[1]
    np.testing.assert_array_equal(losses, whole)
    # Scored in as many parts: 20 test images in one batch, which alone does not fit.
    sums = trainer.experiment.score(trainer.state.weights, trainer.splits["test"])
    assert float(sums.weight[0]) == 20


def test_an_evaluation_in_parts_is_the_whole(monkeypatch):
    config = mlp(run={"eval_batch_size": 6}, data={"normalisation": "digits"})
    monkeypatch.setattr(streaming, "CALL_BYTES", 6 * 64 * 3)
    of_arrays, of_stream = (Trainer(dataset, config, 2) for dataset in (STRIPES, STREAMED))
    sums = [t.experiment.score(t.state.weights, t.splits["test"]) for t in (of_arrays, of_stream)]
    assert_same(*jax.device_get(sums))
