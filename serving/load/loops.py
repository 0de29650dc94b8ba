"""Sends requests and notes what comes of them: in a closed loop, or an open one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from .answers import RIGHT, WRONG, Answer

OUTSTANDING = 4096
"""Requests of an open loop that wait for their answers at most; one more is not sent, and counts as an error."""

NOT_SENT = "NOT_SENT"

Judge = Callable[[int, Any], bool]
Call = Callable[[Any, float], Awaitable[Any]]


class Sender:
    """Sends prepared messages in turn.

    Args:
        call: sends a message with a deadline in seconds.
        messages: prepared once; packing arrays while a clock runs would be measured too.
        judge: whether the answer to the message of this number is right.
    """

    def __init__(self, call: Call, messages: Sequence[Any], judge: Judge, deadline_s: float) -> None:
        self._call, self._messages, self._judge, self._deadline_s = call, messages, judge, deadline_s
        self._turn = itertools.cycle(range(len(messages)))
        self.answers: list[Answer] = []

    def alone(self, call: Callable[[Any, float], Any], seconds: float) -> None:
        """One client that waits for each answer. An event loop around its calls would make each a tenth longer."""
        import grpc

        start = time.perf_counter()
        while (sent := time.perf_counter() - start) < seconds:
            number = next(self._turn)
            try:
                response = call(self._messages[number], self._deadline_s)
            except grpc.RpcError as error:
                time.sleep(self._failed(error, sent, sent, start))
            else:
                self._answered(number, response, sent, sent, start)

    async def closed(self, clients: int, seconds: float) -> None:
        """Each client sends its next request when it has the answer to the last."""
        start = time.perf_counter()

        async def client() -> None:
            while (now := time.perf_counter() - start) < seconds:
                await self._send(start, now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def opened(self, due: Iterator[float], seconds: float) -> None:
        """Sends requests when they are due, whether others have been answered or not."""
        start, running = time.perf_counter(), set[asyncio.Task[None]]()
        for at in itertools.takewhile(lambda at: at < seconds, due):
            if (ahead := at - (time.perf_counter() - start)) > 0:
                await asyncio.sleep(ahead)
            elif len(running) % 64 == 0:
                await asyncio.sleep(0)  # lets answers in where requests are due one upon the other
            if len(running) >= OUTSTANDING:
                now = time.perf_counter() - start
                self.answers.append(Answer(at, now, now, NOT_SENT))
                continue
            task = asyncio.create_task(self._send(start, at))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _send(self, start: float, due: float) -> None:
        import grpc

        number = next(self._turn)
        sent = time.perf_counter() - start
        try:
            response = await self._call(self._messages[number], self._deadline_s)
        except grpc.RpcError as error:
            await asyncio.sleep(self._failed(error, due, sent, start))
        else:
            self._answered(number, response, due, sent, start)

    def _answered(self, number: int, response: Any, due: float, sent: float, start: float) -> None:
        done = time.perf_counter() - start
        self.answers.append(Answer(due, sent, done, RIGHT if self._judge(number, response) else WRONG))

    def _failed(self, error: Any, due: float, sent: float, start: float) -> float:
        """Seconds to wait then: a closed loop would ask a server that is away without end."""
        code = error.code().name
        self.answers.append(Answer(due, sent, time.perf_counter() - start, code))
        return 0.001 if code == "UNAVAILABLE" else 0.0
