"""The evaluations as commands over a training run's folder; one file a kind."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from seal_jax.errors import UsageError, nearest

if TYPE_CHECKING:
    from seal_jax.evaluators.evaluator import Evaluator

# In the order of the SEAL, LW, PoF and FAST papers; each is a module here with a ``KIND``.
NAMES = (
    "linear_probe",
    "few_shot",
    "prediction_depth",
    "hessian",
    "margins",
    "flatness",
    "landscape",
    "gradients",
    "perturbations",
    "anytime",
)

# What records that are of another version, or edited by hand, make a kind raise.
UNFIT = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


def load(name: str) -> Evaluator:
    """Return the kind of this name.

    Raises:
      UsageError: there is none.
    """
    if name not in NAMES:
        raise UsageError(f"--kind={name} must be one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    kind: Evaluator = importlib.import_module(f"{__name__}.{name}").KIND
    return kind
