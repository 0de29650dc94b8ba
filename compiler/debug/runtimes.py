"""Where parts of graphs run: unoptimised on ONNX Runtime's CPU, or as engines of a target, with its optimisations."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ...targets.base import BuildRequest, Target
from ..graph import Graph
from ..graph.probe import Session
from ..signature import Signature, TensorSpec
from ..sources import Model
from ..storage.memory import release

Arrays = Mapping[str, np.ndarray]


class Runtime(Protocol):
    """Runs a graph once."""

    def __call__(self, graph: Graph, inputs: Arrays) -> dict[str, np.ndarray]:
        """The graph's outputs by name; of the inputs, those that the graph has are taken."""


def plainly(graph: Graph, inputs: Arrays) -> dict[str, np.ndarray]:
    """Every node by itself on ONNX Runtime's CPU.

    Raises:
        GraphError: ONNX Runtime refuses the graph or the inputs.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    return dict(zip(graph.output_names, Session(graph)(_fed(graph, inputs)), strict=True))


@dataclasses.dataclass(frozen=True)
class AsEngine:
    """Builds an engine of the graph in a folder of its own, and runs it."""

    target: Target
    precision: str

    def __call__(self, graph: Graph, inputs: Arrays) -> dict[str, np.ndarray]:
        """The graph's outputs by name.

        Raises:
            EngineError: the target refused the graph, or cannot run here.
        """
        fed = _fed(graph, inputs)
        signature = Signature(
            inputs=tuple(TensorSpec(name, str(array.dtype), array.shape) for name, array in fed.items()),
            outputs=tuple(map(_spec, graph.model.graph.outputs)),
        )
        with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
            directory, cache = Path(scratch) / "engine", Path(scratch) / "cache"
            directory.mkdir()
            cache.mkdir()
            request = BuildRequest(
                graph=graph,
                model=_no_model(signature),
                signature=signature,
                precision=self.precision,
                sample=fed,
                directory=directory,
                cache=cache,
                log=lambda line: None,
            )
            info = self.target.build(request)
            runner = self.target.runner(directory, info)
            try:
                outputs = {name: np.asarray(array) for name, array in runner.run(fed).items()}
            finally:
                runner.close()
        release()
        return outputs


def _fed(graph: Graph, inputs: Arrays) -> dict[str, np.ndarray]:
    """The inputs that the graph takes, in its own types."""
    taken = (value for value in graph.model.graph.inputs if value.name in inputs)
    fed = {}
    for value in taken:
        array = np.asarray(inputs[value.name or ""])
        with np.errstate(over="ignore"):  # what the type cannot hold becomes infinite, as in the engine
            fed[value.name or ""] = array if value.dtype is None else array.astype(value.dtype.numpy(), copy=False)
    return fed


def _spec(value: ir.Value) -> TensorSpec:
    shape = () if value.shape is None else tuple(dim if isinstance(dim, int) else "?" for dim in value.shape)
    dtype = "float32" if value.dtype is None else value.dtype.numpy().name
    return TensorSpec(value.name or "", str(dtype), shape)


class _NoModel:
    """Stands where a target that consumes the graph never looks."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        raise AssertionError("there is no model here")

    def reset(self) -> None:
        """Keeps no state."""


def _no_model(signature: Signature) -> Model:
    return Model("onnx", _NoModel(), signature, module=None, onnx_path=None, fingerprint="", parameter_bytes=0)
