from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.graph import Graph, probe
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.align import Align
from enginesmith.passes.base import Context, PassResult

MLP = """g (float[N,16] x) => (float[N,K] y) <float[16,H] w, float[H] b, float[H,J] v, float[J] c, float[J,K] u> {
    [first] h = Gemm(x, w, b)  r = Sigmoid(h)  [second] i = Gemm(r, v, c)  s = Mul(i, i)  [third] y = MatMul(s, u) }"""


def mlp(hidden: int, second: int, out: int) -> str:
    return MLP.replace("H", str(hidden)).replace("J", str(second)).replace("K", str(out))


RESNET = """g (float[N,8,10,10] x) => (float[N,101] y)
    <float[21,8,3,3] w0, float[21] b0, float[21] scale, float[21] shift, float[21] mean, float[21] var = {VAR},
     float[43,21,3,3] w1, float[43] b1, float[43,1,3,3] w2, float[21,43,1,1] w3, float[13,21] v0, float[21,13] v1,
     float[42,101] u> {
    [stem] c0 = Conv<pads = [1,1,1,1]>(x, w0, b0)  n0 = BatchNormalization(c0, scale, shift, mean, var)  r0 = Relu(n0)
    [wide] c1 = Conv<pads = [1,1,1,1]>(r0, w1, b1)  e1 = Exp(c1)
    [depthwise] c2 = Conv<group = 43, pads = [1,1,1,1]>(e1, w2)
    [narrow] c3 = Conv(c2, w3)  p = GlobalAveragePool(c3)  f = Flatten(p)
    [squeeze] q0 = Gemm<transB = 1>(f, v0)  q1 = Relu(q0)  [excite] q2 = Gemm<transB = 1>(q1, v1)  q3 = Sigmoid(q2)
    axes = Constant<value_ints = [2, 3]>()  q4 = Unsqueeze(q3, axes)  q = Mul(c3, q4)  s = Add(q, r0)
    m0 = GlobalAveragePool(s)  m1 = GlobalMaxPool(s)  m = Concat<axis = 1>(m0, m1)  flat = Flatten(m)
    [head] z = MatMul(flat, u)  y = Softmax(z) }""".replace("VAR", ", ".join(["1.5"] * 21))


def inputs_of(graph: Graph, seed: int = 1, batch: int = 3) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(seed), {}
    for value in graph.model.graph.inputs:
        shape = [axis if isinstance(axis, int) else batch for axis in value.shape]
        dtype = value.dtype.numpy()
        made = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 50, shape)
        found[value.name] = made.astype(dtype)
    return found


def aligned(graph: Graph, context: Context, **options: Any) -> PassResult:
    """Aligns a graph, and checks that its outputs are what they were, in name, shape and numbers."""
    inputs = inputs_of(graph)
    before = probe.run(graph, inputs)
    shapes = [(value.name, tuple(value.shape)) for value in graph.model.graph.outputs]
    result = Align(**options)(graph, context)
    after = probe.run(graph, inputs)
    assert [(value.name, tuple(value.shape)) for value in graph.model.graph.outputs] == shapes
    for name, array in before.items():
        assert after[name].shape == array.shape
        assert np.isfinite(array).all()
        difference = np.linalg.norm(after[name].astype(float) - array)
        assert difference <= 1e-5 * np.linalg.norm(array.astype(float))
    return result


def sizes(result: PassResult) -> dict[str, tuple[int, int]]:
    return {row["group"]: (row["before"], row["after"]) for row in result.details["aligned"]}


def reasons(result: PassResult) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.refusals}


