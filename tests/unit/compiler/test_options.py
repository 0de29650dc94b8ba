from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.options import build, render, split
from enginesmith.errors import RecipeError, UnknownNameError


@dataclasses.dataclass(frozen=True)
class Options:
    to: Literal["fp16", "bf16"] = "fp16"
    multiple: int = 8
    ratio: float = 0.5
    keep_io: bool = True
    label: str = "all"
    limit: int | None = None
    nodes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}")


def parse(text: str) -> Options:
    name, options = split(text)
    return build(Options, options, name)


WORDS = st.text("abcdefghijklmnopqrstuvwxyz/._0123456789", min_size=1).filter(lambda text: text != "none")


@given(
    st.builds(
        Options,
        to=st.sampled_from(["fp16", "bf16"]),
        multiple=st.integers(1, 512),
        ratio=st.floats(allow_nan=False),
        keep_io=st.booleans(),
        label=WORDS,
        limit=st.none() | st.integers(),
        nodes=st.lists(WORDS).map(tuple),
        sizes=st.lists(st.integers()).map(tuple),
    )
)
def test_text_and_options_are_inverses(options: Options) -> None:
    assert parse(render("cast", options)) == options


def test_defaults_are_not_printed() -> None:
    assert render("cast", Options()) == "cast"
    assert render("cast", Options(keep_io=False, nodes=("a", "b"))) == "cast:keep_io=false,nodes=a+b"


def test_split_reads_spaces_and_dashes() -> None:
    assert split(" cast : keep-io = no , to=bf16 ".replace(" :", ":")) == ("cast", {"keep_io": "no", "to": "bf16"})
    assert split("cast") == ("cast", {})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("multiple", "16", 16),
        ("multiple", 16, 16),
        ("ratio", "1e-3", 0.001),
        ("ratio", 1, 1.0),
        ("keep_io", "yes", True),
        ("keep_io", "No", False),
        ("keep_io", True, True),
        ("keep_io", 0, False),
        ("limit", "none", None),
        ("limit", None, None),
        ("limit", "3", 3),
        ("nodes", "a+b", ("a", "b")),
        ("nodes", "", ()),
        ("nodes", ["a", "b"], ("a", "b")),
        ("sizes", 4, (4,)),
        ("sizes", "4+8", (4, 8)),
    ],
)
def test_values_from_text_and_yaml(key: str, value: Any, expected: Any) -> None:
    converted = getattr(build(Options, {key: value}, "cast"), key)
    assert converted == expected
    assert type(converted) is type(expected)


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"option 'keep_io' of 'cast' has no value"):
        split("cast:keep_io")


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"(?s)unknown option of 'cast' 'multple'.*did you mean 'multiple'"):
        build(Options, {"multple": 4}, "cast")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("to", "int8", r"(?s)option 'to' of 'cast' has an unknown value.*expected: fp16 or bf16.*found: int8"),
        ("keep_io", "maybe", r"(?s)option 'keep_io' of 'cast' is not a truth value.*found: maybe"),
        ("multiple", True, r"(?s)option 'multiple' of 'cast' has the wrong type.*expected: int.*found: True"),
        ("multiple", "many", r"(?s)option 'multiple' of 'cast' has the wrong type.*expected: int.*found: 'many'"),
        ("sizes", "4+x", r"(?s)option 'sizes' of 'cast' has the wrong type.*found: 'x'"),
        ("multiple", 0, r"options of 'cast' are not valid: multiple is 0"),
    ],
)
def test_a_wrong_value_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(Options, {key: value}, "cast")
