"""Functions and classes named as ``file.py:name``. Needs the standard library only."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import EnginesmithError, RecipeError, SourceError, UnknownNameError
from .guard import Log, discard, first_line, foreign, quiet, where


def load_symbol(
    source: str, *, kind: str = "factory", log: Log = discard, error: type[EnginesmithError] = SourceError
) -> Any:
    """Runs the user's file and gives what ``file.py:name`` names; `kind` says in messages what it is for.

    Raises:
        RecipeError: `source` is not of that form.
        UnknownNameError: the file does not define that name.
        EnginesmithError: there is no such file, or it fails; of the class `error`.
    """
    path, colon, name = source.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise RecipeError(f"{kind} {source!r} cannot be read", expected="file.py:name")
    file = Path(path).absolute()
    if not file.is_file():
        raise error(f"the file of {kind} {source!r} does not exist", hint="check the path before the colon")
    with running(file, log, error):
        names = _execute(file)
    if name not in names:
        raise UnknownNameError(f"{kind} in {file.name}", name, definitions(file))
    return names[name]


def check_call(
    function: Any,
    source: str,
    *,
    kind: str,
    arguments: Sequence[str] = (),
    keywords: Mapping[str, Any] | None = None,
    error: type[EnginesmithError],
) -> None:
    """Checks that what `source` names can be called with arguments for these parameters, before it is.

    Raises:
        UnknownNameError: a keyword that is no parameter.
        EnginesmithError: it is no function, or takes other arguments; of the class `error`.
    """
    if not callable(function):
        found = f"{function!r:.80}, of type {type(function).__name__}"
        raise error(f"{kind} {source!r} is no function", expected="a function or class", found=found)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: only calling it tells
        return
    name, given = source.rpartition(":")[2], dict(keywords or {})
    try:
        signature.bind(*arguments, **given)
    except TypeError as problem:
        parameters = signature.parameters
        if unknown := [key for key in given if key not in parameters]:
            raise UnknownNameError(f"parameter of {kind} {name}{signature}", unknown[0], parameters) from problem
        raise error(
            f"{kind} {name}{signature} does not take the arguments that it gets: {problem}",
            expected=f"{name}({', '.join([*arguments, *given])})",
            found=f"{name}{signature}",
        ) from problem


@contextlib.contextmanager
def running(file: Path, log: Log = discard, error: type[EnginesmithError] = SourceError) -> Iterator[None]:
    """Where code of the user's file runs: it may import its neighbours, and what it raises becomes an `error`."""

    def failed(problem: BaseException) -> EnginesmithError:
        return error(
            f"the user's code failed at {where(problem, file)}", found=first_line(problem), hint=f"fix {file.name}"
        )

    folder = str(file.parent)
    sys.path.insert(0, folder)
    try:
        with quiet(log), foreign(failed):
            yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def definitions(file: Path) -> list[str]:
    """Names of the functions and classes at the top of a Python file, without running it."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


class _FromSource(importlib.machinery.SourceFileLoader):
    """Reads no bytecode: that of a file which was changed within a second, and is as long, would be taken for it."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _execute(file: Path) -> dict[str, Any]:
    name = f"enginesmith_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_FromSource(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return vars(module)
