"""Training methods, one file each; :func:`build` makes one from its name and options."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from seal_jax.core import settings
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest
from seal_jax.methods.method import Context, Method

# Each is a module of this package with a docstring whose first line says what it does, ``SOURCE``,
# an ``Options`` dataclass and ``build(options, context)``. It may have ``defaults(options)``, see
# ``complete``, and ``momentum_weight(settings, options)``, see there.
NAMES = (
    "normal",
    "llf",
    "seal",
    "sa_gd",
    "wels",
    "kels",
    "dsd",
    "fc",
    "shrink_perturb",
    "imp",
    "lw",
    "sam",
    "pof",
    "foca",
    "fast",
    "born_again",
)

__all__ = [
    "NAMES",
    "Context",
    "Method",
    "build",
    "complete",
    "described",
    "momentum_weight",
    "options",
]


def _module(name: str) -> Any:
    if name not in NAMES:
        raise UsageError(f"method.name = {name!r} is not a method{nearest(str(name), NAMES)}")
    return importlib.import_module(f"seal_jax.methods.{name}")


def options(name: str) -> Any:
    """Return the options of a method with their defaults, a dataclass.

    >>> options("seal").ascent_scale
    0.01
    """
    return _module(name).Options()


def described(name: str) -> tuple[str, str]:
    """Return what a method does, in one line, and the section of its source.

    >>> described("lw")
    ('layerwise reinitialisation (Alabdulmohsin et al. 2022, Algorithm 1)', 'LW paper, Algorithm 1')
    """
    module = _module(name)
    summary = (module.__doc__ or "").splitlines()[0].partition(": ")
    return (summary[2] or summary[0]).rstrip("."), module.SOURCE


def build(values: Mapping[str, Any], context: Context) -> Method:
    """Return the method ``values["name"]`` with the rest of ``values`` as its options.

    Raises:
      UsageError: no such method, or an option that it does not have or that does not fit.
    """
    return _module(values["name"]).build(_options(values), context)


def complete(given: Settings) -> Settings:
    """Return the settings with the method's own choice in each field that was left open, ``None``.

    A method that differs from the others there has ``defaults(options)``, which returns sections of
    fields: ``{"model": {"head_bias": False}}``.

    >>> complete(Settings(method={"name": "fast"})).model.head_bias
    False
    """
    module = _module(given.method["name"])
    defaults = module.defaults(_options(given.method)) if hasattr(module, "defaults") else {}
    for name, fields in defaults.items():
        section = getattr(given, name)
        left_open = {field: v for field, v in fields.items() if getattr(section, field) is None}
        given = dataclasses.replace(given, **{name: dataclasses.replace(section, **left_open)})
    return given


def momentum_weight(given: Settings) -> float:
    """Return the weight with which a gradient enters the momentum of a run: 1 unless damped."""
    module = _module(given.method["name"])
    if not hasattr(module, "momentum_weight"):
        return 1.0
    return module.momentum_weight(given, _options(given.method))


def _options(values: Mapping[str, Any]) -> Any:
    given = {field: value for field, value in values.items() if field != "name"}
    return settings.read(_module(values["name"]).Options, given, "method")
