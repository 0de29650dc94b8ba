"""CUDA graphs of an engine's calls, captured one at a time in a process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

GRAPHS = 64
"""CUDA graphs of an engine: of calls of one token and their choices, for each number of rows. Others go without."""

_capturing = threading.Lock()
"""Held for a capture, of which torch lets one be under way in a process."""


class Graphs:
    """The graphs of one engine, which is on one GPU.

    Their launches take turns on one stream, and leave nothing in the memory that calls take while they run: so all have
    that memory in common.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._stream: Any = None

    def captured(self, call: Callable[[], None], *, apart: bool = False) -> Callable[[], None]:
        """The launch of a call as a graph, or the call itself where there are graphs enough.

        Called while the GPU is the current one. The call is made once before: what is made at first cannot be captured.

        Args:
            apart: whether the call leaves results in the memory that it takes, which is no other graph's then.
        """
        if len(self._made) >= GRAPHS:
            return call
        stream: Any = torch.cuda.Stream
        self._stream = self._stream or stream()  # torch's own one is of the GPU of the first capture
        graph = torch.cuda.CUDAGraph()
        with _capturing:
            call()
            other = None if apart else next(iter(self._made), None)
            pool = None if other is None else other.pool()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                call()
            # cuBLAS would keep the memory for its work on this stream for ever, which is the graphs' now.
            torch._C._cuda_clearCublasWorkspaces()
        if not apart:
            self._made.add(graph)
        return graph.replay
