"""ONNX Runtime on a CUDA device for engines with states: caches lie on the device, which a call updates in place.

    steps(ids, past, count)             one call; the logits come to the host
    steps.likeliest(ids, past, count)   one call; the likeliest tokens come to the host
    steps.token(last, past, ...)        a call of one token a row, and the choice of the next by options of each row
    steps.tokens(past, limit)           a call for each token, which is chosen there and read by the next one

The calls of one token a row have fixed places for all that they read and write, so that each is the launch of a CUDA
graph. The host takes a token while the device is at the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...compiler.generation.sampling import Sampling, options_of
from ...compiler.signature import Signature
from ...compiler.states import (
    BACK,
    COUNT,
    IDS,
    LOGITS,
    PAST,
    POSITION,
    asked_for,
    caches,
    call,
    max_length,
    numbers,
    rates,
    vocabulary,
)
from ...errors import DataError, EngineError
from .._caches import Caches
from .._onnxruntime import to_numpy
from ..base import Arrays, Bound
from .arrays import DeviceArray, new
from .choosers import GREEDY, file_for
from .dlpack import cuda_device, ort_dtype
from .finder import Finder
from .onnxruntime import DEVICE, NO_GRAPH, Buffers, DeviceBound, DeviceRunner, empty, run_options
from .pinned import pinned
from .stream import Stream

AHEAD = 2
"""Tokens that the device may be ahead of the host."""

GRAPHS = 64
"""CUDA graphs of an engine: of calls of one token, and of choices, for each number of rows. Further ones go without."""

Numbers = Mapping[str, np.ndarray]
Open = Callable[[str], Any]
"""Opens the session of one of the files of `choosers`."""


class CachesRunner(DeviceRunner):
    """A session whose caches may be kept in fewer bits than they are given in.

    Args:
        caches: how they are kept.
        fused: whether attention is GroupQueryAttention, which takes several rows as prompts or as one token each.
    """

    def __init__(
        self, session: Any, stream: Stream, signature: Signature, caches: Caches, *, fused: bool, graphs: bool
    ) -> None:
        outputs = [spec.name for spec in signature.outputs]
        super().__init__(session, stream, outputs, graphs=graphs, states=signature.states)
        self.signature = signature
        self._kept = caches
        self._fused = fused

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as of `DeviceRunner`. Caches that are given as float32 come back so."""
        stored, floats = self._stored(inputs)
        return self._kept.as_given(super().run(stored), floats)

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs on the device, for runs each of which writes the same tokens into the same caches."""
        stored, floats = self._stored(inputs)
        return _FloatBound(self, self._bound(stored), self._kept, floats)

    def check(self, given: Mapping[str, Any]) -> None:
        """Whether the engine takes these tokens behind those that are there.

        Raises:
            DataError: several tokens of several rows, behind others.
        """
        rows, length = given[IDS].shape
        past = np.minimum(np.asarray(given[PAST]), max_length(self.signature) - length)  # where the model writes
        if self._fused and rows > 1 and length > 1 and past.any():
            raise DataError(
                "fused attention takes several rows as prompts, or with one token each",
                expected="past of 0 in all rows",
                found=f"{rows} rows of {length} tokens behind others",
                hint="give the rows one by one",
            )

    def _stored(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The inputs as the engine takes them, and by the outputs of caches that came as float32 their inputs."""
        self.check(inputs)
        host = {name: to_numpy(name, value) for name, value in inputs.items() if cuda_device(value) is None}
        floats = {self.signature.states[name]: name for name in self._kept.given(host)}
        return {**inputs, **self._kept.stored(host)}, floats


