"""A thousand sessions at once: each has its own order and its own context."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import pytest

from llama_corral.control_plane import ControlPlane
from llama_corral.exceptions import Conflict, NotFound
from llama_corral.protocol import topics
from llama_corral.protocol.messages import new_id
from llama_corral.protocol.records import (
    Claim,
    ContextUpdate,
    EventRecord,
    HeldTask,
    Report,
    SessionPolicy,
    Ticket,
)

from .corral import Corral, FakeService, completed, open_corral

SESSIONS = 1_000
TASKS = 3
WORKERS = 20
POLICIES: tuple[SessionPolicy, ...] = ("enqueue", "enqueue", "concurrent", "reject")


@dataclass
class Counters:
    """Workers that count in the context of a session, as a workflow would in its `Context`."""

    corral: Corral
    open: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    overlaps: set[str] = field(default_factory=set)
    done: int = 0
    on_done: Callable[[], None] = lambda: None

    async def work(self, name: str) -> None:
        plane: ControlPlane = self.corral.plane
        async with self.corral.queue.consumer(topics.topic(plane.config.topic_namespace, "svc")) as consumer:
            while True:
                for delivery in await consumer.receive():
                    claim = await plane.claim(Ticket(delivery.message.data["task_id"], "svc"), name, new_id())
                    await delivery.ack()
                    if claim is not None:
                        await self.run(claim)

    async def run(self, claim: Claim) -> None:
        self.open[claim.session_id] += 1
        if self.open[claim.session_id] > 1:
            self.overlaps.add(claim.session_id)
        before = 0 if claim.context is None else json.loads(claim.context.payload)["count"]
        based_on = 0 if claim.context is None else claim.context.version
        plane = self.corral.plane
        event = EventRecord("app.Counted", json.dumps({"session": claim.session_id, "task": claim.task_id}))
        await plane.report(Report(claim.task_id, claim.epoch, 1, plane._now(), (event,)))
        context = ContextUpdate(based_on, json.dumps({"count": before + 1}))
        self.open[claim.session_id] -= 1
        answer = await plane.report(
            Report(claim.task_id, claim.epoch, 2, plane._now(), terminal=completed(before + 1), context=context)
        )
        assert answer.status == "ok"
        self.done += 1
        self.on_done()


@pytest.mark.anyio
@pytest.mark.promise("P1", "P3", "P4")
@pytest.mark.timeout(120)
async def test_a_thousand_sessions_interleaved(anyio_backend: str) -> None:
    async with open_corral(time_limit=100) as corral:
        service = FakeService(corral.plane)
        await corral.plane.register(service.info())
        for number in range(SESSIONS):
            await corral.plane.sessions.create(f"s{number}", policy=POLICIES[number % len(POLICIES)])
        counters = Counters(corral)
        accepted: dict[str, list[str]] = defaultdict(list)
        refused: dict[str, int] = defaultdict(int)
        all_done = anyio.Event()

        async def submit(number: int) -> None:
            session = f"s{number}"
            for _ in range(TASKS):
                try:
                    accepted[session].append((await corral.plane.submit("svc", {}, session_id=session)).task_id)
                except Conflict:
                    refused[session] += 1

        def count() -> None:
            if counters.done == sum(map(len, accepted.values())) and len(accepted) == SESSIONS and submitted:
                all_done.set()

        counters.on_done = count
        submitted = False
        async with anyio.create_task_group() as workers:
            for worker in range(WORKERS):
                workers.start_soon(counters.work, f"worker-{worker}")
            async with anyio.create_task_group() as clients:
                for number in range(SESSIONS):
                    clients.start_soon(submit, number)
            submitted = True
            count()
            await all_done.wait()
            workers.cancel_scope.cancel()
        for number in range(SESSIONS):
            session, policy = f"s{number}", POLICIES[number % len(POLICIES)]
            records = [await corral.plane.get_task(task_id) for task_id in accepted[session]]
            counts = [json.loads(record.result or "null") for record in records]
            assert len(records) + refused[session] == TASKS
            assert all(record.status == "completed" and record.event_count == 1 for record in records)
            saved = [count for count, record in zip(counts, records, strict=True) if record.context_saved]
            # Whatever was saved follows on what was saved before; in order where they wait for each other.
            assert sorted(saved) == list(range(1, len(saved) + 1))
            if policy != "concurrent":
                assert session not in counters.overlaps
                assert counts == saved == list(range(1, len(records) + 1))
            if policy == "enqueue":
                assert len(records) == TASKS
            page = await corral.plane.read_events(accepted[session][0])
            assert json.loads(page.events[0].payload) == {"session": session, "task": accepted[session][0]}
        assert await corral.store.count_tasks() == {}


@pytest.mark.anyio
@pytest.mark.promise("P1", "P6")
async def test_a_deleted_session_stops_its_runs_on_other_instances_and_leaves_nothing(corral: Corral) -> None:
    service = await corral.service(register=False)
    service.instance_id = "far"
    await corral.plane.register(service.info())
    session = (await corral.plane.sessions.create()).session_id
    running = (await corral.plane.submit("svc", {}, session_id=session)).task_id
    held = (await corral.plane.submit("svc", {}, session_id=session, timeout=1000)).task_id
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    await service.report(claim, {"n": 0}, waiting=True)
    ended: list[str] = []
    async with corral.wakeups(service) as heard, anyio.create_task_group() as group:

        async def run() -> None:
            with pytest.raises(NotFound):
                await corral.plane.wait_result(running)
            ended.append("result")

        group.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        await corral.plane.sessions.delete(session)
        assert (await heard.receive()).data == {"task_id": running, "kind": "deleted"}
    assert ended == ["result"]
    assert (await corral.plane.pull(running, claim.epoch, 0)).status == "deleted"
    assert (await service.report(claim, {"n": 1})).status == "deleted"
    assert (await corral.plane.release(running, claim.epoch, None)).status == "deleted"
    assert (await corral.plane.heartbeat("far", [HeldTask(running, claim.epoch)])).fenced == (running,)
    for task_id in (running, held):
        assert await corral.store.read_events(task_id, 0) is None
    assert await corral.store.count_tasks() == {}
    # The name may be used again, and knows nothing of what was.
    await corral.plane.sessions.create(session)
    assert (await corral.plane.sessions.get(session)).task_ids == ()
