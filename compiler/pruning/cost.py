"""What products cost once dimensions have other sizes.

A product's multiply-adds are proportional to the lengths of its output's axes and of the one that it sums over, so a
dimension that shrinks to half takes half of the multiply-adds of each product whose axis it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import onnx_ir as ir

from ..dimensions import Dim, Dimensions, Term
from ..dimensions.layout import leaves, size_after
from ..graph.cost import Cost
from ..graph.precision import HEAVY
from ..graph.selection import label


class CostModel(Protocol):
    """What a graph costs with other sizes of dimensions."""

    def total(self, sizes: Mapping[Dim, int]) -> float:
        """Of the whole graph."""

    def touched(self, dim: Dim, sizes: Mapping[Dim, int]) -> float:
        """Of the products that a dimension takes part in."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A node that multiplies: parts of its work, each with the axes that it is proportional to."""

    node: ir.Node
    macs: float
    axes: tuple[Term, ...]

    def after(self, sizes: Mapping[Dim, int]) -> float:
        """Multiply-adds with these sizes."""
        return self.macs * math.prod(size_after(term, sizes) / term.size for term in self.axes)


class Macs:
    """Multiply-adds of a graph as a function of the sizes of its dimensions.

    Args:
        table: of each node as it is, by its label (`graph.cost.costs`).
    """

    def __init__(self, dimensions: Dimensions, table: Mapping[str, Cost]) -> None:
        self.products = [found for node in dimensions.graph.model.graph for found in _products(dimensions, node, table)]
        self._of: dict[Dim, list[Product]] = {}
        for product in self.products:
            for dim in {dim for term in product.axes for dim in leaves(term)}:
                self._of.setdefault(dim, []).append(product)

    def total(self, sizes: Mapping[Dim, int]) -> float:
        """Of the whole graph."""
        return sum(product.after(sizes) for product in self.products)

    def touched(self, dim: Dim, sizes: Mapping[Dim, int]) -> float:
        """Of the products that a dimension takes part in."""
        return sum(product.after(sizes) for product in self._of.get(dim, ()))


def _products(dimensions: Dimensions, node: ir.Node, table: Mapping[str, Cost]) -> list[Product]:
    found = table.get(label(node))
    if node.op_type not in HEAVY or found is None or not found.macs:
        return []
    relations = dimensions.relations
    y, first, second = relations.output(node) or [], relations.input(node, 0) or [], relations.input(node, 1) or []
    if node.op_type in ("LSTM", "GRU", "RNN"):
        recurrence = relations.input(node, 2) or []
        own, back = _area(second), _area(recurrence)
        return [
            Product(node, found.macs * own / (own + back), _terms(second[1:])),
            Product(node, found.macs * back / (own + back), _terms(recurrence[1:])),
        ]
    if node.op_type == "Conv":
        axes = [y[1], second[1]]
    elif node.op_type == "ConvTranspose":
        axes = [first[1], second[1]]
    elif node.op_type == "Gemm":
        axes = [*y, first[0 if node.attributes.get_int("transA", 0) else 1]]
    elif node.op_type == "MatMul":
        axes = [*y, first[-1]]
    else:
        axes = [first[1]] if len(first) == 4 else list(first[-1:])
    return [Product(node, found.macs, _terms(axes))]


def _terms(axes: list[Term | None]) -> tuple[Term, ...]:
    """A term for each axis; an axis of length 1, or one that is not followed, stays as it is."""
    return tuple(Dim(1) if term is None else term for term in axes)


def _area(axes: list[Term | None]) -> int:
    return math.prod(term.size for term in _terms(axes[1:]))
