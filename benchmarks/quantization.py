"""Static and dynamic INT8 against ONNX Runtime's quantizers and NVIDIA's Model-Optimizer, on the same data.

Every candidate gets the same simplified fp32 graph and the same calibration batches, and is judged on the same held-out
batches by ONNX Runtime on the CPU: decibels of signal over error of the output, and the measure of the task. Then all
are timed in one interleaved benchmark against fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _results import RESULTS, command, write
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from quantization_cases import Arrays, Case, Data, cases

from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.capture import capture
from enginesmith.compiler.data import resized
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.manifest import Benchmark
from enginesmith.compiler.signature import Signature, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import EnginesmithError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.passes.quantize_static import QuantizeStatic
from enginesmith.targets._onnxruntime import HostRunner, Session, examine, failures
from enginesmith.targets._openvino import OpenVINORunner
from enginesmith.targets.base import Runner
from enginesmith.targets.openvino import OpenVINO

OURS = "enginesmith static"
IN_OPENVINO = ", in OpenVINO"
FAMILIES = ("enginesmith static", "enginesmith mixed", "enginesmith dynamic", "ORT static", "ORT dynamic")
FAMILIES += ("Model-Optimizer",)

METRIC_POINTS = 0.3
"""How far the score of a trained model may be below that of fp32, in points of a hundred."""

HELD = {"characters": "enginesmith dynamic"}
"""Whose first candidate is held to the promises, where that is not static INT8."""

PEERS = {
    "enginesmith static": ("ORT static", "Model-Optimizer"),
    "enginesmith mixed": ("ORT static", "Model-Optimizer"),
    "enginesmith dynamic": ("ORT dynamic",),
}

SPEED_LIMITS = {"resnet50": 3.6}
"""Least speed-up of static INT8 over ONNX Runtime fp32 at batch 1, on a processor with VNNI."""

OFF: dict[str, Any] = {"method": "minmax", "search": False, "rounding": "nearest", "equalize": False, "smooth": 0.0}
OFF |= {"bias_correction": False, "first_float": False}
SWITCHES: dict[str, tuple[Any, ...]] = {
    "method": ("moving-average", "percentile", "entropy", "mse"),
    "search": (True,),
    "rounding": ("gptq",),
    "equalize": (True,),
    "smooth": (0.5,),
    "bias_correction": (True,),
    "first_float": (True,),
}
"""Options of quantize-static that change accuracy. Each is measured alone, and switched off from the defaults."""

MIXED = "precision:to=int8,scheme=onnxruntime"
"""INT8 where sensitivity allows it, fp32 elsewhere."""

CALIBRATORS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "moving average": (CalibrationMethod.MinMax, {"CalibMovingAverage": True}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile 99.999": (CalibrationMethod.Percentile, {}),
    "percentile 99.99": (CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
}
"""ONNX Runtime's, but for Distribution: it is meant for float 8, and destroys a graph of u8."""

MODELOPT: dict[str, dict[str, Any]] = {
    f"{method}, {placement}": {"calibration_method": method, **options}
    for method in ("max", "entropy")
    for placement, options in {
        "default operators": {},
        "weighted operators": {"op_types_to_quantize": ["Conv", "Gemm", "MatMul"], "disable_mha_qdq": True},
    }.items()
}

WEIGHTED = ["Conv", "Gemm", "MatMul"]
PLACEMENTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "all operators": ([], {}),
    "weighted operators": (WEIGHTED, {}),
    "weighted operators, float outputs": (WEIGHTED, {"OpTypesToExcludeOutputQuantization": WEIGHTED}),
}
"""The best settings known for each kind of model: every operator for CNNs, products with weights for transformers."""

INT8 = ("ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger")
INT8 += ("QAttention", "QGemm", "QLinearConv", "QLinearMatMul")
FLOAT = ("Attention", "Conv", "GRU", "Gemm", "LSTM", "MatMul")
"""How the names of ONNX Runtime's nodes begin that multiply integers, and how those end that multiply floats."""

