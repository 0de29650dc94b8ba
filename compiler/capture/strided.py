"""Undoes a detour of torch.export: pooling to one place, of images that lie channels last, ends in `as_strided`.

    Gather(Reshape(x, [-1]), Range(0, n, 1) * c + [0, 1, ..., c-1])   ->   x        where both have the same shape

The indices name every element in order, so nothing moves. They are tried at two lengths of the first axis.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_LENGTHS = (2, 5)


def undo_strides(model: ir.Model) -> int:
    """Replaces what such a Gather gives by what it takes; returns how many there were."""
    found = [node for node in model.graph if node.op_type == "Gather" and _source(node) is not None]
    for node in found:
        source = _source(node)
        assert source is not None
        node.outputs[0].replace_all_uses_with(source)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _source(node: ir.Node) -> ir.Value | None:
    """The tensor that a Gather gives back as it was."""
    flat, index, given = node.inputs[0], node.inputs[1], node.outputs[0]
    reshape = None if flat is None else flat.producer()
    if reshape is None or reshape.op_type != "Reshape" or index is None or given.is_graph_output():
        return None
    source, target = reshape.inputs
    shape = None if target is None else ir.convenience.get_const_tensor(target)
    if source is None or not source.shape or shape is None or shape.numpy().tolist() != [-1]:
        return None
    if node.attributes.get_int("axis", 0) or given.shape is None or list(given.shape) != list(source.shape):
        return None
    first = source.shape[0]
    rest = [axis for axis in source.shape[1:] if isinstance(axis, int)]
    if len(rest) < len(source.shape) - 1:
        return None
    for length in (first,) if isinstance(first, int) else _LENGTHS:
        expected = np.arange(length * int(np.prod(rest))).reshape(length, *rest)
        found = _evaluate(index, length)
        if found is None or not np.array_equal(found, expected):
            return None
    return source


def _evaluate(value: ir.Value | None, length: int) -> np.ndarray | None:
    """Indices where the first axis has a length, which is the only number that is not constant; None if unknown."""
    if value is None:
        return None
    if (tensor := ir.convenience.get_const_tensor(value)) is not None:
        return tensor.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Range":
        start, step = (_evaluate(node.inputs[index], length) for index in (0, 2))
        return None if start is None or step is None else np.arange(int(start), length, int(step))
    if node is None or node.op_type not in ("Add", "Mul", "Unsqueeze"):
        return None
    first, second = (_evaluate(operand, length) for operand in node.inputs)
    if first is None or second is None:
        return None
    if node.op_type == "Unsqueeze":
        return np.expand_dims(first, tuple(second.tolist()))
    return np.asarray(first + second if node.op_type == "Add" else first * second)
