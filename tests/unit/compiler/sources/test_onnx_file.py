import numpy as np
import onnx
import onnx.parser
import pytest

from enginesmith.compiler.signature import AxisRange, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.sources.onnx_file import describe, open_session
from enginesmith.errors import GraphError, RecipeError, SourceError

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
TWO = (
    HEAD
    + """main (float[N,4] x, float[2,N] state) => (float[N,3] y, float[1,M] z)
    <float[4,3] w = {1,1,1,1,1,1,1,1,1,1,1,1}>
    { y = MatMul(x, w)  z = Flatten<axis: int = 0>(state) }"""
)


def save(path, text, **options):
    model = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:  # as raw bytes, which alone can lie outside
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path, **options)
    return path


@pytest.fixture
def two(tmp_path):
    return save(tmp_path / "two.onnx", TWO)


def test_the_signature_is_the_files(two):
    model = load_model(two, inputs=parse_inputs(["x:1x4"], ["x:0=1..2..4"]))
    assert model.kind == "onnx"
    assert [str(s) for s in model.signature.inputs] == ["x:Nx4:float32", "state:2xN:float32"]
    assert [str(s) for s in model.signature.outputs] == ["y:Nx3:float32", "z:1x?:float32"]
    assert model.signature.axes == {"N": AxisRange(1, 2, 4)}
    arrays = {"x": np.ones((3, 4), "f"), "state": np.zeros((2, 3), "f")}
    outputs = model.signature.nest(model.reference.run(arrays))
    assert outputs["y"].tolist() == [[4.0] * 3] * 3
    assert outputs["z"].shape == (1, 6)
    assert model.parameter_bytes == 4 * 12
    assert model.module is None
    assert not model.stateful


def test_a_single_output_stands_alone(tmp_path):
    path = save(tmp_path / "m.onnx", HEAD + "main (float[2] x) => (float[2] y) { y = Relu(x) }")
    model = load_model(path)
    assert model.signature.structure is None
    assert model.signature.nest(model.reference.run({"x": np.ones(2, "f")})).tolist() == [1, 1]


def test_fingerprints_tell_weights_apart(tmp_path, two):
    other = save(tmp_path / "other.onnx", TWO.replace("{1,1,", "{2,1,"))
    copy = save(tmp_path / "copy.onnx", TWO)
    inputs = parse_inputs(["x:1x4"], ["x:0=1..2..4"])
    assert load_model(two, inputs=inputs).fingerprint == load_model(copy, inputs=inputs).fingerprint
    assert load_model(two, inputs=inputs).fingerprint != load_model(other, inputs=inputs).fingerprint


def test_external_data_is_read(tmp_path):
    path = save(tmp_path / "m.onnx", TWO, save_as_external_data=True, location="m.data", size_threshold=0)
    model = load_model(path, inputs=parse_inputs(["x:2x4"]))
    arrays = {"x": np.ones((2, 4), "f"), "state": np.zeros((2, 2), "f")}
    assert model.reference.run(arrays)["y"].tolist() == [[4.0] * 3] * 2


def test_external_data_that_is_missing_or_outside_is_refused(tmp_path):
    path = save(tmp_path / "m.onnx", TWO, save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "inner").mkdir()
    proto = onnx.load(path, load_external_data=False)
    (tmp_path / "m.data").rename(tmp_path / "kept.data")
    with pytest.raises(GraphError, match="external data of tensor 'w' is missing"):
        load_model(path)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../kept.data"
    (tmp_path / "inner" / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="external data of tensor 'w' lies outside"):
        load_model(tmp_path / "inner" / "m.onnx")


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("main (float[2] x) => (float[2] y) { y = Relux(x) }", GraphError, "Relux"),
        ("main (float[2] x) => (float[2] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }", GraphError, "b"),
        ("main (float[2] x) => (float[2] y) { y = RandomNormalLike(x) }", SourceError, "draws random numbers"),
        (
            "main (string[2] x) => (string[2] y) { y = Identity(x) }",
            SourceError,
            "'x' .* is no tensor that engines take",
        ),
        ("main (seq(float[2]) x) => (seq(float[2]) y) { y = Identity(x) }", SourceError, "'x' .* is no tensor"),
    ],
)
def test_graphs_that_no_engine_can_run_are_refused(tmp_path, text, error, match):
    with pytest.raises(error, match=match):
        load_model(save(tmp_path / "m.onnx", HEAD + text))


