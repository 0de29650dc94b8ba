"""Finds attention over the static caches of a decoder, and puts one node in its place.

    present k, v = Scatter(past k, v; positions; new k, v)
    Softmax(scale * q k^T + mask) v
    ->  result, present k, v = GroupQueryAttention(q, new k, new v, past k, past v, last position, most positions, bias)

Queries are (batch, heads, time, width), or (batch, keys, heads / keys, time, width) where heads share a key.

The operator's mask is causal: a token sees what stands at its position and before. Whether that is what the graph's own
mask says is not read from the graph; the caller compares results.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping

import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.selection import label
from ..quantization.patch import Patch, Patcher
from .biases import bias_in
from .fuser import Region
from .grouped import Cached, Grouped, Write
from .operands import permuted, split
from .patterns import only_reader, pairs, producer, rank, scaled, size
from .reach import Kind, Reach
from .rotary import rotary

KIND = "attention over a cache"
_VIEWS = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Identity")


class CachedFuser:
    """Rewrites a flat graph.

    Args:
        states: outputs of caches by their inputs.
        left_out: tensors of regions that stay as they are.
        positions: how many a text has, where that is more than a cache holds.
        reach: what the operator is told of how far rows reach.

    Attributes:
        regions: what was fused.
        refusals: what was not, though it looks alike.
    """

    def __init__(
        self,
        graph: Graph,
        states: Mapping[str, str],
        left_out: Collection[str] = (),
        positions: int | None = None,
        reach: Kind = "filled",
    ) -> None:
        self.regions: list[Region] = []
        self.refusals: list[Refusal] = []
        self._main = graph.model.graph
        self._states = states
        self._left_out = frozenset(left_out)
        self._patcher = Patcher(graph)
        self._reach = reach
        self._grouped = Grouped(self._patcher, Reach(self._patcher, reach), positions)

    @property
    def changes(self) -> dict[str, int]:
        """Regions by kind."""
        return dict(collections.Counter(f"{region.kind} fused" for region in self.regions))

    def run(self) -> None:
        """Fuses each attention over a cache."""
        for node in list(self._main):
            if node.op_type != "Softmax" or node.domain:
                continue
            found = self._attention(node)
            if isinstance(found, str):
                self.refusals.append(Refusal(f"no attention over a cache to fuse: {found}", label(node)))
            elif (found.end.outputs[0].name or "") not in self._left_out:
                self._fuse(found)
        if self.regions:
            self._main.sort()

    def _attention(self, softmax: ir.Node) -> Cached | str:
        """The attention around a softmax, or why it is none."""
        sums = pairs(producer(softmax.inputs[0], "Add"))
        product = next(((*p, mask) for a, mask in sums if (p := self._scores(a))), None)
        if product is None:
            return "its scores are no sum of a mask and a product"
        matmul, scale, mask = product
        query, keys = matmul.inputs
        weighted = only_reader(softmax.outputs[0])
        if weighted is None or weighted.op_type != "MatMul" or weighted.inputs[0] is not softmax.outputs[0]:
            return "its weights are not multiplied with values alone"
        key, value = self._write(keys), self._write(weighted.inputs[1])
        if key is None or value is None:
            return "its keys or values are no cache, but computed from one or without"
        if query is None or key.positions is not value.positions:
            return "keys and values are written to different positions"
        found = self._sized(softmax, query, key, value, scale, weighted)
        if isinstance(found, str):
            return found
        bias = bias_in(mask, found.heads, size(key.past, 2))
        if bias is not None and self._reach == "room":
            return "its heads have biases, which GroupQueryAttention does not take on a GPU"
        return dataclasses.replace(found, bias=bias)

    def _sized(
        self, softmax: ir.Node, query: ir.Value, key: Write, value: Write, scale: float, weighted: ir.Node
    ) -> Cached | str:
        shared, width = size(key.past, 1), size(key.past, 3)
        end = weighted.outputs[0]
        if rank(query) == 5:
            ungrouped = producer(query, "Reshape")
            joined = only_reader(end)
            if ungrouped is None or joined is None or joined.op_type != "Reshape" or rank(joined.outputs[0]) != 4:
                return "its heads are grouped in another way"
            query, end = ungrouped.inputs[0] or query, joined.outputs[0]
        heads, last = _heads(query), only_reader(end)
        if rank(query) != 4 or heads is None or shared is None or width is None or heads % shared:
            return "its heads are not known"
        if size(value.past, 3) != width or size(value.past, 1) != shared:
            return f"keys have a width of {width}, values one of {size(value.past, 3)}"
        if width % 8:
            return f"a width of {width} is no multiple of 8, which GroupQueryAttention asks for"
        if last is None or last.op_type != "Transpose" or permuted(last.outputs[0], (0, 2, 1, 3)) is None:
            return "its heads are put together in another way"
        return Cached(softmax, query, key, value, scale, heads, shared, width, last)

    def _scores(self, value: ir.Value) -> tuple[ir.Node, float] | None:
        """A product of queries and keys, and the constant that it is multiplied with."""
        found, factor = scaled(value)
        node = producer(found, "MatMul")
        return None if node is None else (node, factor)

    def _write(self, value: ir.Value | None) -> Write | None:
        """What writes the cache that a value shows."""
        node = _seen(value)
        node_of = node.producer() if node is not None else None
        if node is None or node_of is None or node_of.op_type not in ("ScatterElements", "ScatterND"):
            return None
        past, index, new = node_of.inputs[:3]
        if past is None or index is None or new is None or self._states.get(past.name or "") != node.name:
            return None
        positions = _seen(index)
        if positions is None or rank(positions) != 2 or positions.dtype != ir.DataType.INT64:
            return None
        return Write(node_of, past, new, positions)

    def _fuse(self, found: Cached) -> None:
        self.regions.append(Region(KIND, label(found.softmax), found.end.outputs[0].name or ""))
        self._grouped.apply(Patch(self._patcher, found.end), found)
        if self._grouped.reason:
            reason = f"its rotary embedding stays as it was: {self._grouped.reason}"
            self.refusals.append(Refusal(reason, label(found.softmax)))


def _heads(query: ir.Value | None) -> int | None:
    """The heads of a query (batch, heads, time, width): of its shape, or of the tensor that they were cut out of.

    TorchScript computes shapes while it runs, so that a graph does not say them.
    """
    turned = rotary(query)
    return size(query, 1) or split(turned.x if turned is not None else query).heads


def _seen(value: ir.Value | None) -> ir.Value | None:
    """What a value shows in another shape."""
    while (node := producer(value, *_VIEWS)) is not None:
        value = node.inputs[0]
    return value
