"""Micro-batches through stages that any runtime runs: a thread for each stage, and a short queue before it.

    caller --> [queue] stage 0 --> [queue] stage 1 --> ... --> caller

A queue holds `WAITING` micro-batches at most, so a slow stage holds back those before it and memory stays bounded.
Values that a later stage wants travel along with a micro-batch past the stages that do not read them. Calls may come
from several threads: their micro-batches follow each other through the stages.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ...errors import EngineError
from ..base import Arrays, Bound, HostBound, Runner
from .plan import Cutter, Plan

WAITING = 2


@dataclasses.dataclass
class _Parcel:
    """A micro-batch on its way; `values` are those that are still wanted."""

    values: dict[str, Any]
    done: Future[dict[str, Any]]


class FlowRunner:
    """A pipeline of loaded engines. It owns them.

    Args:
        runners: of the stages.
    """

    def __init__(self, plan: Plan, runners: Sequence[Runner], cutter: Cutter) -> None:
        self._plan = plan
        self._runners = tuple(runners)
        self._cutter = cutter
        self._queues = [queue.Queue[_Parcel | None](WAITING) for _ in runners]
        self._gate = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"stage-{number}", daemon=True)
            for number in range(len(runners))
        ]
        for thread in self._threads:
            thread.start()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as NumPy arrays."""
        waiting = []
        for piece in self._cutter.cut({name: _on_host(value) for name, value in inputs.items()}):
            parcel = _Parcel(dict(piece), Future())
            with self._gate:
                if self._closed:
                    raise EngineError("the engine is closed", hint="load it again")
                self._queues[0].put(parcel)
            waiting.append(parcel.done)
        return self._cutter.join([done.result() for done in waiting])

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs, ready for repeated runs."""
        placed = {name: np.asarray(value, order="C") for name, value in inputs.items()}
        return HostBound(lambda: self.run(placed))

    def reset(self) -> None:
        """Stages keep no state."""

    def close(self) -> None:
        """Lets the calls under way end, then gives back what the stages hold."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._queues[0].put(None)
        for thread in self._threads:
            thread.join()
        for runner in self._runners:
            runner.close()

    def _serve(self, number: int) -> None:
        """One stage's thread: until the sentinel, which it hands on."""
        link, runner = self._plan.links[number], self._runners[number]
        needed = self._plan.needed(number)
        last = number + 1 == len(self._runners)
        while (parcel := self._queues[number].get()) is not None:
            try:
                made = runner.run({name: parcel.values[name] for name in link.inputs})
            except BaseException as error:  # noqa: BLE001  it belongs to the caller, whatever it is; the stage goes on
                parcel.done.set_exception(error)
                continue
            values = {name: value for name, value in {**parcel.values, **made}.items() if name in needed}
            if last:
                parcel.done.set_result({name: values[name] for name in self._plan.outputs})
            else:
                parcel.values = values
                self._queues[number + 1].put(parcel)
        if not last:
            self._queues[number + 1].put(None)


def _on_host(value: Any) -> Any:
    """An array as it is; a tensor by DLPack, where it lies on the CPU."""
    return value if isinstance(value, (np.ndarray, np.generic)) else np.asarray(np.from_dlpack(value))
