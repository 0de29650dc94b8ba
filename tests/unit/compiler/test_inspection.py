import json
import runpy
from pathlib import Path

import onnx
import onnx.parser
import pytest

from enginesmith.compiler.inspection import inspect
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.errors import SourceError
from enginesmith.targets.base import EngineInfo

example = runpy.run_path(str(Path(__file__).with_name("manifest_example.py")))["example"]
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
main (float[2] x) => (float[2] y) { h = Cast<to = 10>(x)  r = Relu(h)  y = Cast<to = 1>(r) }"""
OPERATORS = {"Cast": 2, "Relu": 1}
PRECISIONS = {"float16": 2, "float32": 1}
SIGNATURE = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))


def save(path):
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


@pytest.fixture
def bundle(tmp_path):
    """A bundle of one engine that is a graph and one that is not."""
    manifest = example()
    first, second = [engine for engine in manifest["engines"] if engine["status"] == "ready"][:2]
    manifest["engines"] = [first, second]
    for engine, entry in ((first, "model.onnx"), (second, "model.pt")):
        folder = tmp_path / "engines" / engine["name"]
        folder.mkdir(parents=True)
        EngineInfo(engine["name"], engine["target"], engine["precision"], entry, SIGNATURE).write(folder)
    save(tmp_path / "engines" / first["name"] / "model.onnx")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path, first["name"]


@pytest.mark.parametrize("name", ["m.onnx", "m.bin"])
def test_a_graph_is_told_by_its_content_and_its_types_are_inferred(tmp_path, name):
    found = inspect(save(tmp_path / name))
    assert found["kind"] == "ONNX graph"
    assert found["graph inputs"] == [{"name": "x", "shape": "2", "dtype": "float32"}]
    assert (found["operators"], found["precisions"]) == (OPERATORS, PRECISIONS)


def test_a_bundle_shows_the_graphs_of_its_engines(bundle):
    folder, name = bundle
    found = inspect(folder)
    assert found["operators"] == {name: OPERATORS}
    assert found["precisions"] == {name: PRECISIONS}
    assert len(found["engines"]) == 2


def test_an_engine_shows_its_graph(bundle):
    folder, name = bundle
    found = inspect(folder / "engines" / name)
    assert (found["kind"], found["engine"]) == ("engine", name)
    assert (found["operators"], found["precisions"]) == (OPERATORS, PRECISIONS)
    assert found["size_bytes"] > (folder / "engines" / name / "model.onnx").stat().st_size


def test_a_graph_whose_types_contradict_each_other_is_shown_all_the_same(tmp_path):
    text = TEXT.replace("r = Relu(h)", "r = Add(h, x)")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    assert inspect(tmp_path / "m.onnx")["precisions"] == {"unknown": 2, "float32": 1}


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        SourceError, match=r"absent\.onnx' does not exist\n.*a model file, a bundle or an engine's folder"
    ):
        inspect(tmp_path / "absent.onnx")
