"""enginesmith's pick on a CPU beside what else one would run there, interleaved, on the same inputs.

Candidates: torch eager, torch.compile with frozen weights, ONNX Runtime with default options on the plain export,
OpenVINO with default options on it (bfloat16 where the processor has it), OpenVINO on NNCF's INT8, and the engine that
the ladder found best. The error of each is the relative L2 against torch in fp32, on inputs that no quantizer has seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _results import RESULTS, command, write
from measured import MODELS, Measured

import enginesmith
from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.compiler.benchmark.baselines import torch_baselines
from enginesmith.compiler.capture import capture
from enginesmith.compiler.data import open_data
from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.trial import open_runner
from enginesmith.errors import EnginesmithError
from enginesmith.targets._onnxruntime import HostRunner
from enginesmith.targets._openvino import OpenVINORunner
from enginesmith.targets.base import Arrays, Runner

BATCHES = {
    "digits": (1, 64),
    "minilm": (1, 8),
    "resnet50": (1, 8),
    "vit_b16": (1,),
    "bert_base": (1,),
    "dlrm": (256,),
    "lstm_tagger": (1,),
}
TRANSFORMERS = ("minilm", "vit_b16", "bert_base")
CALIBRATED, HELD_OUT = 32, 8
"""Samples in batches of those that are measured: to quantize with, and to take errors on."""
CLOSE = 0.15
"""Relative L2 up to which a candidate counts as a rival: what enginesmith allows an engine in 8 bits."""
PICK = "enginesmith"
SAMPLE = Path(__file__).parents[1] / "samples" / "digits"


class Work:
    """One model at one batch size: its graph, its data, and what runs it."""

    def __init__(self, name: str, batch: int, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.batch, self.folder, self.options = name, batch, folder, options
        self.measured = MODELS[name] if name != "digits" else None
        self.source, self.weights, inputs = _source(self.measured)
        dynamic = [f"{text.partition(':')[0]}:0=1..{batch}..{batch}" for text in inputs]
        self.inputs, self.dynamic = list(inputs), dynamic
        self.signature = parse_inputs(inputs, dynamic)
        calibration, held_out = (CALIBRATED, HELD_OUT) if batch < 64 else (16 * batch, 4 * batch)
        arrays = _arrays(self.measured, calibration + held_out)
        self.calibration, self.held_out = folder / "calibration.npz", folder / "held_out.npz"
        np.savez(self.calibration, **{key: array[:calibration] for key, array in arrays.items()})
        np.savez(self.held_out, **{key: array[calibration:] for key, array in arrays.items()})
        self.model = load_model(self.source, weights=self.weights, inputs=self.signature)
        self.batches = list(open_data(str(self.held_out), self.model.signature))
        made = capture(
            self.model,
            opset_range=(13, 20),
            samples=None,
            seed=0,
            directory=folder,
            log=lambda line: None,
            required=True,
        )
        assert made.graph is not None
        self.plain = folder / "plain.onnx"
        made.graph.save(self.plain)
        self.outputs = [spec.name for spec in self.model.signature.outputs]

    def pick(self) -> tuple[Callable[[], Runner], dict[str, Any]]:
        """The engine that the ladder finds best, and how it was found."""
        bundle = enginesmith.compile(
            self.source,
            self.folder / "bundle",
            weights=self.weights,
            inputs=self.inputs,
            dynamic=self.dynamic,
            data=self.held_out,
            calibration_data=self.calibration,
            targets=("onnxruntime-cpu", "openvino"),
            effort=self.options.effort,
            baselines=(),
        )
        best = bundle.manifest["verdict"]["best"]
        found = bundle.manifest.get("ladder")
        assert best
        assert found
        steps = [f"{s['step']}: {s['what']}" for s in found["steps"] if s["status"] == "kept"]
        facts = {"engine": best, "target": bundle.engine(best)["target"], "kept": steps, "ladder_s": found["seconds"]}
        return partial(open_runner, bundle.path, bundle.engine(best)), facts

    def onnxruntime(self) -> Runner:
        import onnxruntime

        return HostRunner(onnxruntime.InferenceSession(str(self.plain)), self.outputs)

    def openvino(self, path: Path) -> Runner:
        import openvino

        core = openvino.Core()
        return OpenVINORunner(core.compile_model(core.read_model(path), "CPU"), self.outputs)

    def nncf(self) -> Path:
        """The model quantized as NNCF's documentation says for its kind."""
        data, output = self.folder / "nncf.npz", self.folder / "nncf.xml"
        batches = enumerate(open_data(str(self.calibration), self.model.signature))
        np.savez(data, **{f"{number}/{key}": array for number, batch in batches for key, array in batch.items()})
        options = {"model_type": "TRANSFORMER"} if self.name in TRANSFORMERS else {"preset": "MIXED"}
        worker = Path(__file__).with_name("nncf_worker.py")
        arguments = [self.options.nncf_python, worker, self.plain, data, output, json.dumps(options)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
        return output

    def error(self, runner: Runner, expected: list[Arrays]) -> float:
        """The worst relative L2 of an output over the held-out batches."""
        found = [runner.run(batch) for batch in self.batches]
        return max(relative_l2(f[n], e[n]) for f, e in zip(found, expected, strict=True) for n in self.outputs)


def _source(measured: Measured | None) -> tuple[str, Path | None, tuple[str, ...]]:
    if measured is None:
        return f"{SAMPLE / 'model.py'}:digits", SAMPLE / "digits.safetensors", ("image:1x1x8x8",)
    return measured.source, None, measured.inputs


def _arrays(measured: Measured | None, count: int) -> dict[str, np.ndarray]:
    if measured is not None:
        return measured.arrays(count)
    with np.load(SAMPLE / "calibration.npz") as file:
        return {"image": np.resize(file["image"], (count, *file["image"].shape[1:]))}


def measure(work: Work, protocol: Settings) -> dict[str, Any]:
    """Errors and times of all candidates."""
    import torch._inductor.config

    torch._inductor.config.freezing = True  # without it torch.compile is slower than eager on a CNN
    makers: dict[str, Callable[[], Any]] = {
        candidate.name: candidate.runner  # type: ignore[dict-item]
        for candidate in torch_baselines(work.model, compiled=True)
    }
    makers["onnxruntime"] = work.onnxruntime
    makers["openvino"] = partial(work.openvino, work.plain)
    skipped: dict[str, str] = {}
    if work.options.nncf_python:
        try:
            makers["openvino, NNCF int8"] = partial(work.openvino, work.nncf())
        except RuntimeError as error:
            skipped["openvino, NNCF int8"] = str(error)
    makers[PICK], facts = work.pick()
    expected: list[Arrays] = [work.model.reference.run(batch) for batch in work.batches]
    errors: dict[str, float] = {}
    opened: dict[str, Any] = {}
    for name, make in makers.items():
        with _skipping(name, skipped):
            opened[name] = make()
            errors[name] = work.error(opened[name], expected)
    sized = SizedInputs(work.signature.sizes(), work.batch, work.batches[0])
    candidates = [Candidate(name, opened[name]) for name in errors]
    result = benchmark(candidates, [sized], baseline=PICK, protocol=protocol)
    for runner in opened.values():
        runner.close()
    timings = {timing["candidate"]: timing for timing in result["timings"]}
    rows = {
        name: {
            "relative_l2": errors[name],
            **{key: timing[key] for key in ("p50_ms", "p99_ms", "samples_per_s")},
            "against_pick": timing["speed_up"],
        }
        for name, timing in timings.items()
    }
    rivals = [name for name, row in rows.items() if name != PICK and row["relative_l2"] <= CLOSE]
    faster = [name for name in rivals if rows[name]["against_pick"]["low"] > 1]
    return {
        "command": command(),
        "pick": facts,
        "candidates": rows,
        "faster_than_pick": faster,
        "skipped": {**skipped, **result["skipped"]},
        "protocol": result["protocol"],
    }


@contextlib.contextmanager
def _skipping(name: str, skipped: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, EnginesmithError) as error:
        skipped[name] = str(error).splitlines()[0]


def show(name: str, batch: int, row: Mapping[str, Any]) -> None:
    print(f"\n{name}, batch {batch}: {row['pick']['engine']}, found in {row['pick']['ladder_s']:.0f} s")
    for candidate, found in sorted(row["candidates"].items(), key=lambda item: item[1]["p50_ms"]):
        gain = found["against_pick"]
        ratio = f"{1 / gain['ratio']:6.2f} times the pick's time" if gain else ""
        print(f"  {candidate:22} {found['p50_ms']:9.3f} ms  relative L2 {found['relative_l2']:.1e}  {ratio}")
    for candidate, reason in row["skipped"].items():
        print(f"  {candidate}: {reason}")
    for peer in row["faster_than_pick"]:
        print(f"  BROKEN: {peer} is faster than the pick")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--effort", choices=["quick", "default", "thorough"], default="default")
    parser.add_argument("--nncf-python", type=Path, help="interpreter with nncf; left out without it")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--slice-s", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_engines.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    measured = []
    for name in options.models:
        for batch in BATCHES[name]:
            with tempfile.TemporaryDirectory() as folder:
                work = Work(name, batch, Path(folder), options)
                row = measure(work, Settings(rounds=options.rounds, slice_s=options.slice_s))
            show(name, batch, row)
            results[f"{name} b{batch}"] = row
            measured.append(row)
            write("cpu_engines", results, options.out)
    return int(any(row["faster_than_pick"] for row in measured))


if __name__ == "__main__":
    sys.exit(main())
