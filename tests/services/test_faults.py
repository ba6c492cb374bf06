"""The coordinator or the queue is away for a while: asked again, one ending, nothing twice."""

from __future__ import annotations

import logging
from collections import Counter as Count
from typing import Any

import anyio
import pytest

from llama_corral.exceptions import StoreUnavailable
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.supervision import Backoff
from llama_corral.testing import FaultyMessageQueue

from .flows import Asks, Counter, Echo, Probed
from .rig import Probe, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P2")]


class Flaky:
    """A coordinator that is away for chosen calls: `before` the decider was asked, or `after` it has decided."""

    def __init__(self, plane: Any) -> None:
        self.plane = plane
        self.calls: Count[str] = Count()
        self.away: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.plane, name)
        if name not in ("claim", "report", "release", "pull", "heartbeat"):
            return method

        async def call(*args: Any, **how: Any) -> Any:
            self.calls[name] += 1
            fault = self.away.get(name, []).pop(0) if self.away.get(name) else None
            if fault == "before":
                raise StoreUnavailable("away")
            answer = await method(*args, **how)
            if fault == "after":
                raise StoreUnavailable("the answer was lost")
            return answer

        return call


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(Backoff, "delay", lambda self, failures: 0.001)


@pytest.fixture
def flaky(rig):
    return Flaky(rig.plane)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_report_is_repeated_until_it_is_answered(rig, flaky, when, position):
    await rig.serve(Counter(), coordinator=flaky)
    await rig.serve(Echo(), "echo", coordinator=flaky)
    await rig.plane.sessions.create("s")
    flaky.away["report"] = ["ok"] * position + [when, when, "ok", when]
    assert (await rig.run(session="s")).result == "1"
    record = await rig.run("echo", count=5, value=1)
    assert record.result == "1"
    assert [event.index for event in await rig.events(record.task_id)] == list(range(6))
    assert (await rig.run(session="s")).result == "2"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("failures", [1, 4, 5, 7])
async def test_a_claim_is_asked_again_and_its_ticket_survives(rig, flaky, when, failures):
    service = await rig.serve(Counter(), coordinator=flaky, cap=1)
    service.reserve = lambda: None
    flaky.away["claim"] = [when] * failures
    record = await rig.run()
    assert (record.status, record.result, record.epoch) == ("completed", "1", 1)
    assert flaky.calls["claim"] == failures + 1
    await until(lambda: not service.statistics().working)
    assert rig.queue.statistics()["open"]["test.svc"] == 0


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_pull_is_repeated(rig, flaky, when):
    await rig.serve(Asks(), coordinator=flaky)
    task_id = await rig.submit()
    await rig.wait_status(task_id, "waiting")
    flaky.away["pull"] = [when] * 3
    await rig.answer(task_id)
    assert (await rig.result(task_id)).status == "completed"


@pytest.mark.promise("P7")
@pytest.mark.parametrize("when", ["before", "after"])
async def test_handing_back_is_repeated(rig, flaky, when):
    service = await rig.serve(Asks(), coordinator=flaky)
    task_id = await rig.submit(name="x")
    await rig.wait_status(task_id, "waiting")
    flaky.away["release"] = [when] * 3
    await rig.stop(service)
    assert (await rig.plane.get_task(task_id)).status == "queued"
    await rig.serve(Asks())
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '["x","yes",1]'


@pytest.mark.promise("P7")
async def test_a_coordinator_that_stays_away_does_not_keep_the_service(rig, flaky, monkeypatch):
    monkeypatch.setattr("llama_corral.services.workflow.CLOSING_TIME", 0.05)
    probe = Probe()
    service = await rig.serve(Probed(probe), coordinator=flaky, drain_timeout=0.05)
    await rig.submit(name=1)
    await rig.submit(name=2)
    await probe.wait_entered(2)
    await anyio.wait_all_tasks_blocked()
    flaky.away["report"] = ["before"] * 100_000
    flaky.away["release"] = ["before"] * 100_000
    probe.open(1)
    await rig.stop(service)
    assert not service.executions


