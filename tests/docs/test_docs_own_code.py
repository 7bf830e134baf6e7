"""The code of the documentation runs as it stands, and the notebooks are well formed.

``tests/environments`` executes the notebooks.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))


def python_blocks(path):
    """Yield ``(first line, code)`` of the fenced Python blocks."""
    text = path.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start()].count("\n") + 2, match[1]


def run(code, first_line, path, namespace):
    exec(compile("\n" * (first_line - 1) + code, path, "exec"), namespace)


@pytest.mark.parametrize(
    ("page", "least"),
    [pytest.param("own_code.md", 11, marks=pytest.mark.slow), ("evaluations.md", 1)],
)
def test_own_code(page, least):
    path = ROOT / "docs" / page
    blocks = list(python_blocks(path))
    assert len(blocks) >= least
    namespace = {"__name__": "own_code"}
    for first_line, code in blocks:
        run(code, first_line, path, namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_are_well_formed(path):
    book = json.loads(path.read_text())
    try:
        import nbformat
    except ModuleNotFoundError:
        pass
    else:
        nbformat.validate(nbformat.from_dict(book))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert {"cells", "metadata", "nbformat", "nbformat_minor"} == set(book)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            fields |= {"execution_count", "outputs"}
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == fields
