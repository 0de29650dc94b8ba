"""Stages of ONNX Runtime sessions on GPUs of one host: streams, events and copies from GPU to GPU.

    stage s, micro-batch k      wait until k has arrived in a slot of the stage, launch, signal that it is made
    sending from s              wait until it is made and a slot of stage s + 1 is free, copy what later stages want,
                                signal that k has arrived there, and that the slot here is free

All of that is put on the stage's two streams by a thread of the stage; nothing waits on the host until the last
micro-batch has been started. Each stage has `SLOTS` slots, so that it computes while one micro-batch arrives and
another one leaves.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ...errors import EngineError
from ..base import Arrays, Bound
from ..stages.plan import Cutter, Plan
from .dlpack import Borrowed, borrow, cuda_device, require_device
from .onnxruntime import DeviceRunner
from .slots import Call, Inputs, Places, Relay, Row, Slot, StoppedError, fill, new
from .stream import Stream

SLOTS = 3
MAX_SHAPES = 8
"""Sizes of micro-batches that get slots, with CUDA graphs of their own; others flow by way of the host."""


class ChainRunner:
    """Stages that hand on what they make by themselves. Calls from several threads take turns."""

    def __init__(self, plan: Plan, runners: Sequence[DeviceRunner], cutter: Cutter) -> None:
        self._plan, self._runners, self._cutter = plan, tuple(runners), cutter
        self._lock = threading.Lock()
        self._senders = [runner.turn(partial(Stream, runner.stream.device)) for runner in runners[:-1]]
        self._pool = ThreadPoolExecutor(len(runners), thread_name_prefix="stage")
        self._rows: dict[object, Row] = {}
        self._calls: dict[object, Call] = {}
        self._closed = False
        for one, other in itertools.pairwise(runners):
            if one.stream.device != other.stream.device:
                one.stream.reach(other.stream)
                other.stream.reach(one.stream)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as NumPy arrays; tensors on the first stage's device are read in place."""
        with self._lock:
            self._require_open()
            placed = {name: self._place(name, value) for name, value in inputs.items()}
            if not self._fits(placed):
                return self._by_host(inputs)
            call = self._prepare(placed)
            self._execute(call)
            return self._fetch(call)

    def bind(self, inputs: Arrays) -> Bound:
        """Copies the inputs to the first stage's device."""
        with self._lock:
            self._require_open()
            placed = {name: np.asarray(value, order="C") for name, value in inputs.items()}
            if not self._fits(placed):
                from ..base import HostBound

                return HostBound(lambda: self.run(placed))
            return ChainBound(self, self._new_call(placed))

    def reset(self) -> None:
        """Sessions keep no state."""

    def close(self) -> None:
        """Waits for the running call, and gives the devices' memory back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._pool.shutdown()
            self._settle()
            for sender in self._senders:
                sender.close()
            self._rows.clear()
            self._calls.clear()
            for runner in self._runners:
                runner.close()

    def start(self, call: Call) -> None:
        """Starts a call; the devices may still be at work when it returns."""
        with self._lock:
            self._require_open()
            self._execute(call)

    def finish(self) -> None:
        """Waits until everything started has finished."""
        last = self._runners[-1]
        last.turn(last.stream.synchronize)

    def fetch(self, call: Call) -> dict[str, np.ndarray]:
        """The outputs of a call, on the host."""
        with self._lock:
            return self._fetch(call)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", hint="load it again")

    def _place(self, name: str, value: Any) -> Borrowed | np.ndarray:
        device, stream = cuda_device(value), self._runners[0].stream
        if device is None:
            return np.ascontiguousarray(value if isinstance(value, np.ndarray) else np.from_dlpack(value))
        require_device(name, device, stream.device)
        return borrow(name, value, np.dtype(str(value.dtype).removeprefix("torch.")), stream.handle)

    def _sizes(self, placed: Inputs) -> tuple[int, tuple[int, ...]]:
        batch = self._cutter.batch({name: value.shape for name, value in placed.items()})
        return batch, tuple(self._cutter.sizes(batch)) if not self._cutter.reason else (batch,)

    def _fits(self, placed: Inputs) -> bool:
        """Whether there are slots for a call, or room for new ones."""
        _, sizes = self._sizes(placed)
        new = {self._key(placed, rows) for rows in sizes} - self._rows.keys()
        return len(self._rows) + len(new) <= MAX_SHAPES

    def _key(self, placed: Inputs, rows: int) -> object:
        return tuple((name, self._cutter.shape(name, value.shape, rows)) for name, value in sorted(placed.items()))

    def _prepare(self, placed: Inputs) -> Call:
        """A call whose buffers are those of an earlier one of the same shapes, with these inputs in them."""
        key = tuple((name, value.shape) for name, value in sorted(placed.items()))
        if key not in self._calls:
            if len(self._calls) >= MAX_SHAPES:
                self._calls.pop(next(iter(self._calls)))
            self._calls[key] = self._new_call(placed)
        else:
            first = self._runners[0]
            first.turn(partial(fill, first.stream, self._calls[key].inputs, placed))
        return self._calls[key]

    def _new_call(self, placed: Inputs) -> Call:
        first, last = self._runners[0], self._runners[-1]
        batch, sizes = self._sizes(placed)
        inputs = first.turn(partial(new, first.stream, {n: (v.shape, v.dtype) for n, v in placed.items()}))
        first.turn(partial(fill, first.stream, inputs, placed))
        first.turn(first.stream.synchronize)
        for rows in dict.fromkeys(sizes):
            key = self._key(placed, rows)
            if key not in self._rows:
                self._rows[key] = self._new_row(inputs, rows)
        row = self._rows[self._key(placed, sizes[0])]
        shapes = {}
        for name in self._plan.outputs:
            place = row[-1][0].place(name)
            shapes[name] = (self._cutter.shape(name, place.shape, batch), place.dtype)
        return Call(batch, inputs, sizes, last.turn(partial(new, last.stream, shapes)))

    def _new_row(self, inputs: Places, rows: int) -> Row:
        """Slots for micro-batches of that many rows, with their CUDA graphs captured: nothing else runs meanwhile."""
        self._settle()
        row: list[tuple[Slot, ...]] = []
        values: Places = {
            name: dataclasses.replace(place, shape=self._cutter.shape(name, place.shape, rows))
            for name, place in inputs.items()
        }
        before: Stream | None = None
        for number, runner in enumerate(self._runners):
            taken = {name: values[name] for name in self._plan.links[number].inputs}
            wanted = self._plan.needed(number)
            carried = {name: place for name, place in values.items() if name in wanted and name not in taken}
            slots = tuple(runner.turn(partial(self._new_slot, runner, taken, carried, before)) for _ in range(SLOTS))
            row.append(slots)
            made = {name: slots[0].place(name) for name in self._plan.links[number].outputs}
            kept = {name: slots[0].place(name) for name in (*taken, *carried)}
            values = {name: place for name, place in {**kept, **made}.items() if name in wanted}
            before = runner.stream
        return tuple(row)

    def _new_slot(self, runner: DeviceRunner, taken: Places, carried: Places, before: Stream | None) -> Slot:
        stream = runner.stream
        buffers = runner.buffers(taken)
        for _ in range(2):  # the first captures, the second replays
            buffers.launch()
        stream.synchronize()
        room = new(stream, {name: (place.shape, place.dtype) for name, place in carried.items()})
        for name, place in carried.items():  # the stages behind are tried with it
            stream.copy(room[name].address, place.address, place.size_bytes)
        stream.synchronize()
        made, free = stream.event(), stream.event()
        if before is None:
            return Slot(buffers, room, stream.event(), made, free)
        with before.current():
            return Slot(buffers, room, before.event(), made, free)

    def _settle(self) -> None:
        for runner in self._runners:
            runner.turn(runner.stream.synchronize)

    def _execute(self, call: Call) -> None:
        rows = [self._rows[self._key(call.inputs, rows)] for rows in call.sizes]
        relay = Relay(len(self._runners), {id(row): row for row in rows}.values())
        starts = np.cumsum([0, *call.sizes]).tolist()
        tasks = [
            self._pool.submit(runner.turn, partial(self._stage, number, call, rows, starts, relay))
            for number, runner in enumerate(self._runners)
        ]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        told = [error for error in errors if not isinstance(error, StoppedError)]
        if errors:
            raise (told or errors)[0]

    def _stage(self, number: int, call: Call, rows: Sequence[Row], starts: Sequence[int], relay: Relay) -> None:
        """Puts the work of a stage for all micro-batches on its stream."""
        try:
            for piece, row in enumerate(rows):
                self._piece(number, call, row, starts[piece], relay)
        except BaseException:
            relay.stop()
            raise

    def _piece(self, number: int, call: Call, row: Row, start: int, relay: Relay) -> None:
        stream = self._runners[number].stream
        if number == 0:
            slot = relay.take(0, row)
            stream.wait(slot.free)
            for name in (*self._plan.links[0].inputs, *slot.carried):
                target = slot.place(name)
                offset = self._cutter.offset(name, call.inputs[name], call.batch, start)
                stream.copy(target.address, call.inputs[name].address + offset, target.size_bytes)
        else:
            slot = relay.receive(number)
            stream.wait(slot.arrived)
        slot.buffers.launch()
        if number + 1 == len(self._runners):
            for name, result in call.results.items():
                source = slot.place(name)
                offset = self._cutter.offset(name, result, call.batch, start)
                stream.copy(result.address + offset, source.address, source.size_bytes)
            stream.record(slot.free)
        else:
            stream.record(slot.made)
            following, other = relay.take(number + 1, row), self._runners[number + 1].stream
            sender = self._senders[number]
            sender.wait(slot.made)
            sender.wait(following.free)
            for name in (*self._plan.links[number + 1].inputs, *following.carried):
                source, target = slot.place(name), following.place(name)
                sender.send(other, target.address, source.address, source.size_bytes)
            sender.record(following.arrived)
            sender.record(slot.free)
            relay.send(number + 1, following)
        relay.give(number, row, slot)

    def _fetch(self, call: Call) -> dict[str, np.ndarray]:
        last = self._runners[-1]

        def read() -> dict[str, np.ndarray]:
            found = {name: np.empty(place.shape, place.dtype) for name, place in call.results.items()}
            for name, array in found.items():
                last.stream.copy(array.ctypes.data, call.results[name].address, array.nbytes)
            last.stream.synchronize()
            return found

        return last.turn(read)

    def _by_host(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One stage after the other, for sizes that have no slots."""
        pieces = []
        for piece in self._cutter.cut({name: np.asarray(value) for name, value in inputs.items()}):
            values = dict(piece)
            for link, runner in zip(self._plan.links, self._runners, strict=True):
                values |= runner.run({name: values[name] for name in link.inputs})
            pieces.append({name: values[name] for name in self._plan.outputs})
        return self._cutter.join(pieces)


class ChainBound:
    """Inputs on the first device, for repeated runs."""

    def __init__(self, runner: ChainRunner, call: Call) -> None:
        self._runner, self._call = runner, call

    def run(self) -> None:
        """Starts one execution."""
        self._runner.start(self._call)

    def synchronize(self) -> None:
        """Waits for the devices."""
        self._runner.finish()

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Host milliseconds of each run, the devices idle before each; no event spans several devices."""
        times = []
        self.synchronize()
        for _ in range(iterations):
            start = time.perf_counter_ns()
            self.run()
            self.synchronize()
            times.append((time.perf_counter_ns() - start) / 1e6)
        return times, None

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run, on the host."""
        return self._runner.fetch(self._call)
