from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.errors import GraphError, StorageError

NET = "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { a = Add(x, w)  y = Relu(a) }"
BRANCHES = """g (float[N,2] x, bool c) => (float[N,2] y) <float[2] w = {1, 2}> {
    y = If (c) <then_branch = t () => (float[N,2] p) { p = Add(x, w) },
                else_branch = e () => (float[N,2] q) <float[2] v = {3, 4}> { q = Sub(x, v) }>
}"""
FUNCTION = """<ir_version: 10, opset_import: ["": 17, "local": 1]>
g (float[N,2] x) => (float[N,2] y) { y = local.twice(x) }
<domain: "local", opset_import: ["": 17]> twice (x) => (y) { y = Add(x, x) }"""
RANDOM = np.random.default_rng(0).standard_normal((64, 128), dtype=np.float32)


def replace_weight(graph: Graph, array: np.ndarray) -> Graph:
    graph.model.graph.initializers["w"].const_value = ir.Tensor(array, name="w")
    return graph


def external(tmp_path: Path, read) -> Path:
    graph = replace_weight(read("g (float[N,128] x) => (float[N,128] y) <float[1] w = {0}> { y = Add(x, w) }"), RANDOM)
    graph.save(tmp_path / "model.onnx", external=True)
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("text", [NET, BRANCHES, FUNCTION])
@pytest.mark.parametrize("with_data", [True, False])
def test_save_and_load_keep_the_graph(tmp_path, read, text, with_data):
    graph = read(text)
    graph.save(tmp_path / "m.onnx", external=with_data)
    loaded = Graph.load(tmp_path / "m.onnx")
    loaded.verify()
    assert loaded.fingerprint() == graph.fingerprint()
    assert loaded.input_names == graph.input_names
    assert loaded.output_names == ("y",)


def test_large_weights_go_beside_the_model_and_stay_on_disk(tmp_path, read):
    graph = replace_weight(read(NET), np.zeros((1 << 19, 2), np.float32))
    graph.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    assert (tmp_path / "m.onnx.data").stat().st_size == graph.weight_bytes == 1 << 22
    loaded = Graph.load(tmp_path / "m.onnx")
    assert isinstance(loaded.model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert loaded.fingerprint() == graph.fingerprint()
    assert loaded.to_proto().graph.initializer[0].data_location != onnx.TensorProto.EXTERNAL


def test_loaded_graph_can_be_moved(tmp_path, read):
    loaded = Graph.load(external(tmp_path, read))
    (tmp_path / "other").mkdir()
    loaded.save(tmp_path / "other" / "n.onnx", external=False)
    (tmp_path / "model.onnx.data").unlink()
    moved = Graph.load(tmp_path / "other" / "n.onnx")
    np.testing.assert_array_equal(moved.model.graph.initializers["w"].const_value.numpy(), RANDOM)


def test_constants_with_external_data_are_read(tmp_path):
    tensor = onnx.numpy_helper.from_array(RANDOM, "w")
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, RANDOM.shape)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output]), ir_version=8)
    options = {"save_as_external_data": True, "size_threshold": 0, "convert_attribute": True, "location": "m.data"}
    onnx.save(model, tmp_path / "m.onnx", **options)
    graph = Graph.load(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(graph.to_proto().graph.node[0].attribute[0].t), RANDOM)


def test_saving_over_the_own_weights_is_refused(tmp_path, read):
    path = external(tmp_path, read)
    with pytest.raises(GraphError, match=r"weights are read from .*model.onnx.data itself"):
        Graph.load(path).save(path)


def test_failed_save_leaves_what_was_there(tmp_path, read, monkeypatch):
    path = external(tmp_path, read)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(StorageError, match=r"cannot write .*model.onnx: No space left on device"):
        read(NET).save(path, external=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_graph_above_two_gigabytes_makes_no_message_but_infers(read):
    class Huge(ir.Tensor):
        nbytes = 3 << 30

    graph = read(NET)
    graph.model.graph.initializers["w"].const_value = Huge(np.zeros(2, np.float32), name="w")
    graph.infer()
    with pytest.raises(GraphError, match=r"too large for one protobuf message(.|\n)*3.2 GB"):
        graph.to_proto()


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x08\x08\x12\x03abc"])
def test_file_that_is_no_model(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"m.onnx is not (an|a whole) ONNX model"):
        Graph.load(tmp_path / "m.onnx")


def test_truncated_model(tmp_path, read):
    content = read(NET).to_proto().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(GraphError, match=r"m.onnx is not (an|a whole) ONNX model"):
        Graph.load(tmp_path / "m.onnx")


def test_missing_file(tmp_path):
    with pytest.raises(GraphError, match=r"cannot read .*m.onnx: No such file"):
        Graph.load(tmp_path / "m.onnx")


def test_model_newer_than_onnx(tmp_path, read):
    proto = read(NET).to_proto()
    proto.ir_version = 99
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=r"newer than the installed onnx(.|\n)*found: 99"):
        Graph.load(tmp_path / "m.onnx")


def test_missing_external_data(tmp_path, read):
    path = external(tmp_path, read)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(GraphError, match=r"external data of tensor 'w' is missing(.|\n)*model.onnx.data"):
        Graph.load(path)


