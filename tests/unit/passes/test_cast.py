from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.emulation import emulate
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Refusal
from enginesmith.passes.cast import Cast

CAST = Cast()
BF16 = Cast(to="bf16")
GENERATOR = np.random.default_rng(0)


class Samples(list):
    description = "made up"
    random = False


def feeds(**arrays: object) -> Samples:
    """One batch; floats, but for ``i``, which holds integers, and ``c``, which holds booleans."""
    dtypes = {"i": np.int64, "c": np.bool_}
    return Samples([{name: np.asarray(array, dtypes.get(name, np.float32)) for name, array in arrays.items()}])


def reasons(result) -> set[str]:
    return {refusal.reason for refusal in result.refusals}


def node(graph, operator: str) -> ir.Node:
    return next(n for n in graph.nodes() if n.op_type == operator)


def cast_pairs(graph) -> list[str]:
    """Casts between floats of casts between them, and casts that change nothing."""
    floats = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    casts = [n for n in graph.nodes() if n.op_type == "Cast" and {n.inputs[0].dtype, n.outputs[0].dtype} <= floats]
    return [n.name for n in casts if n.inputs[0].dtype == n.outputs[0].dtype or n.inputs[0].producer() in casts]


def check_numerics(graph, before, inputs, *, tolerance: float = 2e-3) -> None:
    """Same names and dtypes at the borders, and outputs within float16's roundings."""
    graph.verify()
    assert not cast_pairs(graph)
    assert graph.input_names == before.input_names
    expected, found = probe.run(before, inputs), probe.run(emulate(graph), inputs)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        if value.dtype.kind == "f":
            assert np.linalg.norm(found[name] - value) <= tolerance * np.linalg.norm(value)
        else:
            np.testing.assert_array_equal(found[name], value)


def test_casts_weights_and_nodes_and_keeps_inputs_and_outputs(rewrite, read):
    text = """g (float[N,2] x) => (float[N,2] y, float[N,2] r) <float[2] w = {1, 2}> {
        a = Add(x, w)  y = Relu(a)  r = Neg(y) }"""
    inputs = feeds(x=[[1, -5], [3, 4]])
    graph, result = rewrite(CAST, text, inputs)
    assert graph.operators() == {"Cast": 3, "Add": 1, "Relu": 1, "Neg": 1}
    assert node(graph, "Add").inputs[1].const_value.dtype == ir.DataType.FLOAT16
    assert result.changes == {"nodes lowered": 3, "casts inserted": 3, "masks clamped": 0}
    assert result.refusals == ()
    check_numerics(graph, read(text), inputs[0])


def test_inputs_and_outputs_become_float16_by_choice(rewrite):
    graph, _ = rewrite(Cast(keep_io=False), "g (float[2] x) => (float[2] y) { y = Relu(x) }", feeds(x=[1, 2]))
    assert graph.operators() == {"Relu": 1}
    assert graph.output_names == ("y",)
    assert probe.run(graph, {"x": np.float16([1, -2])})["y"].dtype == np.float16


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[2] x) => (int64[2] y) { y = Neg(x) }",
        "g (float16[2] x) => (float16[2] y) { y = Relu(x) }",
        "g (double[2] x) => (double[2] y) { y = Relu(x) }",
        "g (float[2] x) => (int64[1] y) { y = Shape(x) }",
        "g (float[2] x) => (float[2] x, int64[1] y) { y = Shape(x) }",
    ],
)
def test_nothing_to_cast(rewrite, text):
    assert not rewrite(CAST, text)[1].modified


