"""Passes and targets take their options as frozen dataclasses: the fields are the options, in text and in recipes.

The text form is ``name`` or ``name:key=value,key=value``, for instance ``cast:to=fp16,keep_io=true``. A tuple's items
are joined by ``+``. `parse` and `render` are inverses; `render` leaves defaults out.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import RecipeError, UnknownNameError

T = TypeVar("T")


def split(text: str) -> tuple[str, dict[str, str]]:
    """Separates ``name:key=value,key=value`` into the name and its options, still as text.

    The name of a class of the user's is ``file.py:Class``.
    """
    name, _, tail = text.strip().partition(":")
    if name.endswith(".py"):
        cls, _, tail = tail.partition(":")
        name = f"{name}:{cls}"
    options: dict[str, str] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"option {item!r} of {name!r} has no value", expected="key=value", found=item)
        options[key.strip().replace("-", "_")] = value.strip()
    return name.strip(), options


def build(cls: type[T], options: Mapping[str, Any], owner: str) -> T:
    """Makes the dataclass `cls` from options given as text or as YAML values.

    Raises:
        UnknownNameError: an option that `cls` does not have.
        RecipeError: a value of the wrong type, or one that the class itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise UnknownNameError(f"option of {owner!r}", key, fields)
        values[key] = _convert(value, hints[key], f"option {key!r} of {owner!r}")
    try:
        return cls(**values)
    except ValueError as error:
        raise RecipeError(f"options of {owner!r} are not valid: {error}") from error


def render(name: str, options: Any) -> str:
    """The text form of a dataclass of options, defaults left out."""
    items = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            items.append(f"{field.name}={_text(value)}")
    return f"{name}:{','.join(items)}" if items else name


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(_text(item) for item in value)
    return str(value)


def _convert(value: Any, hint: Any, what: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _convert(value, inner, what)
    if origin is typing.Literal:
        if value not in arguments:
            raise RecipeError(f"{what} has an unknown value", expected=" or ".join(map(str, arguments)), found=value)
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = value.split("+") if value else []
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, arguments[0], what) for item in items)
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise RecipeError(f"{what} is not a truth value", expected="true or false", found=value)
        return words[str(value).lower()]
    if isinstance(value, bool) and hint is not str:
        raise RecipeError(f"{what} has the wrong type", expected=hint.__name__, found=value)
    try:
        return hint(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what} has the wrong type", expected=hint.__name__, found=repr(value)) from error
