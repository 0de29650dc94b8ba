"""The peers that enginesmith is measured against on a GPU, each as its users run it.

    torch                fp32 and fp16, eager; its convolutions are in TF32 where fp32 is asked for
    torch.compile        fp16, modes reduce-overhead (CUDA graphs) and max-autotune
    onnxruntime          torch.onnx.export, convert_float_to_float16, the CUDA provider with its default options
    onnxruntime optimizer  the same after `onnxruntime.transformers.optimizer`, of a model that was exported with
                         attention as separate operators, the form that it knows
    tensorrt             what `trtexec --onnx=model.onnx --fp16` builds, run without and with a CUDA graph

Every step prepares files in the row's folder, and opens candidates from them.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from enginesmith.compiler.benchmark.baselines import Precision, TorchCompile, TorchEager
from enginesmith.targets import parse_target
from enginesmith.targets._onnxruntime import HostRunner, Session
from enginesmith.targets.base import Runner
from enginesmith.targets.trt.build import interpreter
from enginesmith.targets.trt.runner import open_engine
from gpu.row import Row

OPSET = 17
"""The highest that TensorRT 8.6 reads; both runtimes get the same file."""

TRANSFORMERS = {"bert_base": ("bert", 12, 768), "minilm": ("bert", 12, 384), "vit_b16": ("vit", 12, 768)}
"""Kind, heads and width, as the optimizer of ONNX Runtime wants to know them."""

Openers = Mapping[str, Callable[[], Runner]]


class Step(NamedTuple):
    """Something to prepare, and the candidates that come of it."""

    prepare: Callable[[Row], dict[str, Any]]
    candidates: Callable[[Row], Openers]
    needs_gpu: bool = False


class MaxAutotune(TorchCompile):
    """torch.compile that chooses kernels by measuring them."""

    mode = "max-autotune"


def steps(row: Row) -> dict[str, Step]:
    """The steps of a row, by name."""
    found = {
        "torch": Step(_nothing, _eager),
        "torch.compile": Step(_nothing, functools.partial(_compiled, kind=TorchCompile, name="torch.compile")),
        "max-autotune": Step(
            _nothing, functools.partial(_compiled, kind=MaxAutotune, name="torch.compile max-autotune"), needs_gpu=True
        ),
        "onnxruntime": Step(_convert, functools.partial(_session, file="plain.onnx", name="onnxruntime")),
        "tensorrt": Step(_build_plan, _plans, needs_gpu=True),
    }
    if row.model in TRANSFORMERS:
        opener = functools.partial(_session, file="optimized.onnx", name="onnxruntime optimizer")
        found["optimizer"] = Step(_optimize, opener)
    return found


def export(row: Row, file: Path, *, attention: str | None = None) -> None:
    """Exports the model in fp32 at the shapes of the row; `attention` is how transformers writes it."""
    module = row.measured.factory()
    for part in module.modules():
        if attention and hasattr(part, "set_attn_implementation"):
            part.set_attn_implementation(attention)
    signature = row.loaded.signature
    arguments = tuple(torch.from_numpy(row.sample[spec.name]) for spec in signature.inputs)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            arguments,
            str(file),
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset_version=OPSET,
            dynamo=False,
        )


def _nothing(row: Row) -> dict[str, Any]:
    return {}


def _eager(row: Row) -> Openers:
    precisions: tuple[Precision, ...] = ("fp32", "fp16") if row.device == "cuda" else ("fp32",)
    return {
        f"torch {precision}": functools.partial(TorchEager, row.loaded, row.device, precision)
        for precision in precisions
    }


def _compiled(row: Row, *, kind: type[TorchCompile], name: str) -> Openers:
    precision: Precision = "fp16" if row.device == "cuda" else "fp32"
    return {f"{name} {precision}": functools.partial(kind, row.loaded, row.device, precision)}


def _convert(row: Row) -> dict[str, Any]:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    plain = row.folder / "exported.onnx"
    export(row, plain)
    model = onnx.load(plain)
    if row.half == "fp16":
        model = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(model, row.folder / "plain.onnx")
    return {}


def _optimize(row: Row) -> dict[str, Any]:
    from onnxruntime.transformers import optimizer

    kind, heads, width = TRANSFORMERS[row.model]
    file = row.folder / "exported-eager.onnx"
    export(row, file, attention="eager")
    model = optimizer.optimize_model(
        str(file), model_type=kind, num_heads=heads, hidden_size=width, use_gpu=row.device == "cuda", opt_level=0
    )
    fused = {name: count for name, count in model.get_fused_operator_statistics().items() if count}
    if row.half == "fp16":
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(row.folder / "optimized.onnx"))
    return {"fused": fused}


def _session(row: Row, *, file: str, name: str) -> Openers:
    return {f"{name} {row.half}": functools.partial(_open_session, row, row.folder / file)}


def _open_session(row: Row, file: Path) -> Runner:
    """With default options, but inputs and outputs on the device, so that no candidate copies."""
    outputs = [spec.name for spec in row.loaded.signature.outputs]
    if row.device == "cpu":
        return HostRunner(Session().open(file), outputs)
    from enginesmith.targets.cuda.onnxruntime import DeviceRunner
    from enginesmith.targets.cuda.stream import Stream
    from enginesmith.targets.onnxruntime_cuda import CUDA

    state = parse_target("onnxruntime-cuda").availability()  # loads CUDA's libraries
    if not state.run:
        raise RuntimeError(state.reason)
    stream = Stream(0)
    session = Session(provider=CUDA, provider_options={"user_compute_stream": str(stream.handle)}).open(file)
    return DeviceRunner(session, stream, outputs, graphs=False)


def _build_plan(row: Row) -> dict[str, Any]:
    """Builds in the interpreter that has TensorRT, after onnxsim where its parser refuses the plain file."""
    exported, plan = row.folder / "exported-tensorrt.onnx", row.folder / "plain.plan"
    export(row, exported)
    cache = row.work / "trtexec.timing"
    answer = _trtexec(exported, plan, cache)
    if "parser" in answer:
        import onnx
        import onnxsim

        simplified, _ = onnxsim.simplify(onnx.load(exported))
        onnx.save(simplified, exported)
        answer = {**_trtexec(exported, plan, cache), "simplified because": answer["parser"]}
    if problem := answer.get("parser") or answer.get("error"):
        raise RuntimeError(problem)
    return answer


def _trtexec(onnx_file: Path, plan: Path, cache: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("trtexec.py")
    command = [interpreter("tensorrt"), str(script), str(onnx_file), str(plan), str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    sys.stderr.write(result.stderr)
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"TensorRT ended with {result.returncode}: {last}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _plans(row: Row) -> Openers:
    signature, plan = row.loaded.signature, row.folder / "plain.plan"
    return {
        "tensorrt fp16": functools.partial(open_engine, "tensorrt", plan, signature, cuda_graph=False),
        "tensorrt fp16, CUDA graph": functools.partial(open_engine, "tensorrt", plan, signature, cuda_graph=True),
    }
