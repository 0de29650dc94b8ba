"""The tokens of a language model on a server, one by one: a call of the protocol with many answers.

Who has enough of a text says so in another message of its stream. Cancelling gRPC's call would do too, but Triton 2.51
dies of that now and then, when it meets answers under way (its pull requests 7840 and 8078 mended such races).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import EngineError
from .decoding import CANCEL, OPTIONS, PROMPT, TEXT, TOKEN
from .wire import arrays, request

ENDING_S = 2.0
"""Seconds that a server has to end a text before its call is cancelled."""

FINAL = "triton_final_response"
"""Marks the last answer, which holds nothing else where the request asks for that."""


def prompt(model: str, ids: np.ndarray, options: Mapping[str, Any]) -> Any:
    """The message of a prompt; options that are None are left to the server."""
    given = {name: np.atleast_1d(value) for name, value in options.items() if value is not None}
    inputs = {PROMPT: ids, **{name: array.astype(OPTIONS[name][0]) for name, array in given.items()}}
    message = request(model, inputs)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    message.parameters[TEXT].string_param = uuid.uuid4().hex
    return message


def tokens(stub: Any, message: Any, timeout_s: float) -> Iterator[int]:
    """The tokens as they come. Who stops asking for more ends the request on the server too.

    Raises:
        EngineError: the server refuses the request, or fails at it.
        grpc.RpcError: the server does not answer.
    """
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    messages.put(message)
    call = stub.ModelStreamInfer(iter(messages.get, None), timeout=timeout_s)
    try:
        yield from tokens_in(map(_answer, call))
    except GeneratorExit:
        messages.put(_enough(message))
        raise
    finally:
        messages.put(None)
        _let_end(call)


def _enough(message: Any) -> Any:
    """The message that ends the text of another."""
    found = request(message.model_name, {PROMPT: np.zeros(1, np.int64)})
    found.parameters[CANCEL].string_param = message.parameters[TEXT].string_param
    return found


def _let_end(call: Any) -> None:
    """Takes what still comes, until the server has ended the call."""
    import grpc

    late = threading.Timer(ENDING_S, call.cancel)
    late.start()
    with contextlib.suppress(grpc.RpcError):
        for answer in call:
            if answer.error_message:  # the text is in another instance of the model, which is not told
                call.cancel()
    late.cancel()


def tokens_in(answers: Iterable[Any]) -> Iterator[int]:
    """The tokens in messages ModelInferResponse, up to the last answer."""
    for answer in answers:
        found = arrays(answer)
        if TOKEN in found:
            yield int(found[TOKEN][0])
        if answer.parameters[FINAL].bool_param:
            return


def _answer(response: Any) -> Any:
    if response.error_message:
        raise EngineError(f"the server did not go on with a text: {response.error_message}")
    return response.infer_response
