"""Forget-and-relearn training as optax transformations over parameter-tree masks.

The names below need jax and optax only. The trainer is in ``seal_jax.training`` and behind
``python -m seal_jax``; nothing of it is imported here.
"""

from seal_jax import (
    distillation,
    forgetting,
    generations,
    heads,
    layers,
    layerwise,
    line_search,
    masks,
    paths,
    pruning,
    schedules,
    selections,
    slimming,
    transforms,
    weak_classifiers,
)
from seal_jax.errors import UsageError
from seal_jax.generations import Clock
from seal_jax.schedules import PRESETS, cosine
from seal_jax.transforms import (
    ascend,
    make_fast_tx,
    make_imp_tx,
    make_llf_tx,
    make_normal_tx,
    make_pof_tx,
    make_relearn_tx,
    make_sa_gd_tx,
    make_sam_tx,
    make_seal_tx,
    masked_reinit,
    reset_state,
)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Clock",
    "UsageError",
    "ascend",
    "cosine",
    "distillation",
    "forgetting",
    "generations",
    "heads",
    "layers",
    "layerwise",
    "line_search",
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
    "masks",
    "paths",
    "pruning",
    "reset_state",
    "schedules",
    "selections",
    "slimming",
    "transforms",
    "weak_classifiers",
]
