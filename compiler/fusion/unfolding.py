"""Takes out of GroupQueryAttention what it does beside attending, for those that read its queries, keys and values.

query = [q | k | v]     ->  q, k, v = Split(query)
do_rotary               ->  q, k = RotaryEmbedding(q), RotaryEmbedding(k), at positions up to the last one
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.schemas import MICROSOFT
from ..quantization.patch import Patch, Patcher
from .patterns import size
from .rotary import attributes

PLAIN = 7
"""Inputs of a node that does nothing besides: the last are the last position and how many there are."""


def unfolded(graph: Graph) -> Graph:
    """A copy of a flat graph in which all nodes are so."""
    work = graph.clone()
    unfolding = Unfolding(Patcher(work))
    for node in list(work.model.graph):
        if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT:
            unfolding.apply(node)
    return work


class Unfolding:
    """Changes nodes of a flat graph; positions that several of them use are computed once."""

    def __init__(self, patcher: Patcher) -> None:
        self._patcher = patcher
        self._positions: dict[ir.Value, ir.Value] = {}

    def apply(self, node: ir.Node) -> None:
        """Changes a node in place, so that it does nothing besides."""
        if _is_unfolded(node):
            return
        patch = Patch(self._patcher, node)
        heads, shared = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
        query, key, value = self._split(patch, node, heads, shared)
        if node.attributes.get_int("do_rotary", 0):
            interleaved = bool(node.attributes.get_int("rotary_interleaved", 0))
            query = self._turned(patch, node, query, heads, interleaved=interleaved)
            key = self._turned(patch, node, key, shared, interleaved=interleaved)
        patch.before()
        for place, operand in enumerate((query, key, value)):
            node.replace_input_with(place, operand)
        node.resize_inputs(PLAIN)
        for name in ("do_rotary", "rotary_interleaved"):
            node.attributes.pop(name, None)

    def _split(self, patch: Patch, node: ir.Node, heads: int, shared: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        query, key, value = node.inputs[:3]
        assert query is not None
        if key is not None and value is not None:
            return query, key, value
        width = size(node.inputs[3], 3) or 0
        columns = [heads * width, shared * width, shared * width]
        sizes = self._patcher.initializer(f"{patch.title}/columns", np.array(columns))
        dtype, kinds = query.dtype or ir.DataType.FLOAT, ("query", "key", "value")
        outputs = [(f"{patch.title}/new {kind}", dtype, ir.Shape([None, None, count]))
                   for kind, count in zip(kinds, columns, strict=True)]  # fmt: skip
        query, key, value = patch.add("Split", [query, sizes], outputs, {"axis": -1})
        return query, key, value

    def _turned(self, patch: Patch, node: ir.Node, value: ir.Value, heads: int, *, interleaved: bool) -> ir.Value:
        cos, sin = node.inputs[PLAIN : PLAIN + 2]
        turned, width = 2 * (size(cos, 1) or 0), size(node.inputs[3], 3) or 0
        options = attributes(interleaved=interleaved, turned=turned, heads=heads, width=width)
        output = (f"{value.name}/turned", value.dtype or ir.DataType.FLOAT, value.shape)
        inputs = [value, self._places(patch, node), cos, sin]
        return patch.add("RotaryEmbedding", inputs, [output], options, domain=MICROSOFT)[0]

    def _places(self, patch: Patch, node: ir.Node) -> ir.Value:
        """Positions of the new tokens (batch, time), for all that end alike."""
        query, last = node.inputs[0], node.inputs[5]
        assert last is not None
        if last not in self._positions:
            title, integer = last.name or "last", ir.DataType.INT64
            one, minus = (self._patcher.initializer(f"{title}/number", np.array(number)) for number in (1, [-1]))

            def add(operator: str, *inputs: ir.Value | None, shape: int = 0, **attributes: int) -> ir.Value:
                output = (f"{title}/{operator.lower()}", integer, ir.Shape([None] * shape))
                return patch.add(operator, list(inputs), [output], attributes)[0]

            lengths = add("Shape", query, shape=1)
            time = add("Gather", lengths, one, axis=0)
            steps = add("Range", add("Sub", one, time), one, one, shape=1)
            ends = add("Unsqueeze", add("Cast", last, shape=1, to=integer.value), minus, shape=2)
            self._positions[last] = add("Add", ends, steps, shape=2)
        return self._positions[last]


def _is_unfolded(node: ir.Node) -> bool:
    """Whether a GroupQueryAttention is given queries, keys and values, turned already."""
    return None not in node.inputs[:3] and not node.attributes.get_int("do_rotary", 0)
