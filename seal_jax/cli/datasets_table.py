"""The table of the papers' data sets: SEAL Table 3 and LW Table 5 beside what is prepared here."""

from __future__ import annotations

import os
from pathlib import Path

from seal_jax.data import catalogue
from seal_jax.data.catalogue import DATA_SETS, DatasetInfo, Prepared
from seal_jax.data.preparation import prepare_command
from seal_jax.errors import UsageError

HEADER = (
    "data set",
    "classes",
    "train",
    "valid",
    "test",
    "papers",
    "--dataset=",
    "prepared",
)
_NUMBERS = frozenset({"classes", "train", "valid", "test"})


def as_text(data_dir: str | os.PathLike | None) -> str:
    """Return the table, then the commands that prepare what is missing.

    Args:
      data_dir: the folder of prepared data; None is TFDS's default (``TFDS_DATA_DIR``).

    Raises:
      UsageError: where it is remote.
    """
    folder = _default_folder() if data_dir is None else os.fspath(data_dir)
    if "://" in folder:
        raise UsageError(f"data_dir={folder} is remote: copy it into a local folder and give that")
    if data_dir is not None and not os.path.isdir(data_dir):
        raise UsageError(f"--data-dir={folder} is not a folder; give that of the prepared data")
    found = {each.paper: _find(each, Path(folder)) for each in DATA_SETS}
    rows = [_row(each, *found[each.paper]) for each in DATA_SETS]
    missing = [each for each in DATA_SETS if not _is_usable(found[each.paper][1])]
    notes = [f"  {each.paper}: {each.note}" for each in DATA_SETS if each.note]
    about = [
        "",
        f"prepared: in {folder}, as TFDS's array_record; its numbers are what lies there.",
        "classes, train, valid, test: as the papers say (few-shot: all images, Guo et al. 2020), or,",
        "where they say nothing, the official numbers.",
        *notes,
    ]
    return "\n".join([*_aligned(rows), *about, *_commands(missing, folder)])


def _default_folder() -> str:
    # As TFDS has it.
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")


def _find(data_set: DatasetInfo, folder: Path) -> tuple[str, Prepared | None]:
    """Return the name under which it is prepared, else the first one and None."""
    for name in data_set.names:
        prepared = catalogue.prepared(name, folder)
        if prepared is not None:
            return name, prepared
    return data_set.names[0], None


def _is_usable(prepared: Prepared | None) -> bool:
    return prepared is not None and prepared.file_format == "array_record"


def _row(data_set: DatasetInfo, name: str, prepared: Prepared | None) -> tuple[str, ...]:
    sizes = (data_set.classes, data_set.train, data_set.validation, data_set.test)
    texts = [
        size if isinstance(size, str) else "-" if size is None else f"{size:,}" for size in sizes
    ]
    return data_set.paper, *texts, data_set.used, name, _state(prepared)


def _state(prepared: Prepared | None) -> str:
    """Say what is there, such as ``train 1,500; 10 classes``."""
    if prepared is None:
        return "no"
    images = " + ".join(f"{split} {count:,}" for split, count in prepared.counts.items())
    classes = "" if prepared.classes is None else f"; {prepared.classes} classes"
    form = "" if _is_usable(prepared) else f"; as {prepared.file_format}, which needs TensorFlow"
    return images + classes + form


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for name, cell, width in zip(HEADER, cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(HEADER), line(tuple("-" * width for width in widths)), *map(line, rows)]


def _commands(missing: list[DatasetInfo], folder: str) -> list[str]:
    """Return how to prepare these data sets: from files that the user has, and by TFDS."""
    own = [each for each in missing if each.manual_dir]
    others = [each for each in missing if each not in own]
    lines = []
    if own:
        lines += ["", "To prepare from original files, without TensorFlow or network:"]
        for each in own:
            lines += [
                f"  # {each.paper}: FOLDER is {each.manual_dir}",
                f"  {prepare_command(each.names[0], folder)}",
            ]
    if others:
        lines += ["", "To prepare by TFDS, which needs network and for many data sets TensorFlow:"]
        lines += [f"  {prepare_command(each.names[0], folder)}" for each in others]
    return lines
