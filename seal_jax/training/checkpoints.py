"""Checkpoints: written by Orbax in the background, verified by checksum when they are read.

A checkpoint is one Orbax step folder of two items: ``state``, the leaves of the state by name, and
``metadata``, a JSON file with the shape, dtype and checksum of every leaf and the caller's own
metadata. Orbax renames the folder into place once all of it is on disk. No pickles.
"""

from __future__ import annotations

import functools
import gc
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from seal_jax import paths, records
from seal_jax.core import files
from seal_jax.core.state import EARLIER_FIELDS
from seal_jax.errors import UsageError, check_integer

Leaf = jax.Array | jax.ShapeDtypeStruct


class CheckpointError(OSError):
    """A checkpoint could not be written: one line with the reason and the last good step."""


class Restored(NamedTuple):
    """What was saved at a step: the state, and the metadata as JSON gives it back."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The newest ``keep`` checkpoints of one run, in one folder.

    In a multi-process run every process makes one of these, on a folder all of them see, and calls
    the same methods in the same order. Reading writes nothing, so an evaluation may read the folder
    of a run in progress; the folder is created, and cleared of what a killed run left, by the first
    `save`. Use it as a context manager, or call `close`: a save under way when the interpreter
    exits is lost.

    Args:
      directory: the folder, of the file system or in a bucket, ``gs://``.
      keep: how many checkpoints stay; the oldest goes when a newer one is complete.

    Raises:
      UsageError: ``keep`` is below 1, or the path has one of the characters ``*?[``.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3) -> None:
        check_integer("keep", keep, 1)
        folder = os.fspath(directory)
        if glob.has_magic(folder):
            # Orbax would find no part of what it wrote, and leave checkpoints that nobody can read.
            raise UsageError(f"{folder} has one of the characters * ? [; name the folder without")
        path = files.as_path(folder)
        # Absolute, so that it stays the same folder should the working directory change.
        self._folder = epath.Path(path if files.is_remote(folder) else path.absolute())
        self._keep = keep
        # Made by the first `save`: the manager creates the folder and clears it, which reading must not.
        self._manager: ocp.CheckpointManager | None = None
        self._pending: int | None = None  # the step whose save is under way
        self._last = -1  # the step of the newest complete checkpoint
        self._damaged: list[int] = []
        _quiet_orbax()

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
        leaves = _named_leaves(state)
        try:
            # As it will be read back (a tuple as a list, for example), since the digest is computed from that.
            extra = json.loads(json.dumps(metadata))
        except (TypeError, ValueError) as error:
            raise UsageError(f"checkpoint metadata must be plain JSON values: {error}") from None
        self.wait()
        if self._manager is None:
            self._attempt(step, self._open)
        assert self._manager is not None
        manager = self._manager
        if step <= self._last:
            raise UsageError(
                f"checkpoint {step} is not newer than {self._last} in {self._folder}: "
                "restore that one first, or use an empty folder"
            )
        sums, description = checksums(leaves), _description(leaves)
        described = {name: {**leaf, "checksum": sums[name]} for name, leaf in description.items()}
        record = {"leaves": described, "metadata": extra}
        # Orbax cannot write arrays without elements; `restore` makes them from the description.
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            metadata=ocp.args.JsonSave({**record, "digest": _digest(record)}),
        )
        self._attempt(step, lambda: manager.save(step, args=args, force=True))
        self._pending = step

    def restore(self, abstract_state: Any) -> Restored | None:
        """Read the newest checkpoint whose contents are those that were saved.

        A damaged one is passed over with a warning and set aside, as ``damaged-<step>``, by the
        next `save`. The device count may differ from the one it was saved on. Returns None when the
        folder holds no checkpoint.

        Args:
          abstract_state: a pytree of ``jax.ShapeDtypeStruct`` with shardings (or of arrays); leaves
            without a sharding come back on this process's first device.

        Raises:
          UsageError: the checkpoint has other leaves, shapes or dtypes than the abstract state; or
            there are checkpoints and none can be read.
          CheckpointError: a save under way failed.
        """
        self.wait()
        wanted = _named_leaves(abstract_state)
        step, contents, damaged = self.newest(lambda folder: _read(folder, wanted))
        if step is None:
            if damaged:
                raise UsageError(
                    f"no checkpoint in {self._folder} can be read ({_listed(damaged)}): "
                    "restore the folder from a copy, or move it away to start anew"
                )
            return None
        # Only now: had none been readable, the fault could be the machine's.
        self._damaged = list(damaged)
        for bad, why in damaged.items() if jax.process_index() == 0 else ():
            warnings.warn(
                f"checkpoint {self._folder / str(bad)} is damaged ({why}): using step {step}; "
                f"the next save moves it to damaged-{bad}",
                stacklevel=2,
            )
        leaves, metadata = contents
        return Restored(
            step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), metadata
        )

    def abstract_leaves(self) -> dict[str, Leaf]:
        """Return shapes and dtypes of the leaves by name; {} where no checkpoint can be read."""
        return self.newest(lambda folder: _abstract_leaves(_read_record(folder)))[1] or {}

    def newest(
        self, read: Callable[[epath.Path], Any], steps: list[int] | None = None
    ) -> tuple[int | None, Any, dict[int, str]]:
        """Return the newest readable step, what ``read`` made of it, and why newer ones failed."""
        damaged: dict[int, str] = {}
        for step in reversed(same_everywhere(self.steps()) if steps is None else steps):
            try:
                return step, read(self._folder / str(step)), damaged
            except _Damaged as error:
                damaged[step] = str(error)
        return None, None, damaged

    def wait(self) -> None:
        """Block until the save under way is on disk; raises CheckpointError if it failed."""
        if self._manager is None or self._pending is None:
            return
        # Cleared first: `close` must not report a failed save a second time.
        step, self._pending = self._pending, None
        self._attempt(step, self._manager.wait_until_finished)
        self._last = step

    def close(self) -> None:
        """Wait for the save under way and stop; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

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
        self._last = max(same_everywhere(self.steps()), default=-1)

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
                # Orbax leaves the unfinished folder until the next start, on a disk that may be full.
                for part in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    if files.is_remote(part):
                        part.rmtree()
                    else:
                        shutil.rmtree(part, ignore_errors=True)
            last = f"the last good one is step {good[-1]}" if good else "there is no earlier one"
            raise CheckpointError(
                f"checkpoint {step} was not written to {self._folder}: {_reason(error)}; {last}"
            ) from error


