"""The main job on a small model: compile, judge, measure, load, and the same again from the cache and the recipe."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml

import enginesmith as es
from enginesmith.errors import EngineError, VerdictError

ENGINE = "onnxruntime-cpu-fp32"


@pytest.fixture
def bundle(enginesmith, model, arguments) -> Path:
    outcome = enginesmith(*arguments, "--target", "torchscript")
    assert outcome.code == 0, outcome
    return model / "out"


def test_bundle_holds_what_it_promises(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["verdict"]["passed"] is True
    assert {engine["name"]: engine["status"] for engine in manifest["engines"]} == {
        ENGINE: "ready",
        "torchscript-fp32": "ready",
    }
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    expected = {"recipe.yaml", "report.html", "reference/inputs.npz", "reference/outputs.npz"}
    expected |= {f"engines/{ENGINE}/{name}" for name in ("model.onnx", "engine.json", "reproduce.sh", "build.log")}
    assert expected <= files
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_engines_agree_with_torch(bundle, model):
    import runpy

    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    with torch.inference_mode():
        expected = runpy.run_path(str(model / "model.py"))["net"]()(torch.from_numpy(x)).numpy()
    for name in (ENGINE, "torchscript-fp32"):
        with es.load(bundle, name) as engine:
            np.testing.assert_allclose(engine(x=x), expected, rtol=1e-5, atol=1e-6)


def test_validate_and_bench_again(enginesmith, bundle, model):
    outcome = enginesmith("validate", bundle, "--json")
    assert outcome.code == 0
    assert {validation["engine"] for validation in json.loads(outcome.out)} == {ENGINE, "torchscript-fp32"}
    np.savez(model / "new.npz", x=np.full((5, 4), 0.5, np.float32))
    assert enginesmith("validate", bundle, "--engine", ENGINE, "--data", model / "new.npz", "--quiet") == (0, "", "")
    quick = ["--rounds", "6", "--slice-s", "0.01", "--json"]
    outcome = enginesmith("bench", bundle, "--baseline", ENGINE, *quick)
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert result["baseline"] == ENGINE
    assert {timing["candidate"] for timing in result["timings"]} == {ENGINE, "torchscript-fp32"}
    assert {timing["batch"] for timing in result["timings"]} == {1, 4, 8}


def test_a_wrong_engine_is_found(enginesmith, bundle, model, arguments):
    weights = {"hidden.weight": torch.zeros(8, 4), "hidden.bias": torch.ones(8), "head.bias": torch.ones(3)}
    torch.save({**weights, "head.weight": torch.ones(3, 8)}, model / "other.pt")
    assert enginesmith(*arguments, "--weights", model / "other.pt", "-o", model / "other").code == 0
    for name in ("inputs.npz", "outputs.npz"):
        shutil.copy(bundle / "reference" / name, model / "other" / "reference" / name)
    outcome = enginesmith("validate", model / "other")
    assert outcome.code == 1
    assert "FAIL" in outcome.out
    assert "relative_l2 is" in outcome.out


def test_bundle_says_fail_and_exits_1_where_the_tolerance_is_not_met(enginesmith, model, arguments):
    outcome = enginesmith(*arguments, "--tolerance", "fp32.relative_l2=1e-12")
    assert outcome.code == 1
    assert json.loads((model / "out" / "manifest.json").read_text())["verdict"]["passed"] is False
    with pytest.raises(EngineError, match="failed validation"):
        es.load(model / "out")


def test_unchanged_compile_comes_from_the_cache(enginesmith, bundle, model, arguments):
    again = [*arguments, "--target", "torchscript", "-o", model / "again"]
    assert "taken from the cache" in enginesmith(*again).out
    assert (model / "again" / "manifest.json").read_text() == (bundle / "manifest.json").read_text()
    (model / "model.py").write_text((model / "model.py").read_text() + "\n# changed\n")
    assert "taken from the cache" not in enginesmith(*again).out


def test_an_unchanged_compile_imports_nothing_heavy(enginesmith, model, arguments):
    weights = model / "weights.pt"
    shapes = {"hidden.weight": (8, 4), "hidden.bias": (8,), "head.weight": (3, 8), "head.bias": (3,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, weights)
    assert enginesmith(*arguments, "--weights", weights).code == 0
    heavy = "{'torch', 'onnx', 'onnxruntime', 'matplotlib', 'polygraphy', 'sympy'}"
    code = (
        "import sys\nfrom enginesmith import compile\n"
        f"assert compile(recipe={str(model / 'out/recipe.yaml')!r}, output={str(model / 'again')!r}).cached\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_changed_data_build_no_engine_again(enginesmith, bundle, model, arguments):
    np.savez(model / "data.npz", x=np.zeros((4, 4), np.float32))
    outcome = enginesmith(*arguments, "--json")
    manifest = json.loads(outcome.out)
    assert [engine["cached"] for engine in manifest["engines"]] == [True]


def test_recipe_in_the_bundle_gives_the_same_engines(enginesmith, bundle, model):
    recipe = yaml.safe_load((bundle / "recipe.yaml").read_text())
    assert recipe["targets"] == ["onnxruntime-cpu", "torchscript"]
    assert enginesmith("compile", "--recipe", bundle / "recipe.yaml", "-o", model / "again").code == 0
    one, two = (es.Bundle.open(path).manifest["files"] for path in (bundle, model / "again"))
    assert one[f"engines/{ENGINE}/model.onnx"] == two[f"engines/{ENGINE}/model.onnx"]


def test_reproduction_script_is_valid_shell(bundle):
    script = bundle / "engines" / ENGINE / "reproduce.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert "--target onnxruntime-cpu" in script.read_text()


def test_inspect(enginesmith, bundle, model):
    assert json.loads(enginesmith("inspect", bundle, "--json").out)["kind"] == "bundle"
    engine = json.loads(enginesmith("inspect", bundle / "engines" / ENGINE, "--json").out)
    assert engine["operators"]["Gemm"] == 2
    graph = json.loads(enginesmith("inspect", bundle / "engines" / ENGINE / "model.onnx", "--json").out)
    assert graph["graph inputs"][0]["name"] == "x"
    assert engine["parameters"] == graph["parameters"] > 0
    assert enginesmith("inspect", bundle).code == 0


def test_inspect_groups(enginesmith, bundle, model, arguments):
    groups = json.loads(enginesmith("inspect", bundle, "--groups", "--json").out)
    assert [group["may_shrink"] for group in groups] == [True, False]
    captured = enginesmith("inspect", *arguments[1 : arguments.index("--target")], "--groups", "--json")
    assert [group["size"] for group in json.loads(captured.out)] == [group["size"] for group in groups]
    assert "may grow    no: it is an output of the model" in enginesmith("inspect", bundle, "--groups", "--all").out


def test_python_api_with_a_module(tmp_path, own_cache):
    made = es.compile(
        torch.nn.Linear(4, 2), tmp_path / "out", inputs=["input:2x4"], targets=["onnxruntime-cpu"], benchmark=False
    )
    assert made.passed
    assert made.manifest["data"]["random"] is True
    assert made.load()(input=np.zeros((2, 4), np.float32)).shape == (2, 2)


def test_random_inputs_are_called_out(enginesmith, model, arguments):
    without_data = [argument for argument in arguments if "data" not in argument]
    outcome = enginesmith(*without_data)
    assert outcome.code == 0
    assert "Inputs were random" in outcome.out
    assert "random" in (model / "out" / "report.html").read_text()


def test_two_precisions_and_one_that_a_target_lacks(enginesmith, model, arguments):
    outcome = enginesmith(*arguments, "--precision", "fp32,fp16", "--json")
    manifest = json.loads(outcome.out)
    assert [engine["name"] for engine in manifest["engines"]] == [ENGINE, "onnxruntime-cpu-fp16"]
    assert all(engine["validation"]["passed"] for engine in manifest["engines"])
    assert any(record["text"] == "cast" for record in manifest["passes"])


def test_doctor(enginesmith):
    result = json.loads(enginesmith("doctor", "--target", "onnxruntime-cpu", "--json").out)
    assert [(target["target"], target["usable"]) for target in result["targets"]] == [("onnxruntime-cpu", True)]
    assert set(result["machine"]["gpu_software"]) == {"driver", "cuda", "cudnn"}


def test_schema(enginesmith):
    assert "targets" in json.loads(enginesmith("schema").out)["properties"]


def test_weights_beside_an_onnx_file_of_any_name_are_seen_by_the_cache(enginesmith, bundle, model):
    proto = onnx.load(bundle / "engines" / ENGINE / "model.onnx")
    onnx.save(proto, model / "net.model", save_as_external_data=True, location="w.bin", size_threshold=0)
    arguments = ["compile", model / "net.model", "--input", "x:1x4", "--dynamic", "x:0=1..4..8", "--no-benchmark"]
    arguments += ["--target", "onnxruntime-cpu", "-o", model / "first", "--json"]
    first = json.loads(enginesmith(*arguments).out)["source"]["fingerprint"]
    weights = np.fromfile(model / "w.bin", np.float32)
    (weights * 3).tofile(model / "w.bin")
    assert json.loads(enginesmith(*arguments).out)["source"]["fingerprint"] != first


def test_what_a_data_function_yields_is_never_taken_from_the_cache(enginesmith, model, arguments):
    np.save(model / "x.npy", np.zeros((4, 4), np.float32))
    (model / "data.py").write_text(f"import numpy\ndef batches():\n    yield {{'x': numpy.load('{model}/x.npy')}}\n")
    arguments = [*arguments, "--data", f"{model}/data.py:batches"]
    assert enginesmith(*arguments).code == 0
    np.save(model / "x.npy", np.zeros((4, 5), np.float32))
    assert enginesmith(*arguments).code == 2


def test_bundle_that_cannot_be_judged_here_is_unproven(enginesmith, model, arguments):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    outcome = enginesmith(*arguments[:-5], "--target", "tensorrt-rtx", "--no-benchmark", "-o", model / "out")
    verdict = json.loads((model / "out" / "manifest.json").read_text())["verdict"]
    assert outcome.code == 0
    assert (verdict["state"], verdict["judged"], verdict["best"]) == ("unproven", 0, None)


def test_check_raises_on_a_negative_verdict(enginesmith, bundle, model, arguments):
    assert es.Bundle.open(bundle).check().passed
    enginesmith(*arguments, "--tolerance", "fp32.relative_l2=1e-12", "-o", model / "bad")
    with pytest.raises(VerdictError, match=r"bundle .* failed\n.*failed its validation"):
        es.Bundle.open(model / "bad").check()


def test_bench_takes_an_engine_as_baseline_beside_those_asked_for(enginesmith, bundle):
    quick = ["--rounds", "6", "--slice-s", "0.01", "--json"]
    outcome = enginesmith("bench", bundle, "--engine", "torchscript-fp32", "--baseline", ENGINE, *quick)
    assert json.loads(outcome.out)["baseline"] == ENGINE


def test_bundle_of_a_module_is_measured_without_torch(enginesmith, tmp_path, own_cache):
    es.compile(torch.nn.Linear(4, 2), tmp_path / "out", inputs=["input:2x4"], benchmark=False)
    outcome = enginesmith("bench", tmp_path / "out", "--rounds", "6", "--slice-s", "0.01", "--json")
    assert "was given in Python" in json.loads(outcome.out)["skipped"]["torch"]
    refused = enginesmith("compile", "--recipe", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "again")
    assert refused.code == 2
    assert "must be given again" in refused.err


def test_changed_code_builds_the_engine_again(enginesmith, bundle, model, arguments, monkeypatch):
    monkeypatch.setattr("enginesmith.compiler.reuse.code_digest", lambda: "changed")
    np.savez(model / "data.npz", x=np.zeros((4, 4), np.float32))
    manifest = json.loads(enginesmith(*arguments, "--json").out)
    assert [engine["cached"] for engine in manifest["engines"]] == [False]
