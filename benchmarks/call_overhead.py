"""What a call of a loaded engine costs over the bare ONNX Runtime session.

Both run the same tiny model on the same array, in short interleaved rounds of random order. The cost of a call is the
median over its rounds of each round's mean, and the difference is what enginesmith adds.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime
from _results import write

from enginesmith.compiler.engine import load
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.files import hashes
from enginesmith.targets.base import EngineInfo

LIMIT_US = 50.0
ROUNDS, CALLS = 60, 500
MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, 64] image, float[batch, 8] extra) => (float[batch, 64] y, float[batch, 8] z)
{ y = Relu(image)  z = Neg(extra) }
"""
SIGNATURE = Signature(
    inputs=(TensorSpec("image", "float32", ("batch", 64)), TensorSpec("extra", "float32", ("batch", 8))),
    outputs=(TensorSpec("y", "float32", ("batch", 64)), TensorSpec("z", "float32", ("batch", 8))),
    axes={"batch": AxisRange(1, 1, 8)},
    structure={"dict": {"y": "y", "z": "z"}},
)


def write_bundle(bundle: Path) -> Path:
    """A bundle with one engine; returns its model."""
    folder = bundle / "engines" / "tiny"
    folder.mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    EngineInfo("tiny", "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, options={"threads": 1}).write(folder)
    record = {"name": "tiny", "target": "onnxruntime-cpu", "status": "ready", "validation": None}
    manifest = {"format": 1, "signature": SIGNATURE.to_json(), "engines": [record], "benchmark": None}
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "files": hashes(bundle)}))
    return folder / "model.onnx"


def microseconds(call: Callable[[], object]) -> float:
    """Mean microseconds of a call in one round."""
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - start) / CALLS / 1e3


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = write_bundle(Path(folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        engine = load(folder)
    inputs = {"image": np.ones((1, 64), np.float32), "extra": np.ones((1, 8), np.float32)}
    calls: dict[str, Callable[[], object]] = {
        "session": lambda: session.run(["y", "z"], inputs),
        "engine": lambda: engine(inputs),
    }
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for call in calls.values():
        microseconds(call)  # warm-up
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            rounds[name].append(microseconds(calls[name]))
    session_us, engine_us = (statistics.median(rounds[name]) for name in ("session", "engine"))
    added_us = engine_us - session_us
    result = {"session_us": session_us, "engine_us": engine_us, "added_us": added_us, "limit_us": LIMIT_US}
    write("call_overhead", {**result, "rounds": ROUNDS, "calls_a_round": CALLS})
    print(json.dumps({name: round(value, 1) for name, value in result.items()}))
    print(f"a call adds {added_us:.1f} us to the session's {session_us:.1f} us; the limit is {LIMIT_US:.0f} us")
    return int(added_us > LIMIT_US)


if __name__ == "__main__":
    raise SystemExit(main())
