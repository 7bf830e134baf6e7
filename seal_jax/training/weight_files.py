"""Files of weights: safetensors, PyTorch's pickles, and repositories of the Hugging Face hub.

A safetensors file is a header of JSON and plain arrays. A ``.pth`` file is a pickle, which could run any
code; it is read only where asked for, and then by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from seal_jax import records
from seal_jax.core import files
from seal_jax.data.catalogue import Statistics
from seal_jax.data.preparation import first_line
from seal_jax.errors import UsageError

HUB = "hf://"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin")
_PICKLE = "pytorch_model.bin"
_CONFIG = "config.json"
# The entry of a header in which `to_bytes` puts its record.
_RECORD = "seal_jax"


class _Input(TypedDict, total=False):
    mean: list[float]  # of the input's channels on the scale 0..1
    std: list[float]


class Record(_Input, total=False):
    """What a file of this package says about its weights, in its header."""

    model: Mapping[str, records.Scalar]  # settings of the network
    names: str  # the library whose names the tensors have
    classes: list[str]
    image_shape: list[int]
    data: str
    weights: str
    seed: int
    step: int


class _TimmConfig(TypedDict, total=False):
    pretrained_cfg: _Input


class _Index(TypedDict):
    weight_map: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file of weights that was found.

    Attributes:
      label: what messages call it, such as "train.pretrained = 'a.safetensors'".
      paths: the file, or its shards.
    """

    label: str
    paths: tuple[Path, ...]

    def record(self) -> Record:
        """Return the record in the header; empty for a file of another origin."""
        if self.paths[0].suffix != ".safetensors":
            return {}
        with self._opened(self.paths[0]) as file:
            text = (file.metadata() or {}).get(_RECORD, "{}")
        try:
            record: Record = records.parse(text, Record)
        except UsageError as error:
            raise UsageError(f"{self.label}: the header of {self.paths[0]}: {error}") from None
        return record

    def statistics(self) -> Statistics | None:
        """Return mean and deviation by which the weights want images normalised, if the file says.

        They are in the header, or in timm's ``config.json`` beside the file.
        """
        known: _Input = self.record()
        config = self.paths[0].with_name(_CONFIG)
        if not known and config.is_file():
            timm: _TimmConfig = records.load(config, _TimmConfig, "download it again, or remove it")
            known = timm.get("pretrained_cfg", {})
        if "mean" not in known or "std" not in known:
            return None
        return Statistics(tuple(known["mean"]), tuple(known["std"]))

    def tensors(self) -> dict[str, np.ndarray]:
        """Read all tensors by name.

        Raises:
          UsageError: a file is damaged, or holds something else.
        """
        tensors: dict[str, np.ndarray] = {}
        for path in self.paths:
            if path.suffix == ".safetensors":
                with self._opened(path) as file:
                    for name in file.keys():  # noqa: SIM118 - it cannot be iterated over
                        tensors[name] = self._tensor(file, name)
            else:
                tensors |= _unpickled(path, self.label)
        return tensors

    def _tensor(self, file: Any, name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        # NumPy has no such type, of which safetensors then asks for an attribute.
        except (AttributeError, TypeError):
            kind = file.get_slice(name).get_dtype()
            raise UsageError(
                f"{self.label}: {name} is {kind}, which cannot be read; save it as float32 or bfloat16"
            ) from None

    def _opened(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{self.label}: {path} cannot be read ({first_line(error)}); download it again"
            ) from None


def find(name: str, label: str, *, allow_pickle: bool) -> WeightsFile | None:
    """Return the file of weights that ``name`` means, None for a folder or name without one.

    Args:
      name: a file, a folder that holds one, or ``hf://owner/name[@revision][/file]``.
      label: what messages call it.
      allow_pickle: whether to take PyTorch's files.

    Raises:
      UsageError: a pickle that is not allowed, a shard or a repository that is missing.
      OSError: a bucket that cannot be read.
    """
    if name.startswith(HUB):
        return WeightsFile(label, _from_hub(name, label, allow_pickle))
    path = files.as_path(name)
    if path.is_dir():
        inside = [path / file for file in (SINGLE, INDEX) if (path / file).is_file()]
        inside = inside or sorted(path.glob("*.safetensors"))
        if len(inside) > 1 and inside[0].name != SINGLE:
            raise UsageError(f"{label} holds {len(inside)} files of weights; name one of them")
        if not inside:
            return None
        path = inside[0]
    elif path.suffix not in (known := (".safetensors", ".json", *PICKLES)):
        if path.is_file():
            raise UsageError(
                f"{label} is a file, but none of {', '.join(known)}; give one of these"
            )
        return None
    if not path.is_file():
        raise UsageError(f"{label}: there is no such file")
    if path.suffix == ".json":
        paths = tuple(path.with_name(shard) for shard in _shards(path, label))
    else:
        paths = (path,)
    if path.suffix in PICKLES:
        _check_pickle(label, allow_pickle)
    if files.is_remote(path) and path.with_name(_CONFIG).is_file():
        files.local(path.with_name(_CONFIG))  # which `statistics` looks for beside the file
    return WeightsFile(label, tuple(map(files.local, paths)))


def to_bytes(tensors: Mapping[str, np.ndarray], record: Record) -> bytes:
    """Return a safetensors file that holds these tensors and, in its header, the record."""
    from safetensors.numpy import save

    return save(dict(tensors), {"format": "pt", _RECORD: json.dumps(record)})


def _shards(index: Path, label: str) -> list[str]:
    """Return the names of the files that an index lists, which are beside it."""
    listed: _Index = records.load(index, _Index, "download it again")
    shards = sorted(set(listed["weight_map"].values()))
    for shard in shards:
        # A name with a folder could lead anywhere.
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise UsageError(
                f"{label}: {index.name} names {shard!r}, no safetensors file beside it"
            )
    if not shards:
        raise UsageError(f"{label}: {index.name} lists no file")
    return shards


def _check_pickle(label: str, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise UsageError(
            f"{label} is a pickle of PyTorch, which can hold code; use a safetensors file, or set "
            "train.allow_pickle = True, which lets PyTorch read tensors and nothing else of it"
        )


def _from_hub(name: str, label: str, allow_pickle: bool) -> tuple[Path, ...]:
    """Return the files of a repository of the hub, downloaded unless the hub's cache has them."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    rest, _, file = rest.partition("/")
    repository, _, revision = rest.partition("@")
    if not owner or not repository:
        raise UsageError(f"{label} must be {HUB}owner/name, perhaps with @revision and /file")
    try:
        import huggingface_hub as hub
    except ModuleNotFoundError:
        raise UsageError(
            f'{label} needs huggingface_hub: pip install "seal_jax[hf]", or give a file'
        ) from None
    failures = []

    def download(wanted: str) -> Path | None:
        try:
            return Path(
                hub.hf_hub_download(f"{owner}/{repository}", wanted, revision=revision or None)
            )
        # Of the network, the hub, a name that cannot be one, or without a network of the cache: its own classes,
        # all of them derived from these two.
        except (OSError, ValueError) as error:
            failures.append(first_line(error))
            return None

    # Whatever is not known to be safe is read as a pickle, below.
    if file and Path(file).suffix not in (".safetensors", ".json"):
        _check_pickle(label, allow_pickle)
    wanted = [file] if file else [SINGLE, INDEX, *([_PICKLE] if allow_pickle else [])]
    path = next(filter(None, map(download, wanted)), None)
    if path is not None:
        beside = Path(file).parent
        download(str(beside / _CONFIG))  # not all have one
        if path.suffix != ".json":
            return (path,)
        wanted = [str(beside / shard) for shard in _shards(path, label)]
        shards = tuple(filter(None, map(download, wanted)))
        if len(shards) == len(wanted):
            return shards
    raise UsageError(
        f"{label}: neither the hub nor its cache has {' or '.join(wanted[:3])} ({failures[-1]}); give "
        "the name of another repository or file, or download it where there is a network"
    )


def _unpickled(path: Path, label: str) -> dict[str, np.ndarray]:
    """Return the tensors of a file of PyTorch, those under ``state_dict`` or ``model`` if they are nested."""
    try:
        import torch
    except ModuleNotFoundError:
        raise UsageError(f"{label} needs PyTorch: pip install torch, or give safetensors") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Anything, from a damaged archive to a pickle of code, which weights_only refuses before it runs.
    except Exception as error:
        raise UsageError(
            f"{label}: torch.load(weights_only=True) refuses it ({first_line(error)}); save its "
            "state_dict() alone, best as safetensors"
        ) from None
    nested = content if isinstance(content, Mapping) else {}
    for key in ("state_dict", "model"):
        if isinstance(nested.get(key), Mapping):
            nested = nested[key]
    tensors = {name: value for name, value in nested.items() if isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) < len(nested):
        raise UsageError(
            f"{label} holds no state_dict of tensors alone, neither as it is nor under state_dict or "
            "model; save one"
        )
    # Through float32, since NumPy has no bfloat16; counters stay integers. A parameter is attached to its gradient.
    return {
        str(name): (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in tensors.items()
    }
