"""Chooses which dimensions grow, and to what size, or says why one does not.

An axis that a product sums over (K), or makes (N), is aligned where its length is a multiple. Where it is not, a
dimension in it has to grow:

    one dimension          to the next multiple
    heads x head size      the head size, until all heads together make a multiple
    one behind the other   each part to the next multiple
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from ..dimensions import Concat, Dim, Dimensions, Group, Hold, Product, Term
from ..dimensions.layout import leaves, resolved
from ..graph.editing import is_constant
from ..graph.selection import label
from .share import PRODUCTS, RECURRENT

LEAST = 8
"""The multiple that is made do with where a larger one would waste too much."""

_INPUT = "it is an input of the model"


@dataclasses.dataclass(frozen=True)
class Growth:
    """A dimension and the size that it gets."""

    group: Group
    size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What grows, and what should and does not.

    Attributes:
        refusals: the reason for each group.
        held: those groups that only the graph stands against.
    """

    growths: tuple[Growth, ...]
    refusals: Mapping[Group, str]
    held: tuple[Group, ...]


def make_plan(dimensions: Dimensions, multiple: int, waste: float, keep: Collection[str]) -> Plan:
    """Looks at every product.

    Args:
        multiple: a power of two, so that other dimensions that grow leave an axis aligned.
        waste: largest share of multiply-adds that alignment may add to the products of a dimension.
        keep: labels of nodes whose dimensions stay.
    """
    growths: list[Growth] = []
    refusals: dict[Group, str] = {}
    held: list[Group] = []
    products = products_by_dim(dimensions)
    for dim, factors in _wanted(dimensions, multiple).items():
        group = dimensions.group(dim)
        size = _exempt(group, products[dim], keep) or _size(dim.size, factors, multiple, waste)
        if isinstance(size, str):
            refusals[group] = size
        elif reason := _held(group):
            refusals[group] = reason
            held.append(group)
        else:
            growths.append(Growth(group, size))
    return Plan(tuple(growths), refusals, tuple(held))


def _wanted(dimensions: Dimensions, multiple: int) -> dict[Dim, list[int]]:
    """Dimensions that leave an axis without alignment; for each axis the positions that one of theirs counts for."""
    found: dict[Dim, list[int]] = {}
    known = {group.dim for group in dimensions.groups}
    for node in _products(dimensions):
        for term in product_axes(dimensions, node):
            for dim, factor in _parts(dimensions, term, multiple):
                if dim in known:
                    found.setdefault(dim, []).append(factor)
    return found


def _parts(dimensions: Dimensions, term: Term, multiple: int) -> Iterator[tuple[Dim, int]]:
    found = resolved(term)
    if found.size % multiple == 0:
        return
    if isinstance(found, Dim):
        yield found, 1
    elif isinstance(found, Concat):
        if found.size % min(multiple, LEAST):  # else what was cut off again at an output would grow in its turn
            for part in found.parts:
                yield from _parts(dimensions, part, multiple)
    else:
        inner = [part for part in found.parts if isinstance(part, Dim)]
        free = [dim for dim in inner if not any(map(blocks, dim.holds))] or inner
        if free:
            yield free[-1], found.size // free[-1].size


def products_by_dim(dimensions: Dimensions) -> dict[Dim, set[str]]:
    """Labels of the products that sum over each dimension, or make it."""
    found: dict[Dim, set[str]] = collections.defaultdict(set)
    for node in _products(dimensions):
        for term in product_axes(dimensions, node):
            for dim in leaves(term):
                found[dim].add(label(node))
    return found


def _products(dimensions: Dimensions) -> Iterator[ir.Node]:
    return (node for node in dimensions.graph.model.graph if node.op_type in PRODUCTS and not node.domain)


