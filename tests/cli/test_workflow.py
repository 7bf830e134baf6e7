"""The way of a user: train every variant of a config, evaluate a run, compare them all."""

import pytest

from seal_jax.cli import main
from seal_jax.errors import OK
from seal_jax.training import metrics

CONFIG = """\
from seal_jax.cli.configs import base

VARIANTS = ("normal", "seal")


def get_config(method="normal"):
    config = base(method)
    config.data.name = "digits"
    config.data.data_dir = {data_dir!r}
    config.data.validation_fraction = 0.8
    config.model.name = "mlp"
    config.train.generations = 2
    config.train.epochs_per_generation = 2
    config.train.seeds = 8  # one for each of the tests' devices
    if method == "seal":
        config.method.threshold = "dense2"
    return config
"""


@pytest.fixture
def config(tmp_path, digits_dir):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(data_dir=str(digits_dir)))
    return path


def test_train_evaluate_compare(config, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert main.run(["sweep", f"--config={config}", f"--workdir={runs}"]) == OK
    assert "Test accuracy (%) by generation" in capsys.readouterr().out
    for name in ("normal", "seal"):
        assert [row["epoch"] for row in metrics.read(runs / name)] == list(range(4))
        evaluate = ["evaluate", "--kind=margins", f"--checkpoint={runs / name}", "--sample=20"]
        assert main.run(evaluate) == OK
    assert "margin" in capsys.readouterr().out
    report = tmp_path / "report"
    folders = [str(runs / name) for name in ("normal", "seal")]
    assert main.run(["compare", *folders, f"--output={report}"]) == OK
    page = (report / "report.html").read_text()
    assert "normal" in page
    assert "margin" in page
    assert (report / "margins.png").stat().st_size > 5_000
