"""What is launched: the commands of a training, or of each variant of a sweep, checked before anything costs money."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from seal_jax import methods
from seal_jax.cli import configs, main
from seal_jax.core import mesh
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError
from seal_jax.training import loggers

# Of queued resources, JobSets and their pods (63 characters with what is added to it).
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class Job(NamedTuple):
    """One training on machines of its own."""

    name: str
    words: tuple[str, ...]  # the arguments of `python -m seal_jax`
    workdir: str
    config: str  # its file, without a variant
    settings: tuple[
        Settings, ...
    ]  # of all trainings in it, which differ for a sweep that is one job


def check_name(name: str) -> None:
    """Raise a ``UsageError`` unless all targets take the name."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name: use up to 40 small letters, digits and -, beginning with a letter"
        )


def jobs(name: str, words: Sequence[str], *, one_job: bool = False) -> list[Job]:
    """Return the jobs of a command line, ``train ...`` or ``sweep ...``.

    A sweep becomes a job for each variant, each with the folder that ``sweep`` itself would give it;
    ``one_job`` leaves it as it is. The config and its settings are read, so that a wrong one is found
    here and not on the machines.

    Raises:
      UsageError: the command, its config or a setting is wrong.
    """
    check_name(name)
    if not words or words[0] not in ("train", "sweep"):
        raise UsageError(
            "after -- comes what is launched: train --config=FILE[:VARIANT] --workdir=DIR, or sweep"
        )
    options, overrides = main.parse(main.parser(evaluate=False), words)
    if options.coordinator or options.processes is not None or options.process is not None:
        raise UsageError("--coordinator, --processes and --process are given by the launcher")
    path = PurePosixPath(options.config)
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(
            f"--config={options.config} must be a path within the clone, such as configs/digits.py"
        )
    workdir = options.workdir.rstrip("/")
    file = configs.split(options.config)[0]
    if words[0] == "train":
        return [Job(name, tuple(words), workdir, file, (_settings(options.config, overrides),))]
    variants = configs.variants(options.config)
    if not variants:
        raise UsageError(f"--config={options.config} declares no VARIANTS; use train")
    array = []
    for variant in variants:
        config = f"{options.config}:{variant}"
        settings = _settings(config, overrides)
        if settings.train.pretrained.startswith("..") and not one_job:
            raise UsageError(
                f"{config} starts from another run (train.pretrained = {settings.train.pretrained!r}), "
                "so the variants cannot run side by side; add --one-job"
            )
        folder = f"{workdir}/{variant}"
        train = ("train", f"--config={config}", f"--workdir={folder}", *overrides)
        array.append(
            Job(f"{name}-{variant.lower().replace('_', '-')}", train, folder, file, (settings,))
        )
    if one_job:
        return [Job(name, tuple(words), workdir, file, tuple(job.settings[0] for job in array))]
    for job in array:
        check_name(job.name)
    return array


def _settings(config: str, overrides: Sequence[str]) -> Settings:
    settings = methods.complete(configs.load(config, overrides))
    loggers.names(settings)
    return settings


def check_devices(array: Sequence[Job], devices: int) -> None:
    """Raise a ``UsageError`` unless seeds and batches of all trainings can be divided over the devices."""
    for job in array:
        for settings in job.settings:
            try:
                mesh.layout(settings, devices)
            except UsageError as error:
                raise UsageError(f"{job.name} on {devices} devices: {error}") from None


def check_bucket(array: Sequence[Job]) -> None:
    """Raise a ``UsageError`` unless the runs' folders are in a bucket, which outlives the machines."""
    folder = root(array)
    if not re.fullmatch(r"gs://[^/]+/.+", folder):
        raise UsageError(
            f"--workdir={folder} must be in a bucket, gs://BUCKET/FOLDER: it outlives the machines"
        )


def check_paths(array: Sequence[Job]) -> None:
    """Raise a ``UsageError`` for data or weights that are on the disk of this machine."""
    for job in array:
        for settings in job.settings:
            for field, value in (
                ("data.data_dir", settings.data.data_dir),
                ("train.pretrained", settings.train.pretrained),
            ):
                if value.startswith(("/", "~")):
                    raise UsageError(
                        f"{field} = {value!r} is not on the machines of {job.name}: give a folder in a bucket, "
                        "gs://..., or prepared data with --data"
                    )


def root(array: Sequence[Job]) -> str:
    """Return the folder that the command names: of the run, or of the sweep."""
    return array[0].workdir.rpartition("/")[0] if len(array) > 1 else array[0].workdir


def compare(array: Sequence[Job]) -> str:
    """Return the command that collects the runs of an array."""
    folders = [job.workdir for job in array]
    return shlex.join(["python", "-m", "seal_jax", "compare", *folders, f"--output={root(array)}"])


def folder_beside(job: Job) -> str:
    """Return where the launcher keeps its own files of a run: beside the run's folder."""
    return f"{job.workdir}.launch"
