"""Which layers of a finished graph have 2:4 sparse weights, in whatever form its passes have left them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.selection import label
from ..quantization.layers import Layer
from .eligible import OPERATORS
from .pattern import is_sparse

_ELEMENTWISE = frozenset(("Cast", "DequantizeLinear", "Identity", "QuantizeLinear"))
"""What gives zero for zero, where zero points are zero."""


def sparse_layers(graph: Graph) -> list[str]:
    """Labels of the convolutions and products of the main graph whose weights, quantized or not, are 2:4 sparse."""
    nodes = (node for node in graph.model.graph if node.op_type in OPERATORS and not node.domain)
    return [label(node) for node in nodes if _is_sparse(node)]


def _is_sparse(node: ir.Node) -> bool:
    value, axis = node.inputs[1], 0 if Layer(node).transposed else 1
    while value is not None and (producer := value.producer()) is not None and producer.op_type != "Constant":
        if producer.op_type == "Transpose":
            rank = len(value.shape or ())
            axis = producer.attributes.get_ints("perm", tuple(reversed(range(rank))))[axis] if rank else axis
        elif producer.op_type not in _ELEMENTWISE:
            return False
        value = producer.inputs[0]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or len(tensor.shape) < 2 or not tensor.size:
        return False
    array = np.asarray(tensor.numpy(), np.float32)  # NumPy itself does not count zeros of bfloat16
    return is_sparse(np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).T)
