"""Parts of a graph that run by themselves: from any tensors to any tensors of the main graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ...errors import GraphError
from ..graph import Graph
from ..graph.verifier import subgraphs

Arrays = Mapping[str, np.ndarray]
MADE = "/made"
"""Suffix of the name under which a part gives a tensor that it takes as an input too."""

UNQUANTIZED = "/unquantized"
"""Suffix of what a node gives where the nodes that read it see it quantized."""

NARROW = frozenset((ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2))
"""Types that NumPy lacks: a part takes and gives them as float32, which holds each of their values."""


def prepared(graph: Graph) -> Graph:
    """A copy without functions, with types and shapes, and names as `_name_quantized` gives them."""
    copy = graph.clone()
    if copy.model.functions:
        InlinePass()(copy.model)
        copy.model.functions.clear()
    copy.infer()
    _name_quantized(copy.model.graph)
    return copy


def _name_quantized(main: ir.Graph) -> None:
    """Gives the name of a tensor that is only read quantized to what is read.

    That is its counterpart in the reference: the rounding belongs to the node that gives it, and a quantizer whose
    range ends at zero may stand in for a Relu.

        x = Conv(...), q = QuantizeLinear(x), d = DequantizeLinear(q), y = f(d)    ->    d is called x
    """
    for node in list(main):
        for value in node.outputs:
            read = _read_quantized(value)
            if read is not None:
                read.name, value.name = value.name, f"{value.name}{UNQUANTIZED}"


def _read_quantized(value: ir.Value) -> ir.Value | None:
    quantizers = [use.node for use in value.uses() if use.idx == 0]
    if value.is_graph_output() or len(quantizers) != 1 or len(value.uses()) != 1:
        return None
    if quantizers[0].op_type != "QuantizeLinear" or quantizers[0].outputs[0].is_graph_output():
        return None
    readers = [use.node for use in quantizers[0].outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type != "DequantizeLinear" or readers[0].outputs[0].is_graph_output():
        return None
    return readers[0].outputs[0]


def part(graph: Graph, inputs: Arrays, outputs: Sequence[str]) -> Graph:
    """The nodes that lead from `inputs` to `outputs`, with the inputs in the shapes of these arrays.

    A tensor that is both is given as it comes out of its node, under its name with `MADE` behind it.

    Raises:
        GraphError: the main graph has no such tensor.
    """
    copy = graph.clone()
    main = copy.model.graph
    values = {value.name: value for value in tensors(main)}
    for name in (*inputs, *outputs):
        if name not in values:
            raise GraphError(f"the main graph has no tensor {name!r}", hint="its name changed on the way")
    main.outputs.clear()
    for name, array in inputs.items():
        _as_input(main, values[name], array)
    main.outputs.extend(_as_output(main, values[name]) for name in outputs)
    drop_unused(main)
    return copy


def drop_unused(main: ir.Graph) -> None:
    """Keeps what leads to the outputs. For onnx_ir's own pass, uses in the branches of a node that goes still count."""
    used, todo = set(main.outputs), list(main.outputs)
    nodes: set[ir.Node] = set()
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [value for value in reads(node, main) if value not in used]
            used |= set(reads(node, main))
    main.remove([node for node in main if node not in nodes])
    main.inputs[:] = [value for value in main.inputs if value in used]
    for name, value in list(main.initializers.items()):
        if value not in used:
            del main.initializers[name]


def _as_input(main: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    if value in main.inputs:
        value.shape = ir.Shape(array.shape)
        return
    given = ir.Value(name=value.name, type=value.type, shape=ir.Shape(array.shape))
    value.name = f"{value.name}{MADE}"
    main.inputs.append(given)
    if value.dtype not in NARROW:
        value.replace_all_uses_with(given, replace_graph_outputs=True)
        return
    given.type = ir.TensorType(ir.DataType.FLOAT)
    cast = ir.node("Cast", [given], attributes={"to": value.dtype.value})
    cast.outputs[0].name, cast.outputs[0].type = f"{given.name}/narrow", value.type
    main.insert_before(main[0], cast)
    value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)


def _as_output(main: ir.Graph, value: ir.Value) -> ir.Value:
    producer = value.producer()
    if value.dtype not in NARROW or producer is None:
        return value
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value})
    result = cast.outputs[0]
    result.name, value.name = value.name, f"{value.name}/narrow"
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    main.insert_after(producer, cast)
    return result


def tensors(main: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, weights and what the nodes give."""
    yield from main.inputs
    yield from (value for value in main.initializers.values() if value not in main.inputs)
    for node in main:
        yield from (output for output in node.outputs if output.name)


@dataclasses.dataclass(frozen=True)
class Segment:
    """What makes one tensor out of those before it that two graphs share.

    Attributes:
        name: the tensor.
        leaves: the shared tensors that it is made from.
        nodes: in the order of the graph; casts and quantization stand beside the operator itself.
    """

    name: str
    leaves: tuple[str, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def main(self) -> ir.Node:
        """The operator itself."""
        for passed_over in (PLUMBING | SHAPING, PLUMBING):
            if left := [node for node in self.nodes if node.op_type not in passed_over]:
                return left[-1]
        return self.nodes[-1]


PLUMBING = frozenset(("Cast", "QuantizeLinear", "DequantizeLinear", "Identity", "Constant"))
SHAPING = frozenset(("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))


def segments(graph: Graph, shared: Collection[str]) -> list[Segment]:
    """A segment for every tensor of `shared` that a node of the main graph gives, in the order of the graph."""
    main = graph.model.graph
    order = {node: index for index, node in enumerate(main)}
    found = []
    for node in main:
        for output in node.outputs:
            if output.name and output.name in shared:
                leaves, nodes = _behind(node, main, frozenset(shared) - {output.name})
                found.append(Segment(output.name, tuple(leaves), tuple(sorted(nodes, key=order.__getitem__))))
    return found


def _behind(node: ir.Node, main: ir.Graph, shared: Collection[str]) -> tuple[dict[str, None], set[ir.Node]]:
    leaves: dict[str, None] = {}
    nodes, todo = {node}, [node]
    while todo:
        for value in reads(todo.pop(), main):
            producer = value.producer()
            if value.name in shared or (producer is None and not value.is_initializer()):
                leaves[value.name or ""] = None
            elif producer is not None and producer not in nodes:
                nodes.add(producer)
                todo.append(producer)
    return leaves, nodes


def reads(node: ir.Node, main: ir.Graph) -> Iterator[ir.Value]:
    """The values of the main graph that a node reads, those in its branches and loop bodies among them."""
    yield from (value for value in node.inputs if value is not None and value.graph is main)
    for body in subgraphs(node):
        for inner in body:
            yield from reads(inner, main)
        yield from (value for value in body.outputs if value.graph is main)


def alive(graph: Graph) -> set[str]:
    """Names of the tensors of the main graph that depend on its inputs."""
    main = graph.model.graph
    names = {value.name for value in main.inputs if not value.is_initializer()}
    for node in main:
        if any(value.name in names for value in reads(node, main)):
            names |= {output.name for output in node.outputs}
    return {name for name in names if name}
