"""What the targets tensorrt and tensorrt-rtx share: the worker's interpreter, profiles, and the build."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.signature import Signature
from ...errors import BuildError, EngineError, EnginesmithError
from .._worker import Worker
from ..base import BuildRequest
from . import worker as worker_module

if TYPE_CHECKING:
    from ...compiler.graph import Graph

SCRIPT = Path(worker_module.__file__)

_STARTING_S = 120.0  # importing TensorRT from a cold disk takes long


@dataclasses.dataclass(frozen=True)
class Found:
    """What the worker's interpreter has.

    Attributes:
        version: of TensorRT or TensorRT-RTX; None where it cannot be imported.
        polygraphy: version of Polygraphy.
        gpu: name of the first GPU; None where there is none.
        compute_capability: of that GPU, as in "9.0".
        driver: the CUDA version of the driver.
        problem: why TensorRT cannot be imported.
        gpu_problem: why there is no GPU.
    """

    version: str | None = None
    polygraphy: str | None = None
    gpu: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    problem: str = ""
    gpu_problem: str = ""

    @property
    def release(self) -> str:
        """Major and minor version, which decide whether an engine can be opened; empty where nothing is found."""
        return ".".join(self.version.split(".")[:2]) if self.version else ""

    def versions(self, module: str) -> dict[str, str]:
        """What was found, by name."""
        named = {module: self.version, "polygraphy": self.polygraphy, "driver": self.driver, "gpu": self.gpu}
        return {name: value for name, value in named.items() if value}


def host() -> str:
    """Operating system and processor, between which TensorRT's engines are not portable."""
    return f"{platform.system()} {platform.machine()}"


def variable(module: str) -> str:
    """The environment variable that names the interpreter which has the module."""
    return f"ENGINESMITH_{module.upper()}_PYTHON"


def interpreter(module: str) -> str:
    """The interpreter for the worker; this one unless the environment names another."""
    return os.environ.get(variable(module)) or sys.executable


def in_process(module: str) -> bool:
    """Whether engines run in this process: the module is here, and no other interpreter was named."""
    return not os.environ.get(variable(module)) and importlib.util.find_spec(module) is not None


def command(module: str) -> list[str]:
    """The command of the worker."""
    return [interpreter(module), str(SCRIPT), module]


def look(module: str, *, to_run: bool = False) -> Found:
    """What the worker's interpreter has, asked once in a process.

    Args:
        module: "tensorrt" or "tensorrt_rtx".
        to_run: saves starting a worker where engines run in this process.
    """
    if to_run and in_process(module):
        return _found(worker_module.versions(module))
    return _ask(module, interpreter(module))


@functools.cache
def _ask(module: str, _interpreter: str) -> Found:
    try:
        with Worker(command(module), name=f"the {module} worker", failure=EngineError) as worker:
            return _found(worker.call("versions", timeout_s=_STARTING_S))
    except EnginesmithError as error:
        named = f" ({variable(module)} is {os.environ[variable(module)]})" if variable(module) in os.environ else ""
        return Found(problem=error.message + named)


def _found(answer: Mapping[str, Any]) -> Found:
    return Found(
        version=answer["version"],
        polygraphy=answer["polygraphy"],
        gpu=answer["gpu"],
        compute_capability=answer["compute_capability"],
        driver=answer["driver"],
        problem=answer["error"] or "",
        gpu_problem=answer["gpu_error"] or "",
    )


Profile = dict[str, list[tuple[int, ...]]]


def profiles(signature: Signature, kind: str) -> list[Profile]:
    """Optimization profiles: from each input to its least, usual and largest shape.

    Args:
        signature: its dynamic axes give the ranges.
        kind: "range" for one profile over the ranges, "points" for a further one fixed to each of their three points.
    """
    ranges = [(signature.sizes("min"), signature.sizes("opt"), signature.sizes("max"))]
    if kind == "points" and signature.axes:
        ranges += [(sizes, sizes, sizes) for sizes in _distinct(ranges[0])]
    made = []
    for sizes in ranges:
        shapes = [signature.shapes(point) for point in sizes]
        made.append({name: [shape[name] for shape in shapes] for name in shapes[0]})
    return made


def _distinct(points: tuple[dict[str, int], ...]) -> list[dict[str, int]]:
    return [point for index, point in enumerate(points) if point not in points[:index]]


