"""Steps per second of the compiled program of many steps, against a Python loop over host batches.

    python -m benchmarks.multistep

About a minute on two CPU cores. The setting is that of configs/digits_resnet8.py: SEAL, ResNet-8, digits, batch 32,
one seed, 11 steps an epoch. Each candidate trains whole epochs and fetches its losses once an epoch.

- compiled: ``Experiment.train``, the program that the trainer runs: shuffle, augmentation and all
  steps of an epoch in one call, on data in device memory.
- loop: what one would write with Flax alone: NumPy shuffles and crops a batch, it is put on the
  device, and a jitted step with donated ``TrainState`` and ``make_seal_tx`` takes it. Convolutions
  are Flax's own.
- bare loop: the same without augmentation, over batches that were prepared before the clock started.

"ratio" is the time of a step over that of the compiled program: how many times faster the compiled
program is, from the fastest rounds; "median" is the median of the rounds' ratios.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from benchmarks import common
from seal_jax import data, masks, models
from seal_jax.core import settings as settings_lib
from seal_jax.schedules import cosine
from seal_jax.training.batches import steps_per_epoch
from seal_jax.transforms import make_seal_tx


class TrainState(train_state.TrainState):
    """Flax's training state with BatchNorm statistics."""

    batch_stats: Any


# Donated, as one would write it: the state is updated in place.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, images: jax.Array, labels: jax.Array):
    def objective(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, changed = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), (logits, changed)

    (loss, (logits, changed)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradient, batch_stats=changed["batch_stats"])
    return state, {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


def initial(settings: settings_lib.Settings, dataset: data.Dataset, steps: int) -> TrainState:
    """Return the state of the loop: the model and the optimizer of configs/digits_resnet8.py."""
    # Without a width the model's default, as in the trainer.
    options = {} if settings.model.width is None else {"width": settings.model.width}
    model = models.create(
        settings.model.name,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        **options,
    )
    variables = jax.jit(model.init)(jax.random.key(0))
    epochs = settings.train.epochs_per_generation
    tx = make_seal_tx(
        masks.before(model.blocks, "layer3"),
        cosine(settings.optimizer.learning_rate, epochs=epochs, steps_per_epoch=steps),
        steps_per_epoch=steps,
        epochs_per_generation=epochs,
        ascent_scale=settings.method["ascent_scale"],
    )
    return TrainState.create(
        apply_fn=model.module.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
    )


class Loop:
    """The Python loop; ``augment`` tells whether it shuffles and crops, or replays ready batches."""

    def __init__(
        self,
        state: TrainState,
        settings: settings_lib.Settings,
        dataset: data.Dataset,
        augment: bool,
    ):
        self.batch, self.padding = settings.train.batch_size, settings.data.crop_padding
        self.steps = steps_per_epoch(len(dataset.train), self.batch)
        self.state = jax.tree.map(jnp.copy, state)  # each loop donates its copy
        self.rng = np.random.default_rng(0)
        self.side = dataset.image_shape[0]
        # Normalised and padded once, which favours the loop. Padded first: the padding is black, as in the
        # trainer, and not the mean colour that zeros would be after normalisation.
        padding = ((0, 0), *((self.padding, self.padding),) * 2, (0, 0))
        padded = np.pad(dataset.train.images, padding).astype(np.float32) / 255
        mean, std = (np.array(part, np.float32) for part in data.statistics("digits"))
        self.padded, self.labels = (padded - mean) / std, dataset.train.labels
        # The bare loop trains on the batches of one epoch again and again.
        self.ready = None if augment else list(self.batches())

    def batches(self):
        order = self.rng.permutation(len(self.labels))
        for step in range(self.steps):
            rows = order[step * self.batch : (step + 1) * self.batch]
            # Offsets [batch, 1] of each crop; a crop is one gather with the indices of its rows and columns.
            down, right = self.rng.integers(0, 2 * self.padding + 1, (2, self.batch, 1))
            window = np.arange(self.side)
            images = self.padded[
                rows[:, None, None], (down + window)[:, :, None], (right + window)[:, None, :]
            ]
            yield images, self.labels[rows]

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            metrics = []
            for batch in self.batches() if self.ready is None else self.ready:
                self.state, measured = train_step(self.state, *jax.device_put(batch))
                metrics.append(measured)
            # Once an epoch, so that the steps are dispatched ahead.
            jax.device_get(metrics)


class Compiled:
    """The trainer's compiled program, called as the training loop calls it."""

    def __init__(self, settings: settings_lib.Settings, dataset: data.Dataset):
        self.experiment = common.build(settings, dataset)
        self.data = common.on_device(self.experiment, dataset.train)
        self.state = common.initial_state(self.experiment, self.data)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            self.state, losses = self.experiment.train(self.state, self.data)
            jax.device_get(losses)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=20, argv=argv)
    settings = common.digits_resnet8(width=4 if options.quick else None)
    epochs = 1 if options.quick else 16
    dataset = common.digits(settings.data.validation_fraction)
    compiled = Compiled(settings, dataset)
    steps_per_epoch = compiled.experiment.clock.steps_per_epoch
    # One state for both loops: its functions are static, so another one would compile the step again.
    state = initial(settings, dataset, steps_per_epoch)
    trainers = {
        "compiled": compiled,
        "loop": Loop(state, settings, dataset, augment=True),
        "bare loop": Loop(state, settings, dataset, augment=False),
    }
    times = common.interleave(
        {name: functools.partial(each.train, epochs) for name, each in trainers.items()},
        options.rounds,
    )
    steps = epochs * steps_per_epoch
    rows = []
    for name in trainers:
        fastest, median = common.ratio(times, name, "compiled")
        step = min(times[name]) / steps
        rows.append(
            {
                "program": name,
                "ms/step": 1e3 * step,
                "steps/s": 1 / step,
                "ratio": fastest,
                "median": median,
            }
        )
    title = f"training steps, {options.rounds} rounds of {steps} steps"
    common.publish("multistep", [common.Report(title, rows)], options.json)


if __name__ == "__main__":
    main()
