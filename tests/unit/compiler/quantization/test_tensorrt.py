"""Graphs as text; weights that the text declares are filled in."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.quantization.attention import drop_guards
from enginesmith.compiler.quantization.tensorrt import plan

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
FP8 = ir.DataType.FLOAT8E4M3FN

BLOCK = """
g (float[n,32,8,8] x) => (float[n,32,8,8] y) <float[32,32,3,3] w1, float[32,32,3,3] w2, float[32,32,3,3] w3>
{
  a = Conv<pads=[1,1,1,1]>(x, w1)
  b = Relu(a)
  c = Conv<pads=[1,1,1,1]>(b, w2)
  s = Add(c, x)
  r = Relu(s)
  y = Conv<pads=[1,1,1,1]>(r, w3)
}
"""

ATTENTION = """
g (float[n,4,16,32] q, float[n,4,32,16] k, float[n,4,16,32] v, float[n,1,16,16] mask) => (float[n,4,16,32] y)
<float scale>
{
  scaled = Mul(q, scale)
  scores = MatMul(scaled, k)
  masked = Add(scores, mask)
  p = Softmax<axis=-1>(masked)
  y = MatMul(p, v)
}
"""


def guarded(text):
    """Attention with torch's guard."""
    return text.replace("  y =", "  bad = IsNaN(p)\n  g = Where(bad, mask, p)\n  y =").replace(
        "MatMul(p, v)", "MatMul(g, v)"
    )


def graph(text):
    model = onnx.parser.parse_model(HEADER + text)
    random = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = np.asarray(random.standard_normal(shape), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    made = Graph.from_proto(model)
    made.infer()
    made.verify()
    return made


def reads(found):
    """The uses that read 8-bit numbers: for each activation ``result of the reader: which input``."""
    return {
        name: sorted(f"{use.node.outputs[0].name}:{use.place}" for use in uses)
        for name, uses in found.activations.items()
    }


def refused(found):
    return {refusal.node.removeprefix("node_"): refusal.reason for refusal in found.refusals}


def node(graph, result):
    return next(node for node in graph.nodes() if node.outputs[0].name == result)


def test_a_residual_block_is_quantized_on_its_skip_branch():
    found = plan(graph(BLOCK))
    assert reads(found) == {"x": ["a:0", "s:1"], "b": ["c:0"], "r": ["y:0"]}
    assert (found.dtype, found.symmetric, found.groups, found.biases) == (ir.DataType.INT8, True, (), ())
    assert {weight.value.name: weight.axis for weight in found.weights} == {"w1": 0, "w2": 0, "w3": 0}
    assert {found.outputs[0].name for found in found.nodes} == {"a", "c", "y"}


def test_the_projection_is_the_skip_branch_wherever_it_stands():
    text = BLOCK.replace("Add(c, x)", "Add(c, p)").replace("s = ", "p = Conv(x, w4)\n  s = ").replace("w3>", "w3, W>")
    found = plan(graph(text.replace(", W>", ", float[32,32,1,1] w4>")))
    assert reads(found)["p"] == ["s:1"]
    assert "c" not in reads(found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Add(c, x)", "Add(c, mean)"),  # a sum that broadcasts
        ("Add(c, x)", "Add(c, c)"),
        ("r = Relu(s)", "r = Mul(s, c)"),  # the convolution's result is read elsewhere
    ],
)
def test_other_sums_are_left_alone(before, after):
    text = BLOCK.replace("s = ", "mean = GlobalAveragePool(x)\n  s = ").replace(before, after)
    assert not any(use.startswith("s:") for uses in reads(plan(graph(text))).values() for use in uses)


def test_sums_after_matrix_products_stay_float():
    found = plan(graph("g (float[n,32] x) => (float[n,32] y) <float[32,32] w> { a = MatMul(x, w) y = Add(a, x) }"))
    assert reads(found) == {"x": ["a:0"]}


def test_pooling_between_quantized_layers():
    text = """
    g (float[n,16,8,8] x) => (float[n,16] y) <float[16,16,3,3] w1, float[16,16,1,1] w2, float[16,16] w3>
    {
      a = Conv(x, w1)
      m = MaxPool<kernel_shape=[2,2]>(a)
      p = AveragePool<kernel_shape=[2,2]>(m)
      c = Conv(p, w2)
      h = HardSwish(c)
      g = GlobalAveragePool(h)
      f = Flatten(g)
      y = Gemm(f, w3)
    }
    """
    found = plan(graph(text))
    assert reads(found) == {"x": ["a:0"], "m": ["p:0"], "p": ["c:0"], "f": ["y:0"]}  # nobody writes h in 8 bits


