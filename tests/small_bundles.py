"""Bundles of two products, written in milliseconds and without a compile, for tests that compare engines.

left = scale (x w)    right = tanh(x v)        x: float[batch, 4], both outputs: float[batch, 3]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.files import hashes
from enginesmith.compiler.validation.metrics import TOLERANCES
from enginesmith.targets.base import EngineInfo

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 4] x) => (float[batch, 3] LEFT, float[batch, 3] RIGHT)
{
  product = MatMul(x, w)
  LEFT = Mul(product, scale)
  other = MatMul(x, v)
  RIGHT = Tanh(other)
}
"""
SLOW = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 4] x) => (float[batch, 3] left, float[batch, 3] right)
<float zero = {0}>
{
  tiles = Constant<value = int64[2] {1, 400}>()
  wide = Tile(x, tiles)
  square = MatMul(wide, big)
  again = MatMul(square, big)
  sum = ReduceSum<keepdims = 0>(again)
  nothing = Mul(sum, zero)
  product = MatMul(x, w)
  scaled = Mul(product, scale)
  left = Add(scaled, nothing)
  other = MatMul(x, v)
  right = Tanh(other)
}
"""
"""The same, with products that take far longer and change nothing."""

PATIENT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 4] x) => (float[batch, 3] left, float[batch, 3] right)
<float zero = {0}>
{
  largest = ReduceMax<keepdims = 0>(x)
  rounds = Cast<to = 7>(largest)
  yes = Constant<value = bool {1}>()
  worked = Loop<body = work (int64 number, bool go, float[300, 300] before) => (bool on, float[300, 300] after) {
    on = Identity(go)
    after = MatMul(before, big)
  }>(rounds, yes, big)
  sum = ReduceSum<keepdims = 0>(worked)
  nothing = Mul(sum, zero)
  product = MatMul(x, w)
  scaled = Mul(product, scale)
  left = Add(scaled, nothing)
  other = MatMul(x, v)
  right = Tanh(other)
}
"""
"""The same, with as many products as the largest number in x says: a request decides how long it takes."""

W = np.array([[1, -2, 0.5], [0.25, 3, -1], [2, 1, 0], [-0.5, 0.125, 4]], np.float32)
V = np.array([[0.3, 0.2, -0.5], [0.1, -0.4, 0.6], [-0.2, 0.7, 0.1], [0.5, -0.1, -0.3]], np.float32)
CHANGES = ("zeros", "nan", "swapped", "flipped", "scaled")
"""Ways to be wrong; see `write_engine`."""

Arrays = Mapping[str, np.ndarray]


def signature(low: int = 1, opt: int = 4, high: int = 8, names: Sequence[str] = ("x", "left", "right")) -> Signature:
    """Of the network, with another range of its batch or other names."""
    return Signature(
        inputs=(TensorSpec(names[0], "float32", ("batch", 4)),),
        outputs=tuple(TensorSpec(name, "float32", ("batch", 3)) for name in names[1:]),
        axes={"batch": AxisRange(low, opt, high)},
        structure={"tuple": list(names[1:])},
    )


def network(x: np.ndarray, w: np.ndarray = W) -> dict[str, np.ndarray]:
    """What the network gives."""
    return {"left": x @ w, "right": np.tanh(x @ V)}


def samples(count: int = 3, rows: int = 4) -> list[np.ndarray]:
    """Inputs."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal((rows, 4)).astype(np.float32) for _ in range(count)]


def write_engine(
    folder: Path, change: str = "", *, precision: str = "fp32", described: Signature | None = None, w: np.ndarray = W
) -> Path:
    """An engine for ONNX Runtime; `change` makes it wrong, slow or patient."""
    folder.mkdir(parents=True)
    scale = {"zeros": 0.0, "nan": np.nan, "scaled": 1.2}.get(change, 1.0)
    if change == "flipped":
        w = w.copy()
        w[2, 1] *= -1
    text = {"slow": SLOW, "patient": PATIENT}.get(change, GRAPH)
    names = ("right", "left") if change == "swapped" else ("left", "right")
    proto = onnx.parser.parse_model(text.replace("LEFT", names[0]).replace("RIGHT", names[1]))
    arrays = {"w": w, "v": V, "scale": np.float32(scale)}
    if change in ("slow", "patient"):
        arrays["big"] = np.zeros((1600, 1600) if change == "slow" else (300, 300), np.float32)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    onnx.save(proto, folder / "model.onnx")
    EngineInfo(
        folder.name, "onnxruntime-cpu", precision, "model.onnx", described or signature(), options={"threads": 1}
    ).write(folder)
    return folder


def write_bundle(
    root: Path,
    engines: Mapping[str, str] | None = None,
    *,
    times_ms: Mapping[str, float] | None = None,
    fingerprint: str = "one",
    recipe: Mapping[str, Any] | None = None,
    labels: bool = False,
    w: np.ndarray = W,
    described: Signature | None = None,
) -> Path:
    """A bundle with these engines, by name and change; its record is that of the network with the weights `w`."""
    described = described or signature()
    engines = {"plain": ""} if engines is None else engines
    for name, change in engines.items():
        write_engine(root / "engines" / name, change, described=described, w=w)
    (root / "reference").mkdir(parents=True)
    record: dict[str, dict[str, np.ndarray]] = {"inputs": {}, "outputs": {}}
    for number, x in enumerate(samples(rows=described.axes["batch"].opt)):
        record["inputs"][f"{number}/x"] = x
        if labels:
            record["inputs"][f"{number}/label"] = network(x, w)["left"].argmax(axis=1)
        record["outputs"] |= {f"{number}/{name}": array for name, array in network(x, w).items()}
    for name, arrays in record.items():
        np.savez(root / "reference" / f"{name}.npz", **arrays)
    (root / "recipe.yaml").write_text(json.dumps({"model": "net.onnx", **(recipe or {})}))
    manifest = {
        "format": 1,
        "created": "2026-11-27T12:00:00+00:00",
        "source": {"fingerprint": fingerprint},
        "signature": described.to_json(),
        "engines": [_record(name) for name in engines],
        "benchmark": {"timings": [_timing(name, ms, described) for name, ms in (times_ms or {}).items()]},
        "files": hashes(root),
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def _record(name: str) -> dict[str, Any]:
    validation = {
        "passed": True,
        "tolerance": TOLERANCES["fp32"],
        "noise_floor_of": "",
        "noise_floor": [],
        "outputs": [],
        "budget": None,
    }
    return {
        "name": name,
        "target": "onnxruntime-cpu",
        "precision": "fp32",
        "status": "ready",
        "reason": "",
        "to_do": "",
        "validation": validation,
        "sibling": None,
        "dropped": "",
        "size_bytes": 1000,
        "cached": False,
        "build_s": 0.1,
    }


def _timing(name: str, p50_ms: float, described: Signature) -> dict[str, Any]:
    batch = described.axes["batch"].opt
    times = {"p50_ms": p50_ms, "p99_ms": 2 * p50_ms, "samples_per_s": 1e3 * batch / p50_ms}
    return {"candidate": name, "sizes": described.sizes(), "batch": batch, **times}