async def test_an_ack_that_fails_does_not_cost_the_claim(rig):
    queue = FaultyMessageQueue(MemoryMessageQueue())
    async with queue:
        plane_queue, rig.plane._effects._queue = rig.plane._effects._queue, queue
        service = await rig.serve(Counter(), queue=queue)
        service.reserve = lambda: None
        fault = queue.refuse("ack", topic="test.svc", times=1)
        record = await rig.run()
        assert (record.status, record.epoch, fault.applied) == ("completed", 1, 1)
        assert (await rig.run()).status == "completed"
        await rig.stop(service)
        rig.plane._effects._queue = plane_queue


@pytest.mark.parametrize("operation", ["receive", "consumer", "hear", "subscribe"])
async def test_a_queue_that_is_lost_comes_back(rig, operation):
    queue = FaultyMessageQueue(MemoryMessageQueue())
    async with queue:
        plane_queue, rig.plane._effects._queue = rig.plane._effects._queue, queue
        service = await rig.serve(Asks(), queue=queue)
        service.reserve = lambda: None
        waiting = await rig.submit(name="before")
        await rig.wait_status(waiting, "waiting")
        queue.refuse(operation, times=3)
        queue.reconnect()
        await rig.answer(waiting)
        assert (await rig.result(waiting)).status == "completed"
        late = await rig.submit(name="after")
        await rig.wait_status(late, "waiting")
        await rig.answer(late)
        assert (await rig.result(late)).status == "completed"
        await rig.stop(service)
        rig.plane._effects._queue = plane_queue


async def test_what_is_no_ticket_is_buried(rig):
    from llama_corral.protocol.messages import ActionTypes, QueueMessage

    await rig.serve(Echo(), cap=1)
    for message in (
        QueueMessage(action=ActionTypes.SEND_EVENT, data={"task_id": "t"}),
        QueueMessage(action=ActionTypes.NEW_TASK, data={"task_id": 7}),
        QueueMessage(),
    ):
        await rig.queue.publish(message, "test.svc")

    async def are_listed() -> bool:
        return len(await rig.store.list_dead_letters()) == 3

    await until(are_listed)
    assert (await rig.run(value=1)).result == "1"


async def test_a_ticket_of_an_ended_task_is_forgotten(rig):
    from llama_corral.protocol.messages import ActionTypes, QueueMessage

    service = await rig.serve(Echo())
    record = await rig.run(value=1)
    for _ in range(3):
        message = QueueMessage(action=ActionTypes.NEW_TASK, data={"task_id": record.task_id})
        await rig.queue.publish(message, "test.svc")
    await anyio.wait_all_tasks_blocked()
    assert (await rig.plane.get_task(record.task_id)) == record
    assert service.statistics().working == 0
    assert rig.queue.statistics()["topics"]["test.svc"] == 0


async def test_a_new_epoch_of_a_task_replaces_the_old_run(rig):
    """Whoever decided to give us the task once more knows better than the run of the old epoch."""
    probe = Probe()
    service = await rig.serve(Probed(probe))
    task_id = await rig.submit(name="x")
    await probe.wait_entered(1)
    await anyio.wait_all_tasks_blocked()
    answer = await rig.store.release(task_id, 1, None, 0)
    rig.plane._effects.tickets(answer.tickets)
    await probe.wait_entered(2)
    probe.open("x")
    record = await rig.result(task_id)
    assert (record.status, record.epoch) == ("completed", 2)
    await anyio.wait_all_tasks_blocked()
    assert not service.executions


async def test_a_coordinator_that_is_away_is_logged_once_a_call(rig, flaky, caplog):
    flaky.away["report"] = ["before"] * 5
    with caplog.at_level(logging.DEBUG, "llama_corral.services.support"):
        await rig.serve(Echo(), coordinator=flaky)
        assert (await rig.result(await rig.submit(name="a"))).status == "completed"
    said = [each.levelno for each in caplog.records if "trying again" in each.getMessage()]
    assert said.count(logging.WARNING) == 1
    assert said.count(logging.DEBUG) == 4