class DecodingRunner(CachesRunner):
    """A session that keeps caches on the device from call to call.

    Args:
        open_chooser: opens what chooses tokens.
    """

    def __init__(
        self, session: Any, stream: Stream, signature: Signature, caches: Caches, open_chooser: Open, *, fused: bool,
        graphs: bool,
    ) -> None:  # fmt: skip
        super().__init__(session, stream, signature, caches, fused=fused, graphs=graphs)
        self._open_chooser = open_chooser
        self._choosers: dict[str, Any] = {}
        self._shared: dict[str, DeviceArray] = {}
        self._rows = 0
        self._calls: dict[int, Calls] = {}
        self._taken = False
        self._captured = 0

    def empty_caches(self, batch: int) -> dict[str, DeviceArray]:
        """Caches for so many rows that hold nothing yet."""
        return self.turn(lambda: self._empty_caches(batch))

    def steps(self, batch: int, caches: Mapping[str, Any] | None = None) -> DeviceSteps:
        """Calls for so many rows, with empty caches, or with those that are given.

        Caches and graphs of one generation are those of the next one; where several run at a time, the others have
        caches of their own.
        """
        if caches is not None:
            return DeviceSteps(self, self.turn(lambda: Calls(self, batch, caches)))
        calls = self.turn(lambda: self._own(batch))
        steps = DeviceSteps(self, calls)
        if calls is self._calls.get(batch):
            weakref.finalize(steps, setattr, self, "_taken", False)
        return steps

    def close(self) -> None:
        """As of `DeviceRunner`."""
        with contextlib.suppress(EngineError):  # closed before, or of a GPU that has failed
            self.turn(self.stream.synchronize)
        self._calls.clear()
        self._shared.clear()
        self._choosers.clear()
        super().close()

    def chooser(self, kind: str) -> Any:
        """The session that chooses tokens so. Called in a turn."""
        if kind not in self._choosers:
            self._choosers[kind] = self._open_chooser(kind)
        return self._choosers[kind]

    def binding(self) -> Any:
        """Of the decoder's own session. Called in a turn."""
        return self._session.io_binding()

    def launch(self, binding: Any, options: Any) -> None:
        """Starts a call of the decoder's own session. Called in a turn."""
        self._session.run_with_iobinding(binding, options)

    def graph(self) -> int:
        """A number for a CUDA graph that was not used yet, or that of none, where there are enough.

        A graph is captured by running a call again, which must not add to what the first one left.
        """
        if rates(self.signature) or self._captured == GRAPHS:
            return NO_GRAPH
        self._captured += 1
        return next(self._numbers)

    def _own(self, batch: int) -> Calls:
        """Calls on the first rows of the caches that generations share, which are as many as were asked for so far."""
        if self._taken:
            return Calls(self, batch, self._empty_caches(batch))
        if self._rows < batch:
            self._calls.clear()
            self._shared.clear()  # before there is memory for more
            self._shared, self._rows = self._empty_caches(batch), batch
        if batch not in self._calls:
            self._calls[batch] = Calls(self, batch, {name: cache[:batch] for name, cache in self._shared.items()})
        self._taken = True
        return self._calls[batch].again()

    def _empty_caches(self, batch: int) -> dict[str, DeviceArray]:
        made = {}
        for spec in caches(self.signature):
            shape = tuple(int(size) for size in spec.shape[1:])
            made[spec.name] = new(batch, shape, np.dtype(spec.dtype), self.stream, self.turn)
            made[spec.name].fill_with_zeros()
        return made


class _FloatBound(DeviceBound):
    """A call whose caches come back as they were given: `floats`, by the output their input, were no stored ones."""

    def __init__(self, runner: CachesRunner, buffers: Buffers, caches: Caches, floats: Mapping[str, str]) -> None:
        super().__init__(runner, buffers)
        self._caches, self._floats = caches, floats

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run, on the host."""
        return self._caches.as_given(super().outputs(), self._floats)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What calls of the same shapes reuse."""

    inputs: Mapping[str, Any]
    logits: Any
    kept: tuple[int, ...]
    binding: Any
    options: Any

    def fits(self, given: Numbers) -> bool:
        """Whether these inputs have its shapes."""
        return all(tuple(self.inputs[name].shape()) == array.shape for name, array in given.items())


