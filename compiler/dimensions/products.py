"""What products say of axes: Conv, ConvTranspose, MatMul, Gemm, Einsum, recurrent layers and Attention.

Conv            x (N, g*i, ...)  W (g*o, i, *k)        b (g*o)    y (N, g*o, ...)       g groups
ConvTranspose   x (N, g*i, ...)  W (g*i, o, *k)        b (g*o)    y (N, g*o, ...)
MatMul          a (..., m, k)    b (..., k, n)                    y (..., m, n)
Gemm            a (m, k)         b (k, n)              c (m, n)   y (m, n)
LSTM            x (s, b, i)      W (d, 4*h, i)  R (d, 4*h, h)  B (d, 8*h)  y (s, d, b, h)
Attention       q (b, r*v, l, e) k (b, v, s, e)  v (b, v, s, f)   y (b, r*v, l, f)      v heads, each read r times
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph.editing import is_constant
from .layout import Concat, Dim, Product, Term
from .relations import Axes, Marks, Relations, axis_of, hold_offset, present

_STORED = frozenset(("Cast", "DequantizeLinear", "Identity", "Transpose"))
"""What a constant weight may pass before it is used."""

_MOVED_OVER = "a kernel moves over it"


def conv(node: ir.Node, relations: Relations) -> None:
    """Conv, ConvInteger and ConvTranspose: the two axes of the weight change places in the last."""
    x, weight, y = relations.input(node, 0), relations.input(node, 1), relations.output(node)
    shape = relations.sizes(node.inputs[1])
    if x is None or weight is None or y is None or shape is None or None in (shape[0], shape[1]):
        relations.hold_all(node, "the shape of its weight is not known")
        return
    groups, transposed = node.attributes.get_int("group", 1), node.op_type == "ConvTranspose"
    group, first = _dim(groups), _dim((shape[0] or 1) // groups)
    into, out = (first, weight[1]) if transposed else (weight[1], first)
    _tie_if(node, relations, x[1], _product(group, into))
    _tie_if(node, relations, y[1], _product(group, out))
    _tie_if(node, relations, weight[0], _product(group, first))
    _hold_places(node, relations, x, weight, y)
    for index in range(2, len(node.inputs)):  # the bias; zero points of ConvInteger
        for term in relations.input(node, index) or ():
            relations.tie(node, term, y[1])
    if node.op_type == "ConvInteger":
        hold_offset(node, 3, weight, relations)
    _note_groups(node, relations, group)
    _note(node, relations, 1, reads=int(not transposed), writes=int(transposed))


def matmul(node: ir.Node, relations: Relations) -> None:
    """MatMul and MatMulInteger."""
    a, b, y = relations.input(node, 0), relations.input(node, 1), relations.output(node)
    if not a or not b or y is None:
        relations.hold_all(node, "the shape of what it multiplies is not known")
        return
    if min(len(a), len(b)) == 1 and max(len(a), len(b)) > 2:
        relations.hold_all(node, "a vector is multiplied with several matrices")
        return
    _tie_if(node, relations, a[-1], axis_of(b, -2 if len(b) > 1 else -1))
    if len(b) > 1:
        _tie_if(node, relations, b[-1], axis_of(y, -1))
    if len(a) > 1:
        _tie_if(node, relations, a[-2], axis_of(y, -2 if len(b) > 1 else -1))
    for index, axes in enumerate((a, b)):
        if len(axes) > 2:
            relations.broadcast(node, (index,), y, batch=2)
    if node.op_type == "MatMulInteger":
        for index, other in ((2, axis_of(a, -2)), (3, b[-1])):
            for term in relations.input(node, index) or ():
                _tie_if(node, relations, term, other)
        hold_offset(node, 3, b, relations)
    if len(b) > 1:
        _note(node, relations, 1, reads=len(b) - 2, writes=len(b) - 1)
    if len(a) > 1:
        _note(node, relations, 0, reads=len(a) - 1, writes=len(a) - 2)


def gemm(node: ir.Node, relations: Relations) -> None:
    """Gemm."""
    a, b, y = relations.input(node, 0), relations.input(node, 1), relations.output(node)
    if a is None or b is None or y is None:
        relations.hold_all(node, "the shape of what it multiplies is not known")
        return
    first, second = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    _tie_if(node, relations, a[1 - first], b[second])
    _tie_if(node, relations, a[first], y[0])
    _tie_if(node, relations, b[1 - second], y[1])
    if present(node, 2):
        relations.broadcast(node, (2,), y)
    _note(node, relations, 1, reads=second, writes=1 - second)
    _note(node, relations, 0, reads=1 - first, writes=first)


def einsum(node: ir.Node, relations: Relations) -> None:
    """Einsum: equal letters are equal axes."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if "..." in equation or "->" not in equation:
        relations.hold_all(node, "its equation leaves axes open")
        return
    inputs, _, output = equation.partition("->")
    found: dict[str, Term] = {}
    sides = [relations.input(node, index) for index in range(len(node.inputs))] + [relations.output(node)]
    for letters, axes in zip([*inputs.split(","), output], sides, strict=True):
        for letter, term in zip(letters, axes or (), strict=False):
            if term is not None:
                _tie_if(node, relations, term, found.setdefault(letter, term))
    for index, letters in enumerate(inputs.split(",")):
        for axis, letter in enumerate(letters):
            _mark(node, index, axis, relations.writes if letter in output else relations.reads)