def test_without_data_activations_are_not_checked(rewrite):
    _, result = rewrite(CAST, "g (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert result.modified
    assert reasons(result) == {"activations were not checked for overflow: there is no data"}


def test_data_that_cannot_be_run_is_no_check(rewrite):
    _, result = rewrite(CAST, "g (float[2] x) => (float[2] y) { y = Relu(x) }", feeds(x=[1, 2, 3]))
    assert any("not checked for overflow: ONNX Runtime cannot run the graph" in r for r in reasons(result))


def test_nodes_that_overflow_on_the_data_stay(rewrite, read):
    text = "g (float[N] x) => (float[N] y) { n = Neg(x)  s = Mul(n, n)  r = Sqrt(s)  y = Sigmoid(r) }"
    inputs = feeds(x=[1, 300])
    graph, result = rewrite(CAST, text, inputs)
    kept = [n.op_type for n in graph.nodes() if n.op_type != "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT]
    assert kept == ["Mul", "Sqrt"]
    assert reasons(result) == {"tensor 's' reaches 9e+04 on the data, float16 ends at 65504"}
    check_numerics(graph, read(text), inputs[0])
    assert not rewrite(CAST, text, feeds(x=[1, 2]))[1].refusals


def test_input_that_overflows_stays_float32_even_by_choice(rewrite):
    text = "g (float[N] x, float[N] z) => (float[N] y, float[N] u) <float k = {0.001}> { y = Mul(x, k)  u = Neg(z) }"
    graph, _ = rewrite(Cast(keep_io=False), text, feeds(x=[1e5], z=[1]))
    assert [value.dtype.name for value in graph.model.graph.inputs] == ["FLOAT", "FLOAT16"]
    assert [value.dtype.name for value in graph.model.graph.outputs] == ["FLOAT", "FLOAT16"]
    graph.verify()


def test_every_batch_counts(rewrite):
    text = "g (float[N] x) => (float[N] y) { y = Mul(x, x) }"
    assert rewrite(CAST, text, Samples([{"x": np.float32([1])}, {"x": np.float32([300])}]))[1].refusals


def test_infinity_is_no_overflow_but_what_stands_beside_it_may_be(rewrite):
    text = "g (float[N] x) => (float[N] y) <float m = {-inf}> { c = IsNaN(x)  s = Mul(x, x)  y = Where(c, m, s) }"
    assert not rewrite(CAST, text, feeds(x=[1, np.nan]))[1].refusals
    assert rewrite(CAST, text, feeds(x=[300, np.nan]))[1].refusals


def test_large_weights_stay(rewrite, read):
    text = "g (float[N] x) => (float[N] y) <float w = {100000}> { a = Div(x, w)  y = Neg(a) }"
    graph, result = rewrite(CAST, text, feeds(x=[1.0]))
    assert result.refusals == (Refusal("weight 'w' reaches 1e+05, float16 ends at 65504", "a"),)
    check_numerics(graph, read(text), {"x": np.float32([1e4])})


def test_weight_used_in_both_precisions(rewrite, read):
    text = """g (float[N] x) => (float[N] y, float[N] z) <float w = {2}> {
        a = Mul(x, x)  y = Div(a, w)  b = Tanh(x)  z = Div(b, w) }"""
    graph, _ = rewrite(CAST, text, feeds(x=[300.0]))
    dtypes = {value.const_value.dtype for value in graph.model.graph.initializers.values()}
    assert dtypes == {ir.DataType.FLOAT, ir.DataType.FLOAT16}
    check_numerics(graph, read(text), {"x": np.float32([300.0])})


def test_epsilon_that_rounds_to_zero_keeps_the_norm(rewrite, read):
    text = """g (float[N,4] x) => (float[N,4] y)
        <float e = {1e-12}, float two = {2}, float[4,4] w = {1,2,3,4, 4,3,2,1, 1,1,2,2, 1,5,1,5}> {
        h = MatMul(x, w)  m = ReduceMean <axes = [1]> (h)  d = Sub(h, m)  s = Pow(d, two)
        v = ReduceMean <axes = [1]> (s)  a = Add(v, e)  r = Sqrt(a)  n = Div(d, r)  y = Relu(n) }"""
    zeros = feeds(x=np.zeros((2, 4)))
    graph, result = rewrite(CAST, text, zeros)
    kept = {n.outputs[0].name for n in graph.nodes() if n.op_type != "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT}
    assert kept == {"s", "v", "a", "r", "n"}
    assert reasons(result) == {"'e' is 1e-12, which float16 rounds to zero"}
    check_numerics(graph, read(text), zeros[0])
    check_numerics(graph, read(text), {"x": np.float32(1e-4 * GENERATOR.standard_normal((3, 4)))}, tolerance=1e-2)


@pytest.mark.parametrize("low", [-3.4028235e38, -1e9])
@pytest.mark.parametrize(
    "mask",
    [
        "m = Where(c, zero, low)  s = Add(x, m)",
        "s = Where(c, x, low)",
        "f = Cast<to = 1>(c)  i = Sub(one, f)  m = Mul(i, low)  u = Unsqueeze(m, b)  v = Squeeze(u, b)  s = Add(x, v)",
        "m = Where(c, zero, low)  m2 = Where(c, zero, low)  t = Add(m, m2)  s = Add(x, t)",
    ],
)
def test_masks_are_clamped_so_that_softmax_has_no_nan(rewrite, read, mask, low):
    text = f"""g (float[N,3] x, bool[N,3] c) => (float[N,3] y)
        <float zero = {{0}}, float one = {{1}}, float low = {{{low}}}, int64[1] b = {{1}}> {{
        {mask}  y = Softmax(s) }}"""
    inputs = feeds(x=[[1, 2, 3], [40, 5, 600]], c=[[True, False, True], [False, False, False]])
    graph, result = rewrite(CAST, text, inputs)
    assert result.changes["masks clamped"] == 1
    assert not result.refusals
    found = probe.run(graph, inputs[0])["y"]
    np.testing.assert_allclose(found[0], probe.run(read(text), inputs[0])["y"][0], atol=1e-3)
    assert np.isfinite(found).all()


def test_mask_made_by_constant_of_shape(rewrite, read):
    text = """g (float[N,3] x, bool[N,3] c) => (float[N,3] y) { n = Shape(x)
        m = ConstantOfShape <value = float[1] {-3.4e38}> (n)  s = Where(c, x, m)  y = Softmax(s) }"""
    inputs = feeds(x=[[1, 2, 3]], c=[[True, False, True]])
    graph, result = rewrite(CAST, text, inputs)
    assert result.changes["masks clamped"] == 1
    check_numerics(graph, read(text), inputs[0])


@pytest.mark.parametrize("end", ["y = Relu(s)", "y = Softmax(s)  z = Neg(s)", "y = Identity(s)"])
def test_negative_constants_that_do_more_than_mask_stay(rewrite, read, end):
    text = f"g (float[N,3] x) => (float[N,3] y) <float low = {{-1e9}}> {{ s = Add(x, low)  {end} }}"
    graph, result = rewrite(CAST, text, feeds(x=[[1, 2, 3]]))
    assert not result.changes.get("masks clamped")
    assert "weight 'low' reaches 1e+09, float16 ends at 65504" in reasons(result)
    inputs = {"x": np.float32([[1, 2, 3]])}
    np.testing.assert_allclose(probe.run(graph, inputs)["y"], probe.run(read(text), inputs)["y"], rtol=1e-3)


def test_operator_without_float16_stays(rewrite, read):
    text = """<ir_version: 8, opset_import: ["": 11]>
        g (float[N,3] x) => (float[N,3] y) <int64 axis = {1}> { a = Neg(x)  s = CumSum(a, axis)  y = Relu(s) }"""
    graph, result = rewrite(CAST, text, feeds(x=[[1, 2, 3]]))
    assert [refusal.reason for refusal in result.refusals] == ["CumSum takes no float16 at opset 11"]
    check_numerics(graph, read(text), {"x": np.float32([[1, 2, -3]])})


def test_unknown_type_stays(read, context):
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = com.microsoft.BiasGelu(x, x)  z = Relu(x) }"
    graph = read(text)
    node(graph, "BiasGelu").outputs[0].type = None
    assert "the type of 'y' is not known" in reasons(CAST(graph, context(graph)))
    assert graph.operators() == {"com.microsoft::BiasGelu": 1, "Relu": 1, "Cast": 2}


def test_operand_that_must_be_float32_stays(rewrite, read):
    text = """g (float[1,1,2,2] x) => (float[1,1,H,W] y) <float[4] scales = {1, 1, 2, 2}> {
        a = Neg(x)  r = Resize <mode = "nearest"> (a, , scales)  y = Relu(r) }"""
    inputs = feeds(x=[[[[1, 2], [3, 4]]]])
    graph, result = rewrite(CAST, text, inputs)
    assert node(graph, "Resize").inputs[2].dtype == ir.DataType.FLOAT
    assert node(graph, "Resize").outputs[0].dtype == ir.DataType.FLOAT16
    assert not result.refusals
    check_numerics(graph, read(text), inputs[0])


def test_integers_stay_exact(rewrite, read):
    text = """g (float[N] x, int64[N] i) => (int64[N] j, float[N] y) <float two = {2}, float half = {0.5}> {
        f = Cast <to = 1> (i)  m = Mul(f, two)  g = Floor(m)  j = Cast <to = 7> (g)  h = Tanh(x)  y = Mul(h, half) }"""
    inputs = feeds(x=[0.5, 1, 2], i=[3001, 4097, 1])
    graph, result = rewrite(CAST, text, inputs)
    assert reasons(result) == {"computes integers, which float16 counts exactly to 2048 only"}
    check_numerics(graph, read(text), inputs[0])


def test_light_node_between_kept_nodes_stays(rewrite, read):
    text = """g (float[N,2] x) => (float[N,2] y) <float e = {1e-12}, float f = {1e-11}> {
        a = Add(x, e)  t = Transpose(a)  u = Transpose(t)  b = Add(u, f)  y = Relu(b) }"""
    graph, result = rewrite(CAST, text, feeds(x=[[1, 2]]))
    assert graph.operators()["Cast"] == 2
    assert "lies between nodes that stay in float32" in reasons(result)
    check_numerics(graph, read(text), {"x": np.float32([[1, -2]])})


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape(x)  c = ConstantOfShape(s)  y = Add(x, c)",
        "s = Shape(x)  c = ConstantOfShape <value = float[1] {1.5}> (s)  y = Add(x, c)",
        "c = Constant <value_float = 2.5> ()  y = Mul(x, c)",
        "c = Constant <value_floats = [2.5, 3.5]> ()  y = Mul(x, c)",
        "c = Constant <value = float[2] {2.5, 3.5}> ()  y = Mul(x, c)",
        "i = Cast <to = 7> (x)  f = Cast <to = 1> (i)  y = Add(x, f)",
        "h = Cast <to = 10> (x)  f = Cast <to = 1> (h)  y = Add(x, f)",
        "i = Constant <value_ints = [1, 2]> ()  f = CastLike(i, x)  y = Add(x, f)",
        "d = Cast <to = 11> (x)  e = Exp(d)  f = Cast <to = 1> (e)  y = Add(x, f)",
        "b = Dropout(x)  y = Identity(b)",
        "y = com.microsoft.Gelu(x)",
        "n, m = LayerNormalization <axis = 0> (x, gain)  y = Add(n, m)",
        "q = QuantizeLinear(x, step)  y = DequantizeLinear(q, step)",
        "a = local.scaled <by = 3.0> (x)  y = Neg(a)",
    ],
)
def test_operators_that_name_a_dtype(rewrite, read, body):
    text = f"""g (float[2] x) => (float[2] y)
        <float zero = {{0}}, int64 two = {{2}}, float[2] gain = {{1, 2}}, float step = {{0.25}}> {{ {body} }}
        <domain: "local", opset_import: ["": 17]> scaled <by> (x) => (y) {{
            k = Constant <value_float: float = @by> ()  y = Mul(x, k) }}"""
    inputs = feeds(x=[0.25, -1.5])
    graph, _ = rewrite(CAST, text, inputs)
    check_numerics(graph, read(text), inputs[0])
    assert not graph.model.functions


