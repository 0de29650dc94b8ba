"""Loading needs NumPy and ONNX Runtime only: shown in a virtual environment that holds nothing else."""

import importlib.metadata
import json
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import onnx.parser
import pytest

import enginesmith
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.files import hashes
from enginesmith.targets.base import EngineInfo

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, 2] image) => (float[batch, 2] y) { y = Neg(image) }
"""
SIGNATURE = Signature(
    inputs=(TensorSpec("image", "float32", ("batch", 2)),),
    outputs=(TensorSpec("y", "float32", ("batch", 2)),),
    axes={"batch": AxisRange(1, 2, 4)},
)
SCRIPT = """
import json, sys
import numpy as np
import enginesmith

with enginesmith.load(sys.argv[1]) as engine:
    y = engine(image=np.array([[1, 2]], np.float32))
roots = sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
print(json.dumps({"name": engine.name, "y": y.tolist(), "modules": roots}))
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter whose site-packages link to this one's NumPy, ONNX Runtime and enginesmith, and to no other."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, with_pip=False)
    (site,) = root.glob("lib/python*/site-packages")
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    for name in found & {"numpy", "onnxruntime", "onnxruntime-gpu"}:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            (site / top).symlink_to(distribution.locate_file(top))
    (site / "enginesmith").symlink_to(Path(enginesmith.__file__).parent)
    return root / "bin" / "python"


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "engines" / "tiny"
    folder.mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    EngineInfo("tiny", "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, options={"threads": 1}).write(folder)
    record = {"name": "tiny", "target": "onnxruntime-cpu", "status": "ready", "validation": None}
    manifest = {"format": 1, "signature": SIGNATURE.to_json(), "engines": [record], "benchmark": None}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "files": hashes(tmp_path)}))
    return tmp_path


def python(interpreter, script, *arguments):
    return subprocess.run(
        [interpreter, "-I", "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_venv_is_bare(bare_python):
    for module in ("torch", "onnx", "click", "pydantic"):
        assert f"No module named '{module}'" in python(bare_python, f"import {module}").stderr


def test_an_engine_runs_with_numpy_and_onnxruntime_alone(bare_python, bundle):
    done = python(bare_python, SCRIPT, str(bundle))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["name"], found["y"]) == ("tiny", [[-1, -2]])
    interpreter = {"__main__", "sitecustomize"}  # Debian's Python has the second
    assert set(found["modules"]) - interpreter == {"enginesmith", "numpy", "onnxruntime"}


def test_nothing_heavy_is_imported_where_it_is_installed(bundle):
    """The same in the full environment, where an import of torch would pass unnoticed but slowly."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(bundle)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "onnx", "click", "pydantic", "psutil"} & set(json.loads(done.stdout)["modules"])


GENERATE = """
import json, sys
import enginesmith

with enginesmith.load(sys.argv[1]) as engine:
    rows = engine.generate([[3, 1, 4], [1]], 6)
    engine.generate([1], 6, do_sample=True, top_k=3, top_p=0.9, temperature=2.0)
roots = sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
print(json.dumps({"rows": rows, "modules": roots}))
"""


def test_text_is_generated_with_numpy_and_onnxruntime_alone(bare_python, tmp_path):
    small = runpy.run_path(str(Path(__file__).parents[1] / "small_decoder.py"))
    done = python(bare_python, GENERATE, str(small["write_bundle"](tmp_path)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == [small["greedy"](prompt, 6) for prompt in ([3, 1, 4], [1])]
    imported = {name for name in found["modules"] if "cython" not in name}  # what NumPy's random numbers are made with
    assert imported - {"__main__", "sitecustomize"} == {"enginesmith", "numpy", "onnxruntime"}
