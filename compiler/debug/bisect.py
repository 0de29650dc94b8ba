"""Narrows an error down without looking into the engine: its graph up to a cut, the reference's graph behind it.

    inputs -> [first k nodes, as an engine] -> tensors at the cut -> [the rest, in the reference] -> outputs

Looking at tensors prevents fusions. Where that makes an error vanish or move, the shortest beginning that shows it
still names the place, because only the tensors at the cut are looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from ..graph import Graph
from .distance import distance, worst
from .parts import alive, part, reads
from .trace import Side, shared_names

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Region:
    """Where the error begins.

    Attributes:
        nodes: names of the reference's nodes between the last cut without the error and the first with it.
        before: tensors at the last cut without; empty where that is the inputs.
        after: tensors at the first cut with the error; empty where that is the outputs.
        error: of the outputs at that cut.
        tried: cuts that were run.
    """

    nodes: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    error: float
    tried: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tensors that part a graph in two. `position` is the number of nodes before it."""

    position: int
    tensors: tuple[str, ...]


def cuts(subject: Graph, oracle: Graph) -> list[Cut]:
    """The places where the reference's graph can be parted at float tensors that the engine's graph holds too."""
    main = oracle.model.graph
    shared, living = frozenset(shared_names(subject, oracle)), alive(oracle)
    inputs = set(oracle.input_names)
    order = list(main)
    last: dict[str, int] = {value.name or "": len(order) for value in main.outputs}
    for position, node in enumerate(order):
        for value in reads(node, main):
            last[value.name or ""] = max(last.get(value.name or "", 0), position)
    found: dict[tuple[str, ...], Cut] = {}
    open_: dict[str, None] = {}
    for position, node in enumerate(order[:-1]):
        open_ |= {value.name: None for value in node.outputs if value.name in living and value.name in last}
        open_ = {name: None for name in open_ if last[name] > position}
        floats = tuple(name for name in open_ if name in shared)
        if floats and all(name in shared or name in inputs or not _needs(oracle, name) for name in open_):
            found[floats] = Cut(position + 1, floats)
    return sorted(found.values(), key=lambda cut: cut.position)


def _needs(oracle: Graph, name: str) -> bool:
    """Whether a tensor must come from the engine: floats must, while shapes and indices are right on either side."""
    value = next(v for node in oracle.model.graph for v in node.outputs if v.name == name)
    return value.dtype is None or value.dtype.is_floating_point()


def bisect(
    subject: Side,
    oracle: Side,
    inputs: Arrays,
    truth: Arrays,
    threshold: float,
    update: Callable[[float, str], None] = lambda fraction, what: None,
) -> Region | None:
    """The region in which the error of the outputs first exceeds `threshold`; None where it never does.

    Raises:
        EngineError: the engine's target refused a part of the graph.
    """
    places = cuts(subject.graph, oracle.graph)
    whole = worst([distance(truth[name], array) for name, array in subject.values(inputs, truth).items()])
    if not whole > threshold:
        return None
    low, high, error, tried = -1, len(places), whole, 1  # an error at `high`, none at `low`
    while high - low > 1:
        middle = (low + high) // 2
        update(tried / (1 + len(places).bit_length()), ", ".join(places[middle].tensors))
        found = _error(subject, oracle, inputs, truth, places[middle])
        tried += 1
        if found > threshold:
            high, error = middle, found
        else:
            low = middle
    order = list(oracle.graph.model.graph)
    begin = places[low].position if low >= 0 else 0
    end = places[high].position if high < len(places) else len(order)
    return Region(
        nodes=tuple(node.name or (node.outputs[0].name or "") for node in order[begin:end]),
        before=places[low].tensors if low >= 0 else (),
        after=places[high].tensors if high < len(places) else (),
        error=error,
        tried=tried,
    )


def _error(subject: Side, oracle: Side, inputs: Arrays, truth: Arrays, cut: Cut) -> float:
    made = subject.values(inputs, cut.tensors)
    rest = part(oracle.graph, {**inputs, **made}, tuple(truth))
    # an output that stands at the cut is given by the engine, not by the rest
    found = oracle.run(rest, {**inputs, **made})
    return worst([distance(array, made.get(name, found.get(name, array))) for name, array in truth.items()])