@pytest.mark.parametrize(
    ("operator", "attribute"),
    [
        ("RandomNormal <shape = [2]> ()", "dtype"),
        ("RandomUniformLike <dtype = 1> (x)", "dtype"),
        ("HannWindow (two)", "output_datatype"),
        ("Bernoulli <dtype = 1> (x)", "dtype"),
    ],
)
def test_operators_that_name_a_dtype_but_cannot_run_here(rewrite, operator, attribute):
    """ONNX Runtime's CPU has no float16 kernel for these."""
    text = f"g (float[2] x) => (float[2] y) <int64 two = {{2}}> {{ a = {operator}  y = Add(x, a) }}"
    graph, _ = rewrite(CAST, text)
    assert node(graph, operator.split()[0]).attributes[attribute].as_int() == ir.DataType.FLOAT16


def test_branches_and_what_they_capture(rewrite, read):
    text = """g (float[N,2] x, bool c) => (float[N,2] y) <float[2] w = {1, 2}, float big = {100000}> {
        a = Mul(x, w)
        b = If (c) <then_branch = t () => (float[N,2] p) { q = Add(a, w)  p = Div(q, big) },
                    else_branch = e () => (float[N,2] r) <float[2] v = {3, 4}> { r = Sub(x, v) }>
        y = Neg(b) }"""
    inputs = feeds(x=[[1, 2], [3, 4]], c=True)
    graph, result = rewrite(CAST, text, inputs)
    assert node(graph, "If").outputs[0].dtype == ir.DataType.FLOAT16
    assert "activations inside branches and loops were not checked for overflow" in reasons(result)
    for c in (True, False):
        check_numerics(graph, read(text), {**inputs[0], "c": np.array(c)})


