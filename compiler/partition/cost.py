"""What each node of a line takes: measured by the runtime's profiler, else estimated by a roofline.

Profilers make each layer longer, on GPUs by a launch that blocks. What all layers together take beyond a call without
the profiler is taken off again, from each layer the same. A fused layer's time is shared among its nodes by their
estimates; nodes that no layer names take none.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx_ir as ir

from ...errors import EngineError, EnginesmithError
from ...targets.base import BuildRequest, EngineInfo, Target
from ...targets.profile import Profile
from ..diagnosis.ceilings import Ceilings, ceilings
from ..diagnosis.mapping import nodes_of
from ..graph import Graph
from ..graph.selection import label
from ..graph.verifier import subgraphs
from ..graph.work import Work, Workload
from ..signature import Signature
from ..storage.cache import Cache

if TYPE_CHECKING:
    from ..sources import Model

NOMINAL_GFLOPS, NOMINAL_GB_S = 100.0, 10.0
"""Where nothing was measured: what matters is that a byte takes as long as ten operations."""

NOMINAL_LAUNCH_MS = 0.002
NAMED_SHARE = 0.5
"""Of the profile's time that has to be in layers whose nodes are known."""

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of nodes by their label.

    Attributes:
        how: what gave them, for people.
        lacking: why they were not measured; empty where they were.
        shapes: of tensors, as they were then.
        layers: which nodes the runtime computes as one: a number by label.
    """

    ms: Mapping[str, float]
    how: str
    lacking: str = ""
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def fused(self, labels: Sequence[str]) -> frozenset[int]:
        """Positions of a line that are within a layer."""
        layers = [self.layers.get(name) for name in labels]
        return frozenset(p for p in range(1, len(labels)) if layers[p] is not None and layers[p] == layers[p - 1])

    def along(self, labels: Sequence[str]) -> list[float]:
        """Of the nodes of a line."""
        return [self.ms.get(name, 0.0) for name in labels]


def measured(graph: Graph, target: Target, precision: str, signature: Signature, sample: Arrays) -> Times:
    """Builds the whole graph on a target and profiles it; estimates where that is not possible, and says why."""
    device = "cuda" if "cpu" not in target.capabilities.devices else "cpu"
    try:
        profile, call_ms = _profile(graph, target, precision, signature, sample)
    except EnginesmithError as error:
        return _estimated(graph, signature, ceilings_of(device), error.message)
    if isinstance(profile, str):
        return _estimated(graph, signature, ceilings_of(device), profile)
    work = _Works(graph, signature, profile.shapes)
    taken: dict[str, float] = collections.defaultdict(float)
    layers: dict[str, int] = {}
    named = 0.0
    extra = _extra_ms([layer.ms for layer in profile.layers], call_ms)
    grouped = zip(profile.layers, nodes_of(graph, profile.layers), strict=True)
    for number, (layer, nodes) in enumerate(grouped):
        owners = list(dict.fromkeys(work.owner(node) for node in nodes))
        ms = max(layer.ms - extra, 0.0)
        named += layer.ms if owners else 0.0
        weights = np.array([work.ms(node) for node in owners]) + 1e-9
        for node, part in zip(owners, weights / weights.sum(), strict=True):
            taken[label(node)] += ms * float(part)
            layers[label(node)] = number
    total = sum(layer.ms for layer in profile.layers)
    if not total or named < NAMED_SHARE * total:
        reason = f"{target.name} names the nodes of {named / total if total else 0:.0%} of its time only"
        return _estimated(graph, signature, ceilings_of(device), reason)
    return Times(dict(taken), f"measured by {profile.how}", shapes=profile.shapes, layers=layers)


def estimated(graph: Graph, signature: Signature) -> Times:
    """By nominal rates, which need no machine."""
    return _estimated(graph, signature, None, "")


def _estimated(graph: Graph, signature: Signature, found: Ceilings | None, lacking: str) -> Times:
    work = _Works(graph, signature, {}, found)
    times = {label(node): work.ms(node) for node in graph.model.graph}
    how = "estimated by a roofline of nominal rates" if found is None else "estimated by this machine's roofline"
    return Times(times, how, lacking)


def ceilings_of(device: str) -> Ceilings | None:
    """This machine's ceilings; None where they cannot be measured."""
    try:
        return ceilings("cuda" if device == "cuda" else "cpu", Cache())
    except EngineError:
        return None


