"""FIRE: kernels become scaled isometries where a generation starts (Han et al. 2026)."""

from __future__ import annotations

import dataclasses

from seal_jax import isometry
from seal_jax.methods.method import Context, HookContext, Method, Variant, check_options

VARIANTS = {"fire": Variant("FIRE", "Han et al. 2026", "warm_start_cifar10.py")}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FIRE; the default is that of the released code.

    Attributes:
      iterations: of Newton and Schulz; more of them bring small singular values nearer to 1.
    """

    iterations: int = 10


def build(options: Options, context: Context) -> Method:
    """Return plain training whose kernels become isometries where a generation starts."""
    context.require_restarts("fire")
    check_options(options, "be at least 1", "iterations")

    # Kernels alone; biases, norms and BatchNorm's running statistics stay.
    def forget(hook: HookContext) -> HookContext:
        params = isometry.reinitialise(hook.weights.params, iterations=options.iterations)
        return hook.with_params(params)

    return context.plain(on_generation_start=forget)