FAILURES = (EnginesmithError, TypeError, AttributeError, LookupError, *failures())
"""What quantizers raise on a model that they cannot take."""


@dataclasses.dataclass
class Work:
    """A model made ready: its fp32 graph on disk, its data, and where candidates are written."""

    case: Case
    folder: Path
    signature: Signature
    fp32: Path
    data: Data
    calibration: Calibration

    @classmethod
    def prepare(cls, case: Case, folder: Path) -> Work:
        model = load_model(case.source, weights=case.weights, inputs=parse_inputs(case.inputs, case.dynamic))
        captured = capture(
            model, opset_range=(13, 20), samples=None, seed=0, directory=folder, log=lambda line: None, required=True
        )
        assert captured.graph is not None
        for name in ("simplify", "dedupe"):
            parse_pass(name)(captured.graph, Context(model.signature))
        captured.graph.save(folder / "fp32.onnx", external=False)
        data = case.data()
        return cls(case, folder, model.signature, folder / "fp32.onnx", data, Calibration(data.calibration))

    def outputs(self, path: Path, *, openvino: bool = False) -> np.ndarray:
        """The first output for every held-out row."""
        runner, name = self.runner(path, openvino=openvino), self.signature.outputs[0].name
        return np.concatenate([runner.run(batch)[name] for batch in self.data.held_out])

    def runner(self, path: Path, *, openvino: bool = False) -> Runner:
        """What runs a graph: a session of ONNX Runtime, or what the target `openvino` makes of it."""
        outputs = [spec.name for spec in self.signature.outputs]
        if openvino:
            return OpenVINORunner(OpenVINO().compiled(path, "int8"), outputs)
        return HostRunner(Session().open(path), outputs)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration batches as ONNX Runtime asks for them."""

    def __init__(self, work: Work) -> None:
        self._left = iter(work.data.calibration)

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


Make = Callable[[Work, Path], None]
"""Writes the quantized model to a path."""


def ours(text: str, work: Work, path: Path) -> None:
    graph = Graph.load(work.fp32)
    result = parse_pass(text)(graph, Context(work.signature, work.data.calibration, work.calibration))
    if not result.modified:
        raise EnginesmithError("; ".join({refusal.reason for refusal in result.refusals}))
    graph.save(path, external=False)


def preprocessed(work: Work) -> Path:
    """The graph as ONNX Runtime wants it before its quantizers."""
    path = work.folder / "preprocessed.onnx"
    if not path.exists():  # symbolic shape inference raises on graphs from torch's dynamo exporter
        quant_pre_process(work.fp32, path, skip_symbolic_shape=True)
    return path


def ort_static(calibrator: str, placement: str, work: Work, path: Path) -> None:
    method, options = CALIBRATORS[calibrator]
    operators, more = PLACEMENTS[placement]
    model = preprocessed(work)
    graph = onnx.load(model).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node.name for node in graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]
    quantize_static(
        model,
        path,
        Reader(work),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=operators,
        nodes_to_exclude=products if operators else [],
        calibrate_method=method,
        extra_options={**options, **more},
        calibration_cache_path=work.folder / f"{calibrator}.json",
    )


def ort_dynamic(per_channel: bool, work: Work, path: Path) -> None:
    quantize_dynamic(preprocessed(work), path, weight_type=QuantType.QInt8, per_channel=per_channel)


def modelopt(python: Path, options: Mapping[str, Any], work: Work, path: Path) -> None:
    data = work.folder / "calibration.npz"
    batches = enumerate(work.data.calibration)
    np.savez(data, **{f"{number}/{name}": array for number, batch in batches for name, array in batch.items()})
    worker = Path(__file__).with_name("modelopt_worker.py")
    arguments = [python, worker, work.fp32, data, path, json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=work.folder)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])


def candidates(python: Path | None) -> dict[str, dict[str, Make]]:
    """By family, what is to be measured."""
    default, plain = QuantizeStatic(), QuantizeStatic(**OFF)
    untried = QuantizeStatic(method="auto", bias_correction=True)
    alone = [dataclasses.replace(plain, **{name: value}) for name, values in SWITCHES.items() for value in values]
    without = [dataclasses.replace(untried, **{name: value}) for name, value in OFF.items()]
    texts = dict.fromkeys(map(str, (default, dataclasses.replace(default, rounding="gptq"), *without, plain, *alone)))
    made: tuple[dict[str, Make], ...] = (
        {text: partial(ours, text) for text in texts},
        {MIXED: partial(ours, MIXED)},
        {"quantize-dynamic": partial(ours, "quantize-dynamic")},
        {f"{c}, {p}": partial(ort_static, c, p) for c in CALIBRATORS for p in PLACEMENTS},
        {"per channel": partial(ort_dynamic, True), "per tensor": partial(ort_dynamic, False)},
        {name: partial(modelopt, python, options) for name, options in MODELOPT.items() if python},
    )
    return dict(zip(FAMILIES, made, strict=True))


def measure(work: Work, families: Mapping[str, Mapping[str, Make]]) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Every candidate's error and scores, fp32 first, and the files of those that could be made."""
    expected = work.outputs(work.fp32)
    rows = [{"family": "fp32", "name": "fp32", "scores": work.case.metric(expected, work.data.held_out, expected)}]
    files = {"fp32": work.fp32}
    for family, made in families.items():
        for number, (name, make) in enumerate(made.items()):
            row: dict[str, Any] = {"family": family, "name": name}
            path = work.folder / f"{family}-{number}.onnx"
            try:
                make(work, path)
                found = work.outputs(path)
                row["int8_nodes"], row["float_nodes"] = weighted_nodes(path, work.data.held_out[0], work)
            except FAILURES as error:
                row["error"] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            else:
                row["snr_db"] = snr_db(expected, found)
                row["scores"] = work.case.metric(found, work.data.held_out, expected)
                row["bytes"] = path.stat().st_size
                files[f"{family}: {name}"] = path
            print(" ", line(row), flush=True)
            rows.append(row)
            if family == OURS and number == 0 and "error" not in row:
                path = work.folder / "openvino.onnx"
                rows.append(in_openvino(work, path, expected))
                files[f"{OURS}: {rows[-1]['name']}"] = path
    return rows, files


