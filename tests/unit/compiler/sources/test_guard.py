import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources.guard import first_line, foreign, quiet, where
from enginesmith.errors import RecipeError, SourceError


def test_nothing_reaches_the_terminal(capfd):
    logger = logging.getLogger("someone")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    lines = []
    with quiet(lines.append):
        print("printed")
        print("to stderr", file=sys.stderr)
        warnings.warn("a warning", stacklevel=1)
        logger.warning("logged")
        os.write(1, b"from C++\n")
    assert capfd.readouterr() == ("", "")
    text = "\n".join(lines)
    for part in ("printed", "to stderr", "a warning", "logged", "from C++"):
        assert part in text
    logger.warning("again")
    print("after")
    assert capfd.readouterr() == ("after\n", "again\n")
    logger.removeHandler(handler)


def fail():
    print("before")
    raise ValueError("no")


def test_the_log_is_written_when_the_code_fails():
    lines = []
    with pytest.raises(ValueError, match="no"), quiet(lines.append):
        fail()
    assert lines == ["before"]


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)])
def test_foreign_errors_are_translated(error):
    with pytest.raises(SourceError, match="translated") as caught, foreign(lambda e: SourceError("translated")):
        raise error
    assert caught.value.__cause__ is error


def test_our_own_errors_and_interrupts_pass():
    with pytest.raises(RecipeError, match="ours"), foreign(lambda e: SourceError("translated")):
        raise RecipeError("ours")
    with pytest.raises(KeyboardInterrupt, match="stop"), foreign(lambda e: SourceError("translated")):
        raise KeyboardInterrupt("stop")


def test_first_line_skips_what_tells_nothing():
    assert first_line(ValueError("\n---\n  shapes differ\nmore")) == "ValueError: shapes differ"
    assert first_line(ValueError()) == "ValueError"


def test_where_names_the_line_that_raised():
    with pytest.raises(ValueError, match="no") as caught:
        fail()
    assert re.fullmatch(r".*test_guard.py:\d+ in fail", where(caught.value))
    assert where(caught.value, Path(__file__)) == where(caught.value)


def test_where_never_names_a_line_of_ours():
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        parse_inputs(["x"])
    assert re.fullmatch(r".*test_guard.py:\d+ in test_where_never_names_a_line_of_ours", where(caught.value))
    assert where(ValueError()) == "a line that Python does not name"
    assert where(ValueError(), Path("/data/m.py")) == "/data/m.py"
