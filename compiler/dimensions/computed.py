"""What is said of lengths that a graph computes: Shape, Size, and the shapes that Reshape and its like are given.

What is computed from fixed lengths alone stays as it was when lengths change, such as the root of the head size that
attention divides by; the shapes that operators are given are made anew. Lengths are held where neither is possible.
"""

from __future__ import annotations

import onnx_ir as ir

from .layout import Concat, Dim, Product, Term, resolved
from .lengths import MOVES
from .relations import Axes, Relations

_TELLS = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3}
"""Inputs that tell the lengths of an output."""


def tell_shape(node: ir.Node, index: int, relations: Relations, y: Axes) -> None:
    """Notes the lengths that an input must tell; holds them where how it is computed is not followed."""
    relations.shapes[node] = index, [term or Dim(1) for term in y]
    if relations.constant(node, index) is None and relations.computed(node.inputs[index]) is None:
        relations.hold(node, y, "the shape that it is given is computed")


def hold_sums(relations: Relations) -> None:
    """Holds what adds up to a length that is computed: its parts cannot be told from it. A factor of one can."""
    for node, (index, terms) in relations.shapes.items():
        computed = relations.computed(node.inputs[index])
        if computed is None or computed.fixed.all():
            continue
        for term, fixed in zip(terms, computed.fixed.reshape(-1), strict=True):
            if not fixed and _adds(term):
                relations.hold(node, (term,), "the shape that it is given is computed")


def _adds(term: Term) -> bool:
    found = resolved(term)
    return isinstance(found, Concat) or (isinstance(found, Product) and any(map(_adds, found.parts)))


def constant_of_shape(node: ir.Node, relations: Relations) -> None:
    """ConstantOfShape: the same number everywhere."""
    if (y := relations.output(node)) is not None:
        tell_shape(node, 0, relations, y)


def shape_of(node: ir.Node, relations: Relations) -> None:
    """Shape: what is computed from fixed lengths alone stays as it was; other lengths must stay as they are."""
    x = relations.input(node, 0)
    if x is None:
        return
    end = node.attributes.get_int("end", len(x)) if "end" in node.attributes else len(x)
    low, high, _ = slice(node.attributes.get_int("start", 0), end).indices(len(x))
    read = {low + place for user, _ in node.outputs[0].uses() for place in _chosen(user, high - low, relations)}
    fixed = relations.fixed(node.inputs[0])
    if _followed(node.outputs[0], relations):
        read = {place for place in read if not fixed or not fixed[place]}
    relations.hold(node, (x[place] for place in sorted(read)), "its length is read and computed with")


def size_of(node: ir.Node, relations: Relations) -> None:
    """Size: a fixed number stays as it was."""
    computed = relations.computed(node.outputs[0])
    if computed is None or not computed.fixed.all():
        relations.hold(node, relations.input(node, 0) or (), "its length is read and computed with")


def _followed(value: ir.Value, relations: Relations) -> bool:
    """Whether all that is computed from lengths that are fixed and others that are not keeps the two apart."""
    here = relations.computed(value)
    if here is None or value.is_graph_output():
        return False
    if here.fixed.all():
        return True
    for user, index in value.uses():
        there = relations.computed(user.outputs[0])
        if there is None:
            if _TELLS.get(user.op_type) != index:
                return False
            continue
        apart = there.array.shape == here.array.shape and not (here.fixed & ~there.fixed).any()
        if not (user.op_type in MOVES or apart) or not _followed(user.outputs[0], relations):
            return False
    return True


def _chosen(user: ir.Node, length: int, relations: Relations) -> list[int]:
    """The entries of a shape that a node takes; all where that is not known."""
    everything = list(range(length))
    if user.op_type == "Gather":
        index = relations.constant(user, 1)
        return everything if index is None else [int(i) % length for i in index.reshape(-1)]
    if user.op_type != "Slice":
        return everything
    starts, ends = relations.integers(user, 1, "starts"), relations.integers(user, 2, "ends")
    if not starts or not ends:
        return everything
    return everything[starts[0] : ends[0]]
