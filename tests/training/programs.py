"""The compiled programs of a run without its files: what the tests of step and methods share."""

import dataclasses

import jax
import numpy as np

from seal_jax import data, methods
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core.state import Stream, stream_key
from seal_jax.training import experiment as experiments
from seal_jax.training.batches import epoch_order, place


def _stripes():
    """90 training, 10 validation and 20 test images of 8x8, of four classes that can be told apart."""
    random = np.random.default_rng(0)
    labels = np.arange(120, dtype=np.int32) % 4
    images = random.integers(0, 120, (120, 8, 8, 1)) + 40 * (labels % 2)[:, None, None, None]
    images[:, :4] += 20 * (labels // 2)[:, None, None, None]
    images = images.astype(np.uint8)
    cut = [slice(0, 90), slice(100, 120), slice(90, 100)]
    return data.from_arrays(*((images[part], labels[part]) for part in cut), name="stripes")


STRIPES = _stripes()
SHAPE = experiments.data_shape(STRIPES)


def settings(method=None, **sections):
    values = dataclasses.asdict(settings_lib.Settings())
    values["model"] |= {"name": "resnet8", "width": 4}
    values["data"] |= {"crop_padding": 1, "flip": True, "normalisation": "digits"}
    values["optimizer"] |= {"learning_rate": 0.05}
    values["train"] |= {"generations": 3, "epochs_per_generation": 4, "batch_size": 16}
    values["method"] = method or {"name": "normal"}
    for section, fields in sections.items():
        values[section] |= fields
    return methods.complete(settings_lib.read(settings_lib.Settings, values))


def mlp(method=None, norm=None, **sections):
    """Settings of an MLP on images that are not augmented, one step a call."""
    plain = {
        "model": {"name": "mlp", "width": None, "norm": norm},
        "data": {"crop_padding": 0, "flip": False},
        "run": {"steps_per_call": 1},
    }
    for section, fields in sections.items():
        plain[section] = plain.get(section, {}) | fields
    return settings(method, **plain)


class Trainer:
    """Runs the compiled steps as the loop does, without its files.

    ``init_from`` maps the experiment to the arrays that the training takes from another run.
    """

    def __init__(self, dataset, config, devices=1, init_from=None):
        self.experiment = self.build(dataset, config, devices)
        mesh = self.experiment.mesh
        self.splits = {
            name: place(mesh, getattr(dataset, name)) for name in ("train", "validation", "test")
        }
        seeds = self.experiment.seeds
        starts = self.experiment.starts(seeds, init_from(self.experiment) if init_from else None)
        self.state = self.experiment.init(starts, self.splits["train"])
        self.losses = []

    @staticmethod
    def build(dataset, config, devices=1):
        mesh = meshes.make(config, jax.devices()[:devices])
        return experiments.build(config, experiments.data_shape(dataset), mesh)

    def run(self, epochs):
        per_call = self.experiment.steps_per_call
        return self.calls(epochs * self.experiment.clock.steps_per_epoch // per_call)

    def calls(self, count):
        """Call the train program, and the event where it is due."""
        for _ in range(count):
            if self.experiment.clock.starts_generation(int(self.state.step[0])):
                self.event()
            self.state, losses = self.experiment.train(self.state, self.splits["train"])
            self.losses.append(np.asarray(losses))
        return self

    def event(self):
        self.state = self.experiment.start_generation(self.state, self.splits["train"])
        return self

    def put(self, state):
        """Take a state from the host."""
        mesh = self.experiment.mesh
        self.state = jax.tree.map(
            lambda leaf: meshes.place(mesh, np.asarray(leaf), meshes.BY_SEED), state
        )
        return self


def host(trainer):
    """Return a copy of the state that no later program touches."""
    return jax.tree.map(np.array, jax.device_get(trainer.state))


def seed_of(tree, seed=0):
    """Return one seed's part of a state or of something in it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[seed], tree)


def batch(step, config, dataset=STRIPES, stream=Stream.ORDER, seed=0, size=None, turns=1):
    """Return images as the MLP sees them, float64, and labels: all batches of a step, by its order.

    ``turns`` is how many batches of ``size`` a step takes from the order of ``stream``.
    """
    size = size or config.train.batch_size
    epoch, number = divmod(step, len(dataset.train) // config.train.batch_size)
    key = stream_key(seed, stream, epoch)
    order = np.asarray(epoch_order(key, len(dataset.train), size)[0])
    found = []
    for turn in range(turns):
        rows = order[(number * turns + turn) % len(order)]
        found.append((normalised(dataset.train.images[rows]), dataset.train.labels[rows]))
    return found[0] if turns == 1 else found


def normalised(images):
    return (images / 255 - 0.3053) / 0.3762


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)
        else:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def differ(a, b):
    """Tell whether any leaf differs in any bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)
