"""Stores the caches of a decoder in 8 bits: `real = stored * scale`, with a scale for each head and channel, or one.

    past -> write(new) -> present
    past -> / scale, round, clip -> INT8 -> write(new) -> INT8 -> * scale -> present

The graph takes and gives floats as before, so that it can be run and compared like any other. A target whose runtime
keeps caches from call to call takes the conversions off both ends (cache_ends.py), and keeps the INT8 alone.

A cache is written by GroupQueryAttention, which quantizes new keys and values itself and reads INT8, or by a Scatter:
what is new is quantized before it, and those that attend read all of the cache times its scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.precision import keep
from ..graph.schemas import MICROSOFT
from ..graph.selection import label
from .cache_ends import HIGHEST, LOWEST, conversion
from .patch import Patch, Patcher

_LEAST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Cache:
    """An input of the graph that one node writes into and gives on.

    Attributes:
        new: what is written: (batch, time, heads * width) for GroupQueryAttention, which may take it as a part of its
            query, and then it is None; else (batch, heads, time, width).
        place: which input of the node the cache is, and `result` which output.
    """

    past: ir.Value
    new: ir.Value | None
    place: int
    result: int

    @property
    def name(self) -> str:
        """Of the input."""
        return self.past.name or ""

    @property
    def written(self) -> str:
        """The name of what is written."""
        return (self.new and self.new.name) or ""

    @property
    def heads(self) -> int:
        """How many there are."""
        return _size(self.past, 1)

    @property
    def width(self) -> int:
        """Channels of a head."""
        return _size(self.past, 3)


@dataclasses.dataclass(frozen=True)
class Writer:
    """A node and the caches that it writes: keys and values, or one of them."""

    node: ir.Node
    caches: tuple[Cache, ...]

    @property
    def attends(self) -> bool:
        """Whether it is GroupQueryAttention, which gives the attention's result too."""
        return self.node.op_type == "GroupQueryAttention"


def find(graph: Graph, states: Mapping[str, str]) -> tuple[list[Writer], dict[str, str]]:
    """What writes the float caches of a flat graph, and why others cannot be stored, by the name of the input.

    Args:
        states: outputs of caches by their inputs.
    """
    inputs = {value.name or "": value for value in graph.model.graph.inputs}
    found: dict[ir.Node, list[Cache]] = {}
    refused: dict[str, str] = {}
    for name, output in states.items():
        if (past := inputs.get(name)) is None:
            continue
        uses = tuple(past.uses())
        node = uses[0].node if len(uses) == 1 else None
        if past.dtype != ir.DataType.FLOAT or (node is not None and _is_divided(node)):
            continue  # stored already, or in another precision
        cache = None if node is None else _cache(node, past, uses[0].idx, output)
        if node is None or cache is None:
            refused[name] = "it is not written by one node alone, an attention that is fused or a Scatter"
        else:
            found.setdefault(node, []).append(cache)
    writers = []
    for node, caches in found.items():
        if node.op_type == "GroupQueryAttention" and len(caches) == 1:
            refused[caches[0].name] = "keys and values of its attention are not both caches of the model"
        else:
            writers.append(Writer(node, tuple(sorted(caches, key=lambda cache: cache.place))))
    return writers, refused


def scales(peaks: np.ndarray) -> np.ndarray:
    """Scales by the largest magnitudes; those that are always zero get that of the largest."""
    largest = float(peaks.max(initial=0)) or 1.0
    return np.asarray(np.maximum(np.where(peaks > 0, peaks, largest) / HIGHEST, _LEAST).astype(np.float32))


def store(graph: Graph, states: Mapping[str, str], scale: Mapping[str, np.ndarray]) -> None:
    """Rewrites a flat graph so that nodes write INT8, those whose caches all have a scale.

    Args:
        scale: (1, heads or 1, 1, width), or (1,) for one scale, by the name of the input.
    """
    patcher = Patcher(graph)
    for writer in _chosen(graph, states, scale):
        patch = Patch(patcher, writer.node)
        patch.apply(*_stored(patcher, patch, writer, scale, main=True))


