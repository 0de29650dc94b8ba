"""Runs what the pages tell the reader to type, and checks what they say about the program."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from _pytest.mark.structures import ParameterSet

from enginesmith import errors
from enginesmith.compiler.recipe import make_recipe
from enginesmith.targets import TARGETS, parse_target

ROOT = Path(__file__).parents[2]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted(ROOT.glob("samples/*/README.md"))]
README = PAGES[0].read_text()


def blocks(language: str) -> list[ParameterSet]:
    """Each code block of that language in the pages, named by its page and place."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        name = page.relative_to(ROOT).as_posix().removesuffix(".md").removesuffix("/README")
        found += [pytest.param(text, id=f"{name}-{number}") for number, text in enumerate(texts, 1)]
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A folder that looks like a clone to the commands, with a cache of its own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("docs", "samples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build").mkdir()
    (folder / "cache").mkdir()
    (folder / "cache" / "captures").symlink_to(shared_cache / "captures")
    return folder


def shortened(text: str) -> str:
    """The same commands, shortened, and `make` told to print what it would do: it would run these tests."""
    short = "--rounds 6 --slice-s 0.01"
    text = text.replace("--p99 500ms", "--p99 500ms --max-batch 16").replace("--max-batch 100", "--max-batch 20")
    text = re.sub(r"^(enginesmith (?:bench|compare))\b", rf"\1 {short}", text, flags=re.MULTILINE)
    text = re.sub(r"^(enginesmith compile)\b", rf"\1 {short} --time-limit 1", text, flags=re.MULTILINE)
    return re.sub(r"^make\b", f"make -n -C '{ROOT}'", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def path(commands: Path) -> str:
    """Where a shell looks for commands."""
    return os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])


def run(command: list[str], clone: Path, path: str) -> str:
    environment = {
        **os.environ,
        "PATH": path,
        "ENGINESMITH_CACHE": str(clone / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "EPOCHS": "1",  # of the samples' training
    }
    result = subprocess.run(
        command, cwd=clone, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_commands_run(text: str, clone: Path, path: str) -> None:
    run(["bash", "-euo", "pipefail", "-c", shortened(text)], clone, path)


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text: str, clone: Path, path: str) -> None:
    short = (
        text.replace("targets=[", "rounds=6, slice_s=0.01, time_limit_s=1, targets=[", 1)
        if "compile(" in text
        else text
    )
    assert short != text or "compile(" not in text
    assert "True" in run([sys.executable, "-c", short], clone, path)


PIPELINES = [block for block in blocks("yaml") if "- run:" in block.values[0]]
RECIPES = [block for block in blocks("yaml") if "- run:" not in block.values[0]]


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_name_fields_that_exist(text: str) -> None:
    recipe = make_recipe(yaml.safe_load(text))
    assert [str(parse_target(target)) for target in recipe.targets] == list(recipe.targets)


@pytest.mark.slow
@pytest.mark.parametrize("text", PIPELINES)
def test_pipeline_commands_run(text: str, clone: Path, path: str) -> None:
    commands = re.findall(r"^- run: (enginesmith .*)$", text, re.MULTILINE)
    assert commands
    script = shortened("\n".join(commands)).replace("model/recipe.yaml", "samples/digits/recipe.yaml")
    run(["bash", "-euo", "pipefail", "-c", script], clone, path)


def test_the_extras_that_the_page_names_exist() -> None:
    named = set(re.findall(r"pip install '[\w.]+\[(\w+)\]'", README))
    named |= set(re.findall(r"`([\w-]+)`", README.partition("with the extras")[2].partition(".")[0]))
    assert named == set(importlib.metadata.metadata("enginesmith").get_all("Provides-Extra")) - {"dev"}


def test_the_table_of_targets_is_complete() -> None:
    table = README.partition("\n## Targets\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == sorted(TARGETS)
    examples = re.findall(r"--target ([\w-]+:\w+=\w+)", README)
    assert examples
    assert [str(parse_target(text)) for text in examples] == examples


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    bases = (errors.VerdictError, errors.UsageError, errors.ModelError, errors.EngineError)
    assert codes == {0, *(base.exit_code for base in bases)}


def test_the_readme_links_every_page() -> None:
    links = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))
    assert links == {page.relative_to(ROOT).as_posix() for page in DOCS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
