"""What a run was made with, ``manifest.json`` in its folder: data, software, devices."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from seal_jax import records
from seal_jax.core import files
from seal_jax.core.settings import Settings
from seal_jax.training import workdir as workdirs

MANIFEST = "manifest.json"
# Those whose version can change a result; seal_jax's own stands beside them.
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("tensorflow-datasets", "array-record", "pillow"),
)


class _Devices(TypedDict):
    kind: str
    count: int
    processes: int


class Entry(TypedDict):
    """One start of a run, the first or one on other software, devices or data."""

    step: int  # at which it started
    started: str  # UTC
    config: str  # sha256 of config.json
    python: str
    packages: Mapping[str, str]
    commit: str | None  # of this package, where it runs from a clone
    devices: _Devices
    data: Mapping[str, Any]


def write(workdir: Path, settings: Settings, dataset: Any, mesh: Any, step: int) -> None:
    """Add an entry to the manifest, unless all of it is as in the last one.

    Args:
      workdir: the run's folder, with its ``config.json``.
      settings: of the run.
      dataset: the :class:`seal_jax.data.Dataset` that it trains on.
      mesh: the mesh of its devices.
      step: at which it starts.

    Raises:
      UsageError: where the file is not a manifest, or cannot be written.
    """
    entry = _entry(workdir, settings, dataset, mesh, step)
    entries = read(workdir)
    if entries:
        last = entries[-1]
        same = (field for field in entry if field not in ("step", "started"))
        if all(entry.get(field) == last.get(field) for field in same):
            return
        # Data may have been moved. Nor is other data refused: the same images may have been prepared again.
        if {**entry["data"], "folder": None} != {**last["data"], "folder": None}:
            warnings.warn(
                f"the data is not that of the run's last start, see {workdir / MANIFEST}",
                stacklevel=2,
            )
    text = json.dumps({"entries": [*entries, entry]}, indent=2)
    files.write(workdir / MANIFEST, text + "\n")


def read(workdir: Path) -> list[Entry]:
    """Return the entries of a run's manifest, the newest last; none where there is no manifest.

    Raises:
      UsageError: where the file is not a manifest.
    """
    path = workdir / MANIFEST
    if not path.exists():  # runs of earlier versions have none
        return []
    schema = Mapping[str, list[Entry]]
    entries: list[Entry] = records.load(path, schema, "delete it").get("entries", [])
    return entries


def summary(workdir: Path) -> str | None:
    """Return what a run was last started on, such as ``jax 0.10.2, 8 x TPU v5e``; None if it is not known."""
    entries = read(workdir)
    if not entries:
        return None
    devices, packages = entries[-1]["devices"], entries[-1]["packages"]
    return f"jax {packages.get('jax')}, {devices['count']} x {devices['kind']}"


def _entry(workdir: Path, settings: Settings, dataset: Any, mesh: Any, step: int) -> Entry:
    import jax

    from seal_jax.training.experiment import augmentation_of

    spec = augmentation_of(settings, dataset.image_shape)
    origin = dataset.origin
    return {
        "step": step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": hashlib.sha256((workdir / workdirs.CONFIG).read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "packages": _versions(),
        "commit": _commit(),
        "devices": {
            "kind": mesh.devices.flat[0].device_kind,
            "count": int(mesh.devices.size),
            "processes": jax.process_count(),
        },
        "data": {
            "name": dataset.name,
            # Arrays that a program made are of no file.
            "version": origin.version if origin else None,
            "folder": origin.folder if origin else None,
            "checksum": origin.fingerprint if origin else None,
            "classes": dataset.num_classes,
            "images": {
                split: len(getattr(dataset, split)) for split in ("train", "validation", "test")
            },
            "normalisation": {"mean": list(spec.mean), "std": list(spec.std)},
        },
    }


def _versions() -> dict[str, str]:
    from seal_jax import __version__

    versions = {"seal_jax": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _commit() -> str | None:
    """Return the commit of the clone that this package is imported from; None where there is none."""
    root = Path(__file__).parents[2]
    # An environment inside another repository would be named by that one's commit.
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return result.stdout.strip()

    try:
        changes = " with changes" if git("status", "--porcelain", "--", "seal_jax") else ""
        return git("rev-parse", "HEAD") + changes
    # No git, a repository of another user, one without a commit.
    except (OSError, subprocess.SubprocessError):
        return None