def test_short_external_data(tmp_path, read):
    path = external(tmp_path, read)
    os.truncate(tmp_path / "model.onnx.data", 100)
    with pytest.raises(GraphError, match=r"external data of tensor 'w' is cut short(.|\n)*a file of 100 bytes"):
        Graph.load(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link"])
def test_external_data_outside_the_folder(tmp_path, read, location, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    path = external(tmp_path / "inner", read)
    (tmp_path / "inner" / "link").symlink_to(tmp_path / "secret")
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    monkeypatch.chdir(path.parent)  # a relative path must not switch the check off
    with pytest.raises(GraphError, match="external data of tensor 'w' lies outside the model's folder"):
        Graph.load(path.name)


def test_names_given_twice():
    tensor = onnx.numpy_helper.from_array(RANDOM[:1, :2], "w")
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {NET}')
    proto.graph.initializer.append(tensor)
    with pytest.raises(GraphError, match="initializer 'w' is given twice"):
        Graph.from_proto(proto)
    text = '<ir_version: 8, opset_import: ["": 17]> g (float x) => (float y) { y = Relu(x)  y = Neg(x) }'
    with pytest.raises(GraphError, match=r"makes no graph(.|\n)*Output 'y' is redeclared"):
        Graph.from_proto(onnx.parser.parse_model(text))


def test_clone_is_independent_and_shares_weights(read):
    graph = read(NET)
    copy = graph.clone()
    assert copy.model.graph.initializers["w"].const_value is graph.model.graph.initializers["w"].const_value
    replace_weight(copy, np.zeros(2, np.float32))
    copy.model.graph.node(0).name = "renamed"
    assert graph.fingerprint() == read(NET).fingerprint() != copy.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        NET.replace("{1, 2}", "{1, 3}"),
        NET.replace("Relu", "Neg"),
        NET.replace("float[N,2] x", "float[M,2] x"),
        NET.replace("Add(x, w)", "Add(w, x)"),
        NET.replace("Relu(a)", "LeakyRelu(a)"),
        NET.replace("Relu(a)", "LeakyRelu <alpha = 0.5> (a)"),
        NET.replace(" a ", " b ").replace("(a)", "(b)"),
    ],
)
def test_fingerprint_tells_graphs_apart(read, other):
    assert read(other).fingerprint() != read(NET).fingerprint()


@pytest.mark.parametrize("text", [BRANCHES, FUNCTION])
def test_fingerprint_sees_subgraphs_and_functions(read, text):
    changed = text.replace("{3, 4}", "{3, 5}").replace("Add(x, x)", "Mul(x, x)")
    assert read(changed).fingerprint() != read(text).fingerprint()


def test_fingerprint_ignores_documentation(read):
    graph = read(NET)
    before = graph.fingerprint()
    graph.model.doc_string = graph.model.graph.doc_string = graph.model.graph.node(0).doc_string = "words"
    graph.model.metadata_props["author"] = "someone"
    assert graph.fingerprint() == before


def test_infer_fills_in_shapes_and_types_in_subgraphs_too(read):
    graph = read(BRANCHES)
    inner = next(node for node in graph.nodes() if node.op_type == "Sub").outputs[0]
    assert str(inner.shape) == "[N,2]"
    assert graph.precisions() == {"float32": 3}


def test_infer_reads_branches_that_hold_equal_constants(read):
    branch = "Constant <value = int64[1] {2}> ()  n = Shape(x)  s = Concat <axis = 0> (k, n)"
    text = f"""g (float[2] x, bool c) => (int64[2] y) {{
        y = If (c) <then_branch = t () => (int64[2] s) {{ k = {branch} }},
                    else_branch = e () => (int64[2] s) {{ k = {branch} }}> }}"""
    assert read(text).precisions() == {"int64": 7}


def test_infer_reports_contradictions(read):
    with pytest.raises(GraphError, match=r"shapes or types contradict each other(.|\n)*Incompatible dimensions"):
        read("g (float[2,3] x) => (float[2,2] y) { y = MatMul(x, x) }")


def test_what_inspect_shows(read):
    graph = read(FUNCTION)
    assert graph.operators() == {"local::twice": 1, "Add": 1}
    assert graph.opset == 17
    assert read(NET).weight_bytes == 8
    assert read(NET).precisions() == {"float32": 2}


def test_inputs_with_a_default_are_not_asked_for(read):
    graph = read("g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }")
    assert graph.input_names == ("x",)


def test_weights_are_not_left_mapped(tmp_path, read):
    graph = read("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    values = np.arange(1000, dtype=np.float32)
    weight = ir.Value(name="w", const_value=ir.tensor(values, name="w"))
    graph.model.graph.register_initializer(weight)
    graph.save(tmp_path / "m.onnx", external=True)
    loaded = Graph.load(tmp_path / "m.onnx")
    tensor = loaded.model.graph.initializers["w"].const_value
    loaded.fingerprint()
    assert tensor.raw is None
    view = tensor.numpy()
    loaded.save(tmp_path / "copy.onnx", external=True)
    np.testing.assert_array_equal(view, values)
    np.testing.assert_array_equal(tensor.numpy(), values)
    del view
    loaded.save(tmp_path / "again.onnx", external=True)
    assert tensor.raw is None
