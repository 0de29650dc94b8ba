"""What a source tells about itself without inputs, for people who are about to compile it."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import onnx_file
from .decoders.detect import is_folder, require_transformers
from .detect import detect
from .exported_program import open_program, program_inputs
from .flat import Parameter, python_parameters
from .guard import discard
from .module import load_factory
from .torchscript import forward_parameters, open_archive
from .weights import module_tensors, read_weights


def describe(source: str) -> dict[str, Any]:
    """Kind, inputs, operators, precisions of the weights and sizes, as plain JSON.

    Raises:
        SourceError: the source cannot be loaded.
    """
    if ".py:" in source:
        return _module(source)
    path = Path(source)
    if is_folder(path):
        return _folder(path)
    kind = detect(path)
    if kind == "onnx":
        return onnx_file.describe(path)
    readers = {"torchscript": _torchscript, "exported-program": _exported_program, "weights": _weights}
    return {**readers[kind](path), "size_bytes": path.stat().st_size}


def _folder(path: Path) -> dict[str, Any]:
    require_transformers(path)
    from .decoders.causal import open_folder

    return {**_described(open_folder(path)), "kind": "folder of transformers"}


def _module(source: str) -> dict[str, Any]:
    return _described(load_factory(source, {}, discard))


def _described(module: torch.nn.Module) -> dict[str, Any]:
    leaves = (type(part).__name__ for part in module.modules() if not list(part.children()))
    return {
        "kind": "module",
        "class": type(module).__qualname__,
        "inputs": _parameters(python_parameters(module)[0]),
        "modules": _counts(leaves),
        **_tensors(module_tensors(module)),
    }


def _torchscript(path: Path) -> dict[str, Any]:
    script = open_archive(path)
    graph: Any = script.inlined_graph
    return {
        "kind": "TorchScript",
        "inputs": _parameters(forward_parameters(script)[0]),
        "operators": _counts(node.kind() for node in graph.nodes() if not node.kind().startswith("prim::")),
        **_tensors(module_tensors(script)),
    }


def _exported_program(path: Path) -> dict[str, Any]:
    program = open_program(path)
    ranges = {str(symbol): f"{bounds.lower}..{bounds.upper}" for symbol, bounds in program.range_constraints.items()}
    return {
        "kind": "exported program",
        "inputs": [
            {"name": item.spec.name, "shape": "x".join(map(str, item.dims)) or "scalar", "dtype": item.spec.dtype}
            for item in program_inputs(program)[1]
        ],
        "axes": ranges,
        "operators": _counts(str(node.target) for node in program.graph.nodes if node.op == "call_function"),
        **_tensors(dict(program.state_dict)),
    }


def _weights(path: Path) -> dict[str, Any]:
    tensors = {name: value for name, value in read_weights(path).items() if isinstance(value, torch.Tensor)}
    rows = [
        {"name": name, "shape": "x".join(map(str, tensor.shape)) or "scalar", "dtype": _dtype(tensor)}
        for name, tensor in tensors.items()
    ]
    return {"kind": "weights", "tensors": rows, **_tensors(tensors)}


def _parameters(parameters: Iterable[Parameter]) -> list[dict[str, str]]:
    return [{"name": p.name, "needed": "yes" if p.required else "no"} for p in parameters]


def _tensors(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "precisions": _counts(map(_dtype, tensors.values())),
        "weight_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
    }


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(collections.Counter(names).most_common())