def read_leaves(
    directory: str | os.PathLike[str], *, step: int | None = None
) -> dict[str, np.ndarray] | None:
    """Return the leaves of a checkpoint by name, in host memory, verified.

    It needs no abstract state, so another experiment may take from them what it can use. Random
    keys are left out. Without ``step`` it is the newest checkpoint that can be read, and None where
    the folder holds no checkpoint.

    Raises:
      UsageError: there are checkpoints and none can be read, or none of that step.
    """
    checkpoints = Checkpoints(directory)
    steps = same_everywhere(checkpoints.steps())
    if step is not None and step not in steps:
        raise UsageError(
            f"{directory} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}"
        )

    def read(folder: epath.Path) -> dict[str, np.ndarray]:
        wanted = _abstract_leaves(_read_record(folder))
        return dict(zip(wanted, jax.device_get(_read(folder, wanted, partly=True)[0]), strict=True))

    _, leaves, damaged = checkpoints.newest(read, steps if step is None else [step])
    if leaves is None and step is not None:
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        raise UsageError(
            f"the checkpoint of step {step} in {directory} cannot be read ({damaged[step]}); "
            f"take another: {others}"
        )
    if leaves is None and damaged:
        raise UsageError(f"no checkpoint in {directory} can be read ({_listed(damaged)})")
    return leaves


def same_everywhere(steps: list[int]) -> list[int]:
    """Return the first process's list: a network file system can show each another one."""
    if jax.process_count() == 1:
        return steps
    # Broadcast arrays must have one shape in all processes, so the length goes first. What the others pass then is
    # ignored and only has to have that length.
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array(steps, np.int32), count)
    return multihost_utils.broadcast_one_to_all(padded).tolist() if count else []


