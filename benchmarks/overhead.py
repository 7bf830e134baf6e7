"""Overhead of SEAL's optimizer in a training step, relative to plain momentum SGD with weight decay.

    python -m benchmarks.overhead

About three minutes on two CPU cores. Both programs are a jitted ``lax.scan`` of steps on one batch of
32, equal except for the optimizer: ``make_seal_tx`` against ``add_decayed_weights`` and ``sgd`` of
optax, which is also measured against itself ("sgd again") to show how precise the timing is.

"overhead" is the time of a step over that with SGD, minus one, in percent, from the fastest rounds;
"median" is that of the rounds. "flops" and "bytes" are the overheads that the compiler counts for one
step, which do not depend on what else the machine does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from seal_jax import masks, models
from seal_jax.transforms import make_seal_tx

BATCH = 32


def optimizers(model: models.Model) -> dict[str, optax.GradientTransformation]:
    """Return SGD, the same again, and SEAL with the paper's hyper-parameters."""
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
    # 11 steps per epoch are those of configs/digits_resnet8.py; the generation's length is the default.
    seal = make_seal_tx(masks.before(model.blocks, "layer3"), 0.01, steps_per_epoch=11)
    return {"sgd": sgd, "sgd again": sgd, "seal": seal}


def make_step(model: models.Model, tx: optax.GradientTransformation, images: Any, labels: Any):
    """Return the step as the body of a scan."""

    def step(carry, _):
        params, statistics, opt_state = carry

        def objective(params):
            logits, changed = model.module.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, changed["batch_stats"]

        (loss, changed), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), changed, opt_state), loss

    return step


class Training:
    """A compiled scan of ``steps`` steps, and its current state."""

    def __init__(
        self,
        model: models.Model,
        variables: Any,
        tx: optax.GradientTransformation,
        steps: int,
    ):
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.normal(size=(BATCH, *model.image_shape)), jnp.float32)
        labels = jnp.asarray(rng.integers(0, model.num_classes, BATCH))

        def scan(carry, images, labels):
            return jax.lax.scan(make_step(model, tx, images, labels), carry, length=steps)

        # A copy, since the carry is donated and the variables are shared by all trainings.
        params, statistics = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
        self.carry = params, statistics, tx.init(params)
        # Compiled ahead of time: the compiled object has the cost analysis.
        program = jax.jit(scan, donate_argnums=0)
        self.compiled = program.lower(self.carry, images, labels).compile()
        self.arrays = images, labels

    def train(self) -> jax.Array:
        self.carry, losses = self.compiled(self.carry, *self.arrays)
        return losses

    @property
    def cost(self) -> dict[str, float]:
        # The compiler counts the body of a loop once, so this is the cost of one step.
        return self.compiled.cost_analysis()


def compare(title: str, model: models.Model, steps: int, rounds: int) -> common.Report:
    variables = jax.jit(model.init)(jax.random.key(0))
    trainings = {
        name: Training(model, variables, tx, steps) for name, tx in optimizers(model).items()
    }
    times = common.interleave({name: each.train for name, each in trainings.items()}, rounds)
    rows = []
    for name, training in trainings.items():
        fastest, median = common.ratio(times, name, "sgd")
        costs = [
            100 * (training.cost[key] / trainings["sgd"].cost[key] - 1)
            for key in ("flops", "bytes accessed")
        ]
        rows.append(
            {
                "optimizer": name,
                "ms/step": 1e3 * min(times[name]) / steps,
                "overhead %": 100 * (fastest - 1),
                "median %": 100 * (median - 1),
                "Mflops": training.cost["flops"] / 1e6,
                "flops %": costs[0],
                "MB": training.cost["bytes accessed"] / 1e6,
                "bytes %": costs[1],
            }
        )
    return common.Report(f"{title}, batch {BATCH}, {rounds} rounds of {steps} steps", rows)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=40, argv=argv)
    convolution = common.convolution()
    create = functools.partial(models.create, num_classes=10, convolution=convolution)
    # A small network shows the overhead at its largest; ResNet-18 is the size of the papers.
    width = 4 if options.quick else 16
    small = create("resnet8", image_shape=(8, 8, 1), width=width)
    reports = [compare("resnet8, 8x8", small, 2 if options.quick else 50, options.rounds)]
    if not options.quick:
        large = create("resnet18", image_shape=(32, 32, 3), stem="cifar")
        steps = 2 if convolution == "canonical" else 50
        reports.append(compare("resnet18, 32x32", large, steps, max(1, options.rounds // 4)))
    common.publish("overhead", reports, options.json)


if __name__ == "__main__":
    main()
