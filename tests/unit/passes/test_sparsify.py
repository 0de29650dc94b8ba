from __future__ import annotations

import dataclasses

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.quantization.layers import Layer
from enginesmith.compiler.sparsity.detect import sparse_layers
from enginesmith.compiler.sparsity.pattern import is_sparse
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.sparsify import Sparsify

HEADER = '<ir_version: 10, opset_import: ["": 21, "local": 1]>\n'
MATMUL = "g (float[B,32] x) => (float[B,16] y) { [m] y = MatMul(x, w) }"
NOTE = "chosen by magnitude, without calibration data that say what weights matter"


class Samples(list):
    description = "made up"
    random = False
    digest = None


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(*shape: int, axis: int = -1) -> np.ndarray:
    """Values that go together along an axis, some larger than others, as those of activations do."""
    length = shape[axis]
    mixing = weight(length, length, seed=2) * np.random.default_rng(3).uniform(0.2, 2, length).astype(np.float32)
    mixed = np.moveaxis(weight(*shape, seed=1), axis, -1) @ mixing
    return np.ascontiguousarray(np.moveaxis(mixed, -1, axis))


def sparse(*shape: int, axis: int) -> np.ndarray:
    array = np.moveaxis(weight(*shape), axis, -1).copy()
    array.reshape(-1, 4)[:, 1:3] = 0
    return np.ascontiguousarray(np.moveaxis(array, -1, axis))


def read(text: str, **arrays: np.ndarray) -> Graph:
    proto = onnx.parser.parse_model(text if text.startswith("<") else HEADER + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    graph = Graph.from_proto(proto)
    graph.infer()
    graph.verify()
    return graph


@pytest.fixture
def run(context):
    """Runs the pass on text, with initializers given as arrays, and gives graph and result."""

    def apply(text: str, rule: Sparsify | None = None, data: np.ndarray | None = None, **arrays: np.ndarray):
        graph = read(text, **arrays)
        calibration = None if data is None else Calibration(Samples([{"x": batch} for batch in data]))
        result = (rule or Sparsify())(graph, dataclasses.replace(context(graph), calibration=calibration))
        return graph, result

    return apply


def reasons(result) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.refusals}


def weights(graph: Graph) -> list[np.ndarray]:
    """As (out, in, *kernel), of all layers."""
    return [Layer(node).load() for node in graph.nodes() if node.op_type in ("Conv", "Gemm", "MatMul")]