def beside(graph: Graph, states: Mapping[str, str], scale: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Puts beside each of these nodes one that writes INT8, on the same inputs; gives both results by the label.

    The result is what is attended, or of a Scatter the cache.
    """
    patcher, pairs = Patcher(graph), {}
    for writer in _chosen(graph, states, scale):
        patch = Patch(patcher, writer.node)
        result = _stored(patcher, patch, writer, scale, main=False)[0]
        patch.beside()
        pairs[label(writer.node)] = writer.node.outputs[0].name or "", result.name or ""
    return pairs


def _chosen(graph: Graph, states: Mapping[str, str], scale: Mapping[str, np.ndarray]) -> list[Writer]:
    writers, _ = find(graph, states)
    return [writer for writer in writers if all(cache.name in scale for cache in writer.caches)]


def _cache(node: ir.Node, past: ir.Value, place: int, output: str) -> Cache | None:
    """The cache that a node writes; None where it does something else with the input."""
    if node.domain == MICROSOFT and node.op_type == "GroupQueryAttention" and place in (3, 4):
        written, result = place - 2, place - 2
    elif not node.domain and node.op_type in ("ScatterElements", "ScatterND") and place == 0:
        written, result = 2, 0
    else:
        return None
    new = node.inputs[written]
    known = (
        past.shape is not None and len(past.shape) == 4 and all(isinstance(past.shape[axis], int) for axis in (1, 3))
    )
    if not known or node.outputs[result].name != output:
        return None
    return Cache(past, new, place, result)


def _size(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _stored(
    patcher: Patcher, patch: Patch, writer: Writer, scale: Mapping[str, np.ndarray], *, main: bool
) -> tuple[ir.Value, ...]:
    """The node on INT8 caches; its results in the order of the node's own outputs."""
    node = writer.node
    inputs = list(node.inputs)
    constants = {}
    for cache in writer.caches:
        constants[cache.place] = patcher.initializer(f"{cache.name}/scale", scale[cache.name])
        inputs[cache.place] = _quantized(patcher, patch, cache.past, constants[cache.place])
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    if writer.attends:
        inputs += [None] * (12 - len(inputs))
        inputs[12:14] = constants[3], constants[4]
        for which, place in (("k", 3), ("v", 4)):
            kind = "PER_TENSOR" if constants[place].shape == (1,) else "PER_CHANNEL"
            attributes[f"{which}_quant_type"] = kind
        attributes["kv_cache_bit_width"] = 8
    else:
        inputs[2] = _quantized(patcher, patch, node.inputs[2], constants[0])
    caches = {cache.result: cache for cache in writer.caches}
    outputs = [
        (f"{value.name}/stored", ir.DataType.INT8, value.shape)
        if place in caches
        else (f"{value.name}/attended", value.dtype or ir.DataType.FLOAT, value.shape)
        for place, value in enumerate(node.outputs)
    ]
    results = list(patch.add(node.op_type, inputs, outputs, attributes, domain=node.domain, main=main))
    for place, cache in caches.items():
        results[place] = _real(patch, results[place], constants[cache.place])
    return tuple(results)


def _quantized(patcher: Patcher, patch: Patch, value: ir.Value | None, scale: ir.Value) -> ir.Value:
    """A float value as INT8, rounded to nearest even and clipped, as ONNX Runtime's kernels do."""
    assert value is not None
    title, shape, dtype = f"{value.name}/8", value.shape, ir.DataType.FLOAT
    low, high = (patcher.initializer(f"{title}/limit", np.array(limit, np.float32)) for limit in (LOWEST, HIGHEST))
    (scaled,) = patch.add("Div", [value, scale], [(f"{title}/scaled", dtype, shape)])
    (rounded,) = patch.add("Round", [scaled], [(f"{title}/rounded", dtype, shape)])
    (clipped,) = patch.add("Clip", [rounded, low, high], [(f"{title}/clipped", dtype, shape)])
    integer = ir.DataType.INT8
    (result,) = patch.add("Cast", [clipped], [(f"{title}/integer", integer, shape)], {"to": integer.value})
    _kept(scaled, rounded, clipped, result)
    return result


def _real(patch: Patch, value: ir.Value, scale: ir.Value) -> ir.Value:
    """An INT8 value times its scale."""
    dtype = ir.DataType.FLOAT
    (wide,) = patch.add("Cast", [value], [(f"{value.name}/wide", dtype, value.shape)], {"to": dtype.value})
    (real,) = patch.add("Mul", [wide, scale], [(f"{value.name}/real", dtype, value.shape)])
    _kept(wide, real)
    return real


def _kept(*values: ir.Value) -> None:
    """Has what makes these values stay in float32 where the rest is lowered, so that `cache_ends.stored` finds it."""
    for value in values:
        if (node := value.producer()) is not None:
            keep(node, "it converts a cache that is stored in 8 bits")


def _is_divided(node: ir.Node) -> bool:
    """Whether a node is the first of those that make INT8 of a cache."""
    return node.op_type == "Div" and conversion(node.inputs[0]) is not None
