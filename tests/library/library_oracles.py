"""The reference update of SEAL in NumPy float64, transcribed from the paper and not from the code."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SHAPES = {
    # Wide enough that no leaf's update cancels to a size near its rounding error.
    "conv1/kernel": (4, 8),
    "bn1/scale": (8,),
    "fc/kernel": (8, 8),
    "fc/bias": (8,),
}
FORGET = {"conv1/kernel", "bn1/scale"}
S, E, K, G = 3, 8, 2, 3
STEPS = S * E * G


def nested(flat):
    """{"fc/bias": x} as {"fc": {"bias": x}}."""
    tree = {}
    for name, value in flat.items():
        layer, leaf = name.split("/")
        tree.setdefault(layer, {})[leaf] = value
    return tree


def flat(tree):
    return {f"{layer}/{leaf}": value for layer, own in tree.items() for leaf, value in own.items()}


class NnxTree(nnx.Module):
    """A nested dictionary of arrays as a module: what ``nnx.Dict`` is from flax 0.12 on."""

    def __init__(self, tree):
        for name, value in tree.items():
            inner = NnxTree(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value))
            setattr(self, name, inner)


def problem(seed=0):
    """Initial parameters, and a gradient ``noise[t] + coefficient[t] * p`` that couples all leaves."""
    rng = np.random.default_rng(seed)
    params = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    noise = {n: rng.normal(size=(STEPS, *s)).astype(np.float32) for n, s in SHAPES.items()}
    coefficient = {
        n: rng.uniform(0.2, 0.8, (STEPS, *s)).astype(np.float32) for n, s in SHAPES.items()
    }
    return params, noise, coefficient


def numpy_gradient(noise, coefficient):
    def gradient(params, t):
        level = sum(p.mean() for p in params.values())
        return {
            n: noise[n][t].astype(np.float64) + coefficient[n][t] * p + 0.1 * level
            for n, p in params.items()
        }

    return gradient


def jax_gradient(params, noise, coefficient):
    """The same for one step, on nested trees of any node type."""
    level = sum(jnp.mean(p) for p in jax.tree.leaves(params))
    leaves, structure = jax.tree.flatten(params)
    parts = zip(jax.tree.leaves(noise), jax.tree.leaves(coefficient), leaves, strict=True)
    return jax.tree.unflatten(structure, [n + c * p + 0.1 * level for n, c, p in parts])


def epoch_rate(peak, epoch, epochs, warmup):
    if epoch < warmup:
        return peak * (epoch + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def seal_by_the_book(
    params: dict[str, np.ndarray],
    gradient: Callable,
    *,
    forget=FORGET,
    rate: Callable[[int], float],
    ascent_epochs: float = K,
    momentum=0.9,
    weight_decay=5e-4,
    factor=-1.0,
    scale=0.01,
    reset="phase",
    freeze=False,
    outside: dict[str, float] | None = None,
    event: Callable | None = None,
):
    """Train as a loop over generations, epochs and batches; return all params and updates.

    ``rate`` gives the learning rate of an epoch in its generation. ``outside`` names parameters in
    the hands of plain SGD with a rate of its own. ``event(params, t)`` may change parameters at the
    start of a generation, which then spends its first step on it.
    """
    outside = outside or {}
    p = {n: v.astype(np.float64) for n, v in params.items()}
    buf = {n: np.zeros_like(v) for n, v in p.items()}
    params_seen, updates_seen = [], []
    t = 0
    for generation in range(G):
        ascent_left = round(ascent_epochs * S) if generation >= 1 else 0
        if generation >= 1 and reset in ("phase", "generation"):
            buf = {n: np.zeros_like(v) for n, v in p.items()}
        for epoch in range(E):
            lr = rate(epoch)
            for _batch in range(S):
                ascending = ascent_left > 0
                g = gradient(p, t)
                updates = {}
                for n in p:
                    if n in outside:
                        updates[n] = -outside[n] * g[n]
                        continue
                    if ascending and freeze and n not in forget:
                        updates[n] = np.zeros_like(p[n])
                        continue
                    decay = weight_decay
                    if ascending and n in forget:
                        decay = decay * factor
                    buf[n] = momentum * buf[n] + (g[n] + decay * p[n])
                    updates[n] = -lr * buf[n]
                    if ascending and n in forget:
                        updates[n] = scale * lr * buf[n]
                p = {n: p[n] + updates[n] for n in p}
                params_seen.append(p)
                updates_seen.append(updates)
                t += 1
                ascent_left -= 1
                if ascent_left == 0 and generation >= 1 and reset == "phase":
                    buf = {n: np.zeros_like(v) for n, v in p.items()}
    return params_seen, updates_seen


def assert_close(actual, expected, tolerance=1e-6):
    """Compare histories (leading axis: steps) of flat trees in the norm of each leaf at each step."""
    for name in expected[0]:
        wanted = np.stack([step[name] for step in expected])
        got = np.asarray(actual[name], np.float64)
        assert got.shape == wanted.shape, name
        axes = tuple(range(1, got.ndim))
        error = np.sqrt(((got - wanted) ** 2).sum(axes))
        size = np.sqrt((wanted**2).sum(axes))
        worst = int(np.argmax(error - tolerance * size))
        assert (error <= tolerance * size).all(), (
            f"{name}: relative error {error[worst] / max(size[worst], 1e-300):.2e} at step {worst}"
        )
