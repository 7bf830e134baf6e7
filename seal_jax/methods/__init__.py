"""Training methods, one file each, and the registry of them that everything else reads.

A file of this folder is a method: it has a docstring whose first line says what it does, an ``Options``
dataclass, ``build(options, context)``, and ``VARIANTS``, the papers' names for ways to use it; the one
with the method's own name has its defaults. It may have

- ``ORDER``, its place in tables: 1x for the SEAL paper's methods, 2x for the LW paper's, 3x for the
  PoF paper's, 4x for the FAST paper's; without it the method comes last;
- ``defaults(options)``: its own choice of settings that were left open, see :func:`complete`;
- ``momentum_weight(settings, options)``, see :func:`momentum_weight`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from seal_jax import records
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest
from seal_jax.methods.method import Context as Context
from seal_jax.methods.method import Method as Method
from seal_jax.methods.method import Variant as Variant

# All are imported here: a method needs little beyond the models, which method.py imports anyway.
_MODULES: dict[str, Any] = {
    file.name: importlib.import_module(f"{__name__}.{file.name}")
    for file in pkgutil.iter_modules(__path__)
    if file.name != "method"  # what methods are made of, no method
}
NAMES: tuple[str, ...] = tuple(
    # Methods without an ORDER come after all others, by name.
    sorted(_MODULES, key=lambda name: (getattr(_MODULES[name], "ORDER", 100), name))
)
# By their names in configs/digits.py.
VARIANTS: dict[str, Variant] = {
    key: variant.of(name, key) for name in NAMES for key, variant in _MODULES[name].VARIANTS.items()
}


def _module(name: str) -> Any:
    if name not in NAMES:
        raise UsageError(f"method.name = {name!r} is not a method{nearest(str(name), NAMES)}")
    return _MODULES[name]


def options(name: str) -> Any:
    """Return the options of a method with their defaults, a dataclass.

    >>> options("seal").ascent_scale
    0.01
    """
    return _module(name).Options()


def summary(name: str) -> str:
    """Return what a method does, in one line.

    >>> summary("lw")
    'layerwise reinitialisation (Alabdulmohsin et al. 2022, Algorithm 1)'
    """
    # A method's docstring begins with "NAME: what it does."
    line = _module(name).__doc__.splitlines()[0]
    return line.partition(": ")[2].rstrip(".")


def build(values: Mapping[str, Any], context: Context) -> Method:
    """Return the method ``values["name"]`` with the rest of ``values`` as its options.

    Raises:
      UsageError: no such method, or an option that it does not have or that does not fit.
    """
    method: Method = _module(values["name"]).build(_options(values), context)
    # The setting overrides the method's own rule.
    if context.train.batch_statistics == "frozen":
        method = dataclasses.replace(method, frozen_statistics=lambda method_state, step: True)
    return method


def complete(settings: Settings) -> Settings:
    """Return the settings with the method's own choice in each field that was left open, ``None``.

    A method that differs from the others there has ``defaults(options)``, which returns sections of
    fields: ``{"model": {"head_bias": False}}``.

    >>> complete(Settings(method={"name": "fast"})).model.head_bias
    False
    """
    # A value that the user chose stays, even where the method would choose another.
    module = _module(settings.method["name"])
    defaults = module.defaults(_options(settings.method)) if hasattr(module, "defaults") else {}
    for name, fields in defaults.items():
        section = getattr(settings, name)
        left_open = {field: v for field, v in fields.items() if getattr(section, field) is None}
        settings = dataclasses.replace(
            settings, **{name: dataclasses.replace(section, **left_open)}
        )
    return settings


def momentum_weight(settings: Settings) -> float:
    """Return the weight with which a gradient enters the momentum of a run: 1 unless damped."""
    module = _module(settings.method["name"])
    if not hasattr(module, "momentum_weight"):
        return 1.0
    return module.momentum_weight(settings, _options(settings.method))


def _options(values: Mapping[str, Any]) -> Any:
    fields = {field: value for field, value in values.items() if field != "name"}
    return records.read(_module(values["name"]).Options, fields, "method")
