from __future__ import annotations

import inspect
import re

import pytest

from enginesmith import errors
from enginesmith.errors import EngineError, EnginesmithError, ModelError, UnknownNameError, UsageError, VerdictError

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, EnginesmithError)
]  # fmt: skip


def tree() -> list[tuple[int, str, str]]:
    """(depth, name, exit code) of each line of the tree drawn at the top of errors.py."""
    pattern = re.compile(r"^ {4}([│├└─ ]*)(\w+Error)\b *(\d?)", re.MULTILINE)
    return [(len(lead) // 4, name, code) for lead, name, code in pattern.findall(errors.__doc__ or "")]


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = tree()
    parents: dict[str, str] = {}
    path: list[str] = []
    for depth, name, _ in drawn:
        del path[depth:]
        if path:
            parents[name] = path[-1]
        path.append(name)
    assert {name for _, name, _ in drawn} == {cls.__name__ for cls in CLASSES}
    assert parents == {cls.__name__: cls.__base__.__name__ for cls in CLASSES if cls is not EnginesmithError}


def test_the_drawn_exit_codes_are_the_real_ones() -> None:
    drawn = {name: int(code) for _, name, code in tree() if code}
    assert drawn == {"VerdictError": 1, "UsageError": 2, "ModelError": 3, "EngineError": 4}
    for base in (VerdictError, UsageError, ModelError, EngineError):
        assert base.exit_code == drawn[base.__name__]
        assert {cls.exit_code for cls in CLASSES if issubclass(cls, base)} == {base.exit_code}


def test_a_message_says_what_was_expected_found_and_what_to_do() -> None:
    error = EnginesmithError("input 'x' has the wrong rank", expected="(1, 3)", found=(1,), hint="add an axis")
    assert str(error) == "input 'x' has the wrong rank\n  expected: (1, 3)\n  found: (1,)\n  to do: add an axis"


def test_a_message_leaves_out_what_is_not_known() -> None:
    assert str(EnginesmithError("it failed")) == "it failed"
    assert str(EnginesmithError("it failed", found=0)) == "it failed\n  found: 0"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown target 'tensort'") as caught:
        raise UnknownNameError("target", "tensort", ["torchscript", "tensorrt"])
    assert caught.value.expected == "one of tensorrt, torchscript"
    assert caught.value.hint == "did you mean 'tensorrt'?"


def test_an_unknown_name_far_from_all_gets_no_suggestion() -> None:
    error = UnknownNameError("target", "abacus", ["tensorrt"])
    assert error.hint is None
    assert UnknownNameError("engine", "x", []).expected is None