def test_an_mlp_grows_through_all_its_layers(fill, context):
    graph = fill(mlp(770, 1001, 257))
    result = aligned(graph, context(graph))
    assert sizes(result) == {"first": (770, 776), "second": (1001, 1008), "third": (257, 264)}
    assert result.changes == {"dimensions grown": 3, "constants padded": 5, "slices at outputs": 1}
    assert not result.refusals
    assert graph.operators() == {"Gemm": 2, "Sigmoid": 1, "Mul": 1, "MatMul": 1, "Slice": 1}
    assert result.details["aligned_share"] == {"before": 0.0, "after": 1.0}
    rows = {row["group"]: (row["macs_before"], row["macs_after"]) for row in result.details["aligned"]}
    assert rows["third"] == (3 * 1001 * 257, 3 * 1008 * 264)
    weights = {value.const_value.shape.numpy() for value in graph.model.graph.initializers.values()}
    assert {(16, 776), (776,), (776, 1008), (1008,), (1008, 264)} <= weights


def test_an_output_that_is_aligned_gets_no_slice(fill, context):
    graph = fill(mlp(770, 64, 256))
    result = aligned(graph, context(graph))
    assert sizes(result) == {"first": (770, 776)}
    assert "Slice" not in graph.operators()


@pytest.mark.parametrize(
    ("multiple", "first", "second"),
    [(8, 1008, 120), (16, 1008, 128), (64, 1024, 128), (128, 1024, 128)],
)
def test_multiples(fill, context, multiple, first, second):
    graph = fill(mlp(1001, 120, 384))
    result = aligned(graph, context(graph), multiple=multiple)
    expected = {"first": (1001, first), "second": (120, second)}
    assert sizes(result) == {name: size for name, size in expected.items() if size[0] != size[1]}


def test_a_multiple_that_wastes_too_much_is_made_do_without(fill, context):
    graph = fill(mlp(100, 1000, 64))
    result = aligned(graph, context(graph), multiple=64)
    assert sizes(result) == {"first": (100, 104), "second": (1000, 1024)}


def test_a_residual_network_of_odd_widths(fill, context):
    graph = fill(RESNET)
    result = aligned(graph, context(graph), waste=0.5)
    assert sizes(result) == {"stem": (21, 24), "wide": (43, 48), "squeeze": (13, 16), "head": (101, 104)}
    assert graph.operators()["Slice"] == 1
    assert "Pad" not in graph.operators()
    (node,) = (node for node in graph.nodes() if node.op_type == "Slice")
    assert [user.op_type for user, _ in node.outputs[0].uses()] == ["Softmax"]
    depthwise = next(node for node in graph.nodes() if node.name == "depthwise")
    assert depthwise.attributes.get_int("group") == 48
    assert result.details["aligned_share"]["before"] == 0
    assert result.details["aligned_share"]["after"] > 0.9  # all but the depthwise one


TRANSFORMER = """g (int64[N,9] ids) => (float[N,9,257] logits)
    <float[257,60] table, float[60] g1, float[60] h1, float[60,60] wq, float[60,60] wk, float[60,60] wv,
     float[60,60] wo, float[60] bq, float[60] g2, float[60] h2, float[60,1001] w1, float[1001] b1, float[1001,60] w2,
     int64[4] split = {0, 9, 5, 12}, int64[3] merge = {0, 9, 60}, float root = {3.4641}> {
    x = Gather(table, ids)  n1 = LayerNormalization(x, g1, h1)
    [query] q0 = MatMul(n1, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, split)  q = Transpose<perm = [0,2,1,3]>(q2)
    [key] k0 = MatMul(n1, wk)  k1 = Reshape(k0, split)  k = Transpose<perm = [0,2,3,1]>(k1)
    [value] v0 = MatMul(n1, wv)  v1 = Reshape(v0, split)  v = Transpose<perm = [0,2,1,3]>(v1)
    [scores] s0 = MatMul(q, k)  s1 = Div(s0, root)  s = Softmax<axis = -1>(s1)
    [mix] a0 = MatMul(s, v)  a1 = Transpose<perm = [0,2,1,3]>(a0)  a = Reshape(a1, merge)  [out] o = MatMul(a, wo)
    r = Add(x, o)  n2 = LayerNormalization(r, g2, h2)
    [up] f0 = MatMul(n2, w1)  f1 = Add(f0, b1)  f2 = Tanh(f1)  [down] f = MatMul(f2, w2)  y = Add(r, f)
    rows = Constant<value_ints = [-1, 60]>()  flat = Reshape(y, rows)  [head] z = Gemm<transB = 1>(flat, table)
    back = Constant<value_ints = [-1, 9, 257]>()  logits = Reshape(z, back) }"""


