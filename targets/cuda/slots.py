"""Room for micro-batches on the devices, and how threads of stages hand it to each other."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .dlpack import Borrowed, ort_dtype
from .onnxruntime import Buffers, empty
from .stream import Event, Stream

Places = Mapping[str, Borrowed]
Inputs = Mapping[str, Borrowed | np.ndarray]


@dataclasses.dataclass
class Slot:
    """Room for one micro-batch at one stage.

    Attributes:
        carried: what later stages want and this one does not read.
        arrived: on the sending stream of the stage before, once everything lies here.
        made: on the stage's own stream, once the stage has computed.
        free: on the stream that works last with the slot, once nothing here is wanted any more.
    """

    buffers: Buffers
    carried: Places
    arrived: Event
    made: Event
    free: Event

    def place(self, name: str) -> Borrowed:
        """Where a value lies."""
        return self.carried[name] if name in self.carried else self.buffers.place(name)


Row = tuple[tuple[Slot, ...], ...]
"""The slots of each stage, for one size of micro-batches."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call on the devices: where its inputs lie on the first, and its results on the last."""

    batch: int
    inputs: Places
    sizes: tuple[int, ...]
    results: Places


class StoppedError(Exception):
    """Another stage failed."""


class Relay:
    """Hands slots from thread to thread during a call; what is on the devices is ordered by events."""

    def __init__(self, stages: int, rows: Iterable[Row]) -> None:
        self._arrived = [queue.SimpleQueue[Slot | None]() for _ in range(stages)]
        self._free: dict[tuple[int, int], queue.SimpleQueue[Slot | None]] = {}
        for row in rows:
            for number, slots in enumerate(row):
                waiting = self._free[number, id(row)] = queue.SimpleQueue()
                for slot in slots:
                    waiting.put(slot)

    def take(self, number: int, row: Row) -> Slot:
        """A slot of a stage whose last use has been started."""
        return _got(self._free[number, id(row)])

    def give(self, number: int, row: Row, slot: Slot) -> None:
        """Gives a slot back."""
        self._free[number, id(row)].put(slot)

    def send(self, number: int, slot: Slot) -> None:
        """Tells a stage of a micro-batch on its way."""
        self._arrived[number].put(slot)

    def receive(self, number: int) -> Slot:
        """The next micro-batch of a stage."""
        return _got(self._arrived[number])

    def stop(self) -> None:
        """Ends the waiting of all threads."""
        for waiting in (*self._arrived, *self._free.values()):
            waiting.put(None)


def _got(waiting: queue.SimpleQueue[Slot | None]) -> Slot:
    slot = waiting.get()
    if slot is None:
        waiting.put(None)
        raise StoppedError
    return slot


def new(stream: Stream, specs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> dict[str, Borrowed]:
    """New memory of a device."""
    found = {}
    for name, (shape, dtype) in specs.items():
        value = empty(shape, dtype.type, stream)
        found[name] = Borrowed(value.data_ptr(), tuple(shape), ort_dtype(value), value)
    return found


def fill(stream: Stream, places: Places, values: Inputs) -> None:
    """Copies inputs to a device; arrays may change as soon as it returns."""
    for name, value in values.items():
        if isinstance(value, Borrowed):
            stream.copy(places[name].address, value.address, value.size_bytes)
        else:
            stream.copy(places[name].address, value.ctypes.data, value.nbytes)
    stream.synchronize()
