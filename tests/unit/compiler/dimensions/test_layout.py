import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from enginesmith.compiler.dimensions.layout import (
    Concat,
    Dim,
    Hold,
    LayoutConflictError,
    Product,
    describe,
    hold,
    leaves,
    owners,
    positions,
    resolved,
    size_after,
    unify,
)


def test_a_dimension_is_cut_into_factors_wherever_it_stands():
    whole, heads, size = Dim(768), Dim(12), Dim(64)
    other = Concat((whole, Dim(5)))
    unify(whole, Product((heads, size)))
    assert describe(other) == "(12 x 64 + 5)"
    assert list(leaves(whole)) == [heads, size]


def test_concatenations_are_cut_at_the_places_of_either():
    first, second = Concat((Dim(32), Dim(64))), Concat((Dim(64), Dim(32)))
    unify(first, second)
    assert describe(first) == describe(second) == "(32 + 32 + 32)"
    assert list(leaves(first)) == list(leaves(second))


def test_products_are_cut_at_common_factors():
    first, second = Product((Dim(2), Dim(58))), Product((Dim(58), Dim(2)))
    unify(first, second)
    assert describe(first) == describe(second) == "2 x 29 x 2"


def test_equal_parts_of_a_product_become_one():
    a, b = Dim(64), Dim(64)
    unify(Product((Dim(2), Dim(64))), Concat((a, b)))
    assert resolved(a) is resolved(b)
    assert describe(Concat((a, b))) == "2 x 64"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (lambda: Dim(3), lambda: Dim(4), "3 positions meet 4"),
        (lambda: Product((Dim(8), Dim(32))), lambda: Concat((Dim(100), Dim(156))), "100 positions are cut off 8 x 32"),
        (
            lambda: Product((Dim(4), Dim(9))),
            lambda: Product((Dim(9), Dim(4))),
            "laid out as 4 x 9 meets one laid out as 9 x 4",
        ),
        (
            lambda: Concat((Dim(5), Dim(7))),
            lambda: Product((Dim(3), Dim(4))),
            "5 positions are cut off 3 x 4",
        ),
    ],
)
def test_what_cannot_be_equal_says_why(first, second, message):
    with pytest.raises(LayoutConflictError, match=message):
        unify(first(), second())


def test_a_dimension_is_no_part_of_itself():
    dim = Dim(6)
    with pytest.raises(LayoutConflictError, match="a dimension of 6 would be a part of itself"):
        unify(dim, Concat((dim, Dim(0))))


def test_holds_go_over_to_the_parts():
    whole, reason = Dim(6), Hold("it is an output of the model", "y")
    hold(whole, reason)
    heads, size = Dim(2), Dim(3)
    unify(whole, Product((heads, size)))
    assert list(heads.holds) == list(size.holds) == [reason]


def test_positions_of_products_and_concatenations():
    a, b = Dim(2), Dim(3)
    chosen = {a: np.array([1, -1]), b: np.array([0, 2])}
    assert positions(Product((a, b)), chosen).tolist() == [3, 5, -1, -1]
    assert positions(Concat((a, b)), chosen).tolist() == [1, -1, 2, 4]
    assert size_after(Product((a, b)), {b: 7}) == 14
    assert size_after(Concat((a, b)), {b: 7}) == 9


def test_owners():
    a, b = Dim(2), Dim(3)
    assert owners(Product((a, b)), a).tolist() == [0, 0, 0, 1, 1, 1]
    assert owners(Concat((a, b)), b).tolist() == [-1, -1, 0, 1, 2]


@st.composite
def terms(draw, size, depth=3):
    """A term of a size, cut at random."""
    factors = [n for n in range(2, size) if size % n == 0]
    kinds = ["dim"] if depth == 0 or size < 2 else ["dim", "concat", *(["product"] if factors else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "dim":
        return Dim(size)
    if kind == "product":
        outer = draw(st.sampled_from(factors))
        return Product((draw(terms(outer, depth - 1)), draw(terms(size // outer, depth - 1))))
    cut = draw(st.integers(1, size - 1))
    return Concat((draw(terms(cut, depth - 1)), draw(terms(size - cut, depth - 1))))


@st.composite
def pairs(draw):
    size = draw(st.sampled_from([4, 6, 8, 12, 16, 24]))
    return draw(terms(size)), draw(terms(size))


def unified(pair):
    try:
        unify(*pair)
    except LayoutConflictError:
        assume(False)


@settings(max_examples=200, deadline=None)
@given(pairs(), st.randoms())
def test_positions_of_a_unified_pair_agree(pair, random):
    unified(pair)
    dims = dict.fromkeys(itertools.chain(leaves(pair[0]), leaves(pair[1])))
    chosen = {}
    for dim in (dim for dim in dims if dim.size > 1):  # one position alone is no dimension that changes
        kept = random.sample(range(dim.size), random.randint(1, dim.size))
        chosen[dim] = np.array(sorted(kept) + [-1] * random.randint(0, 2))
    first, second = (positions(term, chosen) for term in pair)
    assert first.tolist() == second.tolist()
    sizes = {dim: len(array) for dim, array in chosen.items()}
    assert size_after(pair[0], sizes) == size_after(pair[1], sizes) == len(first)


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_what_does_not_change_stays_whether_it_was_unified_or_not(pair):
    with contextlib.suppress(LayoutConflictError):
        unify(*pair)
    for term in pair:
        assert positions(term, {}).tolist() == list(range(term.size))
        assert resolved(term).size == size_after(term, {}) == term.size


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_every_position_has_one_owner_in_each_dimension_that_covers_it(pair):
    unified(pair)
    for term in pair:
        for dim in leaves(term):
            places = owners(term, dim)
            assert len(places) == term.size
            assert set(places.tolist()) - {-1} == set(range(dim.size))