def test_branch_that_gives_a_constant(rewrite, read):
    text = """g (float[2] x, bool c) => (float[2] y) {
        b = If (c) <then_branch = t () => (float[2] p) { p = Constant <value_floats = [1.5, 2.5]> () },
                    else_branch = e () => (float[2] r) <float[2] r = {3, 4}> { u = Neg(x) }>
        y = Add(b, x) }"""
    graph, _ = rewrite(CAST, text, feeds(x=[1, 2], c=True))
    for c in (True, False):
        check_numerics(graph, read(text), {"x": np.float32([1, 2]), "c": np.array(c)})


def test_branch_whose_result_overflows_stays(rewrite, read):
    text = """g (float[2] x, bool c) => (float[2] y) <float k = {0.001}> {
        b = If (c) <then_branch = t () => (float[2] p) { p = Mul(x, x) },
                    else_branch = e () => (float[2] r) { r = Neg(x) }>
        y = Mul(b, k) }"""
    inputs = feeds(x=[300, 400], c=True)
    graph, result = rewrite(CAST, text, inputs)
    assert any(reason.startswith("tensor 'b' reaches 1.6e+05") for reason in reasons(result))
    assert node(graph, "If").outputs[0].dtype == ir.DataType.FLOAT


def test_loop_carries_float16(rewrite, read):
    text = """g (float[2] x) => (float[2] y, float[K,2] all) <int64 n = {3}, bool go = {1}> {
        s = Neg(x)
        f, all = Loop (n, go, s) <body = b (int64 i, bool k, float[2] a) => (bool k2, float[2] a2, float[2] o) {
            k2 = Identity(k)  a2 = Add(a, x)  o = Tanh(a2) }>
        y = Relu(f) }"""
    inputs = feeds(x=[0.5, 2])
    graph, _ = rewrite(CAST, text, inputs)
    assert node(graph, "Loop").outputs[0].dtype == ir.DataType.FLOAT16
    check_numerics(graph, read(text), inputs[0])


