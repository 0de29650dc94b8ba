"""Asks a language model that is served with its cache for one token, and judges it by the recorded logits."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.signature import Signature
from ..compiler.states import BACK, COUNT, IDS, LOGITS, PAST, looks_back
from ..compiler.validation.reference import ReferenceOutputs
from ..errors import DataError
from .decoding import PROMPT
from .stream import tokens_in
from .wire import infer_input


class Prompt:
    """A prompt that was recorded, and the tokens that may follow it: those that rounding could put first.

    Without a recorded prompt, for samples may begin in the middle of a text, one token of the vocabulary has to come.

    Args:
        limit: relative L2 that logits may be from the reference's.
    """

    def __init__(self, bundle: Path, signature: Signature, limit: float) -> None:
        found = min(_prompts(bundle, signature), key=lambda pair: len(pair[0]), default=None)
        self._ids = np.zeros(1, np.int64) if found is None else found[0]
        self._right: np.ndarray | None = None
        if found is not None and np.isfinite(limit):
            logits = found[1].astype(np.float64)
            apart = limit * np.linalg.norm(logits)  # no single logit is further off
            self._right = np.flatnonzero(logits >= logits.max() - 2 * apart)

    def __call__(self, client: Any, model: str, number: str, timeout_s: float) -> str:
        """What is wrong with the answer; empty where it is right."""
        from tritonclient.utils import InferenceServerException

        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        ended = False
        client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=timeout_s)
        try:
            client.async_stream_infer(model, self._inputs(), request_id=number, enable_empty_final_response=True)
            tokens = list(tokens_in(_messages(answers, timeout_s)))
            ended = True
        except queue.Empty as error:
            raise InferenceServerException("no answer in time", status="DEADLINE_EXCEEDED") from error
        finally:
            client.stop_stream(cancel_requests=not ended)
        if len(tokens) != 1:
            return f"{len(tokens)} tokens came, where one was asked for"
        if self._right is not None and tokens[0] not in self._right:
            return f"token {tokens[0]} came, where {self._right[:5].tolist()} was expected"
        return ""

    def _inputs(self) -> list[Any]:
        return [infer_input(PROMPT, self._ids), infer_input("max_new_tokens", np.ones(1, np.int32))]


def _prompts(bundle: Path, signature: Signature) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of recorded samples with nothing before them, and the logits that follow."""
    try:
        for sample in ReferenceOutputs(bundle / "reference", signature):
            for row in np.flatnonzero(sample.inputs[PAST] == 0):
                logits = sample.outputs[LOGITS][row]
                if looks_back(signature):
                    last = np.flatnonzero(sample.inputs[BACK] == 0)
                    if not len(last):
                        continue
                    logits = logits[last[0]]
                yield sample.inputs[IDS][row, : sample.inputs[COUNT][row]], logits
    except (DataError, ValueError, OSError):
        return


def _messages(answers: queue.SimpleQueue[tuple[Any, Any]], timeout_s: float) -> Iterator[Any]:
    while True:
        result, error = answers.get(timeout=timeout_s)
        if error is not None:
            raise error
        yield result.get_response()