def product_axes(dimensions: Dimensions, node: ir.Node) -> list[Term]:
    """What K and N of a product are made of, those of one channel and of unknown length left out."""
    relations = dimensions.relations
    first, second = (relations.input(node, index) or [] for index in (0, 1))
    if node.op_type in RECURRENT:
        hidden = relations.attributes[node].get("hidden_size")
        terms = [second[2] if len(second) > 2 else None, hidden if not isinstance(hidden, list) else None]
    elif node.op_type.startswith("Conv"):
        terms = [_of_one_group(relations.attributes[node].get("group"), term) for term in second[:2]]
        if any(term is None or term.size == 1 for term in terms):  # depthwise: Tensor Cores have no part in it
            terms = []
    elif node.op_type == "Attention":
        heads, third = relations.attributes[node], relations.input(node, 2) or []
        terms = [
            _of_one_group(heads.get("q_num_heads"), first[-1] if first else None),
            _of_one_group(heads.get("kv_num_heads"), third[-1] if third else None),
        ]
    else:
        y = relations.output(node) or []
        transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
        terms = [first[0 if transposed else -1] if first else None, y[-1] if y and len(second) > 1 else None]
    return [term for term in terms if term is not None]


def _of_one_group(group: Term | list[Term] | None, term: Term | None) -> Term | None:
    """The channels of one group of a convolution, or the size of one head."""
    found = resolved(term) if term is not None else None
    if group is None or isinstance(group, list) or not isinstance(found, Product):
        return None if group is not None and found is not None and set(leaves(found)) <= set(_of(group)) else found
    parts = [part for part in found.parts if not set(leaves(part)) <= set(_of(group))]
    return Product(tuple(parts)) if len(parts) > 1 else parts[0] if parts else None


def _of(group: Term | list[Term]) -> Iterator[Dim]:
    return leaves(group) if not isinstance(group, list) else iter(())


def _exempt(group: Group, products: Collection[str], keep: Collection[str]) -> str:
    """Why a group is not looked at; empty where it is."""
    readers = [label(member.node) for member in group.members if member.node is not None and is_constant(member.value)]
    if kept := next((name for name in (*products, *readers) if name in keep), None):
        return f"kept by choice ({kept})"
    where = next((found.where for found in group.holds if found.reason == _INPUT), None)
    if where is None:
        return ""
    return f"{_INPUT} ({where}), and to pad one at run time gained nothing, measured for 13 as 16"


def _held(group: Group) -> str:
    """What in the graph stands against growing; empty where nothing does."""
    if not is_made(group):
        return "no constant weight makes it"
    if found := next((hold for hold in group.holds if blocks(hold)), None):
        return f"{found.reason} ({found.where})"
    for member in group.members:
        if member.value.is_graph_output() and (is_constant(member.value) or not isinstance(resolved(member.term), Dim)):
            return f"it is a part of an axis of the output {member.value.name}"
    return ""


def is_made(group: Group) -> bool:
    """Whether constant weights make a dimension, quantized ones too."""
    constants = [member for member in group.members if is_constant(member.value)]
    return any(m.role == "writes" or (m.node is not None and m.node.op_type == "DequantizeLinear") for m in constants)


def blocks(hold: Hold) -> bool:
    """Whether a hold stands against growing what is cut off again at outputs."""
    return hold.blocks != "shrink" and not hold.at_output


def _size(size: int, factors: list[int], multiple: int, waste: float) -> int | str:
    """The size that is aligned everywhere, or why there is none that is worth it.

    What the largest multiple adds is counted from the size that the least one gives, so that to align again what was
    aligned changes nothing.
    """
    least = _next(size, factors, min(multiple, LEAST))
    largest = _next(size, factors, multiple)
    if least - size <= waste * size:
        if largest - least <= waste * least:
            return largest
        if least > size:
            return least
        least = largest
    return f"{size} -> {least} would add {least / size - 1:.0%} multiply-adds, more than waste={waste:g}"


def _next(size: int, factors: list[int], multiple: int) -> int:
    step = math.lcm(*(multiple // math.gcd(factor, multiple) for factor in factors))
    return -(-size // step) * step
