from __future__ import annotations

import dataclasses

import click
import pytest

from enginesmith.compiler.console.serving import serving_of, serving_options
from enginesmith.errors import UsageError
from enginesmith.serving.settings import Serving


def parsed(*arguments: str) -> Serving:
    command = click.Command("serve", params=serving_options(), callback=lambda **values: serving_of(values))
    return command.main(list(arguments), standalone_mode=False)


def test_without_options_all_is_the_default():
    assert parsed() == Serving()


def test_every_field_has_an_option():
    assert [option.name for option in serving_options()] == [field.name for field in dataclasses.fields(Serving)]


def test_options_become_fields():
    found = parsed("--gpus", "0,2", "--preferred", "8,4", "--max-queue", "64", "--timeout-ms", "2.5", "-e", "best")
    assert found == Serving(engine="best", gpus=(0, 2), preferred=(8, 4), max_queue=64, timeout_ms=2.5)
    assert parsed("--no-merge") == Serving(merge=False)


@pytest.mark.parametrize("option", ["--gpus", "--preferred"])
def test_numbers_that_cannot_be_read(option):
    with pytest.raises(UsageError, match=f"{option} '0;1' cannot be read"):
        parsed(option, "0;1")
