"""A control plane on a real store and a real queue, and a scripted service that claims and reports."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio

from llama_corral.control_plane import ControlPlane, ControlPlaneConfig
from llama_corral.exceptions import BadInput
from llama_corral.protocol import topics
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord, QueueMessage, ServiceDefinition
from llama_corral.protocol.records import Claim, EventRecord, Report, ReportAnswer, ServiceInfo, Terminal, Ticket
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.stores import SqlStore
from llama_corral.testing import FaultyMessageQueue


class FakeReservation:
    def __init__(self, service: FakeService) -> None:
        self.service = service
        self.instance_id = service.instance_id
        self.used: str | None = None

    def start(self, claim: Claim) -> None:
        assert self.used is None
        self.used = "started"
        self.service.claims.append(claim)
        self.service.wake()

    def cancel(self) -> None:
        assert self.used is None
        self.used = "cancelled"
        self.service.free += 1


class FakeService:
    """A service in the hands of a test: `slots` reservations, and reports that the test asks for."""

    def __init__(self, plane: ControlPlane, name: str = "svc", *, slots: int = 0) -> None:
        self.plane = plane
        self.name = name
        self.instance_id = f"{name}-instance"
        self.free = slots
        self.reservations: list[FakeReservation] = []
        self.claims: list[Claim] = []
        self._seqs: dict[tuple[str, int], int] = {}
        self._news = anyio.Event()

    # LocalService

    def reserve(self) -> FakeReservation | None:
        if self.free <= 0:
            return None
        self.free -= 1
        self.reservations.append(FakeReservation(self))
        return self.reservations[-1]

    def check_start(self, arguments: Mapping[str, Any]) -> None:
        if "bad" in arguments:
            raise BadInput("The workflow refuses 'bad'.")

    def check_event(self, payload: str) -> str:
        try:
            return json.dumps(json.loads(payload))
        except ValueError as error:
            raise BadInput("The event is no JSON.") from error

    # The test's side

    def info(self) -> ServiceInfo:
        definition = ServiceDefinition(service_name=self.name, description="a fake", host="h", port=1).model_dump_json()
        return ServiceInfo(definition, self.name, self.instance_id, capacity=2, events="[]")

    def wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def wait_claim(self) -> Claim:
        """The next task that was handed over."""
        while not self.claims:
            await self._news.wait()
        return self.claims.pop(0)

    async def take_ticket(self, queue: MemoryMessageQueue) -> Claim | None:
        async with queue.consumer(topics.topic(self.plane.config.topic_namespace, self.name)) as consumer:
            (delivery,) = await consumer.receive()
            claim = await self.plane.claim(Ticket(delivery.message.data["task_id"], self.name), self.instance_id, "n")
            await delivery.ack()
            return claim

    async def report(
        self, claim: Claim, *events: dict[str, Any], terminal: Terminal | None = None, waiting: bool | None = None
    ) -> ReportAnswer:
        key = (claim.task_id, claim.epoch)
        seq = self._seqs[key] = self._seqs.get(key, 0) + 1
        records = tuple(EventRecord("app.Progress", json.dumps(event)) for event in events)
        return await self.plane.report(
            Report(claim.task_id, claim.epoch, seq, 0.0, records, waiting, terminal=terminal)
        )

    async def complete(self, claim: Claim, value: Any = "done") -> ReportAnswer:
        return await self.report(claim, terminal=completed(value))

    async def fail(self, claim: Claim, message: str = "boom") -> ReportAnswer:
        error = ErrorRecord(type="ValueError", message=message, step="work")
        return await self.report(claim, terminal=Terminal(TaskStatus.FAILED, result_text=message, error=error))

    async def end_cancelled(self, claim: Claim) -> ReportAnswer:
        error = ErrorRecord(type="cancelled", message="cancelled")
        return await self.report(claim, terminal=Terminal(TaskStatus.CANCELLED, result_text="cancelled", error=error))


def completed(value: Any) -> Terminal:
    return Terminal(TaskStatus.COMPLETED, result=json.dumps(value), result_text=str(value))


class Corral:
    """What a test has in hand."""

    def __init__(self, store: SqlStore, queue: MemoryMessageQueue, plane: ControlPlane) -> None:
        self.store = store
        self.queue = queue
        self.plane = plane

    async def service(self, name: str = "svc", *, slots: int = 0, register: bool = True) -> FakeService:
        service = FakeService(self.plane, name, slots=slots)
        if register:
            await self.plane.register(service.info(), service)
        return service

    def topic(self, name: str) -> str:
        return topics.topic(self.plane.config.topic_namespace, name)

    @asynccontextmanager
    async def wakeups(self, service: FakeService) -> AsyncIterator[Any]:
        async with self.queue.subscribe(
            topics.instance(self.plane.config.topic_namespace, service.instance_id)
        ) as heard:
            yield heard

    async def elsewhere(self, name: str, service: FakeService) -> Claim:
        """Register an instance that is not in this process, and let it claim a task."""
        service.name = name
        await self.plane.register(service.info())
        await self.plane.submit(name, {})
        claim = await service.take_ticket(self.queue)
        assert claim is not None
        return claim

    async def reclaim(self, task_id: str, service: FakeService) -> Claim:
        """The claim that the service holds, rebuilt from what is stored."""
        record = await self.plane.get_task(task_id)
        return Claim(
            task_id, record.service_name, record.session_id, False, record.epoch, 1, record.input, record.created_at
        )

    @asynccontextmanager
    async def another_plane(self) -> AsyncIterator[ControlPlane]:
        async with ControlPlane(self.store, self.queue, config=self.plane.config) as plane:
            yield plane

    async def message(self, topic: str) -> QueueMessage:
        async with self.queue.consumer(self.topic(topic)) as consumer:
            (delivery,) = await consumer.receive()
            await delivery.ack()
            return delivery.message


class Planes:
    """Two control planes on one store and one queue. `links` are their ways to the queue, for tests to break."""

    def __init__(self, a: Corral, b: Corral, links: tuple[FaultyMessageQueue, FaultyMessageQueue]) -> None:
        self.a = a
        self.b = b
        self.links = links

    async def restart_broker(self, queue: MemoryMessageQueue) -> None:
        """All connections break, and `queue`, which is empty, is where the other one was."""
        for corral, link in zip((self.a, self.b), self.links, strict=True):
            corral.queue = queue
            await link.disconnect()
            link.inner = queue
            link.reconnect()


@asynccontextmanager
async def open_planes(
    *, time_limit: float = 20, backstop_interval: float = 60, **settings: Any
) -> AsyncIterator[Planes]:
    """The backstop comes too late for any test that does not ask for it."""
    config = ControlPlaneConfig(
        **{"topic_namespace": "test", "backstop_interval": backstop_interval, "heartbeat_interval": 0.05, **settings}
    )
    with anyio.fail_after(time_limit):
        async with SqlStore("sqlite://") as store, MemoryMessageQueue() as queue:
            links = FaultyMessageQueue(queue), FaultyMessageQueue(queue)
            async with (
                ControlPlane(store, links[0], config=config) as a,
                ControlPlane(store, links[1], config=config) as b,
            ):
                await anyio.wait_all_tasks_blocked()
                yield Planes(Corral(store, queue, a), Corral(store, queue, b), links)


@asynccontextmanager
async def open_corral(
    url: str = "sqlite://",
    *,
    alone: bool = True,
    queue: MemoryMessageQueue | None = None,
    time_limit: float = 20,
    **settings: Any,
) -> AsyncIterator[Corral]:
    config = ControlPlaneConfig(**{"topic_namespace": "test", **settings})
    with anyio.fail_after(time_limit):
        async with SqlStore(url) as store, queue or MemoryMessageQueue() as queue:
            async with ControlPlane(store, queue, config=config, alone=alone) as plane:
                yield Corral(store, queue, plane)