def test_inputs_with_a_default(rewrite, read):
    text = "g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }"
    graph, _ = rewrite(CAST, text)
    check_numerics(graph, read(text), {"x": np.float32([1, 2])})
    graph, _ = rewrite(Cast(keep_io=False), text)
    assert probe.run(graph, {"x": np.float16([1, 2])})["y"].tolist() == [2, 4]


def test_input_that_is_an_output(rewrite, read):
    text = "g (float[2] x) => (float[2] y, float[2] x) { y = Relu(x) }"
    graph, _ = rewrite(CAST, text, feeds(x=[1, 2]))
    assert graph.output_names == ("y", "x")


def test_bfloat16(rewrite, read):
    text = """g (float[N,2] x) => (float[N,2] y, float[N,2] r) <float[2,2] w = {1, 2, 3, 4}> {
        a = MatMul(x, w)  y = Relu(a)  r = Softmax(y) }"""
    inputs = feeds(x=[[1, -5], [3, 400]])
    graph, result = rewrite(BF16, text, inputs)
    assert graph.operators() == {"Cast": 3, "MatMul": 1, "Relu": 1, "Softmax": 1}
    assert node(graph, "MatMul").inputs[1].const_value.dtype == ir.DataType.BFLOAT16
    assert not result.refusals
    check_numerics(graph, read(text), inputs[0], tolerance=1e-2)
    assert not rewrite(BF16, "g (float[N] x) => (float[N] y) { y = Mul(x, x) }", feeds(x=[1e5]))[1].refusals


