"""What the two ONNX Runtime targets share: sessions, a look at the optimized graph, and the runner on the host."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import BuildError, DataError, EngineError, EnginesmithError, TargetUnavailableError
from .base import Arrays, Bound, HostBound

MINIMUM = "1.23"
OPSET = (7, 23)
"""The lowest opset that ONNX Runtime promises to take, and the highest that `MINIMUM` does."""

CPU = "CPUExecutionProvider"
Optimization = Literal["all", "extended", "basic", "none"]
_LEVELS = {"all": "ENABLE_ALL", "extended": "ENABLE_EXTENDED", "basic": "ENABLE_BASIC", "none": "DISABLE_ALL"}


@dataclasses.dataclass(frozen=True)
class Session:
    """How to open a session; the same for building, looking and running.

    Attributes:
        provider: the execution provider that must run the graph.
        provider_options: its options by name.
        entries: configuration entries of the session.
        disabled_optimizers: graph optimizers of ONNX Runtime to leave out.
        intra_threads: threads within an operator, 0 for one a physical core.
        inter_threads: operators run side by side; 1 for one after the other.
        arena: whether memory of one run on the CPU is kept for the next.
    """

    provider: str = CPU
    provider_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    disabled_optimizers: tuple[str, ...] = ()
    optimization: Optimization = "all"
    intra_threads: int = 0
    inter_threads: int = 1
    arena: bool = True

    def open(self, path: Path, *, optimized: Path | None = None, profile: Path | None = None) -> Any:
        """Makes an `onnxruntime.InferenceSession` that runs on `provider` or not at all.

        Args:
            path: the ONNX file.
            optimized: where to write the graph after ONNX Runtime's optimizations, its weights beside it.
            profile: prefix of the profile to write.

        Raises:
            EngineError: the session was refused, or came back without the provider.
        """
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # it prints each cuDNN plan that it tries in vain; failures raise
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.intra_threads
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, f"ORT_{_LEVELS[self.optimization]}"
        )
        if self.inter_threads > 1:
            options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
            options.inter_op_num_threads = self.inter_threads
        options.enable_cpu_mem_arena = options.enable_mem_pattern = self.arena
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
            )
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        with translated(f"ONNX Runtime refused {path.name}"):
            # Without enable_fallback=0 a failing GPU session is silently made again on the CPU.
            session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=[(self.provider, dict(self.provider_options))],
                disabled_optimizers=list(self.disabled_optimizers),
                enable_fallback=0,
            )
        if self.provider not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime opened {path.name} without {self.provider}",
                expected=self.provider,
                found=", ".join(session.get_providers()),
                hint="run `enginesmith doctor` to see what the provider lacks",
            )
        return session


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its own exceptions share no base class."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = (v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
    return (*own, RuntimeError, ValueError)


@contextlib.contextmanager
def translated(what: str, error: type[EnginesmithError] = EngineError) -> Iterator[None]:
    """Turns what ONNX Runtime raises into `error`."""
    try:
        yield
    except failures() as problem:
        raise error(f"{what}: {problem}") from problem


def version_problem(found: str) -> str:
    """Why this version of ONNX Runtime will not do; empty where it will."""
    too_old = _release(found) < _release(MINIMUM)
    return f"onnxruntime {found} is too old, {MINIMUM} or newer is needed" if too_old else ""


def require_onnxruntime(extra: str) -> None:
    """Raises TargetUnavailableError where ONNX Runtime cannot be imported or is too old."""
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetUnavailableError(
            f"onnxruntime cannot be imported: {error}", hint=f"pip install 'enginesmith[{extra}]'"
        ) from error
    if problem := version_problem(onnxruntime.__version__):
        raise TargetUnavailableError(problem, hint=f"pip install --upgrade 'enginesmith[{extra}]'")


def examine(path: Path, session: Session, sample: Arrays, scratch: Path) -> dict[str, Any]:
    """Opens the graph, runs it once, and reports what ONNX Runtime made of it.

    Returns:
        nodes: nodes after optimization, subgraphs included.
        operators: how many of each operator.
        casts: Cast nodes that were not fused away.
        memcpy: copies between the host and the device.
        placement: nodes of the run by execution provider; branches that were not taken are not in it.
        on_cpu: names of the nodes that ran on the CPU, by operator, where `session` asks for another provider.
        unfused: nodes that compute floats although the graph has them quantized, and why.

    Raises:
        BuildError: the graph was refused, or failed on the sample.
    """
    import onnx

    from ..compiler.quantization.fused import unfused

    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="onnxruntime-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        try:
            opened = session.open(path, optimized=optimized, profile=Path(folder) / "profile")
        except EngineError as error:
            raise BuildError(error.message, expected=error.expected, found=error.found, hint=error.hint) from error
        names = {value.name for value in opened.get_inputs()}
        with translated(f"ONNX Runtime failed to run {path.name} on the sample", BuildError):
            opened.run(None, {name: array for name, array in sample.items() if name in names})
            events = json.loads(Path(opened.end_profiling()).read_text())
        graph = onnx.load(optimized, load_external_data=False).graph
    operators = _operators(graph)
    placed = _placed(events)
    return {
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "casts": operators["Cast"],
        "memcpy": operators["MemcpyFromHost"] + operators["MemcpyToHost"],
        "placement": dict(collections.Counter(provider for _, provider in placed.values()).most_common()),
        "on_cpu": _on_cpu(placed) if session.provider != CPU else {},
        "unfused": {found.node: found.reason for found in unfused(graph)},
    }


class HostRunner:
    """A session on the CPU: arrays in, arrays out."""

    def __init__(self, session: Any, outputs: Sequence[str]) -> None:
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = list(outputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name, always as NumPy arrays; DLPack tensors of the CPU are read in place."""
        feed = {name: to_numpy(name, inputs[name]) for name in self._inputs}
        try:  # not `translated`: a generator costs two microseconds a call
            values = self._session.run(self._outputs, feed)
        except failures() as problem:
            raise EngineError(f"ONNX Runtime failed to run the engine: {problem}") from problem
        return dict(zip(self._outputs, values, strict=True))

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs, ready for repeated runs."""
        feed = {name: np.asarray(inputs[name], order="C") for name in self._inputs}
        return HostBound(lambda: self.run(feed))

    def reset(self) -> None:
        """A session keeps no state."""

    def close(self) -> None:
        """Lets go of the session; it is freed once no call uses it."""
        self._session = None


def to_numpy(name: str, value: Any) -> np.ndarray:
    """The array itself, or a view of a DLPack tensor of the CPU.

    Raises:
        DataError: a tensor that lies elsewhere or cannot be shared.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(
            f"input {name!r} cannot be read on the CPU: {error}",
            expected="a NumPy array or a DLPack tensor in the CPU's memory, without gradient",
            found=type(value).__name__,
        ) from error


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _operators(graph: Any) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for node in graph.node:
        counts[node.op_type] += 1
        for attribute in node.attribute:
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                counts += _operators(subgraph)
    return counts


def _placed(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Operator and provider of each node that ran, by the name of its profile event."""
    return {
        event["name"]: (event["args"]["op_name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }


def _on_cpu(placed: Mapping[str, tuple[str, str]]) -> dict[str, list[str]]:
    nodes: dict[str, list[str]] = {}
    for event, (operator, provider) in placed.items():
        if provider == CPU:
            nodes.setdefault(operator, []).append(event.removesuffix("_kernel_time"))
    return nodes
