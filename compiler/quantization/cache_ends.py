"""Takes the conversions of caches that a graph stores in fewer bits off its ends, for an engine that keeps those.

    past (float) -> / scale, round, clip -> INT8 -> ... -> INT8 -> * scale -> present (float)
    past (INT8)  -> ... -> present (INT8)

    past (float)   -> Cast -> float16 -> ... -> float16 -> Cast -> present (float)
    past (float16) -> ... -> present (float16)

The scales go beside the engine, which needs them where it is given floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..graph import Graph
from ..graph.editing import is_constant

LOWEST, HIGHEST = -128, 127


@dataclasses.dataclass(frozen=True)
class Stored:
    """A graph whose caches are taken and given as it stores them.

    Attributes:
        scales: of those in INT8, by the name of the input.
        halves: those in float16. The others are float32.
    """

    graph: Graph
    scales: Mapping[str, np.ndarray]
    halves: Collection[str]


def stored(graph: Graph, states: Mapping[str, str]) -> Stored:
    """A copy that takes and gives INT8 or float16 where the graph converts a cache to it.

    A cache of which that does not hold stays as it is.
    """
    work = graph.clone()
    main = work.model.graph
    inputs = {value.name or "": value for value in main.inputs}
    scales: dict[str, np.ndarray] = {}
    halves: list[str] = []
    for name, output in states.items():
        place = next((place for place, value in enumerate(main.outputs) if value.name == output), None)
        past = inputs.get(name)
        if past is None or place is None:
            continue
        real = main.outputs[place]
        inside, scale = conversion(past) or (_half(past), None)
        given = _half_origin(real) if scale is None else _origin(real, scale)
        if inside is None or given is None or given.is_graph_output():
            continue
        past.type = inside.type
        ir.convenience.replace_all_uses_with(inside, past)
        real.name = f"{output}/real"
        given.name, given.shape = output, past.shape
        main.outputs[place] = given
        if scale is None:
            halves.append(name)
        else:
            scales[name] = scale
    if scales or halves:
        RemoveUnusedNodesPass()(work.model)
    return Stored(work, scales, halves)


def conversion(past: ir.Value | None) -> tuple[ir.Value, np.ndarray] | None:
    """The INT8 that a graph makes of an input, and the scale, where it does nothing else with it."""
    chain = list(_readers(past, ("Div", "Round", "Clip", "Cast")))
    if len(chain) != 4 or chain[3].outputs[0].dtype != ir.DataType.INT8:
        return None
    scale = _constant(chain[0].inputs[1])
    limits = [_constant(value) for value in chain[2].inputs[1:3]]
    if scale is None or [None if limit is None else float(limit) for limit in limits] != [LOWEST, HIGHEST]:
        return None
    return chain[3].outputs[0], scale


def _half(past: ir.Value) -> ir.Value | None:
    """The float16 that a graph makes of an input, where it does nothing else with it."""
    cast = next(_readers(past, ("Cast",)), None)
    return cast.outputs[0] if cast is not None and cast.outputs[0].dtype == ir.DataType.FLOAT16 else None


def _half_origin(real: ir.Value) -> ir.Value | None:
    """The float16 that a value is cast from."""
    cast = real.producer()
    if cast is None or cast.op_type != "Cast" or cast.domain:
        return None
    given = cast.inputs[0]
    return given if given is not None and given.dtype == ir.DataType.FLOAT16 else None


def _readers(value: ir.Value | None, operators: tuple[str, ...]) -> Iterator[ir.Node]:
    """Nodes of these kinds, each of which alone reads what the one before gives."""
    for operator in operators:
        uses = () if value is None else tuple(value.uses())
        if len(uses) != 1 or uses[0].idx or uses[0].node.op_type != operator or uses[0].node.domain:
            return
        yield uses[0].node
        value = uses[0].node.outputs[0]


def _origin(real: ir.Value, scale: np.ndarray) -> ir.Value | None:
    """The INT8 that times a scale gives a value."""
    product = real.producer()
    if product is None or product.op_type != "Mul" or product.domain:
        return None
    factor, cast = _constant(product.inputs[1]), product.inputs[0]
    wide = None if cast is None else cast.producer()
    if wide is None or wide.op_type != "Cast" or factor is None or not np.array_equal(factor, scale):
        return None
    given = wide.inputs[0]
    return given if given is not None and given.dtype == ir.DataType.INT8 else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()
