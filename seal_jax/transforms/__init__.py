"""Gradient transformations, one idea a file."""

from seal_jax.transforms.ascent import AscentState, ascend
from seal_jax.transforms.llf import make_llf_tx
from seal_jax.transforms.reinit import ReinitState, masked_reinit
from seal_jax.transforms.reset_state import ResetState, reset_state
from seal_jax.transforms.seal import make_seal_tx
from seal_jax.transforms.sgd import (
    ClockState,
    decay_weights,
    make_normal_tx,
    scale_by_restarting_rate,
)

__all__ = [
    "AscentState",
    "ClockState",
    "ReinitState",
    "ResetState",
    "ascend",
    "decay_weights",
    "make_llf_tx",
    "make_normal_tx",
    "make_seal_tx",
    "masked_reinit",
    "reset_state",
    "scale_by_restarting_rate",
]
