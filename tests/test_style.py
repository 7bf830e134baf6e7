"""Lint, format and types hold everywhere; imports go one way."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "seal_jax"
LIBRARY = {"transforms", "hessian"}  # one thing with the modules beside them


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", "--cache-dir=.mypy_cache"],
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def trees():
    return {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(tree, trees):
    """Return local name and module of what is imported from the package, lazily and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seal_jax"):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield alias.asname or alias.name, module if module in trees else node.module


def folder_of(module):
    parts = module.split(".")[1:]
    is_folder = parts and (PACKAGE / parts[0]).is_dir()
    return parts[0] if is_folder and parts[0] not in LIBRARY else "library"


def test_no_import_circles(trees):
    modules = {
        name: {module for _, module in imports(tree, trees)} - {name}
        for name, tree in trees.items()
    }
    TopologicalSorter(modules).prepare()  # a CycleError names the modules
    folders = {folder_of(name): set() for name in modules}
    for name, imported in modules.items():
        if name not in ("seal_jax", "seal_jax.__main__"):
            here = folder_of(name)
            folders[here] |= {folder_of(module) for module in imported - {"seal_jax"}} - {here}
    assert folders["library"] == set()
    TopologicalSorter(folders).prepare()


def test_no_private_names_of_other_modules(trees):
    public = {"_replace", "_asdict", "_fields"}  # of every NamedTuple
    for name, tree in trees.items():
        local = {short for short, _ in imports(tree, trees)}
        assert not [short for short in local if short.startswith("_") and short != "__version__"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                of_other = private and node.value.id in local and node.attr not in public
                assert not of_other, f"{name} uses {node.value.id}.{node.attr}"
