"""The curves: what is on the pictures, as far as numbers can tell."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from seal_jax.core import plots
from seal_jax.errors import UsageError
from seal_jax.reports import curves, draw, draw_run
from seal_jax.reports.runs import read_all


@pytest.fixture
def kept(monkeypatch):
    """The figures that were saved."""
    figures = []
    as_png = plots.as_png
    monkeypatch.setattr(plots, "as_png", lambda figure: (figures.append(figure), as_png(figure))[1])
    return figures


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def close_to(image, colour):
    """Count the pixels of a colour given as ``#rrggbb``."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.abs(image.astype(int) - wanted).max(-1) < 8).sum())


def test_two_runs(seal, make_run, tmp_path, kept):
    other = make_run(
        "$other_x^",  # a name that mathematics would take apart
        test=[([0.3, 0.4], None)],
        method={"name": "llf"},
        epochs=6,
    )
    path = tmp_path / "both.png"
    assert draw([seal, other], path) == path
    image = pixels(path)
    assert image.shape == (1350, 1650, 3)
    for colour in plots.COLOURS[:2]:
        assert close_to(image, colour) > 200
    assert close_to(image, plots.COLOURS[2]) == 0
    assert list(tmp_path.glob(".*")) == []

    (figure,) = kept
    above, _, below = figure.axes
    mean = above.get_lines()[0]
    assert mean.get_xdata().tolist() == list(range(1, 9))
    assert mean.get_ydata() == pytest.approx([100 * epoch / (epoch + 2) for epoch in range(8)])
    marks = {
        line.get_markersize(): line.get_ydata().tolist()
        for line in below.get_lines()
        if line.get_marker() == "o"
        and line.get_color() != plots.COLOURS[1]
        and line.get_markeredgecolor() == plots.COLOURS[0]
    }
    assert marks[curves.MARKERSIZE["last"]] == pytest.approx([51, 62])
    assert marks[curves.MARKERSIZE["best"]] == pytest.approx([54, 64])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["seal\n(2 seeds)", "\\$other_x^\n(2 seeds, unfinished)"]
    assert "ascent" in labels
    assert above.get_title() == "resnet50 on tiny_imagenet"


def test_band_is_the_interval_of_the_mean(make_run, tmp_path, kept):
    test, validation = [0.50, 0.52, 0.57], [0.56, 0.62, 0.57]
    one = {"seeds": 3, "generations": 1}
    draw(make_run(test=[(test, test)], validation=[validation], train=one), tmp_path / "one.png")
    band = kept[0].axes[1].collections[0].get_paths()[0].vertices
    at_third = band[np.isclose(band[:, 0], 3)][:, 1]
    ((low, high),) = [bar[:, 1] for bar in kept[0].axes[2].collections[0].get_segments()]
    for ends, values in (((low, high), test), ((at_third.min(), at_third.max()), validation)):
        values = 100 * np.array(values)
        expected = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
        assert ends == pytest.approx(expected, rel=1e-4)
    labels = " ".join(text.get_text() for text in kept[0].legends[0].get_texts())
    assert "95 % interval over seeds" in labels


def test_band_of_two_seeds_is_their_range(seal, tmp_path, kept):
    draw(seal, tmp_path / "one.png")
    band = kept[0].axes[1].collections[0].get_paths()[0].vertices
    at_third = band[np.isclose(band[:, 0], 3)][:, 1]
    assert (at_third.min(), at_third.max()) == pytest.approx((56, 62))


def test_phases(seal, make_run):
    (run,) = read_all(seal)
    assert curves.ascents(run, 8) == ((4, 5),)
    assert curves.ascents(run, 4) == ()
    longer = make_run("longer", epochs=6, method={"ascent_epochs": 3.0})
    llf = make_run("llf", epochs=6, method={"name": "llf"})
    both = read_all([seal, longer])
    assert curves.shades(read_all([seal, llf])) == [(curves.SHADE, ((4, 5),))]
    assert curves.shades(both) == [
        (plots.COLOURS[0], ((4, 5),)),
        (plots.COLOURS[1], ((4, 7),)),
    ]
    assert curves.shades(read_all(llf)) == []


def test_styles_stay_apart():
    looks = [tuple(plots.style(index).values()) for index in range(3 * len(plots.COLOURS))]
    assert len(set(looks)) == len(looks)


def test_draw_run_replaces_the_picture(seal, kept):
    (seal / "curves.png").write_bytes(b"old")
    assert draw_run(seal) == seal / "curves.png"
    image = pixels(seal / "curves.png")
    assert image.shape == (2025, 1650, 3)
    assert close_to(image, plots.COLOURS[0]) > 500
    assert sorted(path.name for path in seal.iterdir()) == [
        "config.json",
        "curves.png",
        "metrics.jsonl",
    ]
    losses, rate = kept[0].axes[3:]
    assert losses.get_lines()[0].get_ydata() == pytest.approx([2 / n for n in range(1, 9)])
    assert rate.get_lines()[0].get_ydata()[:4] == pytest.approx([0.01 / n for n in range(1, 5)])
    assert kept[0].axes[0].get_title() == "SEAL: resnet50 on tiny_imagenet"


def test_first_epoch_of_a_run_without_validation_or_numbers(make_run):
    run = make_run(epochs=1, train={"seeds": 1})
    lines = (
        (run / "metrics.jsonl").read_text().replace('"train/loss": [2.0]', '"train/loss": [null]')
    )
    assert "null" in lines
    (run / "metrics.jsonl").write_text(lines)
    assert close_to(pixels(draw_run(run)), plots.COLOURS[0]) > 50


def test_picture_that_cannot_be_written(seal, tmp_path):
    with pytest.raises(UsageError, match=r"none/x.png cannot be written: No such file"):
        draw([seal], tmp_path / "none" / "x.png")


def test_no_global_state(seal, tmp_path):
    # In a process of its own: others may have loaded pyplot, and chosen a backend, already.
    code = """if True:
        import sys, matplotlib
        from seal_jax import reports
        before = matplotlib.rcParams.copy()
        reports.draw(sys.argv[1], sys.argv[2])
        assert matplotlib.get_backend(auto_select=False) is None
        assert matplotlib.rcParams.copy() == before
        print("matplotlib.pyplot" in sys.modules)
    """
    picture = tmp_path / "x.png"
    command = [sys.executable, "-c", code, str(seal), str(picture)]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout) == (0, "False\n"), found.stderr
    assert picture.exists()