def test_a_transformer_with_a_tied_vocabulary(fill, context):
    graph = fill(TRANSFORMER)
    result = aligned(graph, context(graph), waste=0.5)
    assert sizes(result) == {"query#2": (12, 16), "value": (12, 16), "up": (1001, 1008), "head": (257, 264)}
    assert result.changes["tables copied"] == 1
    assert result.changes["slices at outputs"] == 1
    assert any(r.reason.startswith("size 60: it is normalized over") for r in result.refusals)
    assert any("it is an input of the model (ids)" in refusal.reason for refusal in result.refusals)
    tables = [
        v.const_value.shape.numpy() for v in graph.model.graph.initializers.values() if v.name.startswith("table")
    ]
    assert sorted(tables) == [(257, 60), (264, 60)]


def test_a_table_is_not_copied_where_its_rows_do_not_grow(fill, context):
    graph = fill(TRANSFORMER)
    result = aligned(graph, context(graph), keep=("head",))
    assert sizes(result) == {"up": (1001, 1008)}
    assert "tables copied" not in result.changes
    assert sum(value.name.startswith("table") for value in graph.model.graph.initializers.values()) == 1


LSTM = """g (float[9,N,16] x) => (float[9,1,N,13] y, float[N,40] z)
    <float[1,52,16] w, float[1,52,13] r, float[1,104] b, float[13,40] v> {
    [cell] s, h, c = LSTM<hidden_size = 13>(x, w, r, b)  y = Identity(s)
    one = Constant<value_ints = [0]>()  t = Squeeze(h, one)  [head] z = MatMul(t, v) }"""


def test_a_recurrent_layer(fill, context):
    graph = fill(LSTM)
    result = aligned(graph, context(graph), waste=0.5)
    assert [row["after"] for row in result.details["aligned"]] == [16]
    assert result.changes["slices at outputs"] == 1
    cell = next(node for node in graph.nodes() if node.op_type == "LSTM")
    assert cell.attributes.get_int("hidden_size") == 16
    assert result.details["aligned_share"] == {"before": 0.0, "after": 1.0}


@pytest.mark.parametrize("operator", ["ArgMax<axis = 1>", "Softmax<axis = 1>", "LogSoftmax<axis = 1>", "Hardmax"])
def test_what_looks_at_all_classes_at_the_end_gets_a_slice(fill, context, operator):
    dtype, shape = ("int64", "[N,1]") if operator.startswith("Arg") else ("float", "[N,257]")
    graph = fill(
        f"g (float[N,16] x) => ({dtype}{shape} y) <float[16,257] w> {{ [made] h = MatMul(x, w)  y = {operator}(h) }}"
    )
    result = aligned(graph, context(graph))
    assert sizes(result) == {"made": (257, 264)}
    assert result.changes["slices before what looks at all positions"] == 1
    assert graph.operators()["Slice"] == 1


def test_one_slice_serves_an_output_and_what_is_behind_it(fill, context):
    graph = fill(
        """g (float[N,16] x) => (float[N,257] logits, float[N,257] y, float[N,5] best)
        <float[16,257] w, int64[1] k = {5}> {
        [made] logits = MatMul(x, w)  y = Softmax(logits)  best, where = TopK(logits, k) }"""
    )
    result = aligned(graph, context(graph))
    assert sizes(result) == {"made": (257, 264)}
    assert graph.operators()["Slice"] == 1
    assert result.changes["slices at outputs"] == 1


