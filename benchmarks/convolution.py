"""A convolution as XLA's own and in its canonical layout, inside a ``lax.scan`` and outside.

    python -m benchmarks.convolution

About a minute on two CPU cores. A step is the forward and backward pass of one residual block
(two 3x3 convolutions with BatchNorm) and a gradient step, on a batch of 32. "scan" runs the steps in
the body of a loop, as the trainer does; "calls" runs them as calls of a jitted step.

"ratio" is the time of a step over that of the native convolution outside of a loop, from the fastest
rounds, "median" that of the rounds: above 1 it is slower. In its loop the trainer takes "canonical"
on CPU and "native" elsewhere (see ``seal_jax.models.convolution``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from seal_jax.models.resnet import ResidualBlock

BATCH = 32


def make_step(convolution: str, side: int, channels: int, stride: int):
    """Return a step and its first state, ``(parameters, images)``."""
    block = ResidualBlock(
        kind="basic",
        width=channels * stride,
        inner_width=channels * stride,
        groups=1,
        stride=stride,
        shortcut="A",
        dtype=jnp.float32,
        bn_axis_name=None,
        convolution=convolution,
    )
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(BATCH, side, side, channels)), jnp.float32)
    variables = block.init(jax.random.key(0), images, train=False)

    def step(state: Any) -> Any:
        params, images = state

        def objective(params, images):
            inputs = {"params": params, "batch_stats": variables["batch_stats"]}
            output, _ = block.apply(inputs, images, train=True, mutable=["batch_stats"])
            return jnp.square(output).mean()

        # The gradient by the images too, as for every block of a network except the first.
        return jax.tree.map(
            lambda leaf, slope: leaf - 0.01 * slope,
            state,
            jax.grad(objective, argnums=(0, 1))(params, images),
        )

    return step, (variables["params"], images)


def candidate(convolution: str, loop: bool, steps: int, shape: tuple[int, int, int]):
    step, state = make_step(convolution, *shape)
    # In the body of a loop XLA's CPU compiler turns the convolutions of the backward pass into naive loops,
    # which is what this benchmark is about: the same step, inside a loop and outside.
    if loop:
        many = jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, now: step(now), state))
        return lambda: many(state)
    once = jax.jit(step)

    # No wait between the calls: they are dispatched ahead.
    def calls():
        now = state
        for _ in range(steps):
            now = once(now)
        return now

    return calls


def compare(shape: tuple[int, int, int], steps: int, rounds: int) -> common.Report:
    candidates = {
        (convolution, place): candidate(convolution, place == "scan", steps, shape)
        for convolution in ("native", "canonical")
        for place in ("calls", "scan")
    }
    times = common.interleave({" ".join(key): run for key, run in candidates.items()}, rounds)
    # All relative to what Flax does without this package: native convolutions in single calls.
    rows = []
    for convolution, place in candidates:
        name = f"{convolution} {place}"
        fastest, median = common.ratio(times, name, "native calls")
        rows.append(
            {
                "convolution": convolution,
                "in": place,
                "ms/step": 1e3 * min(times[name]) / steps,
                "ratio": fastest,
                "median": median,
            }
        )
    side, channels, stride = shape
    title = f"block on {side}x{side}x{channels}, stride {stride}, batch {BATCH}"
    return common.Report(f"{title}, {rounds} rounds of {steps} steps", rows)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=15, argv=argv)
    # Blocks of the ResNet-8 of width 16 and a larger one: (side, channels, stride), and steps per round.
    shapes = [((8, 16, 1), 20), ((8, 16, 2), 20), ((16, 32, 1), 4)]
    if options.quick:
        shapes = [((4, 4, 1), 2)]
    reports = [compare(shape, steps, options.rounds) for shape, steps in shapes]
    common.publish("convolution", reports, options.json)


if __name__ == "__main__":
    main()
