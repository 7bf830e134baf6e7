"""The files of one checkpoint: what it says of its leaves, and how they are read and verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from seal_jax import paths, records
from seal_jax.errors import UsageError
from seal_jax.training.checksums import checksums

Leaf = jax.Array | jax.ShapeDtypeStruct


class Damaged(Exception):
    """A checkpoint cannot be read; the text says why."""


def read(
    folder: epath.Path, wanted: dict[str, Leaf], *, partly: bool = False
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Return the leaves in the order of ``wanted``, and the metadata.

    Raises:
      Damaged: what is there is not what was saved.
      UsageError: the checkpoint has other leaves; more of them than wanted only unless ``partly``.
    """

    def read_arrays() -> dict[str, jax.Array]:
        target = {name: leaf for name, leaf in structs.items() if leaf.size}
        args = ocp.args.StandardRestore(target)
        handler = ocp.StandardCheckpointHandler()
        if not partly:
            return handler.restore(folder / "state", args=args)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        some = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=some)

    record = read_record(folder)
    saved = {name: leaf.pop("checksum") for name, leaf in record["leaves"].items()}
    # From here on the description is known to be whole, so a difference is another model.
    if partly:
        record["leaves"] = {name: record["leaves"][name] for name in wanted}
    _same_leaves(folder, record["leaves"], description(wanted))
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
        for name, leaf in wanted.items()
    }
    arrays = _on_every_process(read_arrays)
    for name, leaf in structs.items():
        if not leaf.size:
            arrays[name] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    wrong = [name for name, checksum in checksums(arrays).items() if checksum != saved[name]]
    if wrong:
        raise Damaged(f"{_some(wrong)}: not the values that were saved")
    return [arrays[name] for name in wanted], record["metadata"]


def read_record(folder: epath.Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: ``leaves`` by name, and ``metadata``."""

    def read_it() -> dict[str, Any]:
        text = (folder / "metadata" / "metadata").read_text()
        record: dict[str, Any] = records.parse(text, _Record, finite=False)
        if record.pop("digest") != digest(record):
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
    """Return ``read()``, or raise `Damaged` on every process when it failed on any."""
    result, why = None, ""
    try:
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the machine's trouble, not the checkpoint's
    except Exception as error:
        why = reason(error)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(bool(why)))
        why = why or (f"process {failed.argmax()} cannot read it" if failed.any() else "")
    if why:
        raise Damaged(why)
    return result


def named_leaves(tree: Any) -> dict[str, Any]:
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


def description(leaves: Mapping[str, Leaf]) -> dict[str, dict[str, Any]]:
    """Return shape and dtype of every leaf as JSON holds them."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()
    }


def _same_leaves(folder: epath.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a UsageError that names the first leaves that differ."""

    def show(leaf: dict[str, Any] | None) -> str:
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"

    names = [*saved, *(name for name in wanted if name not in saved)]
    different = [
        f"{name} is {show(saved.get(name))} there and {show(wanted.get(name))} here"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise UsageError(
            f"checkpoint {folder} is of another model or method: {_some(different)}: "
            "use the config it was saved with, or another folder"
        )


def _some(items: list[str], count: int = 3) -> str:
    rest = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + rest


def digest(record: Mapping[str, Any]) -> str:
    """Return a checksum of a checkpoint's description."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def reason(error: Exception) -> str:
    """Return one short line for what Orbax, TensorStore or the system said."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
