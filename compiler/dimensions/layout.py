"""What an axis of a tensor is made of, and how two axes are made equal.

An axis is one of

    Dim                     positions that come and go one by one: channels, neurons, heads
    Product(a, b, ...)      every combination, the last one fastest: heads x head size
    Concat(a, b, ...)       one behind the other: queries, keys, values

To equate two axes is to unify two terms over dimensions. Where they are cut in different places, both are cut at the
places of either: a dimension becomes a product or a concatenation of smaller ones, wherever it stands.

    Dim(768) = Product(12, 64)                          the dimension is heads x head size from then on
    Concat(32, 64) = Concat(64, 32)                     -> Concat(32, 32, 32) on both sides
    Product(2, 58) = Product(58, 2)                     -> Product(2, 29, 2) on both sides
    Product(2, 64) = Concat(a64, b64)                   -> a = b
    Product(8, 32) = Concat(100, 156)                   cannot be: 100 is no multiple of 32
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

Blocks = Literal["both", "grow", "shrink"]


@dataclasses.dataclass(frozen=True)
class Hold:
    """Why a dimension keeps its size.

    Attributes:
        reason: a clause, as in "the softmax runs over it".
        where: the node, or the input or output of the graph.
        blocks: what it stands against.
        at_output: whether it is for an output of the graph alone, from which what grew can be cut off again.
    """

    reason: str
    where: str
    blocks: Blocks = "both"
    at_output: bool = False


class Dim:
    """Positions that come and go one by one, until it is found to be made of smaller ones."""

    def __init__(self, size: int, holds: Sequence[Hold] = ()) -> None:
        self.size = size
        self.holds: dict[Hold, None] = dict.fromkeys(holds)
        self.bound: Term | None = None

    def __repr__(self) -> str:
        return f"Dim({self.size})"


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Every combination of positions, the last factor's fastest."""

    parts: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Positions of the axis."""
        return math.prod(part.size for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Concat:
    """The positions of one part behind those of the part before."""

    parts: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Positions of the axis."""
        return sum(part.size for part in self.parts)


Term = Dim | Product | Concat


class LayoutConflictError(Exception):
    """Two axes cannot be equal; the message is a clause for people."""


def resolved(term: Term) -> Term:
    """The term in terms of dimensions that are not made of smaller ones."""
    if isinstance(term, Dim):
        return term if term.bound is None else resolved(term.bound)
    kind = type(term)
    parts: list[Term] = []
    for part in map(resolved, term.parts):
        parts.extend(part.parts if isinstance(part, kind) else [part])
    if kind is Product:
        parts = [part for part in parts if part.size != 1] or parts[:1]
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def leaves(term: Term) -> Iterator[Dim]:
    """The dimensions of an axis; one that stands in it twice comes twice."""
    found = resolved(term)
    if isinstance(found, Dim):
        yield found
    else:
        for part in found.parts:
            yield from leaves(part)


def hold(term: Term | None, reason: Hold) -> None:
    """Notes for every dimension of an axis why it keeps its size."""
    if term is not None:
        for dim in leaves(term):
            dim.holds[reason] = None


def unify(first: Term, second: Term) -> None:
    """Makes two axes equal.

    Raises:
        LayoutConflictError: that cannot be; what was equated on the way stays so, which is true all the same.
    """
    first, second = resolved(first), resolved(second)
    if first is second:
        return
    if first.size != second.size:
        raise LayoutConflictError(f"{first.size} positions meet {second.size}")
    if isinstance(first, Dim):
        _bind(first, second)
    elif isinstance(second, Dim):
        _bind(second, first)
    elif isinstance(first, Product) and isinstance(second, Product):
        inner = math.gcd(first.parts[-1].size, second.parts[-1].size)
        if inner == 1:
            raise _conflict(first, second)
        for one, other in zip(_factor(first, inner), _factor(second, inner), strict=True):
            unify(one, other)
    else:
        cut = first if isinstance(first, Concat) else second
        assert isinstance(cut, Concat)
        size = min(term.parts[0].size for term in (first, second) if isinstance(term, Concat))
        for one, other in zip(_split(first, size), _split(second, size), strict=True):
            unify(one, other)


def _bind(dim: Dim, term: Term) -> None:
    if any(leaf is dim for leaf in leaves(term)):
        raise LayoutConflictError(f"a dimension of {dim.size} would be a part of itself")
    for reason in dim.holds:
        hold(term, reason)
    dim.bound = term


