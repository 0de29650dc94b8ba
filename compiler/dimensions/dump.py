"""Dimension groups as plain JSON: what makes each, what reads it, and whether it may change."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..graph import Graph
from ..graph.editing import flattened
from ..graph.selection import label
from .analysis import Dimensions, Group, Member, Role
from .layout import Dim, describe, owners, resolved


def dump(graph: Graph, *, everything: bool = False) -> list[dict[str, Any]]:
    """The groups of a graph, in its order.

    Args:
        everything: also those that no constant weight makes, such as the batch, a sequence or the rows of an image.
    """
    dimensions = Dimensions(flattened(graph))
    return [_facts(dimensions, group) for group in dimensions.groups if everything or group.of("writes")]


def _facts(dimensions: Dimensions, group: Group) -> dict[str, Any]:
    shrink, grow = group.why_not("shrink"), group.why_not("grow")
    return {
        "name": group.name,
        "size": None if _is_dynamic(dimensions, group) else group.size,
        "repeated_in": sorted(parent.size for parent in group.parents),
        "made_by": _places(group, "writes"),
        "read_by": _places(group, "reads"),
        "followed_by": _places(group, "follows"),
        "carried_by": list(dict.fromkeys(f"{m.value.name}:{m.axis}" for m in group.of("carries"))),
        "may_shrink": not shrink,
        "why_not_shrink": shrink,
        "may_grow": not grow,
        "why_not_grow": grow,
    }


def _is_dynamic(dimensions: Dimensions, group: Group) -> bool:
    """Whether it is an axis whose length the caller chooses."""
    for member in group.of("carries"):
        fixed = dimensions.relations.fixed(member.value)
        if isinstance(resolved(member.term), Dim) and fixed:
            return not fixed[member.axis]
    return False


def _places(group: Group, role: Role) -> list[dict[str, Any]]:
    return [
        {
            "node": label(member.node) if member.node else "",
            "tensor": member.value.name or "",
            "axis": member.axis,
            "positions": where(member, group.dim),
        }
        for member in group.of(role)
    ]


def where(member: Member, dim: Dim) -> str:
    """Where a dimension stands on an axis: all of it, ``64:128``, or its layout, as in ``3 x 12 x 64``."""
    term = resolved(member.term)
    if isinstance(term, Dim):
        return "all"
    places = np.flatnonzero(owners(term, dim) >= 0)
    if len(places) == dim.size and places[-1] - places[0] + 1 == dim.size:
        return f"{places[0]}:{places[-1] + 1}"
    return describe(term)
