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

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.schemas import MICROSOFT
from ..graph.selection import label
from ..quantization.patch import Patch, Patcher
from .biases import Biases, bias_in
from .fuser import Region
from .patterns import pairs, producer, rank, reader, scaled, size

KIND = "attention over a cache"
_VIEWS = ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Identity")


@dataclasses.dataclass(frozen=True)
class Write:
    """A node that writes new tokens into a cache, and gives the whole of it as an output of the graph."""

    node: ir.Node
    past: ir.Value
    new: ir.Value
    positions: ir.Value


@dataclasses.dataclass(frozen=True)
class Cached:
    """An attention. `query` is (batch, heads, time, width); `end` gives (batch, time, heads, width).

    Attributes:
        bias: what is added to its scores beside the mask, see `biases`; None where nothing is.
    """

    softmax: ir.Node
    query: ir.Value
    key: Write
    value: Write
    scale: float
    heads: int
    shared: int
    width: int
    end: ir.Node
    bias: ir.Value | None = None


class CachedFuser:
    """Rewrites a flat graph.

    Args:
        states: outputs of caches by their inputs.
        left_out: tensors of regions that stay as they are.

    Attributes:
        regions: what was fused.
        refusals: what was not, though it looks alike.
    """

    def __init__(self, graph: Graph, states: Mapping[str, str], left_out: Collection[str] = ()) -> None:
        self.regions: list[Region] = []
        self.refusals: list[Refusal] = []
        self._main = graph.model.graph
        self._states = states
        self._left_out = frozenset(left_out)
        self._patcher = Patcher(graph)
        self._biases = Biases(self._patcher)
        self._ends: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

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
        weighted = reader(softmax.outputs[0])
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
        return dataclasses.replace(found, bias=bias_in(mask, found.heads, size(key.past, 2)))

    def _sized(
        self, softmax: ir.Node, query: ir.Value, key: Write, value: Write, scale: float, weighted: ir.Node
    ) -> Cached | str:
        shared, width = size(key.past, 1), size(key.past, 3)
        end = weighted.outputs[0]
        if rank(query) == 5:
            ungrouped = producer(query, "Reshape")
            split = reader(end)
            if ungrouped is None or split is None or split.op_type != "Reshape" or rank(split.outputs[0]) != 4:
                return "its heads are grouped in another way"
            query, end = ungrouped.inputs[0] or query, split.outputs[0]
        heads, last = size(query, 1), reader(end)
        if rank(query) != 4 or heads is None or shared is None or width is None or heads % shared:
            return "its heads are not known"
        if size(value.past, 3) != width or size(value.past, 1) != shared:
            return f"keys have a width of {width}, values one of {size(value.past, 3)}"
        if width % 8:
            return f"a width of {width} is no multiple of 8, which GroupQueryAttention asks for"
        if last is None or last.op_type != "Transpose" or _perm(last) != (0, 2, 1, 3):
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
        result = found.end.outputs[0]
        patch = Patch(self._patcher, found.end)
        dtype = found.query.dtype or ir.DataType.FLOAT
        last, most = self._reach(patch, found.key.positions)
        inputs: list[ir.Value | None] = [
            self._joined(patch, found.query, found.heads),
            self._joined(patch, found.key.new, found.shared),
            self._joined(patch, found.value.new, found.shared),
            found.key.past,
            found.value.past,
            last,
            most,
        ]
        if found.bias is not None:  # behind what turns queries and keys, which nothing does here
            inputs += [None, None, None, self._biases.operand(patch, found.bias, found.key.positions, most)]
        names = [f"{patch.title}/{kind}" for kind in ("attended", "key", "value")]
        joined = ir.Shape([None, None, found.heads * found.width])
        attended, key, value = patch.add(
            "GroupQueryAttention",
            inputs,
            [
                (names[0], dtype, joined),
                (names[1], dtype, found.key.past.shape),
                (names[2], dtype, found.value.past.shape),
            ],
            {"num_heads": found.heads, "kv_num_heads": found.shared, "scale": found.scale},
            domain=MICROSOFT,
        )
        shape = self._patcher.initializer(f"{patch.title}/heads", np.array([0, 0, found.heads, found.width]))
        output = (f"{patch.title}/fused", dtype, result.shape)
        (split,) = patch.add("Reshape", [attended, shape], [output], main=True)
        self.regions.append(Region(KIND, label(found.softmax), result.name or ""))
        patch.apply(split, key, value, also=(found.key.node, found.value.node))

    def _joined(self, patch: Patch, value: ir.Value, heads: int) -> ir.Value:
        """(batch, heads, time, width) as (batch, time, heads * width)."""
        dtype, turned = value.dtype or ir.DataType.FLOAT, producer(value, "Transpose")
        if turned is not None and _perm(turned) == (0, 2, 1, 3) and turned.inputs[0] is not None:
            value = turned.inputs[0]
        else:
            output = (f"{patch.title}/turned", dtype, None)
            (value,) = patch.add("Transpose", [value], [output], {"perm": (0, 2, 1, 3)})
        shape = self._patcher.initializer(f"{patch.title}/joined", np.array([0, 0, -1]))
        return patch.add("Reshape", [value, shape], [(f"{patch.title}/joined", dtype, None)])[0]

    def _reach(self, patch: Patch, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The last position of each row, and how many positions the longest row has, for all layers once."""
        if positions in self._ends:
            return self._ends[positions]
        integer, batch = ir.DataType.INT32, ir.Shape([None])
        title = positions.name or "positions"
        place = self._patcher.initializer(f"{title}/place", np.array(-1))
        (last,) = patch.add("Gather", [positions, place], [(f"{title}/last", ir.DataType.INT64, batch)], {"axis": 1})
        (last,) = patch.add("Cast", [last], [(f"{title}/last32", integer, batch)], {"to": integer.value})
        (most,) = patch.add("ReduceMax", [last], [(f"{title}/most", integer, ir.Shape([]))], {"keepdims": 0})
        one = self._patcher.initializer(f"{title}/one", np.array(1, np.int32))
        (most,) = patch.add("Add", [most, one], [(f"{title}/length", integer, ir.Shape([]))])
        self._ends[positions] = last, most
        return last, most


def _seen(value: ir.Value | None) -> ir.Value | None:
    """What a value shows in another shape."""
    while (node := producer(value, *_VIEWS)) is not None:
        value = node.inputs[0]
    return value


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))
