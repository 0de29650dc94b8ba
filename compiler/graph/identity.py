"""Identity of a graph: SHA-256 over structure, names, weights and marks; not doc strings and places of files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

MARK = "enginesmith.float32"
"""Metadata of a node that stays in float32, see `precision.keep`. It counts, as engines are built by it."""

STAGE = "enginesmith.stage"
"""Metadata of a node that tells in which stage of a pipeline it runs, from 0, see `passes.partition`. It counts too."""

_KEPT = "enginesmith.sha256"


def model_digest(model: ir.Model) -> str:
    """SHA-256 of a model. Shapes and types count at inputs and outputs only: inside, they are derived."""
    parts = [repr((model.ir_version, sorted(model.opset_imports.items()))), _digest(model.graph, _described)]
    for identifier, function in sorted(model.functions.items()):
        parts.append(repr((identifier, sorted(function.attributes), sorted(function.opset_imports.items()))))
        parts.append(_digest(function.graph, _named))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of dtype, shape and values, kept with the tensor so that only the first call reads it."""
    if _KEPT not in tensor.meta:
        tensor.meta[_KEPT] = _hash(tensor)
    return str(tensor.meta[_KEPT])


def attribute_digest(attribute: ir.Attr) -> str:
    """Text that two attributes share exactly when they are equal."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    match attribute.type:
        case ir.AttributeType.GRAPH:
            return _digest(attribute.as_graph(), _named)
        case ir.AttributeType.GRAPHS:
            return "\n".join(_digest(graph, _named) for graph in attribute.as_graphs())
        case ir.AttributeType.TENSOR:
            return tensor_digest(attribute.as_tensor())
        case ir.AttributeType.FLOAT | ir.AttributeType.INT | ir.AttributeType.STRING:
            return f"{attribute.type.name}{attribute.value!r}"
        case ir.AttributeType.FLOATS | ir.AttributeType.INTS | ir.AttributeType.STRINGS:
            return f"{attribute.type.name}{list(attribute.value)!r}"
    message: bytes = ir.serde.serialize_attribute(attribute).SerializeToString()
    return message.hex()


def _digest(graph: ir.Graph, describe: Callable[[ir.Value], object]) -> str:
    parts = [repr(([describe(v) for v in graph.inputs], [describe(v) for v in graph.outputs]))]
    for name, value in sorted(graph.initializers.items()):
        parts.append(repr((name, None if value.const_value is None else tensor_digest(value.const_value))))
    for node in graph:
        attributes = [(key, attribute_digest(attribute)) for key, attribute in sorted(node.attributes.items())]
        names = [v.name if v is not None else None for v in node.inputs], [v.name for v in node.outputs]
        marked = (MARK,) if MARK in node.metadata_props else ()
        stage = (f"{STAGE}={node.metadata_props[STAGE]}",) if STAGE in node.metadata_props else ()
        parts.append(repr((node.name, node.op_identifier(), *names, attributes, *marked, *stage)))
    return "\n".join(parts)


def _named(value: ir.Value) -> str | None:
    return value.name


def _described(value: ir.Value) -> tuple[str | None, str, str]:
    return value.name, str(value.type), str(value.shape)


def _hash(tensor: ir.TensorProtocol) -> str:
    hasher = hashlib.sha256(repr((tensor.dtype.name, tuple(tensor.shape.numpy()))).encode())
    if tensor.dtype == ir.DataType.STRING:
        hasher.update(repr(tensor.numpy().tolist()).encode())
    else:
        hasher.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    unmap(tensor)
    return hasher.hexdigest()


def unmap(tensor: ir.TensorProtocol) -> None:
    """Lets go of the memory map of an external tensor that nobody looks at; reading it maps it again."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # an array of it is in use
            tensor.release()
