"""ONNX files. The signature is the file's; ranges of its dynamic axes come from the user."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import GraphError, SourceError
from ..alignment.share import aligned_share
from ..graph import Graph
from ..graph.cost import costs, parameters
from ..signature import DTYPES, Signature, TensorSpec
from . import Model
from .guard import first_line
from .ranges import FileInput, with_ranges

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""Operators whose constants are weights; elsewhere infinity may be meant, as in an attention mask."""

MULTIPLES = (8, 16)
"""What dimensions are a multiple of, for Tensor Cores in half precision and in 8 bits."""


class OnnxReference:
    """The file itself, run by ONNX Runtime on the CPU with all optimisations off."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        import onnxruntime.capi.onnxruntime_pybind11_state as state

        try:
            return run_session(self._session, inputs)
        except (state.Fail, state.InvalidArgument, state.RuntimeException, state.NotImplemented) as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise SourceError(
                "the ONNX model failed when ONNX Runtime ran it",
                found=f"{first_line(error)} (inputs: {shapes})",
                hint="check --input and --dynamic, or give --data with values that the model accepts",
            ) from error

    def reset(self) -> None:
        """An ONNX graph has no state."""


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Opens a file in ONNX Runtime on the CPU, without optimisations.

    Raises:
        SourceError: ONNX Runtime is not installed, or refuses the file.
    """
    try:
        import onnxruntime
        import onnxruntime.capi.onnxruntime_pybind11_state as state
    except ImportError as error:
        raise SourceError(
            "ONNX Runtime is needed to run graphs, and is not installed", hint="pip install 'enginesmith[cpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # which would hold a second copy of the weights
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (
        state.Fail,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
    ) as error:
        raise SourceError(f"ONNX Runtime refuses {path.name}", found=first_line(error)) from error


def run_session(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name."""
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def load(path: Path, *, inputs: Signature | None, dynamic: Sequence[str] = ()) -> Model:
    """Loads an ONNX file.

    Raises:
        GraphError: the file or its external data is damaged, missing or outside its folder.
        SourceError: weights with NaN, random operators, types that are no tensors.
        RecipeError: `inputs` do not fit the file, or leave an axis without range.
    """
    graph = Graph.load(path)
    graph.verify()
    _check_nodes(graph)
    declared = [v for v in graph.model.graph.inputs if not v.is_initializer()]
    values = [FileInput(_spec(value), _dims(value)) for value in declared]
    signature = with_ranges(values, inputs, path.name, dynamic=dynamic)
    outputs = tuple(_output(value, signature) for value in graph.model.graph.outputs)
    structure = {"dict": {spec.name: spec.name for spec in outputs}} if len(outputs) > 1 else None
    return Model(
        kind="onnx",
        reference=OnnxReference(path),
        signature=dataclasses.replace(signature, outputs=outputs, structure=structure),
        module=None,
        onnx_path=path,
        fingerprint=graph.fingerprint(),
        parameter_bytes=graph.weight_bytes,
    )


def describe(path: Path) -> dict[str, Any]:
    """What an ONNX file holds, as plain JSON; the size is that of its external data too.

    Raises:
        GraphError: the file or its external data is damaged, missing or outside its folder.
    """
    import onnx_ir as ir

    graph = Graph.load(path)
    tensors = (value.const_value for part in graph.graphs() for value in part.initializers.values())
    files = {path, *(Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor))}
    return {"kind": "ONNX graph", **graph_facts(graph), "size_bytes": sum(file.stat().st_size for file in files)}


def graph_facts(graph: Graph, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Inputs, outputs, operators, precisions and costs of a graph, as plain JSON.

    Args:
        sizes: of the dynamic axes by name, for the multiply-adds; 1 where left out.
    """
    with contextlib.suppress(GraphError):  # types that the graph itself does not give are unknown then
        graph.infer()
    return {
        "opset": graph.opset,
        "graph inputs": [_facts(value) for value in graph.model.graph.inputs],
        "graph outputs": [_facts(value) for value in graph.model.graph.outputs],
        "operators": dict(graph.operators().most_common()),
        "precisions": graph.precisions(),
        "weight_bytes": graph.weight_bytes,
        **_costs(graph, sizes or {}),
    }


def _costs(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    axes = [axis for value in graph.model.graph.inputs for axis in value.shape or () if not isinstance(axis, int)]
    everywhere = {**{str(axis.value): 1 for axis in axes if axis.value is not None}, **sizes}
    return {
        "parameters": parameters(graph),
        "macs": sum(cost.macs for cost in costs(graph, everywhere).values()),
        "aligned_share": {str(multiple): aligned_share(graph, multiple, sizes) for multiple in MULTIPLES},
    }


def _facts(value: ir.Value) -> dict[str, str]:
    shape = "?" if value.shape is None else "x".join("?" if dim is None else str(dim) for dim in _dims(value))
    return {"name": value.name or "", "shape": shape or "scalar", "dtype": _dtype(value)}


def _dtype(value: ir.Value) -> str:
    if value.dtype is None:
        return "unknown"
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(value.dtype.name, value.dtype.name.lower())


def _spec(value: ir.Value) -> TensorSpec:
    import onnx_ir as ir

    dtype = _dtype(value)
    if not isinstance(value.type, ir.TensorType) or dtype not in DTYPES.values() or value.shape is None:
        raise SourceError(
            f"{value.name!r} of the ONNX model is no tensor that engines take",
            expected="a tensor of known rank, of " + ", ".join(sorted(set(DTYPES.values()))),
            found=f"{value.type}, shape {value.shape}",
        )
    return TensorSpec(value.name or "", dtype, ())


def _dims(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(d if isinstance(d, int) else d.value for d in value.shape or ())


def _output(value: ir.Value, signature: Signature) -> TensorSpec:
    dims = (dim if isinstance(dim, int) or dim in signature.axes else "?" for dim in _dims(value))
    return dataclasses.replace(_spec(value), shape=tuple(dim if dim is not None else "?" for dim in dims))


def _check_nodes(graph: Graph) -> None:
    for node in graph.nodes():
        if node.op_type in RANDOM and not node.domain:
            raise SourceError(
                f"node {node.name!r} draws random numbers, so that no engine can be compared with the model",
                found=node.op_type,
                hint="export the model in eval mode, with noise as an input",
            )
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                _check_values(value.name or "", value.const_value, infinity=node.op_type not in WEIGHTED)


def _check_values(name: str, tensor: ir.TensorProtocol, *, infinity: bool) -> None:
    if not tensor.dtype.is_floating_point() or tensor.dtype.itemsize < 2:
        return
    array: Any = tensor.numpy()
    if not array.size:
        return
    low, high = float(array.min()), float(array.max())  # both are NaN where one value is
    bad = "NaN" if low != low else "infinity" if not infinity and max(-low, high) == float("inf") else None
    if bad:
        raise SourceError(
            f"weight {name!r} holds {bad}",
            expected="finite numbers",
            found=f"{int((~np.isfinite(array.astype(np.float32))).sum())} of {array.size} values are not finite",
            hint="the checkpoint comes from a training run that diverged, or from a damaged file",
        )
