"""What operators that move data say of axes: Reshape, Transpose, Concat, Split, Slice, Gather and their like."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from .layout import Concat, Dim, Product, Term
from .relations import Axes, Lengths, Relations, axis_of, constant, integers, parts, present, without


def reshape(node: ir.Node, relations: Relations) -> None:
    """Reshape, Flatten, Squeeze and Unsqueeze: blocks of axes with equal products, from either end."""
    x, y = relations.input(node, 0), relations.output(node)
    before, after = relations.sizes(node.inputs[0]), relations.sizes(node.outputs[0])
    if x is None or y is None or before is None or after is None:
        relations.hold_all(node, "the shape of what it reshapes is not known")
        return
    ends = [len(x), len(y)]
    while blocks := _block((before, after), ends):
        factors = _factors(x[blocks[0] : ends[0]]), _factors(y[blocks[1] : ends[1]])
        if factors[0] is not None:
            relations.tie(node, *factors)
        ends = list(blocks)
    start = 0
    while start < min(ends) and before[start] is not None and before[start] == after[start]:
        if x[start] is not None:
            relations.tie(node, x[start], y[start])
        start += 1
    relations.hold(
        node, (*x[start : ends[0]], *y[start : ends[1]]), "it is reshaped together with an axis of unknown length"
    )
    if node.op_type == "Reshape":
        _shape(node, relations, y)


def _block(lengths: tuple[Lengths, Lengths], ends: list[int]) -> tuple[int, int] | None:
    """Where the shortest runs of axes at either end begin that have the same number of positions."""
    places, counts = list(ends), [1, 1]
    for side in (0, 1):
        while places[side] and lengths[side][places[side] - 1] == 1:
            places[side] -= 1
    while counts[0] != counts[1] or places == ends:
        side = 0 if counts[0] <= counts[1] else 1
        if not places[side] or not (size := lengths[side][places[side] - 1]):
            return None
        places[side] -= 1
        counts[side] *= size
    return places[0], places[1]


def _factors(axes: Axes) -> Term | None:
    given = tuple(term for term in axes if term is not None)
    return Product(given) if len(given) > 1 else given[0] if given else None


def _shape(node: ir.Node, relations: Relations, y: Axes) -> None:
    """Notes the lengths that a shape must tell; holds those that are computed in a way that is not followed."""
    shape, computed = node.inputs[1], "the shape that it is given is computed"
    producer = None if shape is None else shape.producer()
    relations.attributes[node]["shape"] = [term or Dim(1) for term in y]
    if is_constant(shape):
        return
    if producer is not None and producer.op_type == "Shape":  # of a tensor that changes alike
        source = relations.input(producer, 0) or []
        relations.tie_all(node, y, source[producer.attributes.get_int("start", 0) :][: len(y)])
    elif producer is None or (entries := shape_entries(producer)) is None or len(entries) != len(y):
        relations.hold(node, y, computed)
    else:
        relations.hold(node, (term for term, entry in zip(y, entries, strict=True) if entry is None), computed)


def shape_entries(producer: ir.Node) -> list[tuple[int, int] | None] | None:
    """Where each entry of a shape comes from that a Concat makes: input and place, None where it is computed.

    None where not even the number of entries is known.
    """
    entries: list[tuple[int, int] | None] = []
    if producer.op_type != "Concat":
        return None
    for index, value in enumerate(producer.inputs):
        if (array := constant(producer, index)) is not None:
            entries.extend((index, place) for place in range(array.size))
        elif value is not None and value.shape is not None and isinstance(value.shape[0], int):
            entries.extend([None] * value.shape[0])
        else:
            return None
    return entries


def transpose(node: ir.Node, relations: Relations) -> None:
    """Transpose."""
    x, y = relations.input(node, 0), relations.output(node)
    if x is None:
        relations.hold_all(node, "the shape of what it transposes is not known")
        return
    order = node.attributes.get_ints("perm", list(reversed(range(len(x))))) or ()
    relations.tie_all(node, [x[axis] for axis in order], y)


def expand(node: ir.Node, relations: Relations) -> None:
    """Expand, and Tile where it repeats only what has one position."""
    y = relations.output(node)
    if node.op_type == "Tile" and not _tiles_ones(node, relations):
        relations.hold_all(node, "it is repeated")
        return
    relations.broadcast(node, (0,), y)
    if node.op_type == "Expand" and y is not None:
        x = relations.sizes(node.inputs[0]) or []
        for place, term in enumerate(y):
            own = place - (len(y) - len(x))
            if own < 0 or x[own] == 1:
                relations.hold(node, (term,), "its length is given as a number")
        _shape(node, relations, y)
    elif node.op_type == "Tile" and y is not None:
        made = [term for term, size in zip(y, relations.sizes(node.inputs[0]) or (), strict=True) if size == 1]
        relations.hold(node, made, "it is made by repeating")


def _tiles_ones(node: ir.Node, relations: Relations) -> bool:
    repeats, x = integers(node, 1, "repeats"), relations.sizes(node.inputs[0])
    return repeats is not None and x is not None and all(n == 1 or s == 1 for n, s in zip(repeats, x, strict=True))


def concat(node: ir.Node, relations: Relations) -> None:
    """Concat."""
    y, inputs = relations.output(node), [relations.input(node, index) for index in range(len(node.inputs))]
    if y is None or any(axes is None for axes in inputs):
        relations.hold_all(node, "the shape of what it joins is not known")
        return
    axis = node.attributes.get_int("axis", 0)
    for axes in inputs:
        assert axes is not None
        relations.tie_all(node, list(without(axes, axis)), list(without(y, axis)))
    lengths = [(relations.sizes(value) or [])[axis] for value in node.inputs]
    joined = parts([(axis_of(axes or [], axis), size) for axes, size in zip(inputs, lengths, strict=True)])
    if joined is None:
        relations.hold(node, (axis_of(axes or [], axis) for axes in inputs), "it is joined to an unknown length")
    elif y[axis] is not None:
        relations.tie(node, y[axis], joined)


def split(node: ir.Node, relations: Relations) -> None:
    """Split."""
    x, outputs = relations.input(node, 0), [relations.output(node, index) for index in range(len(node.outputs))]
    if x is None or any(axes is None for axes in outputs):
        relations.hold_all(node, "the shape of what it splits is not known")
        return
    axis = node.attributes.get_int("axis", 0)
    for axes in outputs:
        assert axes is not None
        relations.tie_all(node, list(without(axes, axis)), list(without(x, axis)))
    pieces = [
        (axis_of(axes or [], axis), (relations.sizes(v) or [])[axis])
        for axes, v in zip(outputs, node.outputs, strict=True)
    ]
    whole = parts(pieces)
    if whole is None:
        relations.hold_all(node, "it is split into unknown lengths")
        return
    if x[axis] is not None:
        relations.tie(node, x[axis], whole)
    relations.attributes[node]["split"] = list(whole.parts)


def slice_(node: ir.Node, relations: Relations) -> None:
    """Slice: an axis is what lies before, in and behind the slice."""
    x, y, shape = relations.input(node, 0), relations.output(node), relations.sizes(node.inputs[0])
    starts, ends = integers(node, 1, "starts"), integers(node, 2, "ends")
    axes, steps = integers(node, 3, "axes"), integers(node, 4, "steps")
    if x is None or y is None or shape is None or starts is None or ends is None:
        relations.hold_all(node, "where it cuts is computed")
        return
    axes = list(range(len(starts))) if axes is None else [axis % len(x) for axis in axes]
    steps = steps or [1] * len(starts)
    cuts = {axis: (start, end, step) for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)}
    for axis, (term, out, size) in enumerate(zip(x, y, shape, strict=True)):
        if size is None or term is None:
            continue
        low, high, step = slice(*cuts.get(axis, (0, size, 1))).indices(size)
        if (low, high, step) == (0, size, 1):
            relations.tie(node, term, out)
        elif step != 1 or high <= low:
            relations.hold(node, (term, out), "it is sliced in steps")
        else:
            pieces = [(None, low), (out, high - low), (None, size - high)]
            whole = Concat(tuple(t or Dim(n) for t, n in pieces if n))
            relations.tie(node, term, whole)
            before = whole.parts[0] if low else Dim(0)
            relations.attributes[node][f"slice {axis}"] = [before, whole.parts[1 if low else 0]]


def gather(node: ir.Node, relations: Relations) -> None:
    """Gather: the axis that is looked up in keeps its size."""
    x, chosen, y = relations.input(node, 0), relations.input(node, 1), relations.output(node)
    if x is None or chosen is None or y is None:
        relations.hold_all(node, "the shape of what it gathers is not known")
        return
    axis = node.attributes.get_int("axis", 0) % len(x)
    relations.hold(node, (x[axis],), "positions are looked up in it")
    relations.tie_all(node, x[:axis] + x[axis + 1 :], y[:axis] + y[axis + len(chosen) :])
    relations.tie_all(node, chosen, y[axis : axis + len(chosen)])
    if axis == 0 and len(x) == 2 and is_constant(node.inputs[0]):
        relations.writes[node] = (0, 1)


def pad(node: ir.Node, relations: Relations) -> None:
    """Pad: what is padded keeps its size."""
    x, y, pads = relations.input(node, 0), relations.output(node), integers(node, 1, "pads")
    if x is None or y is None or pads is None:
        relations.hold_all(node, "how much it pads is computed")
        return
    axes = integers(node, 3, "axes") if present(node, 3) else list(range(len(x)))
    padded = {axis % len(x) for place, axis in enumerate(axes or ()) if pads[place] or pads[place + len(pads) // 2]}
    for axis, (term, out) in enumerate(zip(x, y, strict=True)):
        if axis in padded:
            relations.hold(node, (term, out), "it is padded")
        elif term is not None or out is not None:
            relations.tie(node, term, out)


def depth_to_space(node: ir.Node, relations: Relations) -> None:
    """DepthToSpace and SpaceToDepth: the blocks are factors of the deeper side's channels."""
    x, y, size = relations.input(node, 0), relations.output(node), node.attributes.get_int("blocksize", 1)
    deep, flat, shape = (
        (x, y, relations.sizes(node.outputs[0]))
        if node.op_type == "DepthToSpace"
        else (y, x, relations.sizes(node.inputs[0]))
    )
    if deep is None or flat is None or shape is None or shape[1] is None:
        relations.hold_all(node, "the shape of what it moves is not known")
        return
    block, channels = Dim(size * size), flat[1] or Dim(1)
    relations.hold(node, (block, *deep[2:], *flat[2:]), "it is made of places of the image")
    rows_first = node.attributes.get_string("mode", "DCR") == "DCR"
    relations.tie(node, deep[1], Product((block, channels) if rows_first else (channels, block)))
    relations.hold(node, (deep[0], flat[0]), "it is the batch")


def shape_of(node: ir.Node, relations: Relations) -> None:
    """Shape: axes of fixed length keep it where it is computed with; a tensor of the same shape changes alike."""
    x = relations.input(node, 0)
    if x is None:
        return
    end = node.attributes.get_int("end", len(x)) if "end" in node.attributes else len(x)
    low, high, _ = slice(node.attributes.get_int("start", 0), end).indices(len(x))
    read: set[int] = set()
    for user, index in node.outputs[0].uses():
        if not (user.op_type in ("Expand", "Reshape") and index == 1):
            read.update(low + place for place in _chosen(user, high - low))
    relations.hold(node, (x[place] for place in sorted(read)), "its length is read and computed with")


def _chosen(user: ir.Node, length: int) -> list[int]:
    """The entries of a shape that a node takes; all where that is not known."""
    everything = list(range(length))
    if user.op_type == "Gather":
        index = constant(user, 1)
        return everything if index is None else [int(i) % length for i in np.atleast_1d(index).reshape(-1)]
    if user.op_type != "Slice":
        return everything
    starts, ends = integers(user, 1, "starts"), integers(user, 2, "ends")
    if not starts or not ends:
        return everything
    return everything[starts[0] : ends[0]]
