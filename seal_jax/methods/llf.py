"""LLF: later-layer forgetting (Zhou et al. 2022; baseline of the SEAL paper)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from seal_jax import forgetting, masks
from seal_jax.errors import UsageError
from seal_jax.methods.method import Context, HookContext, Method
from seal_jax.transforms import make_normal_tx, split_state

SOURCE = "Zhou et al. 2022, section 4; SEAL paper, section 2"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of LLF; the defaults re-initialise what the released code does, from the model's init.

    Attributes:
      threshold: the first block, of the model's declared order, that is re-initialised.
      init: from the model's own initialisation, or PyTorch's default as in the released code.
      reset_norm: re-initialise scale and bias of the normalisation layers too.
      reset_bias: re-initialise biases beside kernels (the released code does not).
      optimizer_state: what ``optimizer.reset_momentum`` does where a generation starts: "fresh",
        "zero" or "keep" of :func:`seal_jax.forgetting.forget_state`; with "never" it is "keep".
    """

    threshold: str = "layer3"
    init: Literal["model", "torch_default"] = "model"
    reset_norm: bool = False
    reset_bias: bool = True
    optimizer_state: Literal["fresh", "zero", "keep"] = "fresh"


def build(options: Options, context: Context) -> Method:
    """Return LLF: plain training whose later layers are drawn anew where a generation starts."""
    context.require_restarts("llf")
    try:
        later = masks.since(context.model.blocks, options.threshold)
    except UsageError as error:
        raise UsageError(f"method.threshold: {error}") from None
    mask = masks.resolve(
        masks.restrict(later, norms=options.reset_norm, biases=options.reset_bias), context.params
    )
    init_fn: forgetting.Initialiser = (
        context.init_params if options.init == "model" else "torch_default"
    )
    policy, arguments = options.optimizer_state, context.arguments()
    if arguments["reset_momentum"] == "never":
        if policy == "zero":
            raise UsageError(
                "method.optimizer_state = 'zero' does not go with optimizer.reset_momentum = "
                "'never'; set optimizer.reset_momentum to 'generation'"
            )
        policy = "keep"
    if policy == "zero":
        arguments["preconditioner"] = split_state(arguments["preconditioner"], mask)
    # The event resets the method_state, so the transformation itself keeps it.
    tx = make_normal_tx(**{**arguments, "reset_momentum": "never"})

    def forget(event: HookContext) -> HookContext:
        params = forgetting.reinitialise(event.key, event.weights.params, mask, init_fn)
        opt_state = forgetting.forget_state(tx, event.opt_state, params, mask, policy)
        return event._replace(weights=event.weights._replace(params=params), opt_state=opt_state)

    return Method(tx=tx, loss=context.loss, on_generation_start=forget, mask=mask)
