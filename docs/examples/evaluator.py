"""ONNX's reference evaluator: slow, and as right as can be. It shows whether a runtime or the graph is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from enginesmith.errors import EngineError
from enginesmith.targets.base import (
    Arrays,
    Availability,
    Bound,
    BuildRequest,
    Capabilities,
    EngineInfo,
    HostBound,
    Runner,
    Target,
)


@dataclasses.dataclass(frozen=True)
class Evaluator(Target):
    """Runs the graph node by node in NumPy.

    Attributes:
        verbose: 0 to 10, how much the evaluator prints.
    """

    verbose: int = 0

    name: ClassVar[str] = "evaluator"
    summary: ClassVar[str] = "ONNX's reference evaluator"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph", precisions=("fp32", "fp16"), devices=("cpu",), opset=(7, 23), minimum={"onnx": "1.18"}
    )

    def availability(self) -> Availability:
        """It is there wherever models are compiled; where a bundle is only loaded it may be missing."""
        try:
            import onnx
        except ImportError as error:
            return Availability(build=False, run=False, reason=str(error), install="pip install onnx")
        return Availability(build=True, run=True, versions={"onnx": onnx.__version__})

    def built_for(self) -> Mapping[str, str]:
        """An ONNX file is the same everywhere."""
        return {}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Saves the graph."""
        assert request.graph is not None
        request.graph.save(request.directory / "model.onnx")
        return self.info(request, "model.onnx", self.versions())

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Reads the graph."""
        from onnx.reference import ReferenceEvaluator

        return _Runner(ReferenceEvaluator(str(directory / info.entry), verbose=self.verbose))


class _Runner:
    """An evaluator as `Runner`."""

    def __init__(self, evaluator: Any) -> None:
        self._evaluator = evaluator

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        try:
            values = self._evaluator.run(None, {name: np.asarray(value) for name, value in inputs.items()})
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise EngineError(f"the evaluator failed: {error}") from error
        return dict(zip(self._evaluator.output_names, values, strict=True))

    def bind(self, inputs: Arrays) -> Bound:
        """There is no device to place them on."""
        return HostBound(lambda: self.run(inputs))

    def reset(self) -> None:
        """It keeps no state."""

    def close(self) -> None:
        """There is nothing to give back."""
