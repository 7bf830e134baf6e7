"""Verify prepared data: every record is read, every image decoded, counts, classes and checksums compared."""

import concurrent.futures
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from seal_jax.data import catalogue, shards
from seal_jax.data.decoding import CorruptImageError, decode
from seal_jax.data.preparation import first_line, open_prepared
from seal_jax.data.readers import Parser, make_parser
from seal_jax.data.streaming import THREADS


class Verification(NamedTuple):
    """What was found in a prepared data set.

    Attributes:
      folder: of the prepared version.
      counts: images that were read and decoded, by split.
      classes: how many.
      recorded: whether checksums were recorded when the data was prepared, and so compared.
      fingerprint: identifies the data; see :func:`seal_jax.data.shards.fingerprint`.
      problems: one line for each.
    """

    folder: Path
    counts: dict[str, int]
    classes: int
    recorded: bool
    fingerprint: str
    problems: list[str]

    def as_text(self) -> str:
        """Return the summary in one line."""
        splits = ", ".join(f"{split} {count:,}" for split, count in self.counts.items())
        sums = "equal those of its preparation" if self.recorded else "were not recorded"
        return (
            f"{self.folder}: {splits} images decoded; {self.classes} classes; checksums {sums}; "
            f"fingerprint {self.fingerprint[:12]}"
        )


def verify(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    label: str | None = None,
    progress: bool = True,
) -> Verification:
    """Read a prepared data set whole and compare it with what it should be.

    Checked are the sha256 of every file, where :func:`seal_jax.data.prepare` recorded them; the records of
    every shard, by count and by array_record's own checksums; that every image decodes and has a label of
    one of the classes; that the training split has every class; and, for the data sets of
    ``python -m seal_jax datasets``, the numbers of classes and images.

    Args:
      name: as for :func:`seal_jax.data.load`, like ``data_dir`` and ``label``.
      progress: whether a bar with the time left may appear on standard error.

    Raises:
      UsageError: where the data is not prepared (with what to download, and the command that prepares
        it), or is not of images with a class label.
    """
    builder = open_prepared(name, data_dir)
    parser = make_parser(builder.info, label)
    folder, splits = Path(builder.data_dir), builder.info.splits
    recorded = shards.checksum_problems(folder)
    problems = list(recorded or ())
    counts: dict[str, int] = {}
    total = sum(split.num_examples for split in splits.values())
    bar = tqdm(
        total=total,
        desc=f"verify {name}",
        unit=" images",
        disable=not progress,
        **shards.bar_times(),
    )
    with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for split, info in splits.items():
            labels: Counter[int] = Counter()
            for path, count in zip(info.filepaths, info.shard_lengths, strict=True):
                for start, chunk in shards.read(os.fspath(path), count):
                    if isinstance(chunk, str):
                        problems.append(chunk)
                        continue
                    # Lazily decoded, chunk by chunk: all images at once would not fit the memory.
                    for row, found in enumerate(
                        pool.map(lambda r: _label(parser, r), chunk), start
                    ):
                        if isinstance(found, str):
                            problems.append(f"record {row} of {path}: {found}")
                        else:
                            labels[found] += 1
                    bar.update(len(chunk))
            counts[split] = labels.total()
            missing = set(range(len(parser.class_names))).difference(labels)
            if split == "train" and missing:
                names = ", ".join(parser.class_names[label] for label in sorted(missing)[:3])
                problems.append(f"{folder}: train has no image of {len(missing)} classes ({names})")
    problems += _differences(name, len(parser.class_names), counts)
    return Verification(
        folder,
        counts,
        len(parser.class_names),
        recorded is not None,
        shards.fingerprint(folder),
        problems,
    )


def _label(parser: Parser, record: bytes) -> int | str:
    """Return the label of a record that decodes, else what is wrong with it."""
    try:
        encoded, label = parser(record)
        decode(encoded, parser.channels)
    except CorruptImageError as error:
        return str(error)
    # Of a record that is not TFDS's, protobuf and TFDS raise anything.
    except Exception as error:
        return f"it is no example of this data set ({first_line(error)})"
    # TFDS marks unlabelled examples by -1.
    if not -1 <= label < len(parser.class_names):
        return f"its label is {label}, and there are {len(parser.class_names)} classes"
    return label


def _differences(name: str, classes: int, counts: dict[str, int]) -> list[str]:
    """Compare with the record of the data set, if there is one."""
    info = catalogue.find_info(name)
    if info is None:
        return []
    problems = []
    expected = info.stored_classes or info.classes
    if classes != expected:
        problems.append(f"{name} has {classes:,} classes; the whole data set has {expected:,}")
    for split, count in catalogue.expected_counts(info).items():
        if split not in counts:
            problems.append(f"{name} has no split {split}; the whole data set has {count:,} images")
        elif counts[split] != count:
            problems.append(
                f"{name} has {counts[split]:,} images in {split}; the whole data set has {count:,}"
            )
    return problems
