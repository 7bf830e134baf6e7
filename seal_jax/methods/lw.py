"""LW: layerwise reinitialisation (Alabdulmohsin et al. 2022, Algorithm 1)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import traverse_util

from seal_jax import layerwise
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, HookContext, Method, Variant, check_options

ORDER = 25
VARIANTS = {
    # Two rounds of the network's two blocks make the four generations of configs/digits.py.
    "lw": Variant("LW", "LW paper, Algorithm 1", "lw_cifar10.py", digits={"rounds": 2}),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of LW; ``rescale``, ``normalise`` and ``reinitialise`` ablate it (appendix F).

    Attributes:
      rounds: N, rounds for each block.
      blocks: K, how many of the model's blocks have rounds, from the bottom; 0 for all.
      sample_size: training images from which a block's mean and deviation are taken; 0 for as many
        as in a batch.
      epsilon: ε, added to the deviation.
      rescale: step 1: scale the kernels of blocks 1 to k back to their initial norms.
      rescale_vectors: their biases and normalisation parameters, too.
      normalise: step 2: insert the normalisers.
      reinitialise: step 3: reinitialise everything above block k.
    """

    rounds: int = 1
    blocks: int = 0
    sample_size: int = 0
    epsilon: float = 1e-5
    rescale: bool = True
    rescale_vectors: bool = False
    normalise: bool = True
    reinitialise: bool = True


def build(options: Options, context: Context) -> Method:
    """Return LW: generation g is round (k, n) of Algorithm 1, the first one before any training."""
    context.require_restarts("lw")
    model = context.model
    blocks = _blocks(options, context)
    # Algorithm 1, line 5 leaves the size of the sample X open.
    sample_size = options.sample_size or context.train.batch_size

    def start_round(hook: HookContext) -> HookContext:
        k, _ = layerwise.round_of(hook.generation, options.rounds)
        params, normalisers = hook.weights.params, hook.weights.normalisers
        if options.rescale:
            params = layerwise.rescale(params, hook.method_state, model.blocks, k, blocks=blocks)
        if options.normalise:
            # Statistics of the rescaled network, with the normalisers below block k in place.
            rescaled = hook.weights._replace(params=params)
            outputs = model.features(rescaled._asdict(), hook.images(sample_size))
            by_name = traverse_util.flatten_dict(normalisers, sep="/")
            # k is traced, so every block's statistics are computed and those of block k chosen.
            for number, block in enumerate(blocks, start=1):
                statistics = layerwise.statistics(outputs[block])
                mean, scale = layerwise.normaliser(*statistics, options.epsilon)
                for name, value in ((f"{block}/mean", mean), (f"{block}/scale", scale)):
                    by_name[name] = jnp.where(k == number, value, by_name[name])
            normalisers = traverse_util.unflatten_dict(by_name, sep="/")
        if options.reinitialise:
            params = layerwise.reinitialise_above(
                hook.key, params, model.blocks, k, context.init_params, blocks=blocks
            )
        return hook._replace(weights=hook.weights._replace(params=params, normalisers=normalisers))

    def start(hook: HookContext) -> HookContext:
        norms = layerwise.kernel_norms(hook.weights.params, vectors=options.rescale_vectors)
        # At mean 0 and scale 1 from the first step on, since the state's structure must not change later.
        empty = model.empty_normalisers() if options.normalise else {}
        weights = hook.weights._replace(normalisers=empty)
        # Algorithm 1 starts round (1, 1) before any training.
        return start_round(hook._replace(weights=weights, method_state=norms))

    return context.plain(on_start=start, on_generation_start=start_round)


def _blocks(options: Options, context: Context) -> tuple[str, ...]:
    """Return the blocks that have rounds, having checked what depends on their number."""
    model = context.model
    declared = model.round_blocks
    if not declared:
        raise UsageError(f"model.name = {model.name!r} declares no blocks, which LW goes through")
    if not 0 <= options.blocks <= len(declared):
        raise UsageError(
            f"method.blocks = {options.blocks} must lie in 0..{len(declared)}, the blocks of "
            f"{model.name}"
        )
    check_options(options, "be at least 1", "rounds")
    check_options(options, "be at least 0", "sample_size")
    check_options(options, "be 0 or positive", "epsilon")
    count = options.blocks or len(declared)
    if context.train.generations != count * options.rounds:
        raise UsageError(
            f"train.generations = {context.train.generations} must be {count * options.rounds}: "
            f"{count} blocks times method.rounds = {options.rounds}"
        )
    return declared[:count]