def in_openvino(work: Work, path: Path, expected: np.ndarray) -> dict[str, Any]:
    """Static INT8 as the target `openvino` places it, run by OpenVINO."""
    text = str(QuantizeStatic(scheme="openvino"))
    ours(text, work, path)
    found = work.outputs(path, openvino=True)
    row = {"family": OURS, "name": f"{text}{IN_OPENVINO}", "snr_db": snr_db(expected, found)}
    row |= {"scores": work.case.metric(found, work.data.held_out, expected), "bytes": path.stat().st_size}
    print(" ", line(row), flush=True)
    return row


def snr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Decibels of the signal over the error."""
    error = float(np.square(expected.astype(np.float64) - found).sum())
    return 10 * float(np.log10(np.square(expected.astype(np.float64)).sum() / max(error, 1e-30)))


def weighted_nodes(path: Path, sample: Arrays, work: Work) -> tuple[int, int]:
    """Convolutions, products and recurrent layers that ONNX Runtime runs on 8-bit integers, and on floats."""
    operators = examine(path, Session(), sample, work.folder / "examined")["operators"]
    int8 = sum(count for name, count in operators.items() if name.startswith(INT8))
    return int8, sum(count for name, count in operators.items() if name.endswith(FLOAT) and not name.startswith(INT8))


def line(row: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in row.get("scores", {}).items())
    snr = f"{row['snr_db']:7.2f} dB" if "snr_db" in row else f"{'':10}"
    nodes = f"{row['int8_nodes']:3} int8 {row['float_nodes']:3} float" if "int8_nodes" in row else f"{'':18}"
    return f"{row['family'] + ': ' + row['name']:56} {snr} {nodes}  {row.get('error') or scores}"


def timed(work: Work, files: Mapping[str, Path], protocol: Settings) -> Benchmark:
    """All candidates against fp32, interleaved, at the smallest and the usual size."""
    usual = work.signature.sizes()
    smallest = {name: axis.min for name, axis in work.signature.axes.items()}
    sized = [
        SizedInputs(sizes, next(iter(sizes.values())), resized(work.signature, work.data.held_out[0], sizes))
        for sizes in ([smallest] if smallest == usual else [smallest, usual])
    ]
    made = [
        Candidate(name, partial(work.runner, path, openvino=name.endswith(IN_OPENVINO))) for name, path in files.items()
    ]
    return benchmark(made, sized, baseline="fp32", protocol=protocol)


def broken(name: str, result: Mapping[str, Any]) -> list[str]:
    """The promises that a model's results do not keep, asked of the first of our candidates.

    A peer counts where at least as many of its convolutions and products run on integers as of ours: leaving some in
    float is no way to be more accurate at the same bit width. Model-Optimizer counts always, as it places Q/DQ for
    TensorRT, which ONNX Runtime does not fuse.
    """
    family = HELD.get(name, "enginesmith static")
    rows = result["candidates"]
    mine = next((row for row in rows if row["family"] == family), None)
    if mine is None:
        return []
    if "error" in mine:
        return [f"{mine['name']}: {mine['error']}"]
    found = []
    for row in rows:
        counts = row["family"] == "Model-Optimizer" or row.get("int8_nodes", 0) >= mine["int8_nodes"]
        if row["family"] in PEERS[family] and counts and row.get("snr_db", -np.inf) > mine["snr_db"]:
            found.append(f"{row['family']}: {row['name']} has {row['snr_db']:.2f} dB, ours {mine['snr_db']:.2f}")
    measure, score = next(iter(mine["scores"].items()))
    lost = rows[0]["scores"][measure] - score
    if cases()[name].scored and lost > METRIC_POINTS:
        found.append(f"{measure} is {lost:.2f} points below fp32 (limit {METRIC_POINTS})")
    if name in SPEED_LIMITS and "benchmark" in result:
        ours = f"{mine['family']}: {mine['name']}"
        timings = [
            timing
            for timing in result["benchmark"]["timings"]
            if timing["batch"] == 1 and (timing["candidate"] == ours or timing["candidate"].endswith(IN_OPENVINO))
        ]
        speed = max((t["speed_up"]["ratio"] for t in timings), default=0.0)
        if speed < SPEED_LIMITS[name]:
            found.append(f"{speed:.2f} times as fast as fp32 at batch 1 (limit {SPEED_LIMITS[name]})")
    return found


def main() -> int:
    options = parse_options()
    families = candidates(options.modelopt_python)
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    protocol = Settings(rounds=options.rounds, slice_s=options.slice_s)
    for name in options.models:
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            work = Work.prepare(cases()[name], Path(folder))
            chosen = {family: made for family, made in families.items() if family in options.families}
            rows, files = measure(work, chosen)
            results[name] = {"command": command(), "candidates": rows}
            if not options.no_speed:
                results[name]["benchmark"] = timed(work, files, protocol)
                show(results[name]["benchmark"])
        results[name]["broken"] = broken(name, results[name])
        for promise in results[name]["broken"]:
            print(f"  BROKEN: {promise}")
        write("quantization", results, options.out)
    return int(any(results[name]["broken"] for name in options.models))


def show(timings: Benchmark) -> None:
    for timing in timings["timings"]:
        ratio = timing["speed_up"]
        speed = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "baseline"
        print(f"  b{timing['batch']:<4} {timing['candidate']:62} {timing['p50_ms']:8.3f} ms  {speed}")
    for name, reason in timings["skipped"].items():
        print(f"  {name}: {reason}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--modelopt-python", type=Path, help="interpreter with nvidia-modelopt; left out without it")
    parser.add_argument("--no-speed", action="store_true", help="accuracy alone")
    parser.add_argument("--rounds", type=int, default=12, help="of the timing")
    parser.add_argument("--slice-s", type=float, default=0.2, help="seconds of a candidate in a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantization.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
