"""What ONNX Runtime's profiler tells of each node, read from the JSON that it writes.

An event is one execution of a node of the optimized graph, in microseconds. On a GPU an event lasts as long as the host
takes to launch kernels; kernels have events of their own where ONNX Runtime was built with CUPTI, and elsewhere
launches have to block (`targets.cuda.profiler`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ._onnxruntime import CPU, Session, translated
from .base import Arrays
from .profile import LayerTime, Profile, calls_for, medians

_SUFFIX = "_kernel_time"
_CONTAINERS = frozenset(("If", "Loop", "Scan"))
"""Operators whose events span those of the nodes within."""


def profile(path: Path, session: Session, inputs: Arrays) -> Profile:
    """Runs a graph some times under the profiler.

    Raises:
        EngineError: the graph or the inputs are refused.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        opened = session.open(path, optimized=optimized, profile=Path(folder) / "profile")
        names = {value.name for value in opened.get_inputs()}
        feed = {name: array for name, array in inputs.items() if name in names}
        with translated(f"ONNX Runtime failed to run {path.name}"):
            opened.run(None, feed)  # what is allocated or compiled at first is not to be timed
            start = time.perf_counter()
            opened.run(None, feed)
            calls = calls_for(1000 * (time.perf_counter() - start))
            for _ in range(calls):
                opened.run(None, feed)
            events = json.loads(Path(opened.end_profiling()).read_text())
        outputs = node_outputs(onnx.load(optimized, load_external_data=False).graph)
    return read_events(events, outputs, calls)


def node_outputs(graph: Any) -> dict[str, tuple[str, ...]]:
    """Names of the tensors that each node of an ONNX graph gives, those of subgraphs too."""
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        found[node.name] = tuple(name for name in node.output if name)
        for attribute in node.attribute:
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found.update(node_outputs(subgraph))
    return found


def read_events(events: Sequence[Mapping[str, Any]], outputs: Mapping[str, tuple[str, ...]], calls: int) -> Profile:
    """Layers from the events of the profiler.

    Args:
        outputs: tensors that each node of the optimized graph gives, by its name.
        calls: how many of the last runs count.
    """
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda event: float(event["ts"]))[-calls:]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX)]
    kernels = _kernels(events)
    times: list[dict[str, float]] = []
    facts: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        own = [event for event in nodes if _within(event, run)]
        facts.update((_name(event), event["args"]) for event in own)
        times.append(_run_times(own, kernels))
    taken = medians(times)
    layers = [_layer(name, facts[name], ms, outputs) for name, ms in taken.items()]
    shapes = {}
    for name in taken:
        known = facts[name].get("output_type_shape", [])
        for tensor, typed in zip(outputs.get(name, ()), known, strict=False):
            shapes[tensor] = tuple(next(iter(typed.values()), ()))
    measured = "kernels by CUPTI" if kernels else "nodes"
    return Profile(tuple(layers), f"ONNX Runtime's profiler ({measured})", len(runs), shapes)


def _run_times(events: Sequence[Mapping[str, Any]], kernels: Mapping[int, float]) -> dict[str, float]:
    """Milliseconds of each node in one run; of a node that contains others, without theirs."""
    times: dict[str, float] = {}
    containers = [event for event in events if event["args"].get("op_name") in _CONTAINERS]
    for event in events:
        name = _name(event)
        own = float(event["dur"])
        if event in containers:
            inside = [other for other in events if other is not event and _within(other, event)]
            direct = [o for o in inside if not any(_within(o, c) for c in inside if c in containers and c is not o)]
            own = max(0.0, own - sum(float(other["dur"]) for other in direct))
        elif id(event) in kernels:
            own = kernels[id(event)]
        times[name] = times.get(name, 0.0) + own / 1000
    return times


def _kernels(events: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Microseconds of the kernels that an event launched, by its identity; they stand behind it in the file."""
    found: dict[int, float] = {}
    latest: Mapping[str, Any] | None = None
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            latest = event
        elif event.get("cat") == "Kernel" and latest is not None:
            found[id(latest)] = found.get(id(latest), 0.0) + float(event["dur"])
    return found


def _layer(name: str, args: Mapping[str, Any], ms: float, outputs: Mapping[str, tuple[str, ...]]) -> LayerTime:
    operator = str(args["op_name"])
    device: Literal["cpu", "cuda"] = "cpu" if args.get("provider", CPU) == CPU else "cuda"
    sizes = [float(args.get(size, 0)) for size in ("activation_size", "parameter_size", "output_size")]
    return LayerTime(
        name, operator, ms, device, operator.startswith("Memcpy"), outputs=outputs.get(name, ()), bytes=sum(sizes)
    )


def _name(event: Mapping[str, Any]) -> str:
    return str(event["name"]).removesuffix(_SUFFIX)


def _within(event: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    start, begin = float(event["ts"]), float(outer["ts"])
    return begin <= start and start + float(event["dur"]) <= begin + float(outer["dur"]) + 1.0  # whole microseconds
