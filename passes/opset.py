"""Raises the opset of a graph, for operators that gained types: DequantizeLinear gives float16 from opset 19 on.

Conversion is that of onnxscript, and below opset 18 that of onnx. Functions are inlined.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

from onnxscript.version_converter import ConvertVersionPass

from ..compiler.graph import Graph
from ..errors import GraphError
from .base import Context, Pass, PassResult, Refusal

logging.getLogger("onnxscript").addHandler(logging.NullHandler())  # what it warns of comes back as a refusal


@dataclasses.dataclass(frozen=True)
class Opset(Pass):
    """Converts to an opset where the graph has an older one; a newer one stays.

    Attributes:
        least: the opset that is wanted.
    """

    name: ClassVar[str] = "opset"
    least: int = 19

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Converts in place; a graph that cannot be converted stays, and says why."""
        before = graph.opset
        if before >= self.least:
            return PassResult(modified=False)
        work = graph.clone()
        try:
            ConvertVersionPass(target_version=self.least, fallback=True)(work.model)
            work.verify()
        except (GraphError, ValueError, RuntimeError) as error:
            return self._refused(before, str(error))
        if work.opset != self.least:
            return self._refused(before, "an operator has no conversion")
        graph.model = work.model
        return PassResult(modified=True, changes={"opsets raised": self.least - before})

    def _refused(self, before: int, why: str) -> PassResult:
        reason = f"opset {before} could not be converted to {self.least}: {why}"
        return PassResult(modified=False, refusals=(Refusal(reason),))
