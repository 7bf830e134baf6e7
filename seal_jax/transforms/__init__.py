"""Optax gradient transformations, one method a file."""

from seal_jax.transforms.fast import make_fast_tx, scale_by_two_rates
from seal_jax.transforms.imp import hold_pruned, make_imp_tx
from seal_jax.transforms.pof import make_pof_tx
from seal_jax.transforms.preconditioners import damped_trace, preconditioner, scale_by_radam
from seal_jax.transforms.relearn import (
    ReinitState,
    dsd,
    fc,
    kels,
    make_llf_tx,
    make_relearn_tx,
    masked_reinit,
    wels,
    welsr,
)
from seal_jax.transforms.reset_state import (
    ResetState,
    freeze,
    freeze_while,
    reset_state,
    split_state,
)
from seal_jax.transforms.sa_gd import AnnealState, anneal, make_sa_gd_tx
from seal_jax.transforms.sam import (
    make_sam_tx,
    perturb,
    sharpness_aware,
    sharpness_aware_gradient,
)
from seal_jax.transforms.seal import ascend, make_seal_tx
from seal_jax.transforms.sgd import (
    ClockState,
    decay_weights,
    make_normal_tx,
    scale_by_restarting_rate,
)

__all__ = [
    "AnnealState",
    "ClockState",
    "ReinitState",
    "ResetState",
    "anneal",
    "ascend",
    "damped_trace",
    "decay_weights",
    "dsd",
    "fc",
    "freeze",
    "freeze_while",
    "hold_pruned",
    "kels",
    "make_fast_tx",
    "make_imp_tx",
    "make_llf_tx",
    "make_normal_tx",
    "make_pof_tx",
    "make_relearn_tx",
    "make_sa_gd_tx",
    "make_sam_tx",
    "make_seal_tx",
    "masked_reinit",
    "perturb",
    "preconditioner",
    "reset_state",
    "scale_by_radam",
    "scale_by_restarting_rate",
    "scale_by_two_rates",
    "sharpness_aware",
    "sharpness_aware_gradient",
    "split_state",
    "wels",
    "welsr",
]
