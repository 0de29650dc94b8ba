"""What ONNX Runtime did not fuse of a quantized graph, told from the graph that its optimizer leaves."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import onnx

_WEIGHTS = "its weight is computed from integers anew on each call"
_ISLAND = "computes floats between integer nodes"


@dataclasses.dataclass(frozen=True)
class Unfused:
    """A node that was to compute integers, or that lies between such, and computes floats."""

    node: str
    operator: str
    reason: str


def unfused(graph: onnx.GraphProto) -> list[Unfused]:
    """Looks at the main graph of a model that ONNX Runtime optimized; empty where all is as planned.

    Two kinds are found: nodes that read a constant through DequantizeLinear, which makes them slower than in float, and
    nodes whose operands all come from DequantizeLinear and whose result goes to QuantizeLinear alone.
    """
    return list(_find(graph))


def _find(graph: onnx.GraphProto) -> Iterator[Unfused]:
    constants = {tensor.name for tensor in graph.initializer}
    constants.update(node.output[0] for node in graph.node if node.op_type == "Constant")
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node.op_type)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        operands = [name for name in node.input if name and name not in constants]
        if node.op_type == "QuantizeLinear" or not operands:
            continue
        if any(sources.get(name) in constants for name in operands):
            yield Unfused(_title(node), node.op_type, _WEIGHTS)
        elif all(name in sources for name in operands) and _goes_to_integers(node, readers, outputs):
            yield Unfused(_title(node), node.op_type, _ISLAND)


def _goes_to_integers(node: onnx.NodeProto, readers: dict[str, list[str]], outputs: set[str]) -> bool:
    used = [name for name in node.output if name in readers or name in outputs]
    return bool(used) and all(set(readers[name]) == {"QuantizeLinear"} and name not in outputs for name in used)


def _title(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]