def _set_aside(folder: epath.Path) -> None:
    """Rename a step folder so that Orbax no longer counts it; earlier ones stay."""
    name, number = f"damaged-{folder.name}", 1
    while (folder.parent / name).exists():
        number += 1
        name = f"damaged-{folder.name}-{number}"
    folder.rename(folder.parent / name)


class _Damaged(Exception):
    """A checkpoint cannot be read; the text says why."""


def _read(
    folder: epath.Path, wanted: dict[str, Leaf], *, partly: bool = False
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Return the leaves in the order of ``wanted``, and the metadata.

    Raises:
      _Damaged: what is there is not what was saved.
      UsageError: the checkpoint has other leaves; more of them than wanted only unless ``partly``.
    """
    record = _read_record(folder)
    # Taken out: what is left is compared with shapes and dtypes only.
    saved = {name: leaf.pop("checksum") for name, leaf in record["leaves"].items()}
    # From here on the description is known to be whole, so a difference is another model.
    if partly:
        record["leaves"] = {name: record["leaves"][name] for name in wanted}
    _same_leaves(folder, record["leaves"], _description(wanted))
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
        for name, leaf in wanted.items()
    }
    target = {name: leaf for name, leaf in structs.items() if leaf.size}
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    # Partial: empty arrays were not written, and `partly` wants fewer than there are.
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    # Not by a CheckpointManager, which would clear unfinished saves of a run in progress.
    handler = ocp.PyTreeCheckpointHandler()
    read = _on_every_process(lambda: handler.restore(folder / "state", args=args))
    arrays = {
        name: read[name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in structs.items()
    }
    wrong = [name for name, checksum in checksums(arrays).items() if checksum != saved[name]]
    if wrong:
        raise _Damaged(f"{_some(wrong)}: not the values that were saved")
    return list(arrays.values()), record["metadata"]


def _read_record(folder: epath.Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: ``leaves`` by name, and ``metadata``."""

    def read_it() -> dict[str, Any]:
        # Item `metadata`, in which Orbax's JSON handler writes a file of the same name.
        text = (folder / "metadata" / "metadata").read_text()
        record: dict[str, Any] = records.parse(text, _Record, finite=False)
        if record.pop("digest") != _digest(record):
            raise ValueError("metadata is not what was saved")
        return record

    return _on_every_process(read_it)


class _Leaf(TypedDict):
    shape: list[int]
    dtype: str
    checksum: int


class _Record(TypedDict):
    leaves: Mapping[str, _Leaf]
    metadata: Mapping[str, Any]
    digest: str


def _on_every_process(read: Callable[[], Any]) -> Any:
    """Return ``read()``, or raise `_Damaged` on every process when it failed on any."""
    result, why = None, ""
    try:
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the machine's trouble, not the checkpoint's
    except Exception as error:
        why = _reason(error)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(bool(why)))
        why = why or (f"process {failed.argmax()} cannot read it" if failed.any() else "")
    if why:
        # Where Orbax fails it leaves coroutines that it did not await. Python warns of them when they are collected,
        # which would be at any moment of the run.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        raise _Damaged(why)
    return result


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by name, in tree order; UsageError for what is not an array."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = paths.name(path)
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise UsageError(
                f"state leaf {name} is a {type(leaf).__name__}: make it an array with jnp.array"
            )
        if name in leaves:
            raise UsageError(f"two leaves of the state are named {name}: rename one")
        leaves[name] = leaf
    return leaves


def _abstract_leaves(record: Mapping[str, Any]) -> dict[str, Leaf]:
    """Return shapes and dtypes by name, without random keys, from what a checkpoint says of itself."""
    return {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
        for name, leaf in record["leaves"].items()
        if not leaf["dtype"].startswith("key<")
    }


def _description(leaves: Mapping[str, Leaf]) -> dict[str, dict[str, Any]]:
    """Return shape and dtype of every leaf as JSON holds them."""
    return {
        name: {"shape": [*leaf.shape], "dtype": str(leaf.dtype)} for name, leaf in leaves.items()
    }


