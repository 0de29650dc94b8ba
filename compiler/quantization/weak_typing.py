"""Prepares a quantized float32 graph for TensorRT 8.6 and 9, whose networks are weakly typed.

Their parser reads scales as float32 whatever their type is, and Q/DQ takes float16 from opset 19 on only, so that a
graph cast to fp16 would have a Cast at every Q/DQ, which may keep it from being fused. Instead the graph stays in
float32, and the builder may compute what is not quantized in fp16, but for the nodes that lose their meaning there.
Weights must be float32 and quantized by the network:

    W int8 ─ DequantizeLinear     ->     W·scale float32 ─ QuantizeLinear ─ DequantizeLinear        the same numbers

Convolutions say the shape of their kernel: the parser takes it from weights in initializers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from ...passes.base import Context
from ...passes.cast import Cast
from ..graph import Graph
from ..graph.editing import add_initializer
from ..graph.float16 import clamp_masks
from ..graph.formats import FORMATS
from ..graph.precision import is_float, kept
from ..signature import Signature
from .layers import constant, operand

HALF = FORMATS["fp16"]


class OneSample:
    """A batch of data as `Samples`."""

    description = "the sample of the build"
    random = False

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        yield self._arrays


def prepare(
    graph: Graph, signature: Signature, sample: Mapping[str, np.ndarray], log: Callable[[str], None]
) -> tuple[Graph, dict[str, str]]:
    """The graph to parse, and the type of each of its tensors: "FLOAT" where fp16 would not do, else "HALF".

    Args:
        signature: of the model.
        sample: one batch, to find overflows with.
        log: takes the reason of each node that stays in float32.
    """
    samples = OneSample(sample) if sample else None
    judged = Cast(to="fp16").prepare(without_quantization(graph), Context(signature, samples)).graph
    types = {}
    for node in judged.nodes():
        reason = kept(node)
        if reason:
            log(f"{node.name or node.outputs[0].name} stays in fp32: {reason}")
        types.update({o.name: "FLOAT" if reason else "HALF" for o in node.outputs if o.name and is_float(o)})
    prepared = graph.clone()
    prepared.infer()
    clamp_masks(prepared, HALF)
    for node in list(prepared.model.graph):
        if node.op_type == "DequantizeLinear" and _stored(node):
            _quantize_in_network(prepared, node)
        if node.op_type in ("Conv", "ConvTranspose") and not node.domain:
            _tell_kernel(node)
    return prepared, types


def in_half(graph: Graph, signature: Signature, sample: Mapping[str, np.ndarray]) -> Graph:
    """A graph in which nothing is quantized, as it is built in fp16; arguments as of `prepare`."""
    cast = graph.clone()
    Cast(to="fp16")(cast, Context(signature, OneSample(sample) if sample else None))
    return cast


def without_quantization(graph: Graph) -> Graph:
    """A copy whose nodes read what Q/DQ would round, under the old names."""
    copy = graph.clone()
    main = copy.model.graph
    for node in list(main):
        if node.op_type != "DequantizeLinear":
            continue
        quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
        if _stored(node):
            _replace(node, _constant(copy, node))
        elif quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
            _replace(node, quantize.inputs[0])
        else:
            continue
        main.remove(node, safe=True)
        if quantize is not None and not quantize.outputs[0].uses():
            main.remove(quantize, safe=True)
    return copy


def _stored(node: ir.Node) -> bool:
    """Whether a DequantizeLinear reads a constant of 8-bit integers, with constant parameters."""
    inputs = [value for value in node.inputs if value is not None]
    constants = all(value.const_value is not None and value.is_initializer() for value in inputs)
    return constants and inputs[0].dtype == ir.DataType.INT8 and not node.outputs[0].is_graph_output()


def _quantize_in_network(graph: Graph, node: ir.Node) -> None:
    main, stored = graph.model.graph, node.inputs[0]
    source = _constant(graph, node)
    quantize = ir.node("QuantizeLinear", [source, *node.inputs[1:]], dict(node.attributes), name=f"Q/{source.name}")
    result = quantize.outputs[0]
    result.name, result.type, result.shape = f"{source.name}/again", ir.TensorType(ir.DataType.INT8), source.shape
    main.insert_before(node, quantize)
    node.replace_input_with(0, result)
    if stored is not None and not stored.uses():
        main.initializers.pop(stored.name or "", None)


def _tell_kernel(node: ir.Node) -> None:
    weight = node.inputs[1]
    if "kernel_shape" not in node.attributes and weight is not None and weight.shape is not None:
        kernel = [size for size in weight.shape[2:] if isinstance(size, int)]
        if len(kernel) == len(weight.shape) - 2:
            node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)


def _constant(graph: Graph, node: ir.Node) -> ir.Value:
    """The float32 numbers that a DequantizeLinear makes of a constant, as an initializer."""
    quantized, scale = (constant(operand(node, place)) for place in (0, 1))
    axis = node.attributes.get_int("axis", 1)
    if scale.ndim:
        shape = [1] * quantized.ndim
        shape[axis] = -1
        scale = scale.reshape(shape)
    real = (quantized.astype(np.float32) * scale).astype(np.float32)
    return add_initializer(graph, f"{node.outputs[0].name}/float", real)


def _replace(node: ir.Node, value: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
