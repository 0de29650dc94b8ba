"""What a user can get wrong: the documented exit code, one clear message, nothing half-written, no traceback."""

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

ONNX = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 4] x) => (float[2, 4] y) <float[4] w = {{1, 2, 3, 4}}> {{ {body} }}"""

HANG = """
import sys, time
from enginesmith.targets.onnxruntime_cpu import OnnxRuntimeCpu
from enginesmith.cli import main

def hang(self, request):
    (request.directory / "model.onnx").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)

OnnxRuntimeCpu.build = hang
main()
"""


def refused(outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def only_inputs(folder: Path) -> bool:
    """Whether nothing but what the test made, and the cache, is there."""
    return not [path for path in folder.iterdir() if path.name.startswith((".out", "out"))]


@pytest.mark.parametrize("name", ["absent.py:net", "absent.onnx", "absent.pt2", "absent.jit", "absent"])
def test_wrong_path(enginesmith, model, name):
    refused(enginesmith("compile", model / name, "--input", "x:1x4", "-o", model / "out"), 3, "does not exist")
    assert only_inputs(model)


def test_truncated_weights(enginesmith, model, arguments):
    torch.save({"hidden.weight": torch.zeros(100, 100)}, model / "whole.pt")
    (model / "net.pt").write_bytes((model / "whole.pt").read_bytes()[:3000])
    refused(enginesmith(*arguments, "--weights", model / "net.pt"), 3, "net.pt")
    assert only_inputs(model)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_weights", [True, False])
def test_pickle_with_code_is_not_run(enginesmith, model, arguments, as_weights):
    torch.save({"hidden.weight": Evil(model / "executed")}, model / "evil.pt")
    (model / "evil.bin").write_bytes(pickle.dumps(Evil(model / "executed")))
    if as_weights:
        refused(enginesmith(*arguments, "--weights", model / "evil.pt"), 3, "evil.pt")
    refused(enginesmith("compile", model / "evil.bin", "--input", "x:1x4", "-o", model / "out"), 3, "evil.bin")
    assert not (model / "executed").exists()
    assert only_inputs(model)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("a = Add(b, w) b = Add(a, x) y = Identity(b)", ["cycle"]),
        ("y = Frobnicate(x)", ["Frobnicate"]),
    ],
)
def test_broken_graphs(enginesmith, model, body, words):
    text = ONNX.format(body=body)
    onnx.save(onnx.parser.parse_model(text), model / "model.onnx")
    refused(enginesmith("compile", model / "model.onnx", "-o", model / "out"), 3, *words)
    assert only_inputs(model)


def test_external_data_outside_its_folder(enginesmith, model):
    proto = onnx.parser.parse_model(ONNX.format(body="y = Add(x, w)"))
    (weight,) = proto.graph.initializer
    weight.raw_data = np.arange(4, dtype=np.float32).tobytes()
    del weight.float_data[:]
    onnx.external_data_helper.set_external_data(weight, "../secret.bin")
    weight.ClearField("raw_data")
    (model / "inner").mkdir()
    (model / "secret.bin").write_bytes(bytes(16))
    (model / "inner" / "model.onnx").write_bytes(proto.SerializeToString())
    outcome = enginesmith("compile", model / "inner" / "model.onnx", "-o", model / "out")
    refused(outcome, 3, "secret.bin")
    assert only_inputs(model)


def test_nan_weights(enginesmith, model, arguments):
    weights = {"hidden.weight": torch.zeros(8, 4), "hidden.bias": torch.zeros(8), "head.bias": torch.zeros(3)}
    torch.save({**weights, "head.weight": torch.full((3, 8), torch.nan)}, model / "net.pt")
    refused(enginesmith(*arguments, "--weights", model / "net.pt"), 3, "head.weight", "NaN")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((4, 5), np.float32)}, ["data.npz", "wrong shape", "(4, 5)"]),
        ({"x": np.zeros((4, 4), np.float64)}, ["data.npz", "wrong dtype", "float64"]),
        ({"z": np.zeros((4, 4), np.float32)}, ["data.npz", "'x' is missing"]),
        ({"x": np.zeros((0, 4), np.float32)}, ["fewer rows than one batch"]),
    ],
)
def test_data_that_does_not_fit(enginesmith, model, arguments, arrays, words):
    np.savez(model / "data.npz", **arrays)
    refused(enginesmith(*arguments), 2, *words)
    assert only_inputs(model)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--target", "tensort"], ["unknown target 'tensort'", "did you mean 'tensorrt'?"]),
        (["--target", "onnxruntime-cpu:thread=1"], ["unknown option", "did you mean 'threads'?"]),
        (["--pass", "simplfy"], ["unknown pass 'simplfy'", "did you mean 'simplify'?"]),
        (["--precision", "fp7"], ["fp8"]),
        (["--tarket", "x"], ["--target"]),
        (["--require", "tensorrt"], ["required target 'tensorrt' is not among the targets"]),
        (["--baseline", "pytorch"], ["unknown baseline 'pytorch'"]),
        (["--recipe", "absent.yaml"], ["absent.yaml", "cannot be read"]),
    ],
)
def test_unknown_names(enginesmith, model, arguments, extra, words):
    refused(enginesmith(*arguments, *extra), 2, *words)
    assert only_inputs(model)


def test_no_model(enginesmith, tmp_path):
    refused(enginesmith("compile", "-o", tmp_path / "out"), 2, "names no model")


def test_output_that_cannot_be_written(enginesmith, model, arguments):
    (model / "file").write_text("")
    refused(enginesmith(*arguments, "-o", model / "file" / "out"), 2, "cannot be written")


def test_full_disk(enginesmith, model, arguments):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        outcome = enginesmith(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(outcome, 4, "no space left")
    assert only_inputs(model)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ended_during_a_build(own_cache, model, arguments, number, code):
    with subprocess.Popen(
        [sys.executable, "-c", HANG, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A runner in the background ignores it, and its children do unless told otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not (model / "out").exists()
    if number != signal.SIGKILL:
        assert only_inputs(model)


def test_what_a_kill_left_behind_is_gone_after_the_next_compile(enginesmith, model, arguments):
    (model / ".out.999999999.partial").mkdir()
    assert enginesmith(*arguments, "--quiet").code == 0
    assert [path.name for path in model.iterdir() if "out" in path.name] == ["out"]


def test_no_engine_left(enginesmith, model, arguments):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    outcome = enginesmith(*arguments[:-3], "--target", "onnxruntime-cuda", "--no-benchmark", "-o", model / "out")
    assert outcome.code == 0, "onnxruntime-cpu is still asked for"
    recipe = [
        "compile",
        f"{model}/model.py:net",
        "--input",
        "x:1x4",
        "--target",
        "onnxruntime-cuda",
        "-o",
        f"{model}/no",
    ]
    refused(enginesmith(*recipe), 4, "no engine could be built", "onnxruntime-cuda")
    refused(enginesmith(*recipe, "--require", "onnxruntime-cuda"), 4, "onnxruntime-cuda", "not available")
    assert not (model / "no").exists()


def test_bundle_that_is_none(enginesmith, tmp_path):
    for command in ("validate", "bench"):
        refused(enginesmith(command, tmp_path), 2, "is not a bundle", "manifest.json")
    refused(enginesmith("inspect", tmp_path / "absent"), 3, "does not exist")


def test_changed_engine_is_refused(enginesmith, model, arguments):
    assert enginesmith(*arguments).code == 0
    engine = model / "out" / "engines" / "onnxruntime-cpu-fp32" / "model.onnx"
    content = engine.read_bytes()
    engine.unlink()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(enginesmith("validate", model / "out"), 4, "model.onnx")


def test_error_as_json(enginesmith, tmp_path):
    import json

    outcome = enginesmith("compile", tmp_path / "absent.onnx", "-o", tmp_path / "out", "--json")
    assert outcome.code == 3
    error = json.loads(outcome.out)["error"]
    assert error["type"] == "SourceError"
    assert error["exit_code"] == 3


def test_output_that_holds_other_files_is_left_alone(enginesmith, model, arguments):
    (model / "precious").mkdir()
    (model / "precious" / "thesis.txt").write_text("kept")
    refused(enginesmith(*arguments, "-o", model / "precious"), 2, "holds something else than a bundle")
    assert (model / "precious" / "thesis.txt").read_text() == "kept"


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_output_that_holds_the_current_folder(enginesmith, model, arguments, monkeypatch, output):
    monkeypatch.chdir(model)
    refused(enginesmith(*arguments, "-o", output), 2, "is the current folder, or holds it")


def test_metric_and_tolerance_are_looked_up_before_any_work(enginesmith, model, arguments):
    refused(enginesmith(*arguments, "--metric", model / "absent.py:f"), 2, "absent.py")
    refused(enginesmith(*arguments, "--tolerance", "fp32.relative_l2=nan"), 2, "relative_l2")


def test_cache_size_that_is_no_number(enginesmith, arguments, monkeypatch):
    monkeypatch.setenv("ENGINESMITH_CACHE_GB", "much")
    refused(enginesmith(*arguments), 2, "ENGINESMITH_CACHE_GB holds no number")
