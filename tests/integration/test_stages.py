"""Real models in stages: the same outputs as the whole engine's, and an engine like any other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import enginesmith
from enginesmith.compiler.manifest import EngineRecord

ROOT = Path(__file__).parents[2]
DIGITS = ["compile", "--recipe", ROOT / "samples/digits/recipe.yaml", "--precision", "fp32", "--no-benchmark"]
TARGETS = ["onnxruntime-cpu", "pipeline:stages=2,micro_batch=3", "pipeline:stages=3"]


def models():
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks/models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs_of(bundle, inputs):
    """By engine."""
    names = [record["name"] for record in json.loads((bundle / "manifest.json").read_text())["engines"]]
    found = {}
    for name in names:
        with enginesmith.load(bundle, name) as engine:
            found[name] = engine.run(inputs)
    return found


def assert_equal_within_noise(found, whole="onnxruntime-cpu-fp32"):
    """Micro-batches have other shapes than the batch, for which kernels may sum in another order."""
    assert len(found) > 1
    for outputs in found.values():
        assert list(outputs) == list(found[whole])
        for name, array in outputs.items():
            expected = found[whole][name]
            assert array.shape == expected.shape
            assert np.linalg.norm(array - expected) <= 1e-6 * np.linalg.norm(expected)


def test_digits_in_stages(enginesmith, tmp_path):
    bundle = tmp_path / "bundle"
    targets = [word for target in TARGETS for word in ("--target", target)]
    outcome = enginesmith(*DIGITS, *targets, "-o", bundle)
    assert outcome.code == 0, outcome
    found = outputs_of(bundle, {"image": np.load(ROOT / "samples/digits/test.npz")["image"][:64]})
    assert list(found) == ["onnxruntime-cpu-fp32", "pipeline-fp32", "pipeline-fp32-2"]
    assert_equal_within_noise(found)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [engine["validation"]["passed"] for engine in manifest["engines"]] == [True, True, True]
    cuts = [record for record in manifest["passes"] if record["text"].startswith("partition")]
    assert [len(record["details"]["stages"]) for record in cuts] == [2, 3]


def test_stages_from_the_command_line(enginesmith, tmp_path):
    bundle = tmp_path / "bundle"
    asked = ["--target", "onnxruntime-cpu", "--stages", "2", "--stage-devices", "cpu", "--micro-batch", "4"]
    assert enginesmith(*DIGITS, *asked, "-o", bundle).code == 0
    record: EngineRecord
    (record,) = json.loads((bundle / "manifest.json").read_text())["engines"]
    assert (record["name"], record["status"]) == ("pipeline-fp32", "ready")
    assert sorted(path.name for path in (bundle / "engines/pipeline-fp32/stages").iterdir()) == ["0", "1"]
    assert "stages: 2" in (bundle / "recipe.yaml").read_text()
    assert enginesmith("validate", bundle).code == 0
    measured = enginesmith("bench", bundle, "--rounds", "6", "--slice-s", "0.01", "--baseline", "none", "--json")
    assert {timing["candidate"] for timing in json.loads(measured.out)["timings"]} == {"pipeline-fp32"}
    assert "pipeline" in (bundle / "report.html").read_text()
    debugged = json.loads(enginesmith("debug", bundle, "--json").out)
    assert not any("could not be compared" in note for note in debugged["notes"])
    (bundle / "engines/pipeline-fp32/stages/1/model.onnx").write_bytes(b"")
    assert "stages/1/model.onnx changed after it was written" in enginesmith("validate", bundle).err


def test_more_stages_than_nodes_is_told(enginesmith, model, tmp_path):
    outcome = enginesmith(
        "compile", model / "model.py:net", "--input", "x:1x4", "--data", model / "data.npz", "--dynamic", "x:0=1..2..8",
        "--target", "onnxruntime-cpu", "--precision", "fp32", "--stages", "9", "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert outcome.code == 4
    assert "the graph cannot be cut into 9 stages" in outcome.err


def test_devices_without_stages(enginesmith, model, tmp_path):
    outcome = enginesmith(
        "compile", model / "model.py:net", "--input", "x:1x4", "--stage-devices", "cpu", "--target", "onnxruntime-cpu",
        "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert outcome.code == 2
    assert "stage_devices is given, and no stages" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("resnet50", np.s_[:, :, :64, :64], id="resnet50"),
        pytest.param("minilm", np.s_[:, :32], id="minilm"),
    ],
)
def test_a_large_model_in_stages(name, part, tmp_path, own_cache):
    source = models()
    inputs = {key: array[part] for key, array in getattr(source, f"{name}_inputs")(5).items()}
    texts = [f"{key}:{'x'.join(map(str, array.shape))}:{array.dtype}" for key, array in inputs.items()]
    bundle = enginesmith.compile(
        getattr(source, name)(), tmp_path / "bundle", inputs=texts, dynamic=[f"{key}:0=1..5..8" for key in inputs],
        targets=TARGETS[:2], precisions=["fp32"], benchmark=False, max_samples=1, exporter="torchscript",
    )  # fmt: skip
    assert bundle.passed
    found = outputs_of(bundle.path, inputs)
    assert_equal_within_noise(found)
