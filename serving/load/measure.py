"""Measures a service: closed loops of several clients, open loops at given rates, and a sweep of rates."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil

from ...errors import EngineError
from ..wire import Access, packed_call, stub
from .answers import Summary, summarize
from .knee import SHARES
from .loops import Sender
from .payload import Payload
from .schedule import arrivals

BUSY = 0.9
"""Share of a processor from which the client itself may be what limits: it is one process of one thread."""

LATE_MS = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        clients: closed loops, by how many clients wait for their answers at once.
        rates: open loops, by requests a second.
        sweep: open loops at shares of the throughput of the closed loop with the most clients.
        constant: whether requests of open loops are evenly spaced, rather than as independent users send them.
    """

    clients: tuple[int, ...] = (1, 8, 64)
    rates: tuple[float, ...] = ()
    sweep: bool = False
    constant: bool = False
    duration_s: float = 10.0
    warmup_s: float = 2.0
    deadline_s: float = 10.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ServerSide:
    """What the server counted meanwhile. `merged` is rows a run of the engine; times are means of a request in ms."""

    merged: float
    queue_ms: float
    compute_ms: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One loop.

    Attributes:
        clients: that wait for their answers at once; None in an open loop.
        client_cpu: share of a processor that the client used.
        bound: whether limits hold here; a sweep asks for more than a service can do, on purpose.
    """

    clients: int | None
    summary: Summary
    server: ServerSide | None
    client_cpu: float
    bound: bool = True

    @property
    def what(self) -> str:
        """For people."""
        if self.clients is not None:
            return f"{self.clients} client{'s' if self.clients > 1 else ''}"
        return f"{self.summary.offered:,.0f} requests/s"

    @property
    def doubt(self) -> str:
        """Why the client may be what was measured, and not the server; empty where it is not."""
        if self.client_cpu > BUSY:
            return f"the client used {self.client_cpu:.0%} of a processor, and may be what limits"
        if self.clients is None and self.summary.late_ms > LATE_MS:
            return f"1 % of the requests were sent more than {self.summary.late_ms:.1f} ms late: the client is behind"
        return ""


Tell = Callable[[Measurement], None]


def measure(access: Access, payload: Payload, plan: Plan, tell: Tell) -> list[Measurement]:
    """All measurements of a plan, one after the other; each is told when it is done.

    Raises:
        EngineError: no request was answered before the first measurement.
    """
    return asyncio.run(_all(access, payload, plan, tell))


async def _all(access: Access, payload: Payload, plan: Plan, tell: Tell) -> list[Measurement]:
    found: list[Measurement] = []

    def add(measured: Measurement) -> None:
        found.append(measured)
        tell(measured)

    async with access.channel(asynchronous=True) as channel:
        calls = stub(channel)
        await _greet(calls, payload, plan)
        one = partial(_one, access, calls, packed_call(channel), payload, plan)
        for clients in plan.clients:
            add(await one(clients=clients))
        for rate in plan.rates:
            add(await one(rate=rate))
        top = max((measured.summary.achieved for measured in found), default=0.0)
        for rate in [share * top for share in SHARES if plan.sweep and top]:
            add(dataclasses.replace(await one(rate=rate), bound=False))
    return found


async def _greet(calls: Any, payload: Payload, plan: Plan) -> None:
    """Connects, and sends every message once: what the server refuses is no load."""
    import grpc

    sent = (calls.ModelInfer(message, timeout=plan.deadline_s, wait_for_ready=True) for message in payload.messages)
    try:
        await asyncio.gather(*sent)
    except grpc.RpcError as error:
        raise EngineError(
            f"the server does not answer a request of {payload.what}", found=f"{error.code().name}: {error.details()}"
        ) from error


async def _one(
    access: Access,
    calls: Any,
    infer: Any,
    payload: Payload,
    plan: Plan,
    *,
    clients: int | None = None,
    rate: float | None = None,
) -> Measurement:
    sender = Sender(
        lambda message, deadline_s: infer(message, timeout=deadline_s),
        [message.SerializeToString() for message in payload.messages],
        payload.judge(),
        plan.deadline_s,
    )
    total_s = plan.warmup_s + plan.duration_s
    before, process = await _statistics(calls, payload), psutil.Process()
    used, start = sum(process.cpu_times()[:2]), time.perf_counter()
    if clients == 1:
        await asyncio.to_thread(_alone, access, sender, total_s)
    elif clients is not None:
        await sender.closed(clients, total_s)
    else:
        assert rate is not None
        await sender.opened(arrivals(rate, plan.seed, constant=plan.constant), total_s)
    share = (sum(process.cpu_times()[:2]) - used) / (time.perf_counter() - start)
    after = await _statistics(calls, payload)
    summary = summarize(sender.answers, plan.warmup_s, total_s, rate)
    return Measurement(clients, summary, _difference(before, after), share)


def _alone(access: Access, sender: Sender, seconds: float) -> None:
    with access.channel() as channel:
        call = packed_call(channel)
        sender.alone(lambda message, deadline_s: call(message, timeout=deadline_s), seconds)


async def _statistics(calls: Any, payload: Payload) -> Any:
    """The server's counters; None where it keeps none."""
    import grpc
    from tritonclient.grpc import service_pb2

    asked = service_pb2.ModelStatisticsRequest(name=payload.messages[0].model_name)
    try:
        answer = await calls.ModelStatistics(asked, timeout=5)
    except grpc.RpcError:
        return None
    return answer.model_stats[0] if answer.model_stats else None


def _difference(before: Any, after: Any) -> ServerSide | None:
    if before is None or after is None:
        return None
    runs = after.execution_count - before.execution_count
    first, last = before.inference_stats, after.inference_stats
    requests = last.success.count - first.success.count
    if runs <= 0 or requests <= 0:
        return None
    return ServerSide(
        merged=(after.inference_count - before.inference_count) / runs,
        queue_ms=(last.queue.ns - first.queue.ns) / requests / 1e6,
        compute_ms=(last.compute_infer.ns - first.compute_infer.ns) / requests / 1e6,
    )
