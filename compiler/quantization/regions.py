"""What TensorRT before 10 compiles as one region around attention, where Q/DQ costs more than 8-bit products save.

There Myelin, its compiler of fused kernels, takes attention with all that is connected to it: BERT-base in int8 is one
layer of the engine, as in fp16, and slower; `benchmarks/README.md` has the times. With the products of a feed-forward
network as convolutions, which Myelin leaves out, it is slower by far, as data changes its layout between the two. So
convolutions and pooling part one region from the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from ..graph.editing import is_constant
from .attention import attentions

REASON = "TensorRT before 10 compiles all around attention as one region, in which 8-bit products are slower than fp16"

_PARTING = frozenset((
    "AveragePool", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool",
))  # fmt: skip


def around_attention(nodes: Sequence[ir.Node]) -> frozenset[ir.Node]:
    """The nodes that float activations connect with an attention, past no convolution and no pooling."""
    pending = [node for found in attentions(nodes) for node in (found.scores, found.softmax, found.mixed)]
    region: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node not in region:
            region.add(node)
            pending.extend(near for near in _neighbours(node) if near.domain or near.op_type not in _PARTING)
    return frozenset(region)


def _neighbours(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        if _connects(value) and value is not None and (producer := value.producer()) is not None:
            yield producer
    for value in node.outputs:
        if _connects(value):
            yield from value.consumers()


def _connects(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT and not is_constant(value)
