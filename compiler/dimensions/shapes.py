"""What operators that move data say of axes: Reshape, Transpose, Concat, Split, Slice, Gather and their like."""

from __future__ import annotations

import onnx_ir as ir

from ..graph.editing import is_constant
from .computed import tell_shape
from .layout import Concat, Dim, Product, Term
from .lengths import Lengths
from .relations import Axes, Relations, axis_of, parts, present, without


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
        tell_shape(node, 1, relations, y)


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
        tell_shape(node, 1, relations, y)
    elif node.op_type == "Tile" and y is not None:
        made = [term for term, size in zip(y, relations.sizes(node.inputs[0]) or (), strict=True) if size == 1]
        relations.hold(node, made, "it is made by repeating")


def _tiles_ones(node: ir.Node, relations: Relations) -> bool:
    repeats, x = relations.integers(node, 1, "repeats"), relations.sizes(node.inputs[0])
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
    relations.splits[node] = list(whole.parts)


def slice_(node: ir.Node, relations: Relations) -> None:
    """Slice: an axis is what lies before, in and behind the slice."""
    x, y, shape = relations.input(node, 0), relations.output(node), relations.sizes(node.inputs[0])
    starts, ends = relations.integers(node, 1, "starts"), relations.integers(node, 2, "ends")
    axes, steps = relations.integers(node, 3, "axes"), relations.integers(node, 4, "steps")
    if x is None or y is None or shape is None:
        relations.hold_all(node, "the shape of what it cuts is not known")
        return
    if starts is None or ends is None:
        cut = range(len(x)) if axes is None else [axis % len(x) for axis in axes]
        relations.hold(node, (term for axis in cut for term in (x[axis], y[axis])), "where it cuts is computed")
        kept = [axis for axis in range(len(x)) if axis not in cut]
        relations.tie_all(node, [x[axis] for axis in kept], [y[axis] for axis in kept])
        return
    axes = list(range(len(starts))) if axes is None else [axis % len(x) for axis in axes]
    steps = steps or [1] * len(starts)
    fixed = relations.fixed(node.inputs[0]) or [True] * len(x)
    cuts = {axis: (start, end, step) for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)}
    for axis, (term, out, size) in enumerate(zip(x, y, shape, strict=True)):
        if size is None or term is None:
            continue
        low, high, step = slice(*cuts.get(axis, (0, size, 1))).indices(size)
        if (low, high, step) == (0, size, 1):
            relations.tie(node, term, out)
            pieces: list[Term] = [Dim(0), term, Dim(0)]
        elif step != 1 or high <= low:
            relations.hold(node, (term, out), "it is sliced in steps")
            continue
        elif not fixed[axis]:
            relations.hold(node, (term, out), "a part of an axis of dynamic length is cut off")
            continue
        else:
            pieces = [Dim(low), out or Dim(1), Dim(size - high)]
            relations.tie(node, term, Concat(tuple(piece for piece in pieces if piece.size)))
        if axis in cuts:
            relations.cuts[node][axis] = pieces


def gather(node: ir.Node, relations: Relations) -> None:
    """Gather: an axis is what lies before one position, that position and the rest; looked up otherwise it is held."""
    x, chosen, y = relations.input(node, 0), relations.input(node, 1), relations.output(node)
    if x is None or chosen is None or y is None:
        relations.hold_all(node, "the shape of what it gathers is not known")
        return
    axis = node.attributes.get_int("axis", 0) % len(x)
    _look_up(node, relations, x[axis], axis)
    relations.tie_all(node, x[:axis] + x[axis + 1 :], y[:axis] + y[axis + len(chosen) :])
    relations.tie_all(node, chosen, y[axis : axis + len(chosen)])
    if axis == 0 and len(x) == 2 and is_constant(node.inputs[0]):
        relations.writes[node].add((0, 1))


def _look_up(node: ir.Node, relations: Relations, term: Term | None, axis: int) -> None:
    index, fixed = relations.constant(node, 1), relations.fixed(node.inputs[0]) or [True] * (axis + 1)
    if term is None or index is None or index.size != 1 or not fixed[axis]:
        relations.hold(node, (term,), "positions are looked up in it")
        return
    place = int(index.reshape(-1)[0]) % term.size
    pieces: list[Term] = [Dim(place), Dim(1), Dim(term.size - place - 1)]
    relations.tie(node, term, Concat(tuple(piece for piece in pieces if piece.size)))
    relations.places[node] = pieces


def pad(node: ir.Node, relations: Relations) -> None:
    """Pad: what is padded keeps its size."""
    x, y, pads = relations.input(node, 0), relations.output(node), relations.integers(node, 1, "pads")
    if x is None or y is None or pads is None:
        relations.hold_all(node, "how much it pads is computed")
        return
    axes = relations.integers(node, 3, "axes") if present(node, 3) else list(range(len(x)))
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
