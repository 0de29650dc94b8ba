import numpy as np
import pytest

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.pruning.candidates import find, inner_size
from enginesmith.errors import RecipeError

ATTENTION = """g (float[N,6,32] x) => (float[N,6,5] y)
    <float[32,32] q, float[32] b, float[32,32] k, float[32,32] v, float[32,5] o> {
    [q] q0 = MatMul(x, q)  qb = Add(q0, b)  [k] k0 = MatMul(x, k)  [v] v0 = MatMul(x, v)
    s = Constant<value_ints = [0,6,4,8]>()  q1 = Reshape(qb, s)  k1 = Reshape(k0, s)  v1 = Reshape(v0, s)
    q2 = Transpose<perm = [0,2,1,3]>(q1)  k2 = Transpose<perm = [0,2,3,1]>(k1)  v2 = Transpose<perm = [0,2,1,3]>(v1)
    a = MatMul(q2, k2)  p = Softmax(a)  m = MatMul(p, v2)  m1 = Transpose<perm = [0,2,1,3]>(m)
    t = Constant<value_ints = [0,6,-1]>()  m2 = Reshape(m1, t)  [o] y = MatMul(m2, o) }"""
MLP = """g (float[N,16] x) => (float[N,8] y) <float[16,32] w, float[32] b, float[32,24] v, float[24,8] u> {
    [first] h = Gemm(x, w, b)  r = Relu(h)  [second] i = MatMul(r, v)  s = Relu(i)  [third] y = MatMul(s, u) }"""


def found(graph, context, importance="obs", multiple=8, keep=()):
    candidates, refusals = find(Dimensions(flattened(graph)), context(graph), importance, multiple=multiple, keep=keep)
    return {c.group.name: c for c in candidates}, {refusal.node: refusal.reason for refusal in refusals}


@pytest.mark.parametrize(
    ("multiple", "steps"), [(1, {"q": 1}), (8, {"q": 1}), (16, {"q": 2}), (32, {}), (12, {"q": 3})]
)
def test_whole_heads_go_and_their_size_counts_to_the_multiple(fill, calibrated, multiple, steps):
    candidates, refusals = found(fill(ATTENTION), calibrated, multiple=multiple)
    assert {name: c.multiple for name, c in candidates.items()} == steps
    assert all(c.least == c.multiple for c in candidates.values())
    if multiple != 32:
        assert refusals["q#2"] == refusals["v"] == "it is a part of q, of which whole ones go"
    else:
        assert refusals["q"] == "its 4 positions are not more than 4"


def test_inner_sizes(fill):
    groups = {g.name: g for g in Dimensions(flattened(fill(ATTENTION))).groups}
    assert inner_size(groups["q"]) == 8
    assert inner_size(groups["q#2"]) == 1
    assert inner_size(next(g for g in Dimensions(flattened(fill(MLP))).groups if g.name == "first")) == 1


def test_every_dimension_that_weights_make_is_told_of(fill, calibrated):
    candidates, refusals = found(fill(MLP), calibrated)
    assert set(candidates) == {"first", "second"}
    assert refusals == {"third": "it is an output of the model (y)"}
    _, refusals = found(fill(MLP), calibrated, multiple=32)
    assert refusals["first"] == "its 32 positions are not more than 32"
    assert refusals["second"] == "its 24 positions are not more than 32"


def test_dimensions_are_kept_by_name_and_glob(fill, calibrated):
    candidates, refusals = found(fill(MLP), calibrated, keep=("fir*", "first"))
    assert set(candidates) == {"second"}
    assert refusals["first"] == "kept by choice"
    with pytest.raises(RecipeError, match="no dimension that can be pruned matches 'third'"):
        found(fill(MLP), calibrated, keep=("third",))


@pytest.mark.parametrize("importance", ["l1", "l2", "activation", "hessian", "obs"])
def test_rankings_are_whole(fill, calibrated, importance):
    candidates, _ = found(fill(ATTENTION), calibrated, importance)
    assert sorted(candidates["q"].ranking.order) == [0, 1, 2, 3]
    assert candidates["q"].ranking.loss[0] == 0
    assert (np.diff(candidates["q"].ranking.loss) >= 0).all()


def test_what_only_activations_read_is_ranked_by_its_weights(fill, calibrated):
    """The size of the heads of queries and keys has no reader with weights."""
    single = ATTENTION.replace("[0,6,4,8]", "[0,6,1,32]")
    candidates, _ = found(fill(single), calibrated)
    weights, _ = found(fill(single), calibrated, "l2")
    assert candidates["q"].ranking.order.tolist() == weights["q"].ranking.order.tolist()
    assert candidates["v"].ranking.order.tolist() != weights["v"].ranking.order.tolist()


def test_numbers_that_are_not_finite_rank_nothing(fill, calibrated):
    graph = fill(MLP.replace("s = Relu(i)", "s = Sqrt(i)"))
    candidates, refusals = found(graph, calibrated)
    assert set(candidates) == {"first"}
    assert refusals["second"] == "what reads it is given numbers on the data that are not finite"


def test_taylor_without_a_module(fill, calibrated):
    with pytest.raises(RecipeError, match="importance=taylor needs gradients, and there is no torch module") as caught:
        found(fill(MLP), calibrated, "taylor")
    assert caught.value.hint == "choose importance=obs"
