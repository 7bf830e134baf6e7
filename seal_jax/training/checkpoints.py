"""Checkpoints: written by Orbax in the background, verified by checksum when they are read.

A checkpoint is one Orbax step folder of two items: ``state``, the leaves of the state by name, and
``metadata``, a JSON file with the shape, dtype and checksum of every leaf and the caller's own
metadata. Orbax renames the folder into place once all of it is on disk. No pickles.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from seal_jax.errors import UsageError
from seal_jax.training import checkpoint_files as files
from seal_jax.training.checksums import checksums
from seal_jax.training.quiet import quiet_orbax


class CheckpointError(OSError):
    """A checkpoint could not be written: one line with the reason and the last good step."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` read.

    Attributes:
      step: the step it was saved at.
      state: a pytree like the abstract state, with its shapes, dtypes and shardings.
      metadata: the mapping that was given to `save`, as JSON gives it back.
    """

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The newest ``keep`` checkpoints of one run, in one folder.

    In a multi-process run every process makes one of these, on a folder all of them see, and calls
    the same methods in the same order. Reading writes nothing, so an evaluation may read the folder
    of a run in progress; the folder is created, and cleared of what a killed run left, by the first
    `save`. Use it as a context manager, or call `close`: a save under way when the interpreter
    exits is lost.

    Args:
      directory: the folder (local, or whatever ``etils.epath`` opens, such as ``gs://``).
      keep: how many checkpoints stay; the oldest goes when a newer one is complete.

    Raises:
      UsageError: ``keep`` is below 1, or the path has one of the characters ``*?[``.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise UsageError(f"keep={keep} leaves no checkpoint: use 1 or more")
        folder = os.fspath(directory)
        if glob.has_magic(folder):
            # Orbax would find no part of what it wrote, and leave checkpoints that nobody can read.
            raise UsageError(f"{folder} has one of the characters * ? [; name the folder without")
        self._folder = epath.Path(folder if "://" in folder else os.path.abspath(folder))
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._pending: int | None = None
        self._good: list[int] = []
        self._damaged: list[int] = []
        quiet_orbax()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints on disk, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(
            step.step for step in ocp.path.step.standard_name_format().find_all(self._folder)
        )

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Copy the state to the host and write it in the background.

        The state may be donated or changed as soon as this returns. It waits for the save before it.

        Args:
          step: later than every checkpoint in the folder.
          state: a pytree whose leaves are ``jax.Array``s of any shape and sharding.
          metadata: what JSON can hold.

        Raises:
          UsageError: the step is not the newest, a leaf is not an array, or JSON cannot hold the
            metadata.
          CheckpointError: this save, or the one before it, cannot be written.
        """
        leaves = files.named_leaves(state)
        try:
            extra = json.loads(json.dumps(metadata))
        except (TypeError, ValueError) as error:
            raise UsageError(f"checkpoint metadata must be plain JSON values: {error}") from None
        self.wait()
        if self._manager is None:
            self._attempt(step, self._open)
        if self._good and step <= self._good[-1]:
            raise UsageError(
                f"checkpoint {step} is not newer than {self._good[-1]} in {self._folder}: "
                "restore that one first, or use an empty folder"
            )
        record = {"leaves": files.description(leaves), "metadata": extra}
        for name, checksum in checksums(leaves).items():
            record["leaves"][name]["checksum"] = checksum
        # Orbax cannot write arrays without elements; `restore` makes them from the description.
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            metadata=ocp.args.JsonSave({**record, "digest": files.digest(record)}),
        )
        assert self._manager is not None
        manager = self._manager
        self._attempt(step, lambda: manager.save(step, args=args, force=True))
        self._pending = step

    def restore(self, abstract_state: Any) -> Restored | None:
        """Read the newest checkpoint whose contents are those that were saved.

        A damaged one is passed over with a warning and set aside, as ``damaged-<step>``, by the
        next `save`. The device count may differ from the one it was saved on.

        Args:
          abstract_state: a pytree of ``jax.ShapeDtypeStruct`` with shardings (or of arrays); leaves
            without a sharding come back on this process's first device.

        Returns:
          The step, state and metadata; None when the folder holds no checkpoint.

        Raises:
          UsageError: the checkpoint has other leaves, shapes or dtypes than the abstract state; or
            there are checkpoints and none can be read.
          CheckpointError: a save under way failed.
        """
        self.wait()
        wanted = files.named_leaves(abstract_state)
        damaged: dict[int, str] = {}
        for step in reversed(_same_everywhere(self.steps())):
            try:
                leaves, metadata = files.read(self._folder / str(step), wanted)
            except files.Damaged as error:
                damaged[step] = str(error)
                continue
            # Only now: had none been readable, the fault could be the machine's.
            self._damaged = list(damaged)
            for bad, why in damaged.items() if jax.process_index() == 0 else ():
                warnings.warn(
                    f"checkpoint {self._folder / str(bad)} is damaged ({why}): using step {step}; "
                    f"the next save moves it to damaged-{bad}",
                    stacklevel=2,
                )
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
            return Restored(step, state, metadata)
        if damaged:
            reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise UsageError(
                f"no checkpoint in {self._folder} can be read ({reasons}): "
                "restore the folder from a copy, or move it away to start anew"
            )
        return None

    def wait(self) -> None:
        """Block until the save under way is on disk; raises CheckpointError if it failed."""
        if self._manager is None or self._pending is None:
            return
        step, self._pending = self._pending, None
        self._attempt(step, self._manager.wait_until_finished)
        self._good.append(step)

    def close(self) -> None:
        """Wait for the save under way and stop; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            # The exception under way says more about the run than the lost checkpoint does.
            warnings.warn(str(error), stacklevel=2)

    def _open(self) -> None:
        """Set damaged checkpoints aside and start the manager, which clears unfinished ones."""
        if jax.process_index() == 0:
            for step in self._damaged:
                _set_aside(self._folder / str(step))
        if jax.process_count() > 1:
            # Every process lists the folder in what follows.
            multihost_utils.sync_global_devices("seal_jax: damaged checkpoints set aside")
        self._damaged = []
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            cleanup_tmp_directories=True,
            # The step list is all we need; a damaged metadata file must not stop the start.
            lightweight_initialize=True,
            # When the folder cannot be made the asynchronous way waits 20 minutes to say so.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._good = _same_everywhere(self.steps())

    def _attempt(self, step: int, action: Callable[[], Any]) -> None:
        """Run ``action``, part of saving ``step``; turn its failure into one clear line."""
        try:
            action()
        except Exception as error:
            good = self.steps()
            if self._manager is not None:
                # The failed save had already taken the oldest step off Orbax's list, not the disk.
                self._manager.reload()
            if jax.process_index() == 0 and self._folder.is_dir():
                for part in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(part, ignore_errors=True)
            last = f"the last good one is step {good[-1]}" if good else "there is no earlier one"
            raise CheckpointError(
                f"checkpoint {step} was not written to {self._folder}: {files.reason(error)}; {last}"
            ) from error


def read_leaves(
    directory: str | os.PathLike[str], *, step: int | None = None
) -> dict[str, np.ndarray] | None:
    """Return the leaves of a checkpoint by name, in host memory, verified.

    It needs no abstract state, so another experiment may take from them what it can use. Random
    keys are left out.

    Args:
      directory: the folder of the checkpoints.
      step: which; by default the newest that can be read.

    Returns:
      The leaves; None when the folder holds no checkpoint.

    Raises:
      UsageError: there are checkpoints and none can be read, or none of that step.
    """
    steps = _same_everywhere(Checkpoints(directory).steps())
    if step is not None and step not in steps:
        raise UsageError(
            f"{directory} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}"
        )
    damaged: dict[int, str] = {}
    for each in reversed(steps if step is None else [step]):
        folder = epath.Path(os.path.abspath(os.fspath(directory))) / str(each)
        try:
            record = files.read_record(folder)
            wanted: dict[str, files.Leaf] = {
                name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
                for name, leaf in record["leaves"].items()
                if not leaf["dtype"].startswith("key<")
            }
            leaves, _ = files.read(folder, wanted, partly=True)
        except files.Damaged as error:
            damaged[each] = str(error)
            continue
        return dict(zip(wanted, jax.device_get(leaves), strict=True))
    if damaged:
        reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        if step is not None:
            others = ", ".join(str(each) for each in steps if each != step) or "none"
            raise UsageError(
                f"the checkpoint of step {step} in {directory} cannot be read ({damaged[step]}); "
                f"take another: {others}"
            )
        raise UsageError(f"no checkpoint in {directory} can be read ({reasons})")
    return None


def _same_everywhere(steps: list[int]) -> list[int]:
    """Return the first process's list: a network file system can show each another one."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array([*steps, 0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(padded).tolist() if count else []


def _set_aside(folder: epath.Path) -> None:
    """Rename a step folder so that Orbax no longer counts it; earlier ones stay."""
    name, number = f"damaged-{folder.name}", 1
    while (folder.parent / name).exists():
        number += 1
        name = f"damaged-{folder.name}-{number}"
    folder.rename(folder.parent / name)
