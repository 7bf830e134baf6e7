"""Every table and figure of the papers has commands, and each of them runs."""

import fcntl
import functools
import re
import shlex
from pathlib import Path

import pytest

from papers import catalogue
from papers import command as papers
from seal_jax.cli import main
from seal_jax.training import loop

ROOT = Path(__file__).parents[2]
PAPERS = {"SEAL": (12, 3), "LW": (7, 12), "PoF": (2, 6), "FAST": (1, 15)}  # tables, figures
COMMANDS = [
    catalogue.RUNS,
    *dict.fromkeys(each for item in catalogue.ITEMS for each in item.commands),
]

# The commands as they are would take an hour: fewer images, epochs and draws, and a smaller network.
TRAINING = ["data.train_split=train[:200]", "data.validation_fraction=0.5", "train.seeds=1"]
TRAINING += ["train.epochs_per_generation=2", "model.width=4", "train.batch_size=50"]
FREQUENCY = [each for each in TRAINING if "epochs_per_generation" not in each]
FREQUENCY += ["train.generations=1", "run.checkpoint_every_epochs=60"]
SMALLER = {
    "linear_probe": ["--epochs=2"],
    "few_shot": ["--episodes=2", "--epochs=1", "--ways=2", "--queries=2", "--shots=1"],
    "prediction_depth": ["--images=40"],
    "hessian": ["--examples=60", "--batches=1", "--eigenvalues=1", "--max-products=30"],
    "flatness": ["--draws=1", "--sigmas=0.01"],
    "margins": ["--sample=20"],
    "landscape": ["--examples=60", "--points=5", "--max-products=30"],
    "gradients": ["--batches=4", "--batch-size=20", "--examples=60", "--eigenvectors=2"],
    "perturbations": ["--batches=4", "--batch-size=20", "--weak-batch-size=10"],
    "anytime": ["--max-steps=3"],
    "lw-synthetic": ["--seeds=8", "--steps=3"],
}
# All variants of configs/results.py are trained once; of the other sweeps those that are looked at.
VARIANTS = {
    "systems": ("normal", "seal", "welsr", "wels", "dsd", "fc", "lw", "born_again"),
    "flipped": ("normal", "lw"),
    "short": ("normal", "lw"),
    "ablations": ("descend", "reverse"),
    "frequency": ("E60", "E200"),
}


def test_no_table_and_no_figure_is_missing():
    for paper, (tables, figures) in PAPERS.items():
        names = ", ".join(item.name for item in catalogue.ITEMS if item.paper == paper)
        found = {"Table": set(), "Figure": set()}
        for what, numbers in re.findall(r"(Table|Figure)s? ([\d, to]*\d)", names):
            for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers):
                found[what] |= set(range(int(first), int(last or first) + 1))
        assert found["Table"] == set(range(1, tables + 1)), paper
        assert found["Figure"] == set(range(1, figures + 1)), paper


def test_the_page_lists_them():
    assert catalogue.as_markdown() in (ROOT / "docs" / "reproduce.md").read_text()


def test_the_command_line_lists_them(capsys):
    assert papers.run(["list"]) == main.OK
    printed = capsys.readouterr().out
    assert all(f"    {catalogue.whole(command)}\n" in printed for command in COMMANDS)


class Commands:
    """Runs commands in ``folder``, each once for all processes of a session."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def run(self, command):
        """Run a command, after those that make the runs it looks at."""
        for sweep in [other for other in COMMANDS if other.startswith("sweep")]:
            made = re.search(r"--workdir=(runs/\w+)", sweep)[1]
            if sweep != command and f"{made}/" in command:
                self.run(sweep)
        name = re.sub(r"\W+", "_", command)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.folder / f"{name}.done").exists():
                words = self.arguments(command)
                run = papers.run if command.startswith("python -m papers") else main.run
                assert run(words) == main.OK
                (self.folder / f"{name}.done").touch()

    def arguments(self, command):
        words = shlex.split(command.removeprefix("python -m papers "))
        runs = re.compile(r"^(--[\w.]+=)?runs(?=/|$)")
        words = [runs.sub(rf"\g<1>{self.folder}", word) for word in words]
        words = [word for part in words for word in self.expanded(part)]
        if words[0] == "sweep":
            made = re.search(r"--workdir=runs/(\w+)", command)[1]
            fields = FREQUENCY if made == "frequency" else TRAINING
            if made == "systems":  # its network is an MLP
                fields = [each for each in fields if "width" not in each]
            if made in VARIANTS:
                words[1] = f"--config={self.fewer(made, words[1].removeprefix('--config='))}"
            (self.folder / "data").mkdir(exist_ok=True)
            fields = [*fields, f"data.data_dir={self.folder / 'data'}"]
            return words + [f"--config.{each}" for each in fields]
        if words[0] == "lw-synthetic":
            return [*words, *SMALLER["lw-synthetic"], f"--output={self.folder / 'synthetic'}"]
        if words[0] == "evaluate":
            kind = words[1].removeprefix("--kind=")
            smaller = SMALLER.get(kind, [])
            output = any(word.startswith("--output") for word in words)
            if not output and "few_shot" in kind:
                smaller = [*smaller, f"--output={self.folder / 'shots'}"]
            return words + smaller
        return words

    def fewer(self, name, config):
        """Return a copy of a config file with fewer variants."""
        text = (ROOT / config).read_text()
        assert "\nVARIANTS = " in text
        text += f"\nVARIANTS = {VARIANTS[name]}\n"
        path = self.folder / f"{name}.py"
        path.write_text(text)
        return path

    def expanded(self, word):
        """Expand stars as a shell does."""
        if "*" not in word:
            return [word]
        whole = Path(word.rstrip("/"))
        return sorted(str(path) for path in whole.parent.glob(whole.name) if path.is_dir())


@pytest.fixture
def commands(shared_folder, monkeypatch):
    monkeypatch.setattr(loop, "train", functools.partial(loop.train, devices=1))
    monkeypatch.chdir(ROOT)
    return Commands(shared_folder / "catalogue")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(commands, command):
    commands.run(command)
