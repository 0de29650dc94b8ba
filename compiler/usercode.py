"""Loads the Python files that the user named as code: factories, data functions, metrics. Nothing else is executed."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import SourceError, UnknownNameError
from .sources.guard import first_line, foreign, where


def load_symbol(source: str, kind: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` names; `kind` says in messages what it is for.

    Raises:
        SourceError: there is no such file, or running it fails.
        UnknownNameError: the file has no such function.
    """
    match = re.fullmatch(r"(.+\.py):(\w+)", source)
    if not match:
        raise SourceError(f"{kind} {source!r} cannot be read", expected="file.py:function")
    file, name = Path(match[1]).absolute(), match[2]
    if not file.is_file():
        raise SourceError(f"{kind} file {str(file)!r} does not exist", hint="check the path before the colon")
    with running(file, kind):
        names = vars(execute(file))
    if not callable(names.get(name)):
        own = [n for n, value in names.items() if getattr(value, "__module__", "") == names["__name__"]]
        raise UnknownNameError(f"{kind} in {file.name}", name, own)
    found: Callable[..., Any] = names[name]
    return found


@contextmanager
def running(file: Path, kind: str) -> Iterator[None]:
    """Runs the user's code with the file's neighbours importable, as they are for a script.

    Raises:
        SourceError: whatever the code raises, with the line of `file` that did.
    """

    def failed(error: BaseException) -> SourceError:
        return SourceError(
            f"the {kind} file failed at {where(error, file)}", found=first_line(error), hint=f"fix {file}"
        )

    sys.path.insert(0, str(file.parent))
    try:
        with foreign(failed):
            yield
    finally:
        if str(file.parent) in sys.path:
            sys.path.remove(str(file.parent))


def execute(file: Path) -> ModuleType:
    """Imports a file under a name of its own."""
    name = f"enginesmith_source_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SourceError(f"{file} cannot be imported", expected="a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their own module up
    spec.loader.exec_module(module)
    return module
