"""The process that profiles with blocking launches; what runs in it stands in for ONNX Runtime on a GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.errors import EngineError
from enginesmith.targets.base import EngineInfo
from enginesmith.targets.cuda import profiler

INFO = EngineInfo("e", "onnxruntime-cuda", "fp16", "model.onnx", Signature((TensorSpec("x", "float32", (2,)),)))

WRITES = """
import json, os, sys
import numpy as np
directory, about, given, found = sys.argv[1:5]
with np.load(given) as arrays:
    total = float(arrays["arr_0"].sum())
layer = {"name": os.environ["CUDA_LAUNCH_BLOCKING"], "operator": "Conv", "ms": total, "device": "cuda",
         "transfer": False, "nodes": [], "outputs": ["y"], "flops": None, "bytes": 8.0}
value = {"layers": [layer], "how": "it", "calls": 3, "shapes": {"y": [2, 3]}, "notes": [], "complete": True}
json.dump(value, open(found, "w"))
"""


def test_a_profile_is_read_from_a_process_whose_launches_block(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "command", lambda: [sys.executable, "-c", WRITES])
    found = profiler.profile(tmp_path, INFO, {"x": np.array([1.0, 2.0], np.float32)})
    (layer,) = found.layers
    assert (layer.name, layer.ms, layer.outputs, layer.bytes) == ("1", 3.0, ("y",), 8.0)
    assert found.shapes == {"y": (2, 3)}
    assert found.notes == (profiler.NOTE,)


def test_a_process_that_fails_is_told_of_with_its_last_words(tmp_path, monkeypatch):
    fails = "import sys; print('no CUDA device', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(profiler, "command", lambda: [sys.executable, "-c", fails])
    with pytest.raises(EngineError, match="engine e could not be profiled") as raised:
        profiler.profile(tmp_path, INFO, {"x": np.zeros(2, np.float32)})
    assert raised.value.found == "exit code 3: no CUDA device"


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(profiler, "command", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(EngineError, match="engine e could not be profiled") as raised:
        profiler.profile(tmp_path, INFO, {"x": np.zeros(2, np.float32)})
    assert raised.value.found == "no end after 0.2 s"


def test_without_a_gpu_the_real_process_says_what_is_missing(tmp_path):
    from enginesmith.targets import get_target

    if get_target("onnxruntime-cuda").availability().run:
        pytest.skip("ONNX Runtime runs on a GPU here")
    with pytest.raises(EngineError, match="engine e could not be profiled") as raised:
        profiler.profile(tmp_path, INFO, {"x": np.zeros(2, np.float32)})
    assert str(raised.value.found).startswith("exit code 1: ")
