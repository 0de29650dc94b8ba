"""Stages that hand on what they make, on streams that a thread each plays: work starts late, and events order it."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time

import numpy as np
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError
from enginesmith.targets.cuda import chain, slots
from enginesmith.targets.cuda.chain import ChainRunner
from enginesmith.targets.cuda.dlpack import Borrowed
from enginesmith.targets.stages.plan import Cutter, Link, Plan

UNFILLED = -77


class Event:
    """A wait counts for the last record before it, as CUDA has it; none makes no wait."""

    def __init__(self):
        self.token = None


class Stream:
    """Does its work in order, in a thread of its own, and late."""

    def __init__(self, device, delay):
        self.device, self.delay = device, delay
        self.sent = 0
        self.reached = []
        self._work = queue.Queue()
        threading.Thread(target=self._play, daemon=True).start()

    def _play(self):
        while True:
            act = self._work.get()
            time.sleep(self.delay)
            act()

    def put(self, act):
        self._work.put(act)

    def copy(self, destination, source, size):
        assert destination
        assert source
        self.put(lambda: ctypes.memmove(destination, source, size))

    def send(self, other, destination, source, size):
        self.sent += size
        self.copy(destination, source, size)

    def event(self):
        return Event()

    def record(self, event):
        token = event.token = threading.Event()
        self.put(token.set)

    def wait(self, event):
        if token := event.token:
            self.put(lambda: token.wait(30))

    def reach(self, other):
        self.reached.append(other.device)

    def synchronize(self):
        done = threading.Event()
        self.put(done.set)
        assert done.wait(30)

    def current(self):
        return contextlib.nullcontext()

    def close(self):
        self.synchronize()


class Value:
    """An OrtValue: memory that nobody has filled."""

    def __init__(self, shape, dtype):
        self.array = np.full(shape, UNFILLED, dtype)

    def data_ptr(self):
        return self.array.ctypes.data


class Buffers:
    def __init__(self, stream, function, placed, names):
        self._stream, self._function = stream, function
        self._inputs = {name: Value(value.shape, value.dtype) for name, value in placed.items()}
        for name, value in placed.items():
            stream.copy(self._inputs[name].data_ptr(), value.address, value.size_bytes)
        stream.synchronize()
        made = function(**{name: value.array for name, value in self._inputs.items()})
        self._outputs = {name: Value(array.shape, array.dtype) for name, array in zip(names, made, strict=True)}
        self._names = names

    def place(self, name):
        array = {**self._inputs, **self._outputs}[name].array
        return Borrowed(array.ctypes.data, array.shape, array.dtype, array)

    def launch(self):
        self._stream.put(self._compute)

    def _compute(self):
        made = self._function(**{name: value.array.copy() for name, value in self._inputs.items()})
        for name, array in zip(self._names, made, strict=True):
            self._outputs[name].array[...] = array


class Runner:
    """A stage; `turn` runs in the calling thread, one call at a time."""

    def __init__(self, device, function, outputs, delay):
        self.stream = Stream(device, delay)
        self._function, self._outputs = function, outputs
        self._lock = threading.Lock()
        self.made, self.closed = 0, False

    def turn(self, call):
        with self._lock:
            return call()

    def buffers(self, placed):
        self.made += 1
        return Buffers(self.stream, self._function, placed, self._outputs)

    def run(self, inputs):
        return dict(zip(self._outputs, self._function(**inputs), strict=True))

    def close(self):
        self.closed = True


PLAN = Plan(
    (Link("0", ("x", "scale"), ("early", "h")), Link("1", ("h",), ("k",)), Link("2", ("k", "h", "x"), ("y",))),
    ("y", "early"),
)
X, SCALE = TensorSpec("x", "float32", ("N", 4)), TensorSpec("scale", "float32", (4,))
OUT = tuple(TensorSpec(name, "float32", ("N", 4)) for name in ("y", "early"))
STAGES = (
    (lambda x, scale: (x * scale, x + 1), ("early", "h")),
    (lambda h: (h * h,), ("k",)),
    (lambda k, h, x: (last(k, h, x),), ("y",)),
)


def last(k, h, x):
    assert not (x == UNFILLED).any()  # as indices, what nobody has filled would read beyond a table
    return k - h + x


@pytest.fixture
def chained(monkeypatch):
    """A pipeline of three stages; `delays` are the seconds before each act of their streams."""
    senders = []
    monkeypatch.setattr(chain, "Stream", lambda device: senders.append(Stream(device, 0.001 * device)) or senders[-1])
    monkeypatch.setattr(slots, "empty", lambda shape, element_type, stream: Value(shape, element_type))
    monkeypatch.setattr(slots, "ort_dtype", lambda value: value.array.dtype)

    def make(rows=2, delays=(0, 0, 0), stages=STAGES):
        runners = [Runner(n, *stage, delay) for n, (stage, delay) in enumerate(zip(stages, delays, strict=True))]
        signature = Signature(inputs=(X, SCALE), outputs=OUT, axes={"N": AxisRange(1, 4, 64)})
        return ChainRunner(PLAN, runners, Cutter(signature, 3, rows)), runners

    return make


def feed(batch, seed=0):
    random = np.random.default_rng(seed)
    arrays = random.standard_normal((batch, 4)), random.standard_normal(4)
    return dict(zip(("x", "scale"), (array.astype(np.float32) for array in arrays), strict=True))


def expected(x, scale):
    h = x + 1
    return {"y": h * h - h + x, "early": x * scale}


def assert_right(found, inputs):
    assert list(found) == ["y", "early"]
    for name, array in expected(**inputs).items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.002, 0, 0), (0, 0.002, 0), (0, 0, 0.002), (0.001, 0, 0.001)])
def test_whichever_stage_is_slow(chained, delays):
    runner, stages = chained(delays=delays)
    for batch in (13, 1, 13, 4):
        inputs = feed(batch, batch)
        assert_right(runner.run(inputs), inputs)
    assert [stage.stream.reached for stage in stages] == [[1], [0, 2], [1]]
    runner.close()
    assert all(stage.closed for stage in stages)


def test_runs_that_are_started_before_the_last_is_done(chained):
    runner, _ = chained(delays=(0, 0.001, 0.002))
    inputs = feed(9)
    bound = runner.bind(inputs)
    for _ in range(4):
        bound.run()
    bound.synchronize()
    assert_right(bound.outputs(), inputs)
    other = runner.bind(feed(9, seed=5))
    other.run()
    bound.run()
    assert_right(other.outputs(), feed(9, seed=5))
    assert_right(bound.outputs(), inputs)
    assert [len(bound.timed(3)[0]), bound.timed(1)[1]] == [3, None]


def test_slots_are_made_once_for_each_size(chained):
    runner, stages = chained(rows=4)
    for batch in (8, 8, 12, 9, 9):
        assert_right(runner.run(feed(batch)), feed(batch))
    assert [stage.made for stage in stages] == [2 * chain.SLOTS] * 3  # micro-batches of 4 and of 1


def test_sizes_beyond_the_limit_go_by_the_host(chained, monkeypatch):
    monkeypatch.setattr(chain, "MAX_SHAPES", 1)
    runner, stages = chained(rows=4)
    for batch in (8, 3, 8, 7):
        assert_right(runner.run(feed(batch)), feed(batch))
    bound = runner.bind(feed(3))
    bound.run()
    assert_right(bound.outputs(), feed(3))
    assert [stage.made for stage in stages] == [chain.SLOTS] * 3


def test_only_what_is_wanted_passes(chained):
    runner, _ = chained(rows=4)
    runner.run(feed(4))
    size = 4 * 4 * 4
    assert [sender.sent for sender in runner._senders] == [3 * size, 4 * size]  # h x early, k h x early


def test_a_stage_that_fails_ends_the_call(chained, monkeypatch):
    runner, _ = chained()
    inputs = feed(13)
    assert_right(runner.run(inputs), inputs)
    real, calls = Buffers.launch, []

    def launch(self):
        if self._names == ("k",):
            calls.append(1)
            if len(calls) == 3:
                raise EngineError("out of memory")
        real(self)

    monkeypatch.setattr(Buffers, "launch", launch)
    with pytest.raises(EngineError, match="out of memory"):
        runner.run(inputs)
    assert_right(runner.run(feed(13, seed=1)), feed(13, seed=1))


def test_calls_from_several_threads(chained):
    runner, _ = chained(delays=(0, 0.001, 0))
    threads, wrong = [], []

    def call(seed):
        inputs = feed(5, seed)
        found = runner.run(inputs)
        if not all(np.array_equal(found[name], array) for name, array in expected(**inputs).items()):
            wrong.append(seed)

    for seed in range(8):
        threads.append(threading.Thread(target=call, args=(seed,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_chain_is_closed(chained):
    runner, _ = chained()
    bound = runner.bind(feed(4))
    runner.close()
    runner.close()
    for call in (lambda: runner.run(feed(4)), lambda: runner.bind(feed(4)), bound.run):
        with pytest.raises(EngineError, match="the engine is closed"):
            call()


class OnGpu:
    shape, dtype = (4, 4), np.dtype(np.float32)

    def __dlpack_device__(self):
        return 2, 1


def test_a_tensor_on_another_device_is_refused(chained):
    runner, _ = chained()
    with pytest.raises(DataError, match="input 'x' lies on another device"):
        runner.run({"x": OnGpu(), "scale": np.ones(4, np.float32)})
