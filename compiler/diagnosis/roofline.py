"""Where the time of an engine goes, and what limits each part of it: profile, graph and ceilings put together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...errors import EngineError, EnginesmithError
from ...targets import get_target
from ...targets.base import EngineInfo, Target
from ...targets.profile import LayerTime, Profile
from ..data import resized
from ..graph import Graph
from ..graph.selection import label
from ..graph.work import Work, Workload
from ..manifest import EngineRecord, Ladder, Roofline, RooflineNode
from ..signature import Signature
from ..storage.cache import Cache
from .actions import rank
from .bounds import Measured, Roof
from .ceilings import Ceilings, Device, ceilings
from .found import compared
from .mapping import nodes_of
from .reading import Reading
from .situation import Situation
from .use import Use, observe

Arrays = Mapping[str, np.ndarray]

LASTING_MS = 0.02
"""Layers that take less tell no rate: clocks count in microseconds."""

LEAST_SHARE = 0.1
"""Of a call that has to be in layers."""

UNSTEADY = 0.5
"""Where times shrink to less than this to fit in a call, the profile was disturbed."""

HALVED = {"fp16": "fp16", "bf16": "bf16", "int8": "fp16", "fp8": "fp16", "mixed": "fp16", "mixed-fp16": "fp16"}
"""What TensorRT computes in where the graph says fp32, by the engine's precision: before 10 its builder decides."""


def roofline_of(
    folder: Path,
    engine: EngineRecord,
    signature: Signature,
    sample: Arrays,
    cache: Cache,
    *,
    graph: Graph | None = None,
    ladder: Ladder | None = None,
    log: Callable[[str], None] = lambda reason: None,
) -> Roofline | None:
    """The roofline of an engine of a bundle at the usual sizes; None, with the reason in `log`, where there is none.

    Takes about a second, and some seconds more the first time on a machine, when its ceilings are measured.

    Args:
        folder: the bundle's.
        graph: what the engine was built from, where its folder holds no ONNX file.
        ladder: what its estimates are to be compared with.
    """
    try:
        return examine(folder, engine, signature, sample, cache, graph=graph, ladder=ladder)[0]
    except EnginesmithError as error:
        log(f"{engine['name']}: {error.message}")
        return None


def examine(
    folder: Path,
    engine: EngineRecord,
    signature: Signature,
    sample: Arrays,
    cache: Cache,
    *,
    graph: Graph | None = None,
    ladder: Ladder | None = None,
    reading: Reading | None = None,
) -> tuple[Roofline, Use]:
    """As `roofline_of`, with how the machine was used.

    Raises:
        EngineError: the engine cannot run here, or its runtime does not tell of layers.
    """
    directory = folder / "engines" / engine["name"]
    info = EngineInfo.read(directory)
    target = get_target(info.target, info.options)
    sizes = signature.sizes()
    inputs = resized(signature, sample, sizes)
    profile = target.profile(directory, info, inputs)
    if isinstance(profile, str):
        raise EngineError(profile)
    use = observe(target, directory, info, inputs)
    summed = sum(layer.ms for layer in profile.layers)
    if not profile.complete and summed < LEAST_SHARE * use.call_ms:
        raise EngineError(
            f"{target.name} tells of {summed / use.call_ms:.0%} of a call only: the rest is compiled code"
        )
    device: Device = "cuda" if _on_gpu(target, profile) else "cpu"
    if graph is None and info.entry.endswith(".onnx"):
        graph = Graph.load(directory / info.entry)
    workload = None if graph is None else Workload(graph, sizes, profile.shapes)
    found = ceilings(device, cache)
    roof, measured, notes = _measured(profile, workload, info, found, use.call_ms)
    situation = Situation(
        target=target,
        info=info,
        roof=roof,
        layers=tuple(measured),
        workload=workload,
        signature=signature,
        sizes=sizes,
        total_ms=use.call_ms,
        complete=profile.complete,
        reading=reading,
    )
    actions = rank(situation)
    actions, estimates = compared(actions, ladder, info.target, engine["name"]) if ladder else (actions, "")
    if found.busy > 0.12:
        notes.append(
            f"other processes took {found.busy:.0%} of the processors while the ceilings were measured: they may be low"
        )
    main = _main_precision(measured)
    roofline = Roofline(
        engine=engine["name"],
        device=f"{found.name} ({device})",
        precision=main,
        sizes=sizes,
        peak_gflops=roof.ceilings.gflops.get(main, roof.ceilings.gflops["fp32"]),
        peaks=dict(roof.ceilings.gflops),
        bandwidth_gb_s=found.memory_gb_s,
        launch_us=1000 * found.launch_ms(graph=roof.graphed),
        total_ms=use.call_ms,
        outside_ms=max(0.0, use.call_ms - sum(layer.ms for layer in measured)),
        unmapped_ms=sum(layer.ms for layer in measured if not layer.nodes),
        bounds=_by_bound(measured),
        nodes=[_record(layer, use.call_ms) for layer in sorted(measured, key=lambda layer: -layer.ms)],
        actions=actions,
        estimates=estimates,
        how=f"{profile.how}, the quieter half of {profile.calls} calls",
        notes=[*profile.notes, *notes],
    )
    return roofline, use


