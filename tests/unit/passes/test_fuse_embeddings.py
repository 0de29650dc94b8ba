from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.graph import Graph, probe
from enginesmith.errors import GraphError, RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.fuse_embeddings import FuseEmbeddings

JOIN = FuseEmbeddings()
TABLES = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,4] dense, int64[B,3] c, int64[B] i, int64[B,1] w) => (float[B,N,4] y)
    <float[5,4] t0, float[7,4] t1, float[6,4] t2, float[6,2] narrow, int64[1] one = {1}, int64 n0 = {0}, int64 n1 = {1},
     int64 n2 = {2}, int64 last = {-1}> { BODY }"""
COLUMNS = "a = Gather <axis = 1> (c, n0)  b = Gather <axis = 1> (c, n1)  d = Gather <axis = 1> (c, n2)  "
ROWS = "ra = Gather(t0, a)  rb = Gather(t1, b)  rd = Gather(t2, d)  "
STACKED = "ua = Unsqueeze(ra, one)  ub = Unsqueeze(rb, one)  ud = Unsqueeze(rd, one)  "
ALL = COLUMNS + ROWS + STACKED


def recommender(body: str) -> str:
    return TABLES.replace("BODY", body)


def inputs_of(graph: Graph, batch: int = 6) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    dense = random.standard_normal((batch, 4)).astype(np.float32)
    found = {"dense": dense, "c": random.integers(-5, 5, (batch, 3)), "i": random.integers(0, 5, batch)}
    return {**found, "w": random.integers(0, 5, (batch, 1))}


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        (ALL + "y = Concat <axis = 1> (ua, ub, ud)", {"Gather": 1}),
        (ALL + "u = Unsqueeze(dense, one)  y = Concat <axis = 1> (u, ua, ub, ud)", {"Gather": 1, "Concat": 1}),
        (ALL + "u = Unsqueeze(dense, one)  y = Concat <axis = 1> (ud, ub, ua, u)", {"Gather": 2, "Concat": 1}),
        (ALL.replace("c, n2", "c, last") + "y = Concat <axis = -2> (ua, ub, ud)", {"Gather": 1}),
        (
            ALL.replace("Gather(t2, d)", "Gather(t2, i)") + "y = Concat <axis = 1> (ua, ub, ud)",
            {"Gather": 3, "Concat": 1},
        ),
        (
            "ra = Gather(t0, w)  rb = Gather(t1, w)  rd = Gather(t2, w)  y = Concat <axis = 1> (ra, rb, rd)",
            {"Gather": 1, "Concat": 1},
        ),
        (
            ALL + "rc = Gather(t1, i)  uc = Unsqueeze(rc, one)  y = Concat <axis = 1> (ua, ub, ud, uc)",
            {"Gather": 4, "Concat": 1},
        ),
    ],
    ids=["whole", "beside", "reversed", "negative-column", "other-index", "columns-already", "table-twice"],
)
def test_joins_tables_that_are_read_side_by_side(fill, context, body, operators):
    graph = fill(recommender(body))
    inputs, weights = inputs_of(graph), graph.weight_bytes
    before = probe.run(graph, inputs)["y"]
    result = JOIN(graph, context(graph))
    assert result.changes["tables joined"] == 3
    assert {name: graph.operators()[name] for name in operators} == operators
    np.testing.assert_array_equal(probe.run(graph, inputs)["y"], before)
    assert graph.weight_bytes < weights + 256
    tables = [value for value in graph.model.graph.initializers.values() if value.dtype.name == "FLOAT"]
    assert [tuple(table.shape) for table in tables if table.uses()] == [(18, 4)]


def test_joins_to_one_long_row(fill, context):
    body = COLUMNS + ROWS + "y = Concat <axis = 1> (dense, ra, rb, rd)"
    graph = fill(recommender(body).replace("float[B,N,4] y", "float[B,16] y"))
    inputs = inputs_of(graph)
    before = probe.run(graph, inputs)["y"]
    assert JOIN(graph, context(graph)).modified
    np.testing.assert_array_equal(probe.run(graph, inputs)["y"], before)


@pytest.mark.parametrize("index", [5, -6, 6])
def test_an_index_beyond_its_table_stays_an_error(fill, context, index):
    graph = fill(recommender(ALL + "y = Concat <axis = 1> (ua, ub, ud)"))
    JOIN(graph, context(graph))
    inputs = inputs_of(graph)
    inputs["c"][2, 0] = index
    with pytest.raises(GraphError, match="ONNX Runtime cannot run the graph"):
        probe.run(graph, inputs)


def test_a_table_that_others_read_is_not_held_twice(fill, context):
    body = ALL + "z = ReduceMean <axes = [0]> (t1)  y0 = Concat <axis = 1> (ua, ub, ud)  y = Add(y0, z)"
    graph = fill(recommender(body))
    result = JOIN(graph, context(graph))
    assert not result.modified
    assert "table 't1' is used elsewhere too, and would be held twice" in result.refusals[0].reason


def test_few_tables_gain_too_little(fill, context):
    graph = fill(recommender(ALL + "y = Concat <axis = 1> (ua, ub)"))
    result = JOIN(graph, context(graph))
    assert not result.modified
    assert "2 tables gain too little, 3 or more are joined" in result.refusals[0].reason
    assert FuseEmbeddings(least=2)(graph, context(graph)).modified


def test_more_rows_than_indices_can_count(fill, context, monkeypatch):
    monkeypatch.setattr("enginesmith.compiler.fusion.embeddings.MOST", {"INT64": 17})
    graph = fill(recommender(ALL + "y = Concat <axis = 1> (ua, ub, ud)"))
    result = JOIN(graph, context(graph))
    assert not result.modified
    assert "18 rows together are more than INT64 indices can count" in result.refusals[0].reason


@pytest.mark.parametrize(
    "body",
    [
        COLUMNS + ROWS + "s = Sum(ra, rb, rd)  y = Unsqueeze(s, one)",
        COLUMNS + "k = Gather(narrow, a)  rb = Gather(t1, b)  rd = Gather(t2, d)  y0 = Concat <axis = 1> (k, rb, rd)  "
        "y = Unsqueeze(y0, one)",
        ALL + "v = Neg(ub)  y = Concat <axis = 1> (ua, v, ud)",
        ALL + "y = Concat <axis = 2> (ua, ub, ud)",
        COLUMNS
        + "p = Neg(t0)  ra = Gather(p, a)  rb = Gather(p, b)  rd = Gather(p, d)  "
        + STACKED
        + "r = Relu(dense)  q = MatMul(r, p2)  y = Concat <axis = 1> (ua, ub, ud)",
    ],
    ids=["summed", "other-width", "between", "other-axis", "one-table"],
)
def test_leaves_the_rest(fill, context, body):
    text = recommender(body).replace("float[B,N,4] y", "float[B,N,M] y").replace("  q = MatMul(r, p2)", "")
    graph = fill(text)
    assert not FuseEmbeddings(least=3)(graph, context(graph)).modified


def test_what_changes_is_not_taken(fill, context, monkeypatch):
    from enginesmith.compiler.fusion import embeddings

    real = embeddings._checked
    monkeypatch.setattr(embeddings, "_checked", lambda patch, patcher, group, indices: indices)
    graph = fill(recommender(ALL + "y = Concat <axis = 1> (ua, ub, ud)"))
    result = JOIN(graph, context(graph))
    assert not result.modified
    assert "joined, tensor 'y' changes: relative L2" in result.refusals[0].reason
    monkeypatch.setattr(embeddings, "_checked", real)
    assert JOIN(graph, context(graph)).modified


def test_what_cannot_be_run_is_not_checked(fill, context):
    graph = fill(recommender(ALL + "y = Concat <axis = 1> (ua, ub, ud)").replace("[5,4] t0", "[1,4] t0"))
    result = JOIN(graph, context(graph))
    assert not result.modified
    assert "the result cannot be checked: ONNX Runtime cannot run the graph" in result.refusals[0].reason


def test_least_is_at_least_two():
    with pytest.raises(RecipeError, match="least is at least 2, found 1"):
        parse_pass("fuse-embeddings:least=1")
