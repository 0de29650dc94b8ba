"""Passes and targets of the user's own, and what is said about those that will not do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from enginesmith.compiler import extensions
from enginesmith.compiler.extensions import anchored, code_of, files_of, is_own
from enginesmith.compiler.recipe import Recipe, read_recipe
from enginesmith.compiler.storage.fingerprint import compile_key
from enginesmith.errors import RecipeError, UnknownNameError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import PassResult
from enginesmith.targets import get_target, is_known, parse_target

PASS = """
import dataclasses
from typing import ClassVar
from enginesmith.passes.base import Pass, PassResult, Refusal

@dataclasses.dataclass(frozen=True)
class Mine(Pass):
    least: int = 1
    name: ClassVar[str] = "mine"
    def apply(self, graph, context):
        return PassResult(False, refusals=(Refusal(f"least is {self.least}"),))
"""
TARGET = """
import dataclasses
from typing import ClassVar
from enginesmith.targets.base import Availability, Capabilities, Target

@dataclasses.dataclass(frozen=True)
class Mine(Target):
    fast: bool = False
    name: ClassVar[str] = "my-target"
    summary: ClassVar[str] = "for tests"
    capabilities: ClassVar[Capabilities] = Capabilities("graph", ("fp32",), ("cpu",))
    def availability(self):
        return Availability(True, True)
    def build(self, request): ...
    def runner(self, directory, info): ...
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_loaded", {})
    monkeypatch.setattr(extensions, "_named", {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PASS)
    return path


def test_a_pass_in_a_file_is_made_with_options_and_prints_back(file, read, monkeypatch):
    made = parse_pass(f"{file}:Mine:least=3")
    assert dataclasses.asdict(made) == {"least": 3}
    assert str(made) == f"{file}:Mine:least=3"
    assert parse_pass(str(made)) == made
    assert isinstance(made(read("g (float[2] x) => (float[2] y) { y = Neg(x) }"), None), PassResult)
    monkeypatch.chdir(file.parent)
    assert parse_pass("mine.py:Mine:least=3") == made
    assert str(parse_pass("mine.py:Mine")) == f"{file}:Mine"


def test_a_target_in_a_file_is_known_by_its_name_afterwards(file):
    file.write_text(TARGET)
    assert not is_known("my-target")
    with pytest.raises(UnknownNameError, match="unknown target 'my-target'"):
        get_target("my-target")
    made = parse_target(f"{file}:Mine:fast=true")
    assert str(made) == f"{file}:Mine:fast=true"
    assert is_known("my-target")
    assert get_target("my-target", {"fast": True}) == made


def test_a_changed_file_is_read_again(file):
    assert parse_pass(f"{file}:Mine") == parse_pass(f"{file}:Mine")
    before, key = code_of(f"{file}:Mine"), compile_key(Recipe(passes=(f"{file}:Mine:least=2",)), {})
    file.write_text(PASS.replace("least: int = 1", "least: int = 7"))
    assert parse_pass(f"{file}:Mine").least == 7
    assert code_of(f"{file}:Mine") != before
    assert compile_key(Recipe(passes=(f"{file}:Mine:least=2",)), {}) != key


def test_unknown_options_and_classes_get_a_suggestion(file):
    with pytest.raises(UnknownNameError, match=r"unknown option of .*mine.py:Mine' 'last'") as caught:
        parse_pass(f"{file}:Mine:last=2")
    assert caught.value.hint == "did you mean 'least'?"
    with pytest.raises(UnknownNameError, match=r"unknown pass in mine.py 'Min'") as caught:
        parse_pass(f"{file}:Min")
    assert caught.value.hint == "did you mean 'Mine'?"


@pytest.mark.parametrize(
    ("old", "new", "message", "expected"),
    [
        ("class Mine(Pass)", "class Mine", "is no pass", "a class that extends enginesmith.passes.base.Pass"),
        ("(frozen=True)", "", "cannot inherit non-frozen dataclass", None),
        ("@dataclasses.dataclass(frozen=True)", "", "is no frozen dataclass", "@dataclasses.dataclass(frozen=True)"),
        ("def apply", "def run", "is not complete", "the methods apply"),
        ('name: ClassVar[str] = "mine"', "", "is not complete", "the class attributes name"),
        ('"mine"', '"My pass"', "has no name that can be typed", "small letters"),
        ("name: ClassVar[str]", "name: str", "'name' of pass .* is an option", "a ClassVar"),
        ('"mine"', '"cast"', "the name 'cast' of pass .* is taken: it is one of enginesmith's own", None),
        ("import dataclasses", "import nothing_of_that_name", "the user's code failed at .*mine.py:2", None),
        ("class Mine", "clas Mine", "the user's code failed at .*mine.py:", None),
    ],
)
def test_a_pass_that_will_not_do_says_why(file, old, new, message, expected):
    file.write_text(PASS.replace(old, new))
    with pytest.raises(RecipeError, match=r"\w") as caught:
        parse_pass(f"{file}:Mine")
    told = f"{caught.value.message} {caught.value.found}"
    assert re.search(message, told), told
    assert (caught.value.expected or "").startswith(expected or "")


def test_a_target_that_lacks_something_says_what(file):
    file.write_text(TARGET.replace("summary: ClassVar[str]", "other: ClassVar[str]"))
    with pytest.raises(RecipeError, match="is not complete") as caught:
        parse_target(f"{file}:Mine")
    assert caught.value.expected == "the class attributes summary"
    with pytest.raises(RecipeError, match="is no pass"):
        parse_pass(f"{file}:Mine")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"the file of pass .*absent.py:Mine' does not exist"):
        parse_pass(f"{tmp_path}/absent.py:Mine")