def _profile(
    graph: Graph, target: Target, precision: str, signature: Signature, sample: Arrays
) -> tuple[Profile | str, float]:
    """The layers, and the milliseconds of a call without the profiler."""
    state = target.availability()
    if not (state.build and state.run):
        return state.reason, 0.0
    graph = graph.clone()
    for node in graph.nodes():
        node.name = label(node)  # runtimes make up names for those that have none
    with engine(graph, target, precision, signature, sample) as (folder, info):
        return target.profile(folder, info, sample), timed(target, folder, info, sample)[0]


@contextlib.contextmanager
def engine(
    graph: Graph, target: Target, precision: str, signature: Signature, sample: Arrays
) -> Iterator[tuple[Path, EngineInfo]]:
    """Builds a graph on a target, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as name:
        folder = Path(name) / "engine"
        folder.mkdir()
        no_model = cast("Model", None)  # which targets that take graphs do not look at
        request = BuildRequest(
            graph, no_model, signature, precision, sample, folder, Path(name) / "cache", lambda line: None
        )
        yield folder, target.build(request)


def timed(target: Target, folder: Path, info: EngineInfo, inputs: Arrays) -> tuple[float, Arrays]:
    """Milliseconds of a call, on the device where it tells, and the outputs."""
    runner = target.runner(folder, info)
    try:
        outputs = runner.run(inputs)
        bound = runner.bind(inputs)
        bound.timed(3)
        host, device = bound.timed(10)
    finally:
        runner.close()
    return statistics.median(device or host), outputs


def _extra_ms(layers_ms: Sequence[float], call_ms: float) -> float:
    """What the profiler adds to each layer, so that the layers are as long as a call; none becomes shorter than 0."""
    low, high = 0.0, max(layers_ms, default=0.0)
    if sum(layers_ms) <= call_ms:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        beyond = sum(max(ms - middle, 0.0) for ms in layers_ms) > call_ms
        low, high = (middle, high) if beyond else (low, middle)
    return low


class _Works:
    """Least times of the nodes of the main graph, those of their branches among them."""

    def __init__(
        self,
        graph: Graph,
        signature: Signature,
        shapes: Mapping[str, tuple[int, ...]],
        found: Ceilings | None = None,
    ) -> None:
        self._load = Workload(graph, signature.sizes(), dict(shapes))
        self._ceilings = found
        self._sized = {label(node): node for node in self._load.graph.model.graph}
        self._owners = {inner: node for node in graph.model.graph for inner in _inside(node)}

    def owner(self, node: ir.Node) -> ir.Node:
        """The node of the main graph that a node is in, or is."""
        return self._owners.get(node, node)

    def ms(self, node: ir.Node) -> float:
        """The least time of a node of the main graph."""
        sized = self._sized[label(node)]
        return sum(self._work_ms(self._load.of([part])) for part in (sized, *_inside(sized)))

    def _work_ms(self, work: Work) -> float:
        if self._ceilings is None:
            compute, move = work.flops / NOMINAL_GFLOPS / 1e6, work.bytes / NOMINAL_GB_S / 1e6
            return max(compute, move) + NOMINAL_LAUNCH_MS
        found = self._ceilings
        return max(found.compute_ms(work), found.bandwidth_ms(work, work.bytes)) + found.launch_ms()


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for body in subgraphs(node):
        for inner in body:
            yield inner
            yield from _inside(inner)
