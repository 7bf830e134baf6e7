"""What knowledge evolution and its relatives share: a selection is drawn anew between generations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from seal_jax import forgetting
from seal_jax.methods.method import Context, HookContext, Method
from seal_jax.transforms import make_normal_tx

PyTree = Any
Init = Literal["model", "torch_default"]


def relearning(
    context: Context, name: str, select: Callable[[HookContext], PyTree], *, init: Init = "model"
) -> Method:
    """Return plain training that draws what ``select`` chooses anew where a generation starts.

    Args:
      context: of the training.
      name: of the method, for errors.
      select: maps the event to a selection, see :mod:`seal_jax.selections`.
      init: from the model's own initialisation, or PyTorch's default.
    """
    context.require_restarts(name)
    init_fn: forgetting.Initialiser = context.init_params if init == "model" else "torch_default"

    def forget(event: HookContext) -> HookContext:
        params = event.weights.params
        params = forgetting.reinitialise_selected(event.key, params, select(event), init_fn)
        return event._replace(weights=event.weights._replace(params=params))

    tx = make_normal_tx(**context.arguments())
    return Method(tx=tx, loss=context.loss, on_generation_start=forget)
