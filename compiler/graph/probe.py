"""Runs a graph on ONNX Runtime's CPU, to see what its tensors hold: its outputs, or any tensor of the main graph."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...errors import GraphError, TargetUnavailableError
from .graph import Graph

Arrays = Mapping[str, np.ndarray]


def run(graph: Graph, inputs: Arrays) -> dict[str, np.ndarray]:
    """The outputs of one run.

    Raises:
        TargetUnavailableError: ONNX Runtime is not installed.
        GraphError: ONNX Runtime refuses the graph or the inputs.
    """
    outputs = Session(graph)(inputs)
    return dict(zip(graph.output_names, outputs, strict=True))


class Tapped:
    """A graph that gives tensors of its main graph beside its outputs.

    Args:
        graph: stays as it is.
        names: inputs, outputs of nodes, or initializers of the main graph.
        optimized: let ONNX Runtime fuse nodes. A tensor inside what would be fused is still given, and prevents that.
        threads: 0 for one a physical core.

    Raises:
        GraphError: ONNX Runtime refuses the graph; the main graph has no tensor of such a name.
        TargetUnavailableError: ONNX Runtime is not installed.
    """

    def __init__(self, graph: Graph, names: Iterable[str], *, optimized: bool = False, threads: int = 0) -> None:
        copy = graph.clone()
        main = copy.model.graph
        self.names = tuple(dict.fromkeys(names))
        self._inputs = frozenset(graph.input_names)
        outputs = set(graph.output_names)
        values = {value.name: value for value in _values(main)}
        for name in self.names:
            if name not in values:
                raise GraphError(f"the main graph has no tensor {name!r} to look at")
            if name not in outputs and name not in self._inputs:
                main.outputs.append(values[name])
        self.output_names = copy.output_names
        self._session = Session(copy, optimized=optimized, threads=threads)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The graph's outputs, then the tensors, by name."""
        found = dict(zip(self.output_names, self._session(inputs), strict=True))
        return {**found, **{name: np.asarray(inputs[name]) for name in self.names if name in self._inputs}}


def sizes(graph: Graph, names: Iterable[str], inputs: Arrays, *, threads: int = 0) -> dict[str, int]:
    """Bytes of these tensors of the main graph in a run on `inputs`, which holds no more than usual."""
    copy = graph.clone()
    main = copy.model.graph
    values = {value.name: value for value in _values(main)}
    taps = list(dict.fromkeys(names))
    if missing := [name for name in taps if name not in values]:
        raise GraphError(f"the main graph has no tensor {missing[0]!r} to look at")
    main.outputs.clear()
    for number, name in enumerate(taps):
        node = ir.node("Size", [values[name]])
        node.outputs[0].name = f"{name}/size{number}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
        main.append(node)
        main.outputs.append(node.outputs[0])
    counts = Session(copy, threads=threads)(inputs)
    dtypes = [values[name].dtype for name in taps]
    return {
        name: int(count) * (4 if dtype is None else math.ceil(dtype.itemsize))
        for name, count, dtype in zip(taps, counts, dtypes, strict=True)
    }


def chunks(sizes: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Cuts tensors, in order, into groups of at most `limit_bytes` together; a larger one is a group by itself."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(name)
        room -= size
    return groups


class Session:
    """A graph loaded into ONNX Runtime; calling it gives the outputs in order."""

    def __init__(self, graph: Graph, *, optimized: bool = False, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetUnavailableError(
                "ONNX Runtime is not installed", hint='pip install "enginesmith[cpu]"'
            ) from error
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # one block for all: of a ResNet-50 with probes twice what is used at a time
        options.log_severity_level = 4
        # ONNX Runtime 1.32 moves pairs of Q and DQ through graphs of opset 23 with another type, and refuses them then.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder, _refusals("load"):
            path = Path(folder) / "graph.onnx"
            graph.save(path)
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Arrays, *, shrink: bool = False) -> list[np.ndarray]:
        """Runs once; `shrink` gives the memory of runs back, and the next one takes longer."""
        from onnxruntime import RunOptions

        options = RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with _refusals("run"):
            outputs: list[np.ndarray] = self._session.run(None, dict(inputs), options)
        return outputs


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


@contextlib.contextmanager
def _refusals(does: str) -> Iterator[None]:
    """Turns ONNX Runtime's exceptions, which share no base class of their own, into GraphError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    try:
        yield
    except tuple(getattr(state, kind) for kind in kinds) as error:
        raise GraphError(f"ONNX Runtime cannot {does} the graph", found=str(error).strip()) from error
