"""From flat tensors with names to a model's own arguments, which nest: ``state.0`` is the first item of ``state``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...errors import RecipeError, UnknownNameError
from .outputs import flatten_outputs


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of forward. `container` is the type that items named ``name.0``, ``name.1`` are put in."""

    name: str
    required: bool
    by_keyword: bool = True
    container: type[list[Any]] | type[tuple[Any, ...]] = tuple

    def __str__(self) -> str:
        return self.name if self.required else f"{self.name} (optional)"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The flat tensor of that index."""

    index: int


@dataclasses.dataclass(frozen=True)
class Fixed:
    """An argument that is no input."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Trees of `Leaf` and `Fixed` from which forward's arguments are made."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of forward."""
        return (
            tuple(_fill(tree, tensors) for tree in self.positional),
            {name: _fill(tree, tensors) for name, tree in self.keywords.items()},
        )


Arrange = Callable[[Sequence[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Makes forward's arguments from the flat tensors."""


def python_parameters(module: torch.nn.Module) -> tuple[list[Parameter], bool]:
    """Parameters of a Python forward, and whether it takes any keyword besides them."""
    parameters, any_keyword = [], False
    for p in inspect.signature(module.forward).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            any_keyword = True
            continue
        by_keyword = p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
        required = p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        is_list = re.match(r"(typing\.)?(Optional\[)?list\[", str(p.annotation), re.IGNORECASE) is not None
        parameters.append(Parameter(p.name, required, by_keyword, list if is_list else tuple))
    return parameters, any_keyword


def arrange(
    parameters: Sequence[Parameter], names: Iterable[str], constants: Mapping[str, Any], *, any_keyword: bool = False
) -> Arrangement:
    """Says how tensors of these names become forward's arguments; `constants` are the arguments that are no inputs.

    Raises:
        UnknownNameError: a name that forward does not take.
        RecipeError: a required parameter without input, or items of a list that leave gaps.
    """
    tree: dict[str, Any] = {name: Fixed(value) for name, value in constants.items()}
    for index, name in enumerate(names):
        head, *path = name.split(".")
        _check_known(head, parameters, any_keyword)
        at: Any = tree
        for key in [head, *path][:-1]:
            at = at.setdefault(key, {}) if isinstance(at, dict) else at
        last = [head, *path][-1]
        if not isinstance(at, dict) or last in at:
            raise RecipeError(f"{name!r} is given twice, as a whole and in parts", expected="one of both")
        at[last] = Leaf(index)
    for name in constants:
        _check_known(name, parameters, any_keyword)
    if missing := [p.name for p in parameters if p.required and p.name not in tree]:
        raise RecipeError(
            f"the model's forward needs {missing[0]!r}, which no input gives",
            expected=describe(parameters),
            found=", ".join(tree) or "nothing",
            hint=f"pass --input {missing[0]}:SHAPE[:DTYPE]",
        )
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    containers = {p.name: p.container for p in parameters}
    by_position = [p.name for p in parameters if not p.by_keyword]
    for name in [*(n for n in by_position if n in tree), *(n for n in tree if n not in by_position)]:
        value = _collect(tree[name], name, containers.get(name, tuple))
        if name not in by_position:
            keywords[name] = value
        elif isinstance(value, (tuple, list)) and not any(p.required for p in parameters if p.name == name):
            positional.extend(value)  # *args
        else:
            positional.append(value)
    return Arrangement(tuple(positional), keywords)


def describe(parameters: Iterable[Parameter]) -> str:
    """The parameters for a message."""
    return "forward(" + ", ".join(map(str, parameters)) + ")"


class FlatModule(torch.nn.Module):
    """A model that takes flat positional tensors and returns a flat tuple; `flat_module` makes one."""

    def __init__(self, model: torch.nn.Module, arrangement: Arrange, input_names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.arrangement = arrangement
        self.input_names = tuple(input_names)
        self.training = False

    def train(self, mode: bool = True) -> FlatModule:
        """Does nothing: the model was put into eval mode at loading, and exported programs refuse to be told so."""
        return self

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs in order."""
        return tuple(self.named(*tensors)[0].values())

    def named(self, *tensors: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
        """Outputs by name, and how they nest."""
        arguments, keywords = self.arrangement(tensors)
        return flatten_outputs(self.model(*arguments, **keywords), self.input_names)


def flat_module(model: torch.nn.Module, arrangement: Arrange, input_names: Sequence[str]) -> FlatModule:
    """Wraps a model so that torch's exporters see one parameter of forward for each input.

    With ``*tensors`` they would want dynamic shapes nested as the arguments are, and would name inputs by number.
    """

    def forward(self: FlatModule, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return FlatModule.forward(self, *tensors)

    names = ["self", *_identifiers(input_names)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    cls: type[FlatModule] = type("FlatModule", (FlatModule,), {"forward": forward, "__module__": __name__})
    return cls(model, arrangement, input_names)


def _identifiers(names: Iterable[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        word = re.sub(r"\W", "_", name)
        found.append(word if word not in (*found, "self") and word.isidentifier() else f"input_{len(found)}")
    return found


def _check_known(name: str, parameters: Sequence[Parameter], any_keyword: bool) -> None:
    known = [p.name for p in parameters]
    if name in known or (any_keyword and not difflib.get_close_matches(name, known, n=1)):
        return
    raise UnknownNameError("parameter of the model's forward", name, known)


def _collect(tree: Any, name: str, container: type) -> Any:
    if not isinstance(tree, dict):
        return tree
    items = {key: _collect(child, f"{name}.{key}", container) for key, child in tree.items()}
    if not all(key.isdigit() for key in items):
        return items
    if sorted(map(int, items)) != list(range(len(items))):
        raise RecipeError(
            f"items of {name!r} leave gaps",
            expected=", ".join(f"{name}.{i}" for i in range(len(items))),
            found=", ".join(f"{name}.{i}" for i in items),
        )
    return container(items[str(i)] for i in range(len(items)))


def _fill(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(tree, Leaf):
        return tensors[tree.index]
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, dict):
        return {key: _fill(child, tensors) for key, child in tree.items()}
    return type(tree)(_fill(child, tensors) for child in tree)
