"""Engines of TorchInductor with states: caches stay where they are, and a call writes into them.

steps(ids, past, count)             one call; the logits come to the host
steps.likeliest(ids, past, count)   one call; the likeliest tokens come to the host
steps.token(last, past, ...)        a call of one token a row, and the choice of the next by options of each row
steps.tokens(past, limit)           a call for each token, which is chosen beside the logits and read by the next call
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...compiler.states import BACK, IDS, LOGITS, caches, rates
from ...errors import EngineError
from .._caches import Caches
from .._torch import TorchBound, TorchRunner, last_line, on_gpu, tensors_of
from ..base import Arrays, Bound, EngineInfo
from .decoders import ANY, MANY, ONE, program_for, tensors
from .graphs import Graphs
from .kept import Kept
from .package import Package
from .steps import Calls, Steps


class DecodingRunner(TorchRunner):
    """The programs of a decoder, which share their weights.

    Attributes:
        device: where they are; of a GPU with its number, for each thread has a current one of its own.
        on_gpu: whether that is one.
    """

    def __init__(self, directory: Path, info: EngineInfo, device: str) -> None:
        self.signature, self.on_gpu = info.signature, on_gpu(device)
        self.device = f"cuda:{torch.cuda.current_device()}" if self.on_gpu else device
        self._turn = threading.RLock()
        self._programs: dict[str, Callable[..., Sequence[torch.Tensor]]] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._kept = Caches.read(directory, info.signature)
        self._shared: dict[str, torch.Tensor] = {}
        self._calls: dict[int, Calls] = {}
        self._taken = False
        self._graphs = Graphs()
        super().__init__(lambda: self._load_programs(directory), info, self.device)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as of `TorchRunner`. The given caches stay, and come back in their dtype."""
        stored, floats = self._stored(inputs)
        return self._kept.as_given(super().run(stored), floats)

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs on the device, for runs each of which writes the same tokens into the same caches."""
        stored, floats = self._stored(inputs)
        return _Bound(self, tensors_of(stored, self._info, self.device), self._kept, floats)

    def empty_caches(self, batch: int) -> dict[str, Kept]:
        """Caches for so many rows that hold nothing yet."""
        return {name: Kept(tensor) for name, tensor in self._empty(batch).items()}

    def steps(self, batch: int, caches: Mapping[str, Kept] | None = None) -> Steps:
        """Calls for so many rows, with empty caches, or with those that are given.

        Caches and graphs of one generation are those of the next one; where several run at a time, the others have
        caches of their own.
        """
        with self.turn():
            if caches is not None:
                return Steps(self, Calls(self, batch, {name: cache.tensor for name, cache in caches.items()}))
            if self._taken:
                return Steps(self, Calls(self, batch, self._empty(batch)))
            calls, self._taken = self._own(batch), True
        steps = Steps(self, calls)
        weakref.finalize(steps, setattr, self, "_taken", False)
        return steps

    def close(self) -> None:
        """As of `TorchRunner`. The weights are freed at once.

        AOTInductor's runtime refers to them for ever, so what is freed is what they stand for. On a CPU that is the
        file itself, whose pages the system takes back.
        """
        with self._turn:
            self._calls.clear()
            self._shared.clear()
            self._programs.clear()
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
            for tensor in self._weights.values():
                if (storage := tensor.untyped_storage()).resizable():
                    storage.resize_(0)
            self._weights.clear()
            super().close()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within it no other thread calls a program.

        Raises:
            EngineError: the engine is closed, or fails.
        """
        place = torch.cuda.device(self.device) if self.on_gpu else contextlib.nullcontext()
        with self._turn, place, torch.no_grad(), self._precision():
            if not self._programs:
                raise EngineError(f"engine {self._info.name} is closed", hint="load it again")
            try:
                yield
            except RuntimeError as error:
                raise EngineError(f"engine {self._info.name} failed to run: {last_line(error)}") from error

    def launch(self, given: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        """What the program gives that takes such a call, whose caches it changes. Called in a turn.

        The program checks nothing, and reads and writes beyond inputs of other sizes than its own.
        """
        return self._programs[self.program(given)](*(given[spec.name] for spec in self.signature.inputs))

    def program(self, given: Mapping[str, torch.Tensor]) -> str:
        """The name of the program that takes such a call."""
        kept = len(given[BACK]) if BACK in given else 1
        rows, length = given[IDS].shape
        return program_for(tuple(self._programs), rows, length, kept)

    def captured(self, call: Callable[[], None], *, apart: bool = False) -> Callable[[], None]:
        """What launches a call of one token a row, as of `Graphs` where it can be a CUDA graph. Called in a turn.

        It is made once before, which changes what the next one gives where calls add up: there it is no graph.
        """
        if not self.on_gpu or rates(self.signature):
            return call
        return self._graphs.captured(call, apart=apart)

    def _own(self, batch: int) -> Calls:
        """Calls on the first rows of the caches that generations share, which are as many as were asked for so far."""
        if not self._shared or len(next(iter(self._shared.values()))) < batch:
            self._calls.clear()
            self._shared.clear()  # before there is memory for more
            self._shared = self._empty(batch)
        if batch not in self._calls:
            self._calls[batch] = Calls(self, batch, {name: cache[:batch] for name, cache in self._shared.items()})
        return self._calls[batch].again()

    def _empty(self, batch: int) -> dict[str, torch.Tensor]:
        return {
            spec.name: torch.zeros(
                (batch, *map(int, spec.shape[1:])), dtype=getattr(torch, spec.dtype), device=self.device
            )
            for spec in caches(self.signature)
        }

    def _stored(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The inputs as the engine takes them, and by the outputs of caches that came as float32 their inputs."""
        host = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        stored = {**inputs, **self._kept.stored(host)}
        self.signature.check(stored)
        return stored, {self.signature.states[name]: name for name in self._kept.given(host)}

    def _load_programs(self, directory: Path) -> Callable[..., Sequence[torch.Tensor]]:
        weights = tensors(directory, self.device)
        for name in (ONE, MANY, ANY):
            if not (file := directory / f"{name}.pt2").is_file():
                continue
            index = torch.device(self.device).index if self.on_gpu else -1
            program = Package(file, single_threaded=True, device_index=index)
            found = {key: weights.get(f"{name}/{key}", weights.get(key)) for key in program.constants()}
            needed = {key: tensor for key, tensor in found.items() if tensor is not None}
            if missing := found.keys() - needed.keys():
                raise EngineError(f"engine {self._info.name} has no weight {min(missing)!r}", hint="compile it again")
            program.refer_to(needed)
            self._programs[name] = program
        self._weights = weights  # the programs have no copies of them
        return self._whole

    def _whole(self, *given: torch.Tensor) -> Sequence[torch.Tensor]:
        """All outputs, in order, with caches in copies."""
        return list(self.outputs(self.copied(given)).values())

    def copied(self, given: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs of a call by name, with caches that it may change."""
        named = {spec.name: tensor for spec, tensor in zip(self.signature.inputs, given, strict=True)}
        return {**named, **{name: named[name].clone() for name in self.signature.states}}

    def outputs(self, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs of a call by name and in order, whose caches it changes."""
        with self.turn():
            made = {LOGITS: self.launch(named)[0]}
            made.update({output: named[name] for name, output in self.signature.states.items()})
            return {spec.name: made[spec.name].to(getattr(torch, spec.dtype)) for spec in self.signature.outputs}


class _Bound(TorchBound):
    """A call on caches of its own, which come back as they were given: `floats`, by the output their input."""

    def __init__(
        self, runner: DecodingRunner, given: list[torch.Tensor], kept: Caches, floats: Mapping[str, str]
    ) -> None:
        super().__init__(runner, given, runner.device)
        self._named = runner.copied(given)
        self._decoder, self._kept, self._floats = runner, kept, floats
        self._launch: Callable[[], None] | None = None

    def run(self) -> None:
        """Starts one execution: of a call of one token a row as generation does."""
        with self._decoder.turn():
            if self._launch is None:
                step = self._decoder.program(self._named) != ANY
                self._launch = self._decoder.captured(self._call, apart=True) if step else self._call
            self._launch()

    def _call(self) -> None:
        self._outputs = self._decoder.outputs(self._named)

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run, on the host."""
        return self._kept.as_given(super().outputs(), self._floats)