def test_bfloat16_has_limits_of_its_own(rewrite):
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[1,1,4,4] x, bool[1,1,4,4] c) => (float[1,1,4,4] y)
            <float[1,1,1,1] w = {1}, float low = {-3.4028235e38}> {
            a = Conv(x, w)  s = Where(c, a, low)  y = Softmax(s) }"""
    _, result = rewrite(BF16, text, feeds(x=np.ones((1, 1, 4, 4)), c=np.zeros((1, 1, 4, 4))))
    assert reasons(result) == {"Conv takes no bfloat16 at opset 17"}
    assert result.changes["masks clamped"] == 1
    text = "g (int64[N] i) => (int64[N] j) { f = Cast <to = 1> (i)  g = Floor(f)  j = Cast <to = 7> (g) }"
    _, result = rewrite(BF16, text, feeds(i=[1]))
    assert "computes integers, which bfloat16 counts exactly to 256 only" in reasons(result)


def test_bfloat16_inputs_are_refused():
    with pytest.raises(RecipeError, match="inputs of bfloat16, which arrays cannot hold"):
        parse_pass("cast:to=bf16,keep_io=false")


NAMED = """g (float[N] x) => (float[N] y) {
    [block1_neg] a = Neg(x)  [block1_tanh] b = Tanh(a)  [block2_neg] c = Neg(b)  [head] y = Tanh(c) }"""


@pytest.mark.parametrize("keep", [("block1_*",), ("block1_neg", "block1_t*")])
def test_nodes_are_kept_by_choice(rewrite, keep):
    graph, result = rewrite(Cast(keep=keep), NAMED, feeds(x=[1, 2]))
    assert {n.name: n.outputs[0].dtype.name for n in graph.nodes() if n.op_type != "Cast"} == {
        "block1_neg": "FLOAT", "block1_tanh": "FLOAT", "block2_neg": "FLOAT16", "head": "FLOAT16",
    }  # fmt: skip
    assert Refusal(f"kept by choice: {keep[0]!r}", "block1_neg") in result.refusals
    assert not cast_pairs(graph)


def test_kept_name_that_no_node_has(rewrite):
    with pytest.raises(RecipeError, match=r"no node matches 'block3_neg'[\s\S]*did you mean 'block[12]_neg'"):
        rewrite(Cast(keep=("block3_neg",)), NAMED)
    with pytest.raises(RecipeError, match=r"no node matches '\*tail\*'[\s\S]*4 nodes, among them 'block1_neg'"):
        rewrite(Cast(keep=("*tail*",)), NAMED)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["Add", "Sub", "Mul", "Max", "Div"]), st.integers(0, 4), st.integers(0, 4)),
        min_size=1,
    ),
    st.sampled_from([1.0, 30.0, 500.0]),
)
def test_any_graph(read, rewrite, steps, scale):
    lines = [f"v{i + 2} = {op}(v{min(a, i + 1)}, v{min(b, i + 1)})" for i, (op, a, b) in enumerate(steps)]
    text = f"g (float[3] v0, float[3] v1) => (float[3] y) {{ {'  '.join(lines)}  y = Tanh(v{len(steps) + 1}) }}"
    inputs = feeds(v0=np.array([1, 1.5, 2]) * scale, v1=np.array([3.0, -2, 5]) * scale)
    graph, _ = rewrite(CAST, text, inputs)
    assert not cast_pairs(graph)
    assert (
        np.isfinite(probe.run(graph, inputs[0])["y"]).all()
        or not np.isfinite(probe.run(read(text), inputs[0])["y"]).all()
    )
