"""A study in one file: the images, and the settings of every variant of a config.

Who reads it needs neither what read the images nor what read the config: no TFDS, no ml_collections.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from seal_jax import data, records
from seal_jax.core import files
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.data.dataset import Origin
from seal_jax.errors import UsageError
from seal_jax.training import experiment as experiments

MOST_BYTES = 50_000_000
# The settings of `data` by which images are read. All others are applied to what was read, by each variant for itself.
SOURCE = (
    *("name", "data_dir", "train_split", "test_split", "label"),
    *("image_size", "corrupt", "channels"),
)


class Study(NamedTuple):
    """The variants of a config, and the data set that all of them are of, without a validation split."""

    variants: dict[str, Settings]
    source: data.Dataset


class _Header(TypedDict):
    name: str
    class_names: list[str]
    version: str
    fingerprint: str
    variants: Mapping[str, Mapping[str, Any]]


def pack(config: str, overrides: Sequence[str], output: Path) -> str:
    """Write the study of a config, and return a line about it.

    Raises:
      UsageError: settings or data that cannot be used, variants of different images, or too large a file.
    """
    from seal_jax.cli import configs

    names = configs.variants(config)
    if not names:
        raise UsageError(f"--config={config} declares no VARIANTS; a study compares several")
    variants = {name: configs.load(f"{config}:{name}", overrides) for name in names}
    for field in SOURCE:
        values = {getattr(settings.data, field) for settings in variants.values()}
        if len(values) > 1:
            raise UsageError(
                f"data.{field} differs between the variants of {config}: one file holds one data set"
            )
    fields = next(iter(variants.values())).data
    # Decoded, whatever the memory of this machine is.
    source = experiments.load_source(dataclasses.replace(fields, placement="device"))
    content = _content(Study(variants, source))
    if len(content) > MOST_BYTES:
        raise UsageError(
            f"{output} would have {len(content) / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}: take less by "
            "--config.data.train_split=train[:N%] or --config.data.image_size"
        )
    files.write(output, content)
    images = f"{len(source.train):,} + {len(source.test):,} images of {source.name}"
    return f"{output}: {len(variants)} variants, {images}, {len(content) / 1e6:.1f} MB"


def _content(study: Study) -> bytes:
    source = study.source
    origin = source.origin or Origin("", "", "")
    header: _Header = {
        "name": source.name,
        "class_names": list(source.class_names),
        "version": origin.version,
        "fingerprint": origin.fingerprint,
        "variants": {
            name: dataclasses.asdict(settings) for name, settings in study.variants.items()
        },
    }
    arrays: dict[str, np.ndarray] = {"header": np.array(json.dumps(header))}
    for split in ("train", "test"):
        images, labels = getattr(source, split).images, getattr(source, split).labels
        # Differences of neighbours, modulo 256: photographs then take five sixths of the bytes.
        differences = images.copy()
        differences[:, :, 1:] -= images[:, :, :-1]
        arrays |= {f"{split}_images": differences, f"{split}_labels": labels}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def load(path: Path) -> Study:
    """Read a packed study.

    Raises:
      UsageError: the file cannot be read, or is not one.
    """
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
        header: _Header = records.parse(str(arrays["header"]), _Header)
        # By `read`, so that settings which this version lacks are an error that names them.
        variants = {
            name: settings_lib.read(Settings, values) for name, values in header["variants"].items()
        }
        # uint8 in, uint8 out: the sums are modulo 256 as the differences are.
        splits = [
            (
                np.cumsum(arrays[f"{split}_images"], axis=2, dtype=np.uint8),
                arrays[f"{split}_labels"],
            )
            for split in ("train", "test")
        ]
        source = data.from_arrays(
            *splits,
            name=header["name"],
            class_names=header["class_names"],
            validation_fraction=0.0,
        )
    except (
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        zipfile.BadZipFile,
        UsageError,
    ) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"--study={path} cannot be read: {reason}; write it by `pack`") from None
    origin = Origin(header["version"], str(path), header["fingerprint"])
    return Study(variants, dataclasses.replace(source, origin=origin))