def test_no_slice_stands_between_products(fill, context):
    graph = fill(
        """g (float[N,16] x) => (float[N,8] y) <float[16,257] w, float[257,8] v> {
        [made] h = MatMul(x, w)  s = Softmax<axis = 1>(h)  y = MatMul(s, v) }"""
    )
    result = aligned(graph, context(graph))
    assert not result.modified
    assert reasons(result) == {"made": "size 257: Softmax runs over it (s)"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul(x, w)  l = Log(h)  y = MatMul(l, v)", "Log may make NaN or infinity in new places"),
        ("h = MatMul(x, w)  l = Div(h, h)  y = MatMul(l, v)", "Div may make NaN or infinity in new places"),
        ("h = MatMul(x, w)  l = Reciprocal(h)  y = MatMul(l, v)", "Reciprocal may make NaN or infinity"),
        ("h = MatMul(x, w)  e = Exp(h)  y = ReduceSum<keepdims = 1>(e, last)", "sums over new places, which are not 0"),
        ("h = MatMul(x, w)  e = ReduceMean<axes = [1]>(h)  z = Mul(e, h)  y = MatMul(z, v)", "ReduceMean runs over it"),
        ("h = MatMul(x, w)  n = LayerNormalization(h, g)  y = MatMul(n, v)", "it is normalized over"),
        ("h = MatMul(x, w)  y = Concat<axis = 1>(h, h)", "it is a part of an axis of the output y"),
        ("h = MatMul(x, w)  l = LpNormalization<axis = 0>(h)  y = MatMul(l, v)", "LpNormalization makes of new places"),
    ],
)
def test_refuses_what_would_change(fill, context, body, reason):
    shape = "[N,1]" if "ReduceSum" in body else "[N,500]" if "Concat" in body else "[N,8]"
    graph = fill(
        f"""g (float[N,16] x) => (float{shape} y) <float[16,250] w, float[250,8] v, float[250] g,
        int64[1] last = {{1}}> {{ {body} }}"""
    )
    before = graph.fingerprint()
    result = Align(waste=1)(graph, context(graph))
    assert not result.modified
    assert graph.fingerprint() == before
    assert any(reason in refusal.reason for refusal in result.refusals)


def test_a_kept_node_keeps_its_dimensions(fill, context):
    graph = fill(mlp(770, 1001, 64))
    result = aligned(graph, context(graph), keep=("fir*",))
    assert sizes(result) == {"second": (1001, 1008)}
    assert reasons(result) == {"first": "size 770: kept by choice (first)"}
    with pytest.raises(RecipeError, match="no node matches 'fourth'"):
        Align(keep=("fourth",))(graph, context(graph))


def test_an_aligned_model_stays_and_says_so(fill, context):
    graph = fill(mlp(64, 128, 8))
    before = graph.fingerprint()
    result = aligned(graph, context(graph))
    assert not result.modified
    assert graph.fingerprint() == before
    assert reasons(result) == {"": "every dimension of its products is a multiple of 8"}


def test_depthwise_convolutions_are_none_for_tensor_cores(fill, context):
    graph = fill("g (float[N,13,6,6] x) => (float[N,13,4,4] y) <float[13,1,3,3] w> { y = Conv<group = 13>(x, w) }")
    assert reasons(Align()(graph, context(graph))) == {
        "": "no dimension of its products comes nearer to a multiple of 8 by growing"
    }


def test_what_was_cut_off_does_not_grow_again(fill, context):
    graph = fill("g (float[N,16] x) => (float[N,257] y) <float[16,257] w> { y = MatMul(x, w) }")
    assert sizes(aligned(graph, context(graph))) == {"y": (257, 264)}
    assert not aligned(graph, context(graph), multiple=64).modified
    assert graph.operators() == {"MatMul": 1, "Slice": 1}


def test_inputs_of_the_model_are_not_padded(fill, context):
    graph = fill(mlp(770, 64, 8).replace("16", "13"))
    result = aligned(graph, context(graph), waste=1)
    assert sizes(result) == {"first": (770, 776)}
    assert reasons(result)["x#2"].startswith("size 13: it is an input of the model (x), and to pad one at run time")
    assert "Pad" not in graph.operators()


