"""ONNX Runtime on the CPU for engines with states: a cache lies in one buffer, which a call updates in place.

An output that is bound to the buffer of its input makes ONNX Runtime write into it: GroupQueryAttention then writes the
new keys and values alone, and ScatterElements leaves the copy out. That is right as long as nothing else reads a
state's input, which `shares_buffers` finds out when the engine is built.

Caches may be kept in fewer bits. Those of a call that gives them as float32 are stored in copies, and come back so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.signature import Signature
from ..compiler.states import (
    BACK,
    COUNT,
    IDS,
    LOGITS,
    PAST,
    POSITION,
    as_stored,
    asked_for,
    call,
    empty_caches,
    numbers,
)
from ..errors import EngineError
from ._caches import Caches
from ._caches import facts as cache_facts
from ._onnxruntime import HostRunner, failures, to_numpy
from .base import Arrays, Bound, BuildRequest, HostBound

_WRITES = {"ScatterElements": (0,), "ScatterND": (0,), "GroupQueryAttention": (3, 4)}
"""Operators that leave what is not new where it is, where input and output share a buffer: places of that input."""


def shares_buffers(path: Path, states: Mapping[str, str]) -> bool:
    """Whether each cache of a graph is read by one node alone, which writes the new tokens into it and gives it on."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    for name, output in states.items():
        readers = [node for node in graph.node if name in node.input]
        if len(readers) != 1 or name in {value.name for value in graph.output}:
            return False
        (node,) = readers
        if node.op_type == "Where":  # a buffer of its own, before anything is written into this one
            nexts = [other for other in graph.node if node.output[0] in other.input]
            if len(nexts) != 1 or nexts[0].op_type != "Add" or output not in nexts[0].output:
                return False
            continue
        if output not in node.output:
            return False
        places = [index for index, value in enumerate(node.input) if value == name]
        if len(places) != 1 or places[0] not in _WRITES.get(node.op_type, ()):
            return False
        if node.op_type == "GroupQueryAttention" and node.output[places[0] - 2] != output:
            return False
        if any(name in _captured(other) for other in graph.node):
            return False
    return True


def saved(request: BuildRequest, entry: Path) -> BuildRequest:
    """Saves the graph of a request, and gives the request with the signature of what is saved.

    Caches that the graph keeps in fewer bits are taken and given so, and the scales of those in 8 bits are saved beside
    it.
    """
    from ..compiler.quantization.cache_ends import stored

    graph, signature = request.graph, request.signature
    assert graph is not None
    if not signature.states:
        graph.save(entry)
        return request
    found = stored(graph, signature.states)
    caches = Caches(found.scales, found.halves)
    found.graph.save(entry)
    if caches.dtypes and not shares_buffers(entry, signature.states):
        request.log("caches are given and taken as float32: they are not updated in place")
        graph.save(entry)
        return request
    caches.write(request.directory)
    return dataclasses.replace(request, graph=found.graph, signature=as_stored(signature, caches.dtypes))


def facts(entry: Path, signature: Signature) -> dict[str, Any]:
    """What engine.json says of the caches; nothing where there are none."""
    if not signature.states:
        return {}
    return cache_facts(signature, in_place=shares_buffers(entry, signature.states))


def _captured(node: Any) -> set[str]:
    """Names that the subgraphs of a node read."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                found |= {*inner.input, *_captured(inner)}
    return found


class StatesRunner(HostRunner):
    """A session whose caches stay where they are.

    Args:
        caches: how they are kept.
    """

    def __init__(self, session: Any, signature: Signature, caches: Caches | None = None) -> None:
        super().__init__(session, [spec.name for spec in signature.outputs])
        self._signature = signature
        self._caches = caches or Caches()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name. The given caches stay as they are: the engine updates copies, in place as always."""
        bound = self.bind({name: to_numpy(name, value) for name, value in inputs.items()})
        bound.run()
        return bound.outputs()

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs, ready for repeated runs, each of which writes the same tokens into the same caches."""
        states, stored = self._signature.states, self._caches.stored(inputs)
        steps = self.steps(len(inputs[IDS]), {name: np.array(stored[name], order="C") for name in states})
        call = (inputs[IDS], inputs[PAST], inputs[COUNT], inputs.get(BACK), inputs.get(POSITION))
        floats = {states[name]: name for name in self._caches.given(inputs)}
        outputs = {out: steps.caches[name] for name, out in states.items()}
        return _BoundCall(lambda: {LOGITS: steps(*call), **outputs}, self._caches, floats)

    def empty_caches(self, batch: int) -> dict[str, np.ndarray]:
        """Caches for so many rows that hold nothing yet."""
        return empty_caches(self._signature, batch)

    def steps(self, batch: int, caches: Mapping[str, np.ndarray] | None = None) -> Steps:
        """Calls for so many rows, which share caches: empty ones, or those that are given."""
        if self._session is None:
            raise EngineError("the engine is closed", hint="load it again")
        return Steps(self._session, self._signature, caches or self.empty_caches(batch))


class _BoundCall(HostBound):
    """A call whose caches come back as they were given: `floats`, by the output their input, were no stored ones."""

    def __init__(self, call: Callable[[], dict[str, np.ndarray]], caches: Caches, floats: Mapping[str, str]) -> None:
        super().__init__(call)
        self._caches = caches
        self._floats = floats

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run."""
        return self._caches.as_given(super().outputs(), self._floats)


class Steps:
    """Calls one after the other on the same caches. Not for several threads at once; make one for each.

    Attributes:
        caches: the buffers, by the name of the input.
    """

    def __init__(self, session: Any, signature: Signature, caches: Mapping[str, np.ndarray]) -> None:
        import onnxruntime

        self.caches = dict(caches)
        self._session = session
        self._states = signature.states
        self._numbers = numbers(signature)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy  # shares the array's memory
        self._buffers = {name: self._value(array) for name, array in self.caches.items()}
        self._logits = next(spec for spec in signature.outputs if spec.name == LOGITS)
        self._kept: _Call | None = None

    def __call__(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        count: np.ndarray,
        back: np.ndarray | None = None,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """The logits (batch, vocabulary) that follow, or with `back` (batch, kept, vocabulary); until the next call."""
        given = call(self._numbers, ids, past, count, back, position)
        shapes = {name: array.shape for name, array in given.items()}
        if self._kept is None or self._kept.shapes != shapes:
            self._kept = self._bound(shapes)
        for name, array in given.items():
            self._kept.arrays[name][...] = array
        try:
            self._session.run_with_iobinding(self._kept.binding)
        except failures() as problem:
            raise EngineError(f"ONNX Runtime failed to run the engine: {problem}") from problem
        return asked_for(self._kept.logits, back)

    def _bound(self, shapes: Mapping[str, tuple[int, ...]]) -> _Call:
        """Inputs of these shapes and all outputs, bound to buffers of their own."""
        arrays = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
        logits = np.zeros((len(arrays[IDS]), *shapes.get(BACK, ()), int(self._logits.shape[-1])), self._logits.dtype)
        binding = self._session.io_binding()
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, self._value(array))
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(self._states[name], buffer)
        binding.bind_ortvalue_output(LOGITS, self._value(logits))
        return _Call(dict(shapes), arrays, logits, binding)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What calls of the same shapes reuse."""

    shapes: Mapping[str, tuple[int, ...]]
    arrays: Arrays
    logits: np.ndarray
    binding: Any
