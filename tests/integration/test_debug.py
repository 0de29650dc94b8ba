"""`enginesmith debug` on bundles whose engines were tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import enginesmith as es

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 4] x) => (float[N, 3] y) <float[4, 8] w, float[8, 3] v, float[3] b> {
  h = MatMul(x, w)
  r = Relu(h)
  y = Gemm(r, v, b)
}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.onnx, x.npz and a bundle of engines in fp32 and fp16."""
    folder = tmp_path_factory.mktemp("debug")
    generator = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NET)
    for value in proto.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        weight = generator.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
    del proto.graph.value_info[:]
    onnx.save(proto, folder / "net.onnx")
    np.savez(folder / "x.npz", x=generator.standard_normal((16, 4)).astype(np.float32))
    es.compile(
        folder / "net.onnx",
        folder / "out",
        dynamic=["x:0=1..4..8"],
        data=str(folder / "x.npz"),
        targets=["onnxruntime-cpu"],
        precisions=["fp32", "fp16"],
        benchmark=False,
    )
    return folder


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    """A copy of the bundle, to tamper with."""
    return Path(shutil.copytree(made / "out", tmp_path / "copy"))


def tamper(bundle: Path, engine: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Changes the graph of an engine, and its hash, as a faulty pass would have left it."""
    name = f"engines/{engine}/model.onnx"
    proto = onnx.load(bundle / name)
    change(proto)
    onnx.save(proto, bundle / name)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def flip(proto: onnx.ModelProto) -> None:
    """One weight of the last layer changes its sign."""
    weight = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) in ([3, 8], [8, 3]))
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[np.abs(array).argmax()] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def test_right_engines_do_not_diverge(enginesmith, bundle) -> None:
    outcome = enginesmith("debug", bundle)
    assert outcome.code == 0, outcome.err
    assert "onnxruntime-cpu-fp16 against reference" in outcome.out
    assert "nothing diverges" in outcome.out


def test_the_node_with_a_flipped_weight_is_named(enginesmith, bundle) -> None:
    tamper(bundle, "onnxruntime-cpu-fp32", flip)
    outcome = enginesmith("debug", bundle, "--engine", "onnxruntime-cpu-fp32")
    assert outcome.code == 1
    assert "makes the error: Gemm" in outcome.out
    assert "differs from the reference's by" in outcome.out
    value = json.loads(enginesmith("debug", bundle, "--engine", "onnxruntime-cpu-fp32", "--json", "-q").out)
    assert value["culprit"]["operator"] == "Gemm"
    assert [row["verdict"] for row in value["rows"]] == ["ok", "ok", "makes"]
    assert value["diverges"]


def renamed(bundle: Path, made: Path, name: str) -> None:
    """Lets the recipe of a bundle name another model beside the first."""
    recipe = bundle / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made / "net.onnx"), str(made / name)))


def test_two_engines_are_compared_without_the_model(enginesmith, bundle, made) -> None:
    renamed(bundle, made, "gone.onnx")
    outcome = enginesmith("debug", bundle)
    assert outcome.code == 3
    assert "cannot be loaded any more" in outcome.err
    assert "compare two engines instead" in outcome.err
    pair = ("--engine", "onnxruntime-cpu-fp16", "--against", "onnxruntime-cpu-fp32")
    assert enginesmith("debug", bundle, *pair).code == 0
    tamper(bundle, "onnxruntime-cpu-fp16", flip)
    outcome = enginesmith("debug", bundle, *pair)
    assert outcome.code == 1
    assert "makes the error: Gemm" in outcome.out


def test_another_model_than_that_of_the_bundle_is_an_error(enginesmith, bundle, made) -> None:
    proto = onnx.load(made / "net.onnx")
    flip(proto)
    onnx.save(proto, made / "other.onnx")
    renamed(bundle, made, "other.onnx")
    outcome = enginesmith("debug", bundle)
    assert outcome.code == 3
    assert "is another than it was when the bundle was made" in outcome.err


def test_new_data_and_a_threshold(enginesmith, bundle, tmp_path) -> None:
    np.savez(tmp_path / "new.npz", x=np.ones((4, 4), np.float32))
    given = ("--engine", "onnxruntime-cpu-fp16", "--data", tmp_path / "new.npz", "--threshold", "1e-6")
    outcome = enginesmith("debug", bundle, *given)
    assert outcome.code == 1
    assert "sample 0 (the worst of 1)" in outcome.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--engine", "onnxruntime-cpu-fp61"], "unknown engine 'onnxruntime-cpu-fp61'"),
        (["--against", "onnxruntime-cpu-fp61"], "unknown engine 'onnxruntime-cpu-fp61'"),
        (["-e", "onnxruntime-cpu-fp32", "--against", "onnxruntime-cpu-fp32"], "cannot be compared with itself"),
        (["--threshold", "0"], "the threshold is no bound"),
        (["--on", "onnxruntime-cup"], "unknown target 'onnxruntime-cup'"),
        (["--data", "nowhere.npz"], "data 'nowhere.npz' does not exist"),
    ],
)
def test_usage_errors(enginesmith, bundle, given, message) -> None:
    outcome = enginesmith("debug", bundle, *given)
    assert outcome.code == 2
    assert message in outcome.err


def test_an_engine_that_was_not_built_is_an_error(enginesmith, bundle) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["engines"][1].update(status="failed", reason="out of memory")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = enginesmith("debug", bundle, "--engine", "onnxruntime-cpu-fp16")
    assert outcome.code == 4
    assert "engine 'onnxruntime-cpu-fp16' was not built" in outcome.err


def test_a_module_is_captured_again_and_its_own_engines_have_no_nodes(enginesmith, arguments, model) -> None:
    assert enginesmith(*arguments, "--target", "torchscript").code == 0
    outcome = enginesmith("debug", model / "out", "--engine", "torchscript-fp32")
    assert outcome.code == 2
    assert "was built from the torch module, so it has no nodes that could be named" in outcome.err
    tamper(model / "out", "onnxruntime-cpu-fp32", flip)
    outcome = enginesmith("debug", model / "out")
    assert outcome.code == 1
    assert "makes the error: Gemm" in outcome.out


def test_an_engine_that_cannot_run_here_is_looked_at_on_another_target(enginesmith, made, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    given = ("--dynamic", "x:0=1..4..8", "--data", made / "x.npz", "--target", "tensorrt-rtx", "--precision", "fp16")
    out = tmp_path / "rtx"
    assert enginesmith("compile", made / "net.onnx", *given, "--no-benchmark", "-o", out).code == 0
    if json.loads((out / "manifest.json").read_text())["engines"][0]["status"] == "ready":
        pytest.skip("TensorRT-RTX runs here")
    outcome = enginesmith("debug", out)
    assert outcome.code == 4
    assert "engine 'tensorrt-rtx-fp16' cannot run here" in outcome.err
    assert "--on onnxruntime-cpu" in outcome.err
    outcome = enginesmith("debug", out, "--on", "onnxruntime-cpu")
    assert outcome.code == 0, outcome.err
    assert "run by onnxruntime-cpu" in outcome.out
