"""List of the papers' data sets: SEAL Table 3 and LW Table 5 beside what is prepared on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from seal_jax.core import files
from seal_jax.core.tables import aligned
from seal_jax.data import catalogue
from seal_jax.data.catalogue import DATA_SETS, DatasetInfo, Prepared
from seal_jax.data.preparation import prepare_command
from seal_jax.errors import UsageError

_HEADER = ("data set", "classes", "train", "valid", "test", "papers", "--dataset=", "prepared")
_NUMBERS = range(1, 5)  # the columns that are aligned to the right


def as_text(data_dir: str | os.PathLike | None) -> str:
    """Return the table for a folder of prepared data, then the commands that prepare what is missing.

    Raises:
      UsageError: the folder does not exist.
    """
    # TFDS's own default, without importing it.
    default = os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")
    folder = default if data_dir is None else os.fspath(data_dir)
    root = files.as_path(folder)
    # Only a folder that was named must exist: without the default one, nothing is prepared yet.
    if data_dir is not None and not root.is_dir():
        raise UsageError(f"--data-dir={folder} is not a folder; give that of the prepared data")
    rows: list[tuple[str, ...]] = [_HEADER]
    notes: list[str] = []
    from_files: list[str] = []
    others: list[str] = []
    for data_set in DATA_SETS:
        name, prepared = _find(data_set, root)
        sizes = (data_set.classes, data_set.train, data_set.validation, data_set.test)
        rows.append((data_set.paper, *map(_size, sizes), data_set.used, name, _state(prepared)))
        if data_set.note:
            notes.append(f"  {data_set.paper}: {data_set.note}")
        if not _is_usable(prepared):
            # Under the first name, if a data set has several.
            command = f"  {prepare_command(data_set.names[0], folder)}"
            commands = from_files if data_set.builder else others
            if originals := catalogue.original_files(data_set.names[0]):
                commands.append(f"  # {data_set.paper}: FOLDER is {originals}")
            commands.append(command)
    heading = "To prepare from original files, without TensorFlow or network:"
    from_files = ["", heading, *from_files] if from_files else []
    heading = "To prepare by TFDS, which needs network and for many data sets TensorFlow:"
    others = ["", heading, *others] if others else []
    about = [
        "",
        f"prepared: in {folder}, as TFDS's array_record; its numbers are what is stored there.",
        "classes, train, valid, test: as the papers say (few-shot: all images, Guo et al. 2020), or,",
        "where they say nothing, the official numbers.",
    ]
    return "\n".join([*aligned(rows, _NUMBERS), *about, *notes, *from_files, *others])


def _find(data_set: DatasetInfo, folder: Path) -> tuple[str, Prepared | None]:
    """Return the name under which a data set is prepared and what is there, else its first name and None."""
    for name in data_set.names:
        prepared = catalogue.prepared(name, folder)
        if prepared is not None:
            return name, prepared
    return data_set.names[0], None


def _is_usable(prepared: Prepared | None) -> bool:
    # Other formats of TFDS need TensorFlow to be read.
    return prepared is not None and prepared.file_format == "array_record"


def _size(size: int | str | None) -> str:
    return "-" if size is None else f"{size:,}" if isinstance(size, int) else size


def _state(prepared: Prepared | None) -> str:
    """Return what is prepared, such as ``train 1,500; 10 classes``."""
    if prepared is None:
        return "no"
    images = " + ".join(f"{split} {count:,}" for split, count in prepared.counts.items())
    classes = "" if prepared.classes is None else f"; {prepared.classes} classes"
    form = "" if _is_usable(prepared) else f"; as {prepared.file_format}, which needs TensorFlow"
    return images + classes + form
