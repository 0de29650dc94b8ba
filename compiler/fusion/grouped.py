"""Builds the node that stands for an attention over a cache: com.microsoft's GroupQueryAttention, and what it reads.

    q, k, v = x Wq, x Wk, x Wv          ->  x [Wq | Wk | Wv] as the query, where all are products of one tensor
    turned q, k                         ->  q, k and the cosines and sines of all positions

The operator turns queries and keys itself where the position of a token is its place in the cache, and heads are a
multiple of 16 wide. Where that does not hold, com.microsoft's RotaryEmbedding stands before it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from ..quantization.patch import Patch, Patcher
from .biases import Biases
from .liveness import outlives
from .operands import permuted, split
from .parts import whole
from .patterns import size
from .projections import packed
from .reach import Reach
from .rotary import Rotary, Table, Tables, attributes, rotary

ALIGNED = 16
"""What the operator turns itself is as many channels, of a head as wide, as a multiple of it."""

BIAS = 10
"""Which input of the operator is the bias."""


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


@dataclasses.dataclass(frozen=True)
class _Turning:
    """Queries and keys before they are turned, and by what.

    Attributes:
        inside: whether the operator turns them itself.
    """

    query: Rotary
    key: Rotary
    table: Table
    inside: bool


class Grouped:
    """Makes patches of attentions; what several of them read is made once.

    Args:
        reach: how far rows reach into their caches.
        positions: how many a text has, where that is more than a cache holds.

    Attributes:
        reason: why the rotary embedding of the last attention stays as it was; empty where it does not, or there is
            none.
    """

    def __init__(self, patcher: Patcher, reach: Reach, positions: int | None = None) -> None:
        self.reason = ""
        self._patcher = patcher
        self._positions = positions
        self._tables = Tables(patcher)
        self._reach = reach
        self._biases = Biases(patcher)

    def apply(self, patch: Patch, found: Cached) -> None:
        """Puts the node in the place of the end of the attention, and of what writes the caches."""
        result = found.end.outputs[0]
        dtype = found.query.dtype or ir.DataType.FLOAT
        options: dict[str, int | float] = {"num_heads": found.heads, "kv_num_heads": found.shared, "scale": found.scale}
        turning = self._turning(found)
        inputs = [*self._operands(patch, found, turning), found.key.past, found.value.past]
        last, most = self._reach(patch, found.key.positions, size(found.key.past, 2))
        inputs += [last, most]
        if turning is not None and turning.inside:
            inputs += [turning.table.cos, turning.table.sin]
            options |= {"do_rotary": 1, "rotary_interleaved": int(turning.query.interleaved)}
        if found.bias is not None:
            inputs += [None] * (BIAS - len(inputs))
            inputs.append(self._biases.operand(patch, found.bias, found.key.positions, most))
        names = [f"{patch.title}/{kind}" for kind in ("attended", "key", "value")]
        joined = ir.Shape([*(result.shape or (None, None))[:2], found.heads * found.width])
        attended, key, value = patch.add(
            "GroupQueryAttention",
            inputs,
            [
                (names[0], dtype, joined),
                (names[1], dtype, found.key.past.shape),
                (names[2], dtype, found.value.past.shape),
            ],
            options,
            domain=MICROSOFT,
        )
        shape = self._patcher.initializer(f"{patch.title}/heads", np.array([0, 0, found.heads, found.width]))
        output = (f"{patch.title}/fused", dtype, result.shape)
        (attended,) = patch.add("Reshape", [attended, shape], [output], main=True)
        patch.apply(attended, key, value, also=(found.key.node, found.value.node))

    def _turning(self, found: Cached) -> _Turning | None:
        self.reason = ""
        query, key = rotary(found.query), rotary(found.key.new)
        if query is None or key is None:
            return None
        tables = [
            self._tables.table(one, found.key.positions, size(found.key.past, 2), self._positions)
            for one in (query, key)
        ]
        table = tables[0]
        if isinstance(table, str):
            self.reason = table
        elif tables[1] is not table:
            self.reason = "queries and keys are turned by different angles"
        else:
            aligned = found.width % ALIGNED == 0 and query.turned % ALIGNED == 0
            return _Turning(query, key, table, aligned and table.positions is found.key.positions)
        return None

    def _operands(self, patch: Patch, found: Cached, turning: _Turning | None) -> list[ir.Value | None]:
        """Query, key and value as the operator takes them."""
        given = [(found.query, found.heads), (found.key.new, found.shared), (found.value.new, found.shared)]
        if turning is not None:
            given[:2] = (turning.query.x, found.heads), (turning.key.x, found.shared)
        if turning is None or turning.inside:
            together = self._packed(patch, found, [value for value, _ in given])
            if together is not None:
                return [together, None, None]
        query, key, value = (self._joined(patch, operand) for operand, _ in given)
        if turning is not None and not turning.inside:
            query = self._turned(patch, query, turning.query, turning.table, found.heads, found.width)
            key = self._turned(patch, key, turning.key, turning.table, found.shared, found.width)
        return [query, key, value]

    def _packed(self, patch: Patch, found: Cached, values: list[ir.Value]) -> ir.Value | None:
        """Queries, keys and values side by side (batch, time, columns), where one tensor or one product gives them."""
        joined = [split(value).joined for value in values]
        if (source := whole(joined)) is not None:
            return source
        together = packed(joined)
        results = (found.end.outputs[0], found.key.node.outputs[0], found.value.node.outputs[0])
        if together is None or outlives(together.made, *results):
            return None
        dtype, shape = found.query.dtype or ir.DataType.FLOAT, ir.Shape([None, None, sum(together.sizes)])
        weights = self._patcher.initializer(f"{patch.title}/weights", together.weight)
        (result,) = patch.add("MatMul", [together.x, weights], [(f"{patch.title}/product", dtype, shape)])
        if together.bias is not None:
            bias = self._patcher.initializer(f"{patch.title}/bias", together.bias)
            (result,) = patch.add("Add", [result, bias], [(f"{patch.title}/projected", dtype, shape)])
        return result

    def _turned(self, patch: Patch, value: ir.Value, found: Rotary, table: Table, heads: int, width: int) -> ir.Value:
        """Queries or keys (batch, time, heads * width), turned by a node of its own."""
        options = attributes(interleaved=found.interleaved, turned=found.turned, heads=heads, width=width)
        inputs = [value, table.positions, table.cos, table.sin]
        output = (f"{patch.title}/turned", value.dtype or ir.DataType.FLOAT, value.shape)
        return patch.add("RotaryEmbedding", inputs, [output], options, domain=MICROSOFT)[0]

    def _joined(self, patch: Patch, value: ir.Value) -> ir.Value:
        """(batch, heads, time, width) as (batch, time, heads * width)."""
        if (known := split(value).joined) is not None:
            return known
        dtype = value.dtype or ir.DataType.FLOAT
        before = permuted(value, (0, 2, 1, 3))
        if before is None:
            output = (f"{patch.title}/transposed", dtype, None)
            (before,) = patch.add("Transpose", [value], [output], {"perm": (0, 2, 1, 3)})
        shape = self._patcher.initializer(f"{patch.title}/joined", np.array([0, 0, -1]))
        return patch.add("Reshape", [before, shape], [(f"{patch.title}/joined", dtype, None)])[0]
