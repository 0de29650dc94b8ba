"""The pages that are made from the code are current, and say what is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from enginesmith.compiler.recipe import Recipe
from enginesmith.passes import PASSES
from enginesmith.targets import TARGETS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generate"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_not_current_is_named(generate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "passes.md").write_text("old")
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == "not current: passes.md; run `make docs`\n"


def test_every_field_pass_target_and_option_is_there(generate):
    recipes = generate.recipes()
    assert all(f"\n| `{name}` | " in recipes for name in Recipe.model_fields)
    assert "| `targets` | `--target`, `-t` `NAME[:OPTION=VALUE,...]` |" in recipes
    passes, targets = generate.passes(), generate.targets()
    assert all(f"\n## {name}\n" in passes for name in PASSES)
    assert all(f"\n## {name}\n" in targets for name in TARGETS)
    assert "| `least` | a whole number | `19` | the opset that is wanted. |" in passes
    assert "| `threads` | a whole number, none | `none` | threads that share an operator" in targets


def test_two_fields_may_share_a_line_and_a_base_may_describe_one(generate):
    class Base:
        """One.

        Attributes:
            first, second: two words
                on two lines.
        """

    class Derived(Base):
        """Two.

        Attributes:
            third: ``code`` here.
        """

    assert generate._attributes(Derived) == {
        "first": "two words on two lines.",
        "second": "two words on two lines.",
        "third": "`code` here.",
    }
    assert generate._summary(Derived) == "Two."
