"""The first contact: help, and what it loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from seal_jax.cli import main

ROOT = Path(__file__).parents[2]
HEAVY = "{'tensorflow', 'tensorflow_datasets', 'orbax', 'matplotlib', 'flax', 'ml_collections'}"


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ([], ["train", "sweep", "compare", "prepare", "exit codes", "74", "75"]),
        (["train"], ["--workdir", "FILE[:VARIANT]", "--coordinator", "--config.SECTION.FIELD"]),
        (["sweep"], ["--workdir", "every variant", "--config.SECTION.FIELD"]),
        (["compare"], ["--output", "DIR"]),
        (["prepare"], ["--dataset", "--data-dir", "--manual-dir"]),
    ],
)
def test_help(capfd, command, mentions):
    with pytest.raises(SystemExit) as exit:
        main.run([*command, "--help"])
    assert exit.value.code == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    for word in mentions:
        assert word in captured.out


@pytest.mark.parametrize(
    "code",
    [
        "import seal_jax",
        "import runpy\nsys.argv = ['seal_jax', '--help']\n"
        "try: runpy.run_module('seal_jax', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0",
    ],
    ids=["import", "help"],
)
def test_what_is_loaded(code):
    check = f"\nassert not {HEAVY} & set(sys.modules), sorted({HEAVY} & set(sys.modules))"
    subprocess.run([sys.executable, "-c", f"import sys\n{code}{check}"], check=True, cwd=ROOT)
