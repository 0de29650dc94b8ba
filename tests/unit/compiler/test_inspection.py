import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from enginesmith.compiler.inspection import inspect, inspect_groups
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import SourceError, UnknownNameError
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


def test_a_bundle_shows_what_the_caches_of_a_row_take(bundle):
    folder, name = bundle
    assert "cache_row_bytes" not in inspect(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"][0]["details"]["cache_row_bytes"] = 4096
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert inspect(folder)["cache_row_bytes"] == {name: 4096}


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


LAYERS = """<ir_version: 8, opset_import: ["" : 17]>
main (float[n,3,4,4] x) => (float[n,4,4,4] y)
    <float[8,3,1,1] w, float[4,8,1,1] v> { h = Conv(x, w)  y = Conv(h, v) }"""


def layers(path):
    """Two convolutions of random weights."""
    model = onnx.parser.parse_model(LAYERS)
    for name, shape in (("w", (8, 3, 1, 1)), ("v", (4, 8, 1, 1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, path)
    return path


def test_parameters_multiply_adds_and_their_aligned_share(tmp_path):
    found = inspect(layers(tmp_path / "m.onnx"))
    assert found["parameters"] == 8 * 3 + 4 * 8
    assert found["macs"] == 16 * (8 * 3 + 4 * 8)  # of one image
    assert found["aligned_share"] == {"8": 0.0, "16": 0.0}


def test_an_engine_counts_at_its_own_sizes(tmp_path):
    layers(tmp_path / "model.onnx")
    spec = TensorSpec("x", "float32", ("n", 3, 4, 4))
    signature = Signature((spec,), (dataclasses.replace(spec, name="y"),), {"n": AxisRange(1, 8, 16)})
    EngineInfo("e", "onnxruntime-cpu", "fp32", "model.onnx", signature).write(tmp_path)
    assert inspect(tmp_path)["macs"] == 8 * 16 * (8 * 3 + 4 * 8)


def test_groups_of_a_file(tmp_path):
    first, second = inspect_groups(str(layers(tmp_path / "m.onnx")), {})
    assert (first["size"], first["may_shrink"], second["may_shrink"]) == (8, True, False)
    assert len(inspect_groups(str(tmp_path / "m.onnx"), {}, everything=True)) > 2


def test_groups_of_a_bundle_are_those_of_its_best_graph(bundle):
    folder, name = bundle
    layers(folder / "engines" / name / "model.onnx")
    assert len(inspect_groups(str(folder), {})) == 2
    assert len(inspect_groups(str(folder / "engines" / name), {})) == 2


def test_groups_of_an_engine_that_is_no_graph(bundle):
    folder, name = bundle
    other = next(path for path in (folder / "engines").iterdir() if path.name != name)
    with pytest.raises(SourceError, match=r"is no ONNX graph\n.*found: model\.pt\n.*the model that it was made from"):
        inspect_groups(str(other), {})


def test_groups_of_a_bundle_without_graphs(bundle):
    folder, name = bundle
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"] = [engine for engine in manifest["engines"] if engine["name"] != name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SourceError, match=r"no engine of '.*' is an ONNX graph"):
        inspect_groups(str(folder), {})


def test_groups_of_a_model_that_is_captured(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()\n"
    )
    fields = {"inputs": ("input:1x4",), "dynamic": ("input:0=1..2..8",)}
    first, second = inspect_groups(f"{file}:make", fields)
    assert (first["size"], first["may_shrink"]) == (6, True)
    assert second["why_not_shrink"].startswith("it is an output of the model")


def test_fields_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown field of the recipe 'inputz'"):
        inspect_groups(f"{tmp_path}/model.py:make", {"inputz": ()})
