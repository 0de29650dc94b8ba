"""`enginesmith diagnose` on real models, engines and bundles; ceilings are measured with short runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.bundle import Bundle
from enginesmith.compiler.diagnosis import stopwatch
from enginesmith.compiler.diagnosis.roofline import roofline_of
from enginesmith.compiler.signature import Signature
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.validation.reference import ReferenceOutputs

ROOT = Path(__file__).parents[2]
DIGITS = [
    f"{ROOT}/samples/digits/model.py:digits", "--weights", f"{ROOT}/samples/digits/digits.safetensors",
    "--input", "image:1x1x8x8", "--dynamic", "image:0=1..8..64", "--data", f"{ROOT}/samples/digits/test.npz",
]  # fmt: skip

TRANSFORMER = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embed = torch.nn.Embedding(50, width)
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.head = torch.nn.Linear(4 * width, 50)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v
        return self.head(torch.nn.functional.gelu(self.up(x)))

def net():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Ceilings from short runs, which are low, so that a layer of the engine may be above."""
    monkeypatch.setattr(stopwatch, "EACH_S", 0.01)
    monkeypatch.setattr(stopwatch, "WORKING_BYTES", (2**18, 2**22))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with model.py:net, ids.npz, and its bundle in fp32 and int8."""
    import enginesmith as es

    folder = tmp_path_factory.mktemp("transformer")
    (folder / "model.py").write_text(TRANSFORMER)
    np.savez(folder / "ids.npz", ids=np.random.default_rng(0).integers(0, 50, (16, 32)))
    es.compile(
        f"{folder}/model.py:net", folder / "out", inputs=["ids:1x32:int64"], dynamic=["ids:0=1..4..8"],
        data=str(folder / "ids.npz"), targets=["onnxruntime-cpu"], precisions=["fp32", "int8"], benchmark=False,
    )  # fmt: skip
    return folder


@pytest.fixture
def transformer(made, tmp_path) -> list[str]:
    """A copy of that model, as options of the command line."""
    for name in ("model.py", "ids.npz"):
        shutil.copy(made / name, tmp_path / name)
    given = ["--input", "ids:1x32:int64", "--dynamic", "ids:0=1..4..8", "--data", f"{tmp_path}/ids.npz"]
    return [f"{tmp_path}/model.py:net", *given]


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    """A copy of that bundle, to change."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def check(roofline) -> dict:
    """What holds of every roofline; gives its layers by operator."""
    assert math.isclose(
        sum(node["ms"] for node in roofline["nodes"]) + roofline["outside_ms"], roofline["total_ms"], rel_tol=1e-6
    )
    assert math.isclose(sum(roofline["bounds"].values()), sum(node["ms"] for node in roofline["nodes"]), rel_tol=1e-6)
    assert roofline["peak_gflops"] > 0
    assert roofline["bandwidth_gb_s"] > 0
    assert roofline["unmapped_ms"] <= 0.7 * roofline["total_ms"]  # others at work may hold up one layer
    for node in roofline["nodes"]:
        assert node["ms"] >= 0
        assert node["bound"] in ("compute", "bandwidth", "launch", "unknown")
        assert 0 <= node["share"] <= 1
    savings = [action["saves_ms"] for action in roofline["actions"]]
    assert savings == sorted(savings, reverse=True)
    assert all(0 < saved <= roofline["total_ms"] * 1.01 for saved in savings)
    return {node["operator"]: node for node in roofline["nodes"]}


