"""The tokens of a language model on a server, one by one: a call of the protocol with many answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import EngineError
from .decoding import OPTIONS, PROMPT, TOKEN
from .wire import arrays, request

FINAL = "triton_final_response"
"""Marks the last answer, which holds nothing else where the request asks for that."""


def prompt(model: str, ids: np.ndarray, options: Mapping[str, Any]) -> Any:
    """The message of a prompt; options that are None are left to the server."""
    given = {name: np.atleast_1d(value) for name, value in options.items() if value is not None}
    inputs = {PROMPT: ids, **{name: array.astype(OPTIONS[name][0]) for name, array in given.items()}}
    message = request(model, inputs)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def tokens(stub: Any, message: Any, timeout_s: float) -> Iterator[int]:
    """The tokens as they come. Who stops asking for more ends the request on the server too.

    Raises:
        EngineError: the server refuses the request, or fails at it.
        grpc.RpcError: the server does not answer.
    """
    call = stub.ModelStreamInfer(iter([message]), timeout=timeout_s)
    try:
        yield from tokens_in(map(_answer, call))
    finally:
        call.cancel()


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
