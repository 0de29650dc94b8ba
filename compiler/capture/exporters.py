"""torch's two ONNX exporters, each as a function that writes a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir
import torch

from ..graph import Graph
from ..signature import Signature
from ..sources import Model
from ..sources.guard import first_line, quiet
from ..sources.reference import to_tensor
from .roots import divide_by_roots
from .strided import undo_strides

Exporter = Literal["dynamo", "torchscript"]

MAX_OPSET = 20
"""The highest opset that both exporters write, and the one that torch chooses by itself."""


class Export(Protocol):
    """Writes the model as ONNX; raises anything where it cannot."""

    def __call__(
        self, model: Model, example: Mapping[str, np.ndarray], opset: int, path: Path, log: Callable[[str], None]
    ) -> None:
        """Exports at the sizes of `example`."""


def example_sizes(signature: Signature) -> dict[str, int]:
    """Sizes to export at. Never 1 where more is possible: torch.export takes 1 for a constant."""
    return {name: max(axis.opt, min(2, axis.max)) for name, axis in signature.axes.items()}


def export_dynamo(
    model: Model, example: Mapping[str, np.ndarray], opset: int, path: Path, log: Callable[[str], None]
) -> None:
    """Through torch.export. Below opset 18 it converts the graph down, which may fail."""
    signature = model.signature
    assert isinstance(model.module, torch.nn.Module)
    dims = {
        name: torch.export.Dim(_identifier(name), min=axis.min, max=axis.max)
        for name, axis in signature.axes.items()
        if axis.min < axis.max
    }
    with quiet(log), torch.no_grad():
        program = torch.onnx.export(
            model.module,
            _tensors(model, example),
            dynamo=True,
            dynamic_shapes=tuple(
                {axis: dims[dim] for axis, dim in enumerate(spec.shape) if dim in dims} for spec in signature.inputs
            ),
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    undo_strides(program.model)
    divide_by_roots(program.model)
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph:
            node.metadata_props.clear()  # stack traces: paths of the machine, and half of a small file
            node.doc_string = None
    Graph(program.model).save(path)
    _show_small_model(program)


def _show_small_model(program: torch.onnx.ONNXProgram) -> None:
    """The rules of onnxscript's optimizer hold on to the last model that they saw: let that be one without weights."""
    value = ir.val("x", ir.DataType.FLOAT, [1])
    node = ir.node("Relu", [value])
    program.model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    program.optimize()


def export_torchscript(
    model: Model, example: Mapping[str, np.ndarray], opset: int, path: Path, log: Callable[[str], None]
) -> None:
    """Through torch.jit.trace. Control flow in Python becomes what the example took; the check finds that out."""
    signature = model.signature
    assert isinstance(model.module, torch.nn.Module)
    axes: dict[str, dict[int, str]] = {}
    for spec in (*signature.inputs, *signature.outputs):
        named = {
            i: dim if dim != "?" else f"{spec.name}_{i}" for i, dim in enumerate(spec.shape) if isinstance(dim, str)
        }
        axes[spec.name] = named
    tensors = _tensors(model, example)
    with quiet(log), torch.no_grad():
        # The exporter's own trace cannot enter a ScriptModule inside a module; a trace that was made before can.
        scripted = model.kind == "torchscript"
        trace: Any = torch.jit.trace
        module = trace(model.module, tensors, check_trace=False) if scripted else model.module
        torch.onnx.export(
            module,
            tensors,
            path,
            dynamo=False,
            dynamic_axes=axes,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset_version=opset,
        )


EXPORTERS: Mapping[Exporter, Export] = {"dynamo": export_dynamo, "torchscript": export_torchscript}


def root_reason(error: BaseException) -> str:
    """The first telling line of what really failed: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _tensors(model: Model, example: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    assert isinstance(model.module, torch.nn.Module)
    weight = next(model.module.parameters(), None)
    device = weight.device if weight is not None else torch.device("cpu")
    return tuple(to_tensor(example[spec.name], spec.dtype).to(device) for spec in model.signature.inputs)


def _identifier(name: str) -> str:
    word = re.sub(r"\W", "_", name)
    return word if word.isidentifier() else f"axis_{word}"
