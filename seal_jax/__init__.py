"""Forget-and-relearn training as optax transformations over parameter-tree masks.

The names below need jax and optax only. The trainer is in ``seal_jax.training`` and behind
``python -m seal_jax``; nothing of it is imported here.
"""

from seal_jax import forgetting as forgetting
from seal_jax import generations as generations
from seal_jax import heads as heads
from seal_jax import isometry as isometry
from seal_jax import layers as layers
from seal_jax import layerwise as layerwise
from seal_jax import line_search as line_search
from seal_jax import losses as losses
from seal_jax import masks as masks
from seal_jax import paths as paths
from seal_jax import pruning as pruning
from seal_jax import schedules as schedules
from seal_jax import selections as selections
from seal_jax import slimming as slimming
from seal_jax import transforms as transforms
from seal_jax import units as units
from seal_jax import weak_classifiers as weak_classifiers
from seal_jax.errors import UsageError as UsageError
from seal_jax.generations import Clock as Clock
from seal_jax.schedules import PRESETS as PRESETS
from seal_jax.schedules import cosine as cosine
from seal_jax.transforms import ascend as ascend
from seal_jax.transforms import make_continual_backprop_tx as make_continual_backprop_tx
from seal_jax.transforms import make_fast_tx as make_fast_tx
from seal_jax.transforms import make_imp_tx as make_imp_tx
from seal_jax.transforms import make_l2_init_tx as make_l2_init_tx
from seal_jax.transforms import make_llf_tx as make_llf_tx
from seal_jax.transforms import make_looksam_tx as make_looksam_tx
from seal_jax.transforms import make_normal_tx as make_normal_tx
from seal_jax.transforms import make_pof_tx as make_pof_tx
from seal_jax.transforms import make_redo_tx as make_redo_tx
from seal_jax.transforms import make_relearn_tx as make_relearn_tx
from seal_jax.transforms import make_sa_gd_tx as make_sa_gd_tx
from seal_jax.transforms import make_sam_tx as make_sam_tx
from seal_jax.transforms import make_seal_tx as make_seal_tx
from seal_jax.transforms import make_zapping_tx as make_zapping_tx
from seal_jax.transforms import masked_reinit as masked_reinit
from seal_jax.transforms import perturb_along_momentum as perturb_along_momentum
from seal_jax.transforms import reset_state as reset_state

__version__ = "0.1.0"