@pytest.mark.parametrize(
    ("text", "shape", "axis"),
    [
        (MATMUL, (32, 16), 0),
        ("g (float[B,32] x) => (float[B,16] y) { [m] y = Gemm<transB=1>(x, w) }", (16, 32), 1),
        ("g (float[B,32] x) => (float[B,16] y) { [m] y = Gemm(x, w) }", (32, 16), 0),
        ("g (float[B,32,6,6] x) => (float[B,16,4,4] y) { [m] y = Conv(x, w) }", (16, 32, 3, 3), 1),
        ("g (float[B,32,6] x) => (float[B,16,6] y) { [m] y = Conv(x, w) }", (16, 32, 1), 1),
    ],
)
def test_two_of_four_weights_along_the_inputs_stay(run, text, shape, axis):
    graph, result = run(text, w=weight(*shape))
    stored = graph.model.graph.initializers["w"].const_value.numpy()
    assert stored.shape == shape
    grouped = np.moveaxis(stored, axis, -1).reshape(-1, 4)
    assert (np.count_nonzero(grouped, axis=1) == 2).all()
    assert result.changes == {"layers made sparse": 1, "weights zeroed": stored.size // 2}
    assert sparse_layers(graph) == ["m"]
    (row,) = result.details["sparse"]
    assert (row["layer"], row["method"], row["inputs"], row["outputs"]) == ("m", "magnitude", 32, 16)
    assert 0.2 < row["weight_error"] < 0.5
    assert row["output_error"] is None
    assert reasons(result) == {"": NOTE}


def test_twice_changes_nothing_and_says_so(run, context):
    graph, _ = run(MATMUL, w=weight(32, 16))
    before = graph.fingerprint()
    result = Sparsify()(graph, context(graph))
    assert graph.fingerprint() == before
    assert reasons(result) == {"m": "already 2:4 sparse, and kept"}


@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_the_less_simple_the_method_the_smaller_the_error_of_outputs(run, kind):
    if kind == "Conv":
        text = "g (float[B,32,8,8] x) => (float[B,24,4,4] y) { [m] y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) }"
        shape, data = (24, 32, 3, 3), correlated(32, 4, 32, 8, 8, axis=2)
    else:
        text, shape, data = MATMUL, (32, 16), correlated(16, 64, 32)
    dense = read(text, w=weight(*shape))
    together = data.reshape(-1, *data.shape[2:])
    expected = probe.run(dense, {"x": together})["y"]
    errors, told = [], []
    for method in ("magnitude", "wanda", "sparsegpt", None):
        graph, result = run(text, Sparsify(method=method), data, w=weight(*shape))
        assert all(is_sparse(array) for array in weights(graph))
        errors.append(np.linalg.norm(probe.run(graph, {"x": together})["y"] - expected) / np.linalg.norm(expected))
        told.append(result.details["sparse"][0])
    assert errors[2] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[0]
    assert errors[3] == errors[2]
    assert [row["method"] for row in told] == ["magnitude", "wanda", "sparsegpt", "sparsegpt"]
    assert told[0]["output_error"] is None
    assert told[2]["output_error"] == pytest.approx(errors[2], rel=0.1)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods_that_need_data_say_so(run, method):
    assert Sparsify(method=method).calibrates
    with pytest.raises(RecipeError, match=rf"method={method} needs calibration data, to see what weights are multip"):
        run(MATMUL, Sparsify(method=method), w=weight(32, 16))


def test_layers_that_share_a_weight_share_its_zeros(run):
    text = "g (float[B,32] x) => (float[B,32] y) { [a] h = MatMul(x, w) r = Relu(h) [b] y = MatMul(r, w) }"
    graph, result = run(text, None, correlated(4, 64, 32), w=weight(32, 32))
    assert list(graph.model.graph.initializers) == ["w"]
    assert sparse_layers(graph) == ["a", "b"]
    assert result.changes == {"layers made sparse": 2, "weights zeroed": 512}
    assert [row["layer"] for row in result.details["sparse"]] == ["a", "b"]


def test_a_weight_that_nodes_compute_is_folded(run):
    text = """g (float[B,32] x) => (float[B,16] y) {
        t = Transpose<perm=[1,0]>(w)
        [m] y = MatMul(x, t)
    }"""
    graph, result = run(text, w=weight(16, 32))
    assert graph.operators() == {"MatMul": 1}
    assert result.changes["layers made sparse"] == 1
    assert is_sparse(weights(graph)[0])


REFUSED = {
    "not constant": (
        "g (float[B,32] x, float[32,16] w) => (float[B,16] y) { [m] y = MatMul(x, w) }",
        {},
        "its weight is not constant",
    ),
    "first operand": (
        "g (float[32,B] x) => (float[16,B] y) { [m] y = MatMul(w, x) }",
        {"w": weight(16, 32)},
        "its weight is the first operand, which kernels take dense",
    ),
    "quantized": (
        "g (float[B,32] x) => (float[B,16] y) { d = DequantizeLinear(w, s) [m] y = MatMul(x, d) }",
        {"w": np.ones((32, 16), np.int8), "s": np.float32(0.1)},
        "its weight is quantized: sparsify before quantizing",
    ),
    "float16": (
        "g (float16[B,32] x) => (float16[B,16] y) { [m] y = MatMul(x, w) }",
        {"w": weight(32, 16).astype(np.float16)},
        "its weight is float16: float32 is made sparse, before casts",
    ),
    "stacked": (
        "g (float[4,B,32] x) => (float[4,B,16] y) { [m] y = MatMul(x, w) }",
        {"w": weight(4, 32, 16)},
        "its weight has 3 dimensions, kernels take 2",
    ),
    "broken": (MATMUL, {"w": np.full((32, 16), np.nan, np.float32)}, "its weight 'w' holds NaN or Inf"),
    "scaled": (
        "g (float[B,32] x) => (float[B,16] y) { [m] y = Gemm<alpha=0.5>(x, w) }",
        {"w": weight(32, 16)},
        "it transposes its input or scales what it adds (transA, alpha, beta)",
    ),
    "embedding": (
        "g (int64[B] x) => (float[B,64] y) { e = Gather(w, x) t = Transpose<perm=[1,0]>(w) [m] y = MatMul(e, t) }",
        {"w": weight(64, 32)},
        "its weight is the table of an embedding too",
    ),
    "also read": (
        "g (float[B,32] x) => (float[B,16] y, float[32,16] z) { z = Relu(w) [m] y = MatMul(x, w) }",
        {"w": weight(32, 16)},
        "its weight is read by 'z' too, which would change with it",
    ),
    "output": (
        "g (float[B,32] x) => (float[B,16] y, float[32,16] w) { [m] y = MatMul(x, w) }",
        {"w": weight(32, 16)},
        "its weight is an output of the graph",
    ),
    "two layouts": (
        "g (float[B,32] x) => (float[B,32] y) { h = MatMul(x, w) [m] y = Gemm<transB=1>(h, w) }",
        {"w": weight(32, 32)},
        "its weight is shared in two layouts, whose groups of four differ",
    ),
    "depthwise": (
        "g (float[B,32,4] x) => (float[B,32,4] y) { [m] y = Conv<group=32>(x, w) }",
        {"w": weight(32, 1, 1)},
        "it is depthwise: one input channel makes no group of four",
    ),
    "grouped": (
        "g (float[B,32,4] x) => (float[B,32,4] y) { [m] y = Conv<group=2>(x, w) }",
        {"w": weight(32, 16, 1)},
        "it has 2 groups, and TensorRT has no sparse kernels for those",
    ),
    "odd inputs": (
        "g (float[B,30] x) => (float[B,16] y) { [m] y = MatMul(x, w) }",
        {"w": weight(30, 16)},
        "its 30 inputs are no multiple of 4",
    ),
    "few inputs": (
        "g (float[B,20] x) => (float[B,16] y) { [m] y = MatMul(x, w) }",
        {"w": weight(20, 16)},
        "its 20 inputs are no multiple of 16, as sparse Tensor Cores need",
    ),
    "few outputs": (
        "g (float[B,32] x) => (float[B,10] y) { [m] y = MatMul(x, w) }",
        {"w": weight(32, 10)},
        "its 10 outputs are no multiple of 8, as sparse Tensor Cores need",
    ),
    "sparse": (MATMUL, {"w": sparse(32, 16, axis=0)}, "already 2:4 sparse, and kept"),
    "subgraph": (
        """g (bool c, float[B,32] x) => (float[B,16] y) {
            y = If(c) <
                then_branch = a () => (float[B,16] p) { [m] p = MatMul(x, w) },
                else_branch = b () => (float[B,16] q) { q = Expand(v, s) }
            >
        }""",
        {"w": weight(32, 16), "v": weight(1, 16), "s": np.array([1, 16])},
        "it is in a subgraph",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_dense_has_a_reason(run, case):
    text, arrays, reason = REFUSED[case]
    _, result = run(text, **arrays)
    assert not result.modified
    assert result.changes == {}
    assert reasons(result)["m"] == reason


def test_nodes_that_the_user_keeps_take_along_what_shares_their_weight(run):
    text = """g (float[B,32] x) => (float[B,32] y) {
        [a] h = MatMul(x, w)
        [b] i = MatMul(h, w)
        [c] y = MatMul(i, v)
    }"""
    graph, result = run(text, parse_pass("sparsify:keep=a*"), w=weight(32, 32), v=weight(32, 32))
    assert sparse_layers(graph) == ["c"]
    assert reasons(result) == {
        "a": "kept by choice: 'a*'",
        "b": "its weight is that of 'a' too, which stays dense",
        "": NOTE,
    }
    with pytest.raises(RecipeError, match="no node matches 'z'"):
        run(text, Sparsify(keep=("z",)), w=weight(32, 32), v=weight(32, 32))


NETWORK = """g (float[B,16,8,8] x) => (float[B,16] y) {
    [conv] h = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(h)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    [head] y = Gemm<transB=1>(f, v)
}"""


@pytest.mark.parametrize(
    "then",
    [
        "quantize-static:scheme=tensorrt",
        "quantize-static:scheme=tensorrt,rounding=gptq",
        "quantize-static:scheme=tensorrt,search=true",
        "cast:to=fp16",
        "cast:to=bf16",
    ],
)
def test_zeros_outlast_what_lowers_the_graph_afterwards(run, context, then):
    data = correlated(16, 4, 16, 8, 8, axis=2)
    arrays = {"w": weight(32, 16, 3, 3), "b": weight(32), "v": weight(16, 32)}
    graph, _ = run(NETWORK, None, data, **arrays)
    calibration = Calibration(Samples([{"x": batch} for batch in data]))
    result = parse_pass(then)(graph, dataclasses.replace(context(graph), calibration=calibration))
    assert result.modified
    assert sparse_layers(graph) == ["conv", "head"]
    again = Sparsify()(graph, context(graph))
    assert not again.modified


def test_dense_weights_are_not_called_sparse():
    assert sparse_layers(read(NETWORK, w=weight(32, 16, 3, 3), b=weight(32), v=weight(16, 32))) == []
    text = "g (float[B,16] x, float[16,8] w) => (float[B,8] y) { y = MatMul(x, w) }"
    assert sparse_layers(read(text)) == []


def test_the_text_form():
    assert str(Sparsify()) == "sparsify"
    rule = Sparsify(method="wanda", keep=("head", "*/norm"))
    assert str(rule) == "sparsify:method=wanda,keep=head+*/norm"
    assert parse_pass(str(rule)) == rule
    with pytest.raises(RecipeError, match="option 'pattern' of 'sparsify' has an unknown value"):
        parse_pass("sparsify:pattern=1:4")