def build_plan(
    module: str,
    request: BuildRequest,
    plans: list[Profile],
    options: Mapping[str, Any],
    timing_cache: Path | None,
    *,
    weakly_typed: bool = False,
) -> dict[str, Any]:
    """Builds model.plan and layers.json in the request's folder, and returns the details.

    Args:
        options: those of the target.
        weakly_typed: whether this TensorRT chooses types, within what flags and pins allow.

    Raises:
        BuildError: TensorRT refused the graph, crashed, hung or ran out of memory.
        StorageError: the disk is full.
    """
    if request.graph is None:
        raise BuildError(f"{module} builds from a graph, and this model has none", hint="see why capture failed")
    plan = request.directory / "model.plan"
    graph, types = _typed(request.graph, request, weakly_typed=weakly_typed)
    options = {**options, "sparsity": _uses_sparsity(graph, options["sparsity"])}
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        onnx = Path(folder) / "model.onnx"
        graph.save(onnx)
        name = f"{module} in its worker process"
        try:
            with Worker(command(module), name=name, log=request.log) as worker:
                details = worker.call(
                    "build",
                    timeout_s=request.timeout_s,
                    progress=request.progress,
                    scratch=folder,
                    onnx=str(onnx),
                    plan=str(plan.absolute()),
                    layers=str((request.directory / "layers.json").absolute()),
                    profiles=plans,
                    types=types,
                    options=dict(options),
                    timing_cache=None if timing_cache is None else str(timing_cache.absolute()),
                )
        except EnginesmithError:
            plan.unlink(missing_ok=True)
            raise
    request.progress(1.0, "done")
    return {**details, "reproduce": reproduce(module, plans, options, details["flags"])}


def _typed(graph: Graph, request: BuildRequest, *, weakly_typed: bool) -> tuple[Graph, dict[str, str]]:
    """The graph to build from, and the types that its tensors are to have."""
    if not weakly_typed or request.precision not in ("int8", "mixed"):
        return graph, _types(graph)
    from ...compiler.quantization.qdq import quantized_nodes
    from ...compiler.quantization.weak_typing import in_half, prepare

    if not quantized_nodes(graph):
        request.log(f"nothing is quantized: {request.precision} is built as fp16")
        return (half := in_half(graph, request.signature, request.sample)), _types(half)
    return prepare(graph, request.signature, request.sample, request.log)


def _uses_sparsity(graph: Graph, asked: bool | None) -> bool:
    """Whether the builder may use kernels for sparse weights."""
    from ...compiler.sparsity.detect import sparse_layers

    return bool(sparse_layers(graph)) if asked is None else asked


def _types(graph: Graph) -> dict[str, str]:
    """TensorRT's names for the floating-point types of what the graph's nodes give, by tensor."""
    import onnx_ir as ir

    names = {ir.DataType.FLOAT: "FLOAT", ir.DataType.FLOAT16: "HALF"}
    typed = graph.clone()
    typed.infer()
    outputs = (value for node in typed.nodes() for value in node.outputs)
    return {value.name: names[value.dtype] for value in outputs if value.name and value.dtype in names}


FLAGS = {
    "STRONGLY_TYPED": "--strongly-typed",
    "FP16": "--fp16",
    "INT8": "--int8",
    "TF32": "--tf32",
    "SPARSE_WEIGHTS": "--sparse-weights",
    "PREFER_PRECISION_CONSTRAINTS": "--precision-constraints=prefer",
}
"""Polygraphy's option for each builder flag that an engine may have."""


def reproduce(module: str, plans: list[Profile], options: Mapping[str, Any], flags: list[str]) -> str:
    """The command of Polygraphy that builds the same engine from model.onnx."""
    words = ["polygraphy", "convert", "model.onnx", "--convert-to", "trt", "-o", "model.plan"]
    words += [FLAGS[flag] for flag in flags if flag in FLAGS]
    for plan in plans:
        for word, index in (("--trt-min-shapes", 0), ("--trt-opt-shapes", 1), ("--trt-max-shapes", 2)):
            words += [word, *(f"{name}:[{','.join(map(str, shapes[index]))}]" for name, shapes in plan.items())]
    if options["builder_level"] is not None:
        words += ["--builder-optimization-level", str(options["builder_level"])]
    if options["workspace_gib"] is not None:
        words += ["--pool-limit", f"workspace:{options['workspace_gib']:g}G"]
    if module == "tensorrt_rtx":
        words = ["POLYGRAPHY_USE_TENSORRT_RTX=1", *words, "--compute-capabilities", *options["compute_capabilities"]]
    return shlex.join(words)
