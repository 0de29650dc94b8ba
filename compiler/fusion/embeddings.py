"""Finds embedding tables whose rows are read one beside the other, and joins them to one table.

    Concat(.., Unsqueeze(Gather(T1, i1)), Unsqueeze(Gather(T2, i2)), ..)
        ->  Concat(.., Gather([T1; T2], [i1, i2] + [0, rows of T1]), ..)

A negative index counts from the end of its own table, and one beyond its table stays an error: both are found before
the offset is added, and the latter becomes an index beyond the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from ..quantization.patch import Patch, Patcher
from .patterns import integers, producer, rank, size

MOST = {"INT32": np.iinfo(np.int32).max}
"""Rows that indices can count."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One operand of a Concat that is read from a table.

    Attributes:
        index: the indices, (batch,) or (batch, 1).
    """

    node: ir.Node
    table: ir.Value
    index: ir.Value

    @property
    def kind(self) -> tuple[object, ...]:
        """What tables and indices must share to be joined."""
        return self.table.dtype, size(self.table, 1), self.index.dtype, rank(self.index)


@dataclasses.dataclass(frozen=True)
class Group:
    """Operands of a Concat, one after the other from `start` on, that one table can give.

    Attributes:
        stacked: whether they are stacked along an axis of their own; else they are joined to one long row.
    """

    concat: ir.Node
    start: int
    lookups: tuple[Lookup, ...]
    stacked: bool

    @property
    def tables(self) -> tuple[ir.Value, ...]:
        """The tables, each once."""
        return tuple(dict.fromkeys(lookup.table for lookup in self.lookups))


def groups(graph: ir.Graph) -> Iterator[Group]:
    """All groups of two or more tables."""
    for concat in list(graph):
        if concat.op_type != "Concat" or concat.domain or not concat.outputs:
            continue
        axis, axes = concat.attributes.get_int("axis", 0), rank(concat.outputs[0])
        if axes is None or axis % axes != 1 or axes not in (2, 3):
            continue
        found = [_lookup(value, axes) for value in concat.inputs]
        start = 0
        while start < len(found):
            first, end = found[start], start + 1
            while first is not None and end < len(found) and (other := found[end]) and other.kind == first.kind:
                end += 1
            run = tuple(lookup for lookup in found[start:end] if lookup is not None)
            if len(run) > 1 and len({lookup.table for lookup in run}) > 1:
                yield Group(concat, start, run, stacked=axes == 3)
            start = end


def why_not(group: Group) -> str:
    """Why the tables of a group stay as they are; empty where they can be joined."""
    nodes = {lookup.node for lookup in group.lookups}
    for table in group.tables:
        if table.is_graph_output() or any(use.node not in nodes for use in table.uses()):
            return f"table {table.name!r} is used elsewhere too, and would be held twice"
    rows = sum(size(table, 0) or 0 for table in group.tables)
    dtype = group.lookups[0].index.dtype
    if dtype is not None and rows > MOST.get(dtype.name, rows):
        return f"{rows} rows together are more than {dtype.name} indices can count"
    return ""


def join(patcher: Patcher, group: Group) -> None:
    """Puts one table and one Gather in the place of a group."""
    first, count = group.lookups[0], len(group.lookups)
    dtype, width = first.table.dtype or ir.DataType.FLOAT, size(first.table, 1) or 0
    patch = Patch(patcher, group.concat)
    indices = _checked(patch, patcher, group, _indices(patch, patcher, group))
    table = patcher.initializer(f"{patch.title}/tables", np.concatenate([_array(table) for table in group.tables]))
    shape = ir.Shape([_batch(group), count, width])
    (rows,) = patch.add("Gather", [table, indices], [(f"{patch.title}/rows", dtype, shape)], {"axis": 0})
    if not group.stacked:
        long = patcher.initializer(f"{patch.title}/long", np.array([-1, count * width], np.int64))
        shape = ir.Shape([_batch(group), count * width])
        (rows,) = patch.add("Reshape", [rows, long], [(f"{patch.title}/row", dtype, shape)])
    result = group.concat.outputs[0]
    operands = [*group.concat.inputs[: group.start], rows, *group.concat.inputs[group.start + count :]]
    if len(operands) > 1:
        output = (f"{patch.title}/joined", dtype, result.shape)
        axis = {"axis": group.concat.attributes.get_int("axis", 0)}
        (rows,) = patch.add("Concat", operands, [output], axis, main=True)
    patch.apply(rows)


def _lookup(value: ir.Value | None, axes: int) -> Lookup | None:
    """Reads an operand of a Concat of so many axes, whose rows nothing else reads."""
    if value is None or len(tuple(value.uses())) != 1 or value.is_graph_output():
        return None
    source = value
    node = producer(value, "Unsqueeze")
    if node is not None and axes == 3:
        given = tuple(node.attributes.get_ints("axes") or ()) or integers((*node.inputs, None)[1])
        if given not in ((1,), (-2,)) or node.inputs[0] is None or len(tuple(node.inputs[0].uses())) != 1:
            return None
        source = node.inputs[0]
    gather = producer(source, "Gather")
    if gather is None or gather.attributes.get_int("axis", 0) != 0:
        return None
    table, index = gather.inputs
    if table is None or index is None or not is_constant(table) or rank(table) != 2:
        return None
    flat = source is not value or axes == 2
    if rank(index) != (1 if flat else 2) or not (flat or size(index, 1) == 1):
        return None
    return Lookup(gather, table, index)


def _indices(patch: Patch, patcher: Patcher, group: Group) -> ir.Value:
    """The indices of all lookups side by side, (batch, count)."""
    dtype = group.lookups[0].index.dtype or ir.DataType.INT64
    shape = ir.Shape([_batch(group), len(group.lookups)])
    sources = [_column(lookup.index) for lookup in group.lookups]
    columns = [column for _, column in sources if column is not None]
    source = sources[0][0]
    if len(columns) == len(sources) and all(other is source for other, _ in sources):
        if columns == list(range(size(source, 1) or 0)):
            return source
        chosen = patcher.initializer(f"{patch.title}/columns", np.array(columns, np.int64))
        return patch.add("Gather", [source, chosen], [(f"{patch.title}/indices", dtype, shape)], {"axis": 1})[0]
    parts = [lookup.index for lookup in group.lookups]
    if rank(parts[0]) == 1:
        back = patcher.initializer(f"{patch.title}/column", np.array([-1, 1], np.int64))
        wide = ir.Shape([_batch(group), 1])
        parts = [patch.add("Reshape", [part, back], [(f"{part.name}/column", dtype, wide)])[0] for part in parts]
    return patch.add("Concat", parts, [(f"{patch.title}/indices", dtype, shape)], {"axis": 1})[0]


def _column(index: ir.Value) -> tuple[ir.Value, int | None]:
    """The tensor of two axes that indices (batch,) are a column of, and which."""
    gather = producer(index, "Gather")
    if gather is None or gather.attributes.get_int("axis", 0) != 1 or rank(index) != 1:
        return index, None
    source, number = gather.inputs[0], integers(gather.inputs[1])
    length = size(source, 1)
    if source is None or rank(source) != 2 or number is None or length is None:
        return index, None
    return source, number[0] % length


def _checked(patch: Patch, patcher: Patcher, group: Group, indices: ir.Value) -> ir.Value:
    """Indices into the joined table; those beyond their own lie beyond the whole."""
    dtype = group.lookups[0].index.dtype or ir.DataType.INT64
    shape = indices.shape
    lengths = {table: size(table, 0) or 0 for table in group.tables}
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]), strict=False))

    def numbers(name: str, values: Sequence[int] | int) -> ir.Value:
        return patcher.initializer(f"{patch.title}/{name}", np.array(values, dtype.numpy()))

    def add(operator: str, inputs: Sequence[ir.Value], name: str, kind: ir.DataType = dtype) -> ir.Value:
        return patch.add(operator, inputs, [(f"{patch.title}/{name}", kind, shape)])[0]

    rows = numbers("rows", [lengths[lookup.table] for lookup in group.lookups])
    offsets = numbers("offsets", [int(starts[lookup.table]) for lookup in group.lookups])
    zero, beyond = numbers("zero", 0), numbers("beyond", sum(lengths.values()))
    negative = add("Less", [indices, zero], "negative", ir.DataType.BOOL)
    counted = add("Where", [negative, add("Add", [indices, rows], "from_end"), indices], "counted")
    low = add("Less", [counted, zero], "low", ir.DataType.BOOL)
    inside = add("Less", [counted, rows], "inside", ir.DataType.BOOL)
    moved = add("Where", [inside, add("Add", [counted, offsets], "moved"), beyond], "upper")
    return add("Where", [low, beyond, moved], "checked")


def _batch(group: Group) -> int | ir.SymbolicDim | None:
    shape = group.lookups[0].index.shape
    return shape[0] if shape is not None else None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