def test_small_dimensions_are_not_blown_up(fill, context):
    graph = fill(mlp(3, 20, 10))
    result = aligned(graph, context(graph))
    assert not result.modified
    assert reasons(result) == {
        "first": "size 3: 3 -> 8 would add 167% multiply-adds, more than waste=0.1",
        "second": "size 20: 20 -> 24 would add 20% multiply-adds, more than waste=0.1",
        "third": "size 10: 10 -> 16 would add 60% multiply-adds, more than waste=0.1",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple": 1}, "multiple is a power of two, not 1"),
        ({"multiple": 12}, "multiple is a power of two, not 12"),
        ({"waste": 0.0}, "waste is above 0, not 0"),
        ({"stem": -1}, "stem is 0 or more, not -1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Align(**options)


def test_options_as_text():
    assert parse_pass("align:multiple=64,waste=0.2,flatten=true,keep=a+b") == Align(
        64, 0.2, flatten=True, keep=("a", "b")
    )


@pytest.mark.parametrize(
    "body",
    [
        "h = Gemm(x, w, b)  r = Relu(h)  y = ReduceSum<keepdims = 1>(r, last)",
        "h = Gemm(x, w, b)  a = Abs(h)  y = ReduceL1<axes = [1], keepdims = 1>(a)",
        "h = Gemm(x, w, b)  t = Tanh(h)  n = ReduceL2<axes = [1], keepdims = 1>(t)  d = Div(t, n)  y = MatMul(d, v)",
        "h = Gemm(x, w, b)  e = Neg(h)  p = Exp(e)  o = Add(one, p)  s = Div(h, o)  y = MatMul(s, v)",
        "h = Gemm(x, w, b)  c = Cos(h)  l = Log(c2)  m = Mul(c, l)  y = MatMul(m, v)".replace("Log(c2)", "Identity(c)"),
        "h = Gemm(x, w, b)  c = Greater(h, one)  s = Where(c, h, one)  y = MatMul(s, v)",
        "h = Gemm(x, w, b)  p = Pow(h, two)  q = Add(p, one)  s = Sqrt(q)  d = Div(h, s)  y = MatMul(d, v)",
        "h = Gemm(x, w, b)  p = PRelu(h, b)  y = MatMul(p, v)",
    ],
)
def test_new_places_add_nothing(fill, context, body):
    graph = fill(
        f"""g (float[N,16] x) => (float[N,1] y) <float[16,250] w, float[250] b, float[250,1] v, int64[1] last = {{1}},
        float one = {{1.5}}, float two = {{2}}> {{ [made] {body} }}"""
    )
    result = aligned(graph, context(graph))
    assert sizes(result) == {"made": (250, 256)}
    assert "Slice" not in graph.operators()


def test_scores_of_two_activations_need_one_that_is_zero(fill, context):
    """Queries behind a cosine are 1 in new places, keys are 0 there; where both are 1 a score would grow."""
    text = """g (float[N,7,16] x) => (float[N,7,7] y) <float[16,31] w, float[16,31] v> {
        [query] q = MatMul(x, w)  c = Cos(q)  [key] k = MatMul(x, v)  m = FKEY  t = Transpose<perm = [0,2,1]>(m)
        [scores] y = MatMul(c, t) }"""
    graph = fill(text.replace("FKEY", "Sin(k)"))
    result = aligned(graph, context(graph))
    assert [row["after"] for row in result.details["aligned"]] == [32]
    graph = fill(text.replace("FKEY", "Cos(k)"))
    result = Align()(graph, context(graph))
    assert not result.modified
    assert reasons(result)["query"] == "size 31: MatMul sums over new places, and neither factor is 0 there (scores)"


def test_quantized_weights_hold_their_zero_point_in_new_places(fill, context):
    graph = fill(
        """g (float[N,16] x) => (float[N,8] y) <float[250,8] f, uint8[16,250] w8 = {W}, float[250,8] v,
        uint8 point = {128}, float scale = {0.01}, float[250] b> {
        w = DequantizeLinear(w8, scale, point)  h = Gemm(x, w, b)  r = Relu(h)
        q = QuantizeLinear(r, scale, point)  d = DequantizeLinear(q, scale, point)  y = MatMul(d, v) }""".replace(
            "{W}", "{" + ", ".join(str(number % 256) for number in range(16 * 250)) + "}"
        ).replace("float[250,8] f, ", "")
    )
    result = aligned(graph, context(graph))
    assert [row["after"] for row in result.details["aligned"]] == [256]
    weight = next(v for v in graph.model.graph.initializers.values() if v.name == "w8").const_value.numpy()
    assert (weight[:, 250:] == 128).all()


def test_dynamic_axes_are_left_alone(fill, context):
    graph = fill(
        """g (float[N,S,20] x, float[N,20,T] z) => (float[N,S,T] y) <float[20,770] w, float[770,20] v> {
        [up] h = MatMul(x, w)  [down] d = MatMul(h, v)  y = MatMul(d, z) }"""
    )
    result = aligned(graph, context(graph))
    assert sizes(result) == {"up": (770, 776)}


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 70), st.sampled_from(["Relu", "Sigmoid", "Tanh", "Softplus", "Gelu_", "Add"])),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from([4, 8, 16]),
    st.booleans(),
)
def test_any_mlp_computes_the_same(fill, context, layers, multiple, residual):
    width, lines, constants = 16, [], []
    source = "x"
    for place, (size, operator) in enumerate(layers):
        constants += [f"float[{width},{size}] w{place}", f"float[{size}] b{place}"]
        lines.append(f"m{place} = Gemm({source}, w{place}, b{place})")
        if operator == "Add":
            lines.append(f"f{place} = Add(m{place}, m{place})")
        elif operator == "Gelu_":
            lines.append(f"e{place} = Erf(m{place})  f{place} = Mul(m{place}, e{place})")
        else:
            lines.append(f"f{place} = {operator}(m{place})")
        width, source = size, f"f{place}"
    lines.append(f"y = Softmax({source})" if residual else f"y = Identity({source})")
    graph = fill(f"g (float[N,16] x) => (float[N,{width}] y) <{', '.join(constants)}> {{ {'  '.join(lines)} }}")
    result = aligned(graph, context(graph), multiple=multiple, waste=20)
    assert not any("would add" in refusal.reason for refusal in result.refusals)
    if result.modified:
        assert result.details["aligned_share"]["after"] >= result.details["aligned_share"]["before"]


