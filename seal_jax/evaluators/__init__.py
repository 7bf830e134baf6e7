"""The evaluations as commands over a training run's folder; one file per evaluation."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from seal_jax.evaluators.options import check_names

if TYPE_CHECKING:
    from seal_jax.evaluators.evaluator import Evaluator

# What an evaluator raises for records of another version, or for ones that were edited by hand.
UNFIT = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


@functools.cache
def registry() -> Mapping[str, Evaluator]:
    """Return the evaluators by name, in their order: each module here with an ``EVALUATOR``."""
    modules = [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    ]
    evaluators = [module.EVALUATOR for module in modules if hasattr(module, "EVALUATOR")]
    ordered = sorted(evaluators, key=lambda evaluator: (evaluator.order, evaluator.name))
    return {evaluator.name: evaluator for evaluator in ordered}


def load(name: str) -> Evaluator:
    """Return the evaluator of this name.

    Raises:
      UsageError: there is none.
    """
    check_names("kind", (name,), registry())
    return registry()[name]
