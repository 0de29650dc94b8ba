"""From what a model returns, which nests, to flat tensors with names.

Names are the keys that lead to a tensor, joined by dots (``logits``, ``past.0.key``), with ``output`` standing for a
root that has no name: a single tensor is ``output``, a tuple is ``output.0``, ``output.1``. None keeps its place in a
tuple or list, and is left out of dicts and dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...errors import SourceError
from ..signature import DTYPES


def flatten_outputs(value: Any, taken: Iterable[str] = ()) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors by name, and the structure that `Signature.nest` gives back. Names in `taken` get ``_out`` appended.

    Raises:
        SourceError: something else than tensors is returned.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _flatten(value, (), tensors, frozenset(taken))
    if not tensors:
        raise SourceError("the model returns no tensor", expected="a tensor, or tuples, lists and dicts of tensors")
    return tensors, None if isinstance(value, torch.Tensor) else structure


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor], taken: frozenset[str]) -> Any:
    if value is None and path:
        return None
    if isinstance(value, torch.Tensor):
        name = _output_name(path)
        _check_tensor(name, value)
        while name in tensors or name in taken:
            name += "_out"
        tensors[name] = value
        return name
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = {str(key): item for key, item in value.items() if item is not None}
        return {"dict": {key: _flatten(item, (*path, key), tensors, taken) for key, item in items.items()}}
    if isinstance(value, (tuple, list)):
        keys = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
        nested = [_flatten(item, (*path, key), tensors, taken) for key, item in zip(keys, value, strict=True)]
        return {"list" if isinstance(value, list) else "tuple": nested}
    raise SourceError(
        f"output {_output_name(path)!r} of the model is no tensor",
        expected="a tensor, or tuples, lists, dicts and dataclasses of tensors",
        found=f"{type(value).__module__}.{type(value).__qualname__}",
        hint="wrap the model in a factory that returns tensors only (transformers: use_cache=False)",
    )


def _output_name(path: tuple[str, ...]) -> str:
    return ".".join(path if path and not path[0].isdigit() else ("output", *path))


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or dtype not in DTYPES.values():
        raise SourceError(
            f"output {name!r} of the model is of a kind that engines do not have",
            expected="a dense tensor of " + ", ".join(sorted(set(DTYPES.values()))),
            found=f"{tensor.layout}, {dtype}",
        )
