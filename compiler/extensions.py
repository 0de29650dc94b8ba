"""Passes and targets of the user's own: classes named as ``file.py:Class``, with options behind as for ours.

Only code that the user names runs. A file is read once for each content that it has; what classes it gave is kept for
the process, so that an engine finds its target by name. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import EnginesmithError, RecipeError
from .sources.guard import first_line, foreign, where
from .sources.user_code import load_symbol

_loaded: dict[tuple[str, str], type[Any]] = {}
"""Classes by source and SHA-256 of the file."""

_named: dict[tuple[str, str], type[Any]] = {}
"""The class of each kind and name that was loaded last."""


def is_own(text: str) -> bool:
    """Whether a pass or target in text form is a class of the user's."""
    return text.strip().partition(":")[0].endswith(".py")


def anchored(text: str, folder: Path) -> str:
    """The text form with the file's path below `folder`, where it is relative and the user's."""
    return str(folder / text.strip()) if is_own(text) else text


def load_class(source: str, kind: str, base: type[Any], taken: Collection[str]) -> type[Any]:
    """The class that ``file.py:Class`` names.

    Args:
        kind: "pass" or "target".
        taken: names of our own.

    Raises:
        RecipeError: no such file, or a class that is no `base`, is not complete or has a name that is taken.
        UnknownNameError: the file does not define it.
    """
    path = Path(source.rpartition(":")[0]).absolute()
    if set(str(path)) & set(",+"):
        raise RecipeError(f"{kind} {source!r} cannot be named in a recipe", expected="a path without , and +")
    source = f"{path}:{source.rpartition(':')[2]}"
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    if (source, content) not in _loaded:
        found = load_symbol(source, kind=kind, error=RecipeError)
        _check(found, source, kind, base)
        found.source = source
        _loaded[source, content] = found
    made = _loaded[source, content]
    other = _named.get((kind, made.name))
    if made.name in taken or (other is not None and other.source != source):
        whose = "one of enginesmith's own" if other is None else f"that of {other.source}"
        raise RecipeError(f"the name {made.name!r} of {kind} {source!r} is taken: it is {whose}", hint="rename it")
    _named[kind, made.name] = made
    return made


def named(kind: str, name: str) -> type[Any] | None:
    """The user's class of that name, where one was loaded in this process."""
    return _named.get((kind, name))


def code_of(source: str) -> str:
    """SHA-256 of the file of a user's class; empty for one of ours, whose code is hashed as a whole."""
    return hashlib.sha256(Path(source.rpartition(":")[0]).read_bytes()).hexdigest() if source else ""


def files_of(texts: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files of the user's classes among passes and targets in text form, by class."""
    own = [":".join(text.strip().split(":")[:2]) for text in texts if is_own(text)]
    return {source: code_of(source) for source in own if Path(source.rpartition(":")[0]).is_file()}


def running(source: str) -> contextlib.AbstractContextManager[None]:
    """Where a method of a user's class runs: what it raises becomes an error that names its line."""
    file = Path(source.rpartition(":")[0])

    def failed(problem: BaseException) -> EnginesmithError:
        return RecipeError(
            f"the user's code failed at {where(problem, file)}", found=first_line(problem), hint=f"fix {file.name}"
        )

    return foreign(failed)


def _check(found: Any, source: str, kind: str, base: type[Any]) -> None:
    if not (isinstance(found, type) and issubclass(found, base)):
        raise RecipeError(
            f"{kind} {source!r} is no {kind}",
            expected=f"a class that extends {base.__module__}.{base.__qualname__}",
            found=f"{found!r:.80}",
        )
    parameters = vars(found).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise RecipeError(
            f"{kind} {source!r} is no frozen dataclass, so its fields are no options",
            expected="@dataclasses.dataclass(frozen=True) above the class",
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise RecipeError(f"{kind} {source!r} is not complete", expected=f"the methods {', '.join(missing)}")
    lacking = [name for name in inspect.get_annotations(base) if _is_required(base, name) and not hasattr(found, name)]
    if lacking:
        raise RecipeError(f"{kind} {source!r} is not complete", expected=f"the class attributes {', '.join(lacking)}")
    name = vars(found).get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise RecipeError(
            f"{kind} {source!r} has no name that can be typed",
            expected="small letters, digits and dashes, as in 'fold-scale'",
            found=repr(name),
        )
    names = {field.name for field in dataclasses.fields(found)}
    if clash := sorted(names & {"name", "summary", "capabilities", "source", "lowerings"}):
        raise RecipeError(f"{clash[0]!r} of {kind} {source!r} is an option", expected="a ClassVar")


def _is_required(base: type[Any], name: str) -> bool:
    return "ClassVar" in str(inspect.get_annotations(base)[name]) and not hasattr(base, name)