def recurrent(node: ir.Node, relations: Relations) -> None:
    """LSTM, GRU and RNN: all gates, directions and states share the hidden size."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
    x, weight, recurrence = (relations.input(node, index) for index in range(3))
    size = node.attributes.get_int("hidden_size")
    if x is None or weight is None or recurrence is None or not size or node.attributes.get_int("layout", 0) != 0:
        relations.hold_all(node, "its layout or hidden size is not known")
        return
    hidden = Dim(size)

    _tie_if(node, relations, x[2], weight[2])
    _tie_if(node, relations, recurrence[2], hidden)
    for index, count in ((1, gates), (2, gates), (3, 2 * gates), (7, 3)):
        axes = relations.input(node, index)
        if axes is not None:
            _tie_if(node, relations, axes[1], Concat((hidden,) * count))
            relations.hold(node, (axes[0],), "its positions are the directions")
    states = [relations.input(node, index) for index in (5, 6)] + [relations.output(node, index) for index in range(3)]
    for axes in states:
        if axes is not None:
            _tie_if(node, relations, axes[-1], hidden)
            relations.hold(node, axes[:-1], "it is the batch, the steps or the directions")
    relations.attributes[node]["hidden_size"] = hidden
    _note(node, relations, 1, reads=2, writes=1)


def attention(node: ir.Node, relations: Relations) -> None:
    """Attention of opset 23 on, without a cache."""
    query, key, value = (relations.input(node, index) for index in range(3))
    y = relations.output(node)
    if not (query and key and value and y) or any(present(node, i) for i in (4, 5)) or len(node.outputs) > 1:
        relations.hold_all(node, "attention with a cache, or of unknown shape")
        return
    shapes = [relations.sizes(node.inputs[index]) or [] for index in range(3)]
    three = len(query) == 3
    readers = (node.attributes.get_int("q_num_heads", 0) if three else shapes[0][1]) or 0
    heads = (node.attributes.get_int("kv_num_heads", 0) if three else shapes[1][1]) or 0
    widths = [shape[-1] for shape in shapes]
    if not heads or not readers or None in widths:
        relations.hold_all(node, "its heads are not known")
        return
    shared, repeat = _dim(heads), _dim(readers // heads)
    size, mixed = (Dim((widths[index] or 0) // (heads if three else 1)) for index in (1, 2))
    every = _product(shared, repeat)
    layouts = ((query, every, size), (key, shared, size), (value, shared, mixed), (y, every, mixed))
    for axes, count, width in layouts:
        if three:
            _tie_if(node, relations, axes[2], _product(count, width))
        else:
            _tie_if(node, relations, axes[1], count)
            _tie_if(node, relations, axes[3], width)
    if present(node, 3):
        relations.hold(node, relations.input(node, 3) or (), "it masks attention")
        mask = relations.input(node, 3)
        if mask is not None and len(mask) == 4 and mask[1] is not None:
            relations.hold(node, (every,), "each head has a mask of its own")
    relations.hold(node, (query[-2], key[-2]), "attention runs over it")
    if "scale" not in node.attributes:
        relations.hold(node, (size,), "attention divides by its root")
    if three:
        relations.attributes[node].update(q_num_heads=every or Dim(1), kv_num_heads=shared or Dim(1))


def _dim(size: int) -> Dim | None:
    return Dim(size) if size > 1 else None


def _product(*factors: Term | None) -> Term | None:
    given = tuple(factor for factor in factors if factor is not None)
    return Product(given) if len(given) > 1 else given[0] if given else None


def _tie_if(node: ir.Node, relations: Relations, first: Term | None, second: Term | None) -> None:
    """Ties two axes unless both are of one position or of unknown length."""
    if first is not None or second is not None:
        relations.tie(node, first, second)


def _hold_places(node: ir.Node, relations: Relations, *tensors: Axes) -> None:
    for axes in tensors:
        relations.hold(node, axes[2:], _MOVED_OVER)
    relations.hold(node, (tensors[0][0], tensors[-1][0]), "it is the batch")


def _note_groups(node: ir.Node, relations: Relations, group: Term | None) -> None:
    if group is not None:
        relations.attributes[node]["group"] = group


def _note(node: ir.Node, relations: Relations, index: int, *, reads: int, writes: int) -> None:
    """Notes which axis of a weight is summed over, and which lies over what is made."""
    _mark(node, index, reads, relations.reads)
    _mark(node, index, writes, relations.writes)


def _mark(node: ir.Node, index: int, axis: int, marks: Marks) -> None:
    """Marks an axis of a constant, through what stores it in another form."""
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    if is_constant(value):
        marks[node].add((index, axis))
    elif producer is not None and producer.op_type in _STORED:
        if producer.op_type == "Transpose":
            order = producer.attributes.get_ints("perm", ())
            axis = order[axis] if order else len(value.shape or ()) - 1 - axis  # type: ignore[union-attr]
        _mark(producer, 0, axis, marks)
