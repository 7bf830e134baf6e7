"""Tables beside the paper's, the command, and what a user can get wrong."""

import csv

import numpy as np
import pytest
from lw_oracle import QUICK

from papers import command, lw_synthetic, lw_tables
from papers.lw_synthetic import METHODS, ROWS
from seal_jax.errors import OK, USAGE


def published1(shift=0.0):
    """Return accuracies of one initialiser that are the paper's, moved by so many deviations."""
    numbers = []
    for _, alpha, method in lw_synthetic.cells("1", ["he"]):
        paper = lw_synthetic.PAPER["1"].get(f"{alpha:g}", column=method)
        mean, std = paper or (20.0, 1.0)
        numbers.append(mean + shift * std)
    return np.array(numbers)[None, :, None] / 100 + np.array([[[-1e-3]], [[1e-3]]])


def published4(shift=0.0):
    paper, cells = lw_synthetic.PAPER["4"], lw_synthetic.cells("4", ["he"])
    numbers = [paper.get(f"{row:g}", column=method).mean + shift for _, row, method in cells]
    return np.array(numbers)[None, :, None] / 100


def cells1(test, initialiser):
    return lw_tables.make_cells("1", test, [initialiser])


def printed(cells):
    return lw_tables.comparison(cells).as_text()


def test_the_papers_own_numbers_agree():
    cells = cells1(published1(), "he")
    text = printed(cells)
    assert "he: 17 of 17" in text
    assert text.count("the order of the paper") == 3
    assert "unreadable" in text
    assert text.count("*") == 18  # with the one of the heading
    assert lw_tables.pairs_in_order(cells) == (40, 40)
    assert max(map(len, text.splitlines()[2:])) <= 100


@pytest.mark.parametrize(("shift", "count"), [(1.9, 17), (2.1, 0), (-2.1, 0)])
def test_two_standard_deviations(shift, count):
    cells = cells1(published1(shift), "glorot")
    assert sum(cell.within for cell in cells) == count


def test_reversed_pairs_are_named():
    accuracies = published1()
    accuracies[:, [4, 5]] = accuracies[:, [5, 4]]  # FC and LW at alpha 0.5
    text = printed(cells1(accuracies, "he"))
    assert "alpha 0.5: FC > WELSR > LW > WELS > DSD > BL" in text.replace("\n  ", " ")
    assert "7 of 10 pairs" in text
    assert "FC over LW (by 1.6)" in text


def test_one_seed_has_no_deviation():
    cells = cells1(published1()[:1], "he")
    assert cells[0].std == 0
    assert "1 seed;" in printed(cells)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_distance_from_table_4(shift):
    cells = lw_tables.make_cells("4", published4(shift), ["glorot"])
    np.testing.assert_allclose(lw_tables.rms_difference(cells), shift, atol=1e-9)
    assert f"glorot {shift:.1f}" in printed(cells)


QUICKLY = [
    "lw-synthetic",
    *(f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()),
    "--initialiser=glorot",
]


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_command(tmp_path, capfd):
    assert command.run([*QUICKLY, "--table=1", "--seeds=8", f"--output={tmp_path}"]) == OK
    assert "Table 1" in capfd.readouterr().out
    rows = read(tmp_path / "table1.csv")
    assert len(rows) == len(ROWS["1"]) * len(METHODS["1"])
    (lw,) = (row for row in rows if (row["row"], row["method"]) == ("1.0", "LW"))
    assert (lw["paper_mean"], lw["paper_std"], lw["seeds"]) == ("72.3", "3.6", "8")
    (bl,) = (row for row in rows if (row["row"], row["method"]) == ("0.5", "BL"))
    assert bl["paper_mean"] == bl["within"] == ""
    assert (tmp_path / "lw_synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_both_tables_by_default(tmp_path, capfd, monkeypatch):
    seen = []

    def trained(settings, plans, seeds, progress):
        seen.append((settings.optimiser, settings.steps, seeds))
        test = {9: published1, 5: published4}[plans.events.part.shape[1]]()
        test = np.broadcast_to(test, (2, *plans.events.part.shape))
        return lw_synthetic.Results(test, test, test)

    monkeypatch.setattr(lw_synthetic, "train_all", trained)
    assert command.run([*QUICKLY, f"--output={tmp_path}"]) == OK
    assert seen == [("gd", 1, 16), ("adam", 1, 100)]
    out = capfd.readouterr().out
    assert "glorot: 17 of 17" in out
    assert "Root mean square difference: glorot 0.0" in out
    assert len(read(tmp_path / "table4.csv")) == len(ROWS["4"]) * len(METHODS["4"])
    assert (tmp_path / "lw_synthetic.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--seeds=0", "seeds = 0 must be a whole number of at least 1"),
        ("--seeds=many", "invalid int value: 'many'"),
        ("--table=2", "invalid choice: '2'"),
        ("--steps=-5", "steps = -5 must be a whole number of at least 1"),
        ("--steps=1.5", "steps = '1.5' must be of type int"),
        ("--test-size=0", "test_size = 0 must be a whole number of at least 1"),
        ("--batch-size=257", "batch_size = 257 must be a whole number in 0..256"),
        ("--share=1", "share = 1 must lie between 0 and 1"),
        ("--learning-rate=nan", "learning_rate = nan must be positive"),
        ("--dsd=tensr", "dsd = 'tensr' must be one of tensor, global; nearest: tensor"),
        ("--optimiser=sgd", "optimiser = 'sgd' must be one of gd, adam"),
        ("--initialiser=lecun", "invalid choice: 'lecun'"),
        ("--output=/dev/null/runs", "--output=/dev/null/runs cannot be written"),
        (
            "--stpes=1",
            "--stpes=1 is not an option of lw-synthetic; see python -m papers lw-synthetic --help",
        ),
    ],
)
def test_bad_options(arguments, says, capfd):
    assert command.run(["lw-synthetic", arguments]) == USAGE
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_outputs_that_are_folders(tmp_path, capfd):
    (tmp_path / "table1.csv").mkdir()
    assert command.run(["lw-synthetic", "--table=1", f"--output={tmp_path}"]) == USAGE
    assert "table1.csv is a folder; give another --output" in capfd.readouterr().err
