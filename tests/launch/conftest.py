import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from launch import command

ROOT = Path(__file__).parents[2]
TOOLS = (
    "gcloud",
    "kubectl",
    "sbatch",
    "squeue",
    "scancel",
    "scontrol",
    "srun",
    "sky",
    "git",
    "curl",
)


class Fakes:
    """The tools of all targets, recorded."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        # -S and -E: without site packages Python starts in a few milliseconds.
        text = f"#!{sys.executable} -SE\n" + (Path(__file__).parent / "fake_tool.py").read_text()
        for tool in TOOLS:
            path = folder / "bin" / tool
            path.write_text(text)
            path.chmod(0o755)
        self.rules()

    def rules(self, *rules):
        # There is no request of a name, unless a test says so.
        none = ("queued-resources describe", 1, "ERROR: NOT_FOUND")
        (self.folder / "rules.json").write_text(json.dumps([*rules, none]))

    def calls(self):
        """Return the calls since the last time."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    folder = tmp_path / "fakes"
    folder.mkdir()
    fakes = Fakes(folder)
    monkeypatch.setenv("FAKES", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)  # configs are named from there
    return fakes


@pytest.fixture
def launch(fakes, capsys):
    """Run the launcher: its exit code, output and errors."""

    def run(*words):
        code = command.run([*words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    assert shutil.which("gcloud")
    return run