def with_weight(tmp_path, node, value):
    text = f"{HEAD}main (float[1,2] x) => (float[1,2] y) <float[2,2] w = {{1,1,1,1}}> {{ y = {node}(x, w) }}"
    model = onnx.parser.parse_model(text if node == "MatMul" else text.replace("[1,2] y", "[2,2] y"))
    array = np.ones((2, 2), np.float32)
    array[0, 1] = value
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"weight 'w' holds NaN(?s:.*)1 of 4"):
        load_model(with_weight(tmp_path, "Add", np.nan))
    with pytest.raises(SourceError, match="weight 'w' holds infinity"):
        load_model(with_weight(tmp_path, "MatMul", -np.inf))
    assert load_model(with_weight(tmp_path, "Add", -np.inf)), "a mask may be minus infinity"


def test_what_is_no_onnx_is_refused(tmp_path, two):
    (tmp_path / "broken.onnx").write_bytes(two.read_bytes()[:40])
    with pytest.raises(GraphError, match=r"is not a whole ONNX model|is not an ONNX model"):
        load_model(tmp_path / "broken.onnx")


def test_an_axis_needs_a_range(two):
    with pytest.raises(RecipeError, match=r"axis 0 \(N\) of input 'x' is dynamic in two.onnx(?s:.*)--dynamic x:0="):
        load_model(two)


def test_options_that_do_not_fit_are_refused(two):
    with pytest.raises(RecipeError, match=r"--weights .* does not go with two.onnx"):
        load_model(two, weights=two)
    with pytest.raises(RecipeError, match=r"two.onnx takes no arguments"):
        load_model(two, arguments={"a": 1})


def test_a_run_that_fails_names_the_shapes(two):
    model = load_model(two, inputs=parse_inputs(["x:2x4"]))
    with pytest.raises(SourceError, match=r"failed when ONNX Runtime ran it(?s:.*)x \(2, 5\)"):
        model.reference.run({"x": np.ones((2, 5), "f"), "state": np.zeros((2, 2), "f")})


def test_a_graph_that_onnx_runtime_does_not_know_is_refused(tmp_path):
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>main (float[2] x) => (float[2] y) { y = custom.Op(x) }'
    )
    with pytest.raises(SourceError, match=r"ONNX Runtime refuses m.onnx(?s:.*)Op"):
        open_session(save(tmp_path / "m.onnx", text))


def test_ranges_without_inputs(two):
    model = load_model(two, dynamic=["x:0=1..2..4"])
    assert [str(s) for s in model.signature.inputs] == ["x:Nx4:float32", "state:2xN:float32"]
    assert model.signature.axes == {"N": AxisRange(1, 2, 4)}


def test_a_description_infers_types_and_counts_external_data(tmp_path):
    text = (
        HEAD
        + """main (float[N,4] x) => (float16[N,4] y) <float[4] w = {1,2,3,4}>
    { a = Add(x, w)  b = Shape(a)  y = Cast<to = 10>(a) }"""
    )
    path = save(tmp_path / "m.onnx", text, save_as_external_data=True, location="m.data", size_threshold=0)
    found = describe(path)
    assert found["graph inputs"] == [{"name": "x", "shape": "Nx4", "dtype": "float32"}]
    assert found["graph outputs"] == [{"name": "y", "shape": "Nx4", "dtype": "float16"}]
    assert found["precisions"] == {"float32": 1, "int64": 1, "float16": 1}
    assert found["operators"] == {"Add": 1, "Shape": 1, "Cast": 1}
    assert found["size_bytes"] == path.stat().st_size + (tmp_path / "m.data").stat().st_size