def _same_leaves(folder: epath.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a UsageError that names the first leaves that differ."""

    def show(leaf: dict[str, Any] | None) -> str:
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"

    different = [
        f"{name} is {show(saved.get(name))} there and {show(wanted.get(name))} here"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]
    # An earlier version's checkpoint is no other model, and needs other advice.
    earlier = [name for name in saved if name.partition("/")[0] in EARLIER_FIELDS]
    if different and earlier:
        raise UsageError(
            f"checkpoint {folder} was written by an earlier version of seal_jax (it has "
            f"{_some(earlier)}) and cannot be resumed: train again into another folder, or go on "
            "with that version; its weights can still be evaluated and be started from"
        )
    if different:
        raise UsageError(
            f"checkpoint {folder} is of another model or method: {_some(different)}: "
            "use the config it was saved with, or another folder"
        )


def _listed(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"{step}: {why}" for step, why in damaged.items())


def _some(items: list[str], count: int = 3) -> str:
    rest = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + rest


def _digest(record: Mapping[str, Any]) -> str:
    """Return a checksum of a checkpoint's description."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Return one short line for what Orbax, TensorStore or the system said."""
    # TensorStore's messages are long; they have the system's error number in them.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """Return a checksum of each leaf, computed on its devices: one small array leaves them.

    All leaves are on the same devices.
    """
    arrays = list(leaves.values())
    # Two programs with collectives at once, the last training step and this, hang host devices.
    jax.block_until_ready(arrays)
    sums = _checksum_program(arrays)
    if not sums.is_fully_addressable:
        sums = multihost_utils.process_allgather(sums, tiled=True)
    return dict(zip(leaves, np.asarray(sums).tolist(), strict=True))


@jax.jit
def _checksum_program(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: jax.Array) -> jax.Array:
    """Return the uint32 sum, mod 2³², of every word scrambled with its position.

    Integer sums do not depend on their order, so the value is the same on any sharding and device
    count. Scrambling (the finaliser of MurmurHash3, a bijection) and not a plain weighted sum:
    there two flipped sign bits, 2³¹(w₁ + w₂) with odd weights, would cancel.
    """
    word = _words(leaf)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(word.ndim)):
        # One iota an axis, not a flat index: reshaping would gather a sharded array.
        index = jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride *= word.shape[axis]
    word = word ^ (position * jnp.uint32(0x9E3779B1))
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Return the bits of the leaf as uint32, with a trailing axis where an element needs two."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        # XLA casts no bits between complex and real types.
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype.itemsize <= 4 and not jnp.issubdtype(leaf.dtype, jnp.floating):
        # Bools and integers: converting them loses nothing, and negative ones wrap.
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


# Part of the path of Orbax's source files.
_ORBAX = os.path.join("orbax", "checkpoint", "")


def _quiet_orbax() -> None:
    """Keep Orbax's log lines off stderr; ``absl.logging.set_verbosity("info")`` shows them.

    What it warns of in a normal run is normal. When one array cannot be read or written Orbax closes
    its event loop under the others, and each of those complains; the one error or warning that this
    module gives instead would be lost among hundreds of lines.
    """
    # `addFilter` adds the same filter once only, so this may run again.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_not_from_orbax)
    outer = sys.unraisablehook
    # Once, however many checkpoints are opened; a hook that others set is kept and called.
    if getattr(outer, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, outer)


def _wanted_on_stderr(source: str) -> bool:
    verbose = absl_logging.get_verbosity() > absl_logging.WARNING
    return verbose or not (_ORBAX in source or "tensorstore" in source)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return _wanted_on_stderr(record.pathname if record.name == "absl" else record.getMessage())


def _unraisable(outer: Callable[[Any], Any], unraisable: Any) -> None:
    """Pass on what is neither a coroutine of Orbax's nor TensorStore's answer to a closed loop."""
    code = getattr(unraisable.object, "cr_code", None)
    closed = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
    if _wanted_on_stderr("tensorstore" if closed else code.co_filename if code else ""):
        outer(unraisable)
