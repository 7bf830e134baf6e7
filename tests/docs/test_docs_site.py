"""The documentation site: its API reference is complete, and it builds without a warning."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import seal_jax

DOCS = Path(__file__).parents[2] / "docs"


def listed():
    """Yield ``(module, name)`` for each entry of the API reference."""
    module, members = None, False
    for line in (DOCS / "api.md").read_text().splitlines():
        if match := re.match(r"\.\. (?:automodule|currentmodule):: (\S+)", line):
            module = importlib.import_module(match[1])
        if match := re.match(r"\.\. auto(?:function|class):: (\S+)", line):
            yield module, match[1]
        if line.startswith("   :members:") or members:
            names = line.removeprefix("   :members:")
            members = names.rstrip().endswith(",")
            yield from ((module, name) for name in re.findall(r"\w+", names))


def test_all_public_transformations_are_in_the_reference():
    names = {name for module, name in listed() if module is seal_jax.transforms}
    public = {name for name, value in vars(seal_jax.transforms).items() if callable(value)}
    assert names == public


def test_every_function_of_the_reference_has_an_example():
    own_code = (DOCS / "own_code.md").read_text()
    without = [
        f"{module.__name__}.{name}"
        for module, name in listed()
        if inspect.isfunction(getattr(module, name))
        and ">>>" not in (getattr(module, name).__doc__ or "")
        and not re.search(rf"\b{name}\(", own_code)
    ]
    assert not without


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", DOCS, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "make_seal_tx" in (tmp_path / "api.html").read_text()
