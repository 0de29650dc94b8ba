"""Runners of packages: their calls are checked, and on a GPU replayed as CUDA graphs, one for each set of shapes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import EngineError
from .._torch import TorchBound, TorchRunner, last_line, tensors_of
from ..base import Arrays, Bound, EngineInfo
from .graphs import Graphs

if TYPE_CHECKING:
    import torch

SHAPES = 8
"""Sets of input shapes that get a graph, with memory of its own; further ones run without."""


class CheckedRunner(TorchRunner):
    """Refuses inputs of other sizes than the engine's: compiled code reads beyond those that are too small."""

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As of `TorchRunner`."""
        self._info.signature.check(inputs)
        return super().run(inputs)

    def bind(self, inputs: Arrays) -> Bound:
        """As of `TorchRunner`."""
        self._info.signature.check(inputs)
        return super().bind(inputs)


class ReplayRunner(CheckedRunner):
    """A package that takes one call at a time, of which the launches are captured when shapes first come.

    Attributes:
        refusal: why calls are launched one by one, once a capture has failed.
    """

    def __init__(self, load: Callable[[], Callable[..., Any]], info: EngineInfo, device: str) -> None:
        super().__init__(load, info, device)
        self.refusal = ""
        self._turn = threading.Lock()
        self._graphs = Graphs()
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}
        self._last: Any = None

    def call(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name, in memory of their own; they may not be computed yet."""
        cuda: Any = self._torch.cuda
        with self._turn:
            if self._last is None:
                self._last = cuda.Event()
            else:  # the call before may have been on another stream
                self._last.wait()
            captured = self._of(tensors)
            outputs = captured.run(tensors) if captured else super().call(tensors)
            self._last.record()
        return outputs

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs on the device, with a graph of their own."""
        self._info.signature.check(inputs)
        tensors = tensors_of(inputs, self._info, self._device)
        with self._turn:
            return _ReplayBound(self, self._capture(tensors), tensors, self._device)

    def close(self) -> None:
        """As of `TorchRunner`."""
        with self._turn:
            self._captured.clear()
            super().close()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within it the engine is open, and no other call is made.

        Raises:
            EngineError: it is closed.
        """
        with self._turn:
            if self._module is None:
                raise EngineError(f"engine {self._info.name} is closed", hint="load it again")
            yield

    def launch(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """One call without a graph, which no other call may be beside."""
        return super().call(tensors)

    def _of(self, tensors: Sequence[torch.Tensor]) -> _Captured | None:
        shapes = tuple(tensor.shape for tensor in tensors)
        captured = self._captured.get(shapes)
        if captured is None and len(self._captured) < SHAPES:
            captured = self._capture([tensor.clone() for tensor in tensors])
            if captured is not None:
                self._captured[shapes] = captured
        return captured

    def _capture(self, tensors: Sequence[torch.Tensor]) -> _Captured | None:
        """The call on these very tensors as a graph; None where it cannot be one."""
        if self.refusal:
            return None
        try:
            return _Captured(self, tensors, self._graphs)
        except (EngineError, RuntimeError) as error:
            self.launch(tensors)  # what fails by itself is no matter of graphs
            self.refusal = _why(error)
            return None


class _Captured:
    """A call at fixed places."""

    def __init__(self, runner: ReplayRunner, tensors: Sequence[torch.Tensor], graphs: Graphs) -> None:
        self._runner, self._tensors = runner, tensors
        self.outputs: dict[str, torch.Tensor] = {}
        self.replay = graphs.captured(self._call, apart=True)

    def run(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs for other values of the inputs, in copies."""
        for place, tensor in zip(self._tensors, tensors, strict=True):
            place.copy_(tensor)
        self.replay()
        return {name: tensor.clone() for name, tensor in self.outputs.items()}

    def _call(self) -> None:
        self.outputs = self._runner.launch(self._tensors)


def _why(error: BaseException) -> str:
    """What a capture failed by: what was raised first."""
    while before := error.__cause__ or error.__context__:
        error = before
    return f"its launches cannot be captured: {last_line(error)}"


class _ReplayBound(TorchBound):
    """Tensors on the device; a call is one launch where it could be captured."""

    def __init__(
        self, runner: ReplayRunner, captured: _Captured | None, tensors: Sequence[torch.Tensor], device: str
    ) -> None:
        super().__init__(runner, tensors, device)
        self._replays, self._captured = runner, captured

    def run(self) -> None:
        """Starts one execution."""
        if self._captured is None:
            super().run()
            return
        with self._replays.turn():
            self._captured.replay()
            self._outputs = self._captured.outputs
