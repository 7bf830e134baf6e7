"""Colab's stock runtime: nothing in it is replaced, and library, trainer and notebooks run there.

``colab.txt`` is an extract of the TPU runtime's list of packages, 19 August 2026
(github.com/googlecolab/backend-info).
"""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STOCK = Path(__file__).parent / "colab.txt"
TOOLS = ["equinox", "hypothesis", "nbclient", "pytest", "pytest-xdist"]
# Transformations under NNX, masks, a run that is killed and resumed, a sweep that is evaluated and compared.
TESTS = {
    "tests/library/test_library_common.py": "nnx",
    "tests/library/test_library_seal.py": "nnx or chain",
    "tests/library/test_library_masks.py": "",
    "tests/training/test_resume.py": "killed",
    "tests/cli/test_workflow.py": "",
}
# Papermill's convention: settings come in a cell of their own, right after the one tagged "parameters".
EXECUTE = """\
import sys, nbclient, nbformat
source, executed, parameters = sys.argv[1:]
book = nbformat.read(source, 4)
(at,) = (n for n, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
book.cells.insert(at + 1, nbformat.v4.new_code_cell(parameters))
# Errors are outputs, as that of `%run`, which ends no notebook, is anyway.
nbclient.NotebookClient(book, timeout=600, kernel_name="python3", allow_errors=True).execute()
nbformat.write(book, executed)
"""


def python313():
    """Return the path of a Python 3.13, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [*pyenv.glob("versions/3.13*/bin/python3.13"), shutil.which("python3.13")]
    # Pyenv's own command on the PATH fails where 3.13 is installed but not selected.
    return next((path for path in filter(None, candidates) if not returncode(path, "-V")), None)


def returncode(*command):
    return subprocess.run(command, capture_output=True, check=False).returncode


def call(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


class Environment:
    """A virtual environment with Colab's versions, and a copy of the repository."""

    def __init__(self, root, interpreter):
        self.root, self.clone = root, root / "clone"
        call(interpreter, "-m", "venv", root / "venv")
        self.variables = {
            **os.environ,
            "PATH": f"{root / 'venv/bin'}{os.pathsep}{os.environ['PATH']}",
        }
        # Nor what the surrounding tests are run with.
        for name in ("PYTHONPATH", "PYTEST_ADDOPTS", "VIRTUAL_ENV"):
            self.variables.pop(name, None)
        unneeded = shutil.ignore_patterns(
            ".*", "build", "runs", "shared", "*.egg-info", "__pycache__"
        )
        shutil.copytree(ROOT, self.clone, ignore=unneeded)

    def python(self, *arguments, **variables):
        return call(
            self.root / "venv/bin/python",
            *arguments,
            cwd=self.clone,
            env=self.variables | variables,
        )

    def pip(self, *arguments):
        return self.python("-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)

    def packages(self):
        return set(self.pip("freeze", "--exclude", "seal_jax").splitlines())

    def execute(self, notebook, parameters, **variables):
        """Execute a notebook from top to bottom; return the text that its code cells print."""
        executed = self.root / notebook
        self.python("-c", EXECUTE, f"launch/{notebook}", executed, parameters, **variables)
        cells = json.loads(executed.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        printed = "".join(text for output in outputs for text in output.get("text", []))
        assert all(output["output_type"] != "error" for output in outputs), printed
        return printed


def stock_environment(root):
    """Return Colab's environment; skip where it cannot be made here."""
    interpreter = python313()
    if not interpreter:
        pytest.skip("Colab's environment needs Python 3.13, which is not installed")
    environment = Environment(root, interpreter)
    try:
        environment.pip("download", "--no-deps", "--dest", root, "jax==0.7.2")
    except AssertionError as error:
        pytest.skip(f"Colab's environment needs a package registry: {error}")
    environment.pip("install", "--requirement", STOCK)
    return environment


def test_colab(tmp_path):
    """One test, for two workers would make two environments."""
    colab = stock_environment(tmp_path)
    stock = colab.packages()
    colab.pip("install", ".[train]")
    assert stock <= colab.packages(), "packages were replaced"
    colab.pip("install", "--constraint", STOCK, *TOOLS)
    colab.pip("check")
    run_tests(colab)
    run_colab_notebook(colab)
    run_notebook_of_eight_chips(colab)
    assert stock <= colab.packages(), "the notebooks replaced packages"


def run_tests(colab):
    for file, names in TESTS.items():
        # Colab's packages warn about one another, such as matplotlib 3.10 about pyparsing.
        options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
        printed = colab.python("-m", "pytest", *options, file, "-k", names)
        assert " passed" in printed


def png(size, value):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def run_colab_notebook(colab):
    make = """
import sys, datasets
names = [f"class {n}" for n in range(100)]
features = datasets.Features(
    {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names),
     "coarse_label": datasets.ClassLabel(names=["a", "b"])})
image = open(sys.argv[1], "rb").read()
rows = {"img": [{"bytes": image, "path": None}] * 200, "fine_label": list(range(100)) * 2,
        "coarse_label": [0, 1] * 100}
data = datasets.Dataset.from_dict(rows, features=features)
datasets.DatasetDict(train=data, test=data).save_to_disk("cifar100")
"""
    image = colab.root / "image.png"
    image.write_bytes(png(32, 100))
    colab.python("-c", make, image)
    short = "--config.train.generations=2 --config.train.epochs_per_generation=4"
    printed = colab.execute(
        "colab.ipynb",
        f"EPOCHS, GENERATIONS, ON_ACCELERATOR = 4, 2, True\n"
        f"QUICKSTART = '{short} --config.train.seeds=1'\n"
        f"CIFAR100 = '--config=configs/digits.py:seal --config.data.validation_fraction=0.5 "
        f"--config.train.dtype=bfloat16 {short}'\n",
    )
    assert "generation 1: test accuracy" in printed
    assert "Test accuracy (%) by generation" in printed
    assert (colab.clone / "runs/cifar100/curves.png").exists()


def run_notebook_of_eight_chips(colab):
    """On eight CPU devices; a Tiny-ImageNet of two classes."""
    root = colab.clone / "tiny-imagenet-200"
    annotations = []
    for wnid in ("n01", "n02"):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        for number in range(20):
            (root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG").write_bytes(
                png(64, number)
            )
        for number in range(4):
            name = f"val_{wnid}_{number}.JPEG"
            (root / "val" / "images" / name).write_bytes(png(64, number))
            annotations.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (root / "wnids.txt").write_text("n01\nn02\n")
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    printed = colab.execute(
        "eight_chips.ipynb",
        "CONFIG = 'configs/digits.py:seal'\n"
        "SETTINGS = '--config.data.name=tiny_imagenet --config.train.batch_size=8 "
        "--config.data.validation_fraction=0.2 --config.train.generations=2 "
        "--config.train.epochs_per_generation=4'",
        JAX_NUM_CPU_DEVICES="8",
    )
    assert "devices: 8 along seeds, 1 along data" in printed
    rows = (colab.clone / "runs/seal/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 8
    assert len(json.loads(rows[-1])["validation/accuracy"]) == 8