def test_a_path_that_would_not_fit_into_options(tmp_path):
    with pytest.raises(RecipeError, match="cannot be named in a recipe") as caught:
        parse_pass(f"{tmp_path}/a+b.py:Mine")
    assert caught.value.expected == "a path without , and +"


def test_two_files_may_not_give_one_name(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(PASS)
    parse_pass(f"{file}:Mine")
    with pytest.raises(
        RecipeError, match=r"the name 'mine' of pass .*other.py:Mine' is taken: it is that of .*mine.py"
    ):
        parse_pass(f"{other}:Mine")


def test_what_a_pass_raises_names_the_line_in_its_file(file, read):
    file.write_text(PASS.replace("return PassResult", "raise KeyError('no such thing')\n        return PassResult"))
    with pytest.raises(RecipeError, match=r"the user's code failed at .*mine.py:11 in apply") as caught:
        parse_pass(f"{file}:Mine")(read("g (float[2] x) => (float[2] y) { y = Neg(x) }"), None)
    assert caught.value.found == "KeyError: 'no such thing'"
    file.write_text(PASS.replace("PassResult(False,", "PassResult(True,"))
    with pytest.raises(RecipeError, match=r"the user's code failed at .*mine.py") as caught:
        parse_pass(f"{file}:Mine")(read("g (float[2] x) => (float[2] y) { y = Neg(x) }"), None)
    assert "PassContractError" in str(caught.value.found)


def test_files_in_a_recipe_are_relative_to_it(file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: net.onnx\npasses: [mine.py:Mine, simplify]\ntargets: mine.py:Mine:a=1\n"
    )
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.passes == (f"{file}:Mine", "simplify")
    assert recipe.targets == (f"{file}:Mine:a=1",)
    assert set(files_of((*recipe.passes, *recipe.targets))) == {f"{file}:Mine"}


def test_which_text_names_a_file():
    assert [is_own(text) for text in ("a.py:B", "/x/a.py:B:c=1", "cast:to=fp16", "prune:on=/a.py:B", "simplify")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert anchored("cast", Path("/x")) == "cast"
    assert anchored("/y/a.py:B", Path("/x")) == "/y/a.py:B"
