"""A model compiled on one machine, and again on another that was given the first one's cache."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser

import enginesmith as es
from enginesmith.compiler.calibration import calibration
from enginesmith.compiler.machine import environment
from enginesmith.compiler.storage.archive import export_entries, import_entries
from enginesmith.compiler.storage.cache import Cache

NET = """<ir_version: 8, opset_import: ["": 17]>
    g (float[8,16] x) => (float[8,16] y) { h = MatMul(x, u)  r = Relu(h)  y = MatMul(r, w) }"""


def test_another_machine_takes_engines_and_statistics_and_measures_anew(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=random.standard_normal((64, 16), np.float32))
    model = onnx.parser.parse_model(NET)
    for name in ("u", "w"):
        array = random.standard_normal((16, 16), np.float32) / 4
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "net.onnx")

    def compiled(name: str) -> es.Bundle:
        return es.compile(
            tmp_path / "net.onnx",
            tmp_path / name,
            data=tmp_path / "data.npz",
            targets=["onnxruntime-cpu"],
            precisions=["fp32", "int8"],
            baselines=(),
            rounds=6,
            slice_s=0.01,
        )

    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "first"))
    first = compiled("first-out")
    assert not first.cached
    assert compiled("first-again").cached
    export_entries(Cache(), tmp_path / "cache.tar")

    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "second"))
    import_entries(Cache(), tmp_path / "cache.tar")
    monkeypatch.setattr(environment, "_cpu", lambda: {"model": "another processor", "cores": 64})
    collected = []
    monkeypatch.setattr(calibration, "observe", lambda *arguments: collected.append(arguments))
    second = compiled("second-out")
    assert not second.cached
    assert collected == []
    built = [engine for engine in second.manifest["engines"] if engine["status"] == "ready"]
    assert {engine["name"]: engine["cached"] for engine in built} == dict.fromkeys(
        ("onnxruntime-cpu-fp32", "onnxruntime-cpu-int8"), True
    )
    assert second.manifest["benchmark"] != first.manifest["benchmark"]
    assert all(engine["validation"]["samples"] for engine in built)
    log = (second.path / "engines" / "onnxruntime-cpu-int8" / "build.log").read_text()
    assert "taken from the cache: same graph and options, built on another machine" in log
