"""Rows that are in memory: what a function of the user's yields, and Polygraphy's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.sources.guard import first_line, foreign, where
from ..compiler.sources.user_code import check_call, load_symbol
from ..errors import DataError
from .parts import MemoryPart, Part


def function_parts(text: str) -> Callable[[], Iterator[Part]]:
    """Of what ``file.py:function`` yields; the function is called each time."""
    file = Path(text.rpartition(":")[0]).absolute()

    def failed(error: BaseException) -> DataError:
        return DataError(f"the data function failed at {where(error, file)}", found=first_line(error))

    def parts() -> Iterator[Part]:
        function = load_symbol(text, kind="data function", error=DataError)
        check_call(function, text, kind="data function", error=DataError)
        with foreign(failed):
            made = function()
        if not isinstance(made, Iterable):
            raise DataError(
                f"data function {text!r} gives nothing that can be iterated",
                expected="dicts of arrays by input name",
                found=type(made).__name__,
            )
        items, count = iter(made), 0
        while True:
            with foreign(failed):
                item = next(items, None)
            if item is None:
                return
            yield _memory_part(item, f"{text}, batch {count}")
            count += 1

    return parts


def polygraphy_parts(path: Path) -> Callable[[], Iterator[Part]]:
    """Of Polygraphy's inputs."""

    def parts() -> Iterator[Part]:
        from polygraphy.exception import PolygraphyException
        from polygraphy.json import load_json

        try:
            feeds = list(load_json(str(path)))
        except (PolygraphyException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a Polygraphy input file", found=error) from error
        for count, feed in enumerate(feeds):
            yield _memory_part(feed, f"{path}, batch {count}")

    return parts


def _memory_part(item: Any, name: str) -> MemoryPart:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is no dict of arrays by input name", found=type(item).__name__)
    arrays: dict[str, np.ndarray] = {}
    for key, value in item.items():
        try:
            arrays[str(key)] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot take
            raise DataError(f"{name}: {key!r} is no array", found=error) from error
        if arrays[str(key)].dtype.hasobject:
            raise DataError(f"{name}: {key!r} holds Python objects", expected="an array of numbers or text")
    return MemoryPart(name, arrays)
