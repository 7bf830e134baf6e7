"""Find and read the files of an original data set; what is missing is named in one line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from seal_jax.errors import UsageError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)


def is_image(name: str) -> bool:
    """Tell whether a file's name is that of an image; hidden files are not.

    >>> is_image("a.JPG"), is_image("._a.jpg"), is_image("Thumbs.db")
    (True, False, False)
    """
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def require_folder(root: Path) -> None:
    """Raise a UsageError unless ``root`` is a folder."""
    if not root.is_dir():
        raise UsageError(f"manual_dir={root} is not a folder: give that of the original files")


def find(root: Path, *names: str) -> Path:
    """Return the first of these files that lies in ``root`` or in a folder of it.

    Raises:
      UsageError: where none does.
    """
    require_folder(root)
    folders = sorted(each for each in root.iterdir() if each.is_dir())
    for name in names:
        for folder in (root, *folders):
            if (folder / name).is_file():
                return folder / name
    raise UsageError(
        f"manual_dir={root} lacks {' or '.join(names)}: give the folder of the original files"
    )


def lines(path: Path) -> list[str]:
    """Return the lines that have text, stripped.

    Raises:
      UsageError: where the file cannot be read as UTF-8, or has none.
    """
    try:
        found = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: restore the original") from error
    if not found:
        raise UsageError(f"{path} has no line: restore the original")
    return found


def rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a csv file with a header, as far as these columns go.

    Raises:
      UsageError: where it cannot be read, a column is missing, or a row lacks a value.
    """
    reader = csv.DictReader(lines(path))
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    missing = [column for column in columns if column not in header]
    if missing:
        raise UsageError(
            f"{path} lacks the column {missing[0]!r} (it has {', '.join(header[:8])}): "
            "restore the original"
        )
    for row in reader:
        for column in columns:
            if not (row[column] or "").strip():
                raise UsageError(
                    f"{path}, line {reader.line_num}: {column!r} is empty: restore the original"
                )
        yield {column: row[column].strip() for column in columns}


class Images:
    """The image files anywhere below a folder, by their names."""

    def __init__(self, root: Path):
        self._root = root
        self._paths: dict[str, list[Path]] = {}
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders[:] = [each for each in subfolders if not each.startswith((".", "__MACOSX"))]
            for name in filter(is_image, names):
                self._paths.setdefault(name, []).append(Path(folder, name))

    def find(self, name: str, source: Path) -> Path:
        """Return the file called ``name``, which ``source`` lists.

        Raises:
          UsageError: where there is none, or more than one.
        """
        paths = self._paths.get(name, [])
        if len(paths) == 1:
            return paths[0]
        if paths:
            places = " and ".join(str(path.parent) for path in sorted(paths)[:2])
            raise UsageError(f"{name} lies in {places}: keep one of them below {self._root}")
        raise UsageError(
            f"manual_dir={self._root} lacks the image {name}, which {source.name} lists: "
            "restore the original"
        )
