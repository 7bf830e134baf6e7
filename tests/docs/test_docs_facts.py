"""Settings, options, commands and links that the documentation and the scripts name exist."""

import dataclasses
import json
import re
import shlex
import typing
from pathlib import Path

import pytest

from seal_jax import methods
from seal_jax.cli import configs
from seal_jax.cli import main as cli
from seal_jax.core.settings import Settings
from tools.preflight import command as preflight

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [
        *ROOT.glob("docs/*.md"),
        *(path for path in ROOT.glob("launch/*") if path.is_file()),
    ]
)
SECTIONS = {
    name: {field.name for field in dataclasses.fields(typing.get_type_hints(Settings)[name])}
    for name in ("data", "model", "optimizer", "train", "run")
}
SECTIONS["method"] = {"name"}.union(
    *({field.name for field in dataclasses.fields(methods.options(name))} for name in methods.NAMES)
)


def read(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def text(request):
    return read(request.param)


def test_settings_exist(text):
    named = re.findall(r"--config\.([a-z_]+)\.([a-z_]+)=", text)
    sections = "|".join(SECTIONS)
    named += re.findall(rf"`({sections})\.([a-z_]+)(?:=[^`]*)?`", text)
    for section, field in named:
        # Such as `train.lower`, in prose about code: none so far.
        assert field in SECTIONS[section], f"{section}.{field}"


def commands(text):
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"python -m (?:seal_jax |tools\.)([a-z]+ -[^#`|\n]*)", joined):
        words = shlex.split(re.split(r"  +(?=[a-z])", line.strip())[0])
        if not any("..." in word or word.endswith("ARGS") for word in words):
            yield words


def test_commands_parse(text):
    for words in commands(text):
        words = [re.sub(r"\[.*|\.$", "", word) for word in words if not word.startswith("[")]
        kind = next((word[7:] for word in words if word.startswith("--kind=")), None)
        if "--help" in words:
            with pytest.raises(SystemExit):
                cli.parser(kind).parse_known_args(words)
            continue
        is_preflight = words[0] == "preflight"
        parser = preflight.parser() if is_preflight else cli.parser(kind)
        _, overrides = parser.parse_known_args(words[is_preflight:])
        assert all(word.startswith("--config.") for word in overrides), words
        config = next((word[9:] for word in words if word.startswith("--config=")), "FILE")
        if not config.startswith("FILE"):
            configs.load(str(ROOT / config), overrides)


def test_the_commands_are_found():
    found = [words for path in FILES for words in commands(read(path))]
    assert {words[0] for words in found} >= {"train", "sweep", "prepare", "preflight"}


def test_configs_and_links_exist(text):
    for config, variant in re.findall(r"(configs/\w+\.py)(?::(\w+))?", text):
        assert (ROOT / config).is_file(), config
        if variant:
            assert variant in configs.variants(str(ROOT / config)), f"{config}:{variant}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".md"], ids=lambda p: p.name
)
def test_links(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert "://" in link or (path.parent / link).exists(), link
