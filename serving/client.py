"""A client of one server or several: arrays in, arrays out, with deadlines and retries.

    with enginesmith.Client("127.0.0.1:8001", "digits") as client:
        logits = client(image=array)["logits"]

Any client of the protocol (KServe v2) will do as well; this one adds what a service needs of it: calls go round several
servers, those that fail without having been answered are sent again, and every call has a deadline.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, EngineError, EnginesmithError, UsageError
from .wire import Access, RemoteModel, arrays, request, stub

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
DEATHS = 8
"""How often a call is sent again at most that found the model's process dead: it may be what kills it."""

SUBMITTED = 64
"""Calls of `Client.submit` that are in flight at most; more wait."""


class Client:
    """A model on a server. Calls may come from several threads.

    A call that was lost with its server, or refused because the server ends or its queue is full, is sent again until
    its deadline: with several servers, to the next. An engine has no side effects, so that sending twice does no harm.

    Args:
        urls: ``host:port`` of the server, or of several that serve the same model; then by address.
        model: its name.
        deadline_s: seconds that a call may take in all, where it does not say so itself.
        retries: how often a call is sent again at most; until its deadline where it is None.
        root: PEM file of the roots that servers' certificates must come from; TLS is used where it is given.
        cert, key: PEM files of this client's certificate and its key, where servers ask for one.

    Raises:
        UsageError: an address or file that cannot be used.
        TargetUnavailableError: tritonclient is missing.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        model: str,
        *,
        deadline_s: float = 10.0,
        retries: int | None = None,
        root: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
    ) -> None:
        self.access = Access((urls,) if isinstance(urls, str) else tuple(urls), root, cert, key)
        self._name = model
        self._deadline_s, self._retries = deadline_s, retries
        self._channel = self.access.channel()
        self._stub = stub(self._channel)
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    @cached_property
    def model(self) -> RemoteModel:
        """What the model takes and gives, as a server says.

        Raises:
            UsageError: no model of that name is served.
            EngineError: no server answers.
        """
        from tritonclient.grpc import service_pb2

        asked = service_pb2.ModelMetadataRequest(name=self._name)
        return RemoteModel.of(self._sent(self._stub.ModelMetadata, asked, self._deadline_s, 0))

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray] | None = None,
        /,
        *,
        request_id: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
        outputs: Sequence[str] = (),
        **named: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Outputs by name of inputs by name.

        Args:
            request_id: comes back with errors, and stands in the server's log where it logs requests.
            deadline_s: seconds in all; a server that bounds its queue drops the call once they have passed there.
            priority: 1 is the highest, where the server has levels; 0 is its default.
            outputs: names of those that are wanted; all where none is given.

        Raises:
            DataError: inputs that do not fit the model.
            EngineError: the server failed, refused the call, or did not answer in time.
        """
        given = {name: np.asarray(array) for name, array in {**(inputs or {}), **named}.items()}
        self.model.check(given)
        message = request(self._name, given, outputs)
        message.id = request_id
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        message.parameters["timeout"].int64_param = max(1, round(deadline_s * 1e6))  # microseconds in the queue
        if priority:
            message.parameters["priority"].uint64_param = priority
        return arrays(self._sent(self._stub.ModelInfer, message, deadline_s, self._retries))

    def submit(self, inputs: Mapping[str, np.ndarray], **options: Any) -> concurrent.futures.Future[Any]:
        """Starts a call; its future has the outputs or the error. `asyncio.wrap_future` makes it awaitable."""
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(SUBMITTED, "enginesmith-client")
        return self._pool.submit(self.__call__, inputs, **options)

    def generate(
        self,
        ids: Sequence[int] | np.ndarray,
        max_new_tokens: int = 128,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
        request_id: str = "",
        deadline_s: float | None = None,
    ) -> Iterator[int]:
        """The tokens that follow a prompt, as they come, from a language model that is served with its cache.

        Closing the iterator, or leaving its loop, ends the request on the server too. It is not sent again.

        Args:
            temperature, top_k, top_p: how tokens are drawn; each is the likeliest where none of them is given.
            seed: of what is drawn.
            stop: tokens that end the text; those of the model where it is None.
            deadline_s: seconds until the last token.

        Raises:
            DataError: the prompt is no row of tokens.
            EngineError: the server refuses it, fails, or does not answer in time.
        """
        import grpc

        from ..compiler.generation.prompts import rows_of
        from .stream import prompt, tokens

        (row,) = rows_of([ids])
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        message = prompt(self._name, row, {**options, "seed": seed, "stop": stop})
        message.id = request_id
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        try:
            yield from tokens(self._stub, message, deadline_s)
        except grpc.RpcError as error:
            raise self._translated(error, deadline_s) from error

    def close(self) -> None:
        """Waits for what was submitted, and ends the connections."""
        if self._pool:
            self._pool.shutdown()
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sent(self, call: Any, message: Any, deadline_s: float, retries: int | None) -> Any:
        """The answer to a message that is sent until it is answered, refused for good, or too late."""
        deadline, deaths = time.monotonic() + deadline_s, 0
        for attempt in itertools.count():
            found = _attempt(call, message, max(deadline - time.monotonic(), 0.001))
            if not isinstance(found, Exception):
                return found
            deaths += _is_death(found)
            pause = min(FIRST_PAUSE_S * 2 ** min(attempt, 10), LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            ends = attempt == retries or deaths > DEATHS or time.monotonic() + pause > deadline
            if ends or not is_lost(found):
                raise self._translated(found, deadline_s) from found
            time.sleep(pause)
        raise AssertionError("counts without end")

    def _translated(self, error: Any, deadline_s: float) -> EnginesmithError:
        import grpc

        code, said = error.code(), error.details()
        where = ", ".join(self.access.urls)
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return DataError(f"the server refuses the inputs of {self._name}: {said}")
        if code == grpc.StatusCode.NOT_FOUND:
            return UsageError(f"{where} serves no model {self._name!r}", found=said)
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return EngineError(f"no answer from {where} within {deadline_s:g} s", found=said)
        return EngineError(f"{where} did not answer a call of {self._name}", found=f"{code.name}: {said}")


def _attempt(call: Any, message: Any, timeout_s: float) -> Any:
    """The answer, or gRPC's error."""
    import grpc

    try:
        return call(message, timeout=timeout_s)
    except grpc.RpcError as error:
        return error


def is_lost(error: Any) -> bool:
    """Whether a call was not answered for a reason that another attempt may not meet."""
    import grpc

    if error.code() == grpc.StatusCode.NOT_FOUND:
        return "no available versions" in (error.details() or "")  # the server ends
    return bool(error.code() == grpc.StatusCode.UNAVAILABLE) or _is_death(error)


def _is_death(error: Any) -> bool:
    """Whether the model's process died, which will be replaced."""
    import grpc

    return bool(error.code() == grpc.StatusCode.INTERNAL) and "Stub process" in (error.details() or "")
