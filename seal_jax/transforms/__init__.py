"""Optax gradient transformations, one method per file."""

from seal_jax.transforms.continual_backprop import continual_backprop as continual_backprop
from seal_jax.transforms.continual_backprop import (
    make_continual_backprop_tx as make_continual_backprop_tx,
)
from seal_jax.transforms.fast import make_fast_tx as make_fast_tx
from seal_jax.transforms.fast import scale_by_two_rates as scale_by_two_rates
from seal_jax.transforms.hare_tortoise import HareTortoiseState as HareTortoiseState
from seal_jax.transforms.hare_tortoise import hare_and_tortoise as hare_and_tortoise
from seal_jax.transforms.imp import hold_pruned as hold_pruned
from seal_jax.transforms.imp import make_imp_tx as make_imp_tx
from seal_jax.transforms.l2_init import InitialState as InitialState
from seal_jax.transforms.l2_init import decay_towards_initial as decay_towards_initial
from seal_jax.transforms.l2_init import make_l2_init_tx as make_l2_init_tx
from seal_jax.transforms.looksam import LookSamState as LookSamState
from seal_jax.transforms.looksam import look_sharpness_aware as look_sharpness_aware
from seal_jax.transforms.looksam import make_looksam_tx as make_looksam_tx
from seal_jax.transforms.msam import momentum as momentum
from seal_jax.transforms.msam import perturb_along_momentum as perturb_along_momentum
from seal_jax.transforms.pof import make_pof_tx as make_pof_tx
from seal_jax.transforms.preconditioners import damped_trace as damped_trace
from seal_jax.transforms.preconditioners import preconditioner as preconditioner
from seal_jax.transforms.preconditioners import scale_by_radam as scale_by_radam
from seal_jax.transforms.recycle import recycle as recycle
from seal_jax.transforms.redo import make_redo_tx as make_redo_tx
from seal_jax.transforms.redo import redo as redo
from seal_jax.transforms.relearn import ReinitState as ReinitState
from seal_jax.transforms.relearn import dsd as dsd
from seal_jax.transforms.relearn import kels as kels
from seal_jax.transforms.relearn import make_llf_tx as make_llf_tx
from seal_jax.transforms.relearn import make_relearn_tx as make_relearn_tx
from seal_jax.transforms.relearn import make_zapping_tx as make_zapping_tx
from seal_jax.transforms.relearn import masked_reinit as masked_reinit
from seal_jax.transforms.relearn import random_classes as random_classes
from seal_jax.transforms.relearn import wels as wels
from seal_jax.transforms.relearn import welsr as welsr
from seal_jax.transforms.reset_state import ResetState as ResetState
from seal_jax.transforms.reset_state import freeze as freeze
from seal_jax.transforms.reset_state import freeze_while as freeze_while
from seal_jax.transforms.reset_state import reset_state as reset_state
from seal_jax.transforms.reset_state import split_state as split_state
from seal_jax.transforms.sa_gd import AnnealState as AnnealState
from seal_jax.transforms.sa_gd import anneal as anneal
from seal_jax.transforms.sa_gd import make_sa_gd_tx as make_sa_gd_tx
from seal_jax.transforms.sam import SharpnessState as SharpnessState
from seal_jax.transforms.sam import make_sam_tx as make_sam_tx
from seal_jax.transforms.sam import perturb as perturb
from seal_jax.transforms.sam import sharpness_aware as sharpness_aware
from seal_jax.transforms.sam import sharpness_aware_gradient as sharpness_aware_gradient
from seal_jax.transforms.seal import ascend as ascend
from seal_jax.transforms.seal import make_seal_tx as make_seal_tx
from seal_jax.transforms.sgd import ClockState as ClockState
from seal_jax.transforms.sgd import decay_weights as decay_weights
from seal_jax.transforms.sgd import make_normal_tx as make_normal_tx
from seal_jax.transforms.sgd import scale_by_restarting_rate as scale_by_restarting_rate
