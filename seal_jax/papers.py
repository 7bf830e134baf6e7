"""The papers' numbers, and the columns of them that are comparable with a run.

The numbers themselves are in ``papers.toml`` in this folder.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

# Tables of accuracy by generation in the SEAL paper. Table 11 comes first: its runs differ
# from those of Table 2 only in the epochs of a generation, which Table 2 does not name.
_GENERATIONS_TABLES = ("Table 11", "Table 7", "Table 8", "Table 2")
# Values of SEAL's own settings for runs of other methods, which lack them.
_ABSENT = {"method.fit": "descend", "method.reverse": False}
# Tables of the LW paper, by whether images are augmented and by the dropout rate.
_LW_TABLES = {(True, 0.0): "Table 2", (False, 0.0): "Table 6", (True, 0.25): "Table 7"}


class Number(NamedTuple):
    """A number of a paper.

    Attributes:
      mean: the number.
      spread: the number behind ±; the table's caption says which spread it is.
    """

    mean: float
    spread: float | None = None


class PaperTable(NamedTuple):
    """A table of a paper.

    Attributes:
      caption: the quantity and its unit.
      keys: the names of the keys that identify a row.
      columns: the names of the columns.
      rows: by the row's keys and the column; numbers that cannot be read are left out.
    """

    caption: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Mapping[tuple[str, ...], Mapping[str, Number]]

    def get(self, *keys: str, column: str) -> Number | None:
        """Return one number; ``None`` if the paper has no such row or column, or it cannot be read."""
        return self.rows.get(keys, {}).get(column)


@functools.cache
def load(paper: str, table: str) -> PaperTable:
    """Return a table of a paper.

    Args:
      paper: "SEAL", "LW", "PoF" or "FAST".
      table: as the paper names it.

    >>> load("LW", "Table 1").get("2", column="LW")
    Number(mean=99.8, spread=0.2)
    """
    record = _data()[paper]["tables"][table]
    lines = [line.split("|") for line in record["rows"].strip().split("\n")]
    # Two spaces separate keys, since a key may hold one.
    keys = [tuple(re.split("  +", line[0].strip())) for line in lines]
    cells = [line[1].split() for line in lines]
    columns = tuple(cells[0])
    rows = {
        key: {
            column: Number(*map(float, cell.split("±")))
            for column, cell in zip(columns, row, strict=True)
            if cell != "-"
        }
        for key, row in zip(keys[1:], cells[1:], strict=True)
    }
    return PaperTable(record["caption"], keys[0], columns, rows)


def dataset(name: str) -> str:
    """Return the name of a data set as the tables have it, without TFDS's config and version.

    >>> dataset("mnist_corrupted/fog"), dataset("cifar10:3.0.2")
    ('mnist_corrupted', 'cifar10')
    """
    return re.split("[/:]", name)[0]


@dataclasses.dataclass(frozen=True)
class PaperColumn:
    """A column of a paper's table that is comparable with a run.

    Attributes:
      table: "Table 2".
      heading: the column's heading.
      accuracy: in %, by the generation as the paper counts, from 1.
      differences: settings in which the run departs from the paper's, as ``field value (paper value)``.
      paper: which paper.
    """

    table: str
    heading: str
    accuracy: Mapping[int, float]
    differences: tuple[str, ...]
    paper: str = "SEAL paper"


def comparable_column(config: Mapping[str, Any]) -> PaperColumn | None:
    """Return the paper's column for a run with these settings, if it has the data, model and method.

    Args:
      config: the settings of the run, nested.
    """
    return _lw_column(config) or _seal_column(config)


def _seal_column(config: Mapping[str, Any]) -> PaperColumn | None:
    # A width that was left open is the network's own, 64.
    known_width = config["model"].get("width") in (None, 64)
    if dataset(config["data"]["name"]) != "tiny_imagenet" or not known_width:
        return None
    for name in _GENERATIONS_TABLES:
        table = load("SEAL", name)
        fields = table.keys[1:]
        # As text in small letters, as the rows have them: "false", "160".
        values = [str(_setting(config, field, _ABSENT.get(field))).lower() for field in fields]
        for (heading, *expected), numbers in table.rows.items():
            if values != expected:
                continue
            accuracy = {int(generation): number.mean for generation, number in numbers.items()}
            if _setting(config, "optimizer.schedule") == "single" and heading == "Normal":
                # One cosine over everything: only its end is a trained network.
                end = config["train"]["generations"]
                accuracy = {end: accuracy[end]} if end in accuracy else {}
            differences = []
            epochs = config["train"]["epochs_per_generation"]
            if "train.epochs_per_generation" not in fields and epochs != 160:
                differences.append(f"train.epochs_per_generation {epochs} (paper 160)")
            k = config["method"].get("ascent_epochs")
            # Judged by the run's own E: the paper has k = E / 4 (section 3) for every E of Table 11.
            if k is not None and k != epochs / 4:
                differences.append(f"method.ascent_epochs {k:g} (paper {epochs / 4:g})")
            differences += _differences(config, _data()["SEAL"]["settings"])
            return PaperColumn(name, heading, accuracy, tuple(differences))
    return None


def _lw_column(config: Mapping[str, Any]) -> PaperColumn | None:
    data, model, method = config["data"], config["model"], config["method"]
    augmented = bool(data.get("flip") or data.get("crop_padding"))
    name = _LW_TABLES.get((augmented, model.get("dropout") or 0.0))
    if name is None:
        return None
    redrawn = method["name"] == "wels" and method.get("redraw")
    heading = {"normal": "BL"}.get(method["name"], "WELSR" if redrawn else method["name"].upper())
    number = load("LW", name).get(dataset(data["name"]), model["name"], column=heading)
    if number is None:
        return None
    expected = dict(_data()["LW"]["settings"])
    if model["name"] == "resnet50":
        expected["model.norm"] = ["layer"]  # by default it has batch normalisation
    if method["name"] != "normal":
        expected["train.generations"] = [_data()["LW"]["rounds"][model["name"]]]
    # The paper has the end only.
    ends = {int(config["train"]["generations"]): number.mean}
    return PaperColumn(name, heading, ends, _differences(config, expected), "LW paper")


def _differences(
    config: Mapping[str, Any], expected: Mapping[str, Sequence[Any]]
) -> tuple[str, ...]:
    """Name the settings in which a run departs from a paper's; those it lacks are taken as equal."""
    differences = []
    for field, values in expected.items():
        value = _setting(config, field, values[0])
        # TOML has no null: the file has an empty string for None.
        if ("" if value is None else value) not in values:
            differences.append(f"{field} {value} (paper {values[-1]})")
    return tuple(differences)


def _setting(config: Mapping[str, Any], field: str, default: Any = None) -> Any:
    section, name = field.split(".")
    return config.get(section, {}).get(name, default)


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files("seal_jax").joinpath("papers.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
