"""What a graph in float16 or bfloat16 computes, as a float32 graph that any machine runs.

    y = Op(a, b)  in float16   ->   r = Op(a, b)  h = Cast<to = float16>(r)  y = Cast<to = float32>(h)

Every operator takes rounded operands, computes in float32 and rounds its result, as kernels do that accumulate in
float32. Running the graph itself would not tell: ONNX Runtime's CPU has few kernels for float16, computes the others in
float32, and leaves out the roundings between two of them, overflow among them; it refuses most operators in bfloat16.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Graph

LOW = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))

_DTYPE_ATTRIBUTES = ("dtype", "output_datatype", "output_dtype", "to")
_EXACT = frozenset((
    "Abs", "Clip", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "If", "Loop", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax",
    "ReduceMin", "Relu", "Reshape", "Scan", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
"""Operators that give, of rounded numbers, rounded numbers."""


def emulate(graph: Graph) -> Graph:
    """A copy that computes in float32 and rounds as the graph would; its inputs and outputs are float32 too."""
    copy = graph.clone()
    names = {value.name for scope in copy.graphs() for node in scope for value in node.outputs}
    for scope in copy.graphs():
        for value in (*scope.inputs, *scope.initializers.values()):
            if value.dtype in LOW:
                _widen(value)
        for node in list(scope):
            for value in node.outputs:
                if value.dtype in LOW:
                    _emulate_output(scope, node, value, names)
    return copy


def _emulate_output(scope: ir.Graph, node: ir.Node, value: ir.Value, names: set[str | None]) -> None:
    low = value.dtype
    assert low is not None
    _widen_attributes(node)
    _widen(value)
    if node.op_type in _EXACT and not node.domain:
        return
    down = ir.node("Cast", [value], {"to": low.value}, name=f"{value.name}/round")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{value.name}/widen")
    for made, dtype, suffix in ((down, low, "rounded"), (up, ir.DataType.FLOAT, "widened")):
        result = made.outputs[0]
        result.type, result.shape = ir.TensorType(dtype), value.shape
        result.name = f"{value.name}/{suffix}"
        while result.name in names:
            result.name += "_"
        names.add(result.name)
    result = up.outputs[0]
    is_output = value.is_graph_output()
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    scope.insert_after(node, [down, up])
    down.replace_input_with(0, value)
    if is_output:  # the name of an output stays with the output
        value.name, result.name = result.name, value.name


def _widen(value: ir.Value) -> None:
    value.type = ir.TensorType(ir.DataType.FLOAT)
    if value.const_value is not None:
        value.const_value = _widened(value.const_value)


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if name in _DTYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and attribute.as_int() in LOW:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in LOW:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)