def _conflict(first: Term, second: Term) -> LayoutConflictError:
    return LayoutConflictError(f"an axis laid out as {describe(first)} meets one laid out as {describe(second)}")


def _split(term: Term, size: int) -> tuple[Term, Term]:
    """The first `size` positions and the rest."""
    term = resolved(term)
    if isinstance(term, Dim):
        halves = Concat((Dim(size), Dim(term.size - size)))
        _bind(term, halves)
        return halves.parts[0], halves.parts[1]
    head, *rest = term.parts
    others = rest[0] if len(rest) == 1 else type(term)(tuple(rest))
    if isinstance(term, Concat):
        if head.size == size:
            return head, others
        if head.size > size:
            before, after = _split(head, size)
            return before, Concat((after, others))
        before, after = _split(others, size - head.size)
        return Concat((head, before)), after
    if size % others.size:
        raise LayoutConflictError(f"{size} positions are cut off {describe(term)}")
    before, after = _split(head, size // others.size)
    return Product((before, others)), Product((after, others))


def _factor(term: Term, inner: int) -> tuple[Term, Term]:
    """Two factors, the second with `inner` positions."""
    term = resolved(term)
    if inner == 1 or term.size == inner:
        return (term, Dim(1)) if inner == 1 else (Dim(1), term)
    if term.size % inner:
        raise LayoutConflictError(f"{describe(term)} is no multiple of {inner}")
    if isinstance(term, Dim):
        factors = Product((Dim(term.size // inner), Dim(inner)))
        _bind(term, factors)
        return factors.parts[0], factors.parts[1]
    if isinstance(term, Concat):
        pieces = [_factor(part, inner) for part in term.parts]
        for first, second in itertools.pairwise(piece[1] for piece in pieces):
            unify(first, second)
        return Concat(tuple(piece[0] for piece in pieces)), pieces[0][1]
    *rest, last = term.parts
    others = rest[0] if len(rest) == 1 else Product(tuple(rest))
    if inner % last.size == 0:
        outer, middle = _factor(others, inner // last.size)
        return outer, Product((middle, last))
    if last.size % inner == 0:
        middle, low = _factor(last, inner)
        return Product((others, middle)), low
    raise LayoutConflictError(f"{describe(term)} has no inner part of {inner}")


def size_after(term: Term, sizes: Mapping[Dim, int]) -> int:
    """Positions of an axis once some dimensions have other sizes."""
    found = resolved(term)
    if isinstance(found, Dim):
        return sizes.get(found, found.size)
    parts = [size_after(part, sizes) for part in found.parts]
    return math.prod(parts) if isinstance(found, Product) else sum(parts)


def positions(term: Term, chosen: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """The positions of an axis that stay, in their new order; -1 for new ones.

    Args:
        chosen: of dimensions that change, the same for each.
    """
    found = resolved(term)
    if isinstance(found, Dim):
        return np.asarray(chosen.get(found, np.arange(found.size)))
    parts = [positions(part, chosen) for part in found.parts]
    if isinstance(found, Concat):
        starts = np.cumsum([0, *(part.size for part in found.parts)])
        return np.concatenate([np.where(p < 0, -1, p + s) for p, s in zip(parts, starts[:-1], strict=True)])
    result = parts[0]
    for part, after in zip(found.parts[1:], parts[1:], strict=True):
        both = result[:, None] * part.size + after[None, :]
        result = np.where((result[:, None] < 0) | (after[None, :] < 0), -1, both).reshape(-1)
    return result


def owners(term: Term, dim: Dim) -> np.ndarray:
    """For each position of an axis, which position of the dimension it belongs to; -1 where to none."""
    found = resolved(term)
    if isinstance(found, Dim):
        return np.arange(found.size) if found is dim else np.full(found.size, -1)
    parts = [owners(part, dim) for part in found.parts]
    if isinstance(found, Concat):
        return np.concatenate(parts)
    result = parts[0]
    for after in parts[1:]:
        result = np.maximum(result[:, None], after[None, :]).reshape(-1)
    return result


def describe(term: Term) -> str:
    """``12 x 64``, ``(64 + 64) x 2``."""
    found = resolved(term)
    if isinstance(found, Dim):
        return str(found.size)
    if isinstance(found, Concat):
        if all(part is found.parts[0] for part in found.parts):
            return f"{len(found.parts)} x {describe(found.parts[0])}"
        return "(" + " + ".join(map(describe, found.parts)) + ")"
    return " x ".join(map(describe, found.parts))