class Calls:
    """Calls on some rows of caches, and how their tokens are chosen. All methods are called in a turn of the runner."""

    def __init__(self, runner: DecodingRunner, batch: int, caches: Mapping[str, DeviceArray]) -> None:
        self.batch, self.vocabulary = batch, vocabulary(runner.signature) or 0
        self._runner, self._stream, self._caches = runner, runner.stream, caches
        logits = next(spec for spec in runner.signature.outputs if spec.name == LOGITS)
        self.dtype = np.dtype(logits.dtype)
        self.logits = empty((batch, self.vocabulary), self.dtype.type, self._stream)
        self._other: _Call | None = None
        self._choosers: dict[str, Chooser] = {}
        self._finders: dict[int, Finder] = {}

    @functools.cached_property
    def one(self) -> _Call:
        """The call of one token a row, as a CUDA graph where there can be one."""
        names = numbers(self._runner.signature)
        shapes = {IDS: (self.batch, 1), BACK: (1,)}
        return self._call({name: shapes.get(name, (self.batch,)) for name in names}, self._runner.graph())

    def again(self) -> Calls:
        """The same with empty caches."""
        for cache in self._caches.values():
            cache.fill_with_zeros()
        return self

    def __call__(self, given: Numbers) -> np.ndarray:
        """The logits of a call, on the host: (batch, vocabulary), or (batch, kept, vocabulary)."""
        made = self._launched(given)
        return fetch(self._stream, made.logits, (self.batch, *made.kept, self.vocabulary), self.dtype)

    def likeliest(self, given: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens that follow a call, and the largest logits: (batch), or (batch, kept)."""
        made = self._launched(given)
        shape = (self.batch, *made.kept)
        rows = math.prod(shape)
        if rows not in self._finders:
            session = self._runner.chooser(GREEDY)
            self._finders[rows] = Finder(session, self._stream, rows, self.vocabulary, self.dtype)
        finder = self._finders[rows]
        finder(made.logits.data_ptr())
        return fetch(self._stream, finder.token, shape, np.dtype(np.int64)), fetch(
            self._stream, finder.best, shape, self.dtype
        )

    def _launched(self, given: Numbers) -> _Call:
        """A call with these inputs, once it is started."""
        made = self._fitting(given)
        for name, array in given.items():
            put(self._stream, made.inputs[name], array)
        self._runner.launch(made.binding, made.options)
        return made

    def chooser(self, kind: str) -> Chooser:
        """What chooses tokens by the logits of the last call, and makes them the input of the next one."""
        if kind not in self._choosers:
            self._choosers[kind] = Chooser(self._runner, kind, self)
        return self._choosers[kind]

    def next(self) -> None:
        """Starts the call of one token a row, on what lies at its places."""
        self._runner.launch(self.one.binding, self.one.options)

    def _fitting(self, given: Numbers) -> _Call:
        if given[IDS].shape[1] == 1 and self.one.fits(given):
            return self.one
        if self._other is None or not self._other.fits(given):
            self._other = self._call({name: array.shape for name, array in given.items()}, NO_GRAPH)
        return self._other

    def _call(self, shapes: Mapping[str, tuple[int, ...]], graph: int) -> _Call:
        device, binding = self._stream.device, self._runner.binding()
        inputs = {name: empty(shape, np.int64, self._stream) for name, shape in shapes.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, cache in self._caches.items():
            place = (DEVICE, device, cache.dtype.type, list(cache.shape), cache.address)
            binding.bind_input(name, *place)
            binding.bind_output(self._runner.signature.states[name], *place)
        kept = shapes.get(BACK, ())
        shape = (self.batch, *kept, self.vocabulary)
        logits = self.logits if math.prod(kept) == 1 else empty(shape, self.dtype.type, self._stream)
        binding.bind_output(LOGITS, DEVICE, device, self.dtype.type, list(shape), logits.data_ptr())
        return _Call(inputs, logits, kept, binding, run_options(graph, wait=False))


class Chooser:
    """Chooses the next token of each row on the device, and puts it where the call of one token reads it.

    All methods are called in a turn of the runner.
    """

    def __init__(self, runner: DecodingRunner, kind: str, calls: Calls) -> None:
        self._session, self._stream, self._calls = runner.chooser(kind), runner.stream, calls
        stream, batch = self._stream, calls.batch
        ids, past = calls.one.inputs[IDS], calls.one.inputs[PAST]
        self._best = empty((batch,), calls.dtype.type, stream)
        self._chance = empty((batch,), np.float64, stream)
        self._options = {
            name: empty((batch,), array.dtype.type, stream) for name, array in options_of([None], 1).items()
        }
        given = {"logits": calls.logits, "past": past, "chance": self._chance, **self._options}
        self._binding = self._session.io_binding()
        for value in self._session.get_inputs():
            self._binding.bind_ortvalue_input(value.name, given[value.name])
        for name, value in {"token": ids, "best": self._best, "past_next": past}.items():
            self._binding.bind_ortvalue_output(name, value)
        self._run = run_options(runner.graph(), wait=False)
        self._tokens = pinned((AHEAD, batch), np.int64, stream)
        self._bests = pinned((AHEAD, batch), calls.dtype, stream)
        self._events = [stream.event() for _ in range(AHEAD)]
        self._draws: Any = None
        self._samplings: tuple[Sampling | None, ...] = ()
        self._set([None] * batch)
        put(stream, self._chance, np.zeros(batch))
        self._launch()  # a graph is captured by running it, and here nothing is lost by that

    def begin(self, past: np.ndarray, sampling: Sampling | None, draws: np.ndarray | None) -> None:
        """Starts behind a call that left logits, and so many tokens in the caches.

        Args:
            draws: (tokens, batch), numbers from 0 up to 1 to draw by.
        """
        one = self._calls.one.inputs
        put(self._stream, one[PAST], past - 1)  # the choice of a token counts it
        put(self._stream, one[COUNT], np.ones_like(past))
        if BACK in one:
            put(self._stream, one[BACK], np.zeros(1, np.int64))
        if sampling is not None and draws is not None:
            self._draws = empty(draws.shape, np.float64, self._stream)
            put(self._stream, self._draws, draws)
            self._set([sampling] * self._calls.batch)

    def after(self, steps: range, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts some choices, and gives the tokens (batch) and largest logits (batch) of one once it is made."""
        for number in steps:
            self._start(number)
        return self._fetched(step % AHEAD)

    def _start(self, step: int) -> None:
        """Starts the choice of a token, and before all but the first the call that gives its logits."""
        if step:
            self._next()
        if self._draws is not None:
            size = 8 * self._calls.batch
            self._stream.copy(self._chance.data_ptr(), self._draws.data_ptr() + step * size, size)
        self._launch()
        self._send(step % AHEAD)

    def _fetched(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        self._events[at].synchronize()
        return self._tokens[at].copy(), self._bests[at].copy()

    def _send(self, at: int) -> None:
        """Starts to copy what was chosen to a place of the host."""
        self._stream.copy(self._tokens[at].ctypes.data, self._calls.one.inputs[IDS].data_ptr(), self._tokens[at].nbytes)
        self._stream.copy(self._bests[at].ctypes.data, self._best.data_ptr(), self._bests[at].nbytes)
        self._stream.record(self._events[at])

    def behind(
        self, last: np.ndarray, past: np.ndarray, samplings: Sequence[Sampling | None], chance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A call with these tokens, and the choice of the next: tokens (batch) and largest logits (batch)."""
        one = self._calls.one.inputs
        for name, value in ((IDS, last[:, None]), (PAST, past), (COUNT, np.ones_like(past))):
            put(self._stream, one[name], value)
        if BACK in one:
            put(self._stream, one[BACK], np.zeros(1, np.int64))
        if any(samplings):
            put(self._stream, self._chance, chance)
            self._set(samplings)
        self._next()
        self._launch()
        self._send(0)
        return self._fetched(0)

    def _next(self) -> None:
        """Starts the call of one token a row. Nothing was dropped before it."""
        one = self._calls.one.inputs
        if POSITION in one:
            self._stream.copy(one[POSITION].data_ptr(), one[PAST].data_ptr(), 8 * self._calls.batch)
        self._calls.next()

    def _set(self, samplings: Sequence[Sampling | None]) -> None:
        if tuple(samplings) == self._samplings:
            return
        self._samplings = tuple(samplings)
        for name, array in options_of(samplings, self._calls.vocabulary).items():
            put(self._stream, self._options[name], array)

    def _launch(self) -> None:
        self._session.run_with_iobinding(self._binding, self._run)


class DeviceSteps:
    """Calls one after the other on the same caches. Not for several threads at once; make one for each."""

    def __init__(self, runner: DecodingRunner, calls: Calls) -> None:
        self._runner, self._calls = runner, calls

    def __call__(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        count: np.ndarray,
        back: np.ndarray | None = None,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """The logits (batch, vocabulary) that follow, or with `back` (batch, kept, vocabulary)."""
        given = call(numbers(self._runner.signature), ids, past, count, back, position)
        self._runner.check(given)
        return asked_for(self._runner.turn(lambda: self._calls(given)), back)

    def likeliest(
        self, ids: np.ndarray, past: np.ndarray, count: np.ndarray, back: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens that follow, and the largest logits, as `Finding` tells."""
        given = call(numbers(self._runner.signature), ids, past, count, back, None)
        self._runner.check(given)
        tokens, best = self._runner.turn(lambda: self._calls.likeliest(given))
        shape = ids.shape[:1] if back is None else (len(ids), len(back))
        return tokens.reshape(shape), best.reshape(shape)

    def tokens(
        self, past: np.ndarray, limit: int, sampling: Sampling | None = None, draws: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next tokens and largest logits, as `Choosing` tells."""
        turn = self._runner.turn
        chooser = turn(lambda: self._calls.chooser(file_for([sampling])))
        turn(lambda: chooser.begin(past, sampling, draws))
        started = 0
        for step in range(limit):
            ahead = range(started, min(limit, step + AHEAD))
            yield turn(functools.partial(chooser.after, ahead, step))
            started = ahead.stop

    def token(
        self, last: np.ndarray, past: np.ndarray, samplings: Sequence[Sampling | None], chance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that follow, and the largest logits, as `Choosing` tells."""
        turn = self._runner.turn
        chooser = turn(lambda: self._calls.chooser(file_for(samplings)))
        return turn(lambda: chooser.behind(last, past, samplings, chance))


def put(stream: Stream, value: Any, array: np.ndarray) -> None:
    """Copies an array to its place on the device."""
    given = np.ascontiguousarray(array, ort_dtype(value))
    stream.copy(value.data_ptr(), given.ctypes.data, given.nbytes)


def fetch(stream: Stream, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """What lies on the device, once the work before is done."""
    array = np.empty(shape, dtype)
    stream.copy(array.ctypes.data, value.data_ptr(), array.nbytes)
    stream.synchronize()
    return array
