"""Turns config files into settings: the only place, with ``configs/``, that knows ml_collections."""

from __future__ import annotations

import dataclasses
import importlib.util
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from seal_jax import methods, records
from seal_jax.core import files
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError, nearest, shown
from seal_jax.records import Scalar
from seal_jax.schedules import PRESETS


def base(method: str = "normal") -> ConfigDict:
    """Return the default settings with the default options of ``method``, for a config file to change.

    >>> config = base("seal")
    >>> config.method.ascent_scale, config.train.batch_size
    (0.01, 32)
    """
    config = ConfigDict(dataclasses.asdict(Settings()))
    config.method = ConfigDict({"name": method, **dataclasses.asdict(methods.options(method))})
    # ml_collections takes the type of a field from its value, and None has none: a placeholder keeps it.
    for section, fields in _optional_fields(method).items():
        for field, kind in fields.items():
            config[section][field] = config_dict.placeholder(kind)
    return config


def _optional_fields(method: str) -> dict[str, dict[str, type]]:
    """Return the fields that may be ``None``, by section, with the type that they have otherwise."""
    kinds = {
        "model": settings_lib.Model,
        "train": settings_lib.Train,
        "method": type(methods.options(method)),
    }
    return {section: settings_lib.optional_fields(kind) for section, kind in kinds.items()}


def use_preset(config: ConfigDict, name: str) -> None:
    """Set optimizer and training length to a preset of the SEAL paper; see ``seal_jax.PRESETS``.

    >>> config = base("seal")
    >>> use_preset(config, "reference")
    >>> config.optimizer.learning_rate, config.method.ascent_weight_decay_factor
    (0.1, 0.0)
    """
    preset = PRESETS[name]
    for field in ("learning_rate", "warmup_epochs", "momentum", "weight_decay", "label_smoothing"):
        config.optimizer[field] = getattr(preset, field)
    for field in ("batch_size", "epochs_per_generation", "generations"):
        config.train[field] = getattr(preset, field)
    # A preset holds for all methods of the paper; these two fields are SEAL's.
    if config.method.name == "seal":
        config.method.ascent_scale = preset.ascent_scale
        config.method.ascent_weight_decay_factor = preset.ascent_weight_decay_factor


def set_fields(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Set settings named as in a :class:`seal_jax.methods.Variant`: without a dot, an option of the method.

    >>> config = base("seal")
    >>> set_fields(config, {"fit": "freeze", "train.seeds": 4})
    >>> config.method.fit, config.train.seeds
    ('freeze', 4)
    """
    config.update_from_flattened_dict(
        {name if "." in name else f"method.{name}": value for name, value in fields.items()}
    )


def load(config: str, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a config file with overrides from the command line.

    Args:
      config: ``path/to/file.py`` or ``path/to/file.py:variant``; the file has ``get_config``.
      overrides: strings ``--config.section.field=value``.

    Raises:
      UsageError: there is no such file or variant, the file raises an error, or an override names no
        setting or has a value of another type.
    """
    path, variant = split(config)
    module = load_module(path)
    known = _variants(path, module)
    # Before `get_config` is called, which may treat any unknown name as its default.
    if variant and variant not in known:
        some = f"one of {', '.join(known)}" if known else "left out: the file has none"
        raise UsageError(f"--config={config}: the variant must be {some}{nearest(variant, known)}")
    if not hasattr(module, "get_config"):
        raise UsageError(f"--config={path} has no function get_config")
    try:
        values = module.get_config(variant) if variant else module.get_config()
    except Exception as error:
        raise _in_file(path, error) from error
    if not isinstance(values, ConfigDict):
        raise UsageError(f"--config={path}: get_config must return a ConfigDict, see configs/")
    # Checked here and not by `read` below, since overrides are looked up in the sections before.
    for section in dataclasses.fields(Settings):
        if not isinstance(values.get(section.name, ConfigDict()), ConfigDict):
            value = shown(values[section.name])
            raise UsageError(
                f"--config={path}: {section.name} = {value} must be a section of settings"
            )
    for override in overrides:
        _override(values, override)
    return settings_lib.read(Settings, values.to_dict())


def split(config: str) -> tuple[str, str]:
    """Return the file and the variant, "" where there is none.

    >>> split("configs/digits.py:seal"), split("gs://bucket/own.py")
    (('configs/digits.py', 'seal'), ('gs://bucket/own.py', ''))
    """
    bucket = files.BUCKET if files.is_remote(config) else ""
    path, _, variant = config.removeprefix(bucket).partition(":")
    return bucket + path, variant


def variants(config: str) -> tuple[str, ...]:
    """Return the variants that a config file declares in ``VARIANTS``."""
    path = split(config)[0]
    return _variants(path, load_module(path))


def _variants(path: str, module: types.ModuleType) -> tuple[str, ...]:
    names = getattr(module, "VARIANTS", ())
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"--config={path}: VARIANTS = {shown(names)} must be a tuple of names")
    return tuple(names)


def load_module(name: str) -> types.ModuleType:
    """Return the module of a config file, after running it."""
    path = files.as_path(name)
    # The spec is None for a name that does not end in .py.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"--config={path} is not a Python file; the configs are in configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        # Not by the spec's loader: it caches bytecode in __pycache__ by time in seconds and size, so an edit
        # within a second could run the old file.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except SyntaxError as error:
        raise UsageError(f"--config={path}, line {error.lineno}: {error.msg}") from None
    # `main.exit_code` says which package to install.
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise _in_file(path, error) from error
    return module


def _in_file(path: Any, error: Exception) -> UsageError:
    """Return an error of one line that says where in a config file another arose, and what it was."""
    # The innermost line of the config file, not of a function that it calls.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(path)]
    kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return UsageError(f"--config={path}{lines[-1] if lines else ''}: {kind}{error}")


def _override(config: ConfigDict, override: str) -> None:
    """Apply ``--config.section.field=value``, with the value read as the type of the field."""
    # Walked field by field, so that an error can name near fields and settings that were renamed.
    path, _, text = override.removeprefix("--config.").partition("=")
    section, _, argument = path.rpartition(".")
    if section == "optimizer.args" and "args" in config.get("optimizer", ()):
        # Whatever arguments the optimizer has, and its name may follow: the settings check them.
        config.optimizer.args[argument] = _scalar(text)
        return
    node: Any = config
    for field in path.split("."):
        if not isinstance(node, ConfigDict) or field not in node:
            fields = list(node) if isinstance(node, ConfigDict) else []
            raise UsageError(
                f"{path} is not a setting{records.renamed(path) or nearest(field, fields)}"
            )
        kind, node = node.get_type(field), node.get_ref(field).get()
    if isinstance(node, ConfigDict):
        raise UsageError(f"{path} is a section; set one of {', '.join(node) or 'its fields'}")
    value: Any = text
    # Only where the field allows it: elsewhere "none" is text, or an error.
    if text.lower() == "none" and _may_be_none(config, path):
        value = None
    elif kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{path} = {text!r} must be true or false")
        value = text.lower() == "true"
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(f"{path} = {text!r} must be of type {kind.__name__}") from None
    config.update_from_flattened_dict({path: value})


def _scalar(text: str) -> Scalar:
    """Return text as the number, bool or None that it looks like, or as text.

    >>> [_scalar(text) for text in ("0.99", "1e-8", "5", "true", "none", "bfloat16")]
    [0.99, 1e-08, 5, True, None, 'bfloat16']
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _may_be_none(config: ConfigDict, path: str) -> bool:
    section, _, field = path.partition(".")
    return field in _optional_fields(config.get("method", {}).get("name")).get(section, {})
