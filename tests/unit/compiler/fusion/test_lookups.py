"""Masks that are read at all rows and some keys are no lookups of numbers that were counted."""

from __future__ import annotations

import pytest

from enginesmith.passes.fuse_transformer import FuseTransformer

MASK = """<ir_version: 8, opset_import: ["": 18]>
g (int64[B,S] mask) => (bool[B,1,1,K] y)
    <int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] last = {-1}, int64[3] behind = {1, 2, 3},
     int64[3] before = {0, 1, 2}, int64[1,1,1,4] some = {0, 1, 3, 2}, int64[1,1,1,5] all = {0, 1, 2, 3, 4}> {
    known = Cast <to = 9> (mask)
    size = Shape <start = 0, end = 1> (mask)  count = Squeeze(size)
    length = Shape <start = 1, end = 2> (mask)  width = Squeeze(length)
    numbers = Range(zero, count, one)  rows = Unsqueeze(numbers, behind)  places = Range(zero, width, one)
    keys = Unsqueeze(places, before)
    both = Max(rows, keys)  form = Shape(both)
    each = Expand(rows, form)  other = Expand(keys, form)
    i = Unsqueeze(each, last)  j = Unsqueeze(other, last)  index = Concat <axis = -1> (i, j)
    y = GatherND(known, index) }"""
FIXED = MASK.replace("int64[B,S] mask", "int64[B,5] mask")
SOME, ALL = (
    FIXED.replace("Max(rows, keys)", f"Max(rows, {keys})").replace("Expand(keys, form)", f"Expand({keys}, form)")
    for keys in ("some", "all")
)


@pytest.mark.parametrize(
    ("text", "operators"),
    [(MASK, {"Cast", "Unsqueeze"}), (SOME, {"Cast", "Gather", "Unsqueeze"}), (ALL, {"Cast", "Unsqueeze"})],
    ids=["counted", "some", "all"],
)
def test_rows_are_not_counted(fused, text, operators):
    graph, result = fused(FuseTransformer(), text)
    assert result.changes == {"mask lookup fused": 1}
    assert set(graph.operators()) == operators


def test_the_length_may_be_gathered_from_a_shape(fused):
    text = MASK.replace("Shape <start = 0, end = 1> (mask)", "Shape(mask)")
    _, result = fused(FuseTransformer(), text.replace("Squeeze(size)", "Gather(size, zero)"))
    assert result.changes == {"mask lookup fused": 1}


@pytest.mark.parametrize(
    "change",
    [
        ("Range(zero, count, one)", "Range(zero, width, one)"),
        ("Range(zero, count, one)", "Mul(first, first)"),
        ("Concat <axis = -1> (i, j)", "Concat <axis = -1> (j, i)"),
        ("Shape(both)", "Shape <end = 4> (both)"),
        ("Max(rows, keys)", "Max(rows, rows)"),
        ("Unsqueeze(numbers, behind)", "Unsqueeze(numbers, before)"),
    ],
    ids=["of another length", "not counted", "in another order", "a part", "another form", "of another axis"],
)
def test_others_stay(fill, context, change):
    assert change[0] in MASK
    graph = fill(MASK.replace(*change))
    assert not FuseTransformer()(graph, context(graph)).changes.get("mask lookup fused")
