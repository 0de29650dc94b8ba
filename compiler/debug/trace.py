"""Compares two graphs tensor by tensor, and tells nodes that make an error from those that inherit it.

                     inputs of the node          what is compared with the reference
    total error      the engine's own            the tensor, looked at in the running engine
    local error      the reference's             what the node makes of right inputs

The tensors are looked at a few at a time, so that memory is bounded and the rest of the graph stays fused as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import EngineError, GraphError
from ..graph import Graph
from ..graph.probe import sizes
from .distance import Distance, distance, worst
from .parts import MADE, Segment, alive, part, segments
from .runtimes import Runtime

Arrays = Mapping[str, np.ndarray]
Update = Callable[[float, str], None]

TAPS = 8
"""Tensors that are looked at together: each may prevent a fusion."""

CHUNK_BYTES = 64 << 20
FLOATS = frozenset(("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"))


@dataclasses.dataclass(frozen=True)
class Side:
    """A graph and where its parts run."""

    graph: Graph
    run: Runtime

    def values(self, inputs: Arrays, names: Iterable[str]) -> dict[str, np.ndarray]:
        """These tensors in a run on `inputs`, which are tensors of the main graph themselves."""
        wanted = tuple(dict.fromkeys(names))
        if not wanted:
            return {}
        found = self.run(part(self.graph, inputs, wanted), inputs)
        return {name: found[name + MADE if name in inputs else name] for name in wanted}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor that both graphs hold.

    Attributes:
        total: None where it could not be had.
        local: None where it could not be had, or where the inputs do not fit the engine's types.
        dtype: in the engine's graph.
        reason: why a distance is missing.
    """

    segment: Segment
    dtype: str
    total: Distance | None
    local: Distance | None
    reason: str = ""

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.segment.name


@dataclasses.dataclass(frozen=True)
class Tapped:
    """The engine's outputs while some tensors of it were looked at."""

    names: tuple[str, ...]
    error: float


def shared_names(subject: Graph, oracle: Graph) -> list[str]:
    """Float tensors that a node of each main graph gives and that depend on the inputs, in the order of the subject."""
    theirs = {v.name: v for node in oracle.model.graph for v in node.outputs}
    living, known = alive(subject), alive(oracle)
    mine = (value for node in subject.model.graph for value in node.outputs)
    return [
        value.name
        for value in mine
        if value.name in living and value.name in known and _is_float(value) and _is_float(theirs.get(value.name))
    ]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name in FLOATS


def trace(
    subject: Side, oracle: Side, inputs: Arrays, truth: Arrays, update: Update = lambda fraction, what: None
) -> tuple[list[Row], list[Tapped]]:
    """A row for every shared tensor, and how the engine's outputs fared in each chunk.

    Args:
        inputs: those of the graphs, one sample.
        truth: the right outputs for it.
    """
    names = shared_names(subject.graph, oracle.graph)
    found = segments(subject.graph, {*names, *inputs, *_integers(subject.graph, oracle.graph)})
    chosen = [segment for segment in found if segment.name in set(names)]
    rows: list[Row] = []
    taps: list[Tapped] = []
    for chunk in _chunks(chosen, _bytes(oracle.graph, names, inputs)):
        update(len(rows) / len(chosen), chunk[0].name)
        needed = {name for segment in chunk for name in (segment.name, *segment.leaves)} - set(inputs)
        right = {**inputs, **oracle.values(inputs, sorted(needed))}
        totals, tapped = _totals(subject, chunk, inputs, truth)
        taps += tapped
        locals_, reason = _locals(subject, chunk, right)
        for segment in chunk:
            name = segment.name
            rows.append(
                Row(
                    segment,
                    _dtype(segment),
                    distance(right[name], totals[name]) if name in totals else None,
                    distance(right[name], locals_[name]) if name in locals_ else None,
                    reason.get(name, ""),
                )
            )
    return rows, taps


def _integers(subject: Graph, oracle: Graph) -> set[str]:
    """Tensors of other types that both hold: no error is measured on them, but segments may begin there."""
    theirs = {value.name for node in oracle.model.graph for value in node.outputs}
    living = alive(subject) & alive(oracle)
    return {
        value.name
        for node in subject.model.graph
        for value in node.outputs
        if value.name in theirs and value.name in living and isinstance(value.type, ir.TensorType)
    }


def _bytes(graph: Graph, names: Sequence[str], inputs: Arrays) -> Mapping[str, int]:
    """Sizes of the tensors; none where ONNX Runtime's CPU cannot run the graph, so that the count alone bounds."""
    try:
        return sizes(graph, names, inputs)
    except GraphError:
        return {}


def _chunks(found: Sequence[Segment], size: Mapping[str, int]) -> list[list[Segment]]:
    chunks: list[list[Segment]] = []
    room = 0
    for segment in found:
        need = sum(size.get(name, 0) for name in (segment.name, *segment.leaves))
        if not chunks or len(chunks[-1]) == TAPS or need > room:
            chunks.append([])
            room = CHUNK_BYTES
        chunks[-1].append(segment)
        room -= need
    return chunks


def _totals(
    subject: Side, chunk: Sequence[Segment], inputs: Arrays, truth: Arrays
) -> tuple[dict[str, np.ndarray], list[Tapped]]:
    names = tuple(segment.name for segment in chunk)
    try:
        found = subject.values(inputs, (*names, *truth))
    except (EngineError, GraphError):  # a target may refuse one graph and take the next
        return {}, []
    return found, [Tapped(names, worst([distance(truth[name], found[name]) for name in truth]))]


def _locals(subject: Side, chunk: Sequence[Segment], right: Arrays) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What each segment makes of right inputs, and why where that is not known."""
    types = {value.name: value.dtype for value in _all(subject.graph)}
    reasons = {s.name: text for s in chunk for leaf in s.leaves if (text := misfit(leaf, right[leaf], types.get(leaf)))}
    able = [segment for segment in chunk if segment.name not in reasons]
    leaves = {leaf: right[leaf] for segment in able for leaf in segment.leaves}
    if not able:
        return {}, reasons
    try:
        return subject.values(leaves, [segment.name for segment in able]), reasons
    except (EngineError, GraphError) as error:
        return {}, {**reasons, **{segment.name: error.message for segment in able}}


def misfit(name: str, array: np.ndarray, dtype: ir.DataType | None) -> str:
    """Why right values of a tensor cannot be given to the engine's graph; empty where they can."""
    if dtype is None or dtype.name not in ("FLOAT16", "FLOAT8E4M3FN"):
        return ""
    limit = 65504.0 if dtype.name == "FLOAT16" else 448.0
    reach = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    if reach <= limit:
        return ""
    return f"its input {name} reaches {reach:.3g} in the reference, above what {dtype.name.lower()} holds ({limit:g})"


def _all(graph: Graph) -> Iterable[ir.Value]:
    yield from graph.model.graph.inputs
    for node in graph.model.graph:
        yield from node.outputs


def _dtype(segment: Segment) -> str:
    """In which the operator computes: a float32 result of quantized inputs is computed in int8."""
    stored = [v.dtype for n in segment.nodes if n.op_type == "DequantizeLinear" for v in n.inputs[:1] if v is not None]
    main = segment.main.outputs[0].dtype
    dtype = next((d for d in stored if d is not None and d.name != "INT32"), main)
    return {"FLOAT": "float32"}.get(dtype.name, dtype.name.lower()) if dtype is not None else "unknown"
