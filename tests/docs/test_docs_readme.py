"""The generated parts of the documentation are current; shown code is the real code."""

import re
from pathlib import Path

import pytest

from tools import generate_docs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TEXTS = generate_docs.generate()


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_generated_parts_are_current(file):
    assert file.read_text() == TEXTS[file], "run python -m tools.generate_docs"


def test_links():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 50
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    ("file", "number"), [("forgetting.py", 0), ("methods/shrink_perturb.py", 1)]
)
def test_the_worked_example_is_the_code(file, number):
    """Docstrings and comments apart, the lines shown stand in the file, in this order and together."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[number]
    code = (ROOT / "seal_jax" / file).read_text()
    code = re.sub(r'\n +r?""".*?"""', "", code, flags=re.DOTALL)
    code = re.sub(r"\n +#.*", "", code)

    def lines(text):
        return "\n".join(line for line in text.splitlines() if line.strip())

    assert lines(shown) in lines(code)