class Batches(list[dict[str, np.ndarray]]):
    description, random = "noise", False

    def fingerprint(self) -> str:
        return "noise"


@pytest.mark.parametrize("quantize", ["quantize-static", "quantize-static:scheme=tensorrt", "quantize-dynamic", "cast"])
@pytest.mark.parametrize("text", [mlp(250, 1001, 64).replace("16", "64"), RESNET], ids=["mlp", "resnet"])
def test_before_and_after_quantization(fill, context, text, quantize):
    """Both orders end at the same sizes, and at results as close as quantization alone."""
    results = {}
    for order in (("align:waste=0.5", quantize), (quantize, "align:waste=0.5"), (quantize,)):
        graph = fill(text)
        batches = Batches(inputs_of(graph, seed) for seed in range(4))
        signature = context(graph).signature
        given = Context(signature, batches, Calibration(batches, CalibrationSettings()))
        reference = probe.run(graph, batches[0])["y"]
        for passed in order:
            before = probe.run(graph, batches[0])["y"].astype(float)
            result = parse_pass(passed)(graph, given)
            if passed.startswith("align"):
                after = probe.run(graph, batches[0])["y"].astype(float)
                assert result.modified
                assert np.linalg.norm(after - before) < (2e-3 if quantize == "cast" else 1e-5) * np.linalg.norm(before)
        found = probe.run(graph, batches[0])["y"]
        results[order] = np.linalg.norm(found.astype(float) - reference) / np.linalg.norm(reference)
    alone, before, after = (
        results[order] for order in ((quantize,), ("align:waste=0.5", quantize), (quantize, "align:waste=0.5"))
    )
    assert after <= 1.01 * alone + 1e-5
    assert before < 2 * alone + 1e-3  # TensorRT's INT8 takes more layers at aligned sizes