CONCAT = """
g (float[n,16,8,8] x) => (float[n,16,8,8] y) <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,48,1,1] w3>
{
  a = Conv(x, w1)
  b = Conv(a, w2)
  ab = Concat<axis=1>(a, b)
  c = Relu(b)
  abc = Concat<axis=1>(ab, c)
  y = Conv(abc, w3)
}
"""


def test_what_is_concatenated_shares_one_scale():
    found = plan(graph(CONCAT))
    assert reads(found) == {
        "x": ["a:0"], "a": ["ab:0", "b:0"], "b": ["ab:1"], "c": ["abc:1"], "ab": ["abc:0"], "abc": ["y:0"],
    }  # fmt: skip
    assert found.groups == (frozenset(("a", "b", "ab", "c", "abc")),)


@pytest.mark.parametrize(("before", "after"), [("Relu(b)", "Softmax(b)"), ("Conv(abc, w3)", "Slice(abc, w3)")])
def test_a_concat_beside_float_layers_stays_float(before, after):
    text = CONCAT.replace(before, after)
    if "Slice" in after:
        text = text.replace("Slice(abc, w3)", "Erf(abc)").replace("=> (float[n,16,8,8] y)", "=> (float[n,48,8,8] y)")
    found = plan(graph(text))
    assert not any(use.startswith("abc") for uses in reads(found).values() for use in uses)


def test_attention_stays_in_fp16():
    found = plan(graph(ATTENTION))
    assert reads(found) == {}
    assert set(refused(found).values()) == {"attention stays in fp16, one kernel with its softmax"}
    assert len(found.refusals) == 2


def test_attention_is_quantized_as_a_whole():
    found = plan(graph(ATTENTION), attention=True)
    assert reads(found) == {"scaled": ["scores:0"], "k": ["scores:1"], "p": ["y:0"], "v": ["y:1"]}
    assert found.weights == ()
    assert len(found.nodes) == 2


def test_attention_with_a_guard_would_not_be_one_kernel():
    found = plan(graph(guarded(ATTENTION)), attention=True)
    assert reads(found) == {}
    assert "guarded against rows without any key" in str(refused(found))


@pytest.mark.parametrize(
    ("mask", "dropped"),
    [
        ("float minus = {-3.4e38}", 1),
        ("float minus = {-inf}", 0),
    ],
)
def test_guards_are_dropped_where_masks_are_finite(mask, dropped):
    text = guarded(ATTENTION).replace("float[n,1,16,16] mask", "bool[n,1,16,16] seen")
    text = text.replace("<float scale>", f"<float scale, {mask}, float zero = {{0}}>")
    text = text.replace("  masked", "  mask = Where(seen, zero, minus)\n  masked")
    made = graph(text)
    assert drop_guards(made) == dropped
    made.verify()
    assert made.operators()["IsNaN"] == 1 - dropped
    assert bool(plan(made, attention=True).nodes) == bool(dropped)


def test_guards_stay_where_a_caller_gives_the_mask():
    made = graph(guarded(ATTENTION))
    assert drop_guards(made) == 0


def test_attention_that_no_kernel_takes_or_that_is_kept():
    made = graph(ATTENTION)
    found = plan(made, attention=True, keep={node(made, "scores"): "kept by choice"})
    assert list(refused(found).values()) == ["kept by choice", "kept by choice"]
    text = ATTENTION.replace("16,16]", "16,600]").replace("float[n,4,32,16] k", "float[n,4,32,600] k")
    found = plan(graph(text.replace("float[n,4,16,32] v", "float[n,4,600,32] v")), attention=True)
    assert set(refused(found).values()) == {"attention over 600 keys; the fused 8-bit kernel takes 512"}


def test_products_of_activations_without_softmax():
    found = plan(graph("g (float[n,32] x, float[32,32] y) => (float[n,32] z) { z = MatMul(x, y) }"))
    assert list(refused(found).values()) == ["both operands are activations"]