def test_digits_as_a_model(enginesmith):
    outcome = enginesmith("diagnose", *DIGITS, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    value = json.loads(outcome.out)
    assert value["kind"] == "model"
    assert value["missing"] == {}
    (engine,) = value["engines"]
    roofline = engine["roofline"]
    layers = check(roofline)
    assert layers["Conv"]["flops"] > 1e5
    assert layers["Conv"]["covers"]
    assert 0 < engine["input_share"] < 1
    assert engine["use"]["call_ms"] == roofline["total_ms"]
    eager = value["torch"]
    assert "aten::conv2d" in {row["name"] for row in eager["operators"]}
    counted = sum(row["flops"] for row in eager["operators"] if row["name"] == "aten::conv2d")
    convolutions = sum(node["flops"] for node in roofline["nodes"] if node["operator"] == "Conv")
    assert convolutions == pytest.approx(counted, rel=0.01), "what torch counts by its own formulas"
    assert "stem.0" in {row["name"] for row in eager["modules"]}


def test_a_transformer_as_a_model_for_people(enginesmith, transformer):
    outcome = enginesmith("diagnose", *transformer, "--top", "3")
    assert outcome.code == 0, outcome.err
    assert "torch eager on cpu" in outcome.out
    assert "time by bound:" in outcome.out
    assert "MatMul" in outcome.out or "Gemm" in outcome.out
    assert "what would help" in outcome.out
    assert " more, " in outcome.out
    assert "not input-bound" in outcome.out or "input-bound" in outcome.out


def test_the_engines_of_a_bundle(enginesmith, bundle, tmp_path):
    given = ("-e", "onnxruntime-cpu-fp32", "-e", "onnxruntime-cpu-int8")
    outcome = enginesmith("diagnose", bundle, *given, "--json", "-q")
    assert outcome.code == 0, outcome.err
    value = json.loads(outcome.out)
    wide, narrow = (engine["roofline"] for engine in value["engines"])
    check(wide)
    check(narrow)
    assert (wide["precision"], narrow["precision"]) == ("fp32", "int8")
    assert "--precision int8" in {action["action"] for action in wide["actions"]}
    before = {node["name"]: node for node in wide["nodes"]}
    products = [node for node in narrow["nodes"] if node["precision"] == "int8"]
    assert len(products) == 3
    assert all(node["bytes"] < 0.8 * before[node["name"]]["bytes"] for node in products)
    one = json.loads(enginesmith("diagnose", bundle / "engines" / "onnxruntime-cpu-int8", "--json", "-q").out)
    assert [engine["roofline"]["engine"] for engine in one["engines"]] == ["onnxruntime-cpu-int8"]
    np.savez(tmp_path / "new.npz", ids=np.zeros((8, 32), np.int64))
    again = enginesmith("diagnose", bundle, "--data", tmp_path / "new.npz", "--json", "-q")
    assert json.loads(again.out)["reading"]["description"] == "new.npz"


def test_what_the_ladder_found_stands_beside_the_estimates(enginesmith, bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    fp32 = "onnxruntime-cpu-fp32"
    plain = {
        "target": "onnxruntime-cpu", "reason": "", "size_bytes": 0, "relative_l2": None, "budget": None,
        "seconds": 1.0, "resumed": False, "samples_per_s": None,
    }  # fmt: skip
    ratio = {"against": fp32, "ratio": 1.5, "low": 1.4, "high": 1.6}
    steps = [
        {**plain, "step": "captured graph", "what": "onnxruntime-cpu", "candidate": f"{fp32[:-5]}-captured",
         "status": "start", "ratio": None, "p50_ms": 1.0},
        {**plain, "step": "simplify", "what": "simplify", "candidate": fp32, "status": "kept", "ratio": None,
         "p50_ms": 1.0},
        {**plain, "step": "quantization", "what": "int8 quantize-static", "candidate": "onnxruntime-cpu-int8",
         "status": "kept", "ratio": ratio, "p50_ms": 0.4},
    ]  # fmt: skip
    manifest["ladder"] = {"steps": steps, "picks": {"onnxruntime-cpu": "onnxruntime-cpu-int8"}}
    manifest["verdict"]["best"] = "onnxruntime-cpu-int8"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = enginesmith("diagnose", bundle, "--json", "-q")
    assert outcome.code == 0, outcome.err
    rooflines = {engine["roofline"]["engine"]: engine["roofline"] for engine in json.loads(outcome.out)["engines"]}
    assert list(rooflines) == ["onnxruntime-cpu-int8", fp32], "the pick, and where the ladder began"
    (found,) = (action for action in rooflines[fp32]["actions"] if action["action"] == "--precision int8")
    assert found["found_ms"] == pytest.approx(0.2)
    assert found["found"].startswith("kept: saved 0.2 ms (1.50 times as fast as onnxruntime-cpu-fp32")
    assert rooflines[fp32]["estimates"].startswith("the ladder checked 1 estimate against this engine: 1 of them saved")
    shown = enginesmith("diagnose", bundle, "-e", fp32)
    assert "the ladder found" in shown.out
    assert "saved 0.2 ms" in shown.out


def test_openvino_layers_are_mapped_to_the_graph_that_is_made_again(enginesmith, transformer, tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "ov"
    given = ("--target", "openvino", "--precision", "fp32", "--no-benchmark", "-o", out)
    assert enginesmith("compile", *transformer, *given).code == 0
    outcome = enginesmith("diagnose", out, "--json", "-q")
    assert outcome.code == 0, outcome.err
    (engine,) = json.loads(outcome.out)["engines"]
    check(engine["roofline"])
    assert "OpenVINO's counters" in engine["roofline"]["how"]
    assert sum(node["flops"] for node in engine["roofline"]["nodes"]) > 2 * 4 * 32 * 64 * (3 + 4) * 64
    (tmp_path / "model.py").unlink()
    value = json.loads(enginesmith("diagnose", out, "--json", "-q").out)
    assert "cannot be loaded any more" in value["missing"]["graph of openvino-fp32"]
    assert "there is no graph to map its layers to" in " ".join(value["engines"][0]["roofline"]["notes"])


def test_roofline_of_fails_softly(bundle, tmp_path):
    opened = Bundle.open(bundle)
    signature = Signature.from_json(opened.manifest["signature"])
    sample = next(iter(ReferenceOutputs(bundle / "reference", signature))).inputs
    record = opened.manifest["engines"][0]
    found = roofline_of(bundle, record, signature, sample, Cache(tmp_path / "cache"))
    check(found)
    json.dumps(found)
    (bundle / "engines" / record["name"] / "model.onnx").write_text("no graph")
    reasons: list[str] = []
    assert roofline_of(bundle, record, signature, sample, Cache(tmp_path / "cache"), log=reasons.append) is None
    (reason,) = reasons
    assert reason.startswith("onnxruntime-cpu-fp32: ")


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["BUNDLE", "-e", "onnxruntime-cpu-fp61"], 2, "unknown engine 'onnxruntime-cpu-fp61'"),
        (["BUNDLE", "--weights", "w.pt"], 2, "field 'weights' cannot be given with a bundle"),
        (["BUNDLE", "--data", "nowhere.npz"], 2, "data 'nowhere.npz' does not exist"),
        (["BUNDLE", "--top", "0"], 2, "0 is not in the range"),
        (["nowhere.onnx"], 3, "'nowhere.onnx' does not exist"),
        ([*DIGITS, "-e", "some"], 2, "is no bundle, so it has no engines to name"),
        ([*DIGITS, "--target", "torchscript"], 2, "target 'torchscript' takes no graph"),
        ([*DIGITS, "-t", "onnxruntime-cpu", "-t", "openvino"], 2, "a model is diagnosed on one target"),
        ([*DIGITS, "-t", "onnxruntime-cup"], 2, "unknown target 'onnxruntime-cup'"),
    ],
)  # fmt: skip
def test_bad_input(enginesmith, digits_bundle, given, code, message):
    outcome = enginesmith("diagnose", *(str(digits_bundle) if word == "BUNDLE" else word for word in given))
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert message in outcome.err


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory) -> Path:
    """Made once for bad inputs, which leave it as it is."""
    import enginesmith as es

    folder = tmp_path_factory.mktemp("digits")
    model = f"{ROOT}/samples/digits/model.py:digits"
    es.compile(
        model, folder / "out", weights=DIGITS[2], inputs=["image:1x1x8x8"], dynamic=["image:0=1..8..64"],
        targets=["onnxruntime-cpu"], precisions=["fp32"], benchmark=False,
    )  # fmt: skip
    return folder / "out"


def test_an_engine_that_was_not_built_is_an_error(enginesmith, digits_bundle, tmp_path):
    copy = Path(shutil.copytree(digits_bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["engines"][0].update(status="failed", reason="out of memory")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    outcome = enginesmith("diagnose", copy, "-e", "onnxruntime-cpu-fp32")
    assert outcome.code == 4
    assert "engine 'onnxruntime-cpu-fp32' was not built" in outcome.err


def test_a_model_that_no_exporter_captures_is_still_profiled_in_torch(enginesmith, tmp_path):
    (tmp_path / "model.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('seen', torch.zeros(4))\n\n    def forward(self, x):\n"
        "        self.seen += x.sum(0)\n        return x * self.seen\n\ndef net():\n    return Net()\n"
    )
    outcome = enginesmith("diagnose", f"{tmp_path}/model.py:net", "--input", "x:2x4", "--json", "-q")
    assert outcome.code == 0, outcome.err
    value = json.loads(outcome.out)
    assert value["engines"] == []
    assert value["torch"]["operators"]
    assert "carries state" in value["missing"]["engine"]
    assert value["reading"] is None
