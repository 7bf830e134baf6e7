"""LLF: later-layer forgetting (Zhou et al. 2022; baseline of the SEAL paper)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from seal_jax import forgetting, masks
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, HookContext, Init, Method, Variant
from seal_jax.transforms import make_normal_tx, split_state

ORDER = 11
VARIANTS = {
    "llf": Variant(
        "LLF",
        "Zhou et al. 2022, section 4",
        "seal_tiny_imagenet.py:llf_paper",
        digits={"threshold": "dense2"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of LLF; the defaults reinitialise what the released code does, from the model's own init.

    Attributes:
      threshold: the first block, in the model's declared order, that is reinitialised.
      init: from the model's own initialisation, or PyTorch's default ("torch_default") as in the
        released code.
      reset_norm: reinitialise scale and bias of the normalisation layers, too.
      reset_bias: reinitialise biases beside kernels (the released code does not).
      optimizer_state: what happens to the momentum where a generation starts: "fresh", that of all
        parameters is zero; "zero", that of the reinitialised ones; "keep". With
        ``optimizer.reset_momentum`` "never" it is "keep".
    """

    threshold: str = "layer3"
    init: Init = "model"
    reset_norm: bool = False
    reset_bias: bool = True
    optimizer_state: Literal["fresh", "zero", "keep"] = "fresh"


def build(options: Options, context: Context) -> Method:
    """Return LLF: plain training whose later layers are reinitialised where a generation starts."""
    context.require_restarts("llf")
    # LLF forgets the later layers, from the threshold on; SEAL those before it.
    later = context.at_threshold(masks.since, options.threshold)
    mask = masks.resolve(
        masks.restrict(later, norms=options.reset_norm, biases=options.reset_bias), context.params
    )
    init_fn = context.initialiser(options.init)
    # Two settings say when the momentum is reset; "never" is the stronger one.
    policy, arguments = options.optimizer_state, context.arguments()
    if arguments["reset_momentum"] == "never":
        if policy == "zero":
            raise UsageError(
                "method.optimizer_state = 'zero' does not go with optimizer.reset_momentum = "
                "'never'; set optimizer.reset_momentum to 'generation'"
            )
        policy = "keep"
    if policy == "zero":
        # Adam's bias correction needs a count per part: that of the reinitialised part restarts.
        part = "optimizer" if context.optimizer.of_optax else "preconditioner"
        arguments[part] = split_state(arguments[part], mask)
    # The hook resets the momentum, so that the transformation must not.
    tx = make_normal_tx(**{**arguments, "reset_momentum": "never"})

    def forget(hook: HookContext) -> HookContext:
        params = forgetting.reinitialise(hook.key, hook.weights.params, mask, init_fn)
        opt_state = forgetting.forget_state(tx, hook.opt_state, params, mask, policy)
        return hook.with_params(params)._replace(opt_state=opt_state)

    return context.plain(tx=tx, on_generation_start=forget, mask=mask)