def _measured(
    profile: Profile, workload: Workload | None, info: EngineInfo, found: Ceilings, call_ms: float
) -> tuple[Roof, list[Measured], list[str]]:
    """The layers under the ceilings, and what is to be said of their times."""
    layers, notes = profile.layers, []
    groups: Sequence[tuple[ir.Node, ...]] = nodes_of(workload.graph, layers) if workload else [() for _ in layers]
    works = [_work(layer, nodes, workload, info) for layer, nodes in zip(layers, groups, strict=True)]
    each_ms, scale = excess([layer.ms for layer in layers], call_ms)
    if each_ms > 0.0005:
        notes.append(f"the profiler adds about {1000 * each_ms:.2g} us to each layer, which are taken off")
    if scale < 0.98:
        worth = "; that is far off, run it again on a quiet machine" if scale < UNSTEADY else ""
        notes.append(f"under the profiler layers took {1 / scale:.2f} times as long, and are scaled to a call{worth}")
    times = [(layer.ms - each_ms) * scale for layer in layers]
    raised = found.raised(_reached(times, works)) if scale > 0.9 else found
    for precision, rate in raised.gflops.items():
        if rate > 1.05 * found.gflops[precision]:
            notes.append(
                f"a layer reaches {rate:.0f} GFLOP/s in {precision}, which is taken for the ceiling: "
                f"{found.gflops[precision]:.0f} were measured"
            )
    roof = Roof(raised, sum(work.bytes for work in works if work), _is_graphed(info))
    measured = []
    for layer, nodes, work, ms in zip(layers, groups, works, times, strict=True):
        limit_ms = None if work is None else roof.limit_ms(work)
        measured.append(Measured(layer, nodes, ms, work, limit_ms, roof.bound(layer, work)))
    if workload is None:
        notes.append("there is no graph to map its layers to: operations and bytes are what the runtime tells")
    return roof, measured, notes


def excess(times: Sequence[float], call_ms: float) -> tuple[float, float]:
    """What a profiler adds: milliseconds to each layer, at most what the shortest takes; and the factor that is left.

    With both taken off, the times are those of a call without a profiler, or what they were where they are less.
    """
    beyond = sum(times) - call_ms
    if beyond <= 0:
        return 0.0, 1.0
    each_ms = min(beyond / len(times), *times)
    left = sum(ms - each_ms for ms in times)
    return each_ms, min(1.0, call_ms / left) if left > 0 else 1.0


def _reached(times: Sequence[float], works: Sequence[Work | None]) -> dict[str, float]:
    """The highest rate of products by precision, of those that last long enough to tell."""
    rates: dict[str, float] = {}
    for ms, work in zip(times, works, strict=True):
        if work is not None and work.heavy and ms > LASTING_MS:
            rates[work.precision] = max(rates.get(work.precision, 0.0), work.heavy / ms / 1e6)
    return rates


def _work(layer: LayerTime, nodes: Sequence[ir.Node], workload: Workload | None, info: EngineInfo) -> Work | None:
    if nodes and workload is not None:
        work = workload.of(nodes)
        return _computed(work, nodes, info) if work.known else None
    if layer.bytes is None:
        return None
    flops = layer.flops or 0.0
    return Work(flops=flops, moved_bytes=layer.bytes, precision=info.precision, heavy=flops)


def _computed(work: Work, nodes: Sequence[ir.Node], info: EngineInfo) -> Work:
    """The work in the types that the engine computes in, where these are others than the graph's."""
    if work.precision == "fp16" and info.target == "onnxruntime-cpu":
        return dataclasses.replace(work, precision="fp32")
    if {label(node) for node in nodes} & set(info.details.get("unfused") or ()):
        return dataclasses.replace(work, precision="fp32")
    half = None
    if info.target == "openvino":
        half = "bf16" if info.precision == "bf16" or info.options.get("rest") == "bf16" else None
    elif info.target.startswith("tensorrt"):
        half = HALVED.get(info.precision)
    if half and work.precision == "fp32":
        return work.scaled(weights=0.5, moved=0.5, precision=half)
    return work


def _is_graphed(info: EngineInfo) -> bool:
    used = (info.details.get("cuda_graph") or {}).get("used")
    return bool(info.options.get("cuda_graph")) if used is None else bool(used)


def _on_gpu(target: Target, profile: Profile) -> bool:
    return "cpu" not in target.capabilities.devices or any(layer.device == "cuda" for layer in profile.layers)


def _main_precision(measured: Sequence[Measured]) -> str:
    """The one in which most operations of products are."""
    counts: dict[str, float] = collections.defaultdict(float)
    for layer in measured:
        if layer.work is not None:
            counts[layer.work.precision] += layer.work.heavy or layer.work.flops * 1e-9
    return max(counts, key=lambda name: counts[name], default="fp32")


def _by_bound(measured: Sequence[Measured]) -> dict[str, float]:
    times: dict[str, float] = {}
    for layer in measured:
        times[layer.bound] = times.get(layer.bound, 0.0) + layer.ms
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _record(layer: Measured, call_ms: float) -> RooflineNode:
    work = layer.work or Work(precision="")
    return RooflineNode(
        name=layer.layer.name,
        operator=layer.layer.operator,
        covers=[label(node) for node in layer.nodes if node.op_type != "Constant"],
        precision=work.precision,
        flops=work.flops,
        bytes=work.bytes,
        ms=layer.ms,
        share=layer.ms / call_ms if call_ms else 0.0,
        limit_ms=layer.limit_ms,
        bound=layer.bound,
    )