@pytest.mark.parametrize(
    ("line", "weight", "axis"),
    [
        ("y = Gemm(x, w)", "16,32", 1),
        ("y = Gemm<transB=1>(x, w)", "32,16", 0),
        ("y = MatMul(x, w)", "16,32", 1),
    ],
)
def test_weights_have_a_scale_for_each_output_channel(line, weight, axis):
    made = graph(f"g (float[n,16] x) => (float[n,32] y) <float[{weight}] w> {{ {line} }}")
    assert [weight.axis for weight in plan(made).weights] == [axis]
    assert [weight.axis for weight in plan(made, per_channel=False).weights] == [None]


def test_transposed_convolutions_stay_fp16():
    text = "g (float[n,16,4,4] x) => (float[n,32,5,5] y) <float[16,32,2,2] w> { y = ConvTranspose(x, w) }"
    found = plan(graph(text))
    assert reads(found) == {}
    assert "would dequantize its weight at every call" in str(refused(found))


@pytest.mark.parametrize(
    ("line", "x", "weight", "dtype", "reason"),
    [
        ("Conv(x, w)", "n,3,8,8", "64,3,3,3", "INT8", ""),  # a first layer
        ("Conv(x, w)", "n,4,8,8", "8,4,3,3", "INT8", ""),
        ("Conv(x, w)", "n,3,8,8", "10,3,3,3", "INT8", "it has 3 to 10 channels; 8-bit kernels need 16"),
        ("Conv(x, w)", "n,3,8,8", "64,3,3,1", "INT8", "square filters and a multiple of 8"),
        ("Conv<group=32>(x, w)", "n,32,8,8", "32,1,3,3", "INT8", ""),
        ("Conv<group=32>(x, w)", "n,32,8,8", "32,1,1,1", "INT8", "32 groups of 1 to 32 channels have no fast"),
        ("Conv(x, w)", "n,32,8", "32,32,3", "INT8", ""),
        ("Conv(x, w)", "n,32,8,8", "32,32,7,7", "FLOAT8E4M3FN", "its filter has 49 elements, and FP8 kernels take 32"),
        ("Conv(x, w)", "n,16,8,8", "32,16,3,3", "FLOAT8E4M3FN", "FP8 kernels need more than 16"),
        ("Conv(x, w)", "n,32,8,8", "32,32,3,3", "FLOAT8E4M3FN", ""),
        ("MatMul(x, w)", "n,32", "32,10", "INT8", "its weight is 32 by 10, and 8-bit kernels need 16 of each"),
        ("MatMul(x, w)", "1,32", "32,32", "INT8", "it multiplies a single vector"),
        ("MatMul(x, w)", "2,3,32", "2,32,32", "INT8", "its weight has 3 axes; there are 8-bit kernels for 2"),
        ("MatMul(w, x)", "32,32", "32,32", "INT8", "both operands are activations"),
        ("MatMul(w, w)", "32,32", "32,32", "INT8", "both operands are constants"),
    ],
)
def test_what_has_no_fast_kernel_stays_float(line, x, weight, dtype, reason):
    rank = len(x.split(","))
    result = ",".join(f"d{axis}" for axis in range(rank))
    made = graph(f"g (float[{x}] x) => (float[{result}] y) <float[{weight}] w> {{ y = {line} }}")
    found = plan(made, dtype=ir.DataType[dtype])
    assert bool(found.nodes) == (reason == "")
    assert reason in "".join(refused(found).values())


def test_the_dtype_is_that_of_activations_and_weights():
    found = plan(graph(BLOCK), dtype=FP8)
    assert found.dtype == FP8
    assert {weight.dtype for weight in found.weights} == {FP8}


def test_kept_nodes_stay_float_and_end_no_residual():
    made = graph(BLOCK)
    found = plan(made, keep={node(made, "c"): "kept by choice"})
    assert refused(found) == {refusal.node.removeprefix("node_"): "kept by choice" for refusal in found.refusals}
    assert reads(found) == {"x": ["a:0"], "r": ["y:0"]}


def test_results_of_the_model_are_read_as_float():
    text = BLOCK.replace("(float[n,32,8,8] y)", "(float[n,32,8,8] y, float[n,32,8,8] b)")
    uses = [use for uses in plan(graph(text)).activations.values() for use in uses]
    assert all(use.node is not None for use in uses)


def test_bodies_of_branches_stay_float():
    text = """
    g (bool c, float[n,32] x) => (float[n,32] y) <float[32,32] w>
    { y = If(c)<then_branch = t () => (float[n,32] u) { u = MatMul(x, w) },
                else_branch = e () => (float[n,32] v) { v = Identity(x) }> }
    """
    found = plan(graph(text))
    assert list(refused(found).values()) == ["the bodies of If stay float"]
