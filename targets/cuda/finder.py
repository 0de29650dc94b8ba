"""Finds the likeliest token of each row of logits on the device, whatever call made them."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import onnxruntime
from .onnxruntime import NO_GRAPH, empty, run_options
from .stream import Stream


class Finder:
    """For so many rows. All methods are called in a turn of the runner.

    Args:
        session: of the file `choosers.GREEDY`.
        dtype: of the logits.

    Attributes:
        token: (rows, 1), an OrtValue, of the last call.
        best: (rows), the largest logits.
    """

    def __init__(self, session: Any, stream: Stream, rows: int, vocabulary: int, dtype: np.dtype[Any]) -> None:
        self._session, self._device = session, stream.device
        self._shape, self._dtype = [rows, vocabulary], dtype
        self.token, self.best = empty((rows, 1), np.int64, stream), empty((rows,), dtype.type, stream)
        self._counted = empty((rows,), np.int64, stream)  # what is chosen here, no call is behind
        self._binding, self._run = session.io_binding(), run_options(NO_GRAPH, wait=False)
        self._binding.bind_ortvalue_input("past", self._counted)
        for name, value in {"token": self.token, "best": self.best, "past_next": self._counted}.items():
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self, address: int) -> None:
        """Starts the search in logits (rows, vocabulary) that lie there."""
        self._binding.bind_input("logits", onnxruntime.DEVICE, self._device, self._dtype.type, self._shape, address)
        self._session.run_with_iobinding(self._binding, self._run)
